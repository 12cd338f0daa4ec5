"""Losses against proxies: sub-centres, a learned scale, weights, and modules that hold proxies."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from allocations import Allocations
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nearfar as nf
from nearfar.engine.budget import tile_shape

N, C, D = 12, 7, 5
MODULES = (nf.ProxySoftmaxLoss, nf.ProxyNCALoss, nf.ProxyAnchorLoss)
FUNCTIONS = (nf.proxy_softmax_loss, nf.proxy_nca_loss, nf.proxy_anchor_loss)
each_module = pytest.mark.parametrize("module", MODULES)
few = settings(max_examples=8, derandomize=True, deadline=None, database=None)


def draw(k: int = 0, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Rows, proxies (k of each class; 0: an array of two dimensions), and labels.

    The last class has no row.
    """
    chance = torch.Generator().manual_seed(seed)
    shape = (C, k, D) if k else (C, D)
    x, proxies = (
        torch.randn(*s, generator=chance, dtype=torch.float64).to(dtype) for s in ((N, D), shape)
    )
    return x, proxies, torch.randint(0, C - 1, (N,), generator=chance)


def derived(loss: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """The loss and its gradients."""
    given = [t.detach().clone().requires_grad_() for t in leaves]
    value = loss(*given)
    return [value.detach(), *torch.autograd.grad(value, given, materialize_grads=True)]


def assert_close(found: list[Tensor], expected: list[Tensor], to: float = 1e-9) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=to, atol=to)


# The formulas of pytorch-metric-learning 2.9, in plain torch.


def cosines(x: Tensor, proxies: Tensor) -> Tensor:
    found = F.normalize(x) @ F.normalize(proxies.flatten(0, -2)).T
    return found.view(N, C, -1).amax(2)


def large_margin(
    x: Tensor, proxies: Tensor, labels: Tensor, scale: float, turn: Callable[[Tensor], Tensor]
) -> Tensor:
    own, c = F.one_hot(labels, C).bool(), cosines(x, proxies)
    return F.cross_entropy(scale * torch.where(own, turn(c), c), labels)


def arc_face(x: Tensor, proxies: Tensor, labels: Tensor) -> Tensor:
    """Its margin is in degrees; also with sub-centres."""
    m = math.radians(28.6)

    def turn(c: Tensor) -> Tensor:
        angle = c.clamp(-1, 1).acos()
        return torch.where(angle <= math.pi - m, (angle + m).cos(), angle.cos() - m * math.sin(m))

    return large_margin(x, proxies, labels, 64, turn)


def cos_face(x: Tensor, proxies: Tensor, labels: Tensor) -> Tensor:
    return large_margin(x, proxies, labels, 64, lambda c: c - 0.35)


def normalized_softmax(x: Tensor, proxies: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(cosines(x, proxies) / 0.05, labels)


def nca_with_own_proxy(x: Tensor, proxies: Tensor, labels: Tensor) -> Tensor:
    """Unlike the paper's, its denominator has the own proxy too."""
    d = torch.cdist(F.normalize(x), F.normalize(proxies)).square()
    return -(-3 * d).softmax(1).gather(1, labels[:, None]).log().mean()


def logarithms(x: Tensor, proxies: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(c,) of Proxy-Anchor: of the rows of each class, and of the others."""
    own, c = F.one_hot(labels, C).bool(), cosines(x, proxies)
    near = torch.where(own, -32 * (c - 0.1), -math.inf).exp().sum(0).log1p()
    return near, torch.where(own, -math.inf, 32 * (c + 0.1)).exp().sum(0).log1p()


def anchors(x: Tensor, proxies: Tensor, labels: Tensor) -> Tensor:
    near, far = logarithms(x, proxies, labels)
    return near.sum() / len(labels.unique()) + far.sum() / C


THEIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Any], int]] = {
    "ArcFace": (arc_face, nf.proxy_softmax_loss, {"angle_margin": math.radians(28.6)}, 0),
    "CosFace": (cos_face, nf.proxy_softmax_loss, {"cosine_margin": 0.35}, 0),
    "SubCenterArcFace": (arc_face, nf.proxy_softmax_loss, {"angle_margin": math.radians(28.6)}, 3),
    "NormalizedSoftmax": (normalized_softmax, nf.proxy_softmax_loss, {"scale": 20.0}, 0),
    "ProxyNCA": (nca_with_own_proxy, nf.proxy_softmax_loss, {"scale": 6.0}, 0),
    "ProxyAnchor": (anchors, nf.proxy_anchor_loss, {}, 0),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", THEIRS)
def test_the_formulas_of_pytorch_metric_learning(name: str, seed: int) -> None:
    formula, loss, how, k = THEIRS[name]
    x, proxies, labels = draw(k, seed)
    if seed == 2:  # beyond pi - m, where the cosine would rise again
        x[0] = -proxies[labels[0]].reshape(-1, D)[0] + 0.1 * x[0]
    assert_close(
        derived(lambda x, p: loss(x, p, labels, **how), x, proxies),
        derived(lambda x, p: formula(x, p, labels), x, proxies),
    )


# Sub-centres.

TAKE_SEVERAL: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
    (nf.proxy_softmax_loss, {"scale": 9.0}),
    (nf.proxy_softmax_loss, {"scale": 64.0, "angle_margin": 0.5}),
    (nf.proxy_softmax_loss, {"scale": 0.7, "normalize": False}),
    (nf.proxy_nca_loss, {"scale": 2.0}),
]
several = pytest.mark.parametrize(("loss", "how"), TAKE_SEVERAL)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@several
def test_one_sub_center_is_one_proxy_to_the_bit(
    loss: Callable[..., Tensor], how: dict[str, Any], dtype: torch.dtype
) -> None:
    x, proxies, labels = draw(dtype=dtype)
    for tile in ((3, 2), (64, 64)):
        with tile_shape(*tile):
            one = derived(lambda x, p: loss(x, p, labels, **how), x, proxies)
            same = derived(lambda x, p: loss(x, p[:, None], labels, **how), x, proxies)
        assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))


@pytest.mark.parametrize("tile", [(3, 2), (64, 64)])
@several
def test_of_equal_sub_centers_the_first_counts(
    loss: Callable[..., Tensor], how: dict[str, Any], tile: tuple[int, int]
) -> None:
    x, proxies, labels = draw()
    one = derived(lambda x, p: loss(x, p, labels, **how), x, proxies)
    equal = proxies[:, None].expand(C, 3, D)
    with tile_shape(*tile):
        value, of_x, of_equal = derived(lambda x, p: loss(x, p, labels, **how), x, equal)
    assert_close([value, of_x, of_equal[:, 0]], one, 1e-12)
    assert not of_equal[:, 1:].any()


@several
@few
@given(seed=st.integers(0, 2**20))
def test_the_order_of_sub_centers_does_not_matter(
    loss: Callable[..., Tensor], how: dict[str, Any], seed: int
) -> None:
    x, proxies, labels = draw(4, seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    value, of_x, of_proxies = derived(lambda x, p: loss(x, p, labels, **how), x, proxies)
    moved = derived(lambda x, p: loss(x, p, labels, **how), x, proxies[:, order])
    assert_close(moved, [value, of_x, of_proxies[:, order]])


@several
@few
@given(seed=st.integers(0, 2**20))
def test_a_sub_center_that_is_never_nearest_changes_nothing(
    loss: Callable[..., Tensor], how: dict[str, Any], seed: int
) -> None:
    """A zero one has cosine 0; here each class has one of cosine above 0 with every row."""
    x, proxies, labels = draw(2, seed)
    x, proxies = x.abs(), proxies.abs()
    more = torch.cat([torch.zeros_like(proxies[:, :1]), proxies], 1)
    value, of_x, of_more = derived(lambda x, p: loss(x, p, labels, **how), x, more)
    expected = derived(lambda x, p: loss(x, p, labels, **how), x, proxies)
    assert_close([value, of_x, of_more[:, 1:]], expected)
    assert not of_more[:, 0].any()


def test_more_sub_centers_than_a_byte_counts() -> None:
    x, proxies, labels = draw(300)
    assert_close(
        derived(lambda x, p: nf.proxy_softmax_loss(x, p, labels, scale=20.0), x, proxies),
        derived(normalized_softmax_of(labels), x, proxies),
    )


def normalized_softmax_of(labels: Tensor) -> Callable[..., Tensor]:
    return lambda x, p: normalized_softmax(x, p, labels)


@pytest.mark.parametrize("shape", [(C, 0, D), (C, 2, D + 1), (C, 1, 2, D), (D,), (C, D + 1)])
@pytest.mark.parametrize("loss", FUNCTIONS)
def test_proxies_of_another_shape_are_refused(
    loss: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    x, _, labels = draw()
    with pytest.raises(ValueError, match="proxies must have ") as raised:
        loss(x, torch.zeros(shape, dtype=torch.float64), labels)
    assert "\n" not in str(raised.value)
    assert str(shape) in str(raised.value)


def test_proxy_anchor_takes_no_sub_centers() -> None:
    x, proxies, labels = draw(3)
    with pytest.raises(ValueError, match=r"one per class; got \(7, 3, 5\)\. proxy_softmax_loss "):
        nf.proxy_anchor_loss(x, proxies, labels)
    with pytest.raises(TypeError, match=r"takes n_classes, .*; got sub_centers\."):
        nf.ProxyAnchorLoss(C, D, sub_centers=3)  # type: ignore[call-arg]


def test_sub_centers_are_shown_as_their_class() -> None:
    x, proxies, labels = draw(3)
    shown = nf.forces(nf.proxy_softmax_loss, x, proxies, labels, scale=8.0, k=N * C)
    c = cosines(x, proxies)
    torch.testing.assert_close(shown.closeness, c[shown.anchor, shown.other])
    assert torch.equal(shown.similar, labels[shown.anchor] == shown.other)
    assert len(shown.force) == N * C


# A learned scale with a margin.


@pytest.mark.parametrize("how", [{"angle_margin": 0.5}, {"cosine_margin": 0.3}], ids=str)
@pytest.mark.parametrize(("k", "reduction"), [(0, "none"), (2, "mean"), (0, (0.5, 4.0))], ids=str)
def test_gradcheck_of_a_learned_scale_with_a_margin(
    how: dict[str, float], k: int, reduction: Any
) -> None:
    x, proxies, labels = draw(k, seed=3)
    x, labels, scale = x[:5], labels[:5], torch.tensor(4.0, dtype=torch.float64)
    weight = torch.linspace(0, 2, 5, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, proxies, scale)]
    run = partial(nf.proxy_softmax_loss, labels=labels, weight=weight, reduction=reduction, **how)
    with tile_shape(2, 3):
        assert torch.autograd.gradcheck(lambda x, p, t: run(x, p, scale=t), leaves)


def test_a_learned_scale_with_a_margin_in_float32() -> None:
    """Near its proxy the slope of a row is large, and all but cancels in the scale's gradient."""
    x, proxies, labels = draw()
    run = partial(nf.proxy_softmax_loss, labels=labels, angle_margin=0.5)
    for nearer in (1.0, 0.1, 0.01):
        rows = proxies[labels] + nearer * x
        exact = derived(lambda x, p, t: run(x, p, scale=t), rows, proxies, torch.tensor(8.0))[3]
        leaves = (rows.float(), proxies.float(), torch.tensor(8.0))
        found = derived(lambda x, p, t: run(x, p, scale=t), *leaves)[3]
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)


def test_a_learned_scale_with_a_margin_and_no_rows_gets_a_gradient_of_0() -> None:
    x, proxies, _ = draw()
    for dtype in (torch.float32, torch.float64):
        scale = torch.tensor([4.0], dtype=dtype, requires_grad=True)
        nf.proxy_softmax_loss(x[:0], proxies, [], scale=scale, angle_margin=0.5).backward()
        assert scale.grad is not None
        assert (scale.grad.dtype, scale.grad.shape, scale.grad.item()) == (dtype, (1,), 0)


# Weights of proxies, and means over some of their logarithms.


def mean_of(terms: Tensor, counts: Tensor, weight: Tensor) -> Tensor:
    weight = weight * counts
    return (terms * weight).sum() / (weight.sum() if weight.any() else 1)


@pytest.mark.parametrize("tile", [(2, 5), (64, 64)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kept", ["mean", "active", (2.0, 20.0), (-1.0, 8.0), (50.0, 60.0)])
def test_the_means_of_proxy_anchor_are_over_its_logarithms(
    kept: Any, weighted: bool, tile: tuple[int, int]
) -> None:
    x, proxies, labels = draw()
    x[labels == 0] = proxies[0]  # a logarithm near 0
    weight = torch.arange(C, dtype=torch.float64) % 4 if weighted else torch.ones(C).double()
    low, high = {"mean": (-math.inf, math.inf), "active": (0.0, math.inf)}.get(kept, kept)
    has_rows = F.one_hot(labels, C).any(0)

    def by_definition(x: Tensor, p: Tensor) -> Tensor:
        near, far = logarithms(x, p, labels)
        inside_near, inside_far = ((low < t) & (t < high) for t in (near, far))
        return mean_of(near, inside_near & has_rows, weight) + mean_of(far, inside_far, weight)

    def ours(x: Tensor, p: Tensor) -> Tensor:
        given = weight if weighted else None
        return nf.proxy_anchor_loss(x, p, labels, weight=given, reduction=kept)

    with tile_shape(*tile):
        assert_close(derived(ours, x, proxies), derived(by_definition, x, proxies))
        with torch.no_grad():
            torch.testing.assert_close(ours(x, proxies), by_definition(x, proxies))


def test_a_mean_over_no_logarithm_is_0() -> None:
    x, proxies, labels = draw()
    for reduction in ("active", (1e3, 1e4)):
        value, *found = derived(
            lambda x, p, r=reduction: nf.proxy_anchor_loss(x[:0], p[:0], labels[:0], reduction=r),
            x,
            proxies,
        )
        assert value == 0
        assert not any(g.any() for g in found)
    far_away = nf.proxy_anchor_loss(x, proxies, labels, reduction=(1e3, 1e4))
    assert far_away == 0


@pytest.mark.parametrize("bad", [torch.ones(N), torch.ones(C, 1)])
def test_the_weights_of_proxy_anchor_are_those_of_proxies(bad: Tensor) -> None:
    x, proxies, labels = draw()
    with pytest.raises(
        ValueError, match=r"shape \(7,\), one weight per proxy, on cpu; got \(.*\) on cpu\.$"
    ):
        nf.proxy_anchor_loss(x, proxies, labels, weight=bad)


@pytest.mark.parametrize("loss", FUNCTIONS[:2])
@pytest.mark.parametrize("kept", ["active", (0.3, 2.5), (-1.0, 0.5), (50.0, 60.0)])
def test_means_over_some_rows(loss: Callable[..., Tensor], kept: Any) -> None:
    x, proxies, labels = draw(2)
    weight = torch.linspace(0, 2, N, dtype=torch.float64)
    low, high = (0.0, math.inf) if kept == "active" else kept

    def by_definition(x: Tensor, p: Tensor) -> Tensor:
        rows = loss(x, p, labels, scale=2.0, reduction="none")
        return mean_of(rows, (low < rows) & (rows < high), weight)

    ours = partial(loss, labels=labels, scale=2.0, weight=weight, reduction=kept)
    assert_close(derived(ours, x, proxies), derived(by_definition, x, proxies))


# Products in place of cosines.


@pytest.mark.parametrize("k", [0, 3])
def test_without_normalisation_it_is_the_softmax_of_a_linear_classifier(k: int) -> None:
    x, proxies, labels = draw(k)

    def classified(x: Tensor, p: Tensor) -> Tensor:
        logits = (x @ p.flatten(0, -2).T).view(N, C, -1).amax(2)
        return F.cross_entropy(logits, labels)

    def ours(x: Tensor, p: Tensor) -> Tensor:
        return nf.proxy_softmax_loss(x, p, labels, scale=1.0, normalize=False)

    assert_close(derived(ours, x, proxies), derived(classified, x, proxies))


@pytest.mark.parametrize("margin", ["angle_margin", "cosine_margin"])
def test_there_is_no_margin_without_normalisation(margin: str) -> None:
    x, proxies, labels = draw()
    how: dict[str, Any] = {margin: 0.3, "normalize": False}
    with pytest.raises(ValueError, match="are margins of a cosine, and normalize=False leaves "):
        nf.proxy_softmax_loss(x, proxies, labels, **how)


# Modules that hold the proxies.


def made(module: Any, *sizes: int, **how: Any) -> Any:
    sizes = sizes or (C, D)
    return module(*sizes, generator=torch.Generator().manual_seed(0), **how)


@each_module
def test_proxies_start_as_random_directions(module: Any) -> None:
    loss = made(module, 2000, 6)
    assert isinstance(loss.proxies, nn.Parameter)
    assert loss.proxies.shape == (2000, 6)
    torch.testing.assert_close(loss.proxies.norm(dim=1), torch.ones(2000))
    # No direction is preferred: the mean is near 0, the second moments near 1/6.
    assert loss.proxies.mean(0).abs().max() < 0.05
    second = loss.proxies.T @ loss.proxies / 2000
    torch.testing.assert_close(second, torch.eye(6) / 6, atol=0.02, rtol=0)
    assert torch.equal(loss.proxies, made(module, 2000, 6).proxies)
    assert not torch.equal(loss.proxies, module(2000, 6).proxies)


@each_module
def test_sizes_by_place_or_by_name(module: Any) -> None:
    for loss in (module(4, 3), module(4, dim=3), module(dim=3, n_classes=4)):
        assert loss.proxies.shape == (4, 3)
        assert loss.proxies.dtype == torch.get_default_dtype()
    wide = module(4, 3, dtype=torch.float64, device="cpu")
    assert wide.proxies.dtype == torch.float64
    assert module(4, 3, device="meta").proxies.is_meta
    empty = module(4, 3, device="meta").to_empty(device="cpu")
    empty.reset_parameters(torch.Generator().manual_seed(0))
    assert torch.equal(empty.proxies, made(module, 4, 3).proxies)


def test_several_proxies_of_a_class() -> None:
    loss = nf.ProxySoftmaxLoss(4, 3, sub_centers=2)
    assert loss.proxies.shape == (4, 2, 3)
    torch.testing.assert_close(loss.proxies.norm(dim=2), torch.ones(4, 2))
    said = "4, 3, sub_centers=2, scale=64.0, angle_margin=0.0, cosine_margin=0.0, normalize=True, "
    assert repr(loss) == f"ProxySoftmaxLoss({said}group=None, precision=None, reduction='mean')"
    of_nca = "ProxyNCALoss(4, 3, scale=1.0, group=None, precision=None, reduction='mean')"
    assert repr(nf.ProxyNCALoss(4, 3)) == of_nca


@each_module
def test_training_goes_on_from_a_state_dict(module: Any) -> None:
    x, _, labels = draw(dtype=torch.float32)
    how = {} if module is nf.ProxyAnchorLoss else {"scale": nn.Parameter(torch.tensor(3.0))}
    if how:
        how["sub_centers"] = 2

    def trained(loss: Any, steps: int) -> Any:
        optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(x, labels).backward()
            optimizer.step()
        return loss

    start = made(module, **how)
    before = copy.deepcopy(start)
    loss = trained(start, 3)
    held = {"proxies", "scale"} if how else {"proxies"}
    assert set(loss.state_dict()) == held
    for name in held:
        assert not torch.equal(loss.state_dict()[name], before.state_dict()[name])
    other = {k: nn.Parameter(torch.tensor(1.0)) if k == "scale" else v for k, v in how.items()}
    resumed = module(C, D, **other)
    resumed.load_state_dict(loss.state_dict())
    for goes_on in (trained(loss, 2), trained(resumed, 2)):
        assert goes_on(x, labels) == loss(x, labels) == resumed(x, labels)


@each_module
def test_a_module_moves_with_to(module: Any) -> None:
    x, _, labels = draw(dtype=torch.float32)
    loss = made(module).to(torch.float64)
    assert loss.proxies.dtype == torch.float64
    assert loss(x.double(), labels).dtype == torch.float64
    assert loss.logits(x).dtype == torch.float64
    half = made(module).half()
    value = half(x.half(), labels)
    value.backward()
    assert value.dtype == torch.float32
    assert half.proxies.grad.dtype == torch.float16


@each_module
def test_an_old_call_is_told_what_to_write(module: Any) -> None:
    name, function = module.__name__, module.loss.__name__
    for old in (module, partial(module, scale=20.0), partial(module, 4)):
        with pytest.raises(TypeError) as raised:
            old()
        said = str(raised.value)
        assert said.startswith(f"{name} needs ")
        assert f"loss = nearfar.{name}(n_classes, dim) and loss(x, labels)" in said
        assert f"nearfar.{function}(x, proxies, labels)" in said
        assert "\n" not in said


ERRORS: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    (lambda m: m(4, 3, 2.0), TypeError, r"takes .*scale.* by name; got 2\.0 alone"),
    (lambda m: m(4, n_classes=4, dim=3), TypeError, r"got n_classes twice"),
    (lambda m: m(4, 3, sacle=2.0), TypeError, r"takes n_classes, dim, .*; got sacle"),
    (lambda m: m(0, 3), ValueError, "n_classes must be an integer of at least 1, got 0"),
    (lambda m: m(4, 3.0), ValueError, r"dim must be an integer of at least 1, got 3\.0"),
    (lambda m: m(True, 3), ValueError, "n_classes must be an integer of at least 1, got True"),
    (lambda m: m(4, D)(*draw()[::2]), ValueError, "labels must be a class id from 0 to 3"),
    (lambda m: m(C, 3)(*draw()[::2]), ValueError, "proxies must have rows of length 5"),
    (lambda m: m(C, D).predict(torch.full((2, D), math.inf)), ValueError, r"x\[0\] is not finite"),
]


@pytest.mark.parametrize(("call", "error", "said"), ERRORS)
@each_module
def test_errors_teach(
    module: Any, call: Callable[[Any], Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said) as raised:
        call(module)
    assert "\n" not in str(raised.value)


def test_sub_centers_out_of_range_are_refused() -> None:
    for bad in (0, -1, 2.5):
        with pytest.raises(ValueError, match="sub_centers must be an integer of at least 1, got"):
            nf.ProxySoftmaxLoss(C, D, sub_centers=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [1, 3])
def test_logits_are_what_the_loss_is_a_softmax_of(k: int) -> None:
    x, _, labels = draw()
    scale = nn.Parameter(torch.tensor(7.0, dtype=torch.float64))
    loss = made(nf.ProxySoftmaxLoss, scale=scale, sub_centers=k, dtype=torch.float64)
    torch.testing.assert_close(loss.logits(x), scale * cosines(x, loss.proxies))
    leaves = (x.requires_grad_(), loss.proxies, scale)
    values = loss(x, labels), F.cross_entropy(loss.logits(x), labels)
    ours, theirs = (torch.autograd.grad(value, leaves) for value in values)
    torch.testing.assert_close(*values)
    assert_close(list(ours), list(theirs))


def test_logits_know_no_margin_and_products_no_unit_rows() -> None:
    x, proxies, _ = draw()
    how = {"scale": 2.0, "dtype": torch.float64}
    plain, margin = (made(nf.ProxySoftmaxLoss, angle_margin=m, **how) for m in (0.0, 0.5))
    assert torch.equal(plain.logits(x), margin.logits(x))
    raw = made(nf.ProxySoftmaxLoss, normalize=False, **how)
    raw.load_state_dict({"proxies": proxies})
    torch.testing.assert_close(raw.logits(x), 2 * x @ proxies.T)
    assert torch.equal(raw.predict(x), (x @ proxies.T).argmax(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@each_module
def test_a_prediction_is_the_class_of_the_nearest_proxy(module: Any, dtype: torch.dtype) -> None:
    how = {} if module is nf.ProxyAnchorLoss else {"sub_centers": 3}
    loss = made(module, 50, 8, **how)
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = loss.logits(x).argmax(1)
    with nf.memory_budget(2**16):
        found = loss.predict(x)
    assert torch.equal(found, expected)
    assert found.dtype == torch.int64
    assert not found.requires_grad
    own = loss.proxies.detach().view(-1, 8)
    assert torch.equal(loss.predict(own), torch.arange(len(own)) // (len(own) // 50))
    assert torch.equal(loss.predict(x.float().numpy()), expected)
    assert loss.predict(x[:0]).shape == (0,)
    assert loss.logits(x[:0]).shape == (0, 50)


@each_module
def test_a_zero_row_has_logits_of_0(module: Any) -> None:
    loss, x = made(module), torch.zeros(2, D, requires_grad=True)
    logits = loss.logits(x)
    logits.sum().backward()
    assert not logits.any()
    assert not x.grad.any()
    assert loss.predict(x).tolist() == [0, 0]


def test_autocast_does_not_round_logits() -> None:
    loss, x = made(nf.ProxySoftmaxLoss), draw(dtype=torch.float32)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss.logits(x), loss.logits(x).float())
        found = loss.logits(x), loss.predict(x)
    assert torch.equal(found[0], loss.logits(x))
    assert torch.equal(found[1], loss.predict(x))


def test_a_prediction_holds_no_matrix() -> None:
    x, loss = torch.randn(2048, 16), made(nf.ProxySoftmaxLoss, 1024, 16, sub_centers=2)
    with nf.memory_budget(2**20), Allocations(x, loss.proxies) as allocations:
        loss.predict(x)
    assert allocations.peak <= 2**20 + 4 * (x.nbytes + loss.proxies.nbytes)
    assert allocations.peak < 2048 * 1024


def test_what_is_not_finite_has_no_nearest_class() -> None:
    loss = made(nf.ProxySoftmaxLoss, sub_centers=2)
    x = draw(dtype=torch.float32)[0]
    x[3, 1] = math.nan
    with pytest.raises(ValueError, match=r"x\[3\] is not finite"):
        loss.predict(x)
    assert loss.logits(x)[3].isnan().all()
    with torch.no_grad():
        loss.proxies[4, 1, 0] = math.inf
    with pytest.raises(ValueError, match=r"proxies\[4\] is not finite"):
        loss.predict(x[:3])


@each_module
def test_what_takes_a_loss_takes_a_module_that_holds_proxies(module: Any) -> None:
    x, _, labels = draw()
    loss = made(module, dtype=torch.float64, scale=5.0)
    function = partial(module.loss, scale=5.0)
    expected = nf.explain(module.loss, x, loss.proxies, labels, scale=5.0)
    shown = nf.explain(loss, x, labels)
    assert str(shown) == str(expected)
    assert shown.mean == pytest.approx(function(x, loss.proxies, labels).item())
    assert "proxies" not in shown.hyperparameters
    with_reduction = made(module, dtype=torch.float64, scale=5.0, reduction="sum")
    by_module = nf.forces(with_reduction, x, labels, k=30)
    by_function = nf.forces(module.loss, x, loss.proxies, labels, scale=5.0, k=30, reduction="sum")
    assert str(by_module) == str(by_function)
    with pytest.raises(TypeError, match=r"\(x, proxies, labels\) use nearfar\.explain"):
        nf.doctor.examine(x, labels, loss=loss)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own
def test_a_module_compiles_as_its_function_does() -> None:
    torch._dynamo.reset()
    x, _, labels = draw(dtype=torch.float32)
    loss = made(nf.ProxySoftmaxLoss, sub_centers=2)
    compiled = torch.compile(loss, backend="eager")
    assert torch.equal(compiled(x, labels), loss(x, labels))
