"""The k nearest references of each row: exactly, tile by tile, or approximately, by an index."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import inf

import torch
from torch import Tensor

from nearfar.distance import (
    Distance,
    EuclideanDistance,
    check_distance,
    check_euclidean,
    unit,
)
from nearfar.engine.budget import current_limits, tile
from nearfar.engine.meeting import Group, confirmed, over_processes
from nearfar.engine.processes import Split
from nearfar.engine.relation import Relation
from nearfar.engine.search import Ready, as_distance, k_least, refuse_non_finite
from nearfar.engine.slices import spans
from nearfar.engine.together import Together, meet_without_gradient
from nearfar.inputs import ArrayLike, batch, lift
from nearfar.labels import class_ids, listed_rows, refuse
from nearfar.listed import Found

# Copies of a tile, and of the k nearest, held at the same time.
_BUFFERS = 6


@dataclass(frozen=True, eq=False)
class Space:
    """Rows and the references that they are compared with.

    Attributes:
        rows: (n, d) as given.
        columns: (m, d) as given; those of this process, if each has some.
        m: how many there are on all processes.
        hidden: (n, h) int64, the columns that are never found: first the row itself, then excluded
            columns, each once; -1 for none.
        distance: the chosen distance.
        tile: how many rows and columns are measured at a time; the same on all processes.
        together: the processes that the rows are spread over; None: this one has all.
    """

    rows: Tensor
    columns: Tensor
    m: int
    hidden: Tensor
    distance: Distance
    tile: tuple[int, int]
    together: Together | None

    @property
    def split(self) -> Split | None:
        """How the columns are spread over processes; None: this one has all.

        Then they come from their owners block by block, which takes all processes: each visits as
        many blocks of rows as the others, and all columns in each.
        """
        return None if self.together is None else self.together.columns

    @cached_property
    def ends(self) -> Tensor:
        """(2, d) the largest and the smallest value of each coordinate, on all processes.

        What is prepared block by block is shifted by what these say, so that columns of equal
        values are equally near, whichever block they are in.
        """
        assert self.together is not None
        x = unit(self.rows) if self.distance == "cosine" else self.rows
        own = x.new_full((2, x.shape[1]), -inf)
        if len(x):
            torch.stack([x.amax(0), -x.amin(0)], out=own)
        high, low = self.together.largest(own).unbind()
        return torch.stack([high, -low])

    @cached_property
    def ready(self) -> Ready:
        """Rows and columns, prepared; not of columns that are spread over processes."""
        return Ready.of(self.rows, self.columns, self.distance)

    def distances(self, measured: Tensor) -> Tensor:
        """The chosen distance, from what was measured."""
        return as_distance(measured, self.distance)


def rows_and_columns(x: ArrayLike, reference: ArrayLike | None) -> tuple[Tensor, Tensor]:
    """Rows and columns, checked and lifted; without a reference, the very rows.

    Raises:
        ValueError: a shape, device or row that is out of range or not finite.
    """
    rows = lift("x", batch("x", x).detach())
    refuse_non_finite("x", rows)
    if reference is None:
        return rows, rows
    columns = lift("reference", batch("reference", reference, like=rows).detach())
    refuse_non_finite("reference", columns)
    common = torch.promote_types(rows.dtype, columns.dtype)
    return rows.to(common), columns.to(common)


def space(
    rows: Tensor,
    columns: Tensor,
    relation: Relation,
    exclude: ArrayLike | None,
    distance: Distance,
    group: Group | None,
) -> tuple[Space, Relation]:
    """What is searched, and its relation, with the references of all processes.

    Args:
        rows: from `rows_and_columns`.
        columns: likewise.
        relation: of the two.
        exclude: (n, e) columns that are not compared, -1 for none.
        distance: by which they are compared.
        group: the processes that the rows are spread over.

    Raises:
        ValueError: a distance or an excluded column that there is not.
    """
    distance, together = check_distance(distance), None
    shape = tile(current_limits(), rows.device, rows.element_size(), _BUFFERS)
    if group is not None:
        others = None if columns is rows else columns
        together, relation = meet_without_gradient(group, rows, others, relation)
        height, width = map(min, zip(*together.processes.tell(shape), strict=True))
        shape = height, width
    own = relation.own if relation.match is None else relation.match
    n, m = relation.n, relation.m
    hidden = confirmed(group, lambda: hidden_columns(own, exclude, n, m, rows.device))
    return Space(rows, columns, m, hidden, distance, shape, together), relation


def unlabelled(rows: Tensor, columns: Tensor, own: ArrayLike | None) -> Relation:
    """A relation that says which column is the row itself, and no more.

    Args:
        rows: from `rows_and_columns`.
        columns: likewise.
        own: (n,) the column that is the row itself, -1 for none; None: none is.

    Raises:
        TypeError: `own` without a reference.
        ValueError: a column that there is not.
    """
    n, m = len(rows), len(columns)
    if columns is rows:
        if own is not None:
            raise TypeError("reference_self describes reference: pass it too.")
        return Relation(n, m, rows.device, symmetric=True)
    selves = _selves("reference_self", own, rows, columns)
    return Relation(n, m, rows.device, declared=selves, shared="columns")


def measured(where: Space, rows: slice, at_least: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """The closeness of these rows to each block of columns; infinite for hidden columns.

    Iterating twice with the same arguments gives the same bits.
    """
    width, split = max(where.tile[1], at_least), where.split
    every, ends = slice(None), None if split is None else where.ends
    for columns in spans(where.m, width) if split is None else split.blocks(width):
        others = None if split is None else split.block(where.columns, columns)
        if rows.start == rows.stop:
            continue
        if others is None:
            values = where.ready.measure(rows, columns)
        else:
            ready = Ready.of(where.rows[rows], others, where.distance, ends)
            values = ready.measure(every, every)
        place = where.hidden[rows] - columns.start
        row, which = ((place >= 0) & (place < values.shape[1])).nonzero(as_tuple=True)
        values[row, place[row, which]] = inf
        yield columns, values


def row_spans(where: Space, k: int) -> Iterator[slice]:
    """Blocks of rows whose tiles and k nearest fit the budget: at least one, which may be empty."""
    (height, width), n = where.tile, len(where.rows)
    most = n if where.split is None else where.split.most
    for rows in spans(max(most, 1), max(1, height * width // max(width, k))):
        yield slice(min(rows.start, n), min(rows.stop, n))


Visit = Callable[[slice, Tensor], None]


def k_nearest(
    where: Space, rows: slice, k: int, also: Visit | None = None
) -> tuple[Tensor, Tensor]:
    """(b, k) closeness and columns nearest to these rows; inf and -1 if there are fewer.

    Args:
        where: rows and columns.
        rows: which rows.
        k: how many neighbours.
        also: called with every tile.
    """
    size = rows.stop - rows.start
    values = where.rows.new_full((size, k), inf)
    index = torch.full((size, k), -1, device=where.rows.device)
    for columns, d in measured(where, rows, at_least=k):
        if also is not None:
            also(columns, d)
        near, place = k_least(d, k)
        # Earlier finds have lower indices, so a stable sort keeps ties in order.
        values, kept = torch.cat([values, near], 1).sort(dim=1, stable=True)
        index = torch.cat([index, place + columns.start], 1).gather(1, kept)
        values, index = values[:, :k], index[:, :k]
    return values, index.masked_fill(values == inf, -1)


@over_processes
def nearest(
    x: ArrayLike,
    *,
    k: int,
    distance: Distance = "cosine",
    reference: ArrayLike | None = None,
    reference_self: ArrayLike | None = None,
    exclude: ArrayLike | None = None,
    group: Group | None = None,
) -> Found:
    """The k nearest references of each row, exactly, in memory that does not grow with the pairs.

    Every pair is measured, tile by tile. Among equally far references, the lower index comes first.

    Args:
        x: (n, d) embeddings.
        k: how many neighbours.
        distance: "cosine", "euclidean", "sqeuclidean", "snr", "manhattan" or the p of a p-norm.
        reference: (m, d) embeddings to search. None: the other rows of x.
        reference_self: (n,) which row of `reference` is row i itself, -1 for none; it is not found.
        exclude: (n, e) integers, rows of the reference (or of x) that row i is not compared with,
            such as those of its own camera or session; -1 for none.
        group: the processes that the rows are spread over, as in a loss. Each finds the nearest of
            its own rows among those of all, which come from their owners block by block; what is
            found and `exclude` count the rows of all, in the order of the processes. `reference`
            is the same on all. None: this one has all.

    Returns:
        `Found`, nearest first; -1 and infinity if there are fewer than k.

    Raises:
        ValueError: a shape, length, device or number out of range, a row that is not finite.

    >>> nearest(torch.tensor([[1.0], [2.0], [4.0]]), k=2, distance="euclidean").indices
    tensor([[1, 2],
            [0, 2],
            [1, 0]])
    """
    check_k("k", k)
    rows, columns = rows_and_columns(x, reference)
    relation = unlabelled(rows, columns, reference_self)
    where, _ = space(rows, columns, relation, exclude, distance, group)
    return nearest_in(where, k)


def nearest_in(where: Space, k: int) -> Found:
    """The k nearest columns of each row."""
    values = where.rows.new_full((len(where.rows), k), inf)
    index = torch.full((len(where.rows), k), -1, device=where.rows.device)
    for rows in row_spans(where, k):
        values[rows], index[rows] = k_nearest(where, rows, k)
    return Found(index, where.distances(values))


def approximate_nearest(
    x: ArrayLike,
    *,
    k: int,
    distance: EuclideanDistance = "cosine",
    reference: ArrayLike | None = None,
    reference_self: ArrayLike | None = None,
    exclude: ArrayLike | None = None,
) -> Found:
    """Most of the k nearest references of each row, by a graph of neighbours (HNSW).

    Use it when measuring every pair takes too long: from about a million references, or if many
    searches share one reference. Some neighbours are missed; `nearest` on a hundred rows shows how
    many. The index is built on all cores, so the order of insertions, and with it which neighbours
    are missed, varies between calls. Needs the extra `search`.

    Args:
        x: (n, d) embeddings.
        k: how many neighbours.
        distance: "cosine", "euclidean" or "sqeuclidean".
        reference: (m, d) embeddings to search. None: the other rows of x.
        reference_self: (n,) which row of `reference` is row i itself, -1 for none; it is not found.
        exclude: (n, e) integers, rows of the reference (or of x) that row i is not compared with,
            such as those of its own camera or session; -1 for none.

    Returns:
        `Found`, nearest first; -1 and infinity if there are fewer than k.

    Raises:
        ImportError: usearch is not installed.
        ValueError: a shape, length, device or number out of range, a row that is not finite.

    Source: Malkov & Yashunin, "Efficient and robust approximate nearest neighbor search using
    hierarchical navigable small world graphs", 2018; the index is that of usearch.
    """
    check_k("k", k)
    try:
        from usearch.index import Index
    except ImportError as error:
        raise ImportError(
            "approximate_nearest needs usearch: pip install 'nearfar[search]'. `nearest` works "
            "without it, and is exact."
        ) from error
    known = check_euclidean(distance, "approximate_nearest searches; nearest takes others too")
    given, others = rows_and_columns(x, reference)
    where, _ = space(given, others, unlabelled(given, others, reference_self), exclude, known, None)
    rows, columns = (part.float().cpu() for part in (where.ready.rows, where.ready.columns))
    values, index = torch.full((len(rows), k), inf), torch.full((len(rows), k), -1)
    if len(rows) and len(columns):
        graph = Index(ndim=columns.shape[1], metric="l2sq", dtype="f32")
        graph.add(torch.arange(len(columns)).numpy(), columns.numpy())
        # More than k, since they may include the row itself and excluded rows.
        wanted = min(k + where.hidden.shape[1], len(columns))
        matches = graph.search(rows.numpy(), wanted)
        near = torch.from_numpy(matches.distances).float().reshape(len(rows), wanted)
        place = torch.from_numpy(matches.keys.astype("int64")).reshape(len(rows), wanted)
        for hidden in where.hidden.cpu().unbind(1):
            near = near.masked_fill(place == hidden[:, None], inf)
        near, order = near.sort(dim=1, stable=True)
        values[:, : min(k, wanted)] = near[:, :k]
        index[:, : min(k, wanted)] = place.gather(1, order)[:, :k]
    index.masked_fill_(values == inf, -1)
    device = given.device
    return Found(index.to(device), where.distances(values).to(device))


def check_k(name: str, k: object) -> None:
    """Refuse anything but a positive number of neighbours."""
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {k!r}.")


def _selves(name: str, own: ArrayLike | None, rows: Tensor, columns: Tensor) -> Tensor | None:
    if own is None:
        return None
    selves = class_ids(own, like=rows, name=name)
    outside = (selves < -1) | (selves >= len(columns))
    refuse(name, selves, outside, f"be a row of the reference, 0 to {len(columns) - 1}, or -1")
    return selves


def hidden_columns(
    own: Tensor | None, exclude: ArrayLike | None, n: int, m: int, device: torch.device
) -> Tensor:
    """See `Space.hidden`.

    Args:
        own: (n,) the column that is the row itself, -1 for none; None: no row is among them.
        exclude: (n, e) other columns, -1 for none.
        n: number of rows.
        m: number of columns.
        device: of the rows and columns.
    """
    own = torch.full((n,), -1, device=device) if own is None else own
    if exclude is None:
        return own[:, None]
    listed = listed_rows("exclude", exclude, n, m, device).sort(1).values
    again = torch.zeros_like(listed, dtype=torch.bool)
    again[:, 1:] = listed[:, 1:] == listed[:, :-1]
    return torch.cat([own[:, None], listed.masked_fill(again, -1)], 1)
