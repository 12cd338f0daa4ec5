"""similarity=: losses of similarities on other ones than the inner product."""

from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from allocations import Allocations
from torch import Tensor

import nearfar as nf
from nearfar.engine.budget import tile_shape

N = 14


def draw() -> tuple[Tensor, Tensor, Tensor]:
    chance = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, N, 5, generator=chance, dtype=torch.float64).unbind()
    labels = torch.randperm(N, generator=chance) % 4
    return x.requires_grad_(), y.requires_grad_(), labels


def negated(a: Tensor, b: Tensor) -> Tensor:
    return -(a[:, None] - b).square().sum(-1)


def kinds(labels: Tensor) -> tuple[Tensor, Tensor]:
    same = labels[:, None] == labels
    return same & ~torch.eye(len(labels), dtype=torch.bool), ~same


def log_sum(z: Tensor, where: Tensor) -> Tensor:
    return z.masked_fill(~where, -inf).logsumexp(1)


# Each by definition, of the matrix of similarities.


def sup_con(s: Tensor, labels: Tensor, t: Tensor) -> Tensor:
    near, far = kinds(labels)
    z, count = s / t, near.sum(1)
    losses = log_sum(z, near | far) - (z * near).sum(1) / count
    return losses[count > 0].mean()


def nt_xent(s: Tensor, labels: Tensor, t: Tensor) -> Tensor:
    near, far = kinds(labels)
    z = s / t
    return (torch.logaddexp(z, log_sum(z, far)[:, None]) - z)[near].mean()


def nca(s: Tensor, labels: Tensor, t: Tensor) -> Tensor:
    near, far = kinds(labels)
    some = near.any(1)
    return (log_sum(s / t, near | far) - log_sum(s / t, near))[some].mean()


def multi_similarity(s: Tensor, labels: Tensor, t: Tensor) -> Tensor:
    near, far = kinds(labels)
    pull = F.softplus(log_sum(-2 * (s - 0.5), near)) / 2
    return (pull + F.softplus(log_sum(50 * (s - 0.5), far)) / 50).mean()


def circle(s: Tensor, labels: Tensor, t: Tensor) -> Tensor:
    near, far = kinds(labels)
    push = 4 * (s.detach() + 0.25).relu() * (s - 0.25)
    pull = -4 * (1.25 - s.detach()).relu() * (s - 0.75)
    both = near.any(1) & far.any(1)
    return F.softplus(log_sum(push, far) + log_sum(pull, near))[both].mean()


def info_nce(s: Tensor, labels: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(s / t, torch.arange(N))


def clip(s: Tensor, labels: Tensor, t: Tensor) -> Tensor:
    return (info_nce(s, labels, t) + info_nce(s.T, labels, t)) / 2


def siglip(s: Tensor, labels: Tensor, t: Tensor) -> Tensor:
    z = s / t - 1
    return -F.logsigmoid(torch.where(torch.eye(N, dtype=torch.bool), z, -z)).sum() / N


Definition = Callable[[Tensor, Tensor, Tensor], Tensor]
BATCH: dict[str, tuple[Callable[..., Tensor], Definition]] = {
    "sup_con": (lambda x, c, t, **how: nf.sup_con_loss(x, c, temperature=t, **how), sup_con),
    "nt_xent": (lambda x, c, t, **how: nf.nt_xent_loss(x, c, temperature=t, **how), nt_xent),
    "nca": (lambda x, c, t, **how: nf.nca_loss(x, c, scale=1 / t, **how), nca),
    "multi_similarity": (
        lambda x, c, t, **how: nf.multi_similarity_loss(x, c, **how) + 0 * t,
        multi_similarity,
    ),
    "circle": (lambda x, c, t, **how: nf.circle_loss(x, c, scale=4.0, **how) + 0 * t, circle),
}
TOWERS: dict[str, tuple[Callable[..., Tensor], Definition]] = {
    "info_nce": (lambda x, y, t, **how: nf.info_nce_loss(x, y, temperature=t, **how), info_nce),
    "clip": (lambda x, y, t, **how: nf.clip_loss(x, y, scale=1 / t, **how), clip),
    "siglip": (lambda x, y, t, **how: nf.siglip_loss(x, y, scale=1 / t, bias=-1.0, **how), siglip),
}


def agree(found: Tensor, true: Tensor, *leaves: Tensor) -> None:
    torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-11)
    ours, theirs = (
        torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)
        for loss in (found, true)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


HOW = [
    ("sqeuclidean", True),
    ("sqeuclidean", False),
    ("cosine", False),
    ("inner_product", True),
    ("inner_product", False),
]


def similarities(similarity: str, normalize: bool, a: Tensor, b: Tensor) -> Tensor:
    if normalize or similarity == "cosine":
        a, b = F.normalize(a), F.normalize(b)
    return negated(a, b) if similarity == "sqeuclidean" else a @ b.T


@pytest.mark.parametrize(("similarity", "normalize"), HOW)
@pytest.mark.parametrize("name", [*BATCH, *TOWERS])
def test_by_definition(name: str, similarity: str, normalize: bool) -> None:
    x, y, labels = draw()
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    (loss, definition), other = {**BATCH, **TOWERS}[name], x if name in BATCH else y
    data = (x, labels if name in BATCH else y)
    s = similarities(similarity, normalize, x, other)
    with tile_shape(5, 4):
        found = loss(*data, t, similarity=similarity, normalize=normalize)
        leaves = (x, t) if other is x else (x, y, t)
        agree(found, definition(s, labels, t), *leaves)


@pytest.mark.parametrize("shape", ["shared", "each"])
@pytest.mark.parametrize("normalize", [True, False])
def test_against_listed_negatives(normalize: bool, shape: str) -> None:
    x, y, _ = draw()
    chance = torch.Generator().manual_seed(1)
    more = torch.randn(*((6,) if shape == "shared" else (N, 6)), 5, generator=chance).double()
    a, b, c = (F.normalize(v, dim=-1) if normalize else v for v in (x, y, more))
    far = -(a[:, None] - c).square().sum(-1)
    z = torch.cat([-(a - b).square().sum(1, keepdim=True), far], 1) / 0.3
    true = F.cross_entropy(z, torch.zeros(N, dtype=torch.long))
    found = nf.info_nce_loss(
        x, y, more, temperature=0.3, similarity="sqeuclidean", normalize=normalize
    )
    agree(found, true, x, y)


def test_with_a_reference_and_with_pairs() -> None:
    x, y, labels = draw()
    how = {"similarity": "sqeuclidean", "normalize": False}
    other = torch.cat([x, y])
    own = nf.Reference(other, torch.cat([labels, labels]), own=torch.arange(N))
    near = (labels[:, None] == torch.cat([labels, labels])) & ~torch.eye(N, 2 * N).bool()
    far = labels[:, None] != torch.cat([labels, labels])
    z = negated(x, other) / 0.5
    true = (log_sum(z, near | far) - (z * near).sum(1) / near.sum(1)).mean()
    agree(nf.sup_con_loss(x, labels, temperature=0.5, reference=own, **how), true, x, y)
    pairs = near.nonzero(), far.nonzero()
    found = nf.sup_con_loss(x, labels, temperature=0.5, reference=own, pairs=pairs, **how)
    agree(found, true, x, y)


@pytest.mark.parametrize("by", [0.0, 1e-30, 1e-18, 1e18, 1e38])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", [*BATCH, *TOWERS])
def test_finite_rows_never_give_nan(name: str, normalize: bool, by: float) -> None:
    # They multiply similarities, or square them: as with products, float32 cannot hold those.
    if not normalize and by > {"multi_similarity": 1e18, "circle": 1e9}.get(name, inf):
        pytest.skip("more than float32 can hold")
    x, y, labels = draw()
    x, y = ((v.detach() / v.abs().max() * by).float().requires_grad_() for v in (x, y))
    loss, _ = {**BATCH, **TOWERS}[name]
    data = (x, labels if name in BATCH else y)
    value = loss(*data, torch.tensor(0.1), similarity="sqeuclidean", normalize=normalize)
    assert not value.isnan()
    if by <= 1e18 or normalize:
        assert not torch.autograd.grad(value, x)[0].isnan().any()


@pytest.mark.parametrize("bad", [inf, -inf, float("nan")])
@pytest.mark.parametrize("normalize", [True, False])
def test_rows_that_are_not_finite_are_seen(normalize: bool, bad: float) -> None:
    x, _, labels = draw()
    with torch.no_grad():
        x[3, 1] = bad
    how = {"similarity": "sqeuclidean", "normalize": normalize}
    assert nf.sup_con_loss(x, labels, **how).isnan()
    assert nf.info_nce_loss(x, x.flip(0), x[:4], **how).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_lifted(dtype: torch.dtype) -> None:
    x, _, labels = draw()
    rows = x.detach().to(dtype).requires_grad_()
    t = torch.tensor([0.3], dtype=torch.float64)
    found = nf.sup_con_loss(rows, labels, temperature=t, similarity="sqeuclidean")
    assert found.dtype is torch.float32
    wide = nf.sup_con_loss(rows.double(), labels, temperature=0.3, similarity="sqeuclidean")
    torch.testing.assert_close(found.double(), wide, rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(found, rows)[0].dtype is dtype


def test_near_rows_far_from_0_keep_their_distances() -> None:
    x, _, labels = draw()
    shifted = (x.detach().float() * 0.01 + 100).requires_grad_()
    true = nf.sup_con_loss(shifted.double(), labels, similarity="sqeuclidean", normalize=False)
    found = nf.sup_con_loss(shifted, labels, similarity="sqeuclidean", normalize=False)
    torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_listed_negatives_that_nearly_equal_their_query_keep_their_digits(size: float) -> None:
    x, _, _ = draw()
    x = (size * F.normalize(x.detach())).float()
    chance = torch.Generator().manual_seed(2)
    near, far = (x + 1e-4 * size * torch.randn(x.shape, generator=chance) for _ in range(2))
    how = {"temperature": 1e-7 * size**2, "similarity": "sqeuclidean", "normalize": False}
    rows = [v.requires_grad_() for v in (x, near, far)]
    found = nf.info_nce_loss(*rows, **how, reduction="none")
    wide = [v.double() for v in rows]
    true = nf.info_nce_loss(wide[0], wide[1], wide[2].expand(N, N, 5), **how, reduction="none")
    torch.testing.assert_close(found.double(), true, rtol=1e-3, atol=1e-3)
    ours, theirs = (torch.autograd.grad(v.sum(), rows) for v in (found, true))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs[0].abs().max()))


def test_observers_see_the_similarity_itself() -> None:
    x, _, labels = draw()
    how = {"similarity": "sqeuclidean", "temperature": 0.1, "normalize": False}
    shown = nf.forces(nf.sup_con_loss, x, labels, k=20, **how)
    true = negated(x, x)[shown.anchor, shown.other].detach()
    torch.testing.assert_close(shown.closeness, true)
    # A force is minus the derivative by the similarity.
    s = negated(x, x).detach().requires_grad_()
    t = torch.tensor(0.1, dtype=torch.float64)
    (force,) = torch.autograd.grad(sup_con(s, labels, t), s)
    torch.testing.assert_close(shown.force, -force[shown.anchor, shown.other])


def test_memory_is_linear() -> None:
    peaks = []
    for n in (1000, 2000):
        x, labels = torch.randn(n, 16, requires_grad=True), torch.arange(n) // 4
        with nf.memory_budget(2**20), Allocations(x) as made:
            nf.sup_con_loss(x, labels, similarity="sqeuclidean").backward()
        peaks.append(made.peak)
    assert peaks[1] <= 2.3 * peaks[0]


@pytest.mark.parametrize("name", [*BATCH, *TOWERS])
def test_an_unknown_similarity_is_refused(name: str) -> None:
    x, y, labels = draw()
    loss, _ = {**BATCH, **TOWERS}[name]
    run = partial(loss, x, labels if name in BATCH else y, torch.tensor(0.5))
    bad: Any
    for bad in ("dot", "euclidean", None):
        with pytest.raises(ValueError, match=r"similarity must be one of 'inner_product', 'cos"):
            run(similarity=bad)
