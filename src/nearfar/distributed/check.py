"""Whether a training step on several processes has the gradients of one process."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isclose, isfinite
from textwrap import fill
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel

from nearfar.engine.graph import leaves
from nearfar.engine.meeting import (
    Group,
    alone,
    as_over,
    by_process,
    confirmed,
    over_processes,
    processes_of,
)
from nearfar.engine.processes import Processes
from nearfar.memory import banks_restored
from nearfar.shards import is_shard, whole_copies
from nearfar.tabulate import Table

Batch = TypeVar("Batch")
R = TypeVar("R")
Loss = Callable[[nn.Module, Batch], Tensor]
# A gradient shorter than this part of the longest may be rounding errors alone.
FAINT = 1e-4


@dataclass(frozen=True)
class Compared:
    """The loss, or the gradient of a parameter, beside that of one process.

    Attributes:
        name: "loss", or the name of the parameter.
        error: the length of the difference, divided by that of the right one.
        verdict: "right", or what is wrong with it.
    """

    name: str
    error: float
    verdict: str


@dataclass(frozen=True)
class Check:
    """What `check` found; printed, a table.

    Attributes:
        compared: the loss and every parameter that got a gradient.
        notes: what is likely the cause, and what could not be compared.
    """

    compared: tuple[Compared, ...]
    notes: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Whether the loss and all gradients are right; False if there was no gradient."""
        return len(self.compared) > 1 and all(one.verdict == "right" for one in self.compared)

    def __str__(self) -> str:
        rows = [(one.name, f"{one.error:.0e}", one.verdict) for one in self.compared]
        table = Table(("loss and gradients", "error", "verdict"), rows).plain()
        return "\n".join([table, *(fill(note, 100) for note in self.notes)])


def check(
    model: nn.Module,
    loss: Loss[Batch],
    batch: Batch,
    *,
    after_backward: Callable[[], object] | None = None,
    one_process: Loss[Batch] | None = None,
    group: Group = "world",
    tolerance: float = 0.01,
) -> Check:
    """Compare a training step on several processes with that of one that has the whole batch.

    Every process calls it with its own part of a batch. A step is done as it is trained, and once
    more on each process with the rows of all, where `group=` of a loss means nothing. Gradients,
    buffers, memory banks and random states are afterwards as they were; no optimizer takes a step.

    All parameters that get a gradient are compared, also a temperature or proxies beside the model,
    unless these are sharded by FSDP2. Dropout is switched off, since no two processes drop the
    same; only what functions such as `torch.nn.functional.dropout` drop is left to `model.eval()`.
    `cached_backward` calls `backward()` itself, so check the same loss without it.

    Args:
        model: as it is trained: in DistributedDataParallel, sharded by FSDP2, or plain.
        loss: a function of a model and a batch that returns what the step calls `backward()` of. It
            is given the model to use.
        batch: of this process: tensors with a row for each item, or dicts, lists and tuples of
            such; a list of anything else has an entry for each item.
        after_backward: what the step does to gradients after `backward()`, such as averaging them.
        one_process: `loss` as it is on one process, if it talks to others by other means than
            `group=`.
        group: the processes that train together.
        tolerance: the largest error that is taken for rounding; a model or autocast of 16 bits may
            need a larger one.

    Returns:
        What was found, the same on every process. It is right if `check(...).right`.

    Raises:
        ValueError: the loss is not one number with a gradient, or the batches do not fit together.
        Exception: what the loss raises on one process, in the step of one, on all of them.
    """
    processes = processes_of(as_over(group))
    parts = processes.tell_any(_sendable(batch))
    single = model.module if isinstance(model, DistributedDataParallel) else model
    reference = loss if one_process is None else one_process
    with _restored(model) as drops:
        one = _agreed(lambda: _on_one_process(reference, single, batch, parts), group=group)
        value = _value(loss, model, batch)
        with _own_gradients(one.parameters) as ours:
            value.backward()  # type: ignore[no-untyped-call]
            if after_backward is not None:
                after_backward()
    told = processes.tell_any([value.item(), one.of_own_rows, one.value, {*ours, *one.gradients}])
    reached = set().union(*(names for *_, names in told))
    pairs = {
        name: [_or_zeros(found.get(name), p) for found in (ours, one.gradients)]
        for name, p in one.parameters.items()
        if name in reached
    }
    found = (
        _of_values([v for v, *_ in told], told[0][2], tolerance),
        *_of_gradients(pairs, processes, tolerance),
    )
    notes = _notes(found, told, processes.size, single, drops=drops)
    return Check(found, notes + _not_compared([k for k in one.parameters if k not in reached]))


@dataclass(frozen=True)
class _Step:
    """A step on one process: its loss, that of the process's own rows alone, and gradients."""

    value: float
    of_own_rows: float
    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]


def _on_one_process(
    loss: Loss[Batch], model: nn.Module, batch: Batch, parts: Sequence[Any]
) -> _Step:
    """The step with the rows of all processes."""
    whole = _joined(parts, batch)
    with alone():
        with torch.no_grad():
            of_own_rows = _value(loss, model, batch).item()
        copies = whole_copies(model)
        parameters: dict[str, Tensor] = {
            k: p for k, p in model.named_parameters() if p.requires_grad
        }
        value = _value(loss, model, whole)
        parameters |= _beside(value, [*parameters.values(), *copies])
        with _own_gradients(parameters) as gradients:
            value.backward()  # type: ignore[no-untyped-call]
    return _Step(value.item(), of_own_rows, parameters, gradients)


@over_processes
def _agreed(call: Callable[[], R], /, *, group: Group | None) -> R:
    """What a call gives in which processes need not wait for each other; errors are of all."""
    return confirmed(group, call)


def _value(loss: Loss[Batch], model: nn.Module, batch: Batch) -> Tensor:
    """The loss, with the random numbers and the memory banks that all calls have."""
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(sorted(devices)), banks_restored():
        value = loss(model, batch)
    wanted = torch.is_grad_enabled()
    if not isinstance(value, Tensor) or value.numel() != 1 or value.requires_grad < wanted:
        raise ValueError(
            "loss must return one number with a gradient, as a training step calls backward() of; "
            f"got {value!r}."
        )
    return value


# -- what a step changes --------------------------------------------------------------------------


@contextmanager
def _restored(model: nn.Module) -> Iterator[bool]:
    """Buffers as they were at the end, and until then no dropout; whether there is some."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    dropouts = [module for module in model.modules() if module.training and _drops(module)]
    for module in dropouts:
        module.training = False
    try:
        yield bool(dropouts)
    finally:
        for module in dropouts:
            module.training = True
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _drops(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return module.dropout > 0
    return isinstance(module, _DropoutNd) and module.p > 0


@contextmanager
def _own_gradients(parameters: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The gradients that are made meanwhile, known at the end; those of before come back."""
    before = {name: p.grad for name, p in parameters.items()}
    found: dict[str, Tensor] = {}
    try:
        for p in parameters.values():
            p.grad = None
        yield found
        for name, p in parameters.items():
            grad: Any = p.grad
            if grad is not None:
                whole = grad.full_tensor() if is_shard(grad) else grad
                found[name] = whole.detach().double().flatten().clone()
    finally:
        for name, p in parameters.items():
            p.grad = before[name]


def _beside(value: Tensor, known: Sequence[Tensor]) -> dict[str, Tensor]:
    """What else the value has a gradient by."""
    passed = {id(p) for p in known}
    others = [leaf for leaf in leaves(value) if id(leaf) not in passed]
    return {f"loss parameter {k} {tuple(p.shape)}": p for k, p in enumerate(others, 1)}


def _or_zeros(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    if gradient is not None:
        return gradient
    return torch.zeros(parameter.numel(), dtype=torch.float64, device=parameter.device)


# -- what is said of it ---------------------------------------------------------------------------


def _of_values(values: Sequence[float], true: float, tolerance: float) -> Compared:
    mean, size = sum(values) / len(values), len(values)
    error = abs(mean - true) / max(abs(true), 1e-30) if mean != true else 0.0
    if error <= tolerance:
        return Compared("loss", error, "right")
    factor = _as_factor(mean / true if true else 0.0, size, tolerance)
    return Compared("loss", error, factor or "different")


def _of_gradients(
    pairs: Mapping[str, Sequence[Tensor]], processes: Processes, tolerance: float
) -> list[Compared]:
    """Of the gradient of each parameter, and the right one."""
    faint = FAINT * max((float(true.norm()) for _, true in pairs.values()), default=0.0)
    found = []
    for ours, true in pairs.values():
        mean = processes.total(ours) / processes.size
        found.append(_verdict(ours, mean, true, faint, processes.size, tolerance))
    compared = []
    for name, of_each in zip(pairs, zip(*processes.tell_any(found), strict=True), strict=True):
        errors, verdicts = zip(*of_each, strict=True)
        text = verdicts[0] if len(set(verdicts)) == 1 else by_process(verdicts)
        compared.append(Compared(name, max(errors), text))
    return compared


def _verdict(
    ours: Tensor, mean: Tensor, true: Tensor, faint: float, size: int, tolerance: float
) -> tuple[float, str]:
    """The error of a gradient, and what it is called.

    Args:
        ours: the gradient of this process.
        mean: that of all.
        true: the right one.
        faint: a length below which it may be rounding errors.
        size: how many processes there are.
        tolerance: of the error.
    """
    length = float(true.norm())
    by = max(length, faint, 1e-30)
    error = float((ours - true).norm()) / by
    if not isfinite(error):
        return error, "not finite"
    if error <= tolerance:
        return error, "right"
    if not ours.any():
        return error, "missing"
    if float((mean - true).norm()) <= tolerance * by:
        return error, "right if averaged"
    if length > tolerance * faint:
        factor = float(ours @ true) / length**2
        along = float((ours - factor * true).norm()) <= tolerance * abs(factor) * length
        text = _as_factor(factor, size, tolerance, any_factor=along and len(true) > 1)
        if along and text:
            return error, text
    return error, "different"


def _as_factor(factor: float, size: int, tolerance: float, *, any_factor: bool = False) -> str:
    """How many times too large or small, if that is the number of processes or any may be it."""
    if factor <= 0:
        return ""
    times, too = (factor, "large") if factor > 1 else (1 / factor, "small")
    if any_factor or isclose(times, size, rel_tol=tolerance):
        return f"{times:.3g} times too {too}"
    return ""


def _notes(
    found: Sequence[Compared],
    told: Sequence[Sequence[Any]],
    size: int,
    model: nn.Module,
    *,
    drops: bool,
) -> tuple[str, ...]:
    """What is likely the cause, and what was left out."""
    notes = []
    wrong = [one.verdict for one in found if one.verdict != "right"]
    large, small = (f"{size} times too {too}" for too in ("large", "small"))
    if wrong and size > 1 and all(isclose(v, of_own, rel_tol=1e-5) for v, of_own, *_ in told):
        notes.append("Each process compares its own rows only: give the loss group=.")
    if large in wrong:
        notes.append(
            f'"{large}": gradients that are added up over processes should be averaged, or the '
            'loss have group=nearfar.distributed.over(..., replicas="summed").'
        )
    if small in wrong:
        notes.append(
            f'"{small}": gradients are averaged, for which a loss has no replicas="summed", or the '
            "loss gathers rows without the gradient of other processes."
        )
    if "right if averaged" in wrong:
        notes.append(
            '"right if averaged": nobody averages these gradients over the processes, as '
            "DistributedDataParallel does for the parameters that it holds."
        )
    if drops:
        notes.append("Dropout was switched off: no two processes drop the same.")
    kinds = {k: type(m) for k, m in model.named_modules() if m.training}
    norms = [k for k, m in kinds.items() if issubclass(m, _BatchNorm) and m is not SyncBatchNorm]
    if norms:
        notes.append(
            f"{norms[0]} normalizes by the rows of its process, which depends on the number of "
            "processes. SyncBatchNorm.convert_sync_batchnorm(model) lets it normalize by those of "
            "all; model.eval() leaves it out of this comparison."
        )
    return tuple(notes)


def _not_compared(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"Not compared, since no gradient was found: {', '.join(names[:3])}{more}. What is sharded "
        "beside the model can only be compared inside it.",
    )


# -- the batch of all processes -------------------------------------------------------------------


def _sendable(batch: Any) -> Any:
    """A batch as it is sent to other processes."""
    if isinstance(batch, Tensor):
        return batch.detach().cpu()
    if isinstance(batch, Mapping):
        return {key: _sendable(part) for key, part in batch.items()}
    if isinstance(batch, list | tuple):
        return [_sendable(part) for part in batch]
    return batch


def _joined(parts: Sequence[Any], like: Any, name: str = "batch") -> Any:
    """The parts of all processes as one, where `like` is that of this process."""
    if isinstance(like, Tensor) and like.ndim:
        return torch.cat(_fitting(parts, name)).to(like.device)
    if isinstance(like, np.ndarray) and like.ndim:
        return np.concatenate(_fitting(parts, name))
    if isinstance(like, Mapping):
        held = {k: _joined([p[k] for p in parts], v, f"{name}[{k!r}]") for k, v in like.items()}
        return type(like)(held)  # type: ignore[call-arg]
    if isinstance(like, list | tuple):
        if not any(isinstance(part, Tensor | np.ndarray | Mapping | list | tuple) for part in like):
            return type(like)(item for part in parts for item in part)
        of_each = enumerate(zip(*parts, strict=True))
        held_in_order = [_joined(p, like[k], f"{name}[{k}]") for k, p in of_each]
        named = hasattr(like, "_fields")  # a named tuple
        return type(like)(*held_in_order) if named else type(like)(held_in_order)
    if any(part != parts[0] for part in parts):
        raise ValueError(f"{name} is {by_process(parts)}; pass tensors or lists with all rows.")
    return like


def _fitting(parts: Sequence[Any], name: str) -> Any:
    kinds = [f"{part.dtype} rows of shape {tuple(part.shape[1:])}" for part in parts]
    if len(set(kinds)) > 1:
        raise ValueError(f"{name} has {by_process(kinds)}; pad them to the same shape.")
    return parts
