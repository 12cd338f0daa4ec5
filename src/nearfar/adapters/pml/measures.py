"""What a distance of pytorch-metric-learning measures, as nearfar says it."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn.functional import normalize

from nearfar.distance import Distance
from nearfar.extras import needs

with needs("pml"):
    from pytorch_metric_learning import distances


@dataclass(frozen=True)
class Measure:
    """A distance or a similarity of rows.

    Attributes:
        of: a distance of nearfar, or "inner_product".
        normalize: whether nearfar scales rows to length 1 first.
        norm: the p of the norm by which rows are scaled before; None: they are not.
        cosine: whether margins are cosines, where nearfar's are the distances 1 - cos.
        shown: how messages show it.
    """

    of: Distance | Literal["inner_product"]
    normalize: bool
    norm: float | None
    cosine: bool
    shown: str

    @classmethod
    def read(cls, distance: object) -> "Measure":
        """Read one of theirs.

        Raises:
            TypeError: a distance that nearfar does not have.
        """
        kind = type(distance)
        if kind not in _KNOWN or (found := _distance(distance)) is None:
            raise TypeError(
                f"nearfar has no counterpart of the distance {_shown(distance)}. It has "
                "LpDistance(p) with power=1, LpDistance(power=2), SNRDistance, CosineSimilarity "
                "and DotProductSimilarity, of these very classes; nearfar.batch_loss takes a "
                "function of your own."
            )
        scaled, p = bool(distance.normalize_embeddings), float(distance.p)  # type: ignore[attr-defined]
        by_another_norm = scaled and p != 2
        cosine = found == "inner_product" and scaled and p == 2
        return cls(
            "cosine" if cosine else found,
            scaled and not by_another_norm,
            p if by_another_norm else None,
            cosine,
            _shown(distance),
        )

    def rows(self, x: Tensor) -> Tensor:
        """The rows, scaled where nearfar does not scale them itself."""
        return x if self.norm is None else normalize(x, p=self.norm)

    def as_distance(self) -> dict[str, Any]:
        """What a loss or a miner of distances takes."""
        if self.of == "inner_product":
            raise TypeError(
                f"{self.shown} is no distance of nearfar's losses and miners of distances: take "
                "CosineSimilarity() or LpDistance()."
            )
        return {"distance": self.of, "normalize": self.normalize}

    def as_similarity(self) -> dict[str, Any]:
        """What a loss of similarities takes."""
        if self.of not in ("inner_product", "cosine", "sqeuclidean"):
            raise TypeError(
                f"{self.shown} is no similarity of nearfar's losses of similarities: take "
                "CosineSimilarity(), DotProductSimilarity() or LpDistance(power=2), or write the "
                "loss as a rule for nearfar.batch_loss."
            )
        return {"similarity": self.of, "normalize": self.normalize}

    def margin(self, value: float) -> float:
        """A distance of nearfar, where theirs is a distance or a cosine."""
        return 1 - value if self.cosine else value


_KNOWN = {
    distances.LpDistance,
    distances.SNRDistance,
    distances.CosineSimilarity,
    distances.DotProductSimilarity,
}


def _distance(given: Any) -> Distance | Literal["inner_product"] | None:
    """Without the scaling of rows; None: nearfar has no such distance."""
    if isinstance(given, distances.LpDistance):
        if given.power == 1:
            return "euclidean" if given.p == 2 else float(given.p)
        return "sqeuclidean" if given.p == given.power == 2 else None
    if given.power != 1:
        return None
    return "snr" if isinstance(given, distances.SNRDistance) else "inner_product"


def _shown(given: Any) -> str:
    names = ("p", "power", "normalize_embeddings")
    settings = [f"{name}={getattr(given, name)!r}" for name in names if hasattr(given, name)]
    return f"{type(given).__name__}({', '.join(settings)})"
