"""What `forces`, `explain` and `per_pair` show of a loss over several processes."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run
from torch import Tensor

import nearfar as nf
from nearfar.distributed import over

pytestmark = pytest.mark.slow  # on several processes

WORLD = 3
N, C, D = 12, 4, 5
EVEN, EMPTY = (4, 4, 4), (5, 0, 7)
Data = tuple[Tensor, ...]


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=chance, dtype=torch.float64)
    return x, torch.arange(N) % C, torch.randn(C, D, generator=chance, dtype=torch.float64)


def of_batch(own: slice) -> Data:
    x, labels, _ = drawn()
    return x[own], labels[own]


def of_towers(own: slice) -> Data:
    x = drawn()[0]
    return x[own], x.roll(1, 1)[own]


def of_proxies(own: slice) -> Data:
    x, labels, proxies = drawn()
    return x[own], proxies, labels[own]


# A loss, its data on one process, and its settings.
CASES: dict[str, tuple[Callable[..., Tensor], Callable[[slice], Data], dict[str, Any]]] = {
    "sup_con": (nf.sup_con_loss, of_batch, {}),
    "triplet": (nf.batch_triplet_loss, of_batch, {}),
    "clip": (nf.clip_loss, of_towers, {"scale": 2.0}),
    "proxy_softmax": (nf.proxy_softmax_loss, of_proxies, {"scale": 2.0}),
    "proxy_anchor": (nf.proxy_anchor_loss, of_proxies, {}),
}
OF_PROXIES = "proxy_anchor"  # whose anchors are proxies, which are the same on all processes


def own_rows(sizes: tuple[int, ...]) -> slice:
    first = sum(sizes[: dist.get_rank()])
    return slice(first, first + sizes[dist.get_rank()])


def strongest(of_case: str, sizes: tuple[int, ...]) -> tuple[nf.Forces, nf.Explanation]:
    loss, data, settings = CASES[of_case]
    given = data(own_rows(sizes))
    found = nf.forces(loss, *given, k=N * N, group="world", **settings)
    return found, nf.explain(loss, *given, group="world", **settings)


@pytest.mark.parametrize("sizes", [EVEN, EMPTY], ids=["even", "one is empty"])
@pytest.mark.parametrize("name", CASES)
def test_the_forces_of_all_processes_are_those_of_one(name: str, sizes: tuple[int, ...]) -> None:
    loss, data, settings = CASES[name]
    one = nf.forces(loss, *data(slice(None)), k=N * N, **settings)
    total = nf.explain(loss, *data(slice(None)), **settings).total
    found: dict[tuple[int, int], float] = {}
    before = 0
    for each, size in zip(run(WORLD, strongest, name, sizes), sizes, strict=True):
        shown, explained = each
        anchors = shown.anchor + (0 if name == OF_PROXIES else before)
        places = zip(anchors.tolist(), shown.other.tolist(), strict=True)
        found |= dict(zip(places, shown.force.tolist(), strict=True))
        before += size
        assert shown.loss == pytest.approx(one.loss)
        assert explained.mean == pytest.approx(one.loss)
        assert explained.total == pytest.approx(total)
        assert len(shown.pull) == explained.n
        assert explained.n == size or name == OF_PROXIES
        assert shown.n_of_all == explained.n_of_all == len(one.pull)
        assert explained.pull == pytest.approx(float(shown.pull.sum()))
        assert not explained.findings
    places = zip(one.anchor.tolist(), one.other.tolist(), strict=True)
    assert found == pytest.approx(dict(zip(places, one.force.tolist(), strict=True)), abs=1e-12)


def test_what_is_printed_says_whose_rows_are_meant() -> None:
    expected = nf.explain(nf.sup_con_loss, *of_batch(slice(None)))
    for size, (shown, explained) in zip(
        EMPTY, run(WORLD, strongest, "sup_con", EMPTY), strict=True
    ):
        said = f"over {N} rows of all processes, of this one: {size} rows, "
        for printed in (str(explained), explained._repr_html_()):
            assert f"mean loss {expected.mean:.4g} (sum {expected.total:.4g}) {said}" in printed
        values = explained.as_dict()
        assert (values["n"], values["n_of_all"]) == (size, N)
        assert f" over {N} anchors of all processes, pull " in str(shown)
        assert f" over the {size} anchors of this process; the strongest:" in str(shown)
    assert "process" not in str(expected)
    assert expected.n_of_all is None


def nan_of_one() -> tuple[str, ...]:
    x, labels = of_batch(own_rows(EVEN))
    if dist.get_rank() == 1:
        x = x * torch.nan
    found = nf.explain(nf.sup_con_loss, x, labels, group="world")
    return tuple(finding.name for finding in found.findings)


def test_nan_on_one_process_is_explained_on_all() -> None:
    found = run(WORLD, nan_of_one)
    assert all(len(names) == 1 for names in found), found


# -- errors ---------------------------------------------------------------------------------------


def of_the_next() -> int:
    """The first row of the next process, which is of the same class as the first of this one."""
    return (own_rows(EVEN).start + C) % N


def pairs() -> tuple[Tensor, Tensor]:
    return torch.tensor([[0, of_the_next()]]), torch.tensor([[1, 2]])


def each_pair(**changed: Any) -> Any:
    x, labels = of_batch(own_rows(EVEN))
    given = {"pairs": pairs(), "group": "world", **changed}
    given = {name: value for name, value in given.items() if value is not MISSING}
    return nf.per_pair(given.pop("loss", nf.batch_contrastive_loss), x, labels, **given)


def each_triplet(**changed: Any) -> Any:
    given = {"triplets": torch.tensor([[0, of_the_next(), 1]]), "pairs": MISSING, **changed}
    return each_pair(loss=nf.batch_triplet_loss, **given)


def its_forces(*of: Any, **changed: Any) -> Any:
    function = changed.pop("function", nf.forces)
    data = of or of_batch(own_rows(EVEN))
    return function(changed.pop("loss", nf.sup_con_loss), *data, **{"group": "world", **changed})


def its_explanation(*of: Any, **changed: Any) -> Any:
    return its_forces(*of, function=nf.explain, **changed)


MISSING = object()
# What all call, what one calls in its place, and what all are told.
WRONG: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "no pairs": (each_pair, lambda: each_pair(pairs=MISSING), "process 1: per_pair needs the pai"),
    "no triplets": (each_triplet, lambda: each_triplet(triplets=MISSING), "process 1: per_pair ne"),
    "pairs": (each_pair, lambda: each_pair(pairs=3), "process 1: pairs must be"),
    "reduction of pairs": (each_pair, lambda: each_pair(reduction="sum"), "process 1: per_pair re"),
    "weight": (each_pair, lambda: each_pair(weight=[-1.0] * 4), "process 1: weight must be 0 or"),
    "keyword": (each_pair, lambda: each_pair(margins=1.0), "process 1: batch_contrastive_loss ta"),
    "margin of a module": (
        lambda: each_pair(loss=nf.BatchContrastiveLoss(margin=1.0)),
        lambda: each_pair(loss=nf.BatchContrastiveLoss(margin=2.0)),
        "margin is 1 on processes 0 and 2 and 2 on process 1",
    ),
    "k": (its_forces, lambda: its_forces(k=0), "process 1: k must be an integer"),
    "reduction of forces": (
        its_forces,
        lambda: its_forces(reduction="none"),
        "process 1: reduction must be",
    ),
    "no data": (
        its_forces,
        lambda: nf.forces(nf.sup_con_loss, group="world"),
        "process 1: forces nee",
    ),
    "no array": (its_forces, lambda: its_forces("rows", [0]), "process 1: argument 0 must"),
    "keyword of forces": (
        its_forces,
        lambda: its_forces(margin=1.0),
        "process 1: sup_con_loss takes",
    ),
    "keyword of a module": (
        lambda: nf.forces(nf.SupConLoss(group="world"), *of_batch(own_rows(EVEN))),
        lambda: nf.forces(nf.SupConLoss(group="world"), *of_batch(own_rows(EVEN)), margin=1.0),
        "process 1: sup_con_loss takes",
    ),
    "explained": (
        its_explanation,
        lambda: its_explanation(reduction="sum"),
        "process 1: each row is examined",
    ),
}


def refused(names: list[str]) -> dict[str, str]:
    """The error of each case, soon; afterwards the right call is right."""
    found = {}
    for name in names:
        right, wrong, _ = WRONG[name]
        start = time.monotonic()
        try:
            (wrong if dist.get_rank() == 1 else right)()
        except (TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        assert time.monotonic() - start < 5, name
        right()
    return found


def test_a_wrong_argument_of_one_process_is_the_same_error_on_all() -> None:
    found = run(WORLD, refused, list(WRONG))
    for name, (_, _, said) in WRONG.items():
        errors = [each.get(name) for each in found]
        assert len(set(errors)) == 1, (name, errors)
        assert said in str(errors[0]), (name, errors[0])


def told_before() -> None:
    """With a handshake in the first step alone, an error of later ones is of one process."""
    group = over("world", handshake="first")
    each_pair(group=group)
    if dist.get_rank() == 1:
        with pytest.raises(TypeError, match=r"^per_pair needs the pairs"):
            each_pair(group=group, pairs=MISSING)


def test_what_was_told_in_the_first_step_is_not_told_again() -> None:
    run(WORLD, told_before, timeout=20)
