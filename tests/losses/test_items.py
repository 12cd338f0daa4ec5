"""`ids`: rows of one item are no negatives of each other, against a loop over all pairs."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import run
from torch import Tensor
from waits import accelerator

import nearfar as nf
from nearfar.engine.budget import tile_shape

N, D = 9, 5


def drawn(seed: int = 0, hard: int = 0) -> tuple[Tensor, ...]:
    chance = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(N, D, generator=chance, dtype=torch.float64) for _ in range(2 + hard))


ONE = torch.tensor([3, 1, 3, -1, 5, 1, 3, -1, 6])
TWO = torch.stack([ONE, torch.tensor([8, 9, 10, 5, -1, 12, 13, 9, 14])], 1)


def sets(ids: Tensor) -> list[set[int]]:
    return [{i for i in row if i >= 0} for row in ids.reshape(len(ids), -1).tolist()]


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def one_way(q: Tensor, columns: Tensor, row_ids: Tensor, column_ids: Tensor, **how: Any) -> Tensor:
    """(n,) -log of the share of the positive, column i for row i."""
    s = unit(q) @ unit(columns).T / how["temperature"]
    rows, others = sets(row_ids), sets(column_ids)
    losses = []
    for i in range(len(q)):
        far = [s[i, j] for j in range(len(columns)) if j != i and not rows[i] & others[j]]
        terms = far if how.get("decoupled") else [s[i, i], *far]
        losses.append(torch.logsumexp(torch.stack(terms), 0) - s[i, i])
    return torch.stack(losses)


@pytest.mark.parametrize("cut", [None, (2, 3)], ids=["whole", "tiles"])
@pytest.mark.parametrize("ids", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("hard", [0, 1])
def test_info_nce_leaves_rows_of_one_item_out(
    ids: Tensor, symmetric: bool, decoupled: bool, hard: int, cut: tuple[int, int] | None
) -> None:
    leaves = [x.requires_grad_() for x in drawn(hard=hard)]
    q, p, *negatives = leaves
    hard_ids = torch.tensor([6, 3, 99, -1, 12, 0, 8, 5, 1])
    how = {"temperature": 0.3, "decoupled": decoupled}
    more: dict[str, Any] = {"hard_negatives": negatives[0], "hard_ids": hard_ids} if hard else {}
    with tile_shape(*cut) if cut else torch.enable_grad():
        found = nf.info_nce_loss(q, p, ids=ids, symmetric=symmetric, **more, **how)
    of_columns = ids
    if hard:
        wide = ids.reshape(N, -1)
        of_columns = torch.cat([wide, hard_ids[:, None].expand(-1, wide.shape[1])])
    expected = one_way(q, torch.cat([p, *negatives]), ids, of_columns, **how)
    if symmetric:
        expected = (expected + one_way(p, q, ids, ids, **how)) / 2
    torch.testing.assert_close(found, expected.mean(), rtol=1e-12, atol=1e-12)
    gradients = (
        torch.autograd.grad(x, leaves, retain_graph=True) for x in (found, expected.mean())
    )
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_clip_loss_is_info_nce_in_both_directions_with_ids_too() -> None:
    x, y = drawn()
    torch.testing.assert_close(
        nf.clip_loss(x, y, scale=4.0, ids=TWO, reduction="none"),
        nf.info_nce_loss(x, y, temperature=0.25, symmetric=True, ids=TWO, reduction="none"),
    )


def test_siglip_neither_pulls_nor_pushes_rows_of_one_item() -> None:
    x, y = (a.requires_grad_() for a in drawn())
    z, known = 3.0 * unit(x) @ unit(y).T - 1.0, sets(TWO)
    expected = sum(
        torch.nn.functional.softplus(-z[i, j] if i == j else z[i, j])
        for i in range(N)
        for j in range(N)
        if i == j or not known[i] & known[j]
    )
    found = nf.siglip_loss(x, y, scale=3.0, bias=-1.0, ids=TWO)
    torch.testing.assert_close(found, expected / N)
    gradients = (torch.autograd.grad(v, (x, y)) for v in (found, expected / N))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_ids_that_differ_change_nothing() -> None:
    x, y, hard = drawn(hard=1)
    for ids in (torch.arange(N), torch.full((N,), -1), torch.arange(2 * N).reshape(N, 2)):
        for more in ({}, {"hard_negatives": hard, "hard_ids": torch.arange(N) + 100}):
            found = nf.info_nce_loss(x, y, ids=ids, **more)
            more.pop("hard_ids", None)
            assert torch.equal(found, nf.info_nce_loss(x, y, **more))


def test_a_query_whose_rows_are_all_of_its_item_has_a_loss_of_0() -> None:
    x, y = (a.requires_grad_() for a in drawn())
    loss = nf.info_nce_loss(x, y, ids=torch.zeros(N, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert not x.grad.any()


def test_ids_are_copied_for_the_backward_of_each_loss() -> None:
    x, y = drawn()
    x.requires_grad_()
    ids = ONE.clone()
    losses = nf.info_nce_loss(x, y, ids=ids, reduction="none")
    ids.zero_()
    (found,) = torch.autograd.grad(losses.sum(), x)
    (expected,) = torch.autograd.grad(nf.info_nce_loss(x, y, ids=ONE, reduction="sum"), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, ids: nf.info_nce_loss(x, x, hard_negatives=x, ids=ids, hard_ids=ids),
        lambda x, ids: nf.info_nce_loss(x, x, decoupled=True, symmetric=True, ids=ids[:, None]),
        lambda x, ids: nf.clip_loss(x, x, scale=2.0, ids=ids),
        lambda x, ids: nf.siglip_loss(x, x, scale=2.0, bias=0.0, ids=ids),
    ],
    ids=["info_nce", "decoupled", "clip", "siglip"],
)
def test_ids_on_an_accelerator_are_not_waited_for(loss: Callable[..., Tensor]) -> None:
    x = torch.empty(30, 6, device="meta", requires_grad=True)
    with accelerator():
        loss(x, torch.empty(30, dtype=torch.long, device="meta")).backward()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"ids": [0.5] * N}, TypeError, "ids must be integers"),
        ({"ids": [-2] * N}, ValueError, r"ids must be 0 or more, or -1 for none; ids\[0\] is -2"),
        ({"ids": [1, 2]}, ValueError, r"ids must have shape \(9,\)"),
        ({"hard_ids": [1] * N}, ValueError, "pass ids too"),
        ({"ids": [1] * N, "hard_ids": [1] * N}, ValueError, "hard_negatives, which are not given"),
    ],
)
def test_wrong_ids_are_refused(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nf.info_nce_loss(*drawn(), **given)
    x, y, hard = drawn(hard=1)
    with pytest.raises(ValueError, match=r"hard_ids must have shape \(9,\)"):
        nf.info_nce_loss(x, y, hard_negatives=hard, ids=[1] * N, hard_ids=[1])
    with pytest.raises(ValueError, match="symmetric, hard_negatives and ids"):
        nf.info_nce_loss(x, y, hard, ids=[1] * N)


# -- on several processes -------------------------------------------------------------------------


def of_rank(which: str, hard: int, ring: bool) -> tuple[float, Tensor]:
    rank = torch.distributed.get_rank()
    here = slice(0, 4) if rank == 0 else slice(4, N)
    x, y, *more = (a[here].clone().requires_grad_() for a in drawn(hard=hard))
    group = nf.distributed.over("world", ring=True) if ring else "world"
    if which == "clip":
        loss = nf.clip_loss(x, y, scale=4.0, ids=TWO[here], group=group)
    else:
        of_hard = {"hard_negatives": more[0], "hard_ids": ONE[here]} if hard else {}
        loss = nf.info_nce_loss(x, y, ids=TWO[here], **of_hard, group=group)
    loss.backward()
    assert x.grad is not None
    return loss.item(), x.grad / 2


@pytest.mark.slow
@pytest.mark.parametrize("ring", [False, True], ids=["dealt", "ring"])
@pytest.mark.parametrize(("which", "hard"), [("clip", 0), ("info_nce", 0), ("info_nce", 1)])
def test_ids_of_other_processes_count(which: str, hard: int, ring: bool) -> None:
    x, y, *more = drawn(hard=hard)
    x.requires_grad_()
    if which == "clip":
        loss = nf.clip_loss(x, y, scale=4.0, ids=TWO)
    else:
        of_hard = {"hard_negatives": more[0], "hard_ids": ONE} if hard else {}
        loss = nf.info_nce_loss(x, y, ids=TWO, **of_hard)
    loss.backward()
    (value, first), (_, second) = run(2, of_rank, which, hard, ring)
    assert math.isclose(value, loss.item(), rel_tol=1e-12)
    torch.testing.assert_close(torch.cat([first, second]), x.grad, rtol=1e-12, atol=1e-14)
