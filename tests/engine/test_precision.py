"""Matrix products in lower precision: which one is used, what is rounded, and how far it is off."""

import math
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import pytest
import textbook
import torch
import torch.nn.functional as F  # noqa: N812
from batch_cases import CASES, Case, Data, gradients, near, over
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import nearfar as nf
from nearfar.engine import products
from nearfar.engine.budget import tile_shape
from nearfar.engine.precision import Precision, Rounding, chosen, rounded, rounded_forces
from nearfar.losses import info_nce

LOW: tuple[Precision, ...] = ("tf32", "bfloat16", "float16")
# The largest relative error of a rounded number: half of the last of its bits.
UNIT: dict[str, float] = {"tf32": 2**-11, "bfloat16": 2**-8, "float16": 2**-11}
each_low = pytest.mark.parametrize("precision", LOW)


def to(x: Tensor, precision: str) -> Tensor:
    """Rounded by way of float64, which holds the shares of a power of two exactly."""
    if precision != "tf32":
        return x.to(getattr(torch, precision)).to(x.dtype)
    share, exponent = x.double().frexp()
    return torch.ldexp((share * 2**11).round() / 2**11, exponent).to(x.dtype)  # halves to even


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


# -- rounding -------------------------------------------------------------------------------------


@each_low
def test_numbers_are_rounded_to_the_nearest_and_ties_to_even(precision: Precision) -> None:
    powers = torch.arange(-14, 15).float().exp2()
    steps = torch.arange(1, 2, 2**-13)  # every number of tf32 and float16, and their halves
    x = (powers[:, None] * steps).flatten()
    x = torch.cat([x, -x, draw(100, 100).flatten(), torch.zeros(2)])
    assert torch.equal(rounded(x, precision), to(x, precision))
    assert torch.equal(rounded(x.view(2, -1).T, precision), to(x, precision).view(2, -1).T)
    assert rounded(x, precision).data_ptr() != x.data_ptr()
    assert rounded(x, "float32") is x


@each_low
def test_what_is_no_number_stays_so(precision: Precision) -> None:
    nan = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32)
    assert rounded(nan.view(torch.float32), precision).isnan().all()
    x = torch.tensor([math.inf, -math.inf, torch.finfo(torch.float32).max])
    assert torch.equal(rounded(x, precision), torch.tensor([math.inf, -math.inf, math.inf]))


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1.0, 1e20])
def test_forces_keep_their_digits_in_float16_whatever_their_size(size: float) -> None:
    force = size * draw(9, 9) * 10 ** -(torch.rand(9, 9) ** 4)
    for fine, digits in ((False, 2**-11), (True, 2**-21)):
        found = rounded_forces(force, "float16", fine=fine)
        assert float(((found - force) / force).abs().max()) <= digits
    assert torch.equal(rounded_forces(torch.zeros(2, 2), "float16", fine=True), torch.zeros(2, 2))
    assert rounded_forces(torch.zeros(0, 2), "float16", fine=False).shape == (0, 2)


# -- which precision is used ----------------------------------------------------------------------

WHOLE = [name for name in nf.__all__ if name.endswith("_loss")]
TAKE = [name for name in WHOLE if "precision" in getattr(nf, name).__annotations__]


def test_every_loss_with_matrix_products_takes_a_precision() -> None:
    aligned = "contrastive_loss cosine_loss triplet_loss quadruplet_loss softmax_loss"
    assert set(WHOLE) - set(TAKE) == set(aligned.split())


@over(CASES)
def test_a_cpu_uses_float32_unless_asked(case: Case) -> None:
    """To the last bit, with or without autocast."""
    data = case.draw(15, dtype=torch.float32)

    def bits(**more: Any) -> list[Tensor]:
        value, found = gradients(lambda d: case.run(d, "mean", **more), data)
        return [value, *found.values()]

    usual = bits()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, usual, bits()))
    assert all(map(torch.equal, usual, bits(precision="float32")))


X, LABELS = draw(12, 6), torch.arange(12) % 4


def loss(**more: Any) -> float:
    return nf.sup_con_loss(X, LABELS, **more).item()


BY_PRECISION = {p: loss(precision=p) for p in ("float32", *LOW)}


def test_the_context_holds_for_its_block_and_the_argument_goes_first() -> None:
    assert len({*BY_PRECISION.values()}) >= 3
    with nf.precision("bfloat16"):
        assert loss() == BY_PRECISION["bfloat16"]
        with nf.precision("float16"):
            assert loss() == BY_PRECISION["float16"]
            assert loss(precision="float32") == BY_PRECISION["float32"]
        with nf.precision("float32"):
            assert loss() == BY_PRECISION["float32"]
        assert loss() == BY_PRECISION["bfloat16"]
    with pytest.raises(RuntimeError, match="left"), nf.precision("tf32"):
        raise RuntimeError("left")
    assert loss() == BY_PRECISION["float32"]


def test_the_context_is_that_of_its_thread() -> None:
    found = []
    with nf.precision("bfloat16"):
        thread = Thread(target=lambda: found.append(loss()))
        thread.start()
        thread.join()
    assert found == [BY_PRECISION["float32"]]


@pytest.mark.parametrize("name", TAKE)
def test_an_unknown_precision_is_refused_with_the_choices(name: str) -> None:
    function, proxies = getattr(nf, name), torch.eye(6)[:4]
    given: dict[str, Any] = {"scale": 2.0} if name in ("clip_loss", "siglip_loss") else {}
    given |= {"bias": 0.0} if name == "siglip_loss" else {}
    data: tuple[Any, ...] = (X, X) if given or name == "info_nce_loss" else (X, LABELS)
    data = (X, proxies, LABELS) if name.startswith("proxy") else data
    if name == "batch_loss":
        data, given = (lambda tile: tile.closeness.sum(1), *data), {"similarity": "cosine"}
    choices = "'float32', 'tf32', 'bfloat16', 'float16'; got 'half'"
    with pytest.raises(ValueError, match=f"precision must be one of {choices}"):
        function(*data, precision="half", **given)
    assert function(*data, precision="bfloat16", **given).isfinite()


def test_the_context_refuses_an_unknown_precision() -> None:
    with pytest.raises(ValueError, match=r"precision must be one of .*'tf32'.*; got 'fp8'"):
        nf.precision("fp8").__enter__()  # type: ignore[arg-type]


@each_low
def test_float64_is_never_rounded(precision: Precision) -> None:
    """By the argument it is an error; a context may be meant for other losses."""
    x = X.double()
    for rows, reference in ((x, None), (x, nf.Reference(X, LABELS)), (X, nf.Reference(x, LABELS))):
        asked = "cannot be used with float64 embeddings"
        with pytest.raises(ValueError, match=f"precision={precision!r} {asked}"):
            nf.nt_xent_loss(rows, LABELS, reference=reference, precision=precision)
        usual = nf.nt_xent_loss(rows, LABELS, reference=reference, precision="float32")
        with nf.precision(precision):
            assert torch.equal(nf.nt_xent_loss(rows, LABELS, reference=reference), usual)
    for rows, more in ((x, {"negatives": X}), (X, {"hard_negatives": x})):
        with pytest.raises(ValueError, match="cannot be used with float64"):
            nf.info_nce_loss(rows, X, precision=precision, **more)
        with nf.precision(precision):
            assert nf.info_nce_loss(rows, X, **more).dtype is torch.float64


@pytest.mark.parametrize("distance", ["snr", "manhattan", 3.0, lambda a, b: torch.cdist(a, b)])
def test_what_is_no_product_is_never_rounded(distance: Any) -> None:
    rule = nf.PairRule(torch.square, torch.zeros_like)

    def found(**more: Any) -> Tensor:
        return nf.batch_loss(rule, X, LABELS, distance=distance, **more)

    with pytest.raises(ValueError, match="not computed from matrix products: leave precision out"):
        found(precision="bfloat16")
    with nf.precision("bfloat16"):
        assert torch.equal(found(), found(precision="float32"))


@pytest.fixture
def matmul() -> Iterator[Any]:
    yield torch.backends.cuda.matmul
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        torch.backends.cuda.matmul.fp32_precision = "none"
    else:
        torch.backends.cuda.matmul.allow_tf32 = False


def on_gpu(rounding: Rounding, *dtypes: torch.dtype, asked: Precision | None = None) -> Precision:
    with FakeTensorMode():
        return chosen(asked, rounding, *(torch.empty(2, 3, dtype=t, device="cuda") for t in dtypes))


def test_an_accelerator_uses_what_torch_would(matmul: Any) -> None:
    half, single = torch.float16, torch.float32
    assert on_gpu("as torch", torch.bfloat16) == "bfloat16"
    assert on_gpu("as torch", half, half) == "float16"
    assert on_gpu("as torch", half, single) == on_gpu("as torch", single) == "float32"
    assert on_gpu("if asked", half) == on_gpu("never", half) == "float32"
    assert on_gpu("if asked", half, asked="tf32") == "tf32"
    matmul.allow_tf32 = True
    assert on_gpu("as torch", single) == "tf32"
    assert on_gpu("if asked", single) == on_gpu("as torch", torch.float64) == "float32"
    assert on_gpu("as torch", single, asked="float32") == "float32"
    with nf.precision("float16"):
        assert on_gpu("as torch", single) == on_gpu("if asked", single) == "float16"
        assert on_gpu("never", single) == on_gpu("as torch", torch.float64) == "float32"


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has no such name"
)
def test_the_newer_setting_of_tf32_is_read(matmul: Any) -> None:
    matmul.fp32_precision = "tf32"
    assert on_gpu("as torch", torch.float32) == "tf32"
    matmul.fp32_precision = "ieee"
    assert on_gpu("as torch", torch.float32) == "float32"


def test_autocast_goes_before_the_dtype_of_the_rows() -> None:
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        assert on_gpu("as torch", torch.float32) == on_gpu("as torch", torch.float16) == "bfloat16"
        assert on_gpu("as torch", torch.float64) == on_gpu("if asked", torch.float32) == "float32"
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def test_modules_keep_a_precision() -> None:
    module = nf.SupConLoss(precision="bfloat16")
    assert "precision='bfloat16'" in repr(module)
    assert module(X, LABELS).item() == BY_PRECISION["bfloat16"]
    with nf.precision("float16"):
        assert module(X, LABELS).item() == BY_PRECISION["bfloat16"]
        assert nf.SupConLoss()(X, LABELS).item() == BY_PRECISION["float16"]
    assert nf.forces(module, X, LABELS).loss == pytest.approx(BY_PRECISION["bfloat16"], rel=1e-6)


@pytest.mark.parametrize("later", [lambda run: run(), lambda run: in_thread(run)])
def test_a_loss_a_row_keeps_the_precision_of_its_call(later: Callable[..., None]) -> None:
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(
        nf.sup_con_loss(x, LABELS, precision="bfloat16", reduction="none").sum(), x
    )
    with nf.precision("bfloat16"):
        each = nf.sup_con_loss(x, LABELS, reduction="none")
    with nf.precision("float16"):
        later(each.sum().backward)
    assert x.grad is not None
    assert torch.equal(x.grad, expected)


def in_thread(run: Callable[[], None]) -> None:
    thread = Thread(target=run)
    thread.start()
    thread.join()


# -- what is rounded ------------------------------------------------------------------------------

# Where rows are compared as they are, and a scale has a root that is a power of two, rounded rows
# in float32 are compared by the same numbers as these rows in lower precision.
RAW = [
    case
    for case in CASES
    if not case.normalizes
    and not (case.learned or case.weighted)
    and case.hyper.get("distance", "euclidean") in ("euclidean", "sqeuclidean")
    and case.hyper.get("temperature", 1.0) in (1.0, 4.0, 0.25)
    and case.hyper.get("scale", 1.0) in (1.0, 4.0, 16.0)
]


def assert_of_rounded_rows(
    run: Callable[..., Tensor], data: Data, precision: Precision, tile: tuple[int, int]
) -> None:
    """The loss to the rounding of float32, the gradient to that of the forces."""
    with tile_shape(*tile):
        low = gradients(lambda d: run(d, precision=precision), data)
    rows = data.each(lambda a: to(a, precision))
    single = gradients(lambda d: run(d, precision="float32"), rows)
    torch.testing.assert_close(low[0], single[0], rtol=2e-5, atol=2e-5)
    near((low[0], low[1]), (low[0], single[1]), 4 * UNIT[precision])


@each_low
@pytest.mark.parametrize("tile", [(64, 64), (5, 4)])
@over(RAW)
def test_the_loss_is_that_of_the_rounded_rows(
    case: Case, tile: tuple[int, int], precision: Precision
) -> None:
    data = case.draw(23, 6, dtype=torch.float32)
    assert_of_rounded_rows(lambda d, **p: case.run(d, "mean", **p), data, precision, tile)


TUPLES: dict[str, Any] = {
    **{f"triplet-{s}": {"select": s} for s in ("all", "hard", "semihard", "easy_positive")},
    "triplet-swap": {"swap": True},
    "triplet-smooth": {"smooth": True},
    "triplet-sqeuclidean": {"distance": "sqeuclidean"},
    "triplet-listed": {"triplets": [[0, 4, 1], [3, 7, 2], [9, 1, 4]]},
    "triplet-drawn": {"n_per_anchor": 3},
    "quadruplet-all": {},
    "quadruplet-sqeuclidean": {"distance": "sqeuclidean"},
    "quadruplet-hard": {"select": "hard"},
    "quadruplet-between": {"reduction": (0.2, 5.0)},
}


@each_low
@pytest.mark.parametrize("tile", [(64, 64), (5, 4)])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", TUPLES)
def test_losses_of_tuples_are_those_of_the_rounded_rows(
    name: str, reference: bool, tile: tuple[int, int], precision: Precision
) -> None:
    function = nf.batch_triplet_loss if name.startswith("triplet") else nf.batch_quadruplet_loss
    rows = {"x": draw(24, 5)} | ({"y": draw(30, 5, 1)} if reference else {})
    labels = torch.arange(30) % 4

    def run(data: Data, **more: Any) -> Tensor:
        if "n_per_anchor" in TUPLES[name]:
            more["generator"] = torch.Generator().manual_seed(0)
        if reference:
            more["reference"] = nf.Reference(data.rows["y"], labels)
        return function(data.rows["x"], labels[:24], **TUPLES[name], **more)

    assert_of_rounded_rows(run, Data(rows, {}), precision, tile)


@each_low
@pytest.mark.parametrize("select", ["hard", "semihard", "easy_positive", "quadruplet"])
def test_rows_are_selected_by_the_rounded_rows(select: str, precision: Precision) -> None:
    """So many rows in so few dimensions that rounding exchanges the nearest."""
    x, labels, how = draw(400, 2), torch.arange(400) % 9, {"margin": 0.01, "reduction": "none"}

    def run(x: Tensor, precision: Precision) -> Tensor:
        if select == "quadruplet":
            return nf.batch_quadruplet_loss(x, labels, select="hard", precision=precision, **how)
        return nf.batch_triplet_loss(x, labels, select=select, precision=precision, **how)

    found, rounded_first = run(x, precision), run(to(x, precision), "float32")
    torch.testing.assert_close(found, rounded_first, rtol=1e-4, atol=1e-5)


@each_low
def test_the_hardest_by_cosine_are_those_of_the_rounded_rows(precision: Precision) -> None:
    x, labels = draw(400, 3), torch.arange(400) % 9
    a = to(F.normalize(x), precision).double()
    d = (a[:, None] - a).square().sum(2) / 2
    same, other = labels[:, None] == labels, ~torch.eye(400, dtype=torch.bool)
    near = d.masked_fill(~(same & other), -math.inf).amax(1)
    true = (near - d.masked_fill(same, math.inf).amin(1) + 0.01).relu()
    found = nf.batch_triplet_loss(
        x, labels, margin=0.01, distance="cosine", select="hard", reduction="none",
        precision=precision,
    )  # fmt: skip
    torch.testing.assert_close(found.double(), true, rtol=1e-4, atol=1e-6)


@each_low
@pytest.mark.parametrize("listed", [30, 400])
@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine"])
def test_a_list_has_the_losses_of_the_rounded_rows(
    distance: Any, listed: int, precision: Precision
) -> None:
    """Of few pairs, which are measured one by one, and of many, in tiles; there are 9,900."""
    n, chance = 100, torch.Generator().manual_seed(0)
    x, labels = draw(n, 8), torch.arange(n) % 3
    i, j = torch.randint(n, (2, 4000), generator=chance)
    i, j = i[i != j][:listed], j[i != j][:listed]
    similar = labels[i] == labels[j]
    pairs = [torch.stack([i[s], j[s]], 1) for s in (similar, ~similar)]
    rows = to(F.normalize(x) if distance == "cosine" else x, precision).double()
    apart = (rows[i] - rows[j]).square().sum(1)
    d = {"euclidean": apart.sqrt(), "sqeuclidean": apart, "cosine": apart / 2}[distance]
    true = d[similar].square().mean() + (3 - d[~similar]).relu().square().mean()
    found = nf.batch_contrastive_loss(
        x, labels, margin=3.0, distance=distance, pairs=tuple(pairs), precision=precision
    )
    torch.testing.assert_close(found, true.float(), rtol=1e-5, atol=1e-6)


def through(x: Tensor, precision: str) -> Tensor:
    """Rounded as float32, with the gradient of what it was."""
    return x + (to(x.float(), precision).double() - x).detach()


def unit(x: Tensor) -> Tensor:
    """Rows at length 1, divided in float32 as the loss does, so that ties are rounded alike."""
    exact = F.normalize(x)
    single = x.detach().float()
    return exact + ((single / single.norm(dim=1, keepdim=True)).double() - exact).detach()


def with_rounded_force(z: Tensor, precision: str) -> Tensor:
    z.register_hook(lambda force: rounded_forces(force.float(), precision, fine=False).double())
    return z


@each_low
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_towers_by_the_formula(scale: float, precision: Precision) -> None:
    """Gradients reach the rows before they are rounded, by rounded forces on rounded rows."""

    def formula(x: Tensor, y: Tensor) -> Tensor:
        a, b = through(unit(x) * scale, precision), through(unit(y), precision)
        z, own = with_rounded_force(a @ b.T, precision), torch.arange(len(x))
        return (F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2

    # 16 rows, since a mean over them divides by a power of two: rounding is the same before it.
    rows = {"x": draw(16, 12), "y": draw(16, 12) + draw(16, 12, 1)}
    low = gradients(
        lambda d: nf.clip_loss(d.rows["x"], d.rows["y"], scale=scale, precision=precision),
        Data(rows, {}),
    )
    true = gradients(
        lambda d: formula(d.rows["x"], d.rows["y"]),
        Data({k: a.double() for k, a in rows.items()}, {}),
    )
    near((low[0].double(), low[1]), true, UNIT[precision] / 50)


@each_low
@pytest.mark.parametrize("tile", [(64, 64), (5, 4)])
def test_a_batch_with_itself_by_the_formula(tile: tuple[int, int], precision: Precision) -> None:
    """Both ends of a pair are rounded alike: half of the scale is in each."""
    x, labels, temperature = draw(30, 12), torch.arange(30) % 7, 0.1
    a = to(F.normalize(x) * temperature**-0.5, precision).double()
    true = textbook.sup_con_loss(a, labels, temperature=1.0, normalize=False)
    with tile_shape(*tile):
        found = nf.sup_con_loss(x, labels, temperature=temperature, precision=precision)
    torch.testing.assert_close(found, true.float(), rtol=2e-6, atol=0)


@each_low
def test_cosine_distances_of_rounded_rows(precision: Precision) -> None:
    """They are no longer at length 1, but equal rows are still at distance 0, and others above."""
    x = draw(20, 16)
    x[10:] = x[:10] + torch.logspace(-6, -1, 10)[:, None] * draw(10, 16, 1)
    x[3], x[13] = 0, x[4] * 3
    seen = []

    def rule(tile: nf.Tile) -> Tensor:
        seen.append(tile.closeness.clone())
        return tile.closeness.sum(1)

    nf.batch_loss(rule, x, torch.arange(20), distance="cosine", precision=precision)
    a = to(F.normalize(x), precision).double()
    true = (a[:, None] - a).square().sum(2) / 2
    true[3] = true[:, 3] = 1
    other = ~torch.eye(20, dtype=torch.bool)
    short = torch.zeros(20, 20, dtype=torch.bool)
    short[3] = short[:, 3] = True
    found = seen[0].double()
    torch.testing.assert_close(found[other & ~short], true[other & ~short], rtol=2e-4, atol=1e-12)
    torch.testing.assert_close(
        found[other & short], true[other & short], rtol=UNIT[precision], atol=0
    )


@each_low
def test_the_gradient_of_cosine_distances(precision: Precision) -> None:
    """That of half the square of a difference; these forces, 1 and 2, need no rounding."""
    x, labels = draw(20, 16), torch.arange(20) // 2
    x[1::2] = x[::2] + 0.1 * draw(10, 16, 1)

    def formula(data: Data) -> Tensor:
        a = through(unit(data.rows["x"]), precision)
        same = (labels[:, None] == labels) & ~torch.eye(20, dtype=torch.bool)
        return ((a[:, None] - a).square().sum(2) / 2)[same].sum()

    low = gradients(
        lambda d: nf.batch_cosine_loss(
            d.rows["x"], labels, margin=1.0, reduction="sum", precision=precision
        ),
        Data({"x": x}, {}),
    )
    true = gradients(formula, Data({"x": x.double()}, {}))
    near((low[0].double(), low[1]), true, 1e-5)


@pytest.mark.parametrize(
    "run",
    [
        lambda **p: nf.clip_loss(X, X.flip(0), scale=9.0, **p),
        lambda **p: nf.sup_con_loss(X, LABELS, **p),
        lambda **p: nf.sup_con_loss(X, None, pairs=([[0, 4], [1, 5]], [[0, 1], [1, 2]]), **p),
        lambda **p: nf.batch_contrastive_loss(X, LABELS, margin=4.0, **p),
        lambda **p: nf.batch_triplet_loss(X, LABELS, **p),
        lambda **p: nf.batch_triplet_loss(X, LABELS, swap=True, smooth=True, **p),
        lambda **p: nf.batch_quadruplet_loss(X, LABELS, **p),
        lambda **p: nf.proxy_softmax_loss(X, torch.ones(4, 2, 6), LABELS, **p),
    ],
    ids=[
        "clip",
        "sup_con",
        "pairs",
        "contrastive",
        "triplets",
        "swapped",
        "quadruplets",
        "proxies",
    ],
)
def test_all_forces_of_a_loss_are_rounded(
    run: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(force: Tensor, precision: Precision, *, fine: bool) -> Tensor:
        seen.append(precision)
        return rounded_forces(force, precision, fine=fine)

    monkeypatch.setattr(products, "rounded_forces", spy)
    monkeypatch.setitem(globals(), "X", X.clone().requires_grad_())
    run(precision="bfloat16")
    assert set(seen) == {"bfloat16"}


@pytest.mark.parametrize(
    "run",
    [
        lambda **p: nf.info_nce_loss(X.half(), X.half(), hard_negatives=X.half(), **p),
        lambda **p: nf.info_nce_loss(X.half(), X.half(), X.half(), **p),
    ],
    ids=["hard negatives", "listed negatives"],
)
def test_what_is_lifted_early_is_asked_for_its_dtype_before(
    run: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or an accelerator would take rows in float16 for float32."""
    seen = []

    def spy(asked: Any, rounding: Rounding, *rows: Tensor, **more: Any) -> Precision:
        seen.extend(each.dtype for each in rows)
        return "float16"

    monkeypatch.setattr(info_nce, "chosen", spy)
    assert run() == run(precision="float16")
    assert set(seen) == {torch.float16}


@each_low
def test_listed_negatives_by_the_formula(precision: Precision) -> None:
    rows = {"query": draw(9, 8), "positive": draw(9, 8, 1), "negatives": draw(7, 8, 2)}

    def formula(data: Data) -> Tensor:
        q, p, n = (through(unit(a), precision) for a in data.rows.values())
        logits = torch.cat([(q * p).sum(1, keepdim=True), q @ n.T], 1) / 0.1
        return F.cross_entropy(logits, torch.zeros(9, dtype=torch.int64))

    low = gradients(
        lambda d: nf.info_nce_loss(*d.rows.values(), temperature=0.1, precision=precision),
        Data(rows, {}),
    )
    true = gradients(formula, Data({k: a.double() for k, a in rows.items()}, {}))
    near((low[0].double(), low[1]), true, 1e-5)


@each_low
def test_listed_negatives_by_squared_distances(precision: Precision) -> None:
    """A common offset is taken away before rows are rounded, which would erase them."""
    far = 1000 + draw(24, 8)
    query, positive, negatives = far.split(8)
    how = {"temperature": 4.0, "similarity": "sqeuclidean", "normalize": False}
    exact = nf.info_nce_loss(query.double(), positive.double(), negatives.double(), **how)
    found = nf.info_nce_loss(query, positive, negatives, precision=precision, **how)
    assert found.item() == pytest.approx(exact.item(), rel=8 * UNIT[precision])


def test_listed_negatives_compile_with_a_precision() -> None:
    def run(precision: Precision) -> Tensor:
        return nf.info_nce_loss(X, X.flip(0), X.roll(1, 0), precision=precision)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for precision in LOW:
        assert torch.equal(compiled(precision), run(precision))


# -- float16 --------------------------------------------------------------------------------------


def test_small_forces_survive_float16() -> None:
    x, weight = X.clone().requires_grad_(), torch.full((12,), 1e-12)

    def gradient(precision: Precision) -> Tensor:
        total = nf.sup_con_loss(x, LABELS, weight=weight, reduction="sum", precision=precision)
        return torch.autograd.grad(total, x)[0]

    single = gradient("float32")
    assert float(single.abs().max()) < 2**-25, "float16 itself would hold it"
    assert float((gradient("float16") - single).norm() / single.norm()) < 2**-10


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_float16_cannot_hold_is_not_finite(reduction: Any) -> None:
    x = (1e5 * X).requires_grad_()
    found = nf.multi_similarity_loss(
        x, LABELS, normalize=False, precision="float16", reduction=reduction
    )
    assert not found.isfinite().any()
    found.sum().backward()
    assert x.grad is not None
    assert not x.grad.isfinite().all()
    assert nf.batch_contrastive_loss(x, LABELS, precision="float16").isfinite().logical_not()
    assert nf.batch_contrastive_loss(x, LABELS, precision="bfloat16").isfinite()


# -- a device that multiplies narrow numbers ------------------------------------------------------


class Products(TorchDispatchMode):
    """The dtypes of what is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[torch.dtype]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if "mm" in str(function):
            self.found.append([a.dtype for a in args if isinstance(a, Tensor)])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_an_accelerator_multiplies_narrow_numbers(name: Precision, fine: bool) -> None:
    narrow, rows, columns = getattr(torch, name), slice(0, 8), slice(0, 6)
    with FakeTensorMode():
        a, b = (torch.empty(n, 4, device="cuda") for n in (8, 6))
        of_a, of_b = (torch.empty(n, device="cuda") for n in (8, 6))
        products._has_product.cache_clear()
        with Products() as seen:
            z = products.products(a, b, precision=name)
            d = products.squares(a, b, of_a, of_b, name)
            gradient = products.Gradient(a, b, None, name, fine=fine)
            gradient.add(z, rows, columns)
            da, db = gradient.whole()
        products._has_product.cache_clear()
    assert da is not None
    assert db is not None
    assert (z.shape, d.shape, da.shape, db.shape) == ((8, 6), (8, 6), (8, 4), (6, 4))
    assert {t.dtype for t in (z, d, da, db)} == {torch.float32}
    asked, *multiplied = seen.found  # the first one asks whether there is such a product
    assert multiplied == [[narrow, narrow]] * (6 if fine else 4)
    assert asked == [narrow, narrow]


# -- how far it is off ----------------------------------------------------------------------------


def regime(case: Case, seed: int) -> Data:
    """Easy and hard: rows with something in common, near-duplicates, and towers that agree."""
    data = case.draw(101, 48, seed, dtype=torch.float32)
    chance = torch.Generator().manual_seed(seed)

    def closer(a: Tensor) -> Tensor:
        if a.ndim != 2:
            return a
        k = min(10, len(a) // 2)
        return (
            torch.cat([a[:-k], a[:k] + 1e-2 * torch.randn(k, a.shape[1], generator=chance)]) + 0.3
        )

    data = data.each(closer)
    if case.kind == "towers":
        first, second = list(data.rows)[:2]
        x = data.rows[first]
        data = data.at(**{second: x + (0.2, 1.0)[seed % 2] * (data.rows[second] - x)})
    if case.kind == "batch":
        data.others["labels"] = torch.arange(101) // 2
    return data.at(**{k: v.float() for k, v in data.rows.items()})


FORMULAS = [
    case
    for case in CASES
    if case.normalizes
    and not (case.multi or case.reference or case.weighted)
    # A margin of 0; a temperature of 0.001, which turns any rounding into another loss; and a
    # formula that is not rounded, so that it does not change which sub-centre is the nearest.
    and case.name not in ("batch_contrastive-0.0", "info_nce-0.001", "proxy_nca-sub_centers")
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@over(FORMULAS)
def test_errors_are_at_most_twice_those_of_the_formula_under_autocast(
    case: Case, dtype: torch.dtype
) -> None:
    """Or, where autocast does not round the formula's distances, half a unit of the largest."""
    precision: Any = str(dtype).removeprefix("torch.")

    def formula(data: Data) -> Tensor:
        with torch.autocast("cpu", dtype):
            return case.schoolbook(data)

    ours, books, sizes = (dict[str, float]() for _ in range(3))
    for seed in range(4):
        data = regime(case, seed)
        value, true = gradients(lambda d: case.run(d, "mean"), data.to(torch.float64))
        for table, run in (
            (ours, lambda d: case.run(d, "mean", precision=precision)),
            (books, formula),
        ):
            found, of_rows = gradients(run, data)
            pairs = {"value": (found, value)} | {k: (of_rows[k], true[k]) for k in true}
            for name, (a, b) in pairs.items():
                table[name] = math.hypot(table.get(name, 0.0), float((a.double() - b).norm()))
                sizes[name] = math.hypot(sizes.get(name, 0.0), float(b.double().norm()))
    for name, error in ours.items():
        book = math.inf if math.isnan(books[name]) else books[name]
        assert error <= max(2 * book, UNIT[precision] * sizes[name]), name


@each_low
@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
def test_a_softmax_loss_is_off_by_at_most_two_errors_of_a_logit(
    scale: float, precision: Precision
) -> None:
    """A cosine is off by 2 units and a square, the log-sum-exp and the positive each by that."""
    x = draw(64, 32)
    y = x + 0.3 * draw(64, 32, 1)
    exact = nf.clip_loss(x.double(), y.double(), scale=scale, reduction="none")
    found = nf.clip_loss(x, y, scale=scale, precision=precision, reduction="none")
    assert float((found - exact).abs().max()) <= 2 * scale * (2 * UNIT[precision] + 1e-5)


@each_low
def test_a_distance_is_off_by_at_most_the_rounding_of_both_rows(precision: Precision) -> None:
    x = torch.cat([draw(20, 8), draw(20, 8) + 1e-3 * draw(20, 8, 1)])
    seen = []

    def rule(tile: nf.Tile) -> Tensor:
        seen.append(tile.closeness.clone())
        return tile.closeness.sum(1)

    nf.batch_loss(rule, x, torch.arange(40), distance="euclidean", precision=precision)
    size, other = x.double().norm(dim=1), ~torch.eye(40, dtype=torch.bool)
    off = (seen[0] - torch.cdist(x.double(), x.double())).abs()
    assert (off <= UNIT[precision] * (size[:, None] + size) + 1e-6)[other].all()


def test_learned_numbers_get_their_gradient_in_low_precision() -> None:
    """In that of a scale the largest forces cancel, so they keep twice the digits for it."""
    x = draw(64, 32)
    rows = {"x": x, "y": x + 0.3 * draw(64, 32, 1)}
    learned = {"scale": torch.tensor(30.0), "bias": torch.tensor(-10.0)}
    losses: list[Callable[..., Tensor]] = [
        lambda x, y, scale, bias, **p: nf.siglip_loss(x, y, scale=scale, bias=bias, **p),
        lambda x, y, scale, bias, **p: nf.clip_loss(x, y, scale=scale, **p) + 0 * bias,
        lambda x, y, scale, bias, **p: nf.sup_con_loss(
            x, torch.arange(64) // 2, temperature=1 / scale, **p
        ) + 0 * bias,
    ]  # fmt: skip
    for function in losses:
        data = Data({**rows, **learned}, {})
        _, true = gradients(lambda d, f=function: f(**d.rows), data.to(torch.float64))
        for precision in LOW:
            _, found = gradients(lambda d, f=function, p=precision: f(**d.rows, precision=p), data)
            for name in learned:
                assert found[name].item() == pytest.approx(
                    true[name].item(), rel=16 * UNIT[precision], abs=1e-7
                )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_the_gradient_of_a_scale_keeps_more_digits_than_a_force(dtype: torch.dtype) -> None:
    """Where the largest forces cancel: a batch at scale 100 that is nearly solved."""
    precision: Any = str(dtype).removeprefix("torch.")
    case = next(case for case in CASES if case.name == "clip-learned")

    def formula(data: Data) -> Tensor:
        with torch.autocast("cpu", dtype):
            return case.schoolbook(data)

    ours = books = 0.0
    for seed in range(0, 24, 2):
        data = regime(case, seed).at(scale=torch.tensor(100.0))
        true, found, book = (
            gradients(run, data.to(wide))[1]["scale"].item()
            for run, wide in (
                (lambda d: case.run(d, "mean"), torch.float64),
                (lambda d: case.run(d, "mean", precision=precision), torch.float32),
                (formula, torch.float32),
            )
        )
        ours, books = math.hypot(ours, found - true), math.hypot(books, book - true)
    assert ours <= 2 * books
