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
from nearfar.engine.relation import Block, Relation, within
from nearfar.engine.slices import spans
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


def shape(x: ArrayLike, labels: ArrayLike | None = None) -> Shape:
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
    n, d = rows.shape
    if not n:
        raise ValueError("x must have at least one row, got none.")
    if not rows.isfinite().all():
        raise ValueError(f"x[{int((~rows.isfinite()).any(1).nonzero()[0])}] is not finite.")
    relation = None if labels is None else within(labels, rows)
    alignment, uniformity = _pairs(unit(rows), relation)
    spectrum = _singular_values(rows)
    norms = length(rows).double()
    return Shape(
        n,
        d,
        alignment,
        uniformity,
        effective_rank(spectrum),
        tuple(spectrum.tolist()),
        _dead_share(rows),
        (float(norms.min()), float(norms.quantile(0.5)), float(norms.max())),
        _notes(n, d, relation, alignment),
    )


def _pairs(u: Tensor, relation: Relation | None) -> tuple[float | None, float | None]:
    """Alignment and uniformity, in one pass over all pairs."""
    near, n_similar, total, pairs = 0.0, 0, -inf, len(u) * (len(u) - 1) // 2
    for squares, block in _tiles(u, relation):
        if block is not None and block.similar is not None:
            near += float(squares[block.similar & ~squares.isinf()].double().sum())
            n_similar += int((block.similar & ~squares.isinf()).sum())
        part = squares.mul_(-2).exp_().sum(dtype=torch.float64)
        total = float(torch.logaddexp(torch.tensor(total, dtype=torch.float64), part.log().cpu()))
    return near / n_similar if n_similar else None, total - log(pairs) if pairs else None


def _tiles(u: Tensor, relation: Relation | None) -> Iterator[tuple[Tensor, Block | None]]:
    """|u_i - u_j|^2 of every pair i < j, once; the other entries of a tile are infinite."""
    closeness = Euclidean(squared=True)
    a, _ = closeness.prepare(u, None)
    size = min(tile(current_limits(), u.device, u.element_size(), _BUFFERS))
    for rows in spans(len(a), size):
        for columns in spans(len(a), size):
            if columns.start < rows.start:
                continue
            squares = closeness.measure(a[rows], a[columns])[0]
            if columns == rows:
                squares.masked_fill_(torch.ones_like(squares, dtype=torch.bool).tril(), inf)
            yield squares, None if relation is None else relation.block(rows, columns)


def _singular_values(x: Tensor) -> Tensor:
    """(min(n, d),) float64, from the smaller of the two Gram matrices, largest first."""
    n, d = x.shape
    if n < d:
        wide = x.double()
        gram = wide @ wide.T
    else:
        gram = torch.zeros(d, d, dtype=torch.float64, device=x.device)
        for rows in spans(n, _ROWS):
            wide = x[rows].double()
            gram.addmm_(wide.T, wide)
    squares: Tensor = torch.linalg.eigvalsh(gram)
    return squares.clamp(min=0).sqrt().flip(0)


def _dead_share(x: Tensor) -> float:
    size = x.double().square().mean().sqrt()
    deviation = x.double().std(0, unbiased=False)
    return float((deviation <= _DEAD * size).double().mean())


def _notes(n: int, d: int, relation: Relation | None, alignment: float | None) -> tuple[str, ...]:
    few = f"{n} rows span at most {n} of {d} dimensions: the effective rank says little. Use more."
    alone = "No two rows share a label, so there is no alignment."
    return (*([few] if n < d else []), *([alone] if relation and alignment is None else []))
