"""What is measured on a GPU, and what should be reached: the table behind gpu.py."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import peers
import tuples
from cases import CASES, WHOLE_BATCH, Case, Peer, classes

NEARFAR, EXACT, LEARNED = "nearfar", "nearfar float32", "nearfar, learned scale"
PLAIN, EXACT_PLAIN = "plain torch", "plain torch float32"
FORMULA, EXACT_FORMULA = "formula", "formula float32"
COMPILED, EXACT_COMPILED = "compiled", "compiled float32"
SUP_CON, CAPTURED = "sup_con_loss", "captured"
SIZES = (64, 256, 1024)
Row = Mapping[str, Any]


@dataclass(frozen=True)
class How:
    """How a contender computes a loss.

    Attributes:
        function: what computes it.
        autocast: under autocast to bfloat16; else in float32.
        kernels: whether nearfar may run its kernels.
        captured: in a CUDA graph.
        learned: with a gradient of the scale.
        case: another loss, on the same rows.
    """

    function: Literal["nearfar", "formula", "compiled"] = "nearfar"
    autocast: bool = True
    kernels: bool = True
    captured: bool = False
    learned: bool = False
    case: Case | None = None


CONTENDERS = {
    NEARFAR: How(),
    EXACT: How(autocast=False),
    LEARNED: How(learned=True),
    CAPTURED: How(captured=True),
    PLAIN: How(kernels=False),
    EXACT_PLAIN: How(kernels=False, autocast=False),
    FORMULA: How("formula"),
    EXACT_FORMULA: How("formula", autocast=False),
    COMPILED: How("compiled"),
    EXACT_COMPILED: How("compiled", autocast=False),
    SUP_CON: How(case=CASES[SUP_CON]),
}
ROUNDED = (NEARFAR, PLAIN, FORMULA, COMPILED)
IN_FLOAT32 = (EXACT, EXACT_PLAIN, EXACT_FORMULA, EXACT_COMPILED)


class Target(Protocol):
    """What should be reached.

    Attributes:
        of: the contender of which it is asked.
        beside: another that it needs; empty if none.
        wanted: in words.
    """

    of: str
    beside: str

    @property
    def wanted(self) -> str: ...

    def found(self, row: Row) -> tuple[str, bool]:
        """What was measured, and whether that is enough."""
        ...


@dataclass(frozen=True)
class Faster:
    """At least so many times as fast as another; below 1, it may take that much longer."""

    beside: str
    times: float
    of: str = NEARFAR

    @property
    def wanted(self) -> str:
        if self.times == 1:
            return f"{self.of}: no slower than {self.beside}"
        if self.times < 1:
            return f"{self.of}: at most {1 / self.times:g} x the time of {self.beside}"
        return f"{self.of}: at least {self.times:g} x as fast as {self.beside}"

    def found(self, row: Row) -> tuple[str, bool]:
        ours, theirs = (row["contenders"][name]["median_s"] for name in (self.of, self.beside))
        times = f"{theirs / ours:.2f} x"
        return f"{times} ({shown(ours)} and {shown(theirs)})", theirs / ours >= self.times


@dataclass(frozen=True)
class Share:
    """At least this share of the rate of a large bfloat16 product."""

    least: float
    of: str = NEARFAR
    beside: str = ""

    @property
    def wanted(self) -> str:
        return f"{self.of}: at least {100 * self.least:.0f} % of the rate of a bfloat16 product"

    def found(self, row: Row) -> tuple[str, bool]:
        seconds = row["contenders"][self.of]["median_s"]
        share = row["floor_s"] / seconds
        return f"{100 * share:.0f} % ({shown(seconds)})", share >= self.least


@dataclass(frozen=True)
class Runs:
    """That it runs, whatever its share of that rate."""

    of: str = NEARFAR
    beside: str = ""
    wanted: str = f"{NEARFAR}: runs; its share of the rate of a bfloat16 product"

    def found(self, row: Row) -> tuple[str, bool]:
        return Share(0.0).found(row)


@dataclass(frozen=True)
class Memory:
    """At most so many bytes beyond the input."""

    most: float
    of: str = NEARFAR
    beside: str = ""
    gradients: bool = True

    @property
    def wanted(self) -> str:
        what = "" if self.gradients else " beyond the gradients"
        return f"{self.of}: at most {self.most / 1e6:,.0f} MB{what}"

    def found(self, row: Row) -> tuple[str, bool]:
        extra = row["contenders"][self.of]["extra_bytes"]
        extra -= 0 if self.gradients else row["gradient_bytes"]
        return f"{extra / 1e6:,.0f} MB", extra <= self.most


@dataclass(frozen=True)
class Within:
    """At most so many seconds."""

    most: float
    of: str = CAPTURED
    beside: str = ""

    @property
    def wanted(self) -> str:
        return f"{self.of}: at most {shown(self.most)}"

    def found(self, row: Row) -> tuple[str, bool]:
        seconds = row["contenders"][self.of]["median_s"]
        return shown(seconds), seconds <= self.most


@dataclass(frozen=True)
class AsExact:
    """An error against float64 no larger than another's."""

    of: str = EXACT
    beside: str = EXACT_FORMULA

    @property
    def wanted(self) -> str:
        return f"{self.of}: an error no larger than that of {self.beside}"

    def found(self, row: Row) -> tuple[str, bool]:
        ours, theirs = row["errors"][self.of], row["errors"][self.beside]
        return f"{ours:.1e} and {theirs:.1e}", ours <= theirs


@dataclass(frozen=True, eq=False)
class Item:
    """A loss at a size.

    Attributes:
        case: the loss.
        n: rows.
        d: numbers in a row.
        targets: what should be reached.
        contenders: who is measured; formulas only if the loss has one.
        peers: other libraries, which are given rows in bfloat16.
        exact_peers: those that are given rows in float32.
        also: what the name adds, where a loss is measured several times at a size.
    """

    case: Case
    n: int
    d: int
    targets: tuple[Target, ...] = ()
    contenders: tuple[str, ...] = (*ROUNDED, *IN_FLOAT32)
    peers: Mapping[str, Peer] = field(default_factory=dict)
    exact_peers: Mapping[str, Peer] = field(default_factory=dict)
    also: str = ""

    @property
    def name(self) -> str:
        return f"{self.case.name}{self.also}, {self.n:,} x {self.d}"

    @property
    def small(self) -> bool:
        """Whether it is a small batch, captured in a CUDA graph."""
        return CAPTURED in self.contenders

    @property
    def others(self) -> Mapping[str, Peer]:
        return {**self.peers, **self.exact_peers}

    @property
    def names(self) -> tuple[str, ...]:
        """All contenders."""
        known = self.case.textbook is not None
        own = (name for name in self.contenders if known or CONTENDERS[name].function == "nearfar")
        return (*own, *self.others)


def _tuples(case: str) -> Case:
    named = tuples.named(case)
    name = f"{named['function']} ({named['select']})"
    return Case(name, tuples.ours(case), None, classes)


_MEMEFF = {"memeff": Peer(peers.memeff, "memeff")}
_SIGLIP = {"siglip-kernel": Peer(peers.siglip_kernel, "siglip-kernel")}
_INF_CL = {"Inf-CL": Peer(peers.inf_cl, "inf-cl")}
# memeff has a fixed scale, so its gradient is asked of nobody; siglip-kernel learns both.
CLIP = replace(CASES["clip_loss"], learned=())
SIGLIP, INFO_NCE = CASES["siglip_loss"], CASES["info_nce_loss"]
TUPLES = [_tuples(case) for case in ("all", "hard", "semihard", "quadruplets")]
PAIRS = (
    "nt_xent_loss", "multi_similarity_loss", "circle_loss", "lifted_structure_loss",
    "batch_contrastive_loss", "batch_cosine_loss",
)  # fmt: skip
# Whole-batch losses at their defaults.
LOSSES = [case for case in WHOLE_BATCH if case.name == case.ours.__name__] + TUPLES

ITEMS = [
    Item(
        CLIP, 32768, 512,
        (Share(0.6), Faster(COMPILED, 1.3), Faster("memeff", 2), Memory(600e6)),
        (*ROUNDED, LEARNED), _MEMEFF,
    ),
    Item(
        CLIP, 32768, 512, (Faster(EXACT_FORMULA, 1.2, EXACT), AsExact()), IN_FLOAT32,
        exact_peers=_INF_CL, also=" (float32)",
    ),
    Item(
        CLIP, 65536, 768, (Faster(COMPILED, 1.25), Faster("memeff", 4), Memory(1.2e9)),
        (*ROUNDED, LEARNED), _MEMEFF,
    ),
    *(
        Item(SIGLIP, n, d, (Faster("siglip-kernel", 1), Memory(1.25e9)), peers=_SIGLIP)
        for n, d in ((32768, 512), (65536, 768))
    ),
    Item(INFO_NCE, 32768, 512, (Share(0.55),)),
    Item(
        CASES[SUP_CON], 16384, 128,
        (Faster(EXACT_COMPILED, 5), Faster(COMPILED, 2.5), Memory(40e6)),
    ),
    *(
        Item(
            CASES[name], 16384, 128, (Faster(SUP_CON, 0.4), Faster(PLAIN, 5)),
            (*ROUNDED, *IN_FLOAT32, SUP_CON),
        )
        for name in PAIRS
    ),
    *(Item(case, 16384, 128, (Faster(PLAIN, 3),)) for case in TUPLES),
]  # fmt: skip
HUGE = Item(CLIP, 1048576, 512, (Runs(), Memory(2.5e9, gradients=False)), (NEARFAR,))


def small_items(sizes: tuple[int, ...] = SIZES) -> list[Item]:
    """Small batches: captured in a CUDA graph, and as they are beside the formula."""
    return [
        Item(case, n, 128, (Within(_at_most(case)),), (CAPTURED, NEARFAR, FORMULA))
        for case in LOSSES
        for n in sizes
    ]


def _at_most(case: Case) -> float:
    if case in TUPLES:
        return 0.5e-3
    first = ("sup_con_loss", "clip_loss", "siglip_loss", "info_nce_loss")
    return 0.15e-3 if case.name in first else 0.25e-3


def shown(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
