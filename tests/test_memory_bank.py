"""A memory bank holds what a concatenation by hand holds, and goes wherever a reference goes."""

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from waits import accelerator, there

import nearfar as nf
from nearfar.distributed import over
from nearfar.registry import LOSSES

DIM, CLASSES = 4, 3
few = settings(max_examples=50, deadline=None)


def batches(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[tuple]:
    """(rows, class ids, items) of each size; the items of all are 0, 1, 2, ..."""
    chance = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, DIM, generator=chance, dtype=torch.float64).to(dtype) for n in sizes]
    labels = [torch.randint(0, CLASSES, (n,), generator=chance) for n in sizes]
    return list(zip(rows, labels, torch.arange(sum(sizes)).split(sizes), strict=True))


def by_hand(added: list[tuple], size: int) -> nf.Reference:
    """The last rows of all batches; `own` names those of the last batch."""
    x, labels = (torch.cat(parts)[-size:] for parts in list(zip(*added, strict=True))[:2])
    n = len(added[-1][0])
    return nf.Reference(x, labels, [max(i, -1) for i in range(len(x) - n, len(x))])


# -- what it holds --------------------------------------------------------------------------------


@few
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 30))
def test_the_last_rows_stay_whatever_the_batches(sizes, size):
    added = batches(*sizes)
    bank = nf.MemoryBank(size, DIM)
    for k, (x, labels, items) in enumerate(added, 1):
        found, true = bank.add(x, labels, ids=items), by_hand(added[:k], size)
        assert torch.equal(found.x, true.x)
        assert torch.equal(found.labels, true.labels)
        assert found.own.tolist() == true.own
    ages = [len(sizes) - 1 - k for k, n in enumerate(sizes) for _ in range(n)]
    assert bank.ages.tolist() == ages[-size:]
    assert bank.ids.tolist() == list(range(sum(sizes)))[-size:]
    assert len(bank) == len(bank.x) == min(sum(sizes), size)
    assert torch.equal(bank.x, torch.cat([x for x, _, _ in added])[-size:])


@few
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_a_bank_with_room_for_all_is_the_concatenation_of_all(sizes):
    added = batches(*sizes)
    bank = nf.MemoryBank(sum(sizes) + 1, DIM)
    for x, labels, _ in added:
        bank.add(x, labels)
    assert torch.equal(bank.x, torch.cat([x for x, _, _ in added]))
    assert torch.equal(bank.labels, torch.cat([labels for _, labels, _ in added]))
    assert bank.own is None


def test_rows_of_the_batch_are_declared_by_position_not_by_value():
    bank = nf.MemoryBank(5, 2)
    same = torch.ones(3, 2)
    assert bank.add(same, [0, 0, 0]).own.tolist() == [0, 1, 2]
    assert bank.add(same, [0, 0, 0]).own.tolist() == [2, 3, 4]
    assert bank.add(same[:1], [0]).own.tolist() == [4]
    assert bank.add(same[:0], torch.zeros(0, dtype=torch.int64)).own.tolist() == []
    assert bank.add(torch.ones(7, 2), [0] * 7).own.tolist() == [-1, -1, 0, 1, 2, 3, 4]


def test_clear_forgets_the_rows_and_begins_anew():
    bank, fresh = nf.MemoryBank(5, DIM), nf.MemoryBank(5, DIM)
    (x, labels, _), (later, more, _) = batches(4, 3)
    bank.add(x, labels)
    bank.clear()
    assert len(bank) == len(bank.x) == len(bank.labels) == len(bank.ids) == len(bank.ages) == 0
    found, true = bank.add(later, more), fresh.add(later, more)
    assert torch.equal(found.x, true.x)
    assert torch.equal(found.own, true.own)
    assert bank.ages.tolist() == [0, 0, 0]


def test_rows_of_the_warm_up_are_not_stored():
    bank = nf.MemoryBank(20, DIM, warm_up=2)
    added = batches(3, 4, 5, 2)
    for x, labels, _ in added[:2]:
        found = bank.add(x, labels)
        assert torch.equal(found.x, x)
        assert torch.equal(found.labels, labels)
        assert found.own.tolist() == list(range(len(x)))
        assert len(bank) == 0
    for k in (3, 4):
        found, true = bank.add(*added[k - 1][:2]), by_hand(added[2:k], 20)
        assert torch.equal(found.x, true.x)
        assert found.own.tolist() == true.own


def test_multi_labels():
    bank = nf.MemoryBank(5, DIM, labels=3)
    labels = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    x = torch.randn(4, DIM)
    bank.add(x, labels)
    bank.add(x[:3], labels[:3])
    assert torch.equal(bank.labels, torch.cat([labels, labels[:3]])[-5:])
    assert nf.sup_con_loss(x, labels, reference=bank) > 0


def test_rows_without_labels():
    bank = nf.MemoryBank(5, DIM, labels=None)
    x = torch.eye(DIM)
    assert bank.add(x).labels is None
    assert nf.mine.hard_negatives(x, None, reference=bank).indices[:, 0].tolist() == [0, 1, 2, 3]
    own = nf.mine.hard_negatives(2 * x, None, reference=bank.add(2 * x)).indices[:, 0]
    assert own.tolist() != list(range(1, 5))
    with pytest.raises(TypeError, match=r"reference\.labels must have a label"):
        nf.sup_con_loss(x, [0, 1, 2, 3], reference=bank)


# -- as a reference -------------------------------------------------------------------------------

HYPER = {"margin": 0.4, "scale": 5.0, "distance": "cosine"}


def taking_references() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every loss, statistic, miner and figure of labelled rows that takes a reference."""
    losses = [loss.function for loss in LOSSES]
    named = [(nf, name) for name in (*losses, "triplet_stats", "quadruplet_stats")]
    named += [(nf.mine, name) for name in nf.mine.__all__]
    named += [(nf.evaluate, "retrieval")]
    for module, name in named:
        function = getattr(module, name)
        if inspect.isclass(function):
            continue
        parameters = inspect.signature(function).parameters
        if "reference" in parameters:
            needed = [k for k, p in parameters.items() if p.default is p.empty]
            settings = {k: HYPER[k] for k in needed if k in HYPER}
            yield name, lambda x, labels, f=function, s=settings, **more: f(x, labels, **s, **more)
    yield (
        "batch_loss",
        lambda x, labels, **more: nf.batch_loss(
            nf.PairRule(torch.square, torch.relu), x, labels, distance="euclidean", **more
        ),
    )


TAKING = dict(taking_references())


def tensors(found: Any) -> list[Tensor]:
    """All tensors of a result, with its numbers."""
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, int | float):
        return [torch.tensor(found)]
    if isinstance(found, dict):
        return [tensor for part in found.values() for tensor in tensors(part)]
    parts = found if isinstance(found, list | tuple) else list(vars(found).values())
    return [tensor for part in parts for tensor in tensors(part)]


def run(function: Callable[..., Any], x: Tensor, labels: Tensor, **more: Any) -> list[Tensor]:
    """The result, and the gradient of the rows if it has one; what is drawn, drawn by seed."""
    torch.manual_seed(0)
    rows = x.clone().requires_grad_()
    found = function(rows, labels, **more)
    if isinstance(found, Tensor) and found.requires_grad:
        found.sum().backward()
        assert rows.grad is not None
        return [found.detach(), rows.grad]
    return tensors(found)


def test_every_kind_is_among_those_that_take_a_reference():
    assert {"sup_con_loss", "batch_quadruplet_loss", "batch_loss", "retrieval"} <= TAKING.keys()
    assert {"triplet_stats", "quadruplet_stats", "hard_negatives", "hard_pairs"} <= TAKING.keys()
    assert len(TAKING) > 20


@pytest.mark.parametrize("name", TAKING)
@pytest.mark.parametrize("size", [40, 20], ids=["with room", "full"])
def test_it_is_the_reference_of_everything_that_takes_one(name, size):
    added = batches(12, 12, 12, dtype=torch.float64)
    bank = nf.MemoryBank(size, DIM, dtype=torch.float64)
    for x, labels, _ in added[:2]:
        bank.add(x, labels)
    x, labels, _ = added[2]
    earlier, function = by_hand(added[:2], size), TAKING[name]
    found = run(function, x, labels, reference=bank)
    true = run(function, x, labels, reference=nf.Reference(earlier.x, earlier.labels))
    assert true
    torch.testing.assert_close(found, true, rtol=0, atol=0, equal_nan=True)
    found = run(function, x, labels, reference=bank.add(x, labels))
    true = run(function, x, labels, reference=by_hand(added, size))
    torch.testing.assert_close(found, true, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [loss.function for loss in LOSSES if loss.function in TAKING])
@pytest.mark.parametrize("reduction", ["mean", "sum", "active", "none"])
def test_an_empty_bank_gives_0_and_no_force(name, reduction):
    ((x, labels, _),) = batches(6)
    loss, gradient = run(
        TAKING[name], x, labels, reference=nf.MemoryBank(9, DIM), reduction=reduction
    )
    assert (loss == 0).all()
    assert (gradient == 0).all()


def test_the_loss_of_the_cross_batch_paper_by_hand():
    """Softmax over all of the memory but the row itself; only the anchors learn."""
    added = batches(5, 5, 5, dtype=torch.float64)
    bank = nf.MemoryBank(12, DIM, dtype=torch.float64)
    for x, labels, _ in added[:2]:
        bank.add(x, labels)
    x, labels, _ = added[2]
    x = x.requires_grad_()
    loss = nf.sup_con_loss(x, labels, reference=bank.add(x, labels), temperature=0.5)
    (gradient,) = torch.autograd.grad(loss, x)

    memory = torch.cat([rows.detach() for rows, _, _ in added])[-12:]
    kinds = torch.cat([labels for _, labels, _ in added])[-12:]
    unit = nn.functional.normalize
    logits = unit(x) @ unit(memory).T / 0.5
    logits = logits.masked_fill(torch.arange(12) == torch.arange(7, 12)[:, None], -math.inf)
    similar = (labels[:, None] == kinds) & logits.isfinite()
    of_pairs = logits.log_softmax(1).where(similar, 0).sum(1) / similar.sum(1)
    true = -of_pairs[similar.any(1)].mean()
    torch.testing.assert_close(loss, true)
    torch.testing.assert_close(gradient, torch.autograd.grad(true, x)[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_may_be_added_before_the_backward_pass(reduction):
    (x, labels, _), (y, more, _) = batches(8, 8)
    found = []
    for early in (False, True):
        bank = nf.MemoryBank(8, DIM)
        bank.add(y, more)
        leaf = x.clone().requires_grad_()
        loss = nf.sup_con_loss(leaf, labels, reference=bank, reduction=reduction).sum()
        loss = loss + nf.info_nce_loss(leaf, x.flip(0), bank.x, reduction=reduction).sum()
        if early:
            bank.add(leaf, labels)
        loss.backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("warm_up", [0, 1])
def test_what_add_returned_stays_as_it_is(warm_up):
    (x, labels, _), (y, more, _) = batches(4, 4)
    bank = nf.MemoryBank(4, DIM, warm_up=warm_up)
    rows, kinds = x.clone(), labels.clone()
    first = bank.add(rows, kinds)
    rows.zero_(), kinds.fill_(7)
    bank.add(y, more)
    assert torch.equal(first.x, x)
    assert torch.equal(first.labels, labels)


def test_no_row_of_a_bank_gets_a_gradient():
    ((x, labels, _),) = batches(6)
    bank, warm = nf.MemoryBank(9, DIM), nf.MemoryBank(9, DIM, warm_up=1)
    for made in (bank, warm):
        assert not made.add(x.requires_grad_(), labels).x.requires_grad
    assert not bank.x.requires_grad
    assert list(bank.parameters()) == []


def test_rows_added_in_inference_mode_can_be_compared_with():
    (x, labels, _), (y, more, _) = batches(6, 6)
    bank = nf.MemoryBank(9, DIM)
    with torch.inference_mode():
        bank.add(x * 1, labels)
    rows = y.requires_grad_()
    nf.info_nce_loss(rows, y.detach().flip(0), bank.x).backward()
    nf.sup_con_loss(rows, more, reference=bank, reduction="none").sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_batches_of_another_dtype_do_not_change_that_of_the_bank(dtype):
    """Such as those under autocast, between some that are not."""
    (x, labels, _), (y, more, _) = batches(6, 6)
    bank = nf.MemoryBank(9, DIM)
    bank.add(x, labels)
    bank.add(y.to(dtype), more)
    assert bank.x.dtype == torch.float32
    assert torch.equal(bank.x, torch.cat([x, y.to(dtype).float()])[-9:])
    rows = x.to(dtype).requires_grad_()
    nf.sup_con_loss(rows, labels, reference=bank).backward()
    assert rows.grad.dtype == dtype


def test_under_autocast():
    network = nn.Linear(DIM, DIM)
    bank, plain = nf.MemoryBank(9, DIM), nf.MemoryBank(9, DIM)
    for x, labels, _ in batches(6, 6):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = network(x)
            assert y.dtype == torch.bfloat16
            reference = bank.add(y, labels)
            nf.sup_con_loss(y, labels, reference=reference).backward()
        plain.add(y.float(), labels)
    assert bank.x.dtype == torch.float32
    assert torch.equal(bank.x, plain.x)


def test_a_bank_of_16_bits():
    ((x, labels, _),) = batches(6)
    bank = nf.MemoryBank(9, DIM, dtype=torch.bfloat16)
    loss = nf.sup_con_loss(x, labels, reference=bank.add(x, labels))
    assert bank.x.dtype == torch.bfloat16
    true = nf.sup_con_loss(x, labels, reference=nf.Reference(x.bfloat16(), labels, range(6)))
    assert torch.equal(loss, true)


# The compiler itself asks for the gradient of every tensor that it meets.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("both", [False, True], ids=["earlier batches", "the batch too"])
def test_the_same_under_torch_compile(both):
    network = nn.Linear(DIM, DIM)
    banks = [nf.MemoryBank(70, DIM) for _ in range(2)]

    def step(x: Tensor, labels: Tensor, bank: nf.MemoryBank) -> Tensor:
        y = network(x)
        loss = nf.sup_con_loss(y, labels, reference=bank.add(y, labels) if both else bank)
        if not both:
            bank.add(y, labels)
        return loss

    torch._dynamo.reset()
    # A bank that fills does not compile anew each time.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=not both):
        compiled = torch.compile(step, backend="eager")
        for x, labels, _ in batches(*[6] * 15):
            found, true = compiled(x, labels, banks[0]), step(x, labels, banks[1])
            torch.testing.assert_close(found, true)
    assert torch.equal(banks[0].x, banks[1].x)


@pytest.mark.parametrize("labels", ["ids", CLASSES])
def test_on_an_accelerator_the_host_does_not_wait(labels):
    bank = nf.MemoryBank(9, DIM, labels=labels, device="meta")
    (x, ids, items), _ = batches(6, 6)
    known = there(ids if labels == "ids" else nn.functional.one_hot(ids, CLASSES).bool())
    rows, items = there(x, learned=True), there(items)
    with accelerator():
        for _ in range(3):
            reference = bank.add(rows, known, ids=items)
            loss = nf.sup_con_loss(rows, known, reference=reference)
            (loss + nf.sup_con_loss(rows, known, reference=bank)).backward()
    assert (len(bank), bank.ages.shape) == (9, (9,))


# -- resumed --------------------------------------------------------------------------------------


@few
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 8), st.integers(0, 3))
def test_a_resumed_run_continues_bit_for_bit(sizes, stop, warm_up):
    def made() -> nf.MemoryBank:
        return nf.MemoryBank(7, DIM, warm_up=warm_up)

    added, whole, first, second = batches(*sizes), made(), made(), made()
    for x, labels, items in added[:stop]:
        for bank in (whole, first):
            bank.add(x, labels, ids=items)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for x, labels, items in added[stop:]:
        found, true = (bank.add(x, labels, ids=items) for bank in (second, whole))
        assert torch.equal(found.own, true.own)
        assert torch.equal(found.x, true.x)
    assert second.additions == whole.additions == len(sizes)
    for name in ("x", "labels", "ids", "ages"):
        assert torch.equal(getattr(second, name), getattr(whole, name)), name


def test_a_checkpoint_needs_no_pickled_code(tmp_path):
    bank, other = (nn.ModuleDict({"bank": nf.MemoryBank(5, DIM)}) for _ in range(2))
    for x, labels, _ in batches(3, 4):
        bank["bank"].add(x, labels)
    torch.save(bank.state_dict(), tmp_path / "bank.pt")
    other.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
    assert torch.equal(other["bank"].x, bank["bank"].x)
    assert all(isinstance(value, Tensor) for value in bank.state_dict().values())
    with pytest.raises(RuntimeError, match="size mismatch"):
        nf.MemoryBank(6, DIM).load_state_dict(bank["bank"].state_dict())


def test_it_moves_and_copies_like_any_module():
    ((x, labels, _),) = batches(3)
    bank = nf.MemoryBank(5, DIM)
    bank.add(x, labels)
    twin = copy.deepcopy(bank).double()
    twin.add(x, labels)
    assert twin.x.dtype == torch.float64
    assert (len(bank), len(twin)) == (3, 5)
    assert nf.MemoryBank(5, DIM, device="meta").x.device.type == "meta"


# -- drift ----------------------------------------------------------------------------------------


def test_drift_by_hand():
    (x, _, items), (y, _, _) = batches(6, 6, dtype=torch.float64)
    bank = nf.MemoryBank(20, DIM, labels=None, dtype=torch.float64)
    bank.add(x, ids=items)
    bank.add(x[:2].flip(0), ids=[0, 1])  # the newest row of an item counts
    bank.add(y)
    asked = torch.tensor([5, 0, 77, 3, 1])
    now = torch.cat([y[:2], y[2:3], y[3:5]])
    drift = bank.drift(now, asked)
    then = torch.stack([x[5], x[1], x[3], x[0]])
    cosine = nn.functional.cosine_similarity(then[:, None], now[[0, 1, 3, 4]], dim=2)
    assert drift.n == 4
    assert drift.mean == pytest.approx(1 - cosine.diagonal().mean().item())
    others = cosine[~torch.eye(4, dtype=torch.bool)]
    assert drift.apart == pytest.approx(1 - others.mean().item())
    assert drift.age == pytest.approx((2 + 1 + 2 + 1) / 4)


def test_drift_of_the_same_network_is_0_and_small_drifts_keep_their_digits():
    ((x, labels, items),) = batches(32)
    bank = nf.MemoryBank(40, DIM)
    bank.add(x, labels, ids=items)
    assert bank.drift(x, items).mean < 1e-13
    assert bank.drift(3 * x[::2], items[::2]).mean < 1e-13
    turned = x.clone()
    turned[:, 0] += 1e-4 * x[:, 1]
    cosine = nn.functional.cosine_similarity(x.double(), turned.double())
    assert bank.drift(turned, items).mean == pytest.approx(1 - cosine.mean().item(), rel=1e-2)


def test_drift_of_what_is_not_stored():
    ((x, labels, items),) = batches(4)
    bank = nf.MemoryBank(40, DIM)
    assert bank.drift(x, items).n == 0
    bank.add(x, labels)  # without ids
    none = bank.drift(x, items)
    assert none.n == 0
    assert math.isnan(none.mean)
    assert bank.drift(x, [-1, -1, -1, -1]).n == 0
    bank.add(x[:1], labels[:1], ids=[3])
    assert bank.drift(x, items).n == 1
    assert math.isnan(bank.drift(x, items).apart)


# -- the slow copy --------------------------------------------------------------------------------


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, 5), nn.BatchNorm1d(5), nn.Linear(5, DIM))


def test_momentum_update_by_hand():
    source = network().double()
    target = copy.deepcopy(source).requires_grad_(False)
    slow = [p.clone() for p in target.parameters()]
    for _ in range(3):
        with torch.no_grad():
            for p in source.parameters():
                p.add_(torch.randn_like(p))
        source(torch.randn(8, DIM, dtype=torch.float64))
        nf.momentum_update(target, source, 0.9)
        slow = [0.9 * a + 0.1 * b.detach() for a, b in zip(slow, source.parameters(), strict=True)]
    torch.testing.assert_close(list(target.parameters()), slow)
    for name, buffer in source.named_buffers():
        assert torch.equal(target.get_buffer(name), buffer), name
    assert target[1].num_batches_tracked.item() == 3


def test_momentum_0_copies_and_1_keeps():
    source, target = network(), network()
    before = [p.detach().clone() for p in target.parameters()]
    nf.momentum_update(target, source, 1.0)
    assert all(map(torch.equal, before, target.parameters()))
    nf.momentum_update(target, source, 0.0)
    assert all(map(torch.equal, source.parameters(), target.parameters()))
    assert all(p.grad is None and p.requires_grad for p in target.parameters())


def test_a_source_of_16_bits_has_a_target_of_32():
    source, target = network().bfloat16(), network()
    before = target[0].weight.detach().clone()
    nf.momentum_update(target, source, 0.75)
    true = 0.75 * before + 0.25 * source[0].weight.detach().float()
    torch.testing.assert_close(target[0].weight.detach(), true)
    assert target[0].weight.dtype == torch.float32
    with pytest.raises(
        TypeError, match=r"target\.0\.weight is torch\.bfloat16, in which small steps"
    ):
        nf.momentum_update(source, target)
    nf.momentum_update(source, target, 0.0)
    assert torch.equal(source[0].weight, target[0].weight.bfloat16())


def test_parameters_that_are_no_floats_are_copied_and_a_module_without_any_is_fine():
    source, target = nn.Module(), nn.Module()
    for module, value in ((source, 5), (target, 3)):
        module.count = nn.Parameter(torch.tensor([value]), requires_grad=False)
    nf.momentum_update(target, source)
    assert target.count.item() == 5
    nf.momentum_update(nn.ReLU(), nn.ReLU())


def test_networks_that_differ_are_refused_by_the_first_name():
    source = network()
    with pytest.raises(ValueError, match="target must be a copy of source"):
        nf.momentum_update(source, source)
    wider = nn.Sequential(nn.Linear(DIM, 5), nn.BatchNorm1d(5), nn.Linear(5, 9))
    before = [p.detach().clone() for p in wider.parameters()]
    with pytest.raises(
        ValueError, match=r"of '2\.weight', target has one of shape \(9, 5\) and sou"
    ):
        nf.momentum_update(wider, source)
    assert all(map(torch.equal, before, wider.parameters()))
    with pytest.raises(ValueError, match=r"of '0\.weight', target has one .* and source none"):
        nf.momentum_update(source, nn.ModuleDict({"module": source}))
    with pytest.raises(ValueError, match=r"of '1\.running_mean', target has none"):
        nf.momentum_update(nn.Sequential(source[0], nn.LayerNorm(5), source[2]), source)
    with pytest.raises(ValueError, match=r"momentum must be a number from 0 to 1, got 1\.5"):
        nf.momentum_update(network(), source, 1.5)


def test_moco_by_hand():
    """Keys of the slow network are stored; the bank holds negatives of earlier batches."""
    torch.manual_seed(0)
    fast = nn.Linear(DIM, DIM)
    slow = copy.deepcopy(fast).requires_grad_(False)
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
    bank, queue = nf.MemoryBank(10, DIM, labels=None), torch.zeros(0, DIM)
    unit = nn.functional.normalize
    for _ in range(4):
        views = torch.randn(2, 6, DIM)
        nf.momentum_update(slow, fast, 0.9)
        query, key = fast(views[0]), slow(views[1])
        loss = nf.info_nce_loss(query, key, bank.x, temperature=0.2)
        bank.add(key)
        positive = (unit(query) * unit(key)).sum(1, keepdim=True)
        logits = torch.cat([positive, unit(query) @ unit(queue).T], 1) / 0.2
        true = nn.functional.cross_entropy(logits, torch.zeros(6, dtype=torch.int64))
        torch.testing.assert_close(loss, true)
        queue = torch.cat([queue, key])[-10:]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# -- errors ---------------------------------------------------------------------------------------


def test_errors_teach():
    bank = nf.MemoryBank(5, DIM)
    x = torch.zeros(2, DIM)
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="size must be an integer of at least 1"):
            nf.MemoryBank(wrong, DIM)
        with pytest.raises(ValueError, match="dim must be an integer of at least 1"):
            nf.MemoryBank(5, wrong)
    with pytest.raises(ValueError, match="labels must be an integer of at least 1, got 'id'"):
        nf.MemoryBank(5, DIM, labels="id")
    with pytest.raises(
        ValueError, match="warm_up must be a number of additions, 0 or more; got -1"
    ):
        nf.MemoryBank(5, DIM, warm_up=-1)
    with pytest.raises(TypeError, match='group must be "world", a torch'):
        nf.MemoryBank(5, DIM, group="nccl")
    with pytest.raises(
        TypeError, match="labels must be as the bank was made, labels='ids'; got no"
    ):
        bank.add(x)
    with pytest.raises(TypeError, match=r"labels='ids'; got torch\.bool of shape \(2, 3\)"):
        bank.add(x, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="labels=None; got labels"):
        nf.MemoryBank(5, DIM, labels=None).add(x, [0, 1])
    with pytest.raises(ValueError, match="got 3 labels for 2 rows"):
        bank.add(x, [0, 1, 2])
    with pytest.raises(
        ValueError, match=r"x must have rows of length 4, as the bank was made; got"
    ):
        bank.add(torch.zeros(2, 3), [0, 1])
    with pytest.raises(
        ValueError, match=r"and the bank on cpu; move the bank once: bank\.to\('meta"
    ):
        bank.add(x.to("meta"), [0, 1])
    with pytest.raises(
        ValueError, match="ids must be integers from 0, such as rows of the data set"
    ):
        bank.add(x, [0, 1], ids=[3, -1])
    assert (len(bank), bank.additions) == (0, 0)


# -- several processes ----------------------------------------------------------------------------

SIZES = [(3, 2), (0, 4), (5, 0), (0, 0), (1, 6)]  # rows of each process in each step


def share(step: int, rank: int, labels: str) -> tuple[Tensor, Tensor, Tensor]:
    """What a process adds in a step."""
    x, ids, items = batches(SIZES[step][rank], seed=10 * step + rank)[0]
    known = nn.functional.one_hot(ids, CLASSES).bool() if labels == "multi" else ids
    return x, known, items + 100 * rank


def same_bank() -> None:
    """Two processes have the same bank, which is that of one with the rows of both."""
    rank, everyone = dist.get_rank(), dist.group.WORLD
    alone = dist.new_group([rank], use_local_synchronization=True)
    groups = (("ids", "world"), ("multi", everyone), ("ids", alone), ("ids", over(everyone)))
    for labels, group in groups:
        kind = {"labels": CLASSES if labels == "multi" else "ids", "warm_up": 1}
        bank = nf.MemoryBank(9, DIM, group=group, **kind)
        one = nf.MemoryBank(9, DIM, **kind)
        for step in range(len(SIZES)):
            shares = [share(step, k, labels) for k in ((rank,) if group is alone else (0, 1))]
            x, known, items = share(step, rank, labels)
            found = bank.add(x.requires_grad_(), known, ids=items)
            rows, ids, numbers = (torch.cat(parts) for parts in zip(*shares, strict=True))
            true = one.add(rows, ids, ids=numbers)
            assert torch.equal(found.x, true.x)
            assert torch.equal(found.labels, true.labels)
            mine = (
                slice(0, len(x)) if group is alone or rank == 0 else slice(len(rows) - len(x), None)
            )
            assert torch.equal(found.own, true.own[mine])
        assert torch.equal(bank.ids, one.ids)
        assert torch.equal(bank.ages, one.ages)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        bank = nf.MemoryBank(9, DIM, labels=None, group="world", dtype=dtype)
        whole = torch.arange(3 * DIM, dtype=torch.float64).reshape(3, DIM)
        assert torch.equal(bank.add(whole[rank : 2 * rank + 1]).x, whole.to(dtype))


@pytest.mark.slow  # on several processes
def test_the_bank_is_the_same_on_every_process():
    processes.run(2, same_bank)


def there_is_one_row() -> dict[str, Any]:
    """The state of a bank."""
    bank = nf.MemoryBank(5, DIM)
    bank.add(torch.ones(1, DIM), [0])
    return bank.state_dict()


def refused_on_both() -> list[str]:
    """The errors of banks that one process uses in a wrong way, after which both go on."""
    rank = dist.get_rank()
    x, labels = torch.ones(2, DIM), [0, 1]
    bank = nf.MemoryBank(5, DIM, group="world")
    filled = nf.MemoryBank(5, DIM, group="world")
    if rank:
        filled.load_state_dict(there_is_one_row())
    cleared = nf.MemoryBank(5, DIM, group="world")
    cleared.add(x, labels)
    if rank:
        cleared.clear()
    errors = []
    for wrong in (
        lambda: bank.add(x, [0.5, 1.0] if rank else labels),
        lambda: bank.add(x[:, : DIM - rank], labels),
        lambda: nf.MemoryBank(5 + rank, DIM, group="world").add(x, labels),
        lambda: nf.sup_con_loss(x, labels, group="world") if rank else bank.add(x, labels),
        lambda: filled.add(x, labels),
        lambda: cleared.add(x, labels),
    ):
        with pytest.raises((TypeError, ValueError)) as error:
            wrong()
        errors.append(str(error.value))
    assert len(bank.add(x, labels).x) == 4
    once = nf.MemoryBank(5, DIM, group=over("world", handshake="first"))
    for _ in range(2):
        once.add(x, labels)
    assert len(once.group.known) == 1  # what changes in each step is not told
    return errors


def test_a_wrong_argument_of_one_process_is_refused_on_all():
    first, second = processes.run(2, refused_on_both)
    assert first == second
    for error, said in zip(
        first,
        (
            "process 1: labels must be",
            "process 1: x must have rows of length 4",
            "size is 5 on process 0 and 6 on process 1; all processes must call the same function",
            "function is added_to_bank on process 0 and sup_con_loss on process 1",
            "additions is 0 on process 0 and 1 on process 1",
            "stored rows is 4 on process 0 and 0 on process 1",
        ),
        strict=True,
    ):
        assert said in error


def test_a_bank_may_be_made_before_its_processes_know_each_other():
    bank = nf.MemoryBank(5, DIM, group="world")
    with pytest.raises(RuntimeError, match="start them with torchrun"):
        bank.add(torch.ones(2, DIM), [0, 1])


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(DIM, 3), nn.Linear(3, 2))


def followed(children: bool) -> None:
    """A sharded network follows one that is sharded alike, whatever forward came before."""
    slow, fast = two_layers(), two_layers()
    with torch.no_grad():
        for p in fast.parameters():
            p.add_(1)
    plain, true = copy.deepcopy(slow), copy.deepcopy(slow)
    nf.momentum_update(true, fast, 0.5)
    for model in (slow, fast):
        for part in model if children else ():
            fully_shard(part)
        fully_shard(model)
    for target, source in ((plain, fast), (fast, plain)):
        with pytest.raises(ValueError, match=r"must be sharded alike; '0\.weight' is in") as error:
            nf.momentum_update(target, source)
        assert "target = copy.deepcopy(source), fully_shard(target)" in str(error.value)
    with torch.no_grad():
        slow(torch.zeros(1, DIM))  # whole until the next backward, were it not resharded
    nf.momentum_update(slow, fast, 0.5)
    for p, right in zip(slow.parameters(), true.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), right)


@pytest.mark.parametrize("children", [False, True])
def test_momentum_update_of_what_fully_shard_shards(children):
    processes.run(2, followed, children)
