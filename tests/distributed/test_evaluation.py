"""Figures of rows and pairs that several processes have are those of one that has all."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from allocations import Allocations
from processes import Failure, attempt, run
from split_cases import parts
from torch import Tensor

from nearfar import Reference, memory_budget
from nearfar import evaluate as ev
from nearfar.engine.budget import tile_shape
from nearfar.mine import Found

pytestmark = pytest.mark.slow  # on several processes

WORLDS = (2, 3)
SIZES = {2: (17, 43), 3: (25, 0, 35)}
N, IDENTITIES = 60, 40


def drawn(distance: Any = "cosine") -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(N, 6, generator=chance, dtype=torch.float64)
    x[41] = x[3]  # on another process than its equal
    x[5] = 0
    if distance == "euclidean":
        x += 50  # which is centred
    labels = torch.randint(0, 9, (N,), generator=chance)
    labels[7] = 20  # alone in its class
    exclude = torch.randint(-1, N, (N, 3), generator=chance)
    y = torch.randn(20, 6, generator=chance, dtype=torch.float64)
    return {
        "x": x,
        "labels": labels,
        "multi": torch.rand(N, 5, generator=chance) < 0.3,
        "exclude": exclude,
        "camera": torch.randint(-1, 3, (N,), generator=chance),
        "y": y,
        "of_y": torch.randint(0, 9, (20,), generator=chance),
        "scores": torch.randn(300, generator=chance, dtype=torch.float64).round(decimals=2),
        "similar": torch.rand(300, generator=chance) < 0.4,
        "identities": torch.randint(0, IDENTITIES, (300, 2), generator=chance),
    }


# -- what is computed of some rows, or of all ------------------------------------------------------

Share = Callable[[Tensor], Tensor]  # of the rows or pairs that a process has
Case = Callable[[Share, dict[str, Any]], Any]


def of_pairs(function: Callable[..., Any], *more: Any, groups: bool = False, **how: Any) -> Case:
    def case(some: Share, group: dict[str, Any]) -> Any:
        data = drawn()
        known = {"groups": some(data["identities"])} if groups else {}
        scores = [some(data["scores"])]
        if function is ev.difference:
            scores.append(some(data["scores"].flip(0)))
        given = *scores, some(data["similar"]), *more
        return function(*given, higher_is_closer=False, **known, **how, **group)

    return case


def of_rows(function: Callable[..., Any], labels: str | None = "labels", **how: Any) -> Case:
    def case(some: Share, group: dict[str, Any]) -> Any:
        data, given = drawn(how.get("distance")), dict(how)
        if given.pop("reference", False):
            own = some(torch.arange(N)) % 20
            given["reference"] = Reference(data["y"], data["of_y"], own)
        if given.pop("exclude", False):
            given["exclude"] = some(data["exclude"])
        rows = [some(data[name]) for name in ("x", labels) if name is not None]
        with tile_shape(4, 7):
            return function(*rows, **given, **group)

    return case


def reliable(some: Share, group: dict[str, Any]) -> Any:
    data = drawn()
    fitted = ev.PlattProbability(slope=-2.0, intercept=0.5, share=0.4, prior=0.5)
    known = {"groups": some(data["identities"]), "average": "identities"}
    return ev.reliability(some(data["scores"]), some(data["similar"]), fitted, **known, **group)


def every_pair(some: Share, group: dict[str, Any], **how: Any) -> Any:
    data = drawn()
    camera = some(data["camera"])
    pairs = ev.every_pair(some(data["x"]), some(data["labels"]), never_within=camera, **group)
    near, far = pairs.hardest(5)
    hardest = [vars(pair) for pair in near + far]
    figures = pairs.verification().as_dict(), pairs.at_threshold(0.7).as_dict()
    return {"numbers": [*figures, pairs.fit_threshold(far=0.1), hardest, pairs.n_left_out]}


def many_pairs(some: Share, group: dict[str, Any]) -> Any:
    """More items of an identity than are compared, of which some are drawn."""
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(3200, 2, generator=chance, dtype=torch.float64)
    labels = (torch.arange(3200) > 5).long()
    own = some(torch.arange(N))  # the share of this process, 3,200 / 60 times as large
    rows = torch.cat([torch.arange(3200)[i::N] for i in own.tolist()]) if len(own) else own
    pairs = ev.every_pair(x[rows], labels[rows], **group)
    near, _ = pairs.hardest(3)
    return {"numbers": [pairs.n_items, pairs.n_left_out, [vars(pair) for pair in near]]}


def retrieval_of(some: Share, group: dict[str, Any]) -> Any:
    data = drawn()
    found = ev.nearest(some(data["x"]), k=12, exclude=some(data["exclude"]), **group)
    how = {"exclude": some(data["exclude"]), "k": (1, 5)}
    return ev.retrieval_of(found, some(data["labels"]), **how, **group)


def retrieval_of_reference(some: Share, group: dict[str, Any]) -> Any:
    data = drawn()
    found = ev.nearest(some(data["x"]), k=8, reference=data["y"], **group)
    how = {"reference_labels": data["of_y"], "k": (1, 8)}
    return ev.retrieval_of(found, some(data["labels"]), **how, **group)


def tied(some: Share, group: dict[str, Any]) -> Any:
    """Whole numbers have distances that are equal in any arithmetic."""
    x = torch.randint(-1, 2, (N, 3), generator=torch.Generator().manual_seed(1)).double()
    with tile_shape(5, 6):
        return ev.retrieval(some(x), some(drawn()["labels"]), distance="sqeuclidean", **group)


DISTANCES: tuple[Any, ...] = ("cosine", "euclidean", "sqeuclidean", "snr", "manhattan", 3)
CASES: dict[str, Case] = {
    "verification": of_pairs(ev.verification),
    "verification-groups": of_pairs(ev.verification, groups=True, far=(0.2, 0.1)),
    "verification-identities": of_pairs(ev.verification, groups=True, average="identities"),
    "fit_threshold": of_pairs(ev.fit_threshold, far=0.1),
    "fit_threshold-identities": of_pairs(
        ev.fit_threshold, far=0.1, groups=True, average="identities"
    ),
    "at_threshold": of_pairs(ev.at_threshold, -0.3, groups=True),
    "isotonic": of_pairs(ev.isotonic_probability),
    "platt-identities": of_pairs(ev.platt_probability, groups=True, average="identities"),
    "reliability": reliable,
    "difference": of_pairs(ev.difference, groups=True, far=(0.2,)),
    "every_pair": every_pair,
    "many_pairs": many_pairs,
    "tied": tied,
    "retrieval-multi": of_rows(ev.retrieval, "multi"),
    "retrieval-exclude": of_rows(ev.retrieval, exclude=True, k=(1, 30)),
    "retrieval-reference": of_rows(ev.retrieval, reference=True),
    "retrieval_of": retrieval_of,
    "retrieval_of-reference": retrieval_of_reference,
    "nearest-more": of_rows(ev.nearest, None, k=100),
    "shape-none": of_rows(ev.shape, None),
    "shape-multi": of_rows(ev.shape, "multi"),
    "neighbours-multi": of_rows(ev.neighbours, "multi"),
    **{f"retrieval-{d}": of_rows(ev.retrieval, distance=d, k=(1, 3)) for d in DISTANCES},
    **{f"nearest-{d}": of_rows(ev.nearest, None, k=4, distance=d) for d in DISTANCES},
    **{f"neighbours-{d}": of_rows(ev.neighbours, k=5, distance=d) for d in ("cosine", "snr")},
    "neighbours-few": of_rows(ev.neighbours, k=3, top=2),
    "shape": of_rows(ev.shape),
}


def own_part(x: Tensor) -> Tensor:
    """The share of this process of rows, or of five times as many pairs."""
    at = parts(SIZES[dist.get_world_size()])[dist.get_rank()]
    by = len(x) // N
    return x[at.start * by : at.stop * by]


def on_processes(names: list[str]) -> dict[str, Any]:
    return {name: CASES[name](own_part, {"group": "world"}) for name in names}


def numbers_of(found: Any) -> Any:
    """What was found, as dicts, lists and numbers."""
    if isinstance(found, Found):
        return {name: value.tolist() for name, value in vars(found).items()}
    if isinstance(found, ev.Verification):
        return {**found.as_dict(), **found.curve.as_dict()}
    return found if isinstance(found, dict | float) else found.as_dict()


def flat(value: Any) -> list[Any]:
    """Names and numbers, one after another."""
    if isinstance(value, dict):
        return [part for name, held in value.items() for part in (name, *flat(held))]
    if isinstance(value, list | tuple):
        return [part for held in value for part in flat(held)]
    return [value]


def agree(name: str, found: Any, true: Any) -> None:
    ours, theirs = flat(numbers_of(found)), flat(numbers_of(true))
    assert len(ours) == len(theirs), name
    for one, other in zip(ours, theirs, strict=True):
        numbers = isinstance(one, float) and isinstance(other, float)
        assert one == (pytest.approx(other, rel=1e-9, abs=1e-12) if numbers else other), name


@pytest.mark.parametrize("world", WORLDS)
def test_figures_are_those_of_one_process(world: int) -> None:
    of_each = run(world, on_processes, list(CASES))
    for name, case in CASES.items():
        true, found = case(lambda x: x, {}), [one[name] for one in of_each]
        if isinstance(true, Found):
            found = [
                Found(
                    *(
                        torch.cat(part)
                        for part in zip(*(vars(f).values() for f in found), strict=True)
                    )
                )
            ]
        else:
            bits = [repr(numbers_of(one)) for one in found]
            assert len(set(bits)) == 1, name
        agree(name, found[0], true)


# -- memory ---------------------------------------------------------------------------------------


def most_held(function: str, rows: int, **more: Any) -> int:
    """The most bytes held at once, beside the rows."""
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(0))
    given = (x,) if function == "nearest" else (x, torch.arange(rows) % 50)
    how = {"k": 5} if function == "nearest" else {}
    with memory_budget(2**19), Allocations(*given) as seen:
        getattr(ev, function)(*given, **how, **more)
    return seen.peak


def most_held_of_4(function: str) -> int:
    return most_held(function, 1000, group="world")


@pytest.mark.parametrize("function", ["nearest", "retrieval", "shape"])
def test_no_process_holds_the_rows_of_all(function: str) -> None:
    assert max(run(4, most_held_of_4, function)) < most_held(function, 4000) / 2


# -- warnings and errors --------------------------------------------------------------------------


def warned(own: bool, **group: Any) -> list[str]:
    data, first = drawn(), not group or dist.get_rank() == 0
    x, labels = data["x"][8:18], data["labels"][8:18]
    queries = x.flip(0) if first or own else x + 0.1
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ev.retrieval(queries, labels, reference=Reference(x, labels), **group)
    return [f"{one.filename} {one.message}" for one in seen]


def warned_together(own: bool) -> list[str]:
    return warned(own, group="world")


def test_queries_that_find_themselves_are_told_on_all_processes() -> None:
    for messages in (*run(2, warned_together, True), warned(own=True)):
        assert len(messages) == 1
        assert "distance 0" in messages[0]
        assert messages[0].startswith(__file__)
    assert run(2, warned_together, False) == [[], []]


def wrong(which: str) -> None:
    data, first = drawn(), dist.get_rank() == 0
    x, labels = data["x"][:8].clone(), data["labels"][:8]
    scores, same = data["scores"][:8], data["similar"][:8]
    if which == "nan":
        x[3] = torch.nan if first else 1.0
        ev.retrieval(x, labels, group="world")
    elif which == "exclude":
        ev.nearest(x, k=1, exclude=torch.full((8, 1), 16 if first else 15), group="world")
    elif which == "labels":
        ev.shape(x, None if first else labels, group="world")
    elif which == "neighbours":
        ev.neighbours(x, labels.float() if first else labels, group="world")
    elif which == "scores":
        scores = scores.log() if first else scores
        ev.verification(scores, same, higher_is_closer=True, group="world")
    elif which == "similar":
        ev.fit_threshold(scores, same & False, higher_is_closer=True, far=0.1, group="world")
    elif which == "groups":
        known = {"groups": data["identities"][:8]} if first else {}
        ev.at_threshold(scores, same, 0.5, higher_is_closer=True, group="world", **known)
    else:
        ev.every_pair(x if first else x.float(), labels, group="world")


ERRORS = {
    "nan": "process 0: x[3] is not finite",
    "exclude": "process 0: exclude must hold rows from 0 to 15",
    "labels": "labels is None on process 0 and an array on process 1",
    "neighbours": "process 0: labels must be class ids",
    "scores": "process 0: scores[",
    "similar": "similar must hold both True and False",
    "groups": "groups is an array on process 0 and None on process 1",
    "dtype": "embeddings are torch.float64 on process 0 and torch.float32 on process 1",
}


@pytest.mark.parametrize("which", ERRORS)
def test_an_error_of_one_is_an_error_of_all(which: str) -> None:
    for failure in attempt(2, wrong, which, timeout=20):
        assert isinstance(failure, Failure)
        assert failure.kind in ("ValueError", "TypeError")
        assert ERRORS[which] in failure.message
