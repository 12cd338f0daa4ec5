"""The shape of an embedding space: whether it has collapsed, and how."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf, log
from typing import Any

import torch
from torch import Tensor

from nearfar.distance import length, unit
from nearfar.engine.budget import current_limits, tile
from nearfar.engine.closeness import Euclidean
from nearfar.engine.meeting import Group, over_processes
from nearfar.engine.relation import Block, Relation, within
from nearfar.engine.slices import spans
from nearfar.engine.together import Together, meet_without_gradient
from nearfar.inputs import ArrayLike, batch, lift
from nearfar.plain import number, plain
from nearfar.spectrum import effective_rank
from nearfar.tabulate import Table

# A dimension is dead if its deviation is below this share of the root mean square of all entries.
_DEAD = 1e-4
_BUFFERS = 6
_ROWS = 2**14  # rows converted to float64 at a time


@dataclass(frozen=True)
class Shape:
    r"""The shape of an embedding space.

    Attributes:
        n: how many rows there are.
        d: how many dimensions a row has; at most min(n, d) directions are visible.
        alignment: mean squared distance of positive pairs of unit rows, from 0 (all the same) to 4;
            None without labels or positive pairs.
        uniformity: log of the mean of :math:`e^{-2 |u - v|^2}` over all pairs of unit rows, from 0
            (all the same) down to about -4 (spread evenly); None with fewer than two rows.
        effective_rank: exp of the entropy of the singular values, from 1 to min(n, d); 0 if all
            rows are zero.
        singular_values: (min(n, d),) largest first.
        dead_share: share of the dimensions that are the same for all rows.
        norms: the smallest, the median and the largest length of a row.
        notes: the limits of these figures.
    """

    n: int
    d: int
    alignment: float | None
    uniformity: float | None
    effective_rank: float
    singular_values: tuple[float, ...] = field(repr=False)
    dead_share: float
    norms: tuple[float, float, float]
    notes: tuple[str, ...]

    def table(self) -> Table:
        """Each figure, and how to read it."""
        low, middle, high = (f"{norm:.4g}" for norm in self.norms)
        rows = [
            ("rows x dimensions", f"{self.n} x {self.d}", ""),
            ("alignment", number(self.alignment), "0 same, 2 unrelated, 4 opposite"),
            ("uniformity", number(self.uniformity), "0 collapsed, towards -4 spread evenly"),
            ("effective rank", f"{self.effective_rank:.2f}", f"1 to {min(self.n, self.d)}"),
            ("dead dimensions", f"{self.dead_share:.1%}", "the same for all rows"),
            ("norms", middle, f"{low} to {high}"),
        ]
        return Table(("figure", "value", "reading"), rows)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = plain(vars(self))
        return found

    def __str__(self) -> str:
        return "\n".join([self.table().plain(), *self.notes])


@over_processes
def shape(x: ArrayLike, labels: ArrayLike | None = None, *, group: Group | None = None) -> Shape:
    r"""Alignment, uniformity, spectrum, dead dimensions and norms: the signs of collapse.

    With unit rows :math:`u` and the singular values :math:`\sigma_k` of x itself,

    .. math::
        alignment = \mathop{\mathrm{mean}}_{similar\ i < j} |u_i - u_j|^2, \quad
        uniformity = \log \mathop{\mathrm{mean}}_{i < j} e^{-2 |u_i - u_j|^2}, \quad
        rank = \exp\Big(-\sum_k p_k \log p_k\Big),\ p_k = \frac{\sigma_k}{\sum_l \sigma_l}

    over every pair, tile by tile. A dimension is dead if its standard deviation is below a
    ten-thousandth of the root mean square of all entries.

    Args:
        x: (n, d) embeddings, n > 0.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
            None: no alignment.
        group: the processes that the rows are spread over, as in a loss. Each measures pairs of its
            own and later rows, which come from their owners block by block; the figures are those
            of all rows. None: this one has all.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels.
        ValueError: no rows, a wrong shape, a row that is not finite.

    >>> print(shape(torch.tensor([[1.0, 0], [0.6, 0.8], [0, 1]]), [0, 0, 1]))
    figure             value    reading
    -----------------  -------  -------------------------------------
    rows x dimensions  3 x 2
    alignment          0.8000   0 same, 2 unrelated, 4 opposite
    uniformity         -1.4998  0 collapsed, towards -4 spread evenly
    effective rank     1.97     1 to 2
    dead dimensions    0.0%     the same for all rows
    norms              1        1 to 1

    Sources: Wang & Isola, "Understanding contrastive representation learning through alignment and
    uniformity on the hypersphere", ICML 2020 (alpha = 2, t = 2); Garrido et al., "RankMe", ICML
    2023; Jing et al., "Understanding dimensional collapse in contrastive self-supervised
    learning", ICLR 2022.
    """
    rows = lift("x", batch("x", x).detach())
    if not rows.isfinite().all():
        raise ValueError(f"x[{int((~rows.isfinite()).any(1).nonzero()[0])}] is not finite.")
    relation, every = None if labels is None else within(labels, rows), _Rows(rows, None)
    if group is not None:
        relation, every = _spread(group, rows, relation)
    n, d = every.n, rows.shape[1]
    if not n:
        raise ValueError("x must have at least one row, got none.")
    alignment, uniformity = _pairs(every, relation)
    spectrum = _singular_values(every)
    norms = every.gather(length(rows).double())
    return Shape(
        n,
        d,
        alignment,
        uniformity,
        effective_rank(spectrum),
        tuple(spectrum.tolist()),
        _dead_share(every),
        (float(norms.min()), float(norms.quantile(0.5)), float(norms.max())),
        _notes(n, d, relation, alignment),
    )


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of this process, and what is known of those of all.

    Attributes:
        own: (k, d).
        together: the processes that the rows are spread over; None: these are all.
    """

    own: Tensor
    together: Together | None

    @property
    def n(self) -> int:
        """How many there are on all processes."""
        return len(self.own) if self.together is None else self.together.rows.n

    @property
    def first(self) -> int:
        """The place of the first among those of all."""
        return 0 if self.together is None else self.together.rows.own.start

    def gather(self, x: Tensor) -> Tensor:
        """(n, ...) what is known of each row, of the rows of all."""
        return x if self.together is None else self.together.rows.gather(x)

    def total(self, x: Tensor) -> Tensor:
        """The sum over processes."""
        return x if self.together is None else self.together.total(x)


def _spread(group: Group, x: Tensor, relation: Relation | None) -> tuple[Relation | None, _Rows]:
    """The relation of this process's rows to those of all, and the rows."""
    given = Relation(len(x), len(x), x.device) if relation is None else relation
    together, found = meet_without_gradient(group, x, None, given)
    return None if relation is None else found, _Rows(x, together)


def _pairs(every: _Rows, relation: Relation | None) -> tuple[float | None, float | None]:
    """Alignment and uniformity, in one pass over all pairs."""
    near, count, pairs = 0.0, 0, every.n * (every.n - 1) // 2
    total = torch.tensor(-inf, dtype=torch.float64)
    for squares, block in _tiles(every, relation):
        if block is not None and block.similar is not None:
            near += float(squares[block.similar & ~squares.isinf()].double().sum())
            count += int((block.similar & ~squares.isinf()).sum())
        part = squares.mul_(-2).exp_().sum(dtype=torch.float64)
        total = torch.logaddexp(total, part.log().cpu())
    near, count = every.total(torch.tensor([near, count], dtype=torch.float64)).tolist()
    if every.together is not None:
        total = every.together.processes.each(total).logsumexp(0)
    return near / count if count else None, float(total) - log(pairs) if pairs else None


def _tiles(every: _Rows, relation: Relation | None) -> Iterator[tuple[Tensor, Block | None]]:
    """|u_i - u_j|^2 of pairs i < j, once; the other entries of a tile are infinite.

    Those of the rows i of this process. All processes visit as many blocks of rows, and in each all
    columns, which come from their owners.
    """
    u, closeness, first = unit(every.own), Euclidean(squared=True), every.first
    size = min(tile(current_limits(), u.device, u.element_size(), _BUFFERS))
    most, split = len(u), None
    if every.together is None:
        u = closeness.prepare(u, None)[0]
    else:
        split = every.together.rows
        most, size = split.most, min(s for (s,) in split.processes.tell([size]))
    for at in spans(most, size):
        rows = slice(min(at.start, len(u)), min(at.stop, len(u)))
        for columns in spans(every.n, size) if split is None else split.blocks(size):
            others = u[columns] if split is None else split.block(u, columns)
            start = rows.start + first
            if rows.start == rows.stop or columns.start < start:
                continue
            a = u[rows]
            if split is not None:
                a, b = closeness.prepare(a, others)
                others = others if b is None else b
            squares = closeness.measure(a, others)[0]
            if columns.start == start:  # the same rows
                squares.masked_fill_(torch.ones_like(squares, dtype=torch.bool).tril(), inf)
            yield squares, None if relation is None else relation.block(rows, columns)


def _singular_values(every: _Rows) -> Tensor:
    """(min(n, d),) float64, from the smaller of the two Gram matrices, largest first."""
    x, d = every.own, every.own.shape[1]
    if every.n < d:
        wide = every.gather(x).double()
        gram = wide @ wide.T
    else:
        gram = torch.zeros(d, d, dtype=torch.float64, device=x.device)
        for rows in spans(len(x), _ROWS):
            wide = x[rows].double()
            gram.addmm_(wide.T, wide)
        gram = every.total(gram)
    squares: Tensor = torch.linalg.eigvalsh(gram)
    return squares.clamp(min=0).sqrt().flip(0)


def _dead_share(every: _Rows) -> float:
    x, n = every.own.double(), every.n
    size = (every.total(x.square().sum(0)).mean() / n).sqrt()
    mean = every.total(x.sum(0)) / n
    deviation = (every.total((x - mean).square().sum(0)) / n).sqrt()
    return float((deviation <= _DEAD * size).double().mean())


def _notes(n: int, d: int, relation: Relation | None, alignment: float | None) -> tuple[str, ...]:
    few = f"{n} rows span at most {n} of {d} dimensions: the effective rank says little. Use more."
    alone = "No two rows share a label, so there is no alignment."
    return (*([few] if n < d else []), *([alone] if relation and alignment is None else []))
