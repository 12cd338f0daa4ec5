"""The table of whole-batch losses: one row a loss and setting, which every test of them runs over.

A new loss is one more row: its function, what data it takes, its hyperparameters, its oracle, and
its textbook formula.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import batch_oracle as oracle
import pytest
import textbook
import torch
from torch import Tensor

import nearfar

Named = dict[str, Tensor]
Kind = Literal["batch", "towers", "proxies"]
Labels = Callable[[int, torch.Generator], Tensor]

LOW = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (torch.float64, *LOW)
N_CLASSES = 7  # of the proxies


def random_classes(n: int, chance: torch.Generator) -> Tensor:
    """Classes of random sizes, in any order, by names that are no indices."""
    names = torch.tensor([7, -3, 2**53 + 1, 0, 2**53, 300, 41])
    return names[torch.randint(0, max(min(n // 2, 7), 1), (n,), generator=chance)]


def multi_labels(n: int, chance: torch.Generator) -> Tensor:
    """Each row has each of five labels or not; some have none, and are similar to nobody."""
    return torch.rand(n, 5, generator=chance) < 0.25


LAYOUTS: dict[str, Labels] = {
    "random": random_classes,
    "one class": lambda n, _: torch.full((n,), 5),
    "singletons": lambda n, chance: torch.randperm(n, generator=chance),
    "pairs": lambda n, _: torch.arange(n) % max(n // 2, 1),
    "one large, others alone": lambda n, _: (torch.arange(n) - n // 2).clamp(min=0),
}


@dataclass(frozen=True)
class Data:
    """What a loss is called with.

    Attributes:
        rows: the arguments that carry a gradient, learned numbers included.
        others: the arguments that carry none: labels and weights.
    """

    rows: Named
    others: Named

    def at(self, **changed: Tensor) -> "Data":
        return Data({**self.rows, **changed}, self.others)

    def to(self, dtype: torch.dtype) -> "Data":
        """The embeddings in another dtype; learned numbers stay as they are."""
        return self.at(**{k: v.to(dtype) for k, v in self.rows.items() if v.ndim})

    def each(self, change: Callable[[Tensor], Tensor]) -> "Data":
        """Every array of embeddings changed."""
        return self.at(**{k: change(v) for k, v in self.rows.items() if v.ndim})


@dataclass(frozen=True)
class Case:
    """One loss with one setting of its hyperparameters.

    Attributes:
        function: the loss under test.
        kind: what it compares: a batch with itself or a reference, two towers, or rows and proxies.
        oracle: the loops of `batch_oracle.py`.
        textbook: the formula of `textbook.py`.
        hyper: hyperparameters passed to all three.
        learned: those of them that are tensors with a gradient.
        multi: bool multi-labels in place of class ids.
        reference: "set", without any row of the batch; "self", which holds some of its rows.
        hard: the shape of the hard negatives before d; -1 stands for n.
        sub_centers: how many proxies a class has; 0: one, in an array of two dimensions.
        weighted: with one weight per row.
    """

    name: str
    function: Callable[..., Tensor]
    kind: Kind
    oracle: Callable[..., Tensor]
    textbook: Callable[..., Tensor]
    hyper: dict[str, Any] = field(default_factory=dict)
    learned: tuple[str, ...] = ()
    multi: bool = False
    reference: Literal["set", "self"] | None = None
    hard: tuple[int, ...] = ()
    sub_centers: int = 0
    weighted: bool = False

    @property
    def takes(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.function).parameters)

    @property
    def module(self) -> Any:
        """The module of the loss, whose executors a test may exchange."""
        return inspect.getmodule(self.function)

    @property
    def normalizes(self) -> bool:
        """Whether the length of a row does not matter."""
        if "distance" in self.takes:
            return self.hyper.get("distance") == "cosine"
        return bool(self.hyper.get("normalize", True))

    @property
    def anchors(self) -> str:
        """Which rows have a loss each that no other of them sees; "" where all see all."""
        if self.function is nearfar.proxy_anchor_loss:
            return "proxies"
        if self.function is nearfar.clip_loss or self.hyper.get("symmetric"):
            return ""
        if self.kind == "batch" and not self.reference:
            return ""
        return "query" if "query" in self.takes else "x"

    def outputs(self, n: int) -> int:
        """The number of losses with reduction="none"."""
        return N_CLASSES if self.function is nearfar.proxy_anchor_loss else n

    def draw(
        self,
        n: int,
        d: int = 4,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        layout: str = "random",
    ) -> Data:
        """Standard normal embeddings and their labels, learned numbers in float64."""
        chance = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, d, generator=chance, dtype=torch.float64).to(dtype)

        names = ("query", "positive") if "query" in self.takes else ("x", "y")
        rows = {names[0]: normal(n)}
        others: Named = {}
        if self.kind == "towers":
            rows[names[1]] = (rows[names[0]].double() + normal(n)).to(dtype)
        elif self.kind == "proxies":
            several = (self.sub_centers,) if self.sub_centers else ()
            rows["proxies"] = normal(N_CLASSES, *several)
            # Not every class has a row.
            others["labels"] = LAYOUTS[layout](n, chance) % (N_CLASSES - 1)
        else:
            make = multi_labels if self.multi else LAYOUTS[layout]
            others["labels"] = make(n, chance)
            if self.reference:
                m = n + 3
                rows["reference"] = normal(m)
                others["reference_labels"] = make(m, chance)
            if self.reference == "self":
                where = torch.randperm(m, generator=chance)[:n]
                where[::3] = -1  # these have no row of their own there
                here = (where >= 0).nonzero()[:, 0]
                rows["reference"][where[here]] = rows["x"][here]
                others["reference_labels"][where[here]] = others["labels"][here]
                others["reference_own"] = where
        if self.hard:
            rows["hard_negatives"] = normal(*(n if k == -1 else k for k in self.hard))
        if self.weighted:
            others["weight"] = torch.arange(self.outputs(n), dtype=torch.float64) % 4 / 2
        for name in self.learned:
            rows[name] = torch.tensor(self.hyper[name], dtype=torch.float64)
        return Data(rows, others)

    def run(self, data: Data, reduction: str = "none", **more: Any) -> Tensor:
        given = {**self.hyper, **data.others, **data.rows, **more}
        return self.function(**referring(given), reduction=reduction)

    def truth(self, data: Data, reduction: str = "none") -> Tensor:
        rows = {name: a.double() for name, a in data.rows.items()}
        loss = self.oracle(**{**self.hyper, **data.others, **rows}, reduction=reduction)
        # Where nobody has anyone to compare with, the loops touch no row.
        return loss + sum(a.flatten()[:0].sum() for a in rows.values())

    def schoolbook(self, data: Data) -> Tensor:
        """The mean loss in float32 at least."""
        rows = {
            name: a.to(torch.promote_types(a.dtype, torch.float32)) for name, a in data.rows.items()
        }
        return self.textbook(**{**self.hyper, **data.others, **rows})


def gradients(loss: Callable[[Data], Tensor], data: Data) -> tuple[Tensor, Named]:
    """The loss, and the gradient of every row; of many losses, with unequal weights."""
    leaves = {name: a.detach().clone().requires_grad_() for name, a in data.rows.items()}
    value = loss(data.at(**leaves))
    weights = torch.linspace(0.5, 1.5, len(value), dtype=value.dtype) if value.ndim else 1
    (value * weights).sum().backward()
    zero = torch.zeros_like
    return value.detach(), {k: zero(a) if a.grad is None else a.grad for k, a in leaves.items()}


def assert_finite_gradients(loss: Callable[[Data], Tensor], data: Data) -> None:
    """Finite value and gradients, but where float16 cannot hold them: there they are infinite.

    They are those of the same rows in float32, rounded.
    """
    low = any(a.dtype is torch.float16 for a in data.rows.values())
    value, found = gradients(loss, data)
    _, wide = gradients(loss, data.at(**{k: _wide(a) for k, a in data.rows.items()}))
    assert value.isfinite().all()
    for name, gradient in found.items():
        assert gradient.dtype == data.rows[name].dtype
        assert wide[name].isfinite().all(), name
        assert gradient.isfinite().all() or low, name
        assert torch.equal(gradient, wide[name].to(gradient.dtype)), name


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype is torch.float16 else x


def near(
    found: tuple[Tensor, Named], true: tuple[Tensor, Named], rtol: float, floor: float = 0.0
) -> None:
    """Value and every gradient within `rtol` of the largest entry, or `floor` where that is 0."""
    pairs = {"value": (found[0], true[0])} | {k: (found[1][k], true[1][k]) for k in true[1]}
    assert found[1].keys() == true[1].keys()
    for name, (a, b) in pairs.items():
        size = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(
            a.double(),
            b.double(),
            rtol=rtol,
            atol=rtol * size + floor,
            msg=lambda m, k=name: f"{k}: {m}",
        )


def referring(given: dict[str, Any]) -> dict[str, Any]:
    """The keywords of an oracle as those of a loss: what they say of a reference, as one."""
    told = {name: value for name, value in given.items() if name.startswith("reference")}
    rest = {name: value for name, value in given.items() if name not in told}
    if not told:
        return rest
    parts = (told.get(name) for name in ("reference", "reference_labels", "reference_own"))
    return {**rest, "reference": nearfar.Reference(*parts)}


def over(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def _case(name: str, kind: Kind, **more: Any) -> Case:
    """`more` holds the fields of `Case`; what it does not know is a hyperparameter."""
    loss = name.partition("-")[0]
    fields = {k: more.pop(k) for k in list(more) if k in Case.__dataclass_fields__}
    function = getattr(nearfar, f"{loss}_loss")
    return Case(
        name,
        function,
        kind,
        getattr(oracle, loss),
        getattr(textbook, function.__name__),
        more,
        **fields,
    )


def _batch(loss: str, *settings: dict[str, Any], weighted: bool = True, **usual: Any) -> list[Case]:
    """A loss on class ids at each of `settings`, and what its labels and rows may be else."""
    shapes: dict[str, dict[str, Any]] = {
        "multi-labels": {"multi": True},
        "reference": {"reference": "set"},
        "reference-self": {"reference": "self"},
        "reference-multi": {"reference": "self", "multi": True},
    }
    if weighted:
        shapes["weighted"] = {"weighted": True}
    rows = {"-".join(map(str, s.values())) or "default": s for s in settings}
    rows |= {name: {**usual, **shape} for name, shape in shapes.items()}
    return [_case(f"{loss}-{name}", "batch", **more) for name, more in rows.items()]


CASES = [
    *_batch(
        "batch_contrastive",
        {},
        {"margin": 3.0, "distance": "euclidean"},
        {"margin": 9.0, "distance": "sqeuclidean"},
        {"margin": 1.2, "distance": "cosine"},
        {"margin": 0.0},
        {"margin": 6.0, "distance": "manhattan"},
        {"margin": 2.5, "distance": "snr"},
        {"margin": 3.5, "distance": 3.0},
        margin=3.0,
        weighted=False,
    ),
    *_batch("batch_cosine", {}, {"margin": -0.3}, {"margin": 1.0}, weighted=False),
    _case("siglip-paper", "towers", scale=10.0, bias=-10.0),
    _case("siglip-raw", "towers", scale=1.0, bias=0.3, normalize=False),
    _case("siglip-100", "towers", scale=100.0, bias=-10.0),
    _case("siglip-learned", "towers", scale=3.0, bias=-1.0, learned=("scale", "bias")),
    _case("siglip-weighted", "towers", scale=5.0, bias=-2.0, weighted=True),
    _case("clip-1", "towers", scale=1.0),
    _case("clip-20", "towers", scale=20.0),
    _case("clip-100", "towers", scale=100.0),
    _case("clip-raw", "towers", scale=2.0, normalize=False),
    _case("clip-decoupled", "towers", scale=20.0, decoupled=True),
    _case("clip-learned", "towers", scale=14.0, learned=("scale",)),
    _case("clip-weighted", "towers", scale=14.0, weighted=True),
    _case("clip-decoupled-weighted", "towers", scale=9.0, decoupled=True, weighted=True),
    _case("info_nce-default", "towers"),
    _case("info_nce-0.001", "towers", temperature=0.001),
    _case("info_nce-raw", "towers", temperature=0.5, normalize=False),
    _case("info_nce-symmetric", "towers", symmetric=True),
    _case("info_nce-decoupled", "towers", decoupled=True),
    _case("info_nce-learned", "towers", temperature=0.3, learned=("temperature",)),
    _case("info_nce-weighted", "towers", weighted=True),
    _case("info_nce-hard", "towers", hard=(5,)),
    _case("info_nce-hard-own", "towers", hard=(-1, 2), temperature=0.2),
    _case("info_nce-hard-symmetric", "towers", hard=(5,), symmetric=True, weighted=True),
    _case("info_nce-hard-decoupled", "towers", hard=(-1, 1), decoupled=True),
    _case("info_nce-hard-raw", "towers", hard=(3,), temperature=1.0, normalize=False),
    *_batch(
        "nt_xent", {}, {"temperature": 0.05}, {"decoupled": True},
        {"temperature": 2.0, "normalize": False}, temperature=0.2,
    ),
    _case("nt_xent-learned", "batch", temperature=0.3, learned=("temperature",)),
    _case("nt_xent-decoupled-weighted", "batch", decoupled=True, weighted=True),
    *_batch(
        "sup_con", {}, {"temperature": 0.01}, {"decoupled": True},
        {"temperature": 2.0, "normalize": False}, temperature=0.2,
    ),
    _case("sup_con-learned", "batch", temperature=0.3, learned=("temperature",)),
    _case("sup_con-decoupled-weighted", "batch", decoupled=True, weighted=True),
    _case("sup_con-decoupled-reference", "batch", decoupled=True, reference="self"),
    *_batch(
        "nca", {}, {"scale": 20.0}, {"scale": 0.3, "normalize": False},
        {"similarity": "inner_product", "scale": 8.0}, scale=4.0,
    ),
    _case("nca-learned", "batch", scale=3.0, learned=("scale",)),
    *_batch(
        "multi_similarity", {}, {"alpha": 1.0, "beta": 10.0, "base": -0.2},
        {"beta": 3.0, "normalize": False},
    ),
    *_batch(
        "circle", {}, {"margin": 0.4, "scale": 16.0}, {"scale": 2.0, "normalize": False},
        scale=32.0,
    ),
    *_batch(
        "lifted_structure", {}, {"margin": 4.0}, {"distance": "sqeuclidean"},
        {"margin": 0.0, "distance": "cosine"}, {"distance": "snr"}, {"distance": 1.5}, margin=2.0,
    ),
    _case("lifted_pair-default", "batch"),
    _case("lifted_pair-sqeuclidean", "batch", margin=3.0, distance="sqeuclidean"),
    _case("lifted_pair-cosine", "batch", margin=0.5, distance="cosine"),
    _case("lifted_pair-manhattan", "batch", margin=4.0, distance="manhattan"),
    _case("lifted_pair-multi-labels", "batch", multi=True),
    _case("lifted_pair-weighted", "batch", margin=4.0, weighted=True),
    _case("proxy_softmax-default", "proxies"),
    _case("proxy_softmax-learned", "proxies", scale=10.0, learned=("scale",)),
    _case("proxy_softmax-angle", "proxies", scale=16.0, angle_margin=0.5),
    _case("proxy_softmax-cosine", "proxies", scale=16.0, cosine_margin=0.35),
    _case("proxy_softmax-both", "proxies", angle_margin=1.2, cosine_margin=0.2),
    _case("proxy_softmax-weighted", "proxies", scale=8.0, weighted=True),
    _case("proxy_softmax-raw", "proxies", scale=2.0, normalize=False),
    _case(
        "proxy_softmax-both-learned", "proxies", scale=6.0, angle_margin=0.4, cosine_margin=0.2,
        learned=("scale",), weighted=True,
    ),
    _case("proxy_softmax-sub_centers", "proxies", scale=16.0, sub_centers=3),
    _case("proxy_softmax-sub_centers-raw", "proxies", scale=1.0, normalize=False, sub_centers=2),
    _case(
        "proxy_softmax-sub_centers-angle", "proxies", scale=12.0, angle_margin=0.5, sub_centers=2,
        learned=("scale",),
    ),
    _case("proxy_nca-default", "proxies"),
    _case("proxy_nca-learned", "proxies", scale=3.0, learned=("scale",)),
    _case("proxy_nca-weighted", "proxies", scale=3.0, weighted=True),
    _case("proxy_nca-sub_centers", "proxies", scale=3.0, sub_centers=2, learned=("scale",)),
    _case("proxy_anchor-default", "proxies"),
    _case("proxy_anchor-8", "proxies", margin=0.3, scale=8.0),
    _case("proxy_anchor-weighted", "proxies", scale=8.0, weighted=True),
]  # fmt: skip

# One row a loss, where a law does not ask for more.
PLAIN = list({case.function: case for case in reversed(CASES)}.values())[::-1]
IN_BATCH = [case for case in CASES if case.kind == "batch"]
