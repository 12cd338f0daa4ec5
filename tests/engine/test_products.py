"""The products inside the engine give the same by either of torch's two routines."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from batch_cases import CASES, Case, gradients, near, over
from torch import Tensor

from nearfar import (
    batch_triplet_loss,
    circle_loss,
    clip_loss,
    info_nce_loss,
    multi_similarity_loss,
    nt_xent_loss,
    proxy_anchor_loss,
    siglip_loss,
    sup_con_loss,
)
from nearfar.engine import products
from nearfar.engine import rows as rows_module
from nearfar.engine.budget import tile_shape
from nearfar.engine.products import Gradient, squares
from nearfar.engine.products import products as inner

ONE_DNN = pytest.mark.skipif(products._one_dnn is None, reason="no oneDNN")


@pytest.fixture
def one_dnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is exact enough, whatever the size, on a CPU that gains nothing by it too."""
    monkeypatch.setattr(products, "_THERE", True)
    for name in ("_FEWEST", "_FEWEST_ROWS", "_LARGE"):
        monkeypatch.setattr(products, name, 0)


@pytest.fixture
def torch_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_FEWEST", torch.inf)


@pytest.fixture(params=["torch_mm", pytest.param("one_dnn", marks=ONE_DNN)])
def routine(request: pytest.FixtureRequest) -> None:
    """Whatever the size, either the one or the other."""
    request.getfixturevalue(request.param)


def rows(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def tiles(n: int, m: int, columns: int = 100) -> list[tuple[slice, slice]]:
    """48 rows high, the last ragged."""
    return [
        (slice(i, min(i + 48, n)), slice(j, min(j + columns, m)))
        for i in range(0, n, 48)
        for j in range(0, m, columns)
    ]


def close(found: Tensor | None, true: Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=2e-5)


@pytest.mark.usefixtures("routine")
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (7, 5, 3), (64, 33, 17), (130, 257, 48)])
def test_products_and_their_gradient(n: int, m: int, d: int, uniform: bool) -> None:
    """Tile by tile, of which some are ragged."""
    a, b = rows(n, d, 1), rows(m, d, 2)
    true = a.double() @ b.double().T
    close(inner(a, b), true)
    force = rows(n, m, 4)
    of_a, of_b = a.square().sum(1), b.square().sum(1)
    close(squares(a, b, of_a, of_b), (a.double()[:, None] - b.double()).square().sum(2))
    gradient, apart = Gradient(a, b), Gradient(a, b)
    for at in tiles(n, m):
        gradient.add(force[at], *at, by=-0.5, uniform=uniform)
        apart.add_squares(force[at], *at, uniform=uniform)
    wide = force.double()
    da, db = wide @ b.double(), wide.T @ a.double()
    for found, expected in zip(gradient.whole(), (-0.5 * da, -0.5 * db), strict=True):
        close(found, expected)
    of_a, of_b = wide.sum(1, keepdim=True) * a.double(), wide.sum(0)[:, None] * b.double()
    for found, expected in zip(apart.whole(), (of_a - da, of_b - db), strict=True):
        close(found, expected)


@pytest.mark.usefixtures("routine")
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("n", [5, 48, 130])
def test_the_gradient_of_rows_with_themselves(n: int, uniform: bool) -> None:
    """In one tile, in square ones alone, and in both kinds: all of it in the first part."""
    a, force = rows(n, 17, 1), rows(n, n, 2)
    gradient, apart = Gradient(a, a), Gradient(a, a)
    for at in tiles(n, n, 48):
        gradient.add(force[at], *at, uniform=uniform)
        apart.add_squares(force[at], *at, uniform=uniform)
    both = (force + force.T).double()
    for found, expected in (
        (gradient.whole(), both @ a.double()),
        (apart.whole(), both.sum(1, keepdim=True) * a.double() - both @ a.double()),
    ):
        assert found[1] is None
        close(found[0], expected)


@pytest.mark.usefixtures("routine")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    a, b = rows(20, 8, 1), rows(30, 8, 2)
    a[3, 2] = bad
    assert not inner(a, b)[3].isfinite().any()
    assert inner(a, b)[[*range(3), *range(4, 20)]].isfinite().all()


@ONE_DNN
@pytest.mark.usefixtures("one_dnn")
@over(CASES)
def test_losses_are_the_same_by_either(case: Case) -> None:
    data = case.draw(24, 8, seed=5)
    single = data.to(torch.float32)
    truth = gradients(case.run, data)
    for shape in ((24, 24), (7, 10)):
        with tile_shape(*shape):
            near(gradients(case.run, single), truth, 2e-4, floor=2e-5)


@pytest.mark.usefixtures("routine")
@pytest.mark.parametrize("normalize", [True, False])
def test_a_gradient_is_turned_a_few_rows_at_a_time(
    normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for turned in (4, 100):
        monkeypatch.setattr(rows_module, "_TRANSPOSED", turned)
        x, y = rows(23, 8, 1).requires_grad_(), rows(23, 8, 2).requires_grad_()
        siglip_loss(x, y, scale=5.0, bias=-2.0, normalize=normalize).backward()
        found.append((x.grad, y.grad))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


@ONE_DNN
@pytest.mark.usefixtures("one_dnn")
@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine"])
def test_triplets_are_the_same_by_either(distance: str) -> None:
    """In a batch large enough to be put in the order of its classes."""
    labels = torch.arange(60) % 13
    wide = rows(60, 8, 6).double().requires_grad_()
    single = wide.detach().float().requires_grad_()
    with tile_shape(60, 60):
        batch_triplet_loss(wide, labels, distance=distance).backward()
    for shape in ((16, 24), (60, 60)):
        single.grad = None
        with tile_shape(*shape):
            batch_triplet_loss(single, labels, distance=distance).backward()
        assert single.grad is not None
        torch.testing.assert_close(single.grad.double(), wide.grad, rtol=1e-4, atol=1e-6)


class AskedError(Exception):
    """oneDNN was."""


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AskedError

    monkeypatch.setattr(products, "_THERE", True)
    monkeypatch.setattr(products, "_one_dnn", refuse)


@ONE_DNN
@pytest.mark.usefixtures("refused")
def test_large_tiles_do_go_to_one_dnn(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.zeros(2048, 64)
    inner(a[:512], a[:512])  # too small to gain
    inner(a[:250].repeat(1, 4), a.repeat(1, 4))  # too few rows
    inner(a.double(), a.double())  # it has no float64
    with pytest.raises(AskedError):
        inner(a, a)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    inner(a, a)  # it is not wanted


@ONE_DNN
@pytest.mark.usefixtures("refused")
def test_sums_in_which_one_dnn_loses_digits_do_not() -> None:
    """Long ones, unless the product is large; and those with terms that outweigh the others."""
    wide, wider = torch.zeros(512, 512), torch.zeros(512, 1025)
    inner(wide, wide)
    inner(wider, wider.repeat(4, 1))
    a, force, all_rows = wide.repeat(2, 1), torch.zeros(1024, 1024), slice(0, 1024)
    with pytest.raises(AskedError):
        inner(a, a)
    Gradient(a, a.clone()).add(force, all_rows, all_rows)
    with pytest.raises(AskedError):
        Gradient(a, a.clone()).add(force, all_rows, all_rows, uniform=True)


@ONE_DNN
@pytest.mark.usefixtures("one_dnn")
@pytest.mark.parametrize(
    ("loss", "height"),
    [
        (partial(clip_loss, scale=5.0), 10),
        (partial(siglip_loss, scale=5.0, bias=-2.0), 10),
        (info_nce_loss, 10),
        (partial(info_nce_loss, hard_negatives=rows(30, 8, 3)), 30),  # one strip
    ],
)
def test_its_sums_leave_out_forces_on_positives(
    loss: Callable[..., Tensor], height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie on a diagonal, which some tiles cross and others do not."""
    forces = []

    def watched(a: Tensor, b: Tensor, *_: object) -> Tensor:
        forces.extend(x for x in (a, b) if 8 not in x.shape)
        return a @ b.T

    monkeypatch.setattr(products, "_one_dnn", watched)
    x, y = rows(30, 8, 1).requires_grad_(), rows(30, 8, 2).requires_grad_()
    with tile_shape(height, 12):
        loss(x, y).backward()
    assert forces
    assert all(force.min() >= 0 for force in forces)  # they push


LABELS = torch.arange(24) // 2
BY_SCALE: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "clip": lambda x, y, scale: clip_loss(x, y, scale=scale),
    "siglip": lambda x, y, scale: siglip_loss(x, y, scale=scale, bias=-2.0),
    "info_nce": lambda x, y, scale: info_nce_loss(x, y, temperature=1 / scale),
    "sup_con": lambda x, _, scale: sup_con_loss(x, LABELS, temperature=1 / scale),
    "nt_xent": lambda x, _, scale: nt_xent_loss(x, LABELS, temperature=1 / scale),
    "circle": lambda x, _, scale: circle_loss(x, LABELS, margin=0, scale=scale),
    "attracting": lambda x, _, scale: multi_similarity_loss(x, LABELS, alpha=scale, beta=1.0),
    "repelling": lambda x, _, scale: multi_similarity_loss(x, LABELS, alpha=1.0, beta=scale),
    "proxy_anchor": lambda x, y, scale: proxy_anchor_loss(x, y, LABELS, scale=scale),
}
LOGITS = {  # loss, whether by oneDNN
    **{f"{name} {scale}": (partial(f, scale=scale), scale < 16)
       for name, f in BY_SCALE.items() for scale in (15.0, 17.0)},
    "unknown": (partial(clip_loss, scale=1.0, normalize=False), False),
}  # fmt: skip


@ONE_DNN
@pytest.mark.parametrize("name", LOGITS)
def test_its_sums_leave_out_large_logits_too(
    name: str, one_dnn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless they are sums so short that it loses nothing."""
    routine, seen = products._one_dnn, []
    assert routine is not None

    def watched(a: Tensor, b: Tensor, *rest: object) -> Tensor:
        seen.append(len(b))
        return routine(a, b, *rest)

    monkeypatch.setattr(products, "_one_dnn", watched)
    loss, by_one_dnn = LOGITS[name]
    loss(rows(24, 8, 1), rows(24, 8, 2))  # without gradients: the logits alone
    assert seen
    seen.clear()
    monkeypatch.setattr(products, "_ALIKE", 7)
    loss(rows(24, 8, 1), rows(24, 8, 2))
    assert bool(seen) == by_one_dnn


@pytest.fixture
def gaps(one_dnn: None, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a product, of whatever size, gave oneDNN rows with gaps between them.

    Such take it a thousand times as long.
    """
    routine, seen = products._one_dnn, []
    assert routine is not None

    def watched(a: Tensor, b: Tensor, *rest: object) -> Tensor:
        seen.append(not all(x.is_contiguous() or x.T.is_contiguous() for x in (a, b)))
        return routine(a, b, *rest)

    monkeypatch.setattr(products, "_one_dnn", watched)
    return seen


@ONE_DNN
def test_one_dnn_gets_no_rows_with_gaps(gaps: list[bool]) -> None:
    inner(rows(30, 17, 1)[:, :9], rows(40, 17, 2)[:, 8:])
    inner(rows(17, 60, 1).T[:30], rows(17, 60, 2).T[:40])
    assert gaps == [False, False]


# p-norms take no products.
PRODUCTS = [
    case
    for case in CASES
    if case.hyper.get("distance", "") in ("", "euclidean", "sqeuclidean", "cosine", "snr")
]


@ONE_DNN
@over(PRODUCTS)
def test_nor_does_it_from_rows_that_lie_column_by_column(
    case: Case, gaps: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = case.draw(24, 8, seed=5).to(torch.float32)
    turned = {name: x.mT.contiguous().mT for name, x in data.rows.items() if x.ndim > 1}
    with tile_shape(7, 10):
        gradients(case.run, data.at(**turned))
    assert gaps
    assert not any(gaps)
