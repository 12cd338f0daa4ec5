"""What processes agree on before they compute a loss together.

Every process tells the others how many rows it has and what it was asked for, without a GPU. So all
know the shapes of what follows, and an error of one process is an error of all: none waits for
another that has given up.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass
from functools import wraps
from hashlib import blake2b
from inspect import Parameter, signature
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, NoReturn, ParamSpec, TypeVar, get_args
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nearfar.engine.precision import Precision
from nearfar.engine.processes import Processes
from nearfar.inputs import ArrayLike

if TYPE_CHECKING or dist.is_available():
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
else:  # torch built without it
    ProcessGroup = DeviceMesh = type(None)

P = ParamSpec("P")
R = TypeVar("R")

TorchGroup = Literal["world"] | ProcessGroup | DeviceMesh
Replicas = Literal["averaged", "summed"]
Handshake = Literal["each", "first"]


@dataclass(frozen=True, eq=False)
class Over:
    """Over which processes a function works, and how; see `nearfar.distributed.over`."""

    group: TorchGroup = "world"
    ring: bool = False
    replicas: Replicas = "averaged"
    handshake: Handshake = "each"
    # By settings: what this process told, and what all did, where that is told once.
    known: dict[tuple[int, str], tuple[list[int], list[list[int]]]] = field(
        default_factory=dict, repr=False
    )

    @property
    def how(self) -> str:
        """What must be the same on all processes."""
        rest = f"replicas={self.replicas!r}, handshake={self.handshake!r}"
        return f"over(ring={self.ring}, {rest})"

    def __deepcopy__(self, memo: object) -> "Over":
        return self  # a group cannot be copied, and a copy of a module calls the same one


# What a loss takes as `group=`; `over_processes` puts a Meeting in its place.
Group = TorchGroup | Over


@dataclass(frozen=True)
class Facts:
    """What a process tells of a loss that is to be computed.

    Attributes:
        rows: how many rows it has.
        columns: how many columns.
        width: numbers of a row.
        dtype: of the rows, as an index of `_DTYPES`.
        other_dtype: of the columns.
        labels: 0 without labels, 1 for class ids, 2 more than the number of classes for
            multi-labels; minus the number of ids of a row where rows have a match.
        listed: whether pairs are listed.
        gradient: whether it wants a gradient.
        weighted: whether it has weights.
        tiles: which tiles of all rows with themselves it could take a part of; 0: none.
        way: how it computes products: in which precision, whether by kernels, and on what.
        learned: which of the scale, the bias and what else a loss learns get a gradient, as bits.
    """

    rows: int
    columns: int
    width: int
    dtype: int
    other_dtype: int
    labels: int
    listed: int
    gradient: int
    weighted: int
    tiles: int
    way: int
    learned: int


class Meeting:
    """One call of a function by all processes of a group.

    Args:
        over: how they work together.
        processes: who they are.
        function: what is called.
        arguments: by name.
    """

    def __init__(
        self,
        over: Over,
        processes: Processes,
        function: Callable[..., Any],
        arguments: dict[str, Any],
    ) -> None:
        self.over, self.processes = over, processes
        self._settings = {"function": function.__name__}
        self._settings |= {name: _told(value) for name, value in sorted(arguments.items())}
        digest = blake2b(repr(self._settings).encode(), digest_size=7).digest()
        self._key = int.from_bytes(digest, "big")
        self._out = False  # whether the others no longer wait to be told something
        self._silent = False  # whether nothing is told in this step

    @property
    def _known(self) -> tuple[list[int], list[list[int]]] | None:
        """What was told in an earlier step, where that is told once."""
        return self.over.known.get(self._place) if self.over.handshake == "first" else None

    @property
    def _place(self) -> tuple[int, str]:
        """Which of several calls, and of several groups, this is."""
        return self._key, str(self.processes.group.group_name)

    def agree(self, facts: Facts) -> list[Facts]:
        """What each process tells.

        Raises:
            ValueError: processes differ in what must be the same; the message says which do.
        """
        own = [0, self._key, *map(int, vars(facts).values())]
        if self._known is not None:
            before, told = self._known
            self._silent = True
            if before != own:
                raise ValueError(
                    'over(..., handshake="first") is for steps of fixed shape: '
                    f"{_difference(Facts(*before[2:]), facts)}. Leave handshake out where shapes "
                    "change, and give each of several losses an over(...) of its own."
                )
        else:
            told = self._tell(own)
            if self.over.handshake == "first":
                self.over.known[self._place] = own, told
        self._out = True
        return [Facts(*numbers[2:]) for numbers in told]

    def _tell(self, own: list[int]) -> list[list[int]]:
        told = self._listen(own)
        if any(numbers[0] for numbers in told):
            self._raise(self.processes.tell_any(None))
        if len({numbers[1] for numbers in told}) > 1:
            self._out = True
            _raise_different_settings(self.processes.tell_any(self._settings))
        facts = [Facts(*numbers[2:]) for numbers in told]
        self._out = True  # all of them find what follows
        _check_same("embeddings have width", [f.width for f in facts])
        for kind in ("dtype", "other_dtype"):
            found = [_DTYPES[getattr(f, kind)] for f in facts]
            _check_same("embeddings are", found, " Convert them before the loss.")
        _check_same("products are computed", [_way(f.way) for f in facts])
        _check_same("labels are", [_labels(f.labels) for f in facts])
        _check_same("pairs are", ["listed" if f.listed else "not listed" for f in facts])
        learned = [_learned(f.learned) for f in facts]
        _check_same("what gets a gradient beside the rows is", learned, " Is one under no_grad?")
        return told

    def refuse(self, error: Exception) -> NoReturn:
        """Tell the others of an error; all raise it."""
        if self._out or self._known is not None:
            raise error
        self._listen([1, self._key, *[0] * len(Facts.__dataclass_fields__)])
        self._raise(self.processes.tell_any((type(error).__name__, str(error))), error)

    def confirm(self, error: Exception | None) -> None:
        """Tell whether what was told by all has shown an error; all raise that of any process."""
        if self._silent:
            if error is not None:
                raise error
            return
        told = self._listen([int(error is not None)])
        if any(failed for (failed,) in told):
            found = None if error is None else (type(error).__name__, str(error))
            self._raise(self.processes.tell_any(found), error)

    def _listen(self, own: list[int]) -> list[list[int]]:
        try:
            return self.processes.tell(own)
        except RuntimeError:
            self._out = True
            raise

    def _raise(
        self, errors: list[tuple[str, str] | None], own: Exception | None = None
    ) -> NoReturn:
        self._out = True
        rank, (kind, text) = next((i, e) for i, e in enumerate(errors) if e is not None)
        found = _ERRORS.get(kind)
        if found is None:
            found, text = RuntimeError, f"{kind}: {text}"
        raise found(f"process {rank}: {text}") from own


_ERRORS: dict[str, type[Exception]] = {
    error.__name__: error for error in (TypeError, ValueError, RuntimeError)
}
_DEVICES = ("cpu", "cuda", "xpu", "mps", "another device")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, None)


def facts_of(
    x: Tensor,
    y: Tensor | None,
    labels: Tensor | None,
    *,
    ids: int = 0,
    listed: bool = False,
    gradient: bool = False,
    weighted: bool = False,
    tiles: int = 0,
    way: tuple[Precision, bool] = ("float32", False),
    learned: Sequence[bool] = (),
) -> Facts:
    """What there is to tell; see `Facts`."""
    (precision, kernels), precisions = way, get_args(Precision)
    device = _DEVICES.index(x.device.type if x.device.type in _DEVICES else "another device")
    kind = -ids if labels is None else 1 if labels.ndim == 1 else 2 + labels.shape[1]
    return Facts(
        rows=len(x),
        columns=len(x if y is None else y),
        width=x.shape[1],
        dtype=_index(x.dtype),
        other_dtype=_index(None if y is None else y.dtype),
        labels=kind,
        listed=listed,
        gradient=gradient,
        weighted=weighted,
        tiles=tiles,
        way=(2 * device + kernels) * len(precisions) + precisions.index(precision),
        learned=sum(bit << k for k, bit in enumerate(learned)),
    )


def _index(dtype: torch.dtype | None) -> int:
    return _DTYPES.index(dtype)


def _difference(before: Facts, now: Facts) -> str:
    """The first thing in which two steps differ."""
    name = next(k for k, value in vars(before).items() if value != getattr(now, k))
    values = (getattr(facts, name) for facts in (before, now))
    shown = "{} is {} now, and was {}" if name in ("rows", "columns", "width") else "{} differs"
    return shown.format(name, *reversed(list(values)))


def _way(way: int) -> str:
    way, precision = divmod(way, len(get_args(Precision)))
    device, kernels = divmod(way, 2)
    how = "by kernels" if kernels else "in plain torch"
    return f"in {get_args(Precision)[precision]} {how} on {_DEVICES[device]}"


def _labels(kind: int) -> str:
    if kind < 0:
        return f"ids, {-kind} of each row"
    return {0: "not given", 1: "class ids"}.get(kind, f"multi-labels of {kind - 2} classes")


def _learned(bits: int) -> str:
    names = ["scale", "bias", *(f"number {k + 1} of the loss" for k in range(bits.bit_length()))]
    return " and ".join(n for k, n in enumerate(names) if bits >> k & 1) or "nothing"


def _check_same(what: str, found: Sequence[object], fix: str = "") -> None:
    if len(set(found)) > 1:
        raise ValueError(f"{what} {by_process(found)}; all processes must have the same.{fix}")


def by_process(found: Sequence[object]) -> str:
    """What is found on which processes."""
    parts = []
    for kind in dict.fromkeys(found):
        *ranks, last = (str(rank) for rank, other in enumerate(found) if other == kind)
        who = f"processes {', '.join(ranks)} and {last}" if ranks else f"process {last}"
        parts.append(f"{kind} on {who}")
    return " and ".join(parts)


def _raise_different_settings(settings: list[dict[str, str]]) -> NoReturn:
    names = dict.fromkeys(name for one in settings for name in one)
    for name in names:
        found = [one.get(name, "not given") for one in settings]
        if len(set(found)) > 1:
            raise ValueError(
                f"{name} is {by_process(found)}; all processes must call the same function with "
                "the same settings."
            )
    raise AssertionError("settings with another digest are not the same")


def _told(value: object) -> str:
    """An argument as it is told; of data, only that it is some."""
    if isinstance(value, Real) and not isinstance(value, bool | np.bool_):
        number = float(value)  # 1 is 1.0, also where NumPy has made it
        return repr(int(number) if number.is_integer() else number)
    if value is None or isinstance(value, str | bool | np.bool_):
        return repr(value)
    # A range, as a reduction may be; longer ones are data.
    if isinstance(value, tuple) and len(value) < 3 and all(isinstance(v, Real) for v in value):
        return f"({', '.join(map(_told, value))})"
    if isinstance(value, Over):
        return value.how
    if isinstance(value, Tensor | np.ndarray | list | tuple):
        return "an array"
    name = getattr(value, "__qualname__", None) or type(value).__name__
    if is_dataclass(value) and not isinstance(value, type):
        return f"{name}({', '.join(_told(getattr(value, f.name)) for f in fields(value))})"
    return str(name)


def _is_data(parameter: Parameter) -> bool:
    """Whether an argument is some of the batch, which differs from process to process."""
    kinds = get_args(parameter.annotation)
    return all(kind in kinds for kind in get_args(ArrayLike))


_NOT_A_MEMBER = (
    "group must be one that this process belongs to, and it does not: let only the members of a "
    "group call what takes it."
)
_PROCESSES: WeakKeyDictionary[ProcessGroup, Processes] = WeakKeyDictionary()


def as_over(group: object) -> Over:
    """What a caller passed as `group`, with all settings."""
    return group if isinstance(group, Over) else Over(group)  # type: ignore[arg-type]


def processes_of(over: Over) -> Processes:
    """The processes of a group.

    Raises:
        TypeError: it is none.
        ValueError: this process is not in it.
        RuntimeError: torch.distributed is not in use.
    """
    check_group(over.group)
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"group={over.group!r} needs processes that know each other: start them with torchrun "
            "and call torch.distributed.init_process_group() first; or leave group out for one "
            "process."
        )
    group: Any = over.group
    if isinstance(group, str):
        group = dist.group.WORLD
    elif isinstance(group, DeviceMesh):
        group = group.get_group()
    if dist.get_rank(group) < 0:
        raise ValueError(_NOT_A_MEMBER)
    if group not in _PROCESSES:
        _PROCESSES[group] = Processes(group)
    return _PROCESSES[group]


def check_group(group: object) -> None:
    """Refuse what is no group of processes.

    Raises:
        TypeError: it is something else.
        ValueError: a group of others, or a DeviceMesh of several dimensions.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                "group must be one dimension of a DeviceMesh, such as "
                f"mesh[{(group.mesh_dim_names or ('dp',))[0]!r}]; got {group}."
            )
    elif dist.is_available() and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(_NOT_A_MEMBER)  # what new_group returned
    elif group != "world" and not isinstance(group, ProcessGroup):
        raise TypeError(
            'group must be "world", a torch.distributed.ProcessGroup, a dimension of a DeviceMesh, '
            f"or nearfar.distributed.over(...) of one; got {group!r}."
        )


def meeting_of(group: object) -> Meeting:
    """What `group` is in a function that takes it; type checkers know only what callers pass."""
    assert isinstance(group, Meeting)
    return group


def of_first(group: Group, number: int) -> int:
    """The number of the first process, in a function that takes `group`."""
    return meeting_of(group).processes.tell([number])[0][0]


def group_totals(group: Group, numbers: Sequence[int]) -> list[int]:
    """The sums over all processes, in a function that takes `group`."""
    told = meeting_of(group).processes.tell(numbers)
    return [sum(of_each) for of_each in zip(*told, strict=True)]


def confirmed(group: Group | None, check: Callable[[], R]) -> R:
    """What `check` gives, of what was told by all; an error of any process is one of all.

    Raises:
        Exception: that of `check`, here or on another process.
    """
    if group is None:
        return check()
    meeting = meeting_of(group)
    try:
        found = check()
    except Exception as error:
        meeting.confirm(error)
        raise
    meeting.confirm(None)
    return found


_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Within it, what is called with `group` takes its process for the only one."""
    before = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(before)


def over_processes(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function take `group`: all processes of a group call it, or none.

    An error of one, before it has told the others that it is ready, is an error of all.
    """
    parameters = signature(function).parameters
    names = tuple(parameters)
    data = {name for name, parameter in parameters.items() if _is_data(parameter)}
    usual = {k: p.default for k, p in parameters.items() if p.default is not p.empty}

    @wraps(function)
    def call(*given: P.args, **named: P.kwargs) -> R:
        group = named.get("group")
        if group is None or isinstance(group, Meeting):
            return function(*given, **named)
        meet: Callable[..., R] = together
        if torch.compiler.is_compiling():  # what processes tell each other is in no graph
            meet = torch.compiler.disable(together)  # type: ignore[no-untyped-call]
        return meet(*given, **named)

    def together(*given: P.args, **named: P.kwargs) -> R:
        over = as_over(named["group"])
        processes = processes_of(over)
        if processes.size == 1 or _ALONE.get():
            named["group"] = None
            return function(*given, **named)
        arguments = usual | dict(zip(names, given, strict=False)) | named | {"group": over}
        # Of data it is told that there are some.
        told = {k: [] if k in data and v is not None else v for k, v in arguments.items()}
        meeting = Meeting(over, processes, function, told)
        named["group"] = meeting
        try:
            return function(*given, **named)
        except Exception as error:
            meeting.refuse(error)

    return call
