"""Cached gradients with DistributedDataParallel and FSDP2, on real processes over gloo."""

import warnings
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from processes import run
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import nearfar as nf
from nearfar.engine.processes import Split

pytestmark = pytest.mark.slow  # on several processes

LABELS = torch.arange(40) % 5


class Net(nn.Module):
    """An encoder with a branch for some rows only, and a scale that the loss uses."""

    def __init__(self, branched=True):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 8))
        self.branch = nn.Linear(8, 8) if branched else None
        self.head = nn.Linear(8, 4)
        self.register_buffer("centre", torch.zeros(5))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.double()

    def forward(self, x):
        h = self.trunk(x - self.centre)
        chosen = x[:, 0] > 0.5
        if self.branch and chosen.any():
            h = torch.where(chosen[:, None], self.branch(h), h)
        return self.head(h)


def batch(rank, n):
    """Rows of which the last chunks need no branch."""
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(rank + 1), dtype=torch.float64)
    return x[x[:, 0].argsort(descending=True)]


def loss_of(net, z, others=None):
    value = nf.sup_con_loss(z, LABELS[: len(z)], temperature=0.3) * net.scale
    return value if others is None else value + nf.clip_loss(z, others, scale=2.0)


def in_chunks(encode, x, size):
    return torch.cat([encode(x[i : i + size]) for i in range(0, max(len(x), 1), size)])


def averaged(net, steps):
    """What a plain step on each process gives: the mean of the gradients of all."""
    for p in net.parameters():
        total = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        dist.all_reduce(total)
        p.grad = total / dist.get_world_size()
    return [p.grad for p in net.parameters()]


def counted(ddp):
    """Counts how often each bucket is reduced."""
    buckets = []

    def hook(group, bucket):
        buckets.append(bucket.index())
        return allreduce_hook(group, bucket)

    ddp.register_comm_hook(None, hook)
    return buckets


def assert_same(found, expected, tolerance=1e-12):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


OPTIONS = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
}


def ddp_steps(options, sizes, chunk, towers=1):
    """Steps of a DDP module with cached gradients against plain steps, from the same numbers."""
    rank = dist.get_rank()
    net, twin = Net(), Net()
    ddp = DistributedDataParallel(net, bucket_cap_mb=0.0003, **options)
    buckets = counted(ddp)
    for step in range(4):
        x, y = batch(rank, sizes[rank]), batch(rank + 10, sizes[rank])
        for module in (net, twin):
            module.zero_grad()
        torch.manual_seed(step + 50 * rank)
        z = [in_chunks(twin, inputs, chunk) for inputs in (x, y)[:towers]]
        plain = loss_of(twin, *z)
        plain.backward()
        expected = averaged(twin, step)
        buckets.clear()
        torch.manual_seed(step + 50 * rank)
        value = nf.cached_backward(
            (ddp,) * towers, (x, y)[:towers], partial(loss_of, net), chunk_size=chunk
        )
        assert value.item() == pytest.approx(plain.item(), rel=1e-12)
        assert_same([p.grad for p in net.parameters()], expected)
        if step == 0 and ddp.static_graph:  # which also learns its graph
            assert sorted(buckets) == sorted(2 * list(set(buckets)))
        else:
            assert len(buckets) == len(set(buckets)) > (1 if step else 0), buckets
        with torch.no_grad():
            for module in (net, twin):
                for p in module.parameters():
                    p -= 0.1 * p.grad
    return buckets


@pytest.mark.parametrize("towers", [1, 2])
@pytest.mark.parametrize("options", OPTIONS)
def test_ddp_reduces_each_bucket_once_and_its_gradients_are_those_of_a_plain_step(options, towers):
    run(2, ddp_steps, OPTIONS[options], (9, 9), 3, towers)


@pytest.mark.parametrize("sizes", [(9, 2), (0, 7), (5, 12)], ids=str)
@pytest.mark.parametrize("options", ["plain", "unused"])
def test_processes_may_have_different_numbers_of_chunks_or_no_rows(options, sizes):
    run(2, ddp_steps, OPTIONS[options], sizes, 3, 2)


def branch_of_one_process(options):
    """Only process 0 uses the branch, in its first chunk."""
    rank = dist.get_rank()
    net, twin = Net(), Net()
    ddp = DistributedDataParallel(net, **options)
    x = batch(rank, 9)
    if rank == 1:
        x[:, 0] = -1
    net.eval(), twin.eval()
    loss_of(twin, twin(x)).backward()
    nf.cached_backward(ddp, x, partial(loss_of, net), chunk_size=3)
    assert_same([p.grad for p in net.parameters()], averaged(twin, 0))


def test_a_branch_that_one_process_uses_in_its_first_chunk_is_reduced():
    run(2, branch_of_one_process, {"find_unused_parameters": True})


def two_ddp_towers():
    """Each module reduces with the last chunk of its own; encoders are functions."""
    rank = dist.get_rank()
    nets, twins = [Net(), Net()], [Net(), Net()]
    ddps = [DistributedDataParallel(net) for net in nets]
    buckets = [counted(ddp) for ddp in ddps]
    first, second = ddps
    x, y = batch(rank, 9), batch(rank + 10, 7 + rank)

    def loss(nets, a, b):
        return loss_of(nets[0], a) + loss_of(nets[1], b)

    for step in range(3):
        for net in (*nets, *twins):
            net.zero_grad()
        torch.manual_seed(step)
        loss(twins, in_chunks(twins[0], x, 2), in_chunks(twins[1], y, 3)).backward()
        torch.manual_seed(step)
        nf.cached_backward(
            (lambda x: first(x) * 1.0, second.forward),
            (x, y),
            partial(loss, nets),
            chunk_size=(2, 3),
        )
        for net, twin in zip(nets, twins, strict=True):
            assert_same([p.grad for p in net.parameters()], averaged(twin, 0))
    return [len(count) for count in buckets]


def test_two_modules_reduce_each_with_its_own_last_chunk():
    assert run(2, two_ddp_towers) == [[3, 3]] * 2


def one_of_two_by_name():
    """Each encoder names both modules and calls one; the loss leaves the second one out."""
    rank = dist.get_rank()
    nets, twins = [Net().eval(), Net().eval()], [Net().eval(), Net().eval()]
    both = nn.ModuleList([DistributedDataParallel(net) for net in nets])
    buckets = [counted(ddp) for ddp in both]
    x, y = batch(rank, 9), batch(rank + 10, 9)
    for _ in range(3):
        for net in (*nets, *twins):
            net.zero_grad()
        loss_of(twins[0], twins[0](x)).backward()
        nf.cached_backward(
            (lambda x: both[0](x), lambda x: both[1](x)),
            (x, y),
            lambda z, _: loss_of(nets[0], z),
            chunk_size=4,
        )
        for net, twin in zip(nets, twins, strict=True):
            assert_same([p.grad for p in net.parameters()], averaged(twin, 0))
    return [len(count) for count in buckets]


def test_who_is_called_decides_when_a_module_reduces_and_nobody_waits_for_what_is_left_out():
    assert run(2, one_of_two_by_name) == [[3, 3]] * 2


def compiled(inside):
    rank = dist.get_rank()
    net, twin = Net().eval(), Net().eval()
    compile = partial(torch.compile, backend="eager", dynamic=True)
    ddp = DistributedDataParallel(compile(net) if inside else net)
    buckets = counted(ddp)
    encode = ddp if inside else compile(ddp)
    for step in range(3):
        net.zero_grad(), twin.zero_grad(), buckets.clear()
        x = batch(rank + 10 * step, 9)
        loss_of(twin, twin(x)).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler
            nf.cached_backward(encode, x, partial(loss_of, net), chunk_size=3)
        assert_same([p.grad for p in net.parameters()], averaged(twin, 0))
        assert buckets == [0]


@pytest.mark.parametrize("inside", [True, False])
def test_compiled_modules(inside):
    run(2, compiled, inside)


def accumulated(options):
    """Two calls a step, of which the caller's no_sync leaves the first unreduced."""
    rank = dist.get_rank()
    net, twin = Net().eval(), Net().eval()
    ddp = DistributedDataParallel(net, **options)
    buckets = counted(ddp)
    for step in range(3):
        net.zero_grad(), twin.zero_grad()
        for part in range(2):
            x = batch(rank + 5 * part, 8)
            loss_of(twin, twin(x)).backward()
            buckets.clear()
            with nullcontext() if part else ddp.no_sync():
                nf.cached_backward(ddp, x, partial(loss_of, net), chunk_size=3)
            learns = ddp.static_graph and step == part == 0
            assert len(buckets) == (1 if learns else part)
        assert_same([p.grad for p in net.parameters()], averaged(twin, 0))


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_accumulate_under_the_callers_no_sync(options):
    run(2, accumulated, OPTIONS[options])


def gathered_in_the_loss(sizes):
    """The loss has a collective, and is called once on each process."""
    rank = dist.get_rank()
    net, calls = Net().eval(), []
    ddp = DistributedDataParallel(net)

    def loss(z):
        calls.append(len(z))
        total = torch.tensor(float(len(z)))
        dist.all_reduce(total)
        assert total.item() == sum(sizes)
        return loss_of(net, z)

    for _ in range(3):
        nf.cached_backward(ddp, batch(rank, sizes[rank]), loss, chunk_size=2)
    assert calls == [sizes[rank]] * 3


def test_a_loss_may_hold_collectives():
    run(2, gathered_in_the_loss, (7, 0))
    run(3, gathered_in_the_loss, (1, 9, 4))


def sharded_steps(sizes, reshard):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
    # FSDP2 itself needs every parameter to have a gradient on all processes, or on none.
    twin, net = (Net(branched=min(sizes) > 3) for _ in range(2))
    for module in (net, twin):
        module.scale = None
    net.register_parameter("scale", None)
    for inner in (net.trunk, net.head):
        fully_shard(inner, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(net, mesh=mesh, reshard_after_forward=reshard)
    scatter = "reduce_scatter_single"  # before torch 2.13, another name
    scatter = scatter if hasattr(dist, scatter) else "reduce_scatter_tensor"

    def loss(z):
        return nf.sup_con_loss(z, LABELS[: len(z)], temperature=0.3)

    for step in range(3):
        x = batch(rank, sizes[rank])
        net.zero_grad(), twin.zero_grad()
        torch.manual_seed(step + 50 * rank)
        loss(in_chunks(twin, x, 3)).backward()
        torch.manual_seed(step + 50 * rank)
        with patch.object(dist, scatter, wraps=getattr(dist, scatter)) as reduced:
            nf.cached_backward(lambda x: net(x), x, loss, chunk_size=3)
        found = [p.grad.full_tensor() for p in net.parameters()]
        assert_same(found, averaged(twin, step))
    return reduced.call_count


@pytest.mark.parametrize("sizes", [(9, 9), (9, 2), (0, 7)], ids=str)
@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp2_reduces_each_group_once_and_its_gradients_are_those_of_a_plain_step(sizes, reshard):
    groups = 3 if min(sizes) > 3 else 2  # the third holds the branch
    assert run(2, sharded_steps, sizes, reshard) == [groups] * 2


def whole_batch(sizes, fsdp):
    """Cached gradients of a loss over all processes, and how often it gathered the rows."""
    from torch.distributed.fsdp import fully_shard

    rank, net = dist.get_rank(), Net(branched=False).eval()
    scale = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    if fsdp:
        net.scale.requires_grad_(False)  # no dimension to shard
        fully_shard(net, ignored_params={net.scale})
    encode = net if fsdp else DistributedDataParallel(net)
    gathered = []
    gather = Split.gather

    def watched(split, x):
        gathered.append(x.shape)
        return gather(split, x)

    with patch.object(Split, "gather", watched):
        loss = nf.cached_backward(
            (encode, encode),
            (batch(rank, sizes[rank]), batch(rank + 10, sizes[rank])),
            partial(nf.clip_loss, scale=scale, group="world"),
            chunk_size=3,
        )
    wide = [shape for shape in gathered if len(shape) == 2]
    found = [p.grad for name, p in net.named_parameters() if name != "scale"]
    found = [g.full_tensor() if fsdp else g for g in found]
    return loss, [*found, scale.grad], len(wide)


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
def test_a_loss_over_all_processes_gathers_once_and_has_the_gradients_of_one(fsdp):
    sizes = 8, 5
    net, scale = Net(branched=False).eval(), torch.tensor([3.0], dtype=torch.float64)
    scale.requires_grad_()
    x, y = (torch.cat([batch(r + k, n) for r, n in enumerate(sizes)]) for k in (0, 10))
    true = nf.clip_loss(net(x), net(y), scale=scale)
    true.backward()
    expected = [p.grad for name, p in net.named_parameters() if name != "scale"]
    for loss, found, gathers in run(2, whole_batch, sizes, fsdp):
        torch.testing.assert_close(loss, true.detach(), rtol=1e-12, atol=0)
        assert_same(found, [*expected, scale.grad])
        assert gathers == 1
