"""Where no value may be read, each positive is taken by masks: the same numbers as from lists."""

from collections.abc import Callable
from functools import partial
from math import inf, nan
from typing import Any

import pytest
import torch
from allocations import Allocations
from batch_cases import CASES, LAYOUTS, Case, Data, gradients, near, over
from torch import Tensor
from unread import unread

import nearfar as nf
from nearfar.engine.budget import tile_shape
from nearfar.engine.closeness import Product
from nearfar.engine.log_sum_rule import Finished, LogSum, LogSumRule, affine
from nearfar.engine.log_sums import log_sum_loss
from nearfar.engine.marked_positives import NearPositives, PositiveTerms
from nearfar.engine.positives import SummedPositives
from nearfar.engine.relation import across
from nearfar.engine.step import run
from nearfar.engine.walk import Walk

FUNCTIONS = {
    nf.nt_xent_loss,
    nf.sup_con_loss,
    nf.nca_loss,
    nf.multi_similarity_loss,
    nf.circle_loss,
    nf.lifted_structure_loss,
    nf.lifted_pair_loss,
    nf.proxy_anchor_loss,
}
MARKED = [case for case in CASES if case.function in FUNCTIONS]
DEFAULTS = list({case.function: case for case in reversed(MARKED)}.values())[::-1]
REDUCTIONS: list[Any] = ["mean", "sum", "none", "active", (0.1, 0.5)]


def slow(value: Any) -> Any:
    """One of several values that together take long."""
    return pytest.param(value, marks=pytest.mark.slow)


SHAPES = [(3, 3), (5, 9), (64, 64)]


@pytest.mark.parametrize(
    "layout", ["random", *(slow(name) for name in LAYOUTS if name != "random")]
)
@over(MARKED)
def test_as_from_lists(case: Case, layout: str) -> None:
    """In tiles and in strips; some anchors have no positive, some no negative."""
    data = case.draw(13, layout=layout)
    for reduction in REDUCTIONS:
        loss = partial(case.run, reduction=reduction)
        true = gradients(loss, data)
        for shape in SHAPES:
            with unread(), tile_shape(*shape):
                near(gradients(loss, data), true, rtol=1e-9, floor=1e-12)


@over(MARKED)
def test_as_by_the_loops_of_the_oracle(case: Case) -> None:
    data = case.draw(11)
    true = gradients(case.truth, data)
    with unread(), tile_shape(4, 5):
        near(gradients(case.run, data), true, rtol=1e-9, floor=1e-12)


@over(MARKED)
def test_strip_by_strip(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    data = case.draw(23)
    loss = partial(case.run, reduction="none")
    true = gradients(loss, data)
    monkeypatch.setattr(SummedPositives, "wants_all_tiles", lambda *_: False)
    with unread(), tile_shape(7, 5):
        near(gradients(loss, data), true, rtol=1e-9, floor=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none", (0.05, 2.0)])
# Circle's weights of pairs have no gradient, so that its gradient is no derivative.
@over([case for case in DEFAULTS if case.function is not nf.circle_loss])
def test_the_gradient_is_that_of_the_loss(case: Case, reduction: Any) -> None:
    data = case.draw(9, 3)

    def loss(*rows: Tensor) -> Tensor:
        return case.run(data.at(**dict(zip(data.rows, rows, strict=True))), reduction)

    leaves = tuple(x.clone().requires_grad_() for x in data.rows.values())
    with unread(), tile_shape(4, 4):
        assert torch.autograd.gradcheck(loss, leaves, check_undefined_grad=False)


# Of rows that are not scaled to length 1, so that exponents may lie far apart.
RAW: dict[str, Callable[..., Tensor]] = {
    "nt_xent": partial(nf.nt_xent_loss, temperature=1.0, normalize=False),
    "nt_xent decoupled": partial(nf.nt_xent_loss, temperature=1.0, normalize=False, decoupled=True),
    "sup_con": partial(nf.sup_con_loss, temperature=1.0, normalize=False),
    "nca": partial(nf.nca_loss, similarity="inner_product", normalize=False),
    "multi_similarity": partial(nf.multi_similarity_loss, beta=1.0, base=0.0, normalize=False),
    "circle": partial(nf.circle_loss, scale=1.0, normalize=False),
    "lifted_structure": partial(nf.lifted_structure_loss, distance="manhattan"),
    "lifted_pair": partial(nf.lifted_pair_loss, distance="manhattan"),
}


def spread_out(spread: float, n: int = 24) -> Data:
    """Rows in two groups: of the second all products are large. One class of 1, one of 2."""
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([0.3 * x[: n // 2], x[n // 2 :] * 0.2 + 1]) * (spread / 6) ** 0.5
    classes = (torch.arange(n) * 7 % n - 2).clamp(min=0) // 5
    classes[-3:] = torch.tensor([77, 78, 78])
    return Data({"x": x}, {"labels": classes})


def gradients_of(loss: Callable[..., Tensor], data: Data) -> tuple[Tensor, dict[str, Tensor]]:
    return gradients(lambda given: loss(given.rows["x"], given.others["labels"]), data)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("spread", [1.0, 60.0, 450.0, 5000.0])  # float64 holds exponents of 300
@pytest.mark.parametrize("name", RAW)
def test_exponents_far_apart(name: str, spread: float, reduction: str) -> None:
    loss, data = partial(RAW[name], reduction=reduction), spread_out(spread)
    true = gradients_of(loss, data)
    for shape in ((5, 5), (7, 9), (64, 64)):
        with unread(), tile_shape(*shape):
            near(gradients_of(loss, data), true, 1e-11, 1e-300)
            near(gradients_of(loss, data.to(torch.float32)), true, 2e-6 * max(spread, 10) ** 0.5)


@over([case for case in MARKED if case in DEFAULTS or case.reference == "set"])
@pytest.mark.parametrize("bad", [inf, nan])
def test_a_row_that_is_not_finite(case: Case, bad: float) -> None:
    """Losses and gradients are NaN where they are with lists."""
    data = case.draw(12)
    data.rows["x"][3, 0] = bad
    true = gradients(case.run, data)
    assert true[0].isnan().any()
    with unread(), tile_shape(4, 5):
        found = gradients(case.run, data)
    torch.testing.assert_close(found[0], true[0], equal_nan=True)
    for name, gradient in true[1].items():
        torch.testing.assert_close(found[1][name].isnan(), gradient.isnan())


def paired(n: int, several: bool) -> tuple[Tensor, Tensor]:
    """Rows that all but equal their one positive; with `several`, some have two more."""
    x = torch.randn(n, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, labels = x.repeat_interleave(2, 0), torch.arange(n).repeat_interleave(2)
    x += 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    if several:
        labels[:8] //= 2
    return torch.nn.functional.normalize(x), labels


@pytest.mark.parametrize("multi", [False, True], ids=["classes", "multi-labels"])
@pytest.mark.parametrize("several", [False, True], ids=["one each", "some have several"])
def test_a_loss_near_0_keeps_its_digits(several: bool, multi: bool) -> None:
    """Of an anchor with one positive: log(1 + sum_n e^(z_n - z_p)), about 1e-7."""
    x, labels = paired(20, several)
    z = x @ x.T / 0.05
    same, own = labels[:, None] == labels, torch.eye(40, dtype=torch.bool)
    gap = z.masked_fill(same, -inf).logsumexp(1) - z.masked_fill(~same | own, -inf).amax(1)
    alone = same.sum(1) == 2
    given = torch.nn.functional.one_hot(labels).bool() if multi else labels
    with unread(), tile_shape(16, 16):
        loss = nf.sup_con_loss(x.float(), given, temperature=0.05, reduction="none").double()
    true = gap.exp().log1p()[alone]
    assert true.min() < 1e-6
    torch.testing.assert_close(loss[alone], true, rtol=3e-5, atol=0.0)


def test_one_end_of_a_pair_has_one_positive_and_the_other_several() -> None:
    """Row 0 shares a label with row 8 alone, which shares another with rows 4 to 7."""
    labels = torch.zeros(9, 4, dtype=torch.bool)
    labels[[0, 8], 0] = labels[4:, 1] = labels[1:4, 2] = True
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = Data({"x": x}, {"labels": labels})
    for reduction in REDUCTIONS:
        loss = partial(nf.sup_con_loss, reduction=reduction)
        true = gradients_of(loss, data)
        for shape in ((2, 3), (64, 64)):
            with unread(), tile_shape(*shape):
                near(gradients_of(loss, data), true, 1e-11)


def test_an_anchor_without_negatives_is_left_out_of_a_mean_over_a_range() -> None:
    """Row 0 is similar to all. Its loss, 0, lies in the range."""
    labels = torch.eye(2, dtype=torch.bool).repeat(4, 1)
    labels[0] = True
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = partial(nf.nt_xent_loss, x, labels, decoupled=True, reduction=(-1.0, 50.0))
    true = loss()
    with unread():
        torch.testing.assert_close(loss(), true)


def pick_any(negatives: LogSum, positives: Tensor, _: None) -> Finished:
    gap = negatives.minus(positives)
    return gap.exp().log1p(), gap.sigmoid(), -gap.sigmoid()


def mean_of_both(rule: LogSumRule, x: Tensor, y: Tensor, labels: Tensor, how: Any) -> Tensor:
    relation, product = across(labels, x, y, labels.flip(0), None), Product()
    weight = torch.linspace(0.5, 2, len(x), dtype=x.dtype)
    return run(
        partial(log_sum_loss, rule, product, both=True),
        x,
        y,
        relation,
        closeness=product,
        normalize=False,
        reduction=how,
        weight=None if isinstance(how, tuple) else weight,
    )


@pytest.mark.parametrize("each", [False, True], ids=["log-sum-exp", "each"])
@pytest.mark.parametrize("how", ["none", "sum", (0.5, 3.0)], ids=str)
def test_rows_and_columns_are_anchors(how: Any, each: bool) -> None:
    chance = torch.Generator().manual_seed(0)
    x, y = (torch.randn(9, 3, generator=chance).double().requires_grad_() for _ in range(2))
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 1])
    near_of: Any = {"per_positive": True} if each else {"near": affine(1.0, 0.0)}
    number = (lambda r: r.n_positives()) if each else (lambda r: None)
    rule = LogSumRule(pick_any, counts=number, **near_of)
    same = labels[:, None] == labels.flip(0)

    def terms(z: Tensor, same: Tensor) -> Tensor:
        far, low = z.masked_fill(same, -inf).logsumexp(1), z.masked_fill(~same, -inf)
        gap = far[:, None] - z if each else (far - low.logsumexp(1))[:, None]
        return gap.exp().log1p().where(same, 0) if each else gap.exp().log1p()

    of_rows, of_columns = terms(x @ y.T, same), terms(y @ x.T, same.T)
    if isinstance(how, tuple):
        kept = torch.cat([of_rows, of_columns]) if each else (of_rows + of_columns) / 2
        true = kept[(kept > how[0]) & (kept < how[1])].mean()
    else:
        true = (of_rows.sum(1) + of_columns.sum(1)) / 2 * torch.linspace(0.5, 2, 9).double()
        true = true if how == "none" else true.sum()
    by = torch.linspace(1, 2, 9).double() if true.ndim else torch.tensor(1.0)
    expected = torch.autograd.grad((true * by).sum(), (x, y))
    for shape in ((4, 5), (64, 64)):
        with unread(), tile_shape(*shape):
            found = mean_of_both(rule, x, y, labels, how)
            torch.testing.assert_close(found, true.detach(), check_dtype=False)
            torch.testing.assert_close(torch.autograd.grad((found * by).sum(), (x, y)), expected)


@over(DEFAULTS)
def test_observers_see_the_same_forces(case: Case) -> None:
    data = case.draw(12)
    given = (*data.rows.values(), *data.others.values())
    true = nf.forces(case.function, *given)
    with unread(), tile_shape(5, 4):
        found = nf.forces(case.function, *given)
    for kind in ("force", "pull", "push"):
        torch.testing.assert_close(getattr(found, kind), getattr(true, kind))


@over(DEFAULTS)
def test_tiles_that_were_kept_are_as_good_as_new(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = case.draw(30, dtype=torch.float32)
    found = []
    for room in (0, 200, 10**9):
        monkeypatch.setattr(Walk, "kept_elements", lambda *_, room=room: room)
        with unread(), tile_shape(7, 7):
            found.append(gradients(case.run, data))
    for value, of_rows in found[1:]:
        assert torch.equal(value, found[0][0])
        assert all(torch.equal(of_rows[name], found[0][1][name]) for name in of_rows)


@pytest.mark.parametrize("labels", ["few", slow("most"), slow("multi")])
@over([case for case in DEFAULTS if case.kind == "batch"])
def test_memory_is_linear_in_the_batch(case: Case, labels: str) -> None:
    """However many pairs are positive: the budget, and a few numbers for each row."""
    n, budget = 2048, 2**20
    x = torch.randn(n, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    given = {
        "few": torch.arange(n) // 8,
        "most": torch.zeros(n, dtype=torch.long),
        "multi": torch.rand(n, 5, generator=torch.Generator().manual_seed(0)) < 0.25,
    }[labels]
    for reduction in ("mean", "active"):
        with unread(), nf.memory_budget(budget), Allocations(x, given) as found:
            case.function(x, given, reduction=reduction).backward()
        assert found.peak <= budget + 8 * x.nbytes + 40 * 8 * n
        assert found.largest <= budget
    assert budget + 8 * x.nbytes + 40 * 8 * n < n * n


def test_of_proxies_memory_is_linear() -> None:
    n, budget = 2048, 2**20
    x, proxies = (torch.randn(n, 16).requires_grad_() for _ in range(2))
    labels = torch.arange(n) * 7 % n
    with unread(), nf.memory_budget(budget), Allocations(x, proxies, labels) as found:
        nf.proxy_anchor_loss(x, proxies, labels).backward()
    assert found.peak <= budget + 16 * x.nbytes + 40 * 8 * n


def test_lists_are_for_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this file tests is what runs where values are not read."""
    added = []
    for kind in (NearPositives, PositiveTerms):
        monkeypatch.setattr(kind, "add", lambda self, *_: added.append(type(self)))
    x, labels = torch.randn(8, 4), torch.arange(8) // 2
    nf.nca_loss(x, labels)
    nf.nt_xent_loss(x, labels)
    assert not added
    with unread():
        nf.nca_loss(x, labels)
        nf.nt_xent_loss(x, labels)
    assert added == [NearPositives, PositiveTerms]
