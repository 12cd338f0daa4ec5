"""Rows of earlier batches to compare with, and the slow copy of a network that may encode them."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import nan
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nearfar.distance import cosine, unit
from nearfar.engine.meeting import (
    Group,
    as_over,
    check_group,
    facts_of,
    meeting_of,
    over_processes,
)
from nearfar.engine.processes import Split
from nearfar.inputs import ArrayLike, batch, between, positive_integer
from nearfar.labels import batch_labels, class_ids, refuse
from nearfar.reference import Reference
from nearfar.shards import is_shard, reshard

# Rows, their labels, and which items they are of.
Added = tuple[Tensor, Tensor | None, Tensor]


@dataclass(frozen=True)
class Drift:
    r"""How far stored rows are from what the network makes of their items now.

    If `mean` is near `apart`, a stored row says no more of its item than any other row does.

    Attributes:
        mean: mean cosine distance between an item's stored row and its present one; NaN if n is 0.
        apart: mean cosine distance between stored rows and the present rows of other items; NaN if
            n is below 2.
        n: how many items were compared.
        age: how many additions ago their rows were stored, on average; NaN if n is 0.
    """

    mean: float
    apart: float
    n: int
    age: float


class MemoryBank(nn.Module):
    r"""The rows of earlier batches, to compare a batch with: more negatives at no cost in encoding.

    A queue: when it is full, the oldest rows make room. It is passed as `reference` to any loss,
    miner or statistic that takes one. None of its rows gets a gradient; the rows of the batch do.

    **Earlier batches only.** Compare first, then add::

        loss = nf.sup_con_loss(x, labels, reference=bank)
        bank.add(x, labels)

    **The batch too**, as in the paper. `add` returns what to compare with, and declares which of
    its rows are those just added, so that no row is compared with itself::

        loss = nf.sup_con_loss(x, labels, reference=bank.add(x, labels))

    **Keys of another network or view**, as in MoCo. No row of the bank is a query, so add first and
    pass the bank itself::

        bank.add(key, labels)
        loss = nf.sup_con_loss(query, labels, reference=bank)

    What was passed to a loss stays as it is when rows are added later, so `add` may come before
    `backward()`. As long as the bank is empty there is nothing to compare with: the loss is 0.

    Everything is in `state_dict()`: a run that is resumed continues bit for bit.

    Args:
        size: the largest number of rows.
        dim: the length of a row.
        labels: what kind of labels rows have. "ids": (n,) class ids; a number c: (n, c) bool
            multi-labels; None: no labels.
        warm_up: how many additions are not stored, while the network still changes quickly. Until
            then the bank is empty, and `add` returns the batch alone.
        group: the processes whose rows are gathered, in the order of their ranks, so that the bank
            is the same on each: "world", a process group, a dimension of a DeviceMesh, or
            `nearfar.distributed.over(...)` of one. None: those of this process.
        device: where the rows are. None: torch's default.
        dtype: in which they are stored, whatever that of a batch is. None: torch's default.

    Raises:
        ValueError: a size or `warm_up` out of range.
        TypeError: `group` is none.

    >>> import nearfar as nf
    >>> bank = MemoryBank(4, dim=2)
    >>> x = torch.tensor([[1.0, 0], [0, 1], [-1, 0]], requires_grad=True)
    >>> nf.sup_con_loss(x, [0, 1, 0], reference=bank).item()
    0.0
    >>> bank.add(x, [0, 1, 0]).own
    tensor([0, 1, 2])
    >>> bank.add(x, [1, 1, 0]).own  # room for four: two of the first three are gone
    tensor([1, 2, 3])
    >>> bank.labels, bank.ages
    (tensor([0, 1, 1, 0]), tensor([1, 0, 0, 0]))
    >>> bank
    MemoryBank(4, dim=2, labels='ids', 4 rows)

    Source: Wang et al., "Cross-batch memory for embedding learning", CVPR 2020; He et al.,
    "Momentum contrast for unsupervised visual representation learning", CVPR 2020.
    """

    rows: Tensor  # the newest last; the first are not filled yet
    row_labels: Tensor | None
    row_ids: Tensor  # -1: not known
    row_times: Tensor  # the value of `additions` when it was added

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        labels: Literal["ids"] | int | None = "ids",
        warm_up: int = 0,
        group: Group | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.size, self.dim = positive_integer("size", size), positive_integer("dim", dim)
        if not isinstance(warm_up, int) or warm_up < 0:
            raise ValueError(f"warm_up must be a number of additions, 0 or more; got {warm_up!r}.")
        if group is not None:
            check_group(as_over(group).group)
        self.kind, self.warm_up, self.group = labels, warm_up, group
        # Stored rows and additions; a tensor, since a compiler would take numbers for constants.
        self._counts = torch.zeros(2, dtype=torch.int64, device="cpu")
        self.register_buffer("rows", torch.zeros(size, dim, device=device, dtype=dtype))
        for name in ("row_ids", "row_times"):
            self.register_buffer(name, self.rows.new_zeros(size, dtype=torch.int64))
        self.register_buffer("row_labels", self._no_labels())

    def _no_labels(self) -> Tensor | None:
        if self.kind is None:
            return None
        if self.kind == "ids":
            return self.rows.new_zeros(self.size, dtype=torch.int64)
        n_labels = positive_integer("labels", self.kind)
        return self.rows.new_zeros(self.size, n_labels, dtype=torch.bool)

    @property
    def x(self) -> Tensor:
        """(m, dim) the stored rows, the oldest first."""
        return self._stored(self.rows)

    @property
    def labels(self) -> Tensor | None:
        """(m,) or (m, c) their labels; None if they have none."""
        return None if self.row_labels is None else self._stored(self.row_labels)

    @property
    def own(self) -> None:
        """None: no row of the bank is a row of the batch, unless `add` has just returned it."""
        return

    @property
    def ids(self) -> Tensor:
        """(m,) which item each row is of, as given to `add`; -1 if it was not given."""
        return self._stored(self.row_ids)

    @property
    def ages(self) -> Tensor:
        """(m,) how many additions ago each row was added, 0 for those of the last one."""
        return self.additions - self._stored(self.row_times)

    @property
    def additions(self) -> int:
        """How often `add` was called."""
        return int(self._counts[1])

    def __len__(self) -> int:
        """The number of stored rows, at most `size`."""
        return int(self._counts[0])

    def _stored(self, buffer: Tensor) -> Tensor:
        return buffer[self.size - len(self) :]

    def _count(self, stored: int, additions: int) -> None:
        before = _BEFORE.get()
        if before is not None:
            before.setdefault(self, {name: getattr(self, name) for name in _STATE})
        self._counts = torch.tensor([stored, additions], device="cpu")

    def add(
        self, x: ArrayLike, labels: ArrayLike | None = None, *, ids: ArrayLike | None = None
    ) -> Reference:
        """Store rows, and return all that is stored, in which row i of `x` is declared by position.

        Of a batch larger than the bank, the last rows are stored.

        Args:
            x: (n, dim) embeddings, on the device of the bank; stored without gradient.
            labels: (n,) class ids or (n, c) bool multi-labels, as the bank was made for.
            ids: (n,) integers from 0, which item each row is of, such as its index in the data set;
                `drift` finds a row by it. They need not be given.

        Returns:
            A `Reference` of the stored rows, whose `own` is -1 for rows of `x` that are not among
            them. During the warm-up, one of the batch alone.

        Raises:
            TypeError: labels are missing, or of another kind than the bank was made for.
            ValueError: a wrong shape or device, a negative id, or a bank that is not the same on
                all processes of `group`.
            RuntimeError: the bank has a `group`, and torch.distributed is not in use.
        """
        add = self._add
        if torch.compiler.is_compiling():  # nothing to fuse, and numbers that change in each call
            add = torch.compiler.disable(add)  # type: ignore[no-untyped-call]
        return add(x, labels, ids)

    def _add(self, x: ArrayLike, labels: ArrayLike | None, ids: ArrayLike | None) -> Reference:
        # Rows made in inference mode could not be compared with rows that get a gradient.
        with torch.inference_mode(False):
            settings: dict[str, object] = {
                "size": self.size,
                "labels": self.kind,
                "warm_up": self.warm_up,
            }
            if self.group is not None and as_over(self.group).handshake == "each":
                settings |= {"stored rows": len(self), "additions": self.additions}
            (rows, known, items), here = added_to_bank(
                self, x, labels, ids, group=self.group, **settings
            )
            added = len(rows)
            self._count(len(self), self.additions + 1)
            if self.additions > self.warm_up:
                self._store(rows, known, items)
                rows, known = self.x, self.labels
            moved = len(rows) - added  # the newest rows come last
            own = torch.arange(here.start + moved, here.stop + moved, device=rows.device)
            return Reference(rows, known, own.clamp(min=-1))

    def checked(self, x: ArrayLike, labels: ArrayLike | None, ids: ArrayLike | None) -> Added:
        """Rows, labels and items as they are stored; rows and labels are copies."""
        rows = self._like_rows(x)
        items = rows.new_full((len(rows),), -1, dtype=torch.int64)
        if ids is not None:
            items = class_ids(ids, like=rows, name="ids")
            refuse("ids", items, items < 0, "be integers from 0, such as rows of the data set")
        if self.row_labels is None or labels is None:
            if (self.row_labels is None) != (labels is None):
                had = "no labels" if labels is None else "labels"
                raise TypeError(
                    f"labels must be as the bank was made, labels={self.kind!r}; got {had}."
                )
            return rows, None, items
        known = batch_labels(labels, like=rows)
        if known.shape[1:] != self.row_labels.shape[1:]:
            raise TypeError(
                f"labels must be as the bank was made, labels={self.kind!r}; got {known.dtype} of "
                f"shape {tuple(known.shape)}."
            )
        return rows, known.clone(), items

    def _like_rows(self, x: ArrayLike) -> Tensor:
        """A copy of embeddings without gradient, in the dtype of the bank."""
        rows = batch("x", x)
        if rows.shape[1] != self.dim:
            raise ValueError(
                f"x must have rows of length {self.dim}, as the bank was made; got "
                f"{tuple(rows.shape)}."
            )
        if rows.device != self.rows.device:
            raise ValueError(
                f"x is on {rows.device} and the bank on {self.rows.device}; move the bank once: "
                f"bank.to({str(rows.device)!r})."
            )
        return rows.detach().to(self.rows.dtype, copy=True)

    def _store(self, rows: Tensor, labels: Tensor | None, ids: Tensor) -> None:
        times = torch.full_like(ids, self.additions)
        new = {"rows": rows, "row_labels": labels, "row_ids": ids, "row_times": times}
        for name, added in new.items():
            if added is not None:
                # A new tensor: what was passed to a loss is still read by its backward pass.
                kept = getattr(self, name)[len(added) :]
                setattr(self, name, torch.cat([kept, added[-self.size :]]))
        self._count(min(len(self) + len(rows), self.size), self.additions)

    def drift(self, x: ArrayLike, ids: ArrayLike) -> Drift:
        """How far stored rows are from the present embeddings of the same items.

        Measure it now and then: when items come again, before they are added; or on items that are
        still stored, which `ids` lists, the oldest first. The doctor reads it::

            items = bank.ids[:256]
            drift = bank.drift(network(data[items]), items)
            print(nf.doctor.diagnose(nf.doctor.Evidence(drift=drift)))

        Args:
            x: (n, dim) embeddings of items, by the network whose rows the bank stores: for MoCo, by
                the slow one.
            ids: (n,) which items they are. An item is compared with the newest of its rows; one
                that has none is left out.

        >>> bank = MemoryBank(4, dim=2, labels=None)
        >>> _ = bank.add([[1.0, 0], [0, 1]], ids=[7, 8])
        >>> drift = bank.drift([[0.8, 0.6], [0, 1], [1, 0]], ids=[7, 8, 9])
        >>> round(drift.mean, 4), round(drift.apart, 4), drift.n
        (0.1, 0.7, 2)
        """
        rows = self._like_rows(x)
        wanted = class_ids(ids, like=rows, name="ids").contiguous()
        known, order = self.ids.sort(stable=True)  # the newest row of an item comes last
        first, end = (torch.searchsorted(known, wanted, right=right) for right in (False, True))
        found = (first < end) & (wanted >= 0)
        place, now = order[end[found] - 1], rows[found]
        return _drift(self.x[place], now, self.ages[place])

    def clear(self) -> None:
        """Forget all rows. The warm-up does not begin again."""
        self._count(0, self.additions)

    def get_extra_state(self) -> Tensor:
        """What `state_dict` holds beside the rows: how many are filled, and `additions`."""
        return self._counts

    def set_extra_state(self, state: Tensor) -> None:
        self._count(*state.tolist())

    def extra_repr(self) -> str:
        return f"{self.size}, dim={self.dim}, labels={self.kind!r}, {len(self)} rows"


# All of them are replaced when they change, and never written to.
_STATE = ("rows", "row_labels", "row_ids", "row_times", "_counts")
# What banks were before they changed, while that is to be restored.
_BEFORE: ContextVar[dict[MemoryBank, dict[str, Tensor | None]] | None] = ContextVar(
    "before", default=None
)


@contextmanager
def banks_restored() -> Iterator[None]:
    """Within it, banks change as always; at the end, each is as it was."""
    before: dict[MemoryBank, dict[str, Tensor | None]] = {}
    token = _BEFORE.set(before)
    try:
        yield
    finally:
        _BEFORE.reset(token)
        for bank, state in before.items():
            for name, tensor in state.items():
                setattr(bank, name, tensor)


@over_processes
def added_to_bank(
    bank: MemoryBank,
    x: ArrayLike,
    labels: ArrayLike | None,
    ids: ArrayLike | None,
    /,
    *,
    group: Group | None,
    **settings: object,  # of the bank, which must be the same on all processes
) -> tuple[Added, slice]:
    """The rows of all processes with their labels and items, and which are those of this one."""
    rows, known, items = bank.checked(x, labels, ids)
    if group is None:
        return (rows, known, items), slice(0, len(rows))
    meeting = meeting_of(group)
    told = meeting.agree(facts_of(rows, None, known))
    split = Split(meeting.processes, [facts.rows for facts in told])
    known = None if known is None else split.gather(known)
    return (split.gather(rows), known, split.gather(items)), split.own


def _drift(then: Tensor, now: Tensor, ages: Tensor) -> Drift:
    """From (n, d) stored and present rows of the same items."""
    n = len(now)
    if not n:
        return Drift(nan, nan, 0, nan)
    wide = torch.promote_types(now.dtype, torch.float32)
    then, now = unit(then.to(wide)), unit(now.to(wide))
    every = then.sum(0) @ now.sum(0)  # the sum of all cosines
    apart = 1 - (every - (then * now).sum()).item() / (n * (n - 1)) if n > 1 else nan
    return Drift(cosine(then, now).mean().item(), apart, n, ages.double().mean().item())


def momentum_update(target: nn.Module, source: nn.Module, momentum: float = 0.999) -> None:
    r"""Let a network follow another slowly.

    .. math:: \theta_t \leftarrow m \theta_t + (1 - m) \theta_s

    In place and without gradient, for every parameter. Buffers, such as the running means of
    BatchNorm and its count of batches, are copied as they are, and so are parameters that hold no
    floating point numbers.

    Args:
        target: the slow network, `copy.deepcopy(source).requires_grad_(False)` at first. Its
            parameters need 32 bits: in 16, small steps would round to nothing. If `fully_shard` is
            used, copy first, then shard both alike.
        source: the network that learns, in any dtype and on any device.
        momentum: m, from 0, which copies, to 1, which changes no parameter.

    Raises:
        ValueError: the networks differ in a name or a shape, one is sharded, they are the same, or
            the momentum is out of range.
        TypeError: a parameter of `target` in 16 bits.

    >>> target, source = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(target.weight, 1.0), nn.init.constant_(source.weight, 2.0)
    >>> momentum_update(target, source, 0.9)
    >>> round(target.weight.item(), 4)
    1.1

    Source: He et al., "Momentum contrast for unsupervised visual representation learning", CVPR
    2020, equation 2; Tarvainen & Valpola, "Mean teachers are better role models", NeurIPS 2017.
    """
    between("momentum", momentum, 0, 1)
    if target is source:
        raise ValueError(
            "target must be a copy of source, copy.deepcopy(source); got source itself."
        )
    pairs = _matched(target, source)
    averaged = {k: both for k, both in pairs.items() if isinstance(both[0], nn.Parameter)}
    averaged = {k: both for k, both in averaged.items() if both[0].is_floating_point()}
    for name, (ours, _) in averaged.items():
        if momentum and ours.element_size() < 4:
            raise TypeError(
                f"target.{name} is {ours.dtype}, in which small steps round to nothing: keep the "
                "slow network in float32, target.float()."
            )
    with torch.no_grad():
        for name in pairs.keys() - averaged.keys():
            ours, theirs = pairs[name]
            ours.copy_(theirs)
        if averaged:
            slow = [ours for ours, _ in averaged.values()]
            fast = [theirs.to(ours) for ours, theirs in averaged.values()]
            get_ema_multi_avg_fn(momentum)(slow, fast, None)  # type: ignore[no-untyped-call]


def _matched(target: nn.Module, source: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The parameters and buffers of both by their name, which must have the same shapes."""
    for network in (target, source):
        reshard(network)  # what is written to whole copies is lost
    ours, theirs = (
        {**dict(network.named_parameters()), **dict(network.named_buffers())}
        for network in (target, source)
    )
    for name in (*ours, *theirs):
        shapes = [tuple(held[name].shape) if name in held else None for held in (ours, theirs)]
        if shapes[0] != shapes[1]:
            has = ["none" if shape is None else f"one of shape {shape}" for shape in shapes]
            raise ValueError(
                f"target and source must have the same parameters and buffers; of {name!r}, target "
                f"has {has[0]} and source {has[1]}. Pass the modules inside a wrapper such as DDP: "
                "source.module."
            )
        if is_shard(ours[name]) != is_shard(theirs[name]):
            which = (
                "target and not in source" if is_shard(ours[name]) else "source and not in target"
            )
            raise ValueError(
                f"target and source must be sharded alike; {name!r} is in {which}. Make the copy "
                "before fully_shard, then shard both: target = copy.deepcopy(source), "
                "fully_shard(target), fully_shard(source)."
            )
    return {name: (held, theirs[name]) for name, held in ours.items()}
