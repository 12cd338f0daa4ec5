"""One reduction of gradients between processes a step: DistributedDataParallel and FSDP2.

A module that reduces gradients would do so in the backward of every chunk. Here it does in that of
the last chunk that it encodes, where it finds the gradients of all chunks.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten

from nearfar.cached.replay import kept_statistics
from nearfar.engine.meeting import Over, processes_of
from nearfar.shards import is_sharded

Job = tuple[int, int]  # an encoder and one of its chunks
Encode = Callable[[Any], Any]


def modules_of(encode: Encode) -> list[nn.Module]:
    """The modules that an encoder may call, with all that are inside them.

    Those of a module, of the object of a bound method, of the arguments of a `partial`, and those
    that a function names: variables around it, and globals.
    """
    found: dict[nn.Module, None] = {}
    seen: set[int] = set()
    waiting: list[Any] = [encode]
    while waiting:
        thing = waiting.pop()
        if isinstance(thing, nn.Module):
            found |= dict.fromkeys(thing.modules())
        elif id(thing) not in seen:
            seen.add(id(thing))
            waiting += _named_by(thing)
    return list(found)


def _named_by(thing: Any) -> Iterable[Any]:
    """What a function, a method or an object refers to and that may be or hold a module."""
    if isinstance(thing, MethodType):
        return (thing.__self__, thing.__func__)
    if isinstance(thing, partial):
        return (thing.func, *thing.args, *thing.keywords.values())
    if isinstance(thing, FunctionType):
        names = {name: thing.__globals__.get(name) for name in _global_names(thing.__code__)}
        held = [*names.values(), *map(_content, thing.__closure__ or ())]
        # Functions of other modules, such as those of torch, name thousands more.
        return (
            x for x in held if not isinstance(x, FunctionType) or x.__module__ == thing.__module__
        )
    if isinstance(thing, ModuleType | type | Tensor):
        return ()
    if not isinstance(thing, list | tuple):
        thing = (thing if isinstance(thing, dict) else getattr(thing, "__dict__", {})).values()
    return (x for x in thing if isinstance(x, nn.Module))


def _global_names(code: CodeType) -> set[str]:
    """Those that a function may read, and the functions inside it."""
    inside = (_global_names(x) for x in code.co_consts if isinstance(x, CodeType))
    return set(code.co_names).union(*inside)


def _content(cell: CellType) -> Any:
    """A variable around a function; None if it has no value yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


class Reductions:
    """The modules of some encoders that reduce gradients, and after which chunk each of them does.

    Attributes:
        ddp: the modules in DistributedDataParallel.
        sharded: the outermost modules that FSDP2 shards.
    """

    def __init__(self, modules: Sequence[Sequence[nn.Module]]) -> None:
        """Find them among the modules that each encoder may call."""
        self._reach = [set(group) for group in modules]
        every = list(dict.fromkeys(module for group in modules for module in group))
        self.ddp = [m for m in every if isinstance(m, DistributedDataParallel)]
        sharded = [m for m in every if is_sharded(m)]
        inside = {m for outer in sharded for m in outer.modules() if m is not outer}
        self.sharded = [m for m in sharded if m not in inside]
        trained = [m for m in self.sharded if any(p.requires_grad for p in m.parameters())]
        self._calls: dict[nn.Module, list[Job]] = {m: [] for m in (*self.ddp, *trained)}
        self._last: dict[nn.Module, Job] = {}
        self._job: Job | None = None

    def agree(self, encoder: int, chunks: int) -> int:
        """How many chunks each process is to encode.

        The forward of sharded parameters gathers them, so all processes run as many.
        """
        sharded = [m for m in self.sharded if m in self._reach[encoder]]
        parameters: list[Any] = [p for module in sharded for p in module.parameters()]
        meshes = {p.device_mesh for p in parameters if hasattr(p, "device_mesh")}
        for mesh in sorted(meshes, key=str):
            for dim in range(mesh.ndim):
                told = processes_of(Over(mesh.get_group(dim))).tell([chunks])
                chunks = max(most for (most,) in told)
        return chunks

    def rehearse(self, encoder: int, step: Callable[[], None]) -> None:
        """Let static graphs learn what they wait for in later steps, from one chunk.

        DistributedDataParallel counts how often the first backward reaches each parameter. It
        counts all chunks up to the first reduction, and would wait for as many in each reduction.

        Args:
            encoder: which encoder.
            step: encodes a chunk, and sends zeros back.
        """
        learning = [m for m in self.ddp if m in self._reach[encoder] and _learns_its_graph(m)]
        if not learning:
            return
        parameters = [p for m in learning for p in m.parameters() if p.requires_grad]
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = torch.zeros_like(p)
        try:
            with kept_statistics(self._reach[encoder]), ExitStack() as stack:
                for module in learning:
                    stack.enter_context(_complete(module))
                    stack.enter_context(_reducing(module))
                step()
        finally:
            for p, gradient in zip(parameters, before, strict=True):
                p.grad = gradient

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """Nothing is reduced, and who encodes which chunk is noted."""
        with ExitStack() as stack:
            for ddp in self.ddp:
                stack.enter_context(ddp.no_sync())
            for module in self._calls:
                hook = module.register_forward_pre_hook(self._note)
                stack.callback(hook.remove)
            yield

    def _note(self, module: nn.Module, arguments: object) -> None:
        assert self._job is not None
        self._calls[module].append(self._job)

    def begin(self, job: Job) -> None:
        """Say which chunk comes next in the first pass."""
        self._job = job

    @contextmanager
    def second_pass(self, jobs: Sequence[Job]) -> Iterator[None]:
        """What is reduced after which of the chunks is decided, and undone at the end."""
        for module, called in self._calls.items():
            # No call is seen of a compiled module, nor where a method is called in its place.
            reach = [job for job in jobs if module in self._reach[job[0]]]
            self._last[module] = (called or reach)[-1]
        try:
            yield
        finally:
            for module in self._last.keys() - set(self.ddp):
                _reduce_sharded(module, True)

    def awaits(self, job: Job) -> bool:
        """Whether other processes wait for this chunk, even if nothing is learned from it."""
        return any(
            job == last or (module in self.sharded and module in self._reach[job[0]])
            for module, last in self._last.items()
        )

    @contextmanager
    def during(self, job: Job) -> Iterator[None]:
        """In the forward and the backward of a chunk, only modules that end with it reduce."""
        with ExitStack() as stack:
            for module, last in self._last.items():
                ends = last == job
                if isinstance(module, DistributedDataParallel):
                    stack.enter_context(_complete(module) if ends else module.no_sync())
                else:
                    _reduce_sharded(module, ends)
            yield


def _learns_its_graph(module: DistributedDataParallel) -> bool:
    return module.static_graph and not module._static_graph_delay_allreduce_enqueued


def _reduce_sharded(module: Any, now: bool) -> None:
    module.set_requires_gradient_sync(now)
    module.set_is_last_backward(now)


@contextmanager
def _reducing(module: DistributedDataParallel) -> Iterator[None]:
    """Undo the caller's `no_sync`."""
    before, module.require_backward_grad_sync = module.require_backward_grad_sync, True
    try:
        yield
    finally:
        module.require_backward_grad_sync = before


@contextmanager
def _complete(module: DistributedDataParallel) -> Iterator[None]:
    """Have the backward reach every parameter, so that all gradients are reduced.

    A parameter that only earlier chunks, the loss or other processes have used is outside the graph
    of the last chunk. DistributedDataParallel would wait for it, or take it for unused.
    """
    hook = module.module.register_forward_hook(_reach_parameters)
    try:
        yield
    finally:
        hook.remove()


def _reach_parameters(module: nn.Module, arguments: object, output: Any) -> Any:
    parameters = [p for p in module.parameters() if p.requires_grad]
    leaves, spec = tree_flatten(output)
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
    if places:
        tensors = (*(leaves[i] for i in places), *parameters)
        reaching = _Reach.apply(len(places), *tensors)  # type: ignore[no-untyped-call]
        for i, x in zip(places, reaching, strict=True):
            leaves[i] = x
    return tree_unflatten(leaves, spec)


class _Reach(torch.autograd.Function):
    """The outputs as they are; the backward reaches parameters too, and adds nothing to them."""

    @staticmethod
    def forward(ctx: Any, outputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.parameters = len(tensors) - outputs
        return tuple(x.clone() for x in tensors[:outputs])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *gradients, *[None] * ctx.parameters)
