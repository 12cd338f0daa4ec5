"""Losses over several processes: nearfar's, the formula's, and those of other libraries.

    pip install pytorch-metric-learning sentence-transformers
    pip install --no-deps --target DIRECTORY open_clip_torch     # and PYTHONPATH=DIRECTORY

Each contender is a module: called with a process's rows and labels, it gives the loss. It is made
inside the process group, and its parameters are the learned numbers. Libraries are imported inside
the functions, so that a process loads only what it measures.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from math import degrees
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, since it would keep that one
import torch.nn.functional as F  # noqa: N812
from cases import PER_CLASS, textbook, towers
from measure import installed
from torch import Tensor, nn

import nearfar
from nearfar.distributed import over

Function = Callable[..., Tensor]
Learned = Mapping[str, Tensor]
Build = Callable[[Learned], nn.Module]

NEARFAR, TEXTBOOK = "nearfar", "textbook"
METRIC_LEARNING, TRANSFORMERS = "pytorch-metric-learning", "sentence-transformers"
OPEN_CLIP = "open_clip_torch"
MARGIN, ANGLE, SCALE = 0.5, 0.5, 64.0


@dataclass(frozen=True)
class Data:
    """A batch: embeddings, their labels, and the numbers that a loss learns."""

    rows: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    learned: Learned

    def to(self, dtype: torch.dtype) -> "Data":
        """The same numbers in another precision."""
        rows = tuple(x.to(dtype) for x in self.rows)
        return Data(rows, self.labels, {k: v.to(dtype) for k, v in self.learned.items()})

    def part(self, own: slice) -> "Data":
        """The rows of one process."""
        rows, labels = ([a[own] for a in arrays] for arrays in (self.rows, self.labels))
        return Data(tuple(rows), tuple(labels), self.learned)


@dataclass(frozen=True)
class Contender:
    """One implementation of a loss.

    Attributes:
        build: makes it from the learned numbers.
        package: what has to be installed; None if plain torch is enough.
    """

    build: Build
    package: str | None = None

    @property
    def missing(self) -> str | None:
        """What has to be installed first, if anything."""
        return None if self.package is None or installed(self.package) else self.package


@dataclass(frozen=True)
class Case:
    """A loss, and who computes it over several processes.

    Attributes:
        draw: makes the batch of all processes from its number of rows and their length.
        contenders: by name; they agree where one process has the whole batch.
        rows: of a process, where time and memory are measured.
    """

    draw: Callable[[int, int], Data]
    contenders: Mapping[str, Contender]
    rows: int


class Loss(nn.Module):
    """A function of rows, labels and learned numbers, which are its parameters."""

    def __init__(self, function: Function, learned: Learned) -> None:
        super().__init__()
        self.function, self.learned = function, nn.ParameterDict(learned)

    def forward(self, *given: Tensor) -> Tensor:
        return self.function(*given, **self.learned)


# -- nearfar and the formula ----------------------------------------------------------------------

# By name, what the losses take as `group`.
OURS: Mapping[str, Any] = {NEARFAR: "world", f"{NEARFAR}, ring": over("world", ring=True)}


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes, with a gradient, as searches and answers have it."""
    if x.is_floating_point():
        return torch.cat(torch.distributed.nn.all_gather(x))
    found = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x)
    return torch.cat(found)


def ours_and_formula(ours: Function, formula: Function, **hyper: Any) -> dict[str, Contender]:
    def of_all(*given: Tensor, **learned: Tensor) -> Tensor:
        return formula(*map(gathered, given), **learned, **hyper)

    found = {
        name: Contender(partial(Loss, partial(ours, group=group, **hyper)))
        for name, group in OURS.items()
    }
    return {**found, TEXTBOOK: Contender(partial(Loss, of_all))}


def contrastive(x: Tensor, labels: Tensor, *, margin: float, squared: bool) -> Tensor:
    """The formula of distances that are not squared, which pytorch-metric-learning has."""
    assert not squared
    d, (positive, negative) = torch.cdist(x, x), kinds(labels)
    return d[positive].mean() + F.relu(margin - d)[negative].mean()


def triplet(x: Tensor, labels: Tensor, *, margin: float) -> Tensor:
    """Every triplet: the positive pairs beside all negatives of their anchors."""
    d, (positive, negative) = torch.cdist(x, x), kinds(labels)
    anchor = positive.nonzero()[:, 0]
    return F.relu(d[positive][:, None] - d[anchor] + margin)[negative[anchor]].mean()


def kinds(labels: Tensor) -> tuple[Tensor, Tensor]:
    same = labels[:, None] == labels
    return same & ~torch.eye(len(labels), dtype=torch.bool), ~same


# -- other libraries ------------------------------------------------------------------------------


def open_clip() -> Any:
    """Their file of losses; the package around it needs torchvision."""
    package = find_spec("open_clip")
    path = Path(package.submodule_search_locations[0]) / "loss.py"
    spec = spec_from_file_location("open_clip_loss", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_open_clip(name: str, **options: Any) -> Contender:
    def build(learned: Learned) -> nn.Module:
        place = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
        loss = getattr(open_clip(), name)(**options, **place)
        names = {"scale": "logit_scale", "bias": "logit_bias"}

        def function(x: Tensor, y: Tensor, **learned: Tensor) -> Tensor:
            numbers = {names[name]: value for name, value in learned.items()}
            return loss(F.normalize(x), F.normalize(y), **numbers)

        return Loss(function, learned)

    return Contender(build, OPEN_CLIP)


def ranking(learned: Learned) -> nn.Module:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    no_encoder: Any = None  # the loss is applied to embeddings
    scale = 1 / learned["temperature"].item()
    loss = MultipleNegativesRankingLoss(no_encoder, scale=scale, gather_across_devices=True)

    def function(query: Tensor, positive: Tensor) -> Tensor:
        return loss.compute_loss_from_embeddings([query, positive], query.new_zeros(len(query)))

    return Loss(function, {})


def of_metric_learning(make: Callable[[Learned], Any]) -> dict[str, Contender]:
    """A loss in their wrapper, as it is and with `efficient=True`."""

    def build(learned: Learned, *, efficient: bool) -> nn.Module:
        from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

        return Loss(DistributedLossWrapper(make(learned), efficient=efficient), {})

    return {
        METRIC_LEARNING: Contender(partial(build, efficient=False), METRIC_LEARNING),
        f"{METRIC_LEARNING}, efficient": Contender(partial(build, efficient=True), METRIC_LEARNING),
    }


def their_sup_con(learned: Learned) -> Any:
    from pytorch_metric_learning.losses import SupConLoss
    from pytorch_metric_learning.reducers import MeanReducer

    return SupConLoss(temperature=learned["temperature"].item(), reducer=MeanReducer())


def their_contrastive(_: Learned) -> Any:
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.losses import ContrastiveLoss
    from pytorch_metric_learning.reducers import MeanReducer

    distance = LpDistance(normalize_embeddings=False)
    return ContrastiveLoss(neg_margin=MARGIN, distance=distance, reducer=MeanReducer())


def their_triplet(_: Learned) -> Any:
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.reducers import MeanReducer

    distance = LpDistance(normalize_embeddings=False)
    return TripletMarginLoss(margin=MARGIN, distance=distance, reducer=MeanReducer())


def their_arc_face(learned: Learned) -> Any:
    from pytorch_metric_learning.losses import ArcFaceLoss

    proxies = learned["proxies"]
    loss = ArcFaceLoss(*proxies.shape, margin=degrees(ANGLE), scale=SCALE)
    loss.W = nn.Parameter(proxies.T.clone())  # a column per proxy
    return loss


# -- the table ------------------------------------------------------------------------------------


def pairs(n: int, d: int, **learned: float) -> Data:
    return Data(towers(n, d, 1.0)[0], (), {k: torch.tensor(v) for k, v in learned.items()})


def classes(n: int, d: int, **learned: float) -> Data:
    """Rows of about length 1 around the centre of their class; classes meet on all processes."""
    labels = torch.arange(n) % max(n // PER_CLASS, 2)
    x = (torch.randn(n, d) + torch.randn(n, d)[labels]) / (2 * d) ** 0.5
    return Data((x,), (labels,), {k: torch.tensor(v) for k, v in learned.items()})


def with_proxies(n: int, d: int) -> Data:
    data = classes(n, d)
    n_classes = int(data.labels[0].max()) + 1
    return Data(data.rows, data.labels, {"proxies": torch.randn(n_classes, d)})


def between(loss: Function) -> Function:
    """A loss of rows, proxies and labels, called as the others are."""

    def call(x: Tensor, labels: Tensor, *, proxies: Tensor, **how: Any) -> Tensor:
        return loss(x, proxies, labels, **how)

    return call


CASES = {
    "clip_loss": Case(
        partial(pairs, scale=14.0),
        {
            **ours_and_formula(nearfar.clip_loss, textbook.clip_loss),
            **{
                ", ".join(("open_clip", *flags)): of_open_clip(
                    "ClipLoss", **dict.fromkeys(flags, True)
                )
                for flags in (
                    (),
                    ("gather_with_grad",),
                    ("local_loss",),
                    ("local_loss", "gather_with_grad"),
                )
            },
        },
        2048,
    ),
    "siglip_loss": Case(
        partial(pairs, scale=10.0, bias=-10.0),
        {
            **ours_and_formula(nearfar.siglip_loss, textbook.siglip_loss),
            **{
                f"open_clip, {how}": of_open_clip("SigLipLoss", dist_impl=how)
                for how in ("bidir", "shift", "reduce", "gather")
            },
        },
        2048,
    ),
    "info_nce_loss": Case(
        partial(pairs, temperature=0.05),
        {
            **ours_and_formula(nearfar.info_nce_loss, textbook.info_nce_loss),
            TRANSFORMERS: Contender(ranking, TRANSFORMERS),
        },
        2048,
    ),
    "sup_con_loss": Case(
        partial(classes, temperature=0.1),
        {
            **ours_and_formula(nearfar.sup_con_loss, textbook.sup_con_loss),
            **of_metric_learning(their_sup_con),
        },
        1024,
    ),
    "batch_contrastive_loss": Case(
        classes,
        {
            **ours_and_formula(
                nearfar.batch_contrastive_loss, contrastive, margin=MARGIN, squared=False
            ),
            **of_metric_learning(their_contrastive),
        },
        1024,
    ),
    "batch_triplet_loss": Case(
        classes,
        {
            **ours_and_formula(nearfar.batch_triplet_loss, triplet, margin=MARGIN),
            **of_metric_learning(their_triplet),
        },
        256,
    ),
    "proxy_softmax_loss (ArcFace)": Case(
        with_proxies,
        {
            **ours_and_formula(
                between(nearfar.proxy_softmax_loss),
                between(textbook.proxy_softmax_loss),
                scale=SCALE,
                angle_margin=ANGLE,
            ),
            **of_metric_learning(their_arc_face),
        },
        2048,
    ),
}
