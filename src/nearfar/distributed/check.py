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

from nearfar.engine.meeting import Group, alone, as_over, by_process, processes_of
from nearfar.engine.processes import Processes
from nearfar.tabulate import Table

Batch = TypeVar("Batch")
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
        compared: the loss and every parameter.
        notes: what is likely the cause, and what could not be compared.
    """

    compared: tuple[Compared, ...]
    notes: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Whether the loss and all gradients are right."""
        return all(one.verdict == "right" for one in self.compared)

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
    buffers and random states are afterwards as they were; no optimizer takes a step.

    All parameters that get a gradient are compared, also a temperature or proxies beside the model.
    Dropout is switched off, since no two processes drop the same; only what functions such as
    `torch.nn.functional.dropout` drop is left to `model.eval()`.

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
    """
    processes = processes_of(as_over(group))
    whole = _joined(processes.tell_any(_on_host(batch)), batch)
    single = model.module if isinstance(model, DistributedDataParallel) else model
    reference = loss if one_process is None else one_process
    with _restored(model) as drops:
        with alone():
            true_value = _value(reference, single, whole)
            parameters = _parameters(single, true_value)
            with _own_gradients(parameters) as true:
                true_value.backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                of_own_rows = _value(reference, single, batch)
        value = _value(loss, model, batch)
        with _own_gradients(parameters) as ours:
            value.backward()  # type: ignore[no-untyped-call]
            if after_backward is not None:
                after_backward()
    values = [float(v) for v in (value.detach(), of_own_rows.detach(), true_value.detach())]
    told = processes.tell_any(values)
    found = (
        _of_values([v for v, _, _ in told], values[2], tolerance),
        *_of_gradients(ours, true, processes, tolerance),
    )
    return Check(found, _notes(found, told, processes.size, single, drops=drops))


def _value(loss: Loss[Batch], model: nn.Module, batch: Batch) -> Tensor:
    """The loss, with the random numbers that all calls have."""
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(sorted(devices)):
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
            grad: Any = torch.zeros_like(p) if p.grad is None else p.grad
            whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            found[name] = whole.detach().double().flatten().clone()
    finally:
        for name, p in parameters.items():
            p.grad = before[name]


def _parameters(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    """Those of the model, and what else the value has a gradient by."""
    found: dict[str, Tensor] = {k: p for k, p in model.named_parameters() if p.requires_grad}
    if any(hasattr(p, "full_tensor") for p in found.values()):
        return found  # the value was computed from copies of the shards
    of_model = len(found)
    known = {id(p) for p in found.values()}
    waiting, seen = [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in reversed(node.next_functions)]
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and id(leaf) not in known:
            known.add(id(leaf))
            found[f"loss parameter {len(known) - of_model} {tuple(leaf.shape)}"] = leaf
    return found


# -- what is said of it ---------------------------------------------------------------------------


def _of_values(values: Sequence[float], true: float, tolerance: float) -> Compared:
    mean, size = sum(values) / len(values), len(values)
    error = abs(mean - true) / max(abs(true), 1e-30) if mean != true else 0.0
    if error <= tolerance:
        return Compared("loss", error, "right")
    factor = _as_factor(mean / true if true else 0.0, size, tolerance)
    return Compared("loss", error, factor or "different")


def _of_gradients(
    ours: Mapping[str, Tensor],
    true: Mapping[str, Tensor],
    processes: Processes,
    tolerance: float,
) -> list[Compared]:
    faint = FAINT * max((float(g.norm()) for g in true.values()), default=0.0)
    found = []
    for name, right in true.items():
        mean = processes.total(ours[name]) / processes.size
        found.append(_verdict(ours[name], mean, right, faint, processes.size, tolerance))
    compared = []
    for name, of_each in zip(true, zip(*processes.tell_any(found), strict=True), strict=True):
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
    values: Sequence[Sequence[float]],
    size: int,
    model: nn.Module,
    *,
    drops: bool,
) -> tuple[str, ...]:
    """What is likely the cause, and what could not be compared."""
    notes = []
    wrong = [one.verdict for one in found if one.verdict != "right"]
    large, small = (f"{size} times too {too}" for too in ("large", "small"))
    if wrong and size > 1 and all(isclose(v, of_own, rel_tol=1e-5) for v, of_own, _ in values):
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


# -- the batch of all processes -------------------------------------------------------------------


def _on_host(batch: Any) -> Any:
    """A batch as it is sent from host to host."""
    if isinstance(batch, Tensor):
        return batch.detach().cpu()
    if isinstance(batch, Mapping):
        return {key: _on_host(part) for key, part in batch.items()}
    if isinstance(batch, list | tuple):
        return [_on_host(part) for part in batch]
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
