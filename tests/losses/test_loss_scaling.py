"""Rows in float16 under a loss scaler: what does not fit is infinite, all else is exact."""

from collections.abc import Callable
from functools import partial
from typing import Any

import batch_cases
import cases
import pytest
import textbook
import torch
from batch_cases import Data
from test_batch_tuples import Settings, over_losses
from torch import Tensor, nn

import nearfar

LARGEST = torch.finfo(torch.float16).max


def assert_overflow_is_infinite(loss: Callable[..., Tensor], rows: list[Tensor]) -> None:
    """Scaled until the largest entry of the gradient leaves float16: the wide gradient, rounded."""

    def gradients(dtype: torch.dtype, by: float) -> tuple[Tensor, ...]:
        leaves = [a.to(dtype).requires_grad_() for a in rows]
        return torch.autograd.grad(by * loss(*leaves).sum(), leaves, materialize_grads=True)

    largest = max(float(g.abs().amax()) for g in gradients(torch.float32, 1.0))
    scale = 2.0 ** round(torch.tensor(4 * LARGEST / largest).log2().item())
    wide = gradients(torch.float32, scale)
    found = gradients(torch.float16, scale)
    assert any(g.isinf().any() for g in found)
    for g, expected in zip(found, wide, strict=True):
        assert torch.equal(g, expected.half())


@pytest.mark.parametrize("reduction", ["none", "mean"])
@cases.over(cases.CASES)
def test_aligned_losses(case: cases.Case, reduction: str) -> None:
    x, labels = case.draw(6, 5, dtype=torch.float16)
    if "margin" in case.takes and not case.distances:
        x = tuple(a / 2 for a in x)  # so that some hinge is non-zero
    assert_overflow_is_infinite(lambda *a: case.run(a, labels, reduction), list(x))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@batch_cases.over(batch_cases.CASES)
def test_whole_batch_losses(case: batch_cases.Case, reduction: str) -> None:
    data = case.draw(9, dtype=torch.float16)
    names = [name for name, a in data.rows.items() if a.ndim]

    def loss(*rows: Tensor) -> Tensor:
        return case.run(data.at(**dict(zip(names, rows, strict=True))), reduction)

    assert_overflow_is_infinite(loss, [data.rows[name] for name in names])


@pytest.mark.parametrize("reduction", ["none", "mean"])
@over_losses
def test_losses_of_tuples(loss: Callable[..., Tensor], how: Settings, reduction: str) -> None:
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).half()

    def run(rows: Tensor) -> Tensor:
        torch.manual_seed(0)
        return loss(rows, torch.arange(12) % 4, reduction=reduction, **how)

    assert_overflow_is_infinite(run, [x])


def train(loss: Callable[..., Tensor]) -> tuple[list[int], list[Tensor]]:
    """Which of 60 steps the scaler skipped, and the gradients of the others, unscaled."""
    torch.manual_seed(0)
    layer, x, labels = nn.Linear(8, 32), torch.randn(48, 8), torch.arange(48) // 2
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", growth_interval=1)
    skipped, gradients = [], []
    for step in range(60):
        optimizer.zero_grad()
        scaler.scale(loss((0.05 * layer(x)).half(), labels)).backward()
        scaler.unscale_(optimizer)
        gradients.append(layer.weight.grad.clone())
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < before:
            skipped.append(step)
            del gradients[-1]
    return skipped, gradients


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_scaler_skips_the_steps_it_should(reduction: Any) -> None:
    """Saturated gradients look like any others: it skipped none, and its scale went to 1e22."""
    skipped, gradients = train(
        lambda x, labels: textbook.sup_con_loss(x.float(), labels, temperature=0.01)
    )
    loss = partial(nearfar.sup_con_loss, temperature=0.01, reduction=reduction)
    found, ours = train(lambda x, labels: loss(x, labels).mean())
    assert found == skipped
    assert len(skipped) > 10
    for g, expected in zip(ours, gradients, strict=True):
        torch.testing.assert_close(g, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: nearfar.clip_loss(x, x, scale=3.0),
        lambda x: nearfar.clip_loss(x, x, scale=3.0, reduction="none").sum(),
        lambda x: nearfar.sup_con_loss(
            x, range(9), reference=nearfar.Reference(x, [*range(1, 9), 0], own=range(9))
        ),
        lambda x: nearfar.proxy_nca_loss(x, x, [*range(1, 9), 0]),
        lambda x: nearfar.triplet_loss(x, x, torch.ones(9, 5).to(x), margin=4.0),
        lambda x: nearfar.info_nce_loss(x, x, torch.eye(5).to(x), temperature=0.5),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_a_tensor_passed_twice_add_up_before_they_are_rounded(
    loss: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    low, wide = x.clone().requires_grad_(), x.float().requires_grad_()
    loss(low).backward()
    loss(wide).backward()
    # To a step of the dtype: where the two cancel, the sum of rounded ones is off by many.
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(low.grad.float(), wide.grad, rtol=0.51 * step, atol=1e-7)


def test_a_learned_number_overflows_too() -> None:
    x, scale = torch.randn(6, 4), torch.tensor(2.0, dtype=torch.float16, requires_grad=True)
    data = Data({"x": x, "y": x.flip(0)}, {})
    (2.0**30 * nearfar.clip_loss(**data.rows, scale=scale)).backward()
    assert scale.grad.isinf()
