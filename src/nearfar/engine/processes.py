"""What the processes of a group exchange: rows, sums over all of them, and small numbers.

The only place that calls collectives. The names they had before torch 2.13 are used where it lacks
the new ones.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pickle import dumps, loads
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor

from nearfar.engine.slices import spans

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


PrefixStore: Any = getattr(dist, "PrefixStore", None)  # where torch was built without it


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

    @cached_property
    def _sends_from_cpu(self) -> bool:
        """Whether the group can send what is in a host's memory."""
        return "cpu:gloo" in dist.get_backend_config(self.group)

    @cached_property
    def _board(self) -> "_Board":
        return _Board(self)

    def tell(self, numbers: Sequence[int]) -> list[list[int]]:
        """A few numbers of each process, without an accelerator."""
        if not self._sends_from_cpu:
            return self._board.tell(list(numbers))
        own = torch.tensor(numbers, dtype=torch.int64)
        told: list[list[int]] = self.each(own).tolist()
        return told

    def tell_any(self, value: object) -> list[Any]:
        """A value of each process, likewise."""
        if not self._sends_from_cpu:
            return self._board.tell(value)
        found: list[Any] = [None] * self.size
        with self.explained():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def each(self, x: Tensor) -> Tensor:
        """(size, ...) a tensor of each process; all have the same shape."""
        given = self._reachable(x)
        found = given.new_empty((self.size, *x.shape))
        if x.numel():
            to, given = (
                t.view(torch.uint8) if t.dtype is torch.bool else t for t in (found, given)
            )
            with self.explained():
                _gather(to.view(-1), given.contiguous().view(-1), group=self.group)
        return found.to(x.device)

    def from_one(self, rank: int, x: Tensor) -> Tensor:
        """What one process has, on all; elsewhere `x` is where it is put."""
        if not x.numel():
            return x
        given, source = self._reachable(x), dist.get_global_rank(self.group, rank)
        with self.explained():
            dist.broadcast(given, source, group=self.group)
        return given.to(x.device)

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes, the same bits on each."""
        if x.numel() <= 1024:  # in the order of the processes
            return self.each(x).sum(0, dtype=x.dtype)
        return self._reduced(x, dist.ReduceOp.SUM)

    def sum_of_parts(self, x: Tensor) -> Tensor:
        """(n, ...) this process's part of the sum over all, from (size * n, ...)."""
        given = self._reachable(x).contiguous()
        found = given.new_empty((x.shape[0] // self.size, *x.shape[1:]))
        if found.numel():
            with self.explained():
                _reduce_scatter(found.view(-1), given.view(-1), group=self.group)
        return found.to(x.device)

    def before(self, steps: int) -> int:
        """The process so many places before this one, around."""
        return (self.rank - steps) % self.size

    def pass_on(self, x: Tensor, n: int, tag: int = 0) -> "Passing":
        """Send (m, ...) rows to the next process, while n rows come from the one before.

        NCCL knows no tags: there all processes must send in the same order.
        """
        sent, coming = x.contiguous(), x.new_empty((n, *x.shape[1:]))
        ops = [
            dist.P2POp(act, tensor, dist.get_global_rank(self.group, peer), self.group, tag)
            for act, tensor, peer in (
                (dist.isend, sent, self.before(-1)),
                (dist.irecv, coming, self.before(1)),
            )
            if tensor.numel()  # both ends know that there is none
        ]
        with self.explained():
            return Passing(self, dist.batch_isend_irecv(ops) if ops else [], coming, sent)

    def largest(self, x: Tensor) -> Tensor:
        """The largest over all processes, number by number."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def _reduced(self, x: Tensor, how: Any) -> Tensor:
        found = self._reachable(x).contiguous().clone()
        with self.explained():
            dist.all_reduce(found, how, group=self.group)
        return found.to(x.device)

    def _reachable(self, x: Tensor) -> Tensor:
        """A tensor where the group can send it: NCCL alone takes none of a host's memory."""
        return x.cuda() if x.is_cpu and not self._sends_from_cpu else x

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Say what an error of a collective means."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"process {self.rank} lost another process of the group, which has ended, has "
                "failed in this step, or does not answer within the group's timeout: look at the "
                "output of the others. All processes must call the same functions in the same "
                "order."
            ) from error


class _Board:
    """What processes tell each other by the store that they met with, where no backend can."""

    def __init__(self, processes: Processes) -> None:
        self._rank, self._size = processes.rank, processes.size
        everything = dist.distributed_c10d._get_default_store()
        store = PrefixStore(f"nearfar/{processes.group.group_name}", everything)
        # The store may have seen a group of the same name before, which was destroyed.
        before = (store.add("joined", 1) - 1) // self._size
        self._store, self._told = PrefixStore(str(before), store), 0

    def tell(self, value: Any) -> list[Any]:
        """A value of each process."""
        self._store.set(f"{self._told}/{self._rank}", dumps(value))
        keys = [f"{self._told}/{rank}" for rank in range(self._size)]
        self._store.wait(keys)
        found = [loads(self._store.get(key)) for key in keys]
        if self._told:  # all have read what was told before, or they would not tell this
            self._store.delete_key(f"{self._told - 1}/{self._rank}")
        self._told += 1
        return found


class Passing:
    """A tensor on its way from the process before this one, and another to the one after it."""

    def __init__(
        self, processes: Processes, works: list[Any], coming: Tensor, sent: Tensor
    ) -> None:
        self._processes, self._works = processes, works
        self._coming, self._sent = coming, sent

    def received(self) -> Tensor:
        """What has come, once both are through."""
        with self._processes.explained():
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
        return self.processes.sum_of_parts(given)[: self.sizes[self.processes.rank]]
