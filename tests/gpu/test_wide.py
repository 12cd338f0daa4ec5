"""Inner products of wide rows in Triton's interpreter: every loss as in plain torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from batch_cases import CASES, Case, Data, gradients, near, over
from interpreted import kernels
from torch import Tensor
from waits import accelerator, there

import nearfar as nf
from nearfar.engine.budget import tile_shape
from nearfar.engine.where import running_kernels

pytestmark = pytest.mark.usefixtures("kernels")
N, D = 37, 300
FAMILIES = (
    "clip siglip info_nce nt_xent sup_con multi_similarity circle proxy_softmax proxy_nca "
    "proxy_anchor"
)
BY_PRODUCTS = [
    case
    for case in CASES
    if case.name.partition("-")[0] in FAMILIES.split() or case.name == "nca-inner_product-8.0"
    if not case.sub_centers
]
NAMED = {case.name: case for case in CASES}
FEW = [
    NAMED[name]
    for name in (
        "clip-20",
        "clip-weighted",
        "siglip-learned",
        "siglip-weighted",
        "info_nce-default",
        "sup_con-default",
        "sup_con-reference-self",
        "nt_xent-weighted",
        "multi_similarity-default",
        "circle-0.4-16.0",
        "proxy_softmax-learned",
    )
]


def plain(loss: Callable[[Data], Tensor], data: Data) -> tuple[Tensor, dict[str, Tensor]]:
    """In float64, which no kernel takes."""
    return gradients(loss, data.to(torch.float64))


def as_plain(case: Case, data: Data, reduction: Any = "none", rtol: float = 3e-5) -> None:
    def loss(d: Data) -> Tensor:
        return case.run(d, reduction)

    near(gradients(loss, data), plain(loss, data), rtol, 1e-6)


@over(BY_PRODUCTS)
def test_as_in_plain_torch(case: Case) -> None:
    """Over several strips, of several tiles each."""
    with tile_shape(16, 64):
        as_plain(case, case.draw(N, D, seed=3, dtype=torch.float32))


@pytest.mark.parametrize("reduction", ["mean", "sum", "active", (0.05, 1.5)])
@over(FEW)
def test_reductions(case: Case, reduction: Any) -> None:
    as_plain(case, case.draw(20, D, seed=1, dtype=torch.float32), reduction)


@pytest.mark.parametrize("d", [1, 20, 256, 320, 513])
@pytest.mark.parametrize("name", ["clip-20", "clip-100", "sup_con-default", "nt_xent-default"])
def test_widths(name: str, d: int) -> None:
    """Rows are padded to 16 bytes, and the last block of numbers may be incomplete."""
    as_plain(NAMED[name], NAMED[name].draw(40, d, seed=2, dtype=torch.float32))


@pytest.mark.parametrize("n", [0, 1, 2])
@over(FEW)
def test_few_rows(case: Case, n: int) -> None:
    as_plain(case, case.draw(n, D, dtype=torch.float32))


@pytest.mark.parametrize("tile", [(16, 64), (64, 16), (128, 128)])
@pytest.mark.parametrize("name", ["clip-20", "info_nce-default", "sup_con-default"])
def test_tiles_of_any_shape(name: str, tile: tuple[int, int]) -> None:
    data = NAMED[name].draw(70, D, dtype=torch.float32)
    with tile_shape(*tile):
        as_plain(NAMED[name], data)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [14.0, 100.0])
def test_near_duplicates(scale: float, precision: Any) -> None:
    """Exponents within rounding of each other, and others far away, in one tile."""
    chance = torch.Generator().manual_seed(0)
    centre = torch.randn(9, D, generator=chance).repeat_interleave(5, 0)
    x, y = (centre + 1e-2 * torch.randn(45, D, generator=chance) for _ in range(2))
    given = Data({"x": x, "y": y}, {})

    def loss(d: Data) -> Tensor:
        return nf.clip_loss(**d.rows, scale=scale, reduction="none")

    with nf.precision(precision):
        found = gradients(loss, given)
        with running_kernels(everywhere=False):
            expected = gradients(loss, given)
    near(found, expected, 3e-5 if precision == "float32" else 3e-2, 1e-6)


@pytest.mark.parametrize("size", [1e-3, 1.0, 20.0])
@over([NAMED[name] for name in ("clip-raw", "info_nce-raw", "sup_con-2.0-False")])
def test_rows_of_unequal_length(case: Case, size: float) -> None:
    """Exponents so far apart that no exponential serves both ends of a pair."""
    data = case.draw(N, D, dtype=torch.float32)
    long = torch.logspace(-1, 0.5, N, dtype=torch.float64) * size / D**0.5
    as_plain(case, data.each(lambda x: (x * long[:, None]).to(torch.float32)), rtol=1e-4)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
@over(BY_PRODUCTS[::2])
def test_low_precision(case: Case, precision: Any) -> None:
    """The loss is that of the rounded rows; the gradient within the rounding of the forces."""
    data = case.draw(N, D, seed=5, dtype=torch.float32)

    def loss(d: Data) -> Tensor:
        return case.run(d, "mean", precision=precision)

    with tile_shape(16, 64):
        value, found = gradients(loss, data)
    with running_kernels(everywhere=False):
        expected, forces = gradients(loss, data)
    torch.testing.assert_close(value, expected, rtol=2e-5, atol=1e-6)
    error = {"tf32": 2**-10, "bfloat16": 2**-8, "float16": 2**-10}[precision]
    for name, g in forces.items():
        assert (found[name] - g).norm() <= 3 * error * g.norm().clamp(min=1e-9), name


def test_small_forces_survive_in_float16() -> None:
    """Those of an easy batch, which are below the smallest float16."""
    x = torch.eye(40, D)
    found = []
    for everywhere in (True, False):
        leaf = x.clone().requires_grad_()
        with running_kernels(everywhere=everywhere):
            nf.clip_loss(leaf, x.flip(1).flip(1) + 0.01, scale=20.0, precision="float16").backward()
        assert leaf.grad is not None
        found.append(leaf.grad)
    assert 0 < found[1].abs().max() < 1e-7
    assert (found[0] - found[1]).norm() < 2**-9 * found[1].norm()


@over(FEW)
def test_a_row_that_is_not_finite_is_not_hidden(case: Case) -> None:
    data = case.draw(20, D, dtype=torch.float32)
    name = next(iter(data.rows))
    for bad in (torch.nan, torch.inf):
        broken = data.rows[name].clone()
        broken[2, 1] = bad
        for precision in ("float32", "bfloat16"):
            value = case.run(data.at(**{name: broken}), "mean", precision=precision)
            assert value.isnan()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@over(FEW)
def test_the_same_bits(case: Case, precision: Any) -> None:
    data = case.draw(20, D, dtype=torch.float32)
    with nf.precision(precision):
        first, again = gradients(case.run, data), gradients(case.run, data)
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(g, again[1][name]) for name, g in first[1].items())


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@over([c for c in FEW if "sup_con" not in c.name] + [NAMED["sup_con-decoupled-reference"]])
def test_a_step_reads_nothing_on_the_host(
    case: Case, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a CUDA graph can capture it. No kernel runs: tensors of the meta device are empty."""
    from nearfar.engine.gpu import comparison

    monkeypatch.setattr(comparison, "launch", lambda *given: None)
    data = case.draw(40, D, dtype=torch.float32)
    rows = {name: there(x, learned=True) for name, x in data.rows.items()}
    others = {name: there(x) for name, x in data.others.items()}
    with accelerator():
        case.run(Data(rows, others), "mean", precision=precision).backward()
    assert all(x.grad is not None for x in rows.values())


@pytest.mark.parametrize(
    ("name", "d", "precision", "expected"),
    [
        ("clip-20", 20, "float32", "tiles"),
        ("clip-20", D, "bfloat16", "tiles"),
        ("sup_con-default", D, "float16", "tiles"),
        ("sup_con-default", D, "float32", "strips"),
        ("nt_xent-default", D, "bfloat16", "strips"),
        ("circle-default", D, "tf32", "strips"),
        ("sup_con-default", 256, "bfloat16", "row owners"),
        ("nca-default", D, "bfloat16", "row owners"),
    ],
)
def test_which_kernels(
    name: str, d: int, precision: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nearfar.engine.gpu import log_sums

    seen, usual = [], log_sums._structure

    def watched(*given: Any, **more: Any) -> str:
        seen.append(usual(*given, **more))
        return seen[-1]

    monkeypatch.setattr(log_sums, "_structure", watched)
    NAMED[name].run(NAMED[name].draw(4, d, dtype=torch.float32), "mean", precision=precision)
    assert seen == [expected]
