"""The eight points of the numbers contract, for every whole-batch loss of the table."""

import math
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from batch_cases import (
    CASES,
    DTYPES,
    IN_BATCH,
    LOW,
    PLAIN,
    Case,
    Data,
    assert_finite_gradients,
    gradients,
    over,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nearfar
from nearfar.engine.budget import tile_shape
from nearfar.losses.terms import softplus_and_slope


def smallest(dtype: torch.dtype) -> float:
    """The smallest denormal number."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


# From standard normal rows to what is hard about them.
EXTREMES: dict[str, Callable[[Tensor], Tensor]] = {
    "identical": lambda a: torch.full_like(a, 0.7),
    "two places": lambda a: torch.where(a[..., :1] > 0, 0.7, -0.7).expand_as(a).to(a.dtype),
    "zero": torch.zeros_like,
    "one row zero": lambda a: torch.cat([torch.zeros_like(a[:1]), a[1:]]),
    "size 1e4": lambda a: a * 1e4,
    "size 1e-30": lambda a: a * 1e-30,
    "denormal": lambda a: a.sign() * smallest(a.dtype),
    "one column of 1e4": lambda a: torch.cat([a[..., :1] * 1e4, a[..., 1:]], -1),
    "collinear": lambda a: a[..., :1].expand_as(a).contiguous(),
}


def assert_finite(
    case: Case, data: Data, reductions: tuple[str, ...] = ("none", "mean"), **more: Any
) -> None:
    for reduction in reductions:
        assert_finite_gradients(partial(case.run, reduction=reduction, **more), data)


@pytest.mark.parametrize("extreme", EXTREMES)
@over(CASES)
def test_finite_in_finite_out(case: Case, extreme: str) -> None:
    """Point 1; the numbers a loss learns get a finite gradient too."""
    for dtype, reduction in zip(DTYPES, ("none", "mean") * 2, strict=True):
        hard = case.draw(6, 5, dtype=dtype).each(EXTREMES[extreme])
        assert all(a.isfinite().all() for a in hard.rows.values())
        assert_finite(case, hard, (reduction,))


@over(CASES)
def test_finite_in_tiles(case: Case) -> None:
    """Including tiles that hold no positive, or only the row itself."""
    for extreme in ("one row zero", "size 1e4", "identical"):
        hard = case.draw(4, 5, dtype=torch.float32).each(EXTREMES[extreme])
        with tile_shape(1, 2):
            assert_finite(case, hard, ("mean",))


@over([case for case in CASES if case.normalizes])
def test_mistake_8_a_zero_row_has_no_direction_to_change(case: Case) -> None:
    """An eps of 1e-12 in the normalisation gives it a gradient of 1e12."""
    data = case.draw(4, 5).each(EXTREMES["one row zero"])
    _, found = gradients(partial(case.run, reduction="mean"), data)
    for name, gradient in found.items():
        if gradient.ndim == 2:
            assert not gradient[0].any(), name


SHARP: dict[str, float] = {"temperature": 0.001, "scale": 1000.0}


@pytest.mark.parametrize("extreme", ["as is", "identical", "zero", "size 1e4", "one row zero"])
@over([case for case in CASES if case.takes & SHARP.keys()])
def test_finite_at_temperature_0_001(case: Case, extreme: str) -> None:
    (name,) = case.takes & SHARP.keys()
    for dtype, reduction in zip(DTYPES, ("none", "mean") * 2, strict=True):
        hard = case.draw(6, 5, dtype=dtype).each(EXTREMES.get(extreme, lambda a: a))
        if name in case.learned:
            assert_finite(case, hard.at(**{name: torch.tensor(SHARP[name])}), (reduction,))
        else:
            assert_finite(case, hard, (reduction,), **{name: SHARP[name]})


@pytest.mark.parametrize("size", [1e25, 1e-12])
@over([case for case in PLAIN if case.normalizes])
def test_rows_whose_squares_leave_float32_keep_their_direction(case: Case, size: float) -> None:
    """The value of the same rows in float64, and the gradient, which is smaller by the length."""
    data = case.draw(5, dtype=torch.float32).each(lambda a: a * size)
    value, found = gradients(partial(case.run, reduction="mean"), data)
    true, expected = gradients(partial(case.run, reduction="mean"), data.to(torch.float64))
    torch.testing.assert_close(value.double(), true, rtol=1e-4, atol=1e-6)
    for name, gradient in found.items():
        off = (gradient.double() - expected[name]).norm()
        assert off <= 1e-3 * expected[name].norm(), name


DISTANCES: dict[str, Callable[..., Tensor]] = {
    "lifted structure": nearfar.lifted_structure_loss,
    "contrastive": partial(nearfar.batch_contrastive_loss, margin=1e24),
    "all triplets": partial(nearfar.batch_triplet_loss, margin=1.0),
    "smooth triplets": partial(nearfar.batch_triplet_loss, smooth=True),
    "quadruplets": nearfar.batch_quadruplet_loss,
}


@pytest.mark.parametrize("shape", [(12, 12), (5, 7)], ids=str)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", DISTANCES)
def test_distances_whose_squares_leave_float32(
    name: str, mixed: bool, shape: tuple[int, int]
) -> None:
    """Rows of size 1e25, some of them similar; "mixed" adds rows of size 1 in between."""
    chance = torch.Generator().manual_seed(3)
    x = torch.randn(12, 4, generator=chance)
    x[(torch.arange(12) % 3 != 0) | (not mixed)] *= 1e25
    x[5], x[9] = x[4], x[6] * 1.001
    labels = torch.arange(12) // 3

    def of(rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows.clone().requires_grad_()
        with tile_shape(*shape):
            loss = DISTANCES[name](rows, labels)
        (gradient,) = torch.autograd.grad(loss, rows)
        return loss.detach().double(), gradient.double()

    value, gradient = of(x)
    true, expected = of(x.double())
    if true < torch.finfo(torch.float32).max:
        torch.testing.assert_close(value, true, rtol=1e-4, atol=0.0)
    else:
        assert value == math.inf
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * expected.abs().max())


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@over([case for case in CASES if case.kind != "batch"])
def test_finite_where_dtypes_differ(case: Case, low: torch.dtype) -> None:
    """The gradient of tiny rows is beyond float16, and comes from a float32 result."""
    tiny = case.draw(5, dtype=low).each(lambda a: a.sign() * smallest(a.dtype))
    for name in (name for name, a in tiny.rows.items() if a.ndim):
        assert_finite(case, tiny.at(**{name: tiny.rows[name].float()}))


@pytest.mark.parametrize("layout", ["one class", "singletons", "one large, others alone"])
@over([case for case in CASES if case.kind != "towers" and not case.multi])
def test_labels_without_positives_or_negatives(case: Case, layout: str) -> None:
    for dtype, reduction in zip(DTYPES, ("none", "mean") * 2, strict=True):
        assert_finite(case, case.draw(5, dtype=dtype, layout=layout), (reduction,))


def assert_nothing(case: Case, data: Data) -> bool:
    """Exactly 0 with zero gradients, and still a graph, if the oracle finds nothing either."""
    true, true_gradients = gradients(case.truth, data)
    if true.any() or any(g.any() for g in true_gradients.values()):
        return False
    for dtype in DTYPES:
        leaves = {k: a.clone().requires_grad_() for k, a in data.to(dtype).rows.items()}
        for reduction in ("none", "mean", "sum"):
            loss = case.run(data.at(**leaves), reduction)
            assert loss.shape == (true.shape if reduction == "none" else ())
            assert not loss.any()
            loss.sum().backward()
        for leaf in leaves.values():
            assert leaf.grad is not None
            assert not leaf.grad.any()
    return True


@over(CASES)
def test_no_rows_and_single_rows_have_nothing_to_compare(case: Case) -> None:
    """Point 3."""
    assert assert_nothing(case, case.draw(0))
    alone = assert_nothing(case, case.draw(1))
    compares = case.reference or case.hard or case.kind == "proxies" or "siglip" in case.name
    assert alone or compares


@pytest.mark.parametrize("layout", ["one class", "singletons"])
@over([case for case in IN_BATCH if not case.multi and not case.weighted])
def test_anchors_without_positives_or_negatives_have_nothing_to_compare(
    case: Case, layout: str
) -> None:
    nothing = assert_nothing(case, case.draw(5, layout=layout))
    silent = {
        "one class": {"nt_xent", "nca", "circle", "lifted_structure", "lifted_pair"},
        "singletons": {"nt_xent", "sup_con", "nca", "circle", "lifted_structure", "lifted_pair"},
    }
    loss = case.name.partition("-")[0]
    if loss.startswith("batch") or case.reference or case.hyper.get("decoupled"):
        return  # a hinge may be 0 by itself, and a reference has other labels
    assert nothing == (loss in silent[layout]), (
        f"the loss is {'0' if nothing else 'not 0'} here: if its paper says so, change `silent`; "
        "if a hinge is 0 by chance, change the setting in CASES"
    )


@pytest.mark.parametrize(
    ("where", "layout"), [(0, "random"), (-1, "one class"), (-1, "singletons")]
)
@over(CASES)
def test_non_finite_in_nan_out(case: Case, where: int, layout: str) -> None:
    """Point 2: in the loss of every anchor compared with the bad row, and in no other.

    Also of one that has nothing to compare, whose loss would be 0 and its gradient NaN.
    """
    data = case.draw(4, seed=3, layout="random" if case.kind == "towers" else layout)
    for name, rows in data.rows.items():
        if not rows.ndim:
            continue
        spoiled = rows.clone()
        spoiled[where].view(-1)[-1:] = math.nan  # one entry of the row
        true = case.truth(data.at(**{name: spoiled})).isnan()
        meets = torch.full_like(true, True)
        if name == case.anchors:
            meets[:] = False
            meets[where] = True
        # Distances are taken from the centre of all rows, which a bad one takes along.
        centred = "distance" in case.takes and not case.normalizes
        for dtype, bad in product(DTYPES, (math.nan, math.inf, -math.inf)):
            spoiled[where].view(-1)[-1:] = bad
            given = data.to(dtype).at(**{name: spoiled.to(dtype)})
            found = case.run(given).isnan()
            assert torch.equal(found, meets | true) or (centred and found.all())
            assert case.run(given, "mean").isnan()
            assert case.run(given, "sum").isnan()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_weight_is_not_hidden(bad: float) -> None:
    for case in PLAIN:
        if "weight" in case.takes:
            data, more = case.draw(4, layout="pairs"), [1.0] * (case.outputs(4) - 2)
            assert case.run(data, "mean", weight=[1.0, bad, *more]).isnan()


@over([case for case in PLAIN if "weight" in case.takes])
def test_zero_weights_leave_nothing_to_compare(case: Case) -> None:
    data = case.draw(5)
    for reduction in ("none", "mean", "sum"):
        run = partial(case.run, reduction=reduction, weight=[0.0] * case.outputs(5))
        value, found = gradients(run, data)
        assert not value.any()
        assert not any(g.any() for g in found.values())


@pytest.mark.parametrize("dtype", LOW, ids=str)
@over(CASES)
def test_same_input_same_bits(case: Case, dtype: torch.dtype) -> None:
    """Point 6."""
    data = case.draw(33, 17, dtype=dtype)
    for reduction in ("none", "mean"):
        first, expected = gradients(partial(case.run, reduction=reduction), data)
        for _ in range(1 if reduction == "none" else 2):
            again, found = gradients(partial(case.run, reduction=reduction), data)
            assert torch.equal(again, first)
            assert all(torch.equal(found[k], expected[k]) for k in expected)


# Point 8: a constant on every coordinate. Coordinates are multiples of 2^-16, so that adding 100
# to them rounds nothing, and what the test sees is the library's error alone.

EUCLIDEAN = [
    case
    for case in IN_BATCH
    if "distance" in case.takes and case.hyper.get("distance", "euclidean") != "cosine"
]


def gridded(a: Tensor) -> Tensor:
    return (a * 2**16).round() / 2**16


def with_twins(case: Case, seed: int, *, apart: float) -> Data:
    """Rows, a third with a near-duplicate, some in their class and some in another."""
    data = case.draw(30, 16, seed).each(gridded)
    chance = torch.Generator().manual_seed(seed)
    for name, a in data.rows.items():
        step = torch.randn(10, 16, generator=chance, dtype=torch.float64)
        step = gridded(apart * step / step.norm(dim=1, keepdim=True))
        data = data.at(**{name: torch.cat([a[:-10], a[:10] + step])})
    if case.reference == "self":  # what is declared to be the same row must be
        own = data.others["reference_own"]
        reference = data.rows["reference"].clone()
        reference[own[own >= 0]] = data.rows["x"][own >= 0]
        data = data.at(reference=reference)
    return data


def relative(found: Tensor, true: Tensor) -> float:
    """The largest error of a row, relative to the largest entry of that row."""
    off, size = (found.double() - true).abs(), true.abs()
    if true.ndim == 2:
        off, size = off.amax(1), size.amax(1)
    return float((off / size.clamp(min=1e-3 * float(size.max()))).max())


@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-3])
@pytest.mark.parametrize("offset", [0.0, 100.0, -100.0])
@over(EUCLIDEAN)
def test_a_constant_on_every_coordinate_changes_nothing(
    case: Case, offset: float, apart: float
) -> None:
    data = with_twins(case, seed=1, apart=apart)
    shifted = data.each(lambda a: a + offset).to(torch.float32)
    assert all(torch.equal(shifted.rows[k].double() - offset, a) for k, a in data.rows.items())
    true, true_gradients = gradients(case.run, data)
    value, found = gradients(case.run, shifted)
    assert relative(value, true) < 1e-4
    for name, gradient in found.items():
        assert relative(gradient, true_gradients[name]) < 1e-4, name


@pytest.mark.parametrize("offset", [100.0, -100.0, 1e4])
def test_a_common_offset_brings_no_pair_closer(offset: float) -> None:
    """Without centring, all pairs would need the repair that only near-duplicates should."""
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1] = x[0] + 1e-3
    measure = nearfar.engine.closeness.Euclidean(squared=False)
    for rows, columns in ((x, None), (x, x.flip(0))):
        shifted = (None if t is None else t + offset for t in (rows, columns))
        a, b = measure.prepare(*shifted)
        _, close = measure.measure(a, a if b is None else b)
        assert 2 <= len(close) <= 2 + len(x)


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4])
def test_mistake_7_identical_rows_are_0_apart(offset: float) -> None:
    """`cdist` on its fast path puts them 1e-3 apart, 1.0 apart at +100."""
    rows = torch.nn.functional.normalize(torch.randn(20, 64), dim=1)
    x = torch.cat([rows, rows]) + offset
    labels = torch.arange(20).repeat(2)
    for distance in ("euclidean", "sqeuclidean", "cosine"):
        leaf = x.clone().requires_grad_()
        loss = nearfar.batch_contrastive_loss(leaf, labels, margin=0.0, distance=distance)
        loss.backward()
        assert loss.item() == 0
        assert not leaf.grad.any()


@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3, 1e-4, 1e-6])
def test_near_duplicates_keep_their_distance(apart: float) -> None:
    """Pairs alone, so that no far pair's loss hides theirs: the value and each row's gradient."""
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(20, 32, generator=chance)
    step = torch.randn(20, 32, generator=chance)
    twins = torch.cat([x, x + apart * step / step.norm(dim=1, keepdim=True)])
    labels = torch.arange(20).repeat(2)
    for distance in ("euclidean", "sqeuclidean", "cosine"):
        # Scaled to unit length a row is rounded, and a distance with it: more, the shorter it is.
        rtol = max(1e-4, 4e-7 / apart) if distance == "cosine" else 1e-4
        if rtol > 0.01:
            continue
        how: dict[str, Any] = {"margin": 0.0, "distance": distance, "reduction": "none"}
        results = []
        for rows in (twins, twins.double()):
            leaf = rows.clone().requires_grad_()
            loss = nearfar.batch_contrastive_loss(leaf, labels, **how)
            loss.sum().backward()
            results.append((loss.detach(), leaf.grad))
        for found, true in zip(*results, strict=True):
            off = (found.double() - true).reshape(40, -1).norm(dim=1)
            assert (off <= rtol * true.reshape(40, -1).norm(dim=1)).all()


COSINES: dict[str, Callable[..., Tensor]] = {
    "contrastive": partial(nearfar.batch_contrastive_loss, distance="cosine", margin=1e-5),
    "cosine": nearfar.batch_cosine_loss,
    "triplets": partial(nearfar.batch_triplet_loss, distance="cosine", margin=0.0),
    "hard triplets": partial(
        nearfar.batch_triplet_loss, distance="cosine", margin=0.0, select="hard"
    ),
    "lifted structure": partial(nearfar.lifted_structure_loss, distance="cosine"),
}


@pytest.mark.parametrize("shape", [(4, 6), (300, 300)], ids=str)
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("name", COSINES)
def test_rows_of_nearly_the_same_direction(
    name: str,
    together: bool,
    reference: bool,
    shape: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All within a cosine distance of 1e-5, where 1 - cos keeps two digits: value and gradient.

    They are repaired one by one, or, as in a large batch that collapses, all together.
    """
    monkeypatch.setattr(nearfar.engine.closeness, "_MANY", 0 if together else 2**14)
    chance = torch.Generator().manual_seed(0)
    directions = torch.ones(16) + 3e-3 * torch.randn(24, 16, generator=chance)
    # Of lengths that are powers of two, scaling rounds the unit rows no more than they are.
    x = (
        torch.nn.functional.normalize(directions.double()).float()
        * 2.0 ** torch.arange(24)[:, None]
    )
    labels, others = torch.arange(24) % 8, {}

    def run(rows: Tensor) -> tuple[Tensor, Tensor]:
        leaf = rows.clone().requires_grad_()
        if reference:
            own = torch.arange(24).flip(0)
            others["reference"] = nearfar.Reference(rows.flip(0), labels.flip(0), own)
        with tile_shape(*shape):
            loss = COSINES[name](leaf, labels, **others)
        loss.backward()
        return loss.detach().double(), leaf.grad.double() * 2.0 ** torch.arange(24)[:, None]

    value, gradient = run(x)
    true, expected = run(x.double())
    torch.testing.assert_close(value, true, rtol=1e-3, atol=0)
    assert (gradient - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(8, 8), (300, 300)], ids=["small", "large"])
@pytest.mark.parametrize(("low", "high"), [(-80, -20), (-20, 0), (-9, 30), (-80, 80), (5, 80)])
def test_a_tile_of_sigmoids_keeps_its_digits(
    low: float, high: float, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """log(1 + e^z) and its slope, if all values, some of them, or none are at most 0."""
    z = torch.empty(shape, dtype=dtype).uniform_(
        low, high, generator=torch.Generator().manual_seed(0)
    )
    e = z.double().abs().neg().exp()
    series = e - e**2 / 2 + e**3 / 3  # exact where e is small
    loss = z.double().clamp(min=0) + torch.where(e < 1e-4, series, (1 + e).log())
    slope = torch.where(z > 0, 1, e) / (1 + e)
    for found, true in zip(softplus_and_slope(z), (loss, slope), strict=True):
        assert found.dtype == dtype
        assert ((found - true).abs() / true).amax() < max(8 * torch.finfo(dtype).eps, 1e-11)


@over(IN_BATCH)
def test_labels_may_change_before_the_backward_pass(case: Case) -> None:
    """A preallocated buffer that holds the next batch's labels by then."""
    data = case.draw(300, 6)
    if case.function is nearfar.batch_quadruplet_loss:
        data = case.draw(40, 6)
    found = []
    for change in (False, True):
        others = {name: value.clone() for name, value in data.others.items()}
        leaves = {k: v.clone().requires_grad_() for k, v in data.rows.items()}
        loss = case.run(type(data)(leaves, others), "none")
        if change:
            for value in others.values():
                value.copy_(value.flip(0))
        found.append(torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True))
    for kept, changed in zip(*found, strict=True):
        assert kept is None or torch.equal(kept, changed)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: nearfar.clip_loss(x, y, scale=5.0, reduction="none"),
        lambda x, y: nearfar.siglip_loss(y, x, scale=5.0, bias=-1.0, reduction="none"),
        lambda x, y: nearfar.sup_con_loss(
            x, range(9), reference=nearfar.Reference(y, range(9)), reduction="none"
        ),
        lambda x, y: nearfar.proxy_softmax_loss(x, y, range(9), reduction="none"),
    ],
)
def test_arrays_may_change_before_the_backward_pass(
    loss: Callable[[Tensor, np.ndarray[Any, Any]], Tensor],
) -> None:
    """Autograd does not notice changes of arrays."""
    x, y = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0)).unbind()
    found = []
    for change in (False, True):
        array = y.numpy().copy()
        leaf = x.clone().requires_grad_()
        value = loss(leaf, array).sum()
        if change:
            array[:] = 0.5
        value.backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("tile", [(8, 8), (96, 96)])
def test_sums_of_positives_may_leave_the_dtype_where_their_mean_does_not(
    tile: tuple[int, int],
) -> None:
    x = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))
    x, labels = 1e19 * torch.nn.functional.normalize(x), torch.arange(96) % 3
    for decoupled in (False, True):
        loss = partial(nearfar.sup_con_loss, normalize=False, temperature=1.0, decoupled=decoupled)
        with tile_shape(*tile):
            torch.testing.assert_close(loss(x, labels).double(), loss(x.double(), labels))


@pytest.mark.parametrize("size", [2.0**70, 2.0**-60])
@pytest.mark.parametrize("loss", [nearfar.batch_triplet_loss, nearfar.batch_quadruplet_loss])
@pytest.mark.parametrize("select", ["hard", "semihard", "easy_positive"])
def test_the_same_rows_are_picked_at_any_scale(
    loss: Callable[..., Tensor], select: str, size: float
) -> None:
    if loss is nearfar.batch_quadruplet_loss and select != "hard":
        pytest.skip("quadruplets know hard only")
    x = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(24) % 6
    how: dict[str, Any] = {"select": select, "margin": 0.0, "reduction": "none"}
    if loss is nearfar.batch_quadruplet_loss:
        how["margin2"] = 0.0
    expected, found = loss(x, labels, **how), loss(x * size, labels, **how) / size
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_learned_half_precision_number_is_used_as_float32(dtype: torch.dtype) -> None:
    x, labels = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) // 2
    for value in (1e-5, 0.07):
        given = torch.tensor(value, dtype=dtype, requires_grad=True)
        for run in (
            lambda t: nearfar.nt_xent_loss(x, labels, temperature=t),
            lambda t: nearfar.sup_con_loss(x, labels, temperature=t),
            lambda t: nearfar.info_nce_loss(x, x.flip(0), temperature=t),
            lambda t: nearfar.info_nce_loss(x, x.flip(0), x.roll(1, 0), temperature=t),
            lambda t: nearfar.proxy_nca_loss(x, x, torch.arange(8), scale=t),
        ):
            loss = run(given)
            assert loss.item() == pytest.approx(run(given.item()).item(), rel=1e-5)
            (gradient,) = torch.autograd.grad(loss, given)
            wide = given.detach().float().requires_grad_()
            (expected,) = torch.autograd.grad(run(wide), wide)
            assert gradient.dtype == dtype
            assert expected.isfinite()
            torch.testing.assert_close(gradient, expected.to(dtype))  # which may be infinite


def test_no_rows_against_more_columns_than_the_budget_holds() -> None:
    with nearfar.memory_budget(2**16):
        nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
        many = torch.randn(20_000, 4)
        assert nearfar.proxy_softmax_loss(nothing[0], many, nothing[1]) == 0
        reference = nearfar.Reference(many, torch.arange(20_000))
        assert nearfar.sup_con_loss(*nothing, reference=reference) == 0


def test_two_classes_hold_no_quadruplet_and_feel_no_force() -> None:
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = (torch.arange(64) > 30).long()
    with tile_shape(2, 3):  # in which a distance is not the same, to the bit, both ways
        loss = nearfar.batch_quadruplet_loss(x, labels)
        assert nearfar.quadruplet_stats(x, labels).valid == 0
    assert not torch.autograd.grad(loss, x)[0].any()


def test_a_mean_fits_where_its_sum_does_not() -> None:
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)) * 1e37
    labels = torch.arange(60) % 6
    for loss in (
        nearfar.lifted_structure_loss,
        partial(nearfar.batch_triplet_loss, select="hard"),
        partial(nearfar.batch_quadruplet_loss, select="hard"),
    ):
        true = loss(x.double(), labels).item()
        assert loss(x, labels).item() == pytest.approx(true, rel=1e-4)


@pytest.mark.parametrize("bias", [None, True, math.nan, -math.inf, "3", [1.0, 2.0]])
def test_a_bias_is_a_finite_number(bias: Any) -> None:
    with pytest.raises(ValueError, match="bias must be a finite number"):
        nearfar.siglip_loss(torch.eye(3), torch.eye(3), scale=1.0, bias=bias)


def test_a_hyperparameter_that_cannot_be_learned_is_not_a_tensor() -> None:
    """Its gradient would silently be None."""
    learned = torch.nn.Parameter(torch.tensor(4.0))
    x, labels = torch.eye(4), torch.arange(4) // 2
    for run in (
        lambda: nearfar.circle_loss(x, labels, scale=learned),
        lambda: nearfar.multi_similarity_loss(x, labels, alpha=learned),
        lambda: nearfar.multi_similarity_loss(x, labels, beta=learned),
        lambda: nearfar.proxy_anchor_loss(x, x, labels, scale=learned),
    ):
        with pytest.raises(TypeError, match="It is not learned here"):
            run()


@over(PLAIN)
def test_transforms_and_batched_gradients_raise_a_clear_error(case: Case) -> None:
    """Those of a scalar come out right, since its gradient is only multiplied."""
    data = case.draw(4)
    name = next(iter(data.rows))
    x = data.rows[name].requires_grad_()

    def of(rows: Tensor, reduction: str = "none") -> Tensor:
        return case.run(data.at(**{name: rows}), reduction)

    jacobian: Any = partial(torch.autograd.functional.jacobian, of, vectorize=True)
    each = torch.eye(case.outputs(4), dtype=torch.float64)
    for run in (
        lambda: torch.func.grad(partial(of, reduction="mean"))(x),
        lambda: torch.autograd.grad(of(x), x, each, is_grads_batched=True),
        lambda: jacobian(x),
    ):
        with pytest.raises(RuntimeError, match="one gradient at a time"):
            run()
    (once,) = torch.autograd.grad(of(x, "mean"), x)
    three = torch.tensor([1.0, 2, 3], dtype=torch.float64)
    (found,) = torch.autograd.grad(of(x, "mean"), x, three, is_grads_batched=True)
    torch.testing.assert_close(found, torch.stack([once, 2 * once, 3 * once]))


class _NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            # Chance is drawn on the CPU, whatever the device.
            if isinstance(tensor, Tensor) and tensor.ndim and "rand" not in str(func):
                assert tensor.dtype is not torch.float64, func
        return result


@pytest.fixture
def no_float64(monkeypatch: pytest.MonkeyPatch) -> _NoFloat64:
    """A device such as MPS, where `reduction.sum_dtype` says float32."""
    for module in list(sys.modules.values()):
        if module.__name__.startswith("nearfar.") and hasattr(module, "sum_dtype"):
            monkeypatch.setattr(module, "sum_dtype", lambda like: torch.float32)
    return _NoFloat64()


@over(PLAIN)
def test_a_device_without_float64_needs_none(case: Case, no_float64: _NoFloat64) -> None:
    data = case.draw(40, 6, dtype=torch.float32)
    leaves = {k: v.float().requires_grad_() for k, v in data.rows.items()}
    others = {k: v.float() if v.is_floating_point() else v for k, v in data.others.items()}
    with no_float64:
        case.run(type(data)(leaves, others), "mean").backward()


def test_drawing_negatives_needs_no_float64_either(no_float64: _NoFloat64) -> None:
    x, labels = torch.randn(12, 4, requires_grad=True), torch.arange(12) // 3
    with no_float64:
        nearfar.batch_triplet_loss(x, labels, select="distance_weighted").backward()
