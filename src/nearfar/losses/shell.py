"""The `nn.Module` shell of a loss function."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

# Keywords that follow the data from batch to batch: `forward` takes them, not the constructor.
_DATA = {"weight", "reference", "reference_labels", "reference_self", "hard_negatives"}


def as_module(loss: Callable[..., Tensor]) -> type[nn.Module]:
    """The module class of a loss function: it holds the hyperparameters and does nothing else.

    The keyword-only parameters of the function become those of the class, with the same defaults;
    the others are what `forward` takes. A temperature, scale or bias given as an `nn.Parameter` is
    learned, `InfoNCELoss(temperature=nn.Parameter(torch.tensor(0.07)))`; other tensors are buffers.
    """
    signature = inspect.signature(loss)
    defaults = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in _DATA
    }
    name = _camel_case(loss.__name__)
    summary = (inspect.getdoc(loss) or "").partition("\n")[0]

    def init(self: nn.Module, *given: Any, **hyperparameters: Any) -> None:
        if given:
            raise TypeError(f"{name} takes {', '.join(defaults)} by name; got {given[0]!r} alone.")
        unknown = ", ".join(sorted(hyperparameters.keys() - defaults.keys()))
        if unknown:
            raise TypeError(f"{name} takes {', '.join(defaults)}; got {unknown}.")
        nn.Module.__init__(self)
        for key, default in defaults.items():
            value = hyperparameters.get(key, default)
            if value is inspect.Parameter.empty:
                raise TypeError(f"{name} needs {key}: there is no default that suits everyone.")
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                if value.grad_fn is not None:
                    raise ValueError(
                        f"{name} keeps {key} from step to step, and got one computed from another "
                        f"tensor, whose graph is gone after one step. Give an nn.Parameter, or "
                        f"call nearfar.{loss.__name__}(..., {key}=...) with it in each step."
                    )
                self.register_buffer(key, value)
            else:
                setattr(self, key, value)

    def forward(self: nn.Module, *data: Any, **keyword_data: Any) -> Tensor:
        return loss(*data, **keyword_data, **{key: getattr(self, key) for key in defaults})

    def extra_repr(self: nn.Module) -> str:
        return ", ".join(f"{key}={getattr(self, key)!r}" for key in defaults)

    keyword_only = [p for key, p in signature.parameters.items() if key in defaults]
    return type(
        name,
        (nn.Module,),
        {
            "__init__": init,
            "__doc__": f"{summary}\n\nThe module of :func:`nearfar.{loss.__name__}`, which see.",
            "__module__": loss.__module__,
            "__signature__": inspect.Signature(keyword_only),
            "forward": forward,
            "extra_repr": extra_repr,
            "loss": staticmethod(loss),
        },
    )


def unwrap(
    loss: Callable[..., Tensor], hyperparameters: dict[str, Any]
) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """The function behind a loss or its module, and what it takes by keyword.

    The reduction and the wish for statistics are left out: they shape what comes, not the loss.

    Raises:
        TypeError: `loss` is not one of nearfar's, or a reduction is given.
    """
    function = getattr(loss, "loss", loss) if isinstance(loss, nn.Module) else loss
    if not inspect.isfunction(function) or not function.__module__.startswith("nearfar."):
        raise TypeError(
            "this looks into nearfar's losses, such as contrastive_loss or TripletLoss(); got "
            f"{loss!r}."
        )
    parameters = inspect.signature(function).parameters.values()
    settings = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    if "reduction" in hyperparameters:
        raise TypeError("each row is looked at by itself: leave reduction out.")
    settings.pop("reduction", None)
    if isinstance(loss, nn.Module):
        settings = {name: getattr(loss, name, default) for name, default in settings.items()}
    settings |= hyperparameters
    settings.pop("return_stats", None)
    return function, settings


def _camel_case(function_name: str) -> str:
    """info_nce_loss -> InfoNCELoss."""
    spelled = {"nce": "NCE", "nca": "NCA", "nt": "NT", "clip": "CLIP", "siglip": "SigLIP"}
    return "".join(spelled.get(part, part.capitalize()) for part in function_name.split("_"))
