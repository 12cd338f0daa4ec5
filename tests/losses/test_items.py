"""`ids`: rows of one item are no negatives of each other, against a loop over all pairs."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from processes import run
from torch import Tensor
from waits import accelerator

import nearfar as nf
from nearfar.engine.budget import tile_shape
from nearfar.engine.relation import repeat_in

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


def test_hard_negatives_without_ids_are_other_items() -> None:
    x, y, hard = drawn(hard=1)
    found = nf.info_nce_loss(x, y, hard_negatives=hard, ids=torch.arange(N))
    assert torch.equal(found, nf.info_nce_loss(x, y, hard_negatives=hard))


def test_unsigned_ids_are_the_ids_they_are() -> None:
    x, y = drawn()
    ids = ONE.clamp(min=0)
    found = nf.info_nce_loss(x, y, ids=ids.numpy().astype(np.uint64))
    assert torch.equal(found, nf.info_nce_loss(x, y, ids=ids))


@pytest.mark.parametrize(
    ("ids", "repeat"),
    [
        ([[1, 1], [2, 3]], False),
        ([[-1], [-1]], False),
        ([[1, 2], [3, 1]], True),
        ([[1], [1]], True),
    ],
    ids=["within a row", "none", "other places", "two rows"],
)
def test_an_id_repeats_where_two_rows_have_it(ids: list[list[int]], repeat: bool) -> None:
    assert repeat_in(torch.tensor(ids)).item() is repeat


@pytest.mark.parametrize("wide", [False, True], ids=["one", "several"])
def test_a_batch_without_rows_may_have_ids(wide: bool) -> None:
    x = torch.zeros(0, 4, requires_grad=True)
    ids = torch.zeros((0, 2) if wide else (0,), dtype=torch.int64)
    hard = {"hard_negatives": torch.zeros(0, 4), "hard_ids": torch.zeros(0, dtype=torch.int64)}
    for loss in (
        nf.info_nce_loss(x, x, ids=ids),
        nf.info_nce_loss(x, x, ids=ids, symmetric=True, **hard),
        nf.clip_loss(x, x, scale=2.0, ids=ids),
        nf.siglip_loss(x, x, scale=2.0, bias=0.0, ids=ids),
    ):
        assert loss.item() == 0


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
        ({"ids": [True] * N}, TypeError, "ids must be integers, .* got torch.bool"),
        ({"ids": [-2] * N}, ValueError, r"ids must be 0 or more, or -1 for none; ids\[0\] is -2"),
        ({"ids": [1, 2]}, ValueError, r"ids must have shape \(9,\), .* got \(2,\)"),
        ({"ids": 3}, ValueError, r"ids must have shape \(9,\), .* got \(\)"),
        ({"ids": torch.ones(N, 0).long()}, ValueError, r"ids must have shape .* got \(9, 0\)"),
        ({"ids": torch.ones(N, 1, 1).long()}, ValueError, r"ids must have shape .* \(9, 1, 1\)"),
        (
            {"ids": np.full(N, 2**63 + 5, np.uint64)},
            ValueError,
            r"ids must be below 2\*\*63; ids\[0\] is 9223372036854775813",
        ),
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
    for more in ({"ids": [1] * N}, {"hard_ids": [1] * N}):
        with pytest.raises(ValueError, match="symmetric, hard_negatives, ids and hard_ids work"):
            nf.info_nce_loss(x, y, hard, **more)
    several = hard[:, None].expand(-1, 2, -1)
    with pytest.raises(
        ValueError, match=r"hard_ids must be 0 or more, .*; hard_ids\[1\] is \[4, -3"
    ):
        nf.info_nce_loss(
            x, y, hard_negatives=several, ids=ONE, hard_ids=[[4, 4], [4, -3]] + [[4, 4]] * (N - 2)
        )


# -- on several processes -------------------------------------------------------------------------


def of_rank(which: str, hard: int, ring: bool, first: int) -> tuple[float, Tensor]:
    rank = torch.distributed.get_rank()
    here = slice(0, first) if rank == 0 else slice(first, N)
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
@pytest.mark.parametrize(
    ("which", "hard", "first"),
    [("clip", 0, 4), ("info_nce", 0, 4), ("info_nce", 1, 4), ("info_nce", 1, 0)],
    ids=["clip", "info_nce", "hard", "a process without rows"],
)
def test_ids_of_other_processes_count(which: str, hard: int, first: int, ring: bool) -> None:
    x, y, *more = drawn(hard=hard)
    x.requires_grad_()
    if which == "clip":
        loss = nf.clip_loss(x, y, scale=4.0, ids=TWO)
    else:
        of_hard = {"hard_negatives": more[0], "hard_ids": ONE} if hard else {}
        loss = nf.info_nce_loss(x, y, ids=TWO, **of_hard)
    loss.backward()
    (value, first), (_, second) = run(2, of_rank, which, hard, ring, first)
    assert math.isclose(value, loss.item(), rel_tol=1e-12)
    torch.testing.assert_close(torch.cat([first, second]), x.grad, rtol=1e-12, atol=1e-14)
