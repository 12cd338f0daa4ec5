"""The eight points of the numbers contract, for every loss of the table in four dtypes."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from cases import CASES, DTYPES, Case, Tensors, over, value_and_gradients
from torch import Tensor, nn

import nearfar
from nearfar import (
    contrastive_loss,
    cosine_loss,
    info_nce_loss,
    quadruplet_loss,
    softmax_loss,
    triplet_loss,
)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def smallest(dtype: torch.dtype) -> float:
    """The smallest denormal number."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


# From standard normal rows and their dtype to what is hard about them.
EXTREMES: dict[str, Callable[[Tensors, torch.dtype], Tensors]] = {
    "identical": lambda x, _: (
        tuple(a[:1].reshape(-1)[: a.shape[-1]].expand_as(a) for a in x)
        if x[0].ndim > 1
        else tuple(torch.ones_like(a) for a in x)
    ),
    "same in all arguments": lambda x, _: tuple(torch.full_like(a, 0.7) for a in x),
    "zero": lambda x, _: tuple(torch.zeros_like(a) for a in x),
    "one argument zero": lambda x, _: (torch.zeros_like(x[0]), *x[1:]),
    "one row zero": lambda x, _: tuple(torch.cat([torch.zeros_like(a[:1]), a[1:]]) for a in x),
    "opposite": lambda x, _: tuple(
        torch.full_like(a, 0.7 if k % 2 else -0.7) for k, a in enumerate(x)
    ),
    "size 1e4": lambda x, _: tuple(a * 1e4 for a in x),
    "size 1e-30": lambda x, _: tuple(a * 1e-30 for a in x),
    "denormal": lambda x, dtype: tuple(a.sign() * smallest(dtype) for a in x),
    "one column of 1e4": lambda x, _: tuple(
        torch.cat([a[..., :1] * 1e4, a[..., 1:]], dim=-1) for a in x
    ),
}


def assert_finite(case: Case, x: Tensors, labels: Tensors) -> None:
    """Gradients beyond float16 are infinite where, rounded from float32, they would be."""
    as_wide = x if x[0].dtype is not torch.float16 else tuple(a.float() for a in x)
    value, gradients = value_and_gradients(lambda a: case.run(a, labels), x)
    _, wide = value_and_gradients(lambda a: case.run(a, labels), as_wide)
    assert value.isfinite().all()
    if "similarity" not in case.name:
        assert (value >= 0).all()
    for gradient, other, a in zip(gradients, wide, x, strict=True):
        assert gradient.dtype == a.dtype
        assert gradient.shape == a.shape
        assert other.isfinite().all()
        assert torch.equal(gradient, other.to(a.dtype))
    for reduction in ("mean", "sum"):
        leaves = tuple(a.clone().requires_grad_() for a in as_wide)
        loss = case.run(leaves, labels, reduction)
        loss.backward()
        assert loss.isfinite()
        assert all(a.grad is not None and a.grad.isfinite().all() for a in leaves)


@pytest.mark.parametrize("extreme", EXTREMES)
@over(CASES)
def test_finite_in_finite_out(case: Case, extreme: str) -> None:
    """Point 1."""
    x, labels = case.draw(6, 5)
    for dtype in DTYPES:
        hard = case.valid(tuple(a.to(dtype) for a in EXTREMES[extreme](x, dtype)))
        assert all(a.isfinite().all() for a in hard)
        assert_finite(case, hard, labels)


@pytest.mark.parametrize("size", [1e15, 1e25])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@over(CASES)
def test_huge_rows(case: Case, dtype: torch.dtype, size: float) -> None:
    """Finite wherever the answer itself fits, though squares on the way to it do not."""
    x, labels = case.draw(6, 5)
    huge = tuple((a * size).to(dtype) for a in x)
    true = case.truth(huge, labels)
    if true.max() > torch.finfo(torch.float32).max:
        if "raw" in case.name:
            pytest.skip("a sum of products that do not fit may be inf - inf")
        assert not case.run(huge, labels).isnan().any()
    else:
        assert_finite(case, huge, labels)
        near = 1e-4 * true.abs().max().item()
        torch.testing.assert_close(case.run(huge, labels).double(), true, rtol=1e-4, atol=near)


@dtypes
@over(CASES)
def test_nothing_to_compare(case: Case, dtype: torch.dtype) -> None:
    """Point 3: the loss of no rows is 0, and can still be differentiated."""
    x, labels = case.draw(0, 5, dtype=dtype)
    leaves = tuple(a.requires_grad_() for a in x)
    assert case.run(leaves, labels).shape == (0,)
    for reduction in ("mean", "sum"):
        loss = case.run(leaves, labels, reduction)
        assert loss.shape == ()
        assert loss.item() == 0
        loss.backward()
        assert all(a.grad is not None and not a.grad.any() for a in leaves)


@dtypes
@over(CASES)
def test_one_row(case: Case, dtype: torch.dtype) -> None:
    x, labels = case.draw(1, 5, dtype=dtype)
    assert_finite(case, x, labels)
    assert torch.equal(case.run(x, labels, "mean"), case.run(x, labels, "none")[0])


@over([case for case in CASES if case.streamed])
def test_a_query_alone_in_its_batch_has_nothing_to_compare(case: Case) -> None:
    value, gradients = value_and_gradients(lambda a: case.run(a, ()), case.draw(1, 5)[0])
    assert value.tolist() == [0]
    assert not any(g.any() for g in gradients)


def test_no_negatives_and_one_class_have_loss_0() -> None:
    query = torch.randn(3, 4, requires_grad=True)
    for nothing in (torch.zeros(0, 4), torch.zeros(3, 0, 4)):
        loss = info_nce_loss(query, torch.ones(3, 4), nothing, reduction="none")
        loss.sum().backward()
        assert loss.tolist() == [0, 0, 0]
        assert not query.grad.any()
    logits = torch.randn(3, 1, requires_grad=True)
    for smoothing in (0.0, 0.3):
        loss = softmax_loss(logits, [0, 0, 0], label_smoothing=smoothing)
        loss.backward()
        assert loss.item() == 0
        assert not logits.grad.any()


@over([case for case in CASES if case.labels(2) and case.labels(2)[0].dtype is torch.bool])
@pytest.mark.parametrize("similar", [True, False])
def test_one_kind_of_label_only(case: Case, similar: bool) -> None:
    x, _ = case.draw(4, 5)
    assert_finite(case, x, (torch.full((4,), similar),))


@dtypes
@over(CASES)
def test_non_finite_in_nan_out(case: Case, dtype: torch.dtype) -> None:
    """Point 2: in the loss of every row that sees the bad one, and in no other."""
    n = 3
    x, labels = case.draw(n, 5, dtype=dtype)
    for k, argument in enumerate(x):
        for i, bad in product(range(len(argument)), (math.nan, math.inf, -math.inf)):
            spoiled = argument.clone()
            spoiled[i].view(-1)[-1:] = bad  # one entry of the row
            given = (*x[:k], spoiled, *x[k + 1 :])
            is_nan = case.run(given, labels).isnan()
            assert set(is_nan.nonzero()[:, 0].tolist()) == case.reach(k, i, n)
            assert case.run(given, labels, "mean").isnan()
            assert case.run(given, labels, "sum").isnan()


@pytest.mark.parametrize("bad", [math.nan, 0.0, -1.0])
def test_a_learned_temperature_that_left_its_range_is_not_hidden(bad: float) -> None:
    x = torch.randn(3, 4)
    for negatives in (None, torch.randn(2, 4), torch.randn(3, 2, 4)):
        assert info_nce_loss(x, x.flip(1), negatives, temperature=torch.tensor(bad)).isnan()


@pytest.mark.parametrize("temperature", [0.001, 0.07, 10.0])
@over([case for case in CASES if case.function is info_nce_loss])
def test_a_learned_temperature_has_a_finite_gradient(case: Case, temperature: float) -> None:
    for n, extreme in product((0, 1, 6), ("zero", "identical", "size 1e4", "size 1e-30")):
        x, _ = case.draw(n, 5, dtype=torch.float32)
        learned = nn.Parameter(torch.tensor(temperature))
        hard = EXTREMES[extreme](x, torch.float32) if n else x
        loss = case.run(hard, (), "mean", temperature=learned)
        loss.backward()
        assert loss.isfinite()
        assert learned.grad.isfinite()


@dtypes
@over(CASES)
def test_same_input_same_bits(case: Case, dtype: torch.dtype) -> None:
    """Point 6."""
    x, labels = case.draw(33, 17, dtype=dtype)
    first, first_gradients = value_and_gradients(lambda a: case.run(a, labels), x)
    for _ in range(3):
        again, gradients = value_and_gradients(lambda a: case.run(a, labels), x)
        assert torch.equal(again, first)
        assert all(torch.equal(a, b) for a, b in zip(gradients, first_gradients, strict=True))


def saved_bytes(case: Case, n: int, d: int) -> int:
    """Memory that a loss keeps for backward, each storage counted once."""
    x, labels = case.draw(n, d, dtype=torch.float32)
    storages: dict[int, int] = {}
    kept = []  # a storage that is freed may give its address to the next

    def save(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        kept.append(saved)
        return saved

    leaves = tuple(a.requires_grad_() for a in x)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda saved: saved):
        case.run(leaves, labels, "mean")
    return sum(storages.values())


@over(CASES)
def test_saved_memory_is_linear_in_the_batch(case: Case) -> None:
    small, large = saved_bytes(case, 64, 16), saved_bytes(case, 512, 16)
    assert large <= 8 * small
    inputs = sum(math.prod(shape) for shape in case.shapes(512, 16)) * 4
    assert large <= 16 * inputs


# The mistakes seen in public code, by their number in the list of them.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_mistake_1_a_hard_row_keeps_learning_at_low_temperature(dtype: torch.dtype) -> None:
    """`log(num / den + tiny)` saturates at 87.3 where the loss is 200, with gradient 0."""
    query = torch.tensor([[1.0, 0.0]], dtype=dtype, requires_grad=True)
    positive = torch.tensor([[-1.0, 1e-4]], dtype=dtype)
    negative = torch.tensor([[1.0, 1e-4]], dtype=dtype)
    for negatives in (negative, negative[None]):
        loss = info_nce_loss(query, positive, negatives, temperature=0.01)
        (gradient,) = torch.autograd.grad(loss, query)
        assert loss.item() == pytest.approx(200, rel=1e-5)
        # d/dq of (q.n - q.p) / 0.01, projected on the tangent of the unit circle: (0, 0).
        assert gradient.abs().max() < 1
    # Off the axis the hardest row pulls with all its strength, |n - p| / temperature.
    query = torch.tensor([[0.0, 1.0]], dtype=dtype, requires_grad=True)
    positive, negative = (torch.tensor([[s, 0.5]], dtype=dtype) for s in (-1.0, 1.0))
    loss = info_nce_loss(query, positive, negative, temperature=0.001, normalize=False)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, query)
    assert gradient[0].tolist() == pytest.approx([1000, 0], rel=1e-5)
    logits = torch.tensor([[0.0, 400.0]], dtype=dtype, requires_grad=True)
    loss = softmax_loss(logits, [0])
    loss.backward()
    assert loss.item() == 400
    assert logits.grad.tolist() == [[-1, 1]]


def test_mistake_7_identical_rows_far_from_the_origin_are_0_apart() -> None:
    """`cdist` on its fast path puts identical unit rows 1e-3 apart, 1.0 apart at +100."""
    unit_rows = nn.functional.normalize(torch.randn(50, 64), dim=1)
    similar = torch.ones(50, dtype=torch.bool)
    for offset in (0.0, 100.0):
        x = unit_rows + offset
        for distance in ("euclidean", "sqeuclidean", "cosine"):
            how: dict[str, Any] = {"distance": distance, "reduction": "none"}
            assert not contrastive_loss(x, x.clone(), similar, **how).any()
        off_by_one = x.clone()
        off_by_one[:, 0] += 1
        one = contrastive_loss(x, off_by_one, similar, reduction="none")
        torch.testing.assert_close(one, torch.ones(50), rtol=1e-4, atol=0)


@dtypes
def test_mistake_8_a_zero_row_has_no_direction_and_no_gradient(dtype: torch.dtype) -> None:
    """An eps of 1e-12 in the normalisation gives it a gradient of 1e12."""
    zero, other = torch.zeros(2, 3, dtype=dtype), torch.eye(2, 3, dtype=dtype)
    y = torch.tensor([True, False])
    for loss in (
        lambda a, b: nearfar.cosine_similarity(a, b) + 1,
        lambda a, b: cosine_loss(a, b, reduction="none"),
        lambda a, b: cosine_loss(a, b, y, margin=-1.0, reduction="none"),
        lambda a, b: contrastive_loss(a, b, y, margin=2.0, distance="cosine", reduction="none"),
        lambda a, b: triplet_loss(a, b, b.flip(0), distance="cosine", reduction="none"),
    ):
        value, (of_zero, of_other) = value_and_gradients(lambda x, f=loss: f(*x), (zero, other))
        assert value.tolist() == [1, 1]
        assert not of_zero.any()
        assert of_other.abs().max() < 10
    value, (of_zero, of_other) = value_and_gradients(
        lambda x: info_nce_loss(*x, reduction="none"), (zero, other)
    )
    assert value.tolist() == pytest.approx([math.log(2)] * 2)
    assert not of_zero.any()
    assert not of_other.any()


@dtypes
def test_mistake_8_a_nan_row_has_no_finite_loss(dtype: torch.dtype) -> None:
    bad = torch.tensor([[1.0, math.nan, 0.0]], dtype=dtype)
    fine = torch.eye(1, 3, dtype=dtype)
    assert cosine_loss(bad, fine).isnan()
    assert cosine_loss(fine, bad, torch.tensor([False]), margin=1.0).isnan()
    assert contrastive_loss(bad, fine, torch.tensor([False]), margin=0.0).isnan()
    assert triplet_loss(fine, fine, bad, margin=0.0).isnan()
    assert info_nce_loss(fine, fine, bad).isnan()


def test_mistake_11_a_signed_difference_has_no_negative_length() -> None:
    """A signed difference raised to a power made the 1-norm of (-1, -1) equal to -2."""
    x1, x2 = torch.zeros(1, 2), torch.ones(1, 2)
    far = {"euclidean": math.sqrt(2), "sqeuclidean": 2.0}
    for distance, length in far.items():
        for a, b in ((x1, x2), (x2, x1)):
            how: dict[str, Any] = {"distance": distance, "margin": 0.0}
            loss = contrastive_loss(a, b, torch.tensor([True]), **how)
            assert loss.item() == pytest.approx(length**2)
            assert triplet_loss(a, b, a, **how).item() == pytest.approx(length)


def test_mistake_11_every_hyperparameter_does_what_it_says() -> None:
    """Each moves the loss, by as much as its definition says and in that direction."""
    anchor, positive = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 0.0]])
    negative, negative2 = torch.tensor([[0.0, 4.0]]), torch.tensor([[0.0, 5.0]])
    quadruple = (anchor, positive, negative, negative2)
    # d(a, p) = 3, d(a, n) = 4, d(p, n) = 5, d(n, n2) = 1
    assert triplet_loss(*quadruple[:3], margin=2.5).item() == 1.5
    assert triplet_loss(negative, anchor, positive, margin=2.5).item() == 1.5
    assert triplet_loss(negative, anchor, positive, margin=2.5, swap=True).item() == 3.5
    squares = triplet_loss(*quadruple[:3], margin=8.0, distance="sqeuclidean")
    assert squares.item() == 1.0
    soft = triplet_loss(*quadruple[:3], margin=1.0, smooth=True)
    assert soft.item() == pytest.approx(math.log(2))
    assert quadruplet_loss(*quadruple, margin=0.0, margin2=0.0).item() == 2.0
    assert quadruplet_loss(*quadruple, margin=2.0, margin2=0.0).item() == 3.0
    assert quadruplet_loss(*quadruple, margin=0.0, margin2=0.5).item() == 2.5
    different = torch.tensor([False])
    for margin, cost in ((2.0, 0.0), (3.0, 0.0), (5.0, 4.0)):
        assert contrastive_loss(anchor, positive, different, margin=margin).item() == cost
    for margin, cost in ((-1.0, 1.0), (0.0, 0.0), (0.5, 0.0)):
        assert cosine_loss(positive, negative, different, margin=margin).item() == cost
    unit = torch.eye(2)
    for temperature in (0.1, 0.5, 2.0):
        found = info_nce_loss(unit, unit, temperature=temperature).item()
        assert found == pytest.approx(math.log1p(math.exp(-1 / temperature)))
    twice = info_nce_loss(2 * unit, 2 * unit, temperature=1.0, normalize=False).item()
    assert twice == pytest.approx(math.log1p(math.exp(-4)))
    smoothed = softmax_loss(torch.tensor([[0.0, 2.0]]), [1], label_smoothing=0.4).item()
    assert smoothed == pytest.approx(math.log1p(math.exp(-2)) + 0.2 * 2)
