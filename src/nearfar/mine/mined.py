"""The negatives that were found in a corpus, what was left out, and how they print."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nearfar.distance import Distance
from nearfar.listed import Found
from nearfar.plain import number, plain
from nearfar.tabulate import Table


@dataclass(frozen=True)
class LeftOut:
    """How many pairs of a query and a row of the corpus are no negatives.

    Attributes:
        positives: pairs listed as positives.
        same_item: other rows of the item of a positive, by `ids`.
        too_near: rows nearer than `margin`, `relative_margin` and `score_range` allow.
        skipped: nearest rows left out by `skip`.
    """

    positives: int
    same_item: int
    too_near: int
    skipped: int

    def table(self) -> Table:
        """The counts."""
        names = [name.replace("_", " ") for name in vars(self)]
        return Table(
            ("left out", "pairs"), list(zip(names, map(str, vars(self).values()), strict=True))
        )


@dataclass(frozen=True, eq=False)
class CorpusNegatives:
    """Negatives of each query in a corpus.

    Attributes:
        indices: (n, k) int64, rows of the corpus, nearest first; -1 if there are fewer than k.
        distances: (n, k) their distances; inf if there are fewer.
        positive_distances: (n,) the distance of the farthest positive; NaN if there is none.
        too_near: `Found`, (n, 1), the nearest row that the guards left out; -1 and inf if none.
        left_out: how many rows are no negatives, and why.
        n_corpus: how many rows the corpus has.
        distance: the name of the distance.
    """

    indices: Tensor
    distances: Tensor
    positive_distances: Tensor
    too_near: Found
    left_out: LeftOut
    n_corpus: int
    distance: Distance

    @property
    def n_short(self) -> int:
        """How many queries have fewer than k negatives."""
        return int((self.indices < 0).any(1).sum())

    def examples(
        self,
        limit: int = 10,
        *,
        queries: Sequence[object] | None = None,
        corpus: Sequence[object] | None = None,
    ) -> Table:
        """Rows left out as too near, to see whether they are positives that nobody labelled.

        One of each query at most; first those that are nearest compared with the farthest positive.

        Args:
            limit: how many.
            queries: (n,) texts or names to show in place of their indices.
            corpus: (m,) those of the rows of the corpus.
        """
        (query,) = (self.too_near.indices[:, 0] >= 0).nonzero(as_tuple=True)
        row, near = self.too_near.indices[query, 0], self.too_near.distances[query, 0]
        positive = self.positive_distances[query]
        order = (near - positive.nan_to_num()).argsort(stable=True)[:limit]
        shown = [
            (_shown(queries, i), _shown(corpus, j), number(d), number(p if p == p else None))
            for i, j, d, p in zip(
                *(part[order].tolist() for part in (query, row, near, positive)), strict=True
            )
        ]
        return Table(("query", "row", "distance", "positive's"), shown)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the figures, without the rows of each query."""
        found: dict[str, Any] = plain(
            {
                "n_queries": len(self.indices),
                "n_corpus": self.n_corpus,
                "k": self.indices.shape[1],
                "n_short": self.n_short,
                "distance": self.distance,
                **self._means(),
                "left_out": vars(self.left_out),
            }
        )
        return found

    def _means(self) -> dict[str, float]:
        """Mean distances, of the queries that have such a row; NaN if none has."""
        nearest = self.distances[:, 0]
        return {
            "mean_farthest_positive": self.positive_distances.nanmean().item(),
            "mean_nearest_negative": nearest[nearest.isfinite()].mean().item(),
        }

    def __str__(self) -> str:
        n, k = self.indices.shape
        title = f"{n} queries against {self.n_corpus} rows, {k} negatives each"
        if self.n_short:
            title += f", fewer for {self.n_short}"
        positive, negative = (number(m if m == m else None) for m in self._means().values())
        means = (
            f"mean {self.distance} distance: {positive} to the farthest positive, "
            f"{negative} to the nearest negative"
        )
        return f"{title}\n{means}\n{self.left_out.table().plain()}"


def _shown(names: Sequence[object] | None, index: int) -> str:
    """The name of a row, cut to what fits a line, or its index."""
    if names is None:
        return str(index)
    text = " ".join(str(names[index]).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
