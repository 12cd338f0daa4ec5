"""Batches of P classes x K items for contrastive losses, dealt to one or several processes.

`ClassBatches` draws them from a data set whose labels are known, `StreamedClassBatches` from a
stream. Both first form the batch of all processes, and then deal it. So the batches depend on the
seed and the epoch alone, no item is with two processes, every process takes the same number of
steps, and a run may go on with another number of processes.

Hand a loader with these batches to the training loop as it is: `accelerator.prepare(loader)`, and
Lightning unless `use_distributed_sampler=False`, would deal each batch a second time.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from numbers import Integral
from operator import itemgetter
from random import Random
from typing import Any, Literal, TypeVar
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from nearfar.distributed.class_plan import Ints, chunks_drawn, meet, number_of_batches
from nearfar.engine.meeting import Group, as_over, processes_of
from nearfar.inputs import ArrayLike, one_of, positive_integer, switch, tensor
from nearfar.labels import class_ids

__all__ = ["ClassBatches", "StreamedClassBatches"]

Short = Literal["keep", "repeat", "drop"]
Split = Literal["classes", "items"]
T = TypeVar("T")


class ClassBatches:
    """Batches of P classes x K items that cover a data set, for `DataLoader(batch_sampler=...)`.

    The items of a class are shuffled and cut into chunks of K. Every batch takes one chunk from
    each of P different classes, at random. An epoch has as few batches as can hold all chunks:
    their number divided by P, rounded up, or the chunks of the largest class where these are more.
    What batches then lack is drawn again:

    - items of a class, where its last chunk has fewer than K: at most K - 1 a class;
    - chunks, spread evenly over the classes: fewer than P in an epoch, unless the largest class
      decides the number of batches, each of which then needs P - 1 other classes beside it.

    The items of a class are drawn equally often, up to one. No batch has an item twice, except
    with `short="repeat"`.

    With `group`, the number of batches is the same on every process, and P and K are those of the
    batch of all processes. Call `set_epoch` on all of them before every epoch; without it each
    epoch has the same batches.

    Args:
        labels: (n,) the class of each item of the data set, any integers.
        classes: P, the classes of a batch; with `group`, at least the number of processes.
        items: K, the items of a class in a batch.
        short: what to do with a class of fewer than K items. "keep" takes what is there, so that a
            class of one item serves as a negative only. "repeat" repeats its items up to K, each of
            them a positive of itself: for items that are augmented at random. "drop" leaves the
            class out.
        drop_last: draw no chunk twice, and leave out those that fill no batch, other ones in each
            epoch: fewer than P, unless a few classes have most of them.
        split: how a batch is dealt to the processes. "classes" gives each of them whole classes,
            whose positives are then together even for a loss without `group`. "items" gives each
            some items of most classes, so that batch normalisation sees them all. A loss with
            `group` is the same with both.
        seed: together with the epoch it decides every batch; an integer of at least 0.
        group: the processes that share each batch: "world", a process group, a dimension of a
            DeviceMesh, or `nearfar.distributed.over(...)` of one. None: this process has all of it,
            also where there are others.

    Raises:
        TypeError: `labels` are no integers.
        ValueError: an argument out of range; there are fewer than P classes, or fewer classes in a
            batch than processes.
        RuntimeError: `group` is given, and torch.distributed is not in use.

    >>> batches = ClassBatches([0, 0, 0, 1, 1, 2, 2, 2, 2], classes=2, items=2)
    >>> len(batches)
    3
    >>> for batch in batches:
    ...     print(batch)
    [8, 7, 0, 1]
    [1, 2, 4, 3]
    [2, 0, 5, 6]
    """

    def __init__(
        self,
        labels: ArrayLike,
        *,
        classes: int,
        items: int,
        short: Short = "keep",
        drop_last: bool = False,
        split: Split = "classes",
        seed: int = 0,
        group: Group | None = None,
    ) -> None:
        self._classes = positive_integer("classes", classes)
        self._items = positive_integer("items", items)
        one_of("short", short, Short)
        self._repeat = short == "repeat"
        self._seed = _at_least_0("seed", seed)
        self._share = _share(group, split, self._classes)
        given = tensor("labels", labels)
        ids = class_ids(given, like=given).numpy(force=True)
        _, class_of, sizes = np.unique(ids, return_inverse=True, return_counts=True)
        large = sizes >= (items if short == "drop" else 1)
        if large.sum() < classes:
            few = f" of at least {items} items" if short == "drop" else ""
            raise ValueError(
                f"classes must be at most the number of classes{few} in labels, "
                f"{large.sum()}; got {classes}."
            )
        # Items class after class, those of classes that are left out not among them.
        by_class = np.argsort(class_of, kind="stable")
        self._rows: Ints = by_class[large[class_of[by_class]]]
        self._sizes: Ints = sizes[large]
        self._chunks: Ints = -(-self._sizes // self._items)
        drop_last = switch("drop_last", drop_last)
        self._length = number_of_batches(self._chunks, self._classes, drop_last=drop_last)
        self._settings = {
            "labels": f"{len(ids)} with checksum {crc32(ids.tobytes())}",
            "classes": self._classes,
            "items": self._items,
            "short": short,
            "drop_last": drop_last,
            "seed": self._seed,
        }
        self._epoch = self._start = self._done = 0

    def __len__(self) -> int:
        """The number of batches of a whole epoch."""
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        """The share of this process in each batch: positions in the data set, class after class."""
        start, self._start = self._start, 0
        rows, classes, numbers = self._plan()
        begins = self._sizes.cumsum() - self._sizes
        within = np.arange(self._items)
        for k in range(start, self._length):
            self._done = k + 1
            size = self._sizes[classes[k], None]
            at = (numbers[k, :, None] * self._items + within) % size
            drawn = rows[begins[classes[k], None] + at].tolist()
            if not self._repeat:
                drawn = [one[:n] for one, n in zip(drawn, size[:, 0], strict=True)]
            yield self._share.of(drawn)

    def _plan(self) -> tuple[Ints, Ints, Ints]:
        """An epoch: the rows of each class in random order, and `meet`."""
        random = np.random.default_rng([self._seed, self._epoch])
        shuffled = random.permutation(len(self._rows))
        class_of = np.repeat(np.arange(len(self._sizes)), self._sizes)
        rows = self._rows[shuffled[np.argsort(class_of[shuffled], kind="stable")]]
        drawn = chunks_drawn(self._chunks, self._classes, self._length, random)
        return rows, *meet(drawn, self._length, random)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0 on. One that was loaded goes on from where it was."""
        if _at_least_0("epoch", epoch) != self._epoch:
            self._epoch, self._start, self._done = int(epoch), 0, 0

    def state_dict(self, done: int | None = None) -> dict[str, Any]:
        """Where in the epoch the training is; it is the same on every process.

        Args:
            done: how many batches of this epoch have been trained on, before a resumption too. A
                DataLoader with workers draws batches ahead, so it must be given there. None: as
                many as have been drawn.
        """
        done = self._done if done is None else _at_least_0("done", done)
        if done > self._length:
            raise ValueError(f"done must be at most {self._length}, the batches; got {done}.")
        return {"epoch": self._epoch, "done": done, "settings": dict(self._settings)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: the next iteration yields the batches that were not done.

        The number of processes may be another.

        Raises:
            ValueError: the state is of other labels or settings.
        """
        _check_settings(state, self._settings)
        self._epoch, self._start = state["epoch"], state["done"]
        self._done = self._start


class StreamedClassBatches(IterableDataset[list[Any]]):
    """Batches of P classes x K items from a stream, each item once.

    A buffer is filled with items of the stream. Whenever it is full, a batch leaves it: K random
    items of each of P random classes that have as many. Where there are fewer such classes, those
    with the most items make up for them with fewer than K, the ones that waited longest first; this
    is rare in a buffer that is large for the number of classes. What is in the buffer when the
    stream ends leaves it in the same way. No item is drawn twice.

    Pass it to `DataLoader(batches, batch_size=None, collate_fn=...)`, where `collate_fn` makes a
    batch of a list of items; `torch.utils.data.default_collate` is the usual one.

    Every process, and every worker of its DataLoader, reads the whole stream and forms the same
    batches; the workers take turns, and yield the share of their process. So an item is with one
    process only, and all take the same number of steps, without a message between them. Reading
    should therefore be cheap: let the stream yield paths or bytes, and decode them in `collate_fn`,
    which gets only what is used.

    Call `set_epoch` on every process before each epoch; without it each epoch has the same batches.

    Args:
        dataset: the stream. It must give the same items in the same order to every process and
            worker; where it splits itself by `get_worker_info`, use at most one worker. If it has
            `set_epoch`, this is called with the epoch before it is read.
        classes: P, the classes of a batch; with `group`, at least the number of processes.
        items: K, the items of a class in a batch.
        buffer: how many items each process and worker holds, at least P K. Several items for each
            class of the stream make full batches likely.
        label: where the class of an item is: its key or index, as in `item[label]`, or a function
            of the item.
        drop_last: leave out what is in the buffer once the stream has ended and no full batch is
            left.
        split: as in `ClassBatches`. A batch with fewer classes than processes is always dealt by
            items, and one with fewer items than processes is left out.
        seed: together with the epoch and the stream it decides every batch; an integer of at least
            0.
        group: as in `ClassBatches`.

    Raises:
        TypeError: a label cannot be hashed.
        ValueError: an argument out of range.
        RuntimeError: `group` is given, and torch.distributed is not in use.

    >>> stream = [("a", 0), ("b", 0), ("c", 1), ("d", 1), ("e", 0), ("f", 2)]
    >>> for batch in StreamedClassBatches(stream, classes=2, items=2, buffer=5):
    ...     print(batch)
    [('c', 1), ('d', 1), ('b', 0), ('e', 0)]
    [('a', 0), ('f', 2)]
    """

    def __init__(
        self,
        dataset: "IterableDataset[Any] | Sequence[Any]",
        *,
        classes: int,
        items: int,
        buffer: int,
        label: str | int | Callable[[Any], Hashable] = 1,
        drop_last: bool = False,
        split: Split = "classes",
        seed: int = 0,
        group: Group | None = None,
    ) -> None:
        self._dataset = dataset
        self._label_of = label if callable(label) else itemgetter(label)
        self._settings = {
            "classes": positive_integer("classes", classes),
            "items": positive_integer("items", items),
            "buffer": positive_integer("buffer", buffer),
            "drop_last": switch("drop_last", drop_last),
            "seed": _at_least_0("seed", seed),
        }
        if buffer < classes * items:
            raise ValueError(
                f"buffer must hold a batch, classes x items = {classes * items}; got {buffer}."
            )
        self._share = _share(group, split, classes)
        # The epoch and where it starts, in memory that workers which live on see too.
        self._position = torch.zeros(2, dtype=torch.int64)
        self._position.share_memory_()  # type: ignore[no-untyped-call]

    def __iter__(self) -> Iterator[list[Any]]:
        """The share of this process, and of this worker, in each batch: items as they were read."""
        epoch, start = self._position.tolist()
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for k, batch in enumerate(self._batches(epoch)):
            if k >= start and (k - start) % step == first:
                yield self._share.of(batch)

    def _batches(self, epoch: int) -> Iterator[list[list[Any]]]:
        """The batches of all processes: for each class, its items."""
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(epoch)
        settings = self._settings
        random = Random(f"{settings['seed']} {epoch}")  # as text, both count
        buffer = _Buffer(settings["classes"], settings["items"], random)
        ended = False
        stream = iter(self._dataset)
        while True:
            ended = ended or not buffer.fill(stream, self._label_of, settings["buffer"])
            if not buffer.size or (ended and settings["drop_last"] and not buffer.is_ready()):
                return
            batch = buffer.take()
            if sum(map(len, batch)) >= self._share.size:
                yield batch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0 on. One that was loaded goes on from where it was."""
        if _at_least_0("epoch", epoch) != self._position[0]:
            self._position[:] = torch.tensor([epoch, 0])

    def state_dict(self, done: int) -> dict[str, Any]:
        """Where in the epoch the training is; it is the same on every process.

        Args:
            done: how many batches of this epoch have been trained on, before a resumption too. The
                workers that draw them cannot tell, so torchdata's StatefulDataLoader, which would
                ask them, is not for streams.
        """
        epoch = int(self._position[0])
        return {
            "epoch": epoch,
            "done": _at_least_0("done", done),
            "settings": dict(self._settings),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: iteration yields the batches that were not done.

        It does so until `set_epoch` chooses another epoch. The stream is read again from its start,
        but what was done is not collated. The number of processes and workers may be another.

        Raises:
            ValueError: the state is of other settings.
        """
        _check_settings(state, self._settings)
        self._position[:] = torch.tensor([state["epoch"], state["done"]])


class _Buffer:
    """Items of a stream by class, from which batches are drawn.

    Attributes:
        size: how many items it holds.
    """

    def __init__(self, classes: int, items: int, random: Random) -> None:
        self.size = 0
        self._classes, self._items, self._random = classes, items, random
        self._held: dict[Hashable, list[Any]] = {}  # the class that waits longest first
        self._ready: list[Hashable] = []  # the classes with enough items

    def fill(self, stream: Iterator[Any], label_of: Callable[[Any], Any], size: int) -> bool:
        """Take items until it holds `size`; False once the stream has ended."""
        while self.size < size:
            try:
                item = next(stream)
            except StopIteration:
                return False
            label = _hashable(label_of(item))
            held = self._held.setdefault(label, [])
            held.append(item)
            self.size += 1
            if len(held) == self._items:
                self._ready.append(label)
        return True

    def is_ready(self) -> bool:
        """Whether there is a full batch."""
        return len(self._ready) >= self._classes

    def take(self) -> list[list[Any]]:
        """A batch: for each of its classes, its items."""
        n = min(self._classes, len(self._ready))
        at = self._random.sample(range(len(self._ready)), n)
        labels = [self._ready[i] for i in at]
        if n < self._classes:
            rest = (label for label, held in self._held.items() if len(held) < self._items)
            labels += nlargest(self._classes - n, rest, key=lambda label: len(self._held[label]))
        batch = [self._draw(label) for label in labels]
        for i in sorted(at, reverse=True):
            if len(self._held.get(self._ready[i], ())) < self._items:
                self._ready[i] = self._ready[-1]
                self._ready.pop()
        return batch

    def _draw(self, label: Hashable) -> list[Any]:
        """Up to K random items of a class."""
        held = self._held[label]
        drawn = []
        for _ in range(min(self._items, len(held))):
            i = self._random.randrange(len(held))
            drawn.append(held[i])
            held[i] = held[-1]
            held.pop()
        self.size -= len(drawn)
        if not held:
            del self._held[label]
        return drawn


def _hashable(label: Any) -> Hashable:
    """A label by its value: tensors of equal values would be different keys."""
    value = label.numpy(force=True) if isinstance(label, Tensor) else label
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if not isinstance(value, Hashable):
        raise TypeError(
            f"label must lead to the class of an item, such as a number or a text; it led to "
            f"{label!r}. Pass a function of the item that returns its class."
        )
    return value


@dataclass(frozen=True)
class _Share:
    """What one process gets of a batch.

    Attributes:
        rank: which process this is.
        size: how many there are.
        split: see `ClassBatches`.
    """

    rank: int
    size: int
    split: Split

    def of(self, batch: Sequence[list[T]]) -> list[T]:
        """The items of this process; a batch has those of each of its classes."""
        if self.split == "classes" and len(batch) >= self.size:
            first, end = (len(batch) * (self.rank + k) // self.size for k in (0, 1))
            return [item for one in batch[first:end] for item in one]
        return [item for one in batch for item in one][self.rank :: self.size]


def _share(group: Group | None, split: Split, classes: int) -> _Share:
    """The share of this process.

    The rank is read once, here: the group is unknown to the workers of a DataLoader.
    """
    one_of("split", split, Split)
    rank, size = _place(group)
    if size > classes:
        raise ValueError(
            f"classes must be at least the number of processes, {size}, since a batch is dealt to "
            f"all of them; got {classes}."
        )
    return _Share(rank, size, split)


def _place(group: Group | None) -> tuple[int, int]:
    """The rank of this process in a group, and how many there are."""
    if group is None:
        return 0, 1
    processes = processes_of(as_over(group))
    return processes.rank, processes.size


def _at_least_0(name: str, value: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be an integer of at least 0, got {value!r}.")
    return int(value)


def _check_settings(state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse a state whose remaining batches would not be those of this sampler."""
    other = [
        f"{name} was {state['settings'].get(name)!r} and is {value!r}"
        for name, value in settings.items()
        if state["settings"].get(name) != value
    ]
    if other:
        raise ValueError(f"The state is of other batches: {'; '.join(other)}.")
