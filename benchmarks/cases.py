"""The table of losses that every benchmark runs over: a row for each loss and setting.

It follows from the list of losses: a loss is measured as soon as `tests/textbook.py` has its
formula. `SETTINGS` lists those that other libraries have too, and those measured with other
hyperparameters than their defaults.
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import exp
from pathlib import Path
from shutil import which
from typing import Any

import peers
import torch
from measure import installed
from peers import Loss
from torch import Tensor

import nearfar
from nearfar import registry

# The formulas are those of the tests, beside the oracles.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
import textbook

PER_CLASS = 8
COMPILED = "compiled textbook"


@dataclass(frozen=True)
class Data:
    """The arguments of one call: embeddings, labels and hyperparameters."""

    embeddings: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    hyper: Mapping[str, Any]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        learned = (value for value in self.hyper.values() if isinstance(value, Tensor))
        return (*self.embeddings, *learned)

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> "Data":
        """The same numbers in another precision, as new leaves, and on a device."""

        def copy(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if not x.is_floating_point():
                return x.to(device)
            return x.detach().to(device, dtype, copy=True).requires_grad_()

        return Data(
            tuple(copy(x) for x in self.embeddings),
            tuple(copy(y) for y in self.labels),
            {name: copy(value) for name, value in self.hyper.items()},
        )


Draw = Callable[[int, int, float], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Peer:
    """Another library's version of the same loss.

    Attributes:
        build: takes the data and returns the loss as a call without arguments.
        package: what has to be installed; None if plain torch is enough.
        differs: what it does differently, if its values do not agree with nearfar's.
    """

    build: Callable[..., Loss]
    package: str | None = None
    differs: str = ""


@dataclass(frozen=True)
class Asked:
    """The size at which a case is measured, and what it should reach.

    Attributes:
        n: rows.
        d: numbers in a row.
        large: rows with --large.
        beside: the contender that `faster` and `memory` refer to.
        faster: at least this many times as fast.
        memory: at most this share of the other's memory.
        of_product: at least this share of the rate of torch.mm.
    """

    n: int = 4096
    d: int = 128
    large: int = 8192
    beside: str = ""
    faster: float | None = None
    memory: float | None = None
    of_product: float | None = None


@dataclass(frozen=True, eq=False)
class Case:
    """A loss with one setting of its hyperparameters.

    Attributes:
        ours: nearfar's function.
        textbook: the formula, which takes the same arguments; None if tests/textbook.py has none.
        draw: makes embeddings and labels from (n, d, noise).
        hyper: hyperparameters of both.
        learned: those hyperparameters that have a gradient.
        peers: other implementations, by the name that the tables print.
        work: the operations in nearfar's matrix products, as a multiple of n^2 d.
        whole_batch: whether every row is compared with every other, so that the formula has an
            (n, n) matrix.
        compiled: whether the formula is measured under torch.compile too.
        asked: how fast it should be, and at what size.
        at_most: bytes of extra memory that it should take at most, by (n, d).
    """

    name: str
    ours: Callable[..., Tensor]
    textbook: Callable[..., Tensor] | None
    draw: Draw
    hyper: Mapping[str, Any] = field(default_factory=dict)
    learned: tuple[str, ...] = ()
    peers: Mapping[str, Peer] = field(default_factory=dict)
    work: int | None = None
    whole_batch: bool = True
    compiled: bool = True
    asked: Asked = field(default_factory=Asked)
    at_most: Mapping[tuple[int, int], float] = field(default_factory=dict)

    def data(self, n: int, d: int, *, seed: int = 0, noise: float = 1.0) -> Data:
        torch.manual_seed(seed)
        embeddings, labels = self.draw(n, d, noise)
        hyper = {
            name: torch.tensor(float(value), requires_grad=True) if name in self.learned else value
            for name, value in self.hyper.items()
        }
        return Data(tuple(x.requires_grad_() for x in embeddings), labels, hyper)

    def contenders(self) -> dict[str, Callable[[Data], Loss]]:
        """All implementations: each makes a call without arguments from the data."""

        def plain(function: Callable[..., Tensor]) -> Callable[[Data], Loss]:
            return lambda data: lambda: function(*data.embeddings, *data.labels, **data.hyper)

        def compiled(data: Data) -> Loss:
            return plain(torch.compile(self.textbook))(data)

        def built(peer: Peer) -> Callable[[Data], Loss]:
            return lambda data: peer.build(*data.embeddings, *data.labels, **data.hyper)

        return {
            "nearfar": plain(self.ours),
            "textbook": plain(self.textbook),
            **({COMPILED: compiled} if self.compiled else {}),
            **{name: built(peer) for name, peer in self.peers.items()},
        }

    def missing(self, contender: str) -> str | None:
        """What has to be installed before a contender can run; None if nothing is missing."""
        if contender == COMPILED:
            compiler = which(os.environ.get("CXX", "g++")) or which("clang++")
            return None if compiler else "a C++ compiler"
        package = self.peers[contender].package if contender in self.peers else None
        return None if package is None or installed(package) else f"`pip install {package}`"


def forward_backward(loss: Loss, data: Data) -> Callable[[], float]:
    """What a training step does with a loss: compute its value, and every gradient from scratch."""

    def step() -> float:
        for leaf in data.leaves:
            leaf.grad = None
        value = loss()
        value.backward()
        return value.item()

    return step


def towers(n: int, d: int, noise: float) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Row i of the second tower is row i of the first plus noise."""
    x = torch.randn(n, d)
    return (x, torch.randn(n, d).mul_(noise).add_(x)), ()


def classes(n: int, d: int, noise: float) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Rows of about length 1 around the centre of their class, eight per class."""
    labels = torch.arange(n) // PER_CLASS
    centres = torch.randn(len(labels.unique()), d)
    size = (d * (1 + noise**2)) ** 0.5
    return (torch.randn(n, d).mul_(noise).add_(centres[labels]).div_(size),), (labels,)


def proxies(n: int, d: int, noise: float) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Classes as above, and as many proxies as rows: one in eight has rows in the batch."""
    (x,), (labels,) = classes(n, d, noise)
    learned = torch.randn(n, d)
    learned[labels] = torch.randn(n, d).mul_(noise).add_(x.detach() * d**0.5)
    return (x, learned), (labels,)


def rows(k: int) -> Draw:
    return lambda n, d, noise: (tuple(torch.randn(n, d) for _ in range(k)), ())


def pairs(n: int, d: int, noise: float) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    embeddings, _ = towers(n, d, noise)
    return embeddings, (torch.arange(n) % 2 == 0,)


def distances(n: int, d: int, noise: float) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return (torch.rand(n),), (torch.arange(n) % 2 == 0,)


def logits(n: int, d: int, noise: float) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return (torch.randn(n, d),), (torch.arange(n) % d,)


def listed(*shape: int) -> Draw:
    """Two towers and listed negatives: `shape` is (k,) for k shared ones, (-1, k) for k a row."""

    def draw(n: int, d: int, noise: float) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        embeddings, _ = towers(n, d, noise)
        return (*embeddings, torch.randn(*(n if size < 0 else size for size in shape), d)), ()

    return draw


_METRIC_LEARNING = "pytorch-metric-learning"


def _metric_learning(build: Callable[..., Loss], differs: str = "") -> dict[str, Peer]:
    return {_METRIC_LEARNING: Peer(build, _METRIC_LEARNING, differs)}


_RANKING = {"sentence-transformers": Peer(peers.ranking, "sentence-transformers")}
_OPEN_CLIP = {
    "as in open_clip": Peer(
        lambda x, y, **hyper: lambda: textbook.clip_loss_two_products(x, y, **hyper)
    )
}
_FIVE_TIMES = Asked(beside=_METRIC_LEARNING, faster=5, memory=1 / 10)
_NOT_SQUARED = "adds up d and max(0, margin - d), not their squares"

DRAWS: Mapping[registry.Data, Draw] = {"batch": classes, "towers": towers, "proxies": proxies}
# Of the executors: see docs/architecture.md.
WORK: Mapping[registry.Data, int] = {"towers": 6, "proxies": 6}
# Arguments of `Case` that differ from the defaults. A loss measured at several settings has one
# entry for each; the key is what the name of the case adds to that of the loss.
SETTINGS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "contrastive_loss": {"": {"draw": pairs}},
    "contrastive_loss_from_distance": {"": {"draw": distances}},
    "cosine_loss": {"": {"draw": pairs}},
    "triplet_loss": {"": {"draw": rows(3)}},
    "quadruplet_loss": {"": {"draw": rows(4)}},
    "softmax_loss": {"": {"draw": logits}},
    "info_nce_loss": {
        "": {"peers": _RANKING, "asked": Asked(8192, 512, 16384, "textbook", 2, 1 / 8)},
        " (64 shared negatives)": {"draw": listed(64), "work": None, "whole_batch": False},
        " (8 negatives a query)": {"draw": listed(-1, 8), "work": None, "whole_batch": False},
    },
    "clip_loss": {
        "": {
            "hyper": {"scale": exp(2.659)}, "learned": ("scale",),
            "peers": _OPEN_CLIP, "work": 8,
            "asked": Asked(8192, 512, 16384, "textbook", 3, 1 / 8, 0.8),
            "at_most": {(65536, 256): 600e6},
        },
    },
    "siglip_loss": {
        "": {
            "hyper": {"scale": 10.0, "bias": -10.0}, "learned": ("scale", "bias"),
            "asked": Asked(8192, 512, 16384, "textbook", 2, 1 / 8),
        },
    },
    "sup_con_loss": {
        "": {
            "peers": _metric_learning(peers.sup_con), "work": 4,
            "asked": Asked(beside=_METRIC_LEARNING, faster=8, memory=1 / 10),
        },
    },
    "nt_xent_loss": {
        "": {
            "peers": _metric_learning(peers.nt_xent),
            # With 512 rows, pytorch-metric-learning takes 15 GB.
            "asked": Asked(256, 128, 256, _METRIC_LEARNING, 500),
            "at_most": {(8192, 128): 200e6},
        },
    },
    "batch_contrastive_loss": {
        "": {
            "hyper": {"margin": 1.5}, "peers": _metric_learning(peers.contrastive, _NOT_SQUARED),
            "asked": _FIVE_TIMES,
        },
    },
    "multi_similarity_loss": {
        "": {"peers": _metric_learning(peers.multi_similarity), "asked": _FIVE_TIMES},
    },
    "circle_loss": {"": {"peers": _metric_learning(peers.circle)}},
    "lifted_structure_loss": {"": {"peers": _metric_learning(peers.lifted_structure)}},
    "proxy_softmax_loss": {
        "": {"hyper": {"scale": 20.0}, "peers": _metric_learning(peers.normalized_softmax)},
        " (ArcFace)": {
            "hyper": {"scale": 64.0, "angle_margin": 0.5},
            "peers": _metric_learning(peers.arc_face),
        },
        " (CosFace)": {
            "hyper": {"scale": 64.0, "cosine_margin": 0.35},
            "peers": _metric_learning(peers.cos_face),
        },
    },
    "proxy_anchor_loss": {"": {"peers": _metric_learning(peers.proxy_anchor)}},
}  # fmt: skip


def _cases(loss: registry.Loss) -> Iterator[Case]:
    """A loss at its defaults, or at each of the settings listed for it."""
    formula = getattr(textbook, loss.function)
    ours = inspect.signature(getattr(nearfar, loss.function)).parameters
    takes = inspect.signature(formula).parameters.keys() & ours.keys()
    defaults = {name: ours[name].default for name in ours if name in takes}
    numbers = {k: v for k, v in defaults.items() if isinstance(v, float)}
    usual = {
        "ours": getattr(nearfar, loss.function),
        "textbook": formula,
        "draw": DRAWS.get(loss.data),
        "hyper": numbers,
        "work": WORK.get(loss.data),
        "whole_batch": loss.data != "rows",
        # Compiling takes half a minute a case, and proxies are computed as two towers are.
        "compiled": loss.data != "proxies",
    }
    for setting, own in SETTINGS.get(loss.function, {"": {}}).items():
        yield Case(loss.function + setting, **{**usual, **own})


# Losses without a formula in textbook.py are measured in tuples.py.
_ALL = [
    case for loss in registry.LOSSES if hasattr(textbook, loss.function) for case in _cases(loss)
]
WHOLE_BATCH = [case for case in _ALL if case.whole_batch]
CASES = {case.name: case for case in _ALL}
