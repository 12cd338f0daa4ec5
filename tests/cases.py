"""The table of aligned losses: one row a loss and setting, which every test of them runs over.

A new loss is one more row: its function, the shapes of its arguments, its labels, its oracle, its
textbook formula, and the laws it obeys.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import oracle
import pytest
import textbook
import torch
from torch import Tensor

import nearfar

Tensors = tuple[Tensor, ...]
Shapes = Callable[[int, int], tuple[tuple[int, ...], ...]]

LOW = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (torch.float64, *LOW)


@dataclass(frozen=True)
class Case:
    """One loss with one setting of its hyperparameters.

    Attributes:
        function: the loss under test.
        shapes: the shapes of the arguments that carry a gradient, from (n, d).
        oracle: the loops of `oracle.py`.
        textbook: the formula of `textbook.py`.
        hyper: hyperparameters passed to all three.
        labels: the arguments that carry no gradient, for n rows.
        similar_label: passed to the function only; the references take degrees, 1 = similar.
        distances: the argument holds distances, which are never negative.
        laws: "swap" (of the first two arguments), "rotate", "translate", "rescale" (of a row),
            "pad" (with columns of 0).
        reach: which of n losses see row i of argument number k.
        streamed: computed tile by tile, with the gradient finished in the forward pass: neither
            differentiated twice, nor traced.
    """

    name: str
    function: Callable[..., Tensor]
    shapes: Shapes
    oracle: Callable[..., list[Any]]
    textbook: Callable[..., Tensor]
    hyper: dict[str, Any] = field(default_factory=dict)
    labels: Callable[[int], Tensors] = lambda n: ()
    similar_label: int | None = None
    distances: bool = False
    laws: frozenset[str] = frozenset()
    reach: Callable[[int, int, int], set[int]] = lambda k, i, n: {i}
    streamed: bool = False

    @property
    def takes(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.function).parameters)

    @property
    def keywords(self) -> dict[str, Any]:
        labelled = {} if self.similar_label is None else {"similar_label": self.similar_label}
        return {**self.hyper, **labelled}

    def run(self, x: Tensors, labels: Tensors, reduction: str = "none", **more: Any) -> Tensor:
        if "reduction" in self.takes:
            more["reduction"] = reduction
        loss = self.function(*x, *labels, **{**self.keywords, **more})
        if "reduction" in self.takes or reduction == "none":
            return loss
        return loss.sum() / (max(len(loss), 1) if reduction == "mean" else 1)

    def valid(self, x: Tensors) -> Tensors:
        return tuple(a.abs() for a in x) if self.distances else x

    def draw(
        self, n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensors, Tensors]:
        """Standard normal arguments and their labels."""
        chance = torch.Generator().manual_seed(seed)
        x = (torch.randn(s, generator=chance, dtype=torch.float64) for s in self.shapes(n, d))
        return self.valid(tuple(a.to(dtype) for a in x)), self.labels(n)

    def meaning(self, labels: Tensors) -> Tensors:
        """Labels as the references take them: degrees of similarity, or class ids."""
        if self.function is nearfar.softmax_loss:
            return labels
        degrees = (y.to(torch.float64) for y in labels)
        return tuple(1 - y if self.similar_label == 0 else y for y in degrees)

    def truth(self, x: Tensors, labels: Tensors) -> Tensor:
        """The oracle's losses; differentiable, if slow."""
        rows = [_unbind(a.double()) for a in x]
        losses = self.oracle(*rows, *(y.tolist() for y in self.meaning(labels)), **self.hyper)
        as_tensors = [torch.as_tensor(loss, dtype=torch.float64) for loss in losses]
        return torch.stack(as_tensors) if losses else torch.zeros(0, dtype=torch.float64)

    def schoolbook(self, x: Tensors, labels: Tensors) -> Tensor:
        wide = tuple(a.float() for a in x)
        meant = tuple(y.float() if y.is_floating_point() else y for y in self.meaning(labels))
        per_row = {"reduction": "none"} if "reduction" in self.takes else {}
        return self.textbook(*wide, *meant, **self.hyper, **per_row)


def value_and_gradients(loss: Callable[[Tensors], Tensor], x: Tensors) -> tuple[Tensor, Tensors]:
    """Losses a row, and the gradients of their sum with unequal weights."""
    leaves = tuple(a.detach().clone().requires_grad_() for a in x)
    per_row = loss(leaves)
    weights = torch.linspace(0.5, 1.5, len(per_row), dtype=per_row.dtype)
    (per_row * weights).sum().backward()
    return per_row.detach(), tuple(
        torch.zeros_like(a) if a.grad is None else a.grad for a in leaves
    )


def over(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def _unbind(x: Tensor) -> list[Any]:
    return [_unbind(row) if row.ndim else row for row in x.unbind()]


def _aligned(k: int) -> Shapes:
    return lambda n, d: ((n, d),) * k


def _bools(n: int) -> Tensors:
    return (torch.arange(n) % 2 == 0,)


def _zeros_and_ones(n: int) -> Tensors:
    return (torch.arange(n) % 2,)


def _degrees(n: int) -> Tensors:
    return ((torch.arange(n) % 5) / 4,)


def _classes(n: int) -> Tensors:
    return (torch.arange(n) * 7 % 3,)


def _small_classes(n: int) -> Tensors:
    return (torch.arange(n).to(torch.uint8) % 3,)


def _laws(hyper: dict[str, Any], *more: str) -> frozenset[str]:
    """Of distances; the variance is not that of rotated rows, nor a p-norm that of rotated ones."""
    distance = hyper.get("distance", "euclidean")
    laws = {"pad", *more} - ({"pad", "swap"} if distance == "snr" else set())
    if distance in ("euclidean", "sqeuclidean", "cosine"):
        laws |= {"rotate"}
    scaled = hyper.get("normalize", distance == "cosine")
    return frozenset(laws | {"rescale" if scaled else "translate"})


def _contrastive(name: str, **more: Any) -> Case:
    labels, similar_label = more.pop("labels", _bools), more.pop("similar_label", None)
    return Case(
        f"contrastive-{name}", nearfar.contrastive_loss, _aligned(2),
        oracle.contrastive, textbook.contrastive_loss, more, labels, similar_label,
        laws=_laws(more, "swap"),
    )  # fmt: skip


def _from_distance(name: str, **more: Any) -> Case:
    labels, similar_label = more.pop("labels", _bools), more.pop("similar_label", None)
    return Case(
        f"from_distance-{name}", nearfar.contrastive_loss_from_distance, lambda n, d: ((n,),),
        oracle.contrastive_from_distance, textbook.contrastive_loss_from_distance, more,
        labels, similar_label, distances=True,
    )  # fmt: skip


def _cosine(name: str, **more: Any) -> Case:
    labels, similar_label = more.pop("labels", _bools), more.pop("similar_label", None)
    return Case(
        f"cosine-{name}", nearfar.cosine_loss, _aligned(2), oracle.cosine, textbook.cosine_loss,
        more, labels, similar_label, laws=frozenset({"swap", "rotate", "rescale"}),
    )  # fmt: skip


def _triplet(name: str, **hyper: Any) -> Case:
    return Case(
        f"triplet-{name}", nearfar.triplet_loss, _aligned(3), oracle.triplet, textbook.triplet_loss,
        hyper, laws=_laws(hyper, *(["swap"] if hyper.get("swap") else [])),
    )  # fmt: skip


def _quadruplet(name: str, **hyper: Any) -> Case:
    return Case(
        f"quadruplet-{name}", nearfar.quadruplet_loss, _aligned(4),
        oracle.quadruplet, textbook.quadruplet_loss, hyper, laws=_laws(hyper),
    )  # fmt: skip


def _in_batch(k: int, i: int, n: int) -> set[int]:
    return {i} if k == 0 else set(range(n))


def _shared(k: int, i: int, n: int) -> set[int]:
    return {i} if k < 2 else set(range(n))


def _info_nce(name: str, kind: str, **hyper: Any) -> Case:
    shapes, reach = {
        "batch": (_aligned(2), _in_batch),
        "shared": (lambda n, d: ((n, d), (n, d), (5, d)), _shared),
        "own": (lambda n, d: ((n, d), (n, d), (n, 3, d)), lambda k, i, n: {i}),
    }[kind]
    laws = {"rotate"} | ({"rescale"} if hyper.get("normalize", True) else set())
    return Case(
        f"info_nce-{kind}-{name}", nearfar.info_nce_loss, shapes,
        partial(oracle.info_nce, per_query=kind == "own"), textbook.info_nce_loss, hyper,
                laws=frozenset(laws), reach=reach, streamed=kind == "batch",
    )  # fmt: skip


def _softmax(name: str, labels: Callable[[int], Tensors] = _classes, **hyper: Any) -> Case:
    return Case(
        f"softmax-{name}", nearfar.softmax_loss, lambda n, d: ((n, max(d, 3)),),
        oracle.softmax, textbook.softmax_loss, hyper, labels,
    )  # fmt: skip


CASES = [
    _contrastive("margin-1"),
    _contrastive("margin-0", margin=0.0),
    _contrastive("margin-6", margin=6.0),
    _contrastive("sqeuclidean", margin=20.0, distance="sqeuclidean"),
    _contrastive("cosine", margin=1.5, distance="cosine"),
    _contrastive("0-means-similar", margin=6.0, labels=_zeros_and_ones, similar_label=0),
    _contrastive("degrees", margin=6.0, labels=_degrees, similar_label=1),
    _contrastive("snr", margin=3.0, distance="snr"),
    _contrastive("manhattan", margin=12.0, distance="manhattan"),
    _contrastive("3-norm", margin=6.0, distance=3),
    _contrastive("1.5-norm", margin=6.0, distance=1.5),
    _contrastive("inf-norm", margin=3.0, distance=float("inf")),
    _contrastive("normalize", margin=1.5, normalize=True),
    _contrastive("pos_margin", margin=6.0, pos_margin=2.0),
    _contrastive("not-squared", margin=6.0, squared=False),
    _contrastive(
        "all-of-it", margin=2.5, pos_margin=1.0, squared=False, distance="manhattan",
        normalize=True, labels=_degrees, similar_label=0,
    ),
    _from_distance("bool"),
    _from_distance("pos_margin", margin=2.0, pos_margin=0.5, squared=False),
    _from_distance("degrees", margin=2.0, labels=_degrees, similar_label=0),
    Case(
        "cosine_similarity", nearfar.cosine_similarity, _aligned(2), oracle.cosine_similarity,
        textbook.cosine_similarity, laws=frozenset({"swap", "rotate", "rescale"}),
    ),
    _cosine("all-similar", labels=lambda n: ()),
    _cosine("margin-0"),
    _cosine("margin-negative", margin=-0.5),
    _cosine("degrees", margin=0.25, labels=_degrees, similar_label=0),
    _triplet("margin-1"),
    _triplet("margin-0", margin=0.0),
    _triplet("sqeuclidean", margin=5.0, distance="sqeuclidean"),
    _triplet("cosine", margin=0.5, distance="cosine"),
    _triplet("snr", margin=0.47, distance="snr"),
    _triplet("manhattan-swap", distance="manhattan", swap=True),
    _triplet("4-norm-smooth", distance=4.0, smooth=True),
    _triplet("normalize", margin=0.5, normalize=True),
    _triplet("swap", swap=True),
    _triplet("smooth", smooth=True, margin=0.0),
    # Where torch's softplus drops e^-v for v above 20, which float64 can still tell.
    _triplet("smooth-margin-21", smooth=True, margin=21.0),
    _triplet("swap-smooth-cosine", swap=True, smooth=True, distance="cosine"),
    _quadruplet("margins-1-0.5"),
    _quadruplet("sqeuclidean", margin=8.0, margin2=4.0, distance="sqeuclidean"),
    _quadruplet("cosine", margin=0.4, margin2=0.2, distance="cosine"),
    _quadruplet("snr", margin=1.03, margin2=0.49, distance="snr"),
    _quadruplet("manhattan-normalize", distance="manhattan", normalize=True),
    _info_nce("0.07", "batch"),
    _info_nce("raw", "batch", temperature=0.5, normalize=False),
    _info_nce("0.001", "batch", temperature=0.001),
    _info_nce("0.07", "shared"),
    _info_nce("raw", "shared", temperature=1.0, normalize=False),
    _info_nce("0.001", "own", temperature=0.001),
    _info_nce("0.5", "own", temperature=0.5),
    _softmax("plain"),
    _softmax("uint8", _small_classes),
    _softmax("smoothed", label_smoothing=0.1),
    _softmax("all-smoothed", label_smoothing=1.0),
]  # fmt: skip
