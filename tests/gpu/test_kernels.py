"""The kernels in Triton's interpreter: every loss as in plain torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from batch_cases import CASES, LAYOUTS, Case, Data, gradients, near, over
from interpreted import kernels, taken
from torch import Tensor

import nearfar as nf
from nearfar.engine.where import running_kernels

pytestmark = pytest.mark.usefixtures("kernels")
N, D = 37, 20


def plain(loss: Callable[[Data], Tensor], data: Data) -> tuple[Tensor, dict[str, Tensor]]:
    """In float64, which no kernel takes."""
    return gradients(loss, data.to(torch.float64))


def other_distance(case: Case) -> bool:
    """Whether it compares rows by a distance that is no product."""
    known = (None, "euclidean", "sqeuclidean", "cosine")
    return case.hyper.get("distance") not in known


@pytest.mark.parametrize("reduction", ["mean", "none"])
@over(CASES)
def test_as_in_plain_torch(case: Case, reduction: str, taken: list[bool]) -> None:
    data = case.draw(N, D, seed=3, dtype=torch.float32)

    def loss(d: Data) -> Tensor:
        return case.run(d, reduction)

    found = gradients(loss, data)
    if taken:
        assert all(taken) != (case.sub_centers > 0 or other_distance(case))
    near(found, plain(loss, data), 3e-5, 1e-6)


SETTINGS = [c for c in CASES if not c.multi and not c.weighted and not c.learned][::2]


@pytest.mark.parametrize("layout", LAYOUTS)
@over(SETTINGS)
def test_labels_of_every_layout(case: Case, layout: str) -> None:
    data = case.draw(20, D, dtype=torch.float32, layout=layout)
    near(gradients(case.run, data), plain(case.run, data), 3e-5, 1e-6)


@pytest.mark.parametrize("reduction", ["sum", "active", (0.05, 1.5)])
@over(SETTINGS)
def test_reductions(case: Case, reduction: Any) -> None:
    data = case.draw(20, D, seed=1, dtype=torch.float32)

    def loss(d: Data) -> Tensor:
        return case.run(d, reduction)

    near(gradients(loss, data), plain(loss, data), 3e-5, 1e-6)


@pytest.mark.parametrize("n", [0, 1, 2])
@over(SETTINGS)
def test_few_rows(case: Case, n: int) -> None:
    data = case.draw(n, 3, dtype=torch.float32)
    near(gradients(case.run, data), plain(case.run, data), 3e-5, 1e-6)


@pytest.mark.parametrize("d", [1, 3, 100, 300])
@pytest.mark.parametrize("name", ["clip-20", "sup_con-default", "batch_contrastive-default"])
def test_widths(name: str, d: int) -> None:
    """Rows of any length: padded to the width of a tile, or in several chunks."""
    case = next(c for c in CASES if c.name == name)
    data = case.draw(20, d, dtype=torch.float32)
    near(gradients(case.run, data), plain(case.run, data), 3e-5, 1e-6)


@pytest.mark.parametrize("apart", [1e-3, 1e-5, 0.0])
@pytest.mark.parametrize("d", [8, 150])
@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine"])
def test_near_rows_keep_their_distance(distance: Any, d: int, apart: float) -> None:
    """Digits that cancel in products are taken from the rows themselves."""
    chance = torch.Generator().manual_seed(0)
    base = 3 + torch.randn(1, d, generator=chance)
    x = torch.cat([base + apart * torch.randn(20, d, generator=chance), torch.randn(9, d)])
    labels = torch.arange(29) % 7

    def loss(given: Data) -> Tensor:
        return nf.batch_contrastive_loss(
            given.rows["x"], labels, margin=0.5, distance=distance, reduction="none"
        )

    data = Data({"x": x}, {})
    near(gradients(loss, data), plain(loss, data), 1e-4, 1e-6)


@pytest.mark.parametrize("size", [1e-25, 1e-6, 1e6, 1e18, 1e30])
@over([c for c in SETTINGS if c.kind == "batch"])
def test_rows_of_any_size(case: Case, size: float) -> None:
    """Finite where plain torch is."""
    data = case.draw(20, D, dtype=torch.float32).each(lambda x: x * size)
    value, found = gradients(case.run, data)
    with running_kernels(everywhere=False):
        expected, forces = gradients(case.run, data)
    assert torch.equal(value.isfinite(), expected.isfinite())
    for name, g in found.items():
        assert torch.equal(g.isfinite(), forces[name].isfinite())


@over(SETTINGS)
def test_a_row_that_is_not_finite_is_not_hidden(case: Case) -> None:
    data = case.draw(20, D, dtype=torch.float32)
    name = next(iter(data.rows))
    for bad in (torch.nan, torch.inf):
        broken = data.rows[name].clone()
        broken[2, 1] = bad
        assert case.run(data.at(**{name: broken}), "mean").isnan()


@over(SETTINGS)
def test_the_same_bits(case: Case) -> None:
    data = case.draw(N, D, dtype=torch.float32)
    first, again = gradients(case.run, data), gradients(case.run, data)
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(g, again[1][name]) for name, g in first[1].items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@over(SETTINGS)
def test_low_precision(case: Case, dtype: torch.dtype) -> None:
    """Operands of 16 bits: within the rounding of the rows and of the forces."""
    if other_distance(case):
        pytest.skip("no product")
    name = str(dtype).removeprefix("torch.")
    data = case.draw(N, D, dtype=torch.float32)

    def loss(d: Data) -> Tensor:
        return case.run(d, "mean", precision=name if d is not exact else None)

    exact = data.to(torch.float64)
    found, true = gradients(loss, data), gradients(lambda d: case.run(d, "mean"), exact)
    error = torch.finfo(dtype).eps
    for k, g in found[1].items():
        size = true[1][k].norm().clamp(min=1e-9)
        assert (g - true[1][k]).norm() <= 60 * error * size, k


@pytest.mark.parametrize(("d", "by_kernels"), [(512, True), (513, False)])
def test_distances_of_long_rows_run_in_plain_torch(
    d: int,
    by_kernels: bool,
    taken: list[bool],
) -> None:
    x = torch.randn(4, d)
    nf.batch_contrastive_loss(x, [0, 0, 1, 1], margin=1.0)
    nf.sup_con_loss(x, [0, 0, 1, 1])
    assert taken == [by_kernels, True]


def test_a_term_of_your_own() -> None:
    """Whose numbers are none, one or several."""
    x, labels = torch.randn(12, 5), torch.arange(12) // 3
    for numbers in ((), (0.7,), (0.7, 0.1)):
        kernel = nf.PairKernel(own_term, own_term, numbers)
        rule = nf.PairRule(lambda d: d * d, lambda d: d * d, kernel=kernel)

        def loss(data: Data, rule: nf.PairRule = rule) -> Tensor:
            return nf.batch_loss(rule, data.rows["x"], labels, distance="euclidean")

        data = Data({"x": x}, {})
        near(gradients(loss, data), plain(loss, data), 3e-5, 1e-6)


def own_term(d: Any, numbers: Any) -> Any:
    return d * d, 2 * d


def test_small_forces_survive_in_float16() -> None:
    """Forces of one anchor far below the smallest float16, beside others."""
    chance = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, D, generator=chance), torch.randn(6, D, generator=chance)
    labels, weight = torch.arange(20) % 6, torch.full((20,), 1e-9)
    weight[0] = 1

    def loss(data: Data, precision: Any = None) -> Tensor:
        rows = data.rows["x"]
        return nf.proxy_softmax_loss(
            rows, y.to(rows), labels, scale=8.0, weight=weight, reduction="sum", precision=precision
        )

    data = Data({"x": x}, {})
    _, found = gradients(lambda d: loss(d, "float16"), data)
    _, true = plain(loss, data)
    small, expected = found["x"][1:].double(), true["x"][1:]
    assert (small - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean"])
def test_rows_whose_squares_are_not_finite(distance: Any) -> None:
    """They are scaled down by a power of two, and the distance and gradient are right."""
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(0)) * 1e21
    labels = torch.arange(20) % 6

    def loss(data: Data) -> Tensor:
        # So small a loss that float32 holds the sum of all.
        rule = nf.PairRule(lambda d: d * 1e-6, lambda d: d * 1e-6, kernel=SMALL)
        return nf.batch_loss(rule, data.rows["x"], labels, distance=distance, reduction="sum")

    data = Data({"x": x if distance == "euclidean" else x * 1e-3}, {})
    near(gradients(loss, data), plain(loss, data), 3e-5, 1e-6)


def millionth(d: Any, numbers: Any) -> Any:
    return d * numbers[0], 0 * d + numbers[0]


SMALL = nf.PairKernel(millionth, millionth, (1e-6,))


def test_more_labels_than_a_word_holds() -> None:
    """Each pair shares one of 70 labels, among them the last and the first of a word."""
    labels = torch.zeros(10, 70, dtype=torch.bool)
    for pair, label in enumerate((0, 31, 32, 63, 69)):
        labels[2 * pair : 2 * pair + 2, label] = True
    x = torch.randn(10, D, generator=torch.Generator().manual_seed(0))

    def loss(data: Data) -> Tensor:
        return nf.sup_con_loss(data.rows["x"], labels, reduction="none")

    data = Data({"x": x}, {})
    near(gradients(loss, data), plain(loss, data), 3e-5, 1e-6)
    assert (loss(data) > 0).all()


@over(SETTINGS[::3])
def test_upstream_weights_that_are_one_number_in_memory(case: Case) -> None:
    """As those of a sum are."""
    data = case.draw(20, D, dtype=torch.float32)
    found = gradients(lambda d: case.run(d, "none").sum(), data)
    near(found, gradients(lambda d: case.run(d, "sum"), data), 1e-5, 1e-6)
