"""Hard negatives from a corpus that need not fit in memory."""

from dataclasses import dataclass
from math import inf, nan

import torch
from torch import Tensor

from nearfar.distance import Distance, between_rows, check_distance, unit
from nearfar.engine.budget import current_limits, tile
from nearfar.engine.search import Ready, as_distance, as_measured, k_least, refuse_non_finite
from nearfar.engine.slices import spans
from nearfar.inputs import ArrayLike, batch, between, lift, positive_integer
from nearfar.listed import Found
from nearfar.mine.blocks import Blocks, Corpus
from nearfar.mine.comparison import bounds
from nearfar.mine.known import Known, Positives, items_of, listed_positives, refuse_rows_beyond
from nearfar.mine.mined import CorpusNegatives, LeftOut
from nearfar.reduction import sum_dtype

# Copies of a tile, and of the nearest rows, held at the same time.
_BUFFERS = 6


def corpus_negatives(
    queries: ArrayLike,
    corpus: Corpus,
    positives: Positives,
    k: int = 1,
    *,
    distance: Distance = "cosine",
    margin: float | None = None,
    relative_margin: float | None = None,
    score_range: tuple[float, float] | None = None,
    skip: int = 0,
    ids: ArrayLike | None = None,
) -> CorpusNegatives:
    r"""The k nearest negatives of each query in a corpus of any size, exactly.

    A row of the corpus that is nearer than a known positive may be a positive that nobody labelled.
    With the score :math:`s = \cos` for "cosine" and :math:`s = -d` for the other distances, and
    :math:`s^+` the lowest score of the query's positives, a row is a negative only if

    .. math:: s \le s^+ - m, \qquad s \le s^+ - r\,|s^+|, \qquad low \le s \le high

    The corpus is read twice, block by block: first the positives are measured, then every row.
    Memory grows with the queries and with what is found for each, never with the corpus. Queries
    can be passed some at a time: each finds the same. Among equally far rows, the lower index comes
    first. A copy of a positive is left out by a margin that exceeds the rounding of float32:
    margin=1e-5 for cosine distance, relative_margin=1e-4 for the others.

    Args:
        queries: (n, d) embeddings.
        corpus: (m, d) embeddings of any dtype: a tensor, a NumPy array, a memory-mapped one
            (`numpy.load(file, mmap_mode="r")`), or anything else that is sliced like an array. Or
            arrays (b, d), one after the other, as a list or as an object whose `__iter__` begins
            anew each time.
        positives: (n,) integers, the row of the corpus that is positive for each query; or (n, p)
            with several, -1 for none; or a list of rows for each query, which may be empty. List
            all that are known: the others are taken for negatives. If a query is a row of the
            corpus itself, list that row too.
        k: how many negatives.
        distance: "cosine", "euclidean", "sqeuclidean", "snr", "manhattan" or the p of a p-norm.
        margin: m, how much farther than the farthest positive a negative must be, in units of the
            distance. A query without positives has no limit.
        relative_margin: r, 0 or more, the same as a share of the positive's score.
        score_range: (low, high) scores to keep.
        skip: how many of the nearest negatives to leave out. To draw negatives at random from
            those of ranks 10 to 50, pass skip=10, k=40, and draw from `indices`.
        ids: (m,) integers, the item of each row of the corpus, -1 for none: rows of the same item
            as a positive are no negatives.

    Returns:
        `CorpusNegatives`, nearest first. Printed, it says how much was left out, and why.

    Raises:
        TypeError: a corpus that can be read only once, positives or ids that are not integers.
        ValueError: a shape, length or number out of range, a row that is not finite.

    >>> queries = torch.tensor([[1.0, 0], [0, 1]])
    >>> corpus = torch.tensor([[0.8, 0.6], [0.9, 0.5], [0.6, 0.8], [-1, 0], [0, -1]])
    >>> found = corpus_negatives(queries, corpus, [0, 2], k=2, margin=0.1)
    >>> found.indices
    tensor([[2, 4],
            [0, 1]])
    >>> print(found)
    2 queries against 5 rows, 2 negatives each
    mean cosine distance: 0.2000 to the farthest positive, 0.4000 to the nearest negative
    left out   pairs
    ---------  -----
    positives      2
    same item      0
    too near       1
    skipped        0
    >>> print(found.examples().plain())  # positives that nobody labelled?
    query  row  distance  positive's
    -----  ---  --------  ----------
        0    1    0.1258      0.2000

    Sources: the guards are those of `mine_hard_negatives` in sentence-transformers; Moreira et al.,
    "NV-Retriever", 2024, which recommends `relative_margin=0.05`.
    """
    positive_integer("k", k)
    if not isinstance(skip, int) or isinstance(skip, bool) or skip < 0:
        raise ValueError(f"skip must be an integer of at least 0, got {skip!r}.")
    distance = check_distance(distance)
    guards = _Guards.of(distance, margin, relative_margin, score_range)
    rows = lift("queries", batch("queries", queries).detach())
    refuse_non_finite("queries", rows)
    blocks = Blocks.of(corpus, rows)
    known = listed_positives(positives, rows)
    refuse_rows_beyond(known, blocks.m)
    seen = _Survey.of(rows, blocks, known, distance)
    refuse_rows_beyond(known, seen.m)
    items = items_of(ids, known, seen.m)
    rows = rows.to(seen.ends.dtype)
    limit = as_measured(guards.nearest_allowed(seen.farthest), distance).to(rows.dtype)
    search = _Search.begin(rows, k + skip, limit, Known(known, items))
    search.through(blocks, seen, distance)
    return search.found(seen, guards, skip)


@dataclass(frozen=True)
class _Guards:
    """What keeps likely positives out; see `corpus_negatives`."""

    distance: Distance
    margin: float | None
    relative_margin: float | None
    low: float
    high: float

    @classmethod
    def of(
        cls,
        distance: Distance,
        margin: float | None,
        relative_margin: float | None,
        score_range: tuple[float, float] | None,
    ) -> "_Guards":
        if margin is not None:
            between("margin", margin, -inf, inf)
        if relative_margin is not None:
            between("relative_margin", relative_margin, 0, inf)
        return cls(distance, margin, relative_margin, *bounds("score_range", score_range))

    def turned(self, values: Tensor) -> Tensor:
        """Distances as scores, or scores as distances."""
        return 1 - values if self.distance == "cosine" else -values

    def nearest_allowed(self, farthest: Tensor) -> Tensor:
        """(n,) the least distance of a negative.

        Args:
            farthest: (n,) distance of the farthest positive, -inf if there is none.
        """
        lowest = self.turned(farthest)
        score = torch.full_like(lowest, self.high)
        if self.margin is not None:
            score = score.minimum(lowest - self.margin)
        if self.relative_margin is not None:
            below = lowest - self.relative_margin * lowest.abs()
            score = torch.where(lowest == inf, score, score.minimum(below))
        return self.turned(score)


@dataclass(frozen=True, eq=False)
class _Survey:
    """What is learned of a corpus before it is searched.

    Attributes:
        m: how many rows there are.
        ends: (2, d) the largest and the smallest value of each coordinate of rows and queries, at
            length 1 for cosine distance, in the dtype of the search.
        farthest: (n,) the distance of each query's farthest positive, -inf if there is none.
    """

    m: int
    ends: Tensor
    farthest: Tensor

    @classmethod
    def of(cls, queries: Tensor, blocks: Blocks, known: Tensor, distance: Distance) -> "_Survey":
        """Read the corpus once.

        Args:
            queries: (n, d).
            blocks: the corpus.
            known: (n, p) positives, -1 for none.
            distance: by which they are compared.
        """
        m, wide = 0, sum_dtype(queries)
        ends = _wider(queries.new_full((2, queries.shape[1]), -inf), queries, distance)
        farthest = queries.new_full((len(queries),), -inf, dtype=wide)
        for start, block in blocks:
            m = start + len(block)
            ends = _wider(ends, block, distance)
            row, slot = ((known >= start) & (known < m)).nonzero(as_tuple=True)
            for at in spans(len(row), blocks.height):
                of_query, of_block = row[at], known[row[at], slot[at]] - start
                d = between_rows(queries[of_query].to(wide), block[of_block].to(wide), distance)
                farthest.scatter_reduce_(0, of_query, d, "amax")
        return cls(m, ends * torch.tensor([[1], [-1]], device=ends.device), farthest)


def _wider(ends: Tensor, rows: Tensor, distance: Distance) -> Tensor:
    """(2, d) the largest of each coordinate and of its negative, so far and in these rows."""
    if not len(rows):
        return ends
    rows = unit(rows) if distance == "cosine" else rows
    return ends.maximum(torch.stack([rows.amax(0), -rows.amin(0)]))


@dataclass(eq=False)
class _Search:
    """The nearest rows so far of each query.

    Attributes:
        queries: (n, d).
        limit: (n,) how near a negative may be, as `Ready` measures.
        positives: which rows are no negatives.
        values: (n, k) what was measured of the nearest negatives, inf if there are fewer.
        index: (n, k) which rows they are.
        too_near: (n, 1) the same of the nearest row below the limit.
        too_near_index: (n, 1) likewise.
        n_too_near: how many rows were below the limit.
    """

    queries: Tensor
    limit: Tensor
    positives: Known
    values: Tensor
    index: Tensor
    too_near: Tensor
    too_near_index: Tensor
    n_too_near: int = 0

    @classmethod
    def begin(cls, queries: Tensor, k: int, limit: Tensor, positives: Known) -> "_Search":
        """Before the first row."""
        (values, index), (near, near_index) = (
            (
                queries.new_full((len(queries), size), inf),
                torch.full((len(queries), size), -1, device=queries.device),
            )
            for size in (k, 1)
        )
        return cls(queries, limit, positives, values, index, near, near_index)

    def through(self, blocks: Blocks, seen: _Survey, distance: Distance) -> None:
        """Measure every row."""
        dtype, device = self.queries.dtype, self.queries.device
        height, width = tile(current_limits(), device, self.queries.element_size(), _BUFFERS)
        height = max(1, height * width // max(width, self.values.shape[1]))
        m = 0
        for start, block in blocks:
            m = start + len(block)
            ready = Ready.of(self.queries, block.to(dtype), distance, seen.ends)
            for rows in spans(len(self.queries), height):
                for columns in spans(len(block), width):
                    self.take(rows, start + columns.start, ready.measure(rows, columns))
        if m != seen.m:
            raise ValueError(f"corpus had {seen.m} rows when read first, and {m} the second time.")

    def take(self, rows: slice, first: int, d: Tensor) -> None:
        """Keep what is nearest.

        Args:
            rows: which queries.
            first: the first of the rows that they are compared with.
            d: (b, c) what was measured.
        """
        # Later, hardly a query has a new row among its nearest.
        (at,) = (d.amin(1) < self.values[rows, -1]).nonzero(as_tuple=True)
        if not len(at):
            return
        d, at = d[at], at + rows.start
        d.masked_fill_(self.positives.mask(at, slice(first, first + d.shape[1])), inf)
        below = d < self.limit[at, None]
        if below.any():
            self.n_too_near += int(below.sum())
            near = d.masked_fill(~below, inf)
            _merge(self.too_near, self.too_near_index, at, near, first)
            d.masked_fill_(below, inf)
        _merge(self.values, self.index, at, d, first)

    def found(self, seen: _Survey, guards: _Guards, skip: int) -> CorpusNegatives:
        """What was found, in all rows."""
        distances = as_distance(self.values, guards.distance)
        distances[guards.turned(distances) < guards.low] = inf
        index = self.index.masked_fill(distances == inf, -1)
        near = as_distance(self.too_near, guards.distance)
        positives, same_item = self.positives.counts()
        skipped = int((index[:, :skip] >= 0).sum())
        farthest = seen.farthest.masked_fill(seen.farthest == -inf, nan)
        return CorpusNegatives(
            indices=index[:, skip:],
            distances=distances[:, skip:],
            positive_distances=farthest.to(distances.dtype),
            too_near=Found(self.too_near_index.masked_fill(near == inf, -1), near),
            left_out=LeftOut(positives, same_item, self.n_too_near, skipped),
            n_corpus=seen.m,
            distance=guards.distance,
        )


def _merge(values: Tensor, index: Tensor, at: Tensor, d: Tensor, first: int) -> None:
    """Put the smallest of `d` among those kept for the rows `at`; ties keep the lowest column."""
    k = values.shape[1]
    (some,) = (d.amin(1) < values[at, -1]).nonzero(as_tuple=True)
    if not len(some):
        return
    at = at[some]
    near, place = k_least(d[some], k)
    # Earlier finds have lower indices, so a stable sort keeps ties in order.
    both, order = torch.cat([values[at], near], 1).sort(dim=1, stable=True)
    values[at] = both[:, :k]
    index[at] = torch.cat([index[at], place + first], 1).gather(1, order)[:, :k]
