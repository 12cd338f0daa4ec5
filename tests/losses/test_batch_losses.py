"""Every whole-batch loss against its oracle, its other executors, and what its docstring says."""

import copy
import inspect
import math
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batch_cases import (
    CASES,
    IN_BATCH,
    LAYOUTS,
    LOW,
    N_CLASSES,
    PLAIN,
    Case,
    Data,
    Named,
    gradients,
    near,
    over,
    referring,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import Rule, losses
from torch import Tensor, nn

import nearfar
from nearfar import (
    batch_contrastive_loss,
    clip_loss,
    info_nce_loss,
    nt_xent_loss,
    registry,
    siglip_loss,
    sup_con_loss,
)
from nearfar.engine.anchor_sums import anchor_loss
from nearfar.engine.budget import tile_shape
from nearfar.engine.closeness import (
    CosineDistance,
    Euclidean,
    LargestProduct,
    NegatedSquares,
    Product,
    SignalToNoise,
    Tile,
)
from nearfar.engine.log_sums import SAFE
from nearfar.engine.norms import OfFunction, PNorm
from nearfar.engine.pair_sums import PairSum, shares
from nearfar.engine.products import Gradient
from nearfar.engine.relation import Relation
from nearfar.engine.step import Answer, Executor, Request

REFERENCED = [case for case in PLAIN if "reference" in case.takes]

few = settings(max_examples=6, derandomize=True, deadline=None, database=None)
seeds = st.integers(0, 2**20)

OF_TUPLES = {nearfar.batch_triplet_loss, nearfar.batch_quadruplet_loss}  # test_batch_tuples.py


def functions() -> set[Callable[..., Tensor]]:
    """Every public loss that runs in the engine, except those on tuples, and n_pair_loss.

    That one picks rows by their order, so that most laws do not hold for it: test_n_pair.py.
    """
    listed = (loss for loss in registry.LOSSES if loss.data != "rows")
    return {getattr(nearfar, loss.function) for loss in listed} - OF_TUPLES - {nearfar.n_pair_loss}


def runs(case: Case, reduction: str = "none", **more: Any) -> Callable[[Data], Tensor]:
    return partial(case.run, reduction=reduction, **more)


def test_every_whole_batch_loss_is_in_the_table() -> None:
    assert {case.function for case in CASES} == functions()


# Against the oracle.


@pytest.mark.parametrize("reduction", ["none", "mean"])
@over(CASES)
def test_value_and_every_gradient_equal_the_oracle(case: Case, reduction: str) -> None:
    """With "none", under an upstream gradient that differs from row to row."""
    data = case.draw(9, seed=1)
    truth = gradients(partial(case.truth, reduction=reduction), data)
    near(gradients(runs(case, reduction), data), truth, 1e-11)


KINDS = [case for case in PLAIN if case.kind != "towers"] + [
    case for case in CASES if case.name in ("nt_xent-True", "sup_con-True")
]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "random"])
@over(KINDS)
def test_class_sizes_of_every_kind(case: Case, layout: str) -> None:
    data = case.draw(8, seed=2, layout=layout)
    for reduction in ("none", "mean"):
        truth = gradients(partial(case.truth, reduction=reduction), data)
        near(gradients(runs(case, reduction), data), truth, 1e-11)


@over(CASES)
@settings(few, max_examples=3)
@given(seeds, st.integers(0, 7), st.integers(1, 6))
def test_any_shape(case: Case, seed: int, n: int, d: int) -> None:
    if case.hyper.get("angle_margin"):
        d += 1  # in one dimension the angle to a proxy is 0, where arccos has no derivative
    data = case.draw(n, d, seed)
    # Unit rows of length 1 have no gradient but rounding.
    near(gradients(runs(case), data), gradients(case.truth, data), 1e-9, floor=1e-10)


@over(CASES)
def test_reductions_agree(case: Case) -> None:
    data = case.draw(11)
    rows, row_gradients = gradients(lambda d: case.run(d, "none").sum(), data)
    near((rows, row_gradients), gradients(runs(case, "sum"), data), 1e-12)
    assert case.run(data, "none").shape == (case.outputs(11),)
    given = {**case.hyper, **data.others, **data.rows}
    assert torch.equal(case.function(**referring(given)), case.run(data, "mean"))  # the default


@pytest.mark.parametrize("bad", ["avg", "Mean", None])
@over(PLAIN)
def test_an_unknown_reduction_is_refused(case: Case, bad: Any) -> None:
    with pytest.raises(ValueError, match=r"reduction must be .* got "):
        case.run(case.draw(4), bad)


@over([case for case in PLAIN if case.function is not nearfar.circle_loss])
def test_gradcheck(case: Case) -> None:
    """Not the circle loss: what it calls its gradient holds the pairs' weights constant."""
    data = case.draw(4, 3, seed=3, layout="random")
    names, values = zip(*data.rows.items(), strict=True)
    leaves = tuple(a.requires_grad_() for a in values)
    for reduction in ("none", "mean"):
        assert torch.autograd.gradcheck(
            lambda *a, r=reduction: case.run(data.at(**dict(zip(names, a, strict=True))), r), leaves
        )


# What the mean is over.


WEIGHTED = [case for case in PLAIN if "weight" in case.takes]


@over(WEIGHTED)
def test_a_weight_of_k_counts_a_row_k_times(case: Case) -> None:
    data = case.draw(10, seed=4, layout="random")
    weight = torch.tensor([0.0, 1, 3, 0.5, 2, 0, 1, 1, 0.25, 7], dtype=torch.float64)
    weight = weight[: case.outputs(10)]
    rows, weighted = case.run(data), case.run(data, weight=weight)
    torch.testing.assert_close(weighted, rows * weight)
    torch.testing.assert_close(case.run(data, "sum", weight=weight), (rows * weight).sum())
    ones = case.run(data, "mean", weight=torch.ones_like(weight))
    torch.testing.assert_close(ones, case.run(data, "mean"))
    seven = case.run(data, "mean", weight=7 * weight)
    torch.testing.assert_close(seven, case.run(data, "mean", weight=weight))
    assert case.run(data, "mean", weight=0 * weight) == 0


def test_weight_averages_over_the_rows_that_have_something_to_compare() -> None:
    x, labels = torch.randn(4, 3), [0, 0, 1, 2]  # rows 2 and 3 have no positive
    rows = sup_con_loss(x, labels, reduction="none")
    mean = sup_con_loss(x, labels, weight=[1, 3, 100, 100])
    torch.testing.assert_close(mean, (rows[0] + 3 * rows[1]) / 4)
    # Terms are positive pairs here: row 0 has two, each with the weight of the row.
    x, labels = torch.randn(5, 3), [0, 0, 0, 1, 1]
    rows = nt_xent_loss(x, labels, reduction="none")
    weight = torch.tensor([1.0, 0, 2, 0, 3])
    mean = nt_xent_loss(x, labels, weight=weight)
    torch.testing.assert_close(mean, (rows * weight).sum() / (1 * 2 + 2 * 2 + 3 * 1))


PAGE = Path(__file__).parents[2] / "docs" / "conventions.md"
MEANS = re.findall(
    r"^\| `(\w+)(.*)` \| (positive pairs|anchors) \| (counts|left out) \| (counts|left out) \|$",
    PAGE.read_text(),
    re.MULTILINE,
)


@pytest.mark.parametrize(("name", "how", "over_what", "positives", "negatives"), MEANS)
def test_the_mean_is_over_what_the_page_says(
    name: str, how: str, over_what: str, positives: str, negatives: str
) -> None:
    """The first of three anchors has both, the second only positives, the third only negatives."""
    a, b, c = torch.eye(3, dtype=torch.bool)
    labels, reference_labels = torch.stack([a, a | b, c]), torch.stack([a, b, a])
    x, reference = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    given = {"reference": reference, "reference_labels": reference_labels}
    if how:
        given["decoupled"] = True
    run = partial(getattr(nearfar, name), x, labels, **referring(given))
    terms = torch.tensor([2.0, 3, 0] if over_what == "positive pairs" else [1.0, 1, 1])
    counts = terms * torch.tensor([True, positives == "counts", negatives == "counts"])
    for weight in (torch.ones(3), torch.tensor([2.0, 3, 5])):
        divisor = (weight * counts).sum()
        found = run(reduction="mean", weight=weight) * divisor
        torch.testing.assert_close(found, run(reduction="sum", weight=weight))
    if name == "nt_xent_loss":  # -log(1)
        assert run(reduction="none")[1] == 0


def test_the_page_tells_of_every_loss_that_may_leave_anchors_out() -> None:
    """Of those that take a reference and are no sum over pairs."""
    of_pairs = {nearfar.batch_contrastive_loss, nearfar.batch_cosine_loss}
    compared = {case.function.__name__ for case in REFERENCED if case.function not in of_pairs}
    assert {name for name, *_ in MEANS} == compared, f"see the second table of means in {PAGE}"
    _, _, table = PAGE.read_text().partition("| positives only | negatives only |\n")
    _, *rows = table.partition("\n\n")[0].splitlines()
    assert len(MEANS) == len(rows), f"a row that does not read as {MEANS[0]} does"


@pytest.mark.parametrize("dtype", LOW, ids=str)
@over(WEIGHTED)
def test_a_weight_does_not_decide_the_dtype_of_the_loss(case: Case, dtype: torch.dtype) -> None:
    """NumPy's weights are float64."""
    data, n = case.draw(6, dtype=dtype), case.outputs(6)
    for weight in (np.ones(n), np.ones(n, np.float32), np.ones(n, int), [1] * n):
        for reduction in ("none", "mean", "sum"):
            found, found_gradients = gradients(runs(case, reduction, weight=weight), data)
            assert found.dtype == torch.float32
            assert all(g.dtype == dtype for g in found_gradients.values())


@over(CASES)
def test_lists_beside_float64_keep_their_digits(case: Case) -> None:
    """Converted through float32, 0.1 would be off by 1e-9."""
    data = case.draw(6)
    names = [name for name, a in data.rows.items() if a.ndim]
    some = [0.1, 0.7, 0.3, 1 / 3, 0.9, 2.1, 1.3][: case.outputs(6)]
    weight = {"weight": some} if "weight" in case.takes else {}
    as_arrays = {k: torch.tensor(v, dtype=torch.float64) for k, v in weight.items()}
    expected = case.run(data, "none", **as_arrays)
    for listed in names if len(names) > 1 else []:
        given = {**case.hyper, **data.others, **data.rows, **weight}
        given[listed] = data.rows[listed].tolist()
        assert torch.equal(case.function(**referring(given), reduction="none"), expected)
    assert torch.equal(case.run(data, "none", **weight), expected)


def test_batch_contrastive_mean_weighs_both_kinds_of_pairs_equally() -> None:
    """Of 20 rows in 10 classes 20 ordered pairs are similar, and 360 are not."""
    x, labels = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 10
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    same = (labels[:, None] == labels) & ~torch.eye(20, dtype=torch.bool)
    other = labels[:, None] != labels
    pull, push = d[same].square(), (3 - d[other]).relu().square()
    found = batch_contrastive_loss(x, labels, margin=3.0)
    torch.testing.assert_close(found, pull.mean() + push.mean())
    total = batch_contrastive_loss(x, labels, margin=3.0, reduction="sum")
    torch.testing.assert_close(total, pull.sum() + push.sum())


# However the work is cut.

TILES = {
    "1": (5, 1, 1),
    "7": (17, 7, 7),
    "n": (17, 17, 17),
    "n+1": (17, 18, 18),
    "rows": (17, 3, 40),
    "columns": (17, 40, 3),
    "ragged": (17, 5, 6),
}


@pytest.mark.parametrize("cut", TILES)
@over(CASES)
def test_block_sizes_change_nothing(case: Case, cut: str) -> None:
    n, *shape = TILES[cut]
    data = case.draw(n, seed=5)
    for reduction in ("none", "mean"):
        whole = gradients(runs(case, reduction), data)
        with tile_shape(*shape):
            near(gradients(runs(case, reduction), data), whole, 1e-11)


@over(CASES)
def test_the_limits_of_the_forward_pass_hold_in_the_backward_pass(case: Case) -> None:
    """With reduction="none" the tiles are walked again, maybe after the context has ended."""
    data = case.draw(9, seed=5)
    leaves = {name: a.clone().requires_grad_() for name, a in data.rows.items()}
    with tile_shape(2, 3):
        loss = case.run(data.at(**leaves))
    with tile_shape(4, 1):
        loss.sum().backward()
    _, whole = gradients(lambda d: case.run(d).sum(), data)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, whole[name], rtol=1e-10, atol=1e-11)


@over(CASES)
def test_a_small_budget_changes_nothing(case: Case) -> None:
    data = case.draw(33, seed=5)
    whole = gradients(runs(case, "mean"), data)
    with nearfar.memory_budget(2**16):
        near(gradients(runs(case, "mean"), data), whole, 1e-11)


# Three executors of one rule.


def all_closeness(closeness: Any, a: Tensor, b: Tensor) -> Tensor:
    """The full matrix by definition, without the tiles' arithmetic."""
    if isinstance(closeness, Euclidean):
        differences = a[:, None] - b
        squares = differences.square().sum(-1)
        return squares if closeness.squared else differences.norm(dim=-1)
    if isinstance(closeness, NegatedSquares):
        return -(a[:, None] - b).square().sum(-1)
    if isinstance(closeness, LargestProduct):
        return (a @ b.T).unflatten(1, (-1, closeness.k)).amax(2)
    if isinstance(closeness, SignalToNoise):
        return (a[:, None] - b).var(-1) / a.var(-1)[:, None]
    if isinstance(closeness, PNorm | OfFunction):
        p = closeness._p if isinstance(closeness, PNorm) else 1.0
        return (a[:, None] - b).norm(dim=-1, p=p)
    return 1 - a @ b.T if isinstance(closeness, CosineDistance) else a @ b.T


def dense(
    rule: Rule, closeness: Tensor, relation: Relation, *, mean: bool
) -> tuple[Tensor, Tensor]:
    """Losses of a rule on the full closeness, 0 for anchors that do not count, and the counts."""
    n, m = closeness.shape
    masks = relation.block(slice(0, n), slice(0, m)).masks()
    loss, counts = losses(rule, closeness, *masks, mean=mean)
    return loss if isinstance(rule, PairSum) else loss.where(counts > 0, 0), counts


def densely(rule: Rule, closeness: Any, relation: Relation, *, both: bool = False) -> Executor:
    """An executor made of the whole matrix and autograd."""

    def execute(request: Request) -> Answer:
        a, b = (t.detach().clone().requires_grad_() for t in (request.a, request.columns))
        bias = torch.zeros((), dtype=a.dtype) if request.bias is None else request.bias
        bias = bias.detach().clone().requires_grad_()
        with torch.enable_grad():
            z = all_closeness(closeness, a, b) + bias
            mean = request.reduction == "mean"
            loss, counts = dense(rule, z, relation, mean=mean)
            if both:
                loss = (loss + dense(rule, z.T, relation, mean=mean)[0]) / 2
            total = (loss if request.weight is None else loss * request.weight).sum()
        found = [None] * 3
        if request.gradient:
            found = torch.autograd.grad(total, (a, b, bias), materialize_grads=True)
        return Answer(loss.detach(), counts, *found)

    return execute


def streaming(rule: Rule, closeness: Any, relation: Relation, *, both: bool = False) -> Executor:
    """The generic executor, which has no bias, on rows with the bias as an extra coordinate."""
    assert not both

    def execute(request: Request) -> Answer:
        if isinstance(rule, PairSum):
            positive_weight, of_mean = shares(rule, relation, request)

        def loss(tile: Tile) -> tuple[Tensor, Tensor]:
            d, positive, negative = tile.closeness, tile.positive, tile.negative
            if not isinstance(rule, PairSum):
                return losses(rule, d, positive, negative)
            near, far = rule.positive(d)[0] * positive_weight, rule.negative(d)[0]
            found = near.where(positive, 0).sum(1) + far.where(negative, 0).sum(1)
            return found, torch.ones_like(found)

        def by_blocks(request: Request) -> Answer:
            answer = anchor_loss(loss, None, (), closeness, relation)(request)
            return replace(answer, counts=of_mean) if isinstance(rule, PairSum) else answer

        if request.bias is None:
            return by_blocks(request)
        one = torch.ones_like(request.a[:, :1])
        a = torch.cat([request.a, one * request.bias], 1)
        b = torch.cat([request.columns, one], 1)
        answer = by_blocks(
            Request(**{**vars(request), "a": a, "b": b, "bias": None, "finish": None})
        )
        if answer.da is None or answer.db is None:
            return answer
        forces = answer.da[:, -1].sum()
        return Answer(answer.per_row, answer.counts, answer.da[:, :-1], answer.db[:, :-1], forces)

    return execute


@pytest.fixture
def exchange(monkeypatch: pytest.MonkeyPatch) -> Callable[[Case, Callable[..., Executor]], None]:
    """Make a loss run in another executor."""

    def exchanged(
        executor: Callable[..., Executor],
        rule: Rule,
        closeness: Any,
        relation: Relation,
        **both: bool,
    ) -> Executor:
        assert isinstance(rule, Rule)
        return executor(rule, closeness, relation, **both)

    def change(case: Case, executor: Callable[..., Executor]) -> None:
        by = dict.fromkeys(("log_sum_loss", "pair_loss"), partial(exchanged, executor))
        for name, other in by.items():
            if hasattr(case.module, name):
                monkeypatch.setattr(case.module, name, other)

    return change


# Their rules hold a number that is learned, of which the executors below know nothing.
HOLDING = [case for case in CASES if case.learned and case.hyper.get("angle_margin")]


@over([case for case in CASES if case not in HOLDING])
def test_the_dense_executor_of_the_same_rule_gives_the_same(
    case: Case, exchange: Callable[..., None]
) -> None:
    data = case.draw(13, seed=6)
    usual = [gradients(runs(case, reduction), data) for reduction in ("none", "mean")]
    exchange(case, densely)
    for reduction, expected in zip(("none", "mean"), usual, strict=True):
        near(gradients(runs(case, reduction), data), expected, 1e-11)


# A block of anchors does not know the sums of the other end.
BOTH_WAYS = (nearfar.clip_loss, nearfar.lifted_pair_loss)


NOT_STREAMED = (*BOTH_WAYS, *(case.name for case in HOLDING), "info_nce-symmetric")


@over(
    [case for case in CASES if case.function not in NOT_STREAMED and case.name not in NOT_STREAMED]
)
def test_the_streaming_executor_of_the_same_rule_gives_the_same(
    case: Case, exchange: Callable[..., None]
) -> None:
    data = case.draw(13, seed=6)
    usual = [gradients(runs(case, reduction), data) for reduction in ("none", "mean")]
    exchange(case, streaming)
    for reduction, expected in zip(("none", "mean"), usual, strict=True):
        with tile_shape(4, 4):
            near(gradients(runs(case, reduction), data), expected, 1e-11)


@over(CASES)
def test_arguments_are_left_as_they_are(case: Case) -> None:
    data = case.draw(9, dtype=torch.float32)
    kept = {name: a.clone() for name, a in (data.rows | data.others).items()}
    for reduction in ("none", "mean"):
        leaves = {name: a.requires_grad_() for name, a in data.rows.items()}
        with tile_shape(4, 4):
            runs(case, reduction)(data.at(**leaves)).sum().backward()
    assert all(torch.equal(a, kept[name]) for name, a in (data.rows | data.others).items())


def test_weights_may_change_before_the_backward_pass() -> None:
    x, labels, weight = torch.eye(4).requires_grad_(), torch.tensor([0, 0, 1, 1]), torch.ones(4)
    (expected,) = torch.autograd.grad(nearfar.sup_con_loss(x, labels, reduction="sum"), x)
    losses = nearfar.sup_con_loss(x, labels, weight=weight, reduction="none")
    weight.zero_()
    (found,) = torch.autograd.grad(losses.sum(), x)
    torch.testing.assert_close(found, expected)


# References.


@over([c for c in IN_BATCH if not c.reference and "reference" in c.takes])
def test_a_batch_as_its_own_declared_reference_is_the_batch(case: Case) -> None:
    """x is then both rows and columns; its gradient is the sum of both."""
    data = case.draw(9, seed=7)
    whole = gradients(runs(case), data)
    labels = data.others["labels"]
    how = {"reference_labels": labels, "reference_own": torch.arange(9)}
    with_reference = data.at(reference=data.rows["x"].clone())
    value, found = gradients(runs(case, **how), with_reference)
    found["x"] += found.pop("reference")
    near((value, found), whole, 1e-11)
    near(gradients(lambda d: case.run(d, reference=d.rows["x"], **how), data), whole, 1e-11)


@over(REFERENCED)
def test_mistake_3_self_pairs_are_declared_and_never_guessed(case: Case) -> None:
    """An equal copy, or the very tensor, without `reference_own`: every row is its own positive."""
    data = case.draw(6, layout="pairs", seed=8)
    x, labels = data.rows["x"], data.others["labels"]
    # At its default the circle loss all but ignores a positive at cosine 1.
    mild = {"scale": 2.0} if case.function is nearfar.circle_loss else {}
    run = partial(replace(case, hyper={**case.hyper, **mild}).run, reduction="mean")
    oracle = partial(case.oracle, **{**case.hyper, **mild}, **data.rows, **data.others)
    alone = run(data)
    with_itself = oracle(reference=x, reference_labels=labels)
    assert (with_itself - alone).abs() > 1e-3 * alone, (
        "a positive equal to its anchor changes nothing here, so the test could not fail: give "
        "`mild` a setting at which it does; if there is none, take the loss out of this test"
    )
    for rows in (x, x.clone()):
        for names in (labels, labels.clone()):
            how = {"reference": rows, "reference_labels": names}
            torch.testing.assert_close(run(data, **how), with_itself)
            declared = run(data, **how, reference_own=torch.arange(6))
            torch.testing.assert_close(declared, alone)


@over(REFERENCED)
def test_an_empty_reference_leaves_nothing_to_compare(case: Case) -> None:
    """A memory before its first batch."""
    data = case.draw(4)
    empty = {
        "reference": torch.zeros(0, 4, dtype=torch.float64),
        "reference_labels": torch.zeros(0, dtype=torch.long),
    }
    for more in ({}, {"normalize": False}) if "normalize" in case.takes else ({},):
        for reduction in ("none", "mean", "sum"):
            value, found = gradients(runs(case, reduction, **empty, **more), data)
            assert not value.any()
            assert not any(g.any() for g in found.values())


@over(REFERENCED)
def test_a_reference_is_whatever_has_rows_labels_and_own(case: Case) -> None:
    """As a memory that keeps them in buffers."""
    data = replace(case, reference="self").draw(6)
    given = {**case.hyper, **data.others, **data.rows}
    memory = nn.Module()
    memory.register_buffer("x", given.pop("reference"))
    memory.register_buffer("labels", given.pop("reference_labels"))
    memory.register_buffer("own", given.pop("reference_own"))
    assert torch.equal(case.function(**given, reference=memory), case.run(data, "mean"))


@over(REFERENCED)
def test_only_the_reference_gets_a_gradient_if_only_it_requires_one(case: Case) -> None:
    data = case.draw(5)
    reference = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 7, -3, 0, 7, 2**53, 2**53 + 1])
    case.run(data, "mean", reference=reference, reference_labels=labels).backward()
    both = data.at(reference=reference.detach())
    _, expected = gradients(runs(case, "mean", reference_labels=labels), both)
    torch.testing.assert_close(reference.grad, expected["reference"])


# Laws.


@over(CASES)
@settings(few, max_examples=3)
@given(seeds, st.integers(2, 9))
def test_order_of_rows_orders_the_losses(case: Case, seed: int, n: int) -> None:
    data = case.draw(n, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    in_order = {"x", "y", "query", "positive", "labels", "reference_own"}
    if case.anchors != "proxies":
        in_order.add("weight")

    def moved(named: Named) -> Named:
        return {k: v[order] if k in in_order else v for k, v in named.items()}

    value, found = gradients(
        lambda d: case.run(d).sum(), Data(moved(data.rows), moved(data.others))
    )
    expected, expected_gradients = gradients(lambda d: case.run(d).sum(), data)
    near((value, found), (expected, moved(expected_gradients)), 1e-9)
    if case.outputs(n) == n and case.function is not nearfar.proxy_anchor_loss:
        rows = case.run(Data(moved(data.rows), moved(data.others)))
        torch.testing.assert_close(rows, case.run(data)[order], rtol=1e-9, atol=1e-10)


@over([case for case in IN_BATCH if not case.multi])
@few
@given(seeds, st.permutations(range(-2, 5)))
def test_names_of_classes_do_not_matter(case: Case, seed: int, names: list[int]) -> None:
    data = case.draw(8, seed=seed)
    known = {"labels", "reference_labels"}
    old = torch.cat([data.others[k] for k in known if k in data.others]).unique()

    def renamed(labels: Tensor) -> Tensor:
        return torch.tensor(names)[torch.searchsorted(old, labels)]

    others = {k: renamed(v) if k in known else v for k, v in data.others.items()}
    assert torch.equal(case.run(Data(data.rows, others)), case.run(data))


@over([case for case in CASES if case.kind == "proxies"])
@few
@given(seeds)
def test_order_of_proxies_does_not_matter(case: Case, seed: int) -> None:
    data = case.draw(6, seed=seed)
    order = torch.randperm(N_CLASSES, generator=torch.Generator().manual_seed(seed))
    place = order.argsort()
    moved = Data(
        {**data.rows, "proxies": data.rows["proxies"][order]},
        {**data.others, "labels": place[data.others["labels"]]},
    )
    if case.anchors == "proxies" and case.weighted:
        moved.others["weight"] = data.others["weight"][order]
    torch.testing.assert_close(case.run(moved, "mean"), case.run(data, "mean"))


@over([case for case in CASES if case.normalizes])
@few
@given(seeds, st.floats(1e-3, 1e3))
def test_length_of_rows_does_not_matter(case: Case, seed: int, factor: float) -> None:
    data = case.draw(6, seed=seed)
    torch.testing.assert_close(
        case.run(data.each(lambda a: a * factor)), case.run(data), rtol=1e-8, atol=1e-9
    )


@over([case for case in IN_BATCH if not case.reference and not case.multi])
def test_class_ids_equal_multi_labels_with_one_label_per_row(case: Case) -> None:
    data = case.draw(9, seed=9)
    one_hot = nn.functional.one_hot(data.others["labels"].unique(return_inverse=True)[1]).bool()
    found = case.run(Data(data.rows, {**data.others, "labels": one_hot}))
    torch.testing.assert_close(found, case.run(data))


# Labels.

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16)


@over([case for case in PLAIN if case.kind != "towers"])
def test_class_ids_of_every_dtype(case: Case) -> None:
    data = case.draw(9)
    labels = torch.arange(9) % 4
    expected = case.run(data, labels=labels)
    for dtype in INTEGERS:
        assert torch.equal(case.run(data, labels=labels.to(dtype)), expected)
        assert torch.equal(case.run(data, labels=labels.to(dtype).numpy()), expected)
    assert torch.equal(case.run(data, labels=labels.tolist()), expected)


@over([case for case in PLAIN if case.kind != "towers"])
def test_mistake_6_uint8_labels_of_300_rows(case: Case) -> None:
    data = case.draw(300)
    labels = torch.arange(300) % 6
    expected = gradients(runs(case, "mean", labels=labels), data)
    near(gradients(runs(case, "mean", labels=labels.to(torch.uint8)), data), expected, 1e-14)


@over(REFERENCED)
def test_mistake_6_labels_that_floats_cannot_tell_apart(case: Case) -> None:
    data = case.draw(8)
    small = torch.arange(8) % 4
    for offset in (2**24, 2**53, 2**62, -(2**62)):
        assert torch.equal(case.run(data, labels=small + offset), case.run(data, labels=small))


# Shells.


def shell_of(function: Any) -> type[nn.Module]:
    return next(
        shell
        for name in nearfar.losses.__all__
        if inspect.isclass(shell := getattr(nearfar, name))
        and getattr(shell, "loss", None) is function
    )


DATA = {"weight", "pairs", "reference", "hard_negatives", "ids", "hard_ids"}


def shell(case: Case, data: Data, **settings: Any) -> nn.Module:
    """The module of a loss, which holds its learned numbers and proxies."""
    held = {**case.hyper, **{k: nn.Parameter(data.rows[k]) for k in case.learned}, **settings}
    if case.kind != "proxies":
        return shell_of(case.function)(**held)
    n_classes, *_, dim = data.rows["proxies"].shape
    if case.sub_centers:
        held["sub_centers"] = case.sub_centers
    module = shell_of(case.function)(n_classes, dim, **held, dtype=torch.float64)
    with torch.no_grad():
        module.proxies.copy_(data.rows["proxies"])
    return module


@over(CASES)
def test_shell_equals_function_also_when_copied(case: Case) -> None:
    data = case.draw(6)
    module = shell(case, data, reduction="none")
    holds = {*case.learned, "proxies"} & data.rows.keys()
    arrays = {k: v for k, v in (data.rows | data.others).items() if k not in holds}
    arrays = referring(arrays)
    expected = case.run(data)
    for same in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(same(**arrays), expected)
    assert {name for name, _ in module.named_parameters()} == holds
    positional = [arrays.pop(k) for k in list(arrays) if k not in DATA]
    assert torch.equal(module(*positional, **arrays), expected)
    if holds:
        module(*positional, **arrays).sum().backward()
        _, expected_gradients = gradients(lambda d: case.run(d).sum(), data)
        for name in holds:
            assert torch.equal(getattr(module, name).grad, expected_gradients[name])


@over([case for case in PLAIN if case.kind != "proxies"])
def test_shell_has_the_signature_of_its_function(case: Case) -> None:
    parameters = inspect.signature(case.function).parameters.values()
    kept = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in DATA]
    shell = inspect.signature(shell_of(case.function)).parameters
    assert list(shell.values()) == kept
    assert kept[-1].name == "reduction"
    needed = [p.name for p in kept if p.default is p.empty]
    for name in needed:
        some = {other: 1.0 for other in needed if other != name}
        with pytest.raises(TypeError, match=rf"needs {name}: no default"):
            shell_of(case.function)(**some)


# Accuracy, the acceptance of the engine: N about 200, near-duplicates planted.


def planted(case: Case, seed: int, noise: float = 1.0) -> Data:
    """Float32 rows, some of them nearly equal, in and across classes and towers.

    `noise` is how far the second tower is from the first.
    """
    data = case.draw(201, 64, seed, layout="random")
    chance = torch.Generator().manual_seed(seed)

    def closer(a: Tensor) -> Tensor:
        # Something in common to all rows, and near-duplicates of the first in place of the last.
        if a.ndim != 2:
            return a
        k = min(20, len(a) // 2)
        wobble = 1e-3 * torch.randn(k, a.shape[1], generator=chance, dtype=a.dtype)
        a = a + 0.3
        return torch.cat([a[:-k], a[:k] + wobble])

    data = data.each(closer)
    if case.kind == "towers":
        first, second = list(data.rows)[:2]
        x = data.rows[first]
        data = data.at(**{second: x + noise * (data.rows[second] - x)})
    if case.kind == "batch":
        data.others["labels"] = torch.arange(201) // 2
    return data.at(**{k: v.float() for k, v in data.rows.items() if v.ndim})


def accuracy_case(loss: str, **hyper: Any) -> Case:
    base = next(c for c in CASES if c.function is getattr(nearfar, f"{loss}_loss"))
    learned = tuple(k for k in ("scale", "bias", "temperature") if k in hyper)
    name = f"{loss}-" + "-".join(f"{v:g}" for v in hyper.values())
    return Case(name, base.function, base.kind, base.oracle, base.textbook, hyper, learned)


ACCURATE = [
    *(accuracy_case("clip", scale=s) for s in (1.0, 20.0, 100.0)),
    *(accuracy_case("siglip", scale=s, bias=-10.0) for s in (1.0, 20.0, 100.0)),
    *(accuracy_case("info_nce", temperature=t) for t in (1.0, 0.05, 0.01)),
    *(accuracy_case("sup_con", temperature=t) for t in (1.0, 0.05, 0.01)),
]
REST = [
    case
    for case in CASES
    if not (case.multi or case.reference or case.weighted or case.learned)
    and case.normalizes
    and case.name not in ("batch_contrastive-0.0", "info_nce-0.001")
]


def errors(
    found: tuple[Tensor, Named], true: tuple[Tensor, Named]
) -> Iterator[tuple[str, float, float, float]]:
    """For the value and every gradient: the largest error, and the norms of error and truth."""
    pairs = {"value": (found[0], true[0])} | {k: (found[1][k], true[1][k]) for k in true[1]}
    for name, (a, b) in pairs.items():
        off = a.double() - b.double()
        yield name, float(off.abs().max()), float(off.norm()), float(b.double().norm())


def assert_as_good_as_the_textbook(case: Case, regimes: list[Data]) -> None:
    """Errors over all of `regimes` together, as a single number can be rounded luckily.

    Half a unit in the last place of float32 is allowed for: the rounding of the result itself.
    """
    ours: dict[str, list[tuple[float, float, float]]] = {}
    books: dict[str, list[tuple[float, float, float]]] = {}
    for data in regimes:
        true = gradients(runs(case, "mean"), data.to(torch.float64))
        single = data.at(**{k: v.float() for k, v in data.rows.items()})
        for table, found in (
            (ours, gradients(runs(case, "mean"), single)),
            (books, gradients(case.schoolbook, single)),
        ):
            for name, *numbers in errors(found, true):
                table.setdefault(name, []).append(tuple(numbers))
    for name, mine in ours.items():
        rounding = torch.finfo(torch.float32).eps / 2
        largest = max(size for *_, size in mine)
        assert math.hypot(*(e for _, e, _ in mine)) <= 2 * math.hypot(
            *(e for _, e, _ in books[name])
        ) + rounding * math.hypot(*(size for *_, size in mine)), name
        assert max(e for e, *_ in mine) <= 2 * max(e for e, *_ in books[name]) + (
            rounding * largest
        ), name


@over(ACCURATE)
def test_error_is_at_most_twice_the_textbooks(case: Case) -> None:
    """With towers that are far apart, and with towers that nearly agree."""
    for noise in (1.0, 0.1) if case.kind == "towers" else (1.0,):
        # Many draws, since the gradient of a bias is one number, which four round luckily.
        assert_as_good_as_the_textbook(case, [planted(case, seed, noise) for seed in range(24)])


@over(REST)
def test_error_of_the_others_is_at_most_twice_the_textbooks(case: Case) -> None:
    """Point 4 of the contract, for every loss that has a textbook formula of its own."""
    assert_as_good_as_the_textbook(case, [planted(case, seed) for seed in range(4)])


def well_matched(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two towers that agree, whose rows have a cosine of about 0.5 with all others."""
    chance = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(64, 64, generator=chance, dtype=torch.float64)).Q
    x = x[:40] + x[40] + 0.02 * torch.randn(40, 64, generator=chance, dtype=torch.float64)
    y = x + 0.01 * torch.randn(40, 64, generator=chance, dtype=torch.float64)
    return x.float().to(dtype), y.float().to(dtype)


SMALL: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "clip": lambda x, y, scale: clip_loss(x, y, scale=scale),
    "info_nce": lambda x, y, scale: info_nce_loss(x, y, temperature=1 / scale),
    "info_nce-hard": lambda x, y, scale: info_nce_loss(
        x[:30], y[:30], temperature=1 / scale, hard_negatives=y[30:]
    ),
    "siglip": lambda x, y, scale: siglip_loss(x, y, scale=scale, bias=-0.75 * scale),
    "sup_con": lambda x, y, scale: sup_con_loss(
        torch.cat([x, y]), torch.arange(40).repeat(2), temperature=1 / scale
    ),
    "nt_xent": lambda x, y, scale: nt_xent_loss(
        torch.cat([x, y]), torch.arange(40).repeat(2), temperature=1 / scale
    ),
    "proxy_softmax": lambda x, y, scale: nearfar.proxy_softmax_loss(
        x, y, torch.arange(40), scale=scale
    ),
}


@pytest.mark.parametrize("scale", [25.0, 50.0, 100.0])
@pytest.mark.parametrize("name", SMALL)
def test_a_small_loss_keeps_its_digits(name: str, scale: float) -> None:
    """Where `cross_entropy` gives 0, as 1 + e^-50 is 1: the value and the gradient in float32."""
    found, true = [], []
    for table, dtype in ((found, torch.float32), (true, torch.float64)):
        x, y = (t.requires_grad_() for t in well_matched(dtype))
        loss = SMALL[name](x, y, scale)
        table.extend([loss.detach(), *torch.autograd.grad(loss, (x, y))])
    assert 0 < true[0] < 0.1
    for ours, exact in zip(found, true, strict=True):
        assert (ours.double() - exact).norm() < 1e-3 * exact.norm()


def test_cross_entropy_does_not() -> None:
    """What the test above guards against; without it, it would guard nothing."""
    x, y = (nn.functional.normalize(t) for t in well_matched(torch.float32))
    assert nn.functional.cross_entropy(100 * x @ y.T, torch.arange(40)) == 0


# What torch puts around a loss.


@pytest.fixture
def no_gradient_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a gradient was computed")

    for measure in (Product, LargestProduct, CosineDistance, Euclidean):
        monkeypatch.setattr(measure, "backward", refuse)
    monkeypatch.setattr(Gradient, "__init__", refuse)


@pytest.mark.usefixtures("no_gradient_work")
@over(CASES)
def test_no_grad_computes_only_the_value(case: Case) -> None:
    data = case.draw(9)
    for reduction in ("none", "mean"):
        plain = case.run(data, reduction)  # no input asks for a gradient
        assert not plain.requires_grad
        for a in data.rows.values():
            a.requires_grad_()
        with torch.no_grad():
            assert torch.equal(case.run(data, reduction), plain)
        with torch.inference_mode():
            assert torch.equal(case.run(data, reduction), plain)
        for a in data.rows.values():
            a.requires_grad_(False)


@pytest.mark.usefixtures("no_gradient_work")
@over(PLAIN)
def test_the_patches_of_the_test_above_do_catch_a_gradient(case: Case) -> None:
    with pytest.raises(AssertionError, match="a gradient was computed"):
        gradients(runs(case, "mean"), case.draw(9))


@over(CASES)
def test_an_input_without_gradient_gets_none(case: Case) -> None:
    data = case.draw(7)
    _, expected = gradients(runs(case, "mean"), data)
    for name in data.rows:
        alone = data.rows[name].clone().requires_grad_()
        loss = case.run(data.at(**{name: alone}), "mean")
        loss.backward()
        torch.testing.assert_close(alone.grad, expected[name])
        assert not any(a.requires_grad for k, a in data.rows.items() if k != name)


@over(CASES)
def test_autocast_changes_nothing(case: Case) -> None:
    data = case.draw(9, dtype=torch.float32)

    def under_autocast(d: Data, reduction: str) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return case.run(d, reduction)

    for reduction in ("none", "mean"):
        value, expected = gradients(runs(case, reduction), data)
        cast, found = gradients(partial(under_autocast, reduction=reduction), data)
        assert cast.dtype == torch.float32
        assert torch.equal(cast, value)
        assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own
@over(PLAIN)
def test_compiles_without_error(case: Case) -> None:
    torch._dynamo.reset()
    data = case.draw(6, dtype=torch.float32)
    compiled = torch.compile(case.function, backend="eager")

    def run(d: Data) -> Tensor:
        return compiled(**{**case.hyper, **d.others, **d.rows})

    value, expected = gradients(runs(case, "mean"), data)
    again, found = gradients(run, data)
    assert torch.equal(again, value)
    assert all(torch.equal(found[k], expected[k]) for k in expected)


_, TRACED, BROKEN = re.split(
    r"^With `fullgraph=True`, .*:|^With a graph break, .*:", PAGE.read_text(), flags=re.MULTILINE
)


def on_the_page(part: str) -> set[str]:
    """The losses a paragraph names."""
    return set(re.findall(r"`(\w+_loss\w*)`", part.partition("\n\n")[0]))


def test_the_page_says_for_every_loss_whether_it_compiles_whole() -> None:
    losses = {name for name in nearfar.losses.__all__ if name.islower()}
    assert on_the_page(TRACED) | on_the_page(BROKEN) == losses - {"cosine_similarity"}
    assert on_the_page(TRACED) & on_the_page(BROKEN) == {"info_nce_loss"}


@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it traces
@pytest.mark.parametrize("name", sorted(on_the_page(TRACED)))
def test_what_the_page_says_is_traced_whole_is(name: str) -> None:
    torch._dynamo.reset()
    rows = torch.randn(4, 4, 5, generator=torch.Generator().manual_seed(0)).unbind()
    similar = torch.tensor([True, False, True, False])
    data: tuple[Tensor, ...] = {
        "contrastive_loss": (*rows[:2], similar),
        "contrastive_loss_from_distance": (rows[0][:, 0].abs(), similar),
        "cosine_loss": (*rows[:2], similar),
        "triplet_loss": rows[:3],
        "quadruplet_loss": rows,
        "softmax_loss": (rows[0], torch.arange(4)),
        "info_nce_loss": rows[:3],
    }[name]
    loss = getattr(nearfar, name)
    module = next(m for m in vars(nearfar.losses).values() if getattr(m, "loss", None) is loss)
    for shell in (loss, module()):
        found = torch.compile(shell, backend="aot_eager", fullgraph=True)(*data)
        torch.testing.assert_close(found, loss(*data))


@pytest.mark.filterwarnings("ignore")
@over(PLAIN)
def test_what_the_page_says_breaks_the_graph_does(case: Case) -> None:
    torch._dynamo.reset()
    data = case.draw(6, dtype=torch.float32)
    assert case.function.__name__ in on_the_page(BROKEN)
    compiled = torch.compile(case.function, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(**{**case.hyper, **data.others, **data.rows})


@over(PLAIN)
def test_a_second_derivative_raises_a_clear_error(case: Case) -> None:
    data = case.draw(6)
    leaves = {name: a.requires_grad_() for name, a in data.rows.items()}
    for reduction in ("none", "mean"):
        loss = case.run(data.at(**leaves), reduction).sum()
        with pytest.raises(RuntimeError, match="have no second derivative: call backward"):
            torch.autograd.grad(loss, [*leaves.values()], create_graph=True)


@over(PLAIN)
def test_a_graph_may_be_walked_twice(case: Case) -> None:
    data = case.draw(6)
    leaves = {name: a.requires_grad_() for name, a in data.rows.items()}
    for reduction in ("none", "mean"):
        loss = case.run(data.at(**leaves), reduction).sum()
        first = torch.autograd.grad(loss, [*leaves.values()], retain_graph=True)
        again = torch.autograd.grad(2 * loss, [*leaves.values()])
        for a, b in zip(first, again, strict=True):
            torch.testing.assert_close(b, 2 * a)


@over(PLAIN)
def test_a_loss_adds_up_with_others(case: Case) -> None:
    data = case.draw(6)

    def both(d: Data) -> Tensor:
        return 0.5 * case.run(d, "mean") + sum(a.square().sum() for a in d.rows.values())

    value, found = gradients(both, data)
    alone, expected = gradients(runs(case, "mean"), data)
    squares = {name: 0.5 * g + 2 * data.rows[name] for name, g in expected.items()}
    near((value, found), (value, squares), 1e-12)
    torch.testing.assert_close(
        value, 0.5 * alone + sum(a.square().sum() for a in data.rows.values())
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@over(CASES)
def test_low_precision_is_accumulated_in_float32(case: Case, dtype: torch.dtype) -> None:
    """Value in float32, gradient in the input's dtype, both as of the same rows in float32."""
    data = case.draw(9, dtype=dtype)
    for reduction in ("none", "mean", "sum"):
        value, found = gradients(runs(case, reduction), data)
        wide, expected = gradients(runs(case, reduction), data.to(torch.float32))
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, wide, rtol=1e-5, atol=1e-6)
        for name, g in found.items():
            assert g.dtype == data.rows[name].dtype
            step = torch.finfo(g.dtype).eps
            # Below the normal numbers the step of a dtype no longer shrinks.
            floor = step * torch.finfo(g.dtype).smallest_normal
            largest = float(expected[name].abs().max())
            torch.testing.assert_close(
                g.double(),
                expected[name].double(),
                rtol=step,
                atol=floor + 1e-6 * largest,
            )


@pytest.mark.parametrize("factor", [2.0**20, 2.0**16, 2.0**-12])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@over(PLAIN)
def test_a_scaled_loss_scales_its_gradient_before_it_is_rounded(
    case: Case, dtype: torch.dtype, factor: float
) -> None:
    """What a gradient scaler is for: a gradient too small for float16, 2^16 times as large.

    The gradient is first small: the loss is divided by what it is then multiplied with.
    """
    data = case.draw(9, dtype=dtype)
    for reduction in ("none", "mean"):

        def scaled(d: Data, r: str = reduction) -> Tensor:
            return case.run(d, r) * factor

        _, found = gradients(scaled, data)
        _, expected = gradients(scaled, data.to(torch.float32))
        for name, g in found.items():
            step = torch.finfo(g.dtype).eps
            floor = step * torch.finfo(g.dtype).smallest_normal
            largest = float(expected[name].abs().max())
            assert torch.equal(g.isfinite(), expected[name].to(dtype).isfinite())
            fits = g.isfinite()
            torch.testing.assert_close(
                g[fits].double(),
                expected[name][fits].double(),
                rtol=step,
                atol=floor + 1e-6 * largest,
            )


def test_gradients_below_float16_survive_a_gradient_scaler() -> None:
    """1000 rows whose mean's gradient is below the smallest float16: scaled by 2^16, it is not."""
    chance = torch.Generator().manual_seed(0)
    x = 100 * torch.randn(1000, 8, generator=chance)
    y = x + torch.randn(1000, 8, generator=chance)
    wide = x.half().float().requires_grad_()
    (2**16 * clip_loss(wide, y.half().float(), scale=1.0)).backward()
    narrow = x.half().requires_grad_()
    (2**16 * clip_loss(narrow, y.half(), scale=1.0)).backward()
    assert wide.grad.abs().median() > 1e-3
    torch.testing.assert_close(narrow.grad.float(), wide.grad, rtol=2e-3, atol=1e-6)


MIXED = [
    (torch.float16, torch.bfloat16, torch.float32),
    (torch.float16, torch.float32, torch.float32),
    (torch.float32, torch.float64, torch.float64),
    (torch.bfloat16, torch.float64, torch.float64),
]


@pytest.mark.parametrize(("first", "second", "expected"), MIXED, ids=str)
@over([case for case in PLAIN if case.kind != "batch"])
def test_the_two_sides_may_differ_in_dtype(
    case: Case, first: torch.dtype, second: torch.dtype, expected: torch.dtype
) -> None:
    data = case.draw(6)
    one, other = (name for name in data.rows if data.rows[name].ndim == 2)
    for dtypes in ((first, second), (second, first)):
        mixed = data.at(
            **{k: data.rows[k].to(t) for k, t in zip((one, other), dtypes, strict=True)}
        )
        value, found = gradients(runs(case, "mean"), mixed)
        assert value.dtype == expected
        assert (found[one].dtype, found[other].dtype) == dtypes
        wide, exact = gradients(runs(case, "mean"), mixed.to(torch.float64))
        torch.testing.assert_close(value.double(), wide, rtol=1e-5, atol=1e-6)
        for k, g in found.items():
            torch.testing.assert_close(g.double(), exact[k], rtol=1e-2, atol=1e-4)


@over(CASES)
def test_inputs_are_left_alone(case: Case) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        data = case.draw(9, dtype=dtype)
        arrays = {**data.rows, **data.others}
        before = {k: v.clone() for k, v in arrays.items()}
        gradients(runs(case, "mean"), data)
        leaves = {name: a.detach().requires_grad_() for name, a in data.rows.items()}
        case.run(data.at(**leaves)).sum().backward()
        assert all(torch.equal(arrays[k], before[k]) for k in arrays)


@over(CASES)
def test_numpy_and_lists_give_what_tensors_give(case: Case) -> None:
    data = case.draw(5, dtype=torch.float32)
    expected = case.run(data)
    given = {**data.others, **{k: v for k, v in data.rows.items() if v.ndim}}
    numbers = {k: v for k, v in data.rows.items() if not v.ndim}
    for arrays in (
        {k: v.numpy() for k, v in given.items()},
        {k: v.tolist() for k, v in given.items()},
    ):
        assert torch.equal(
            case.function(**referring(case.hyper | numbers | arrays), reduction="none"), expected
        )


@over(CASES)
def test_rows_in_any_memory_layout(case: Case) -> None:
    data = case.draw(9)
    whole = gradients(runs(case), data)
    strided = data.each(lambda a: a.flip(0).flip(0).mT.contiguous().mT)
    assert any(not a.is_contiguous() for a in strided.rows.values() if a.ndim > 1)
    near(gradients(runs(case), strided), whole, 1e-12)
    expanded = data.each(lambda a: a[:1].expand_as(a))  # strides of 0
    near(gradients(runs(case), expanded), gradients(runs(case), expanded.each(Tensor.clone)), 1e-12)


# Learned numbers and what else the signatures take.


LEARNED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "scale": lambda x, number: siglip_loss(x, x.flip(0), scale=number, bias=-1.0),
    "bias": lambda x, number: siglip_loss(x, x.flip(0), scale=2.0, bias=number),
    "temperature": lambda x, number: info_nce_loss(x, x.flip(0), temperature=number),
}


def test_a_module_keeps_no_number_whose_graph_is_gone_after_one_step() -> None:
    log_scale = nn.Parameter(torch.tensor(2.0))
    with pytest.raises(ValueError, match=r"nn.Parameter, or call nearfar.clip_loss\(..., scale="):
        nearfar.CLIPLoss(scale=log_scale.exp())
    assert nearfar.CLIPLoss(scale=log_scale.exp().detach())


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_number_may_have_shape_1_and_no_other(name: str) -> None:
    """`nn.Parameter(torch.ones(1))` is how many people write it."""
    x = torch.randn(4, 3)
    one, scalar = (torch.full(shape, 0.5, requires_grad=True) for shape in ((1,), ()))
    values = [LEARNED[name](x, number) for number in (one, scalar)]
    assert torch.equal(*values)
    for value in values:
        assert value.shape == ()
        value.backward()
    assert torch.equal(one.grad, scalar.grad.reshape(1))
    for shape in ((2,), (4, 4), (0,)):
        with pytest.raises(ValueError, match=rf"{name} must be one number, got"):
            LEARNED[name](x, torch.ones(shape))


@pytest.mark.parametrize("bad", [math.nan, 0.0, -1.0])
def test_a_learned_number_that_left_its_range_is_not_hidden(bad: float) -> None:
    value = torch.tensor(bad)
    for case in PLAIN:
        data = case.draw(4, dtype=torch.float32, layout="pairs")
        for name in case.takes & {"temperature", "scale"} - {"margin"}:
            if case.function in (nearfar.circle_loss, nearfar.proxy_anchor_loss):
                continue  # their scale is a number
            assert case.run(data, "mean", **{name: value}).isnan()


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, True, "1"])
def test_a_number_out_of_range_is_refused(bad: Any) -> None:
    for case in PLAIN:
        for name in case.takes & {"temperature", "scale", "alpha", "beta"}:
            with pytest.raises(ValueError, match=rf"{name} must be a number above 0, got"):
                case.run(case.draw(4), **{name: bad})
        for name in case.takes & {"margin", "angle_margin", "cosine_margin"}:
            if bad not in (0.0, -1.0):
                with pytest.raises(ValueError, match=rf"{name} must be a number "):
                    case.run(case.draw(4), **{name: bad})


@pytest.mark.parametrize("number", [2, np.float32(2), torch.tensor(2), torch.tensor(2.0).double()])
def test_a_scale_may_be_any_number(number: Any) -> None:
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    loss = clip_loss(x, y, scale=number)
    torch.testing.assert_close(loss, clip_loss(x, y, scale=2.0))
    assert loss.dtype == torch.float32


def test_a_learned_scale_gets_its_gradient_in_its_own_dtype() -> None:
    x, y = (torch.randn(5, 3, dtype=torch.float16) for _ in range(2))
    for dtype in (torch.float64, torch.float32):
        scale, bias = (torch.tensor(v, dtype=dtype, requires_grad=True) for v in (3.0, -1.0))
        siglip_loss(x, y, scale=scale, bias=bias).backward()
        assert scale.grad.dtype == bias.grad.dtype == dtype
        assert scale.grad.shape == bias.grad.shape == ()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_margin_is_exact_where_a_row_is_its_proxy(dtype: torch.dtype) -> None:
    """The sine in cos(theta + m) is 0 there; a floor under it belongs in the gradient only."""
    proxies = torch.eye(3, dtype=dtype, requires_grad=True)
    loss = nearfar.proxy_softmax_loss(
        proxies.detach(), proxies, [0, 1, 2], scale=64.0, angle_margin=1.0
    )
    loss.backward()
    exact = math.log1p(2 * math.exp(-64 * math.cos(1.0)))
    assert loss.item() == pytest.approx(exact, rel=1e3 * torch.finfo(dtype).eps, abs=0)
    # Where rounding leaves something of a gradient that is 0, the floor keeps it small.
    rows = torch.randn(8, 16, dtype=dtype, generator=torch.Generator().manual_seed(0))
    proxies = rows.clone().requires_grad_()
    nearfar.proxy_softmax_loss(rows, proxies, list(range(8)), angle_margin=1.0).backward()
    assert proxies.grad.abs().amax() < 100


def test_bounded_logits_are_summed_without_overflow() -> None:
    for dtype, safe in SAFE.items():
        assert math.log(1e9) + safe < math.log(torch.finfo(dtype).max)
        assert -safe > math.log(torch.finfo(dtype).tiny)


@pytest.mark.parametrize("angle", [0.0, 0.5, 1.5])
def test_a_proxys_margin_goes_on_linearly_behind_its_turning_point(angle: float) -> None:
    """An own proxy in the opposite direction: cos = -1, whose cosine with margin would rise."""
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for theta in (0.0, 1.0, math.pi - angle - 1e-3, math.pi - angle + 1e-3, math.pi):
        own = [math.cos(theta), math.sin(theta)]
        proxies = torch.tensor([own, [0.0, 1.0]], dtype=torch.float64)
        loss = nearfar.proxy_softmax_loss(x, proxies, [0], scale=2.0, angle_margin=angle)
        margin = math.cos(theta + angle)
        if theta > math.pi - angle:
            margin = math.cos(theta) - angle * math.sin(angle)
        # A cosine within 1e-16 of -1 leaves 1e-8 of the sine open.
        assert loss.item() == pytest.approx(math.log1p(math.exp(-2 * margin)), abs=1e-7)


def test_hard_negatives_of_one_query_are_those_of_all() -> None:
    """In any shape: (m, d), (n, m, d), as lists; none of them is no negative at all."""
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    hard = torch.randn(4, 2, 3)
    expected = info_nce_loss(x, y, hard_negatives=hard.reshape(8, 3), reduction="none")
    for same in (hard, hard.tolist(), hard.flip(0, 1), hard.double().numpy()):
        found = info_nce_loss(x, y, hard_negatives=same, reduction="none")
        torch.testing.assert_close(found, expected, check_dtype=False)
    for nothing in (torch.zeros(0, 3), torch.zeros(4, 0, 3)):
        found = info_nce_loss(x, y, hard_negatives=nothing)
        torch.testing.assert_close(found, info_nce_loss(x, y))


@pytest.mark.parametrize("shape", [(3,), (2, 2), (3, 2, 3), (4, 2, 2), (1, 4, 2, 3)])
def test_hard_negatives_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    with pytest.raises(ValueError, match="hard_negatives must have"):
        info_nce_loss(x, y, hard_negatives=torch.zeros(shape))


def test_info_nce_on_listed_negatives_equals_in_batch() -> None:
    x, y = (torch.randn(6, 4, dtype=torch.float64) for _ in range(2))
    others = torch.stack([torch.cat([y[:i], y[i + 1 :]]) for i in range(6)])
    for decoupled in (False, True):
        how: dict[str, Any] = {"decoupled": decoupled, "reduction": "none"}
        torch.testing.assert_close(info_nce_loss(x, y, **how), info_nce_loss(x, y, others, **how))


def test_info_nce_in_both_directions_is_the_clip_loss() -> None:
    x, y = (torch.randn(6, 4, dtype=torch.float64) for _ in range(2))
    both = info_nce_loss(x, y, temperature=0.05, symmetric=True, reduction="none")
    torch.testing.assert_close(both, clip_loss(x, y, scale=20.0, reduction="none"))


def test_two_views_make_nt_xent_and_sup_con_equal() -> None:
    x, labels = torch.randn(12, 4, dtype=torch.float64), torch.arange(6).repeat(2)
    ours = nt_xent_loss(x, labels, temperature=0.2)
    torch.testing.assert_close(ours, sup_con_loss(x, labels, temperature=0.2))


def test_mistake_1_a_hard_anchor_keeps_learning_at_low_temperature() -> None:
    """`log(num / den + tiny)` gives 87.3 where the loss is 200, with gradient 0."""
    x = torch.tensor([[1.0, 0.1], [-1.0, 0.1], [1.0, 0.2], [-1.0, 0.2]], requires_grad=True)
    cos = torch.nn.functional.cosine_similarity(x[:1], x).detach()
    for loss in (nt_xent_loss, sup_con_loss):
        rows = loss(x, [0, 0, 1, 1], temperature=0.01, reduction="none")
        assert rows[0].item() == pytest.approx(100 * (cos[2] - cos[1]).item(), rel=1e-4)
        (gradient,) = torch.autograd.grad(rows.sum(), x)
        assert gradient.abs().min(1).values.max() > 1


def test_mistake_13_every_offset_of_the_matches() -> None:
    """Row i of the second block still matches column i, whatever the block's shape."""
    x = torch.eye(11, dtype=torch.float64)
    for rows in range(1, 13):
        for columns in range(1, 13):
            with tile_shape(rows, columns):
                assert clip_loss(x, x, scale=100.0).item() == pytest.approx(
                    math.log1p(10 * math.exp(-100)), rel=1e-12
                )
