"""What all loss modules share, and how to find the function behind a loss."""

import inspect
from collections.abc import Callable, Iterable, Set
from functools import wraps
from types import FunctionType
from typing import Any, ClassVar, TypeGuard, TypeVar, cast

from torch import Tensor, nn

from nearfar.losses.own import batch_loss, check_rule, with_rule
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
        return ", ".join(f"{key}={getattr(self, key)!r}" for key in self._names)


def by_name(init: Init) -> Init:
    """Wrap a constructor so that a wrong argument raises an error that lists the valid ones."""
    takes = list(inspect.signature(init).parameters.values())[1:]
    known = ", ".join(p.name for p in takes)

    @wraps(init)
    def checked(self: nn.Module, *given: object, **hyperparameters: object) -> None:
        name = type(self).__name__
        if given:
            raise TypeError(f"{name} takes {known} by name; got {given[0]!r} alone.")
        unknown = ", ".join(sorted(hyperparameters.keys() - {p.name for p in takes}))
        if unknown:
            raise TypeError(f"{name} takes {known}; got {unknown}.")
        for p in takes:
            if p.default is p.empty and p.name not in hyperparameters:
                raise TypeError(f"{name} needs {p.name}: no default suits all data.")
        init(self, **hyperparameters)

    return cast(Init, checked)


def unwrap(
    loss: Callable[..., Tensor], data: tuple[Any, ...], hyperparameters: dict[str, Any]
) -> tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]:
    """The function behind a loss or its module, its data, and what it takes by keyword.

    The rule of `batch_loss` is no data, so it is put beside its other settings. The reduction is
    left out: it shapes what comes, not the loss. So is what is not given and has no default.

    Raises:
        TypeError: `loss` is not one of nearfar's, does not take one of the keywords, or is given
            a reduction.
    """
    function = getattr(loss, "loss", loss) if isinstance(loss, nn.Module) else loss
    if not _is_loss(function):
        raise TypeError(
            "loss must be one of nearfar's losses itself, such as nearfar.sup_con_loss or "
            "nearfar.TripletLoss(), followed by its arguments, or nearfar.batch_loss, followed by "
            f"a rule and its arguments; got {loss!r}."
        )
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
