"""What the processes of a group exchange: rows, sums over all of them, and small numbers.

The only place that calls collectives. The names they had before torch 2.13 are used where it lacks
the new ones.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor

from nearfar.engine.slices import spans

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _named(new: str, old: str) -> Any:
    return getattr(dist, new, None) or getattr(dist, old, None)


_gather = _named("all_gather_single", "all_gather_into_tensor")
_reduce_scatter = _named("reduce_scatter_single", "reduce_scatter_tensor")


class Processes:
    """The processes of a group, seen from one of them.

    Attributes:
        group: torch's group, which lives no longer because of this.
        rank: which of them this one is.
        size: how many there are.
    """

    def __init__(self, group: "ProcessGroup") -> None:
        self._group = ref(group)  # torch keeps it until it is destroyed
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    @property
    def group(self) -> "ProcessGroup":
        found = self._group()
        assert found is not None
        return found

    @property
    def hosts(self) -> "ProcessGroup":
        """The same processes, for what their hosts tell each other without an accelerator."""
        return self.group if "gloo" in dist.get_backend(self.group) else self._hosts

    @cached_property
    def _hosts(self) -> "ProcessGroup":
        ranks = dist.get_process_group_ranks(self.group)
        return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)  # type: ignore[no-any-return]

    def tell(self, numbers: Sequence[int]) -> list[list[int]]:
        """A few numbers of each process, between hosts."""
        own = torch.tensor(numbers, dtype=torch.int64)
        found = own.new_empty(self.size * len(numbers))
        _gather(found, own, group=self.hosts)
        told: list[list[int]] = found.view(self.size, -1).tolist()
        return told

    def tell_any(self, value: object) -> list[Any]:
        """A value of each process, between hosts."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.hosts)
        return found

    def each(self, x: Tensor) -> Tensor:
        """(size, ...) a tensor of each process; all have the same shape."""
        found = x.new_empty((self.size, *x.shape))
        if x.numel():
            to, given = (t.view(torch.uint8) if t.dtype is torch.bool else t for t in (found, x))
            _gather(to.view(-1), given.contiguous().view(-1), group=self._group_of(x))
        return found

    def from_one(self, rank: int, x: Tensor) -> Tensor:
        """What one process has, on all; elsewhere `x` is where it is put."""
        if x.numel():
            source = dist.get_global_rank(self.group, rank)
            dist.broadcast(x, source, group=self._group_of(x))
        return x

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes, the same bits on each."""
        if x.numel() <= 1024:  # in the order of the processes
            return self.each(x).sum(0, dtype=x.dtype)
        found = x.contiguous().clone()
        dist.all_reduce(found, group=self._group_of(x))
        return found

    def before(self, steps: int) -> int:
        """The process so many places before this one, around."""
        return (self.rank - steps) % self.size

    def pass_on(self, x: Tensor, n: int, tag: int = 0) -> "Passing":
        """Send (m, ...) rows to the next process, while n rows come from the one before."""
        sent, coming = x.contiguous(), x.new_empty((n, *x.shape[1:]))
        ops = [
            dist.P2POp(act, tensor, dist.get_global_rank(self.group, peer), self.group, tag)
            for act, tensor, peer in (
                (dist.isend, sent, self.before(-1)),
                (dist.irecv, coming, self.before(1)),
            )
            if tensor.numel()  # both ends know that there is none
        ]
        return Passing(dist.batch_isend_irecv(ops) if ops else [], coming, sent)

    def largest(self, x: Tensor) -> Tensor:
        """The largest over all processes, number by number."""
        found = x.contiguous().clone()
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group_of(x))
        return found

    def _group_of(self, x: Tensor) -> "ProcessGroup":
        return self.hosts if x.is_cpu else self.group


class Passing:
    """A tensor on its way from the process before this one, and another to the one after it."""

    def __init__(self, works: list[Any], coming: Tensor, sent: Tensor) -> None:
        self._works, self._coming, self._sent = works, coming, sent

    def received(self) -> Tensor:
        """What has come, once both are through."""
        for work in self._works:
            work.wait()
        return self._coming


class Split:
    """How the rows of a batch are split over processes.

    Args:
        processes: who they are.
        sizes: how many rows each has.

    Attributes:
        own: those of this process among all.
        n: how many there are.
    """

    def __init__(self, processes: Processes, sizes: Sequence[int]) -> None:
        self.processes, self.sizes, self.most = processes, sizes, max(sizes)
        ends = list(accumulate(sizes))
        self.parts = [slice(end - n, end) for end, n in zip(ends, sizes, strict=True)]
        self.own, self.n = self.parts[processes.rank], ends[-1]

    @property
    def even(self) -> bool:
        """Whether all processes have as many rows."""
        return min(self.sizes) == self.most

    def gather(self, x: Tensor) -> Tensor:
        """(n, ...) the rows of all processes, in their order."""
        if self.even:
            return self.processes.each(x).flatten(0, 1)
        padded = x.new_zeros((self.most, *x.shape[1:]))
        padded[: x.shape[0]] = x
        found = self.processes.each(padded)
        return torch.cat([rows[:n] for rows, n in zip(found, self.sizes, strict=True)])

    def blocks(self, size: int) -> list[slice]:
        """All rows, in slices of at most so many, each of one process."""
        return [
            slice(part.start + at.start, part.start + at.stop)
            for part in self.parts
            for at in spans(part.stop - part.start, size)
        ]

    def block(self, x: Tensor, at: slice) -> Tensor:
        """(b, ...) one of the `blocks`, on all processes; `x` are the rows of this one."""
        owner = next(rank for rank, part in enumerate(self.parts) if at.start < part.stop)
        if owner != self.processes.rank:
            return self.processes.from_one(owner, x.new_empty((at.stop - at.start, *x.shape[1:])))
        own = x[at.start - self.own.start : at.stop - self.own.start]
        return self.processes.from_one(owner, own.contiguous())

    def sum_to_owners(self, x: Tensor) -> Tensor:
        """The rows of this process, of the sum over processes of (n, ...) all rows."""
        given = x.contiguous()
        if not self.even:
            padded = x.new_zeros((len(self.sizes), self.most, *x.shape[1:]))
            for to, at, n in zip(padded, self.parts, self.sizes, strict=True):
                to[:n] = x[at]
            given = padded.flatten(0, 1)
        found = x.new_empty((self.most, *x.shape[1:]))
        if found.numel():
            _reduce_scatter(found.view(-1), given.view(-1), group=self.processes.group)
        return found[: self.sizes[self.processes.rank]]
