"""What all loss modules share, and how to find the function behind a loss."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from functools import wraps
from types import FunctionType
from typing import Any, ClassVar, TypeGuard, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nearfar.distance import unit
from nearfar.engine.meeting import Group, Over, over_processes
from nearfar.inputs import ArrayLike, positive_integer
from nearfar.losses.own import batch_loss, check_rule, with_rule
from nearfar.losses.proxy import class_logits, nearest_class
from nearfar.registry import LOSSES

Init = TypeVar("Init", bound=Callable[..., None])
# Until version 0.2, these described the rows that are now a Reference.
OF_0_1 = {"reference_labels", "reference_self"}


class LossModule(nn.Module):
    """A loss function together with its hyperparameters, kept from step to step.

    A temperature, scale or bias given as an `nn.Parameter` is learned,
    `InfoNCELoss(temperature=nn.Parameter(torch.tensor(0.07)))`; other tensors are buffers.

    Attributes:
        loss: the function.
    """

    loss: ClassVar[Callable[..., Tensor]]

    def __init__(self, **hyperparameters: object) -> None:
        super().__init__()
        self._names = tuple(hyperparameters)
        for key, value in hyperparameters.items():
            if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
                setattr(self, key, value)
                continue
            if value.grad_fn is not None:
                raise ValueError(
                    f"{type(self).__name__} keeps {key} from step to step, but the one given was "
                    "computed from another tensor, whose graph is freed after one step. Pass an "
                    f"nn.Parameter, or call nearfar.{self.loss.__name__}(..., {key}=...) in each "
                    "step."
                )
            self.register_buffer(key, value)

    def extra_repr(self) -> str:
        shown = {key: " ".join(repr(getattr(self, key)).split()) for key in self._names}
        return ", ".join(f"{key}={value}" for key, value in shown.items())

    @classmethod
    def why_needed(cls) -> str:
        """Why an argument has no default, for the error if it is missing."""
        return "no default suits all data."


class ProxyLossModule(LossModule):
    """A loss against proxies of classes, which holds them.

    They start as random directions: normal vectors, scaled to length 1. Pass `parameters()` to the
    optimizer together with those of the network.

    Args:
        n_classes: the number of classes; their ids are 0 to n_classes - 1.
        dim: the length of an embedding.
        sub_centers: how many proxies each class has.
        generator: draws the first proxies. None: torch's default.
        device: where the proxies are. None: torch's default.
        dtype: of the proxies. None: torch's default.
        hyperparameters: of the loss.

    Attributes:
        proxies: (n_classes, dim), or (n_classes, sub_centers, dim) with several per class.

    >>> from nearfar import ProxySoftmaxLoss
    >>> loss = ProxySoftmaxLoss(3, 2, scale=10.0, generator=torch.Generator().manual_seed(0))
    >>> x, labels = torch.tensor([[1.0, 0], [0, 1], [-1, 0]]), [0, 1, 2]
    >>> optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     loss(x, labels).backward()
    ...     optimizer.step()
    >>> loss.predict(x)
    tensor([0, 1, 2])
    """

    scale: float | Tensor
    normalize: bool = True  # of the losses that take no such argument
    proxies: nn.Parameter

    def __init__(
        self,
        n_classes: int,
        dim: int,
        *,
        sub_centers: int = 1,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **hyperparameters: object,
    ) -> None:
        super().__init__(**hyperparameters)
        sizes = {"n_classes": n_classes, "dim": dim, "sub_centers": sub_centers}
        for name, size in sizes.items():
            positive_integer(name, size)
        shape = (n_classes, dim) if sub_centers == 1 else (n_classes, sub_centers, dim)
        self.proxies = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the proxies anew."""
        with torch.no_grad():
            self.proxies.copy_(unit(self.proxies.normal_(generator=generator)))

    def logits(self, x: ArrayLike) -> Tensor:
        """(n, n_classes) the scale times the cosine of each row with each class, without a margin.

        Of several proxies of a class the largest cosine counts; with normalize=False it is the
        product. Gradients reach `x`, the proxies and a learned scale.

        For `ProxyNCALoss`, take the softmax of 2 * logits: its exponents are -scale times the
        squared distance, which is 2 - 2 cos, and so twice the logits, less a constant.

        Args:
            x: (n, dim) embeddings.
        """
        return class_logits(x, self.proxies, self.scale, normalize=self.normalize)

    def predict(self, x: ArrayLike) -> Tensor:
        """(n,) the class of the largest logit of each row, in memory linear in the rows.

        Args:
            x: (n, dim) embeddings.

        Raises:
            ValueError: a row or a proxy that is not finite.
        """
        return nearest_class(x, self.proxies, normalize=self.normalize)

    def extra_repr(self) -> str:
        n_classes, *several, dim = self.proxies.shape
        sizes = [f"{n_classes}, {dim}", *(f"sub_centers={k}" for k in several)]
        return ", ".join([*sizes, super().extra_repr()])

    @classmethod
    def why_needed(cls) -> str:
        return (
            f"it holds the proxies. Write loss = nearfar.{cls.__name__}(n_classes, dim) and "
            "loss(x, labels), or, with proxies of your own, "
            f"nearfar.{cls.loss.__name__}(x, proxies, labels)."
        )


def by_name(init: Init) -> Init:
    """Wrap a constructor so that a wrong argument raises an error that lists the valid ones."""
    takes = list(inspect.signature(init).parameters.values())[1:]
    in_order = [p.name for p in takes if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = [p.name for p in takes if p.name not in in_order]

    @wraps(init)
    def checked(self: LossModule, *given: object, **hyperparameters: object) -> None:
        name = type(self).__name__
        if len(given) > len(in_order):
            alone = given[len(in_order)]
            raise TypeError(f"{name} takes {', '.join(named)} by name; got {alone!r} alone.")
        placed = dict(zip(in_order, given, strict=False))
        if twice := ", ".join(placed.keys() & hyperparameters.keys()):
            raise TypeError(f"{name} got {twice} twice, by place and by name.")
        hyperparameters = placed | hyperparameters
        if unknown := hyperparameters.keys() - {p.name for p in takes}:
            known = ", ".join([*in_order, *named])
            fix = _fix_of_data(type(self), unknown)
            raise TypeError(f"{name} takes {known}; got {', '.join(sorted(unknown))}.{fix}")
        for p in takes:
            if p.default is p.empty and p.name not in hyperparameters:
                raise TypeError(f"{name} needs {p.name}: {self.why_needed()}")
        init(self, **hyperparameters)

    return cast(Init, checked)


def _fix_of_data(module: type[LossModule], unknown: Set[str]) -> str:
    """What to do if some arguments of a constructor are those of each call; else nothing."""
    forward = inspect.signature(module.forward).parameters
    data = [name for name in forward if name in unknown]
    if not data:
        return ""
    needed = [p.name for p in forward.values() if p.default is p.empty and p.name != "self"]
    call = [*needed, *(f"{name}={name}" for name in data if name not in needed)]
    return f" Pass {', '.join(data)} in each call: loss({', '.join(call)})."


@contextmanager
def error_of_all(loss: object, hyperparameters: Mapping[str, Any]) -> Iterator[None]:
    """An error within it, before the loss is called, is one of all processes of its `group`."""
    try:
        yield
    except Exception as error:
        group = hyperparameters.get("group", getattr(loss, "group", None))
        if group is None or not dist.is_available() or not dist.is_initialized():
            raise
        if isinstance(group, Over) and group.known:  # the others were told all in an earlier step
            raise
        _tell(error, group=group)


@over_processes
def _tell(error: Exception, *, group: Group | None) -> None:
    """Raise an error where the other processes call a loss."""
    raise error


def unwrap(
    loss: Callable[..., Tensor], data: tuple[Any, ...], hyperparameters: dict[str, Any]
) -> tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]:
    """The function behind a loss or its module, its data, and what it takes by keyword.

    The rule of `batch_loss` is no data, so it is put beside its other settings. Proxies that a
    module holds are data. The reduction is left out: it shapes what comes, not the loss. So is what
    is not given and has no default.

    Raises:
        TypeError: `loss` is not one of nearfar's, does not take one of the keywords, or is given
            a reduction.
    """
    with error_of_all(loss, hyperparameters):
        return _unwrapped(loss, data, hyperparameters)


def _unwrapped(
    loss: Callable[..., Tensor], data: tuple[Any, ...], hyperparameters: dict[str, Any]
) -> tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]:
    function = getattr(loss, "loss", loss) if isinstance(loss, nn.Module) else loss
    if not _is_loss(function):
        raise TypeError(
            "loss must be one of nearfar's losses itself, such as nearfar.sup_con_loss or "
            "nearfar.TripletLoss(), followed by its arguments, or nearfar.batch_loss, followed by "
            f"a rule and its arguments; got {loss!r}."
        )
    if isinstance(loss, ProxyLossModule):
        data = (*data[:1], loss.proxies, *data[1:])
    if function is batch_loss:
        if "rule" not in hyperparameters:
            data, hyperparameters = data[1:], {"rule": data[0] if data else None, **hyperparameters}
        check_rule(hyperparameters["rule"])
    parameters = inspect.signature(function).parameters
    _refuse_unknown(function.__name__, hyperparameters.keys() - parameters.keys(), parameters)
    if "reduction" in hyperparameters:
        raise TypeError("each row is examined by itself: leave reduction out.")
    settings = {p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
    settings.pop("reduction", None)
    if isinstance(loss, nn.Module):
        settings = {name: getattr(loss, name, default) for name, default in settings.items()}
    empty = inspect.Parameter.empty
    settings = {k: v for k, v in settings.items() if v is not None and v is not empty}
    return (with_rule if function is batch_loss else function), data, settings | hyperparameters


def _is_loss(function: object) -> TypeGuard[FunctionType]:
    return function is batch_loss or (
        inspect.isfunction(function)
        and (function.__module__ or "").startswith("nearfar.losses.")
        and function.__name__ in {loss.function for loss in LOSSES}
    )


def _refuse_unknown(loss: str, unknown: Set[str], known: Iterable[str]) -> None:
    if unknown:
        fix = " Pass reference=nearfar.Reference(x, labels, own)." if unknown & OF_0_1 else ""
        raise TypeError(f"{loss} takes {', '.join(known)}; got {', '.join(sorted(unknown))}.{fix}")
