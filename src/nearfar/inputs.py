"""Convert and check the arrays that a caller passes.

Every array enters the library here. Tensors, NumPy arrays (shared, not copied) and nested lists
become tensors, and embeddings are converted to at least float32. A wrong shape, dtype or device is
refused with a message that names the argument and the fix.
"""

import warnings
from collections.abc import Sequence
from math import inf, isfinite
from numbers import Integral
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

ArrayLike = Tensor | np.ndarray[Any, Any] | list[Any] | tuple[Any, ...]


def tensor(
    name: str,
    value: ArrayLike,
    *,
    device: torch.device | None = None,
    beside: tuple[ArrayLike | None, ...] = (),
) -> Tensor:
    """`value` as a tensor that shares its memory if possible.

    Args:
        name: the caller's name for it.
        value: a tensor, which stays on its device, or an array or nested list.
        device: the device for arrays and lists.
        beside: the other arguments, which decide the dtype of a list of floats: float64 if one of
            them is float64, else torch's default.

    Raises:
        TypeError: `value` is not a tensor, a numeric NumPy array or a nested list of numbers.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
        raise TypeError(
            f"{name} must be a tensor, got a list of tensors: pass torch.stack({name})."
        )
    try:
        array = value if isinstance(value, np.ndarray) else np.asarray(value)
        if array.dtype == np.float64 and not isinstance(value, np.ndarray):
            return torch.as_tensor(array, dtype=_list_dtype(beside), device=device)
        if not _torch_can_share(array):
            array = array.astype(array.dtype.newbyteorder("="), order="C")
        if device is not None and device.type == "mps" and array.dtype == np.float64:
            array = array.astype(np.float32)  # there is no float64 on MPS
        with warnings.catch_warnings():
            # torch warns that writing to a read-only array is undefined; nothing here writes.
            warnings.filterwarnings("ignore", "The given NumPy array is not writ", UserWarning)
            return torch.from_numpy(array).to(device)
    except (TypeError, ValueError) as error:
        if isinstance(value, np.ndarray):
            given, text = f"dtype {value.dtype}", value.dtype.kind in "US"
        else:
            shown = repr(value)
            given = f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:60] + ' ...'}"
            text = "'" in given
        fix = " Text becomes numbers with np.unique(text, return_inverse=True)[1]." if text else ""
        raise TypeError(
            f"{name} must be a tensor or an array of numbers, got {given}.{fix}"
        ) from error


def _list_dtype(others: tuple[ArrayLike | None, ...]) -> torch.dtype:
    double = any(
        value.dtype == (torch.float64 if isinstance(value, Tensor) else np.float64)
        for value in others
        if isinstance(value, Tensor | np.ndarray)
    )
    return torch.float64 if double else torch.get_default_dtype()


def _torch_can_share(array: np.ndarray[Any, Any]) -> bool:
    """Whether torch accepts the byte order (native) and the strides (whole, not negative)."""
    return array.dtype.isnative and all(
        stride >= 0 and stride % array.itemsize == 0 for stride in array.strides
    )


def embeddings(**given: ArrayLike) -> tuple[Tensor, ...]:
    """Arguments with matching rows, as (n, d) tensors of one dtype, float32 or wider.

    Raises:
        TypeError: an argument is not an array of numbers, or is bool or complex.
        ValueError: an argument is not two-dimensional, has no columns, or differs from the first
            one in shape or device.
    """
    lifted = _lifted(given)
    names = tuple(given)
    for name, x in zip(names[1:], lifted[1:], strict=True):
        if x.shape != lifted[0].shape:
            raise ValueError(
                f"{name} must have the shape of {names[0]}, {tuple(lifted[0].shape)}, since row i "
                f"of one belongs to row i of the other; got {tuple(x.shape)}."
            )
        same_device(name, x, names[0], lifted[0])
    return _of_one_dtype(lifted)


def _lifted(given: dict[str, ArrayLike]) -> tuple[Tensor, ...]:
    """Each argument as a matrix. One passed twice is lifted once: its gradients add up exactly."""
    values = tuple(given.values())
    lifted: list[Tensor] = []
    for name, value in given.items():
        first = next(k for k, other in enumerate(values) if other is value)
        lifted.append(lifted[first] if first < len(lifted) else _matrix(name, value, values))
    return tuple(lifted)


def batch(
    name: str, value: ArrayLike, *, like: Tensor | None = None, other: ArrayLike | None = None
) -> Tensor:
    """(n, d) embeddings in their own dtype, for the engine, which lifts them itself.

    Args:
        name: the caller's name for `value`.
        value: the embeddings.
        like: embeddings that must have the same width and device.
        other: the other embeddings of the call, which are not checked yet.
    """
    x = _shaped(name, tensor(name, value, beside=(like, other)))
    if not x.is_floating_point():
        x = lift(name, x)
    if like is not None:
        _same_width(name, x, like.shape[1])
        same_device(name, x, "the embeddings", like)
    return x


def _of_one_dtype(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    common = tensors[0].dtype
    for x in tensors[1:]:
        common = torch.promote_types(common, x.dtype)
    return tuple(x.to(common) for x in tensors)


def matrix(name: str, value: ArrayLike, *, width: int, like: Tensor) -> Tensor:
    """An argument with its own number of rows, `width` columns, and the device of `like`."""
    x = _matrix(name, value, (like,))
    _same_width(name, x, width)
    same_device(name, x, "the embeddings", like)
    return x


def vector(name: str, value: ArrayLike) -> Tensor:
    """An (n,) argument of real numbers, in float32 or wider."""
    x = lift(name, tensor(name, value))
    if x.ndim != 1:
        raise ValueError(f"{name} must have shape (n,), got {tuple(x.shape)}.{_squeeze(name, x)}")
    return x


def lift(name: str, x: Tensor) -> Tensor:
    """`x` in the precision the losses compute in, with every non-finite entry replaced by NaN.

    float16 and bfloat16 become float32, integers the default dtype. Infinite entries become NaN, so
    that no later `max(0, margin - distance)` can hide a bad row behind a finite loss.
    """
    if x.dtype in (torch.float32, torch.float64):
        if readable(x) and isfinite(x.detach().sum().item()):
            return x  # unchanged: if any entry were not finite, the sum would not be either
        return torch.add(x, x, alpha=0)  # x + 0 x: NaN where x is infinite, in one cheap step
    if x.dtype is torch.bool or x.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {x.dtype}.")
    if not x.is_floating_point():
        return x.to(torch.get_default_dtype())
    lifted: Tensor = _Lift.apply(x)  # type: ignore[no-untyped-call]
    return lifted


def readable(x: Tensor) -> bool:
    """Whether reading its values neither stalls an accelerator nor breaks a trace."""
    return x.is_cpu and not tracing()


def tracing() -> bool:
    """Whether this runs inside a compiled or vectorised function, where values are unknown."""
    return torch.compiler.is_compiling() or transformed()


def transformed() -> bool:
    """Whether this runs inside a transform of torch.func, such as vmap."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def batched(gradient: Tensor) -> bool:
    """Whether it is a batch of gradients, as with `torch.autograd.grad(is_grads_batched=True)`."""
    return torch._C._functorch.is_legacy_batchedtensor(gradient)


def same_device(name: str, x: Tensor, reference_name: str, reference: Tensor) -> None:
    """Refuse tensors on different devices before torch does, with a clearer message."""
    if x.device != reference.device:
        raise ValueError(
            f"{name} is on {x.device} and {reference_name} on {reference.device}; they must be on "
            f"the same device: pass torch.as_tensor({name}, device={str(reference.device)!r})."
        )


def above_zero(name: str, value: float | Tensor) -> float | Tensor:
    """A number above 0, or a tensor that holds one.

    A tensor that is not above 0 is replaced by NaN, not refused: it is learned, and a training run
    that diverges is not a mistake in the call. On an accelerator the value is not read, since that
    would stall the device.
    """
    if isinstance(value, Tensor):
        value = one_number(name, value)
        if readable(value) and value.item() > 0:
            return value
        return torch.where(value > 0, value, torch.nan)
    if not _is_number(value) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a number above 0, got {value!r}.")
    return value


def positive_number(name: str, value: float) -> float:
    """A number above 0; tensors are refused, since the value is not learned."""
    if isinstance(value, Tensor):
        hint = f" It is not learned here: pass float({name})." if value.numel() == 1 else ""
        raise TypeError(f"{name} must be a number above 0, got a tensor.{hint}")
    return float(above_zero(name, value))


def one_number(name: str, value: Tensor) -> Tensor:
    """A tensor with one element as a scalar tensor, in float32 or wider."""
    if value.numel() != 1:
        raise ValueError(f"{name} must be one number, got shape {tuple(value.shape)}.")
    value = value if value.ndim == 0 else value.reshape(())
    return value if value.dtype in (torch.float32, torch.float64) else lift(name, value)


def finite(name: str, value: float | Tensor) -> float | Tensor:
    """A finite number, or a tensor that holds one."""
    if isinstance(value, Tensor):
        return one_number(name, value)
    return between(name, value, -inf, inf)


def between(name: str, value: float, low: float, high: float, why: str = "") -> float:
    """A finite number with low <= value <= high."""
    if not (_is_number(value) and low <= value <= high and isfinite(value)):
        limits = f" at least {low:g}" if high == inf else f" from {low:g} to {high:g}"
        wanted = "a finite number" if low == -inf else f"a number{limits}"
        raise ValueError(f"{name} must be {wanted}{why}, got {value!r}.")
    return value


def switch(name: str, value: bool) -> bool:
    """True or False; other values are refused, since "no" would be true, and None false."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}.")
    return bool(value)


def one_of(name: str, value: object, choices: object) -> None:
    """Refuse a value that is not one of those of a `Literal`."""
    if value not in get_args(choices):
        known = ", ".join(map(repr, get_args(choices)))
        raise ValueError(f"{name} must be one of {known}; got {value!r}.")


def positive_integer(name: str, value: int) -> int:
    """An integer of at least 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
    return int(value)


def rates(name: str, values: Sequence[float]) -> tuple[float, ...]:
    """Rates r with 0 <= r < 1, as floats.

    Raises:
        TypeError: `values` is not a sequence.
        ValueError: a rate is out of range, such as a percentage.
    """
    if not isinstance(values, Sequence | np.ndarray) or isinstance(values, str):
        raise TypeError(f"{name} must be a sequence of rates, such as (0.1, 0.01); got {values!r}.")
    for value in values:
        if not (_is_number(value) and 0 <= value < 1):
            raise ValueError(
                f"{name} must hold rates from 0 to below 1, got {value!r}; 5 % is 0.05."
            )
    return tuple(float(value) for value in values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _same_width(name: str, x: Tensor, width: int) -> None:
    if x.shape[1] != width:
        raise ValueError(
            f"{name} must have rows of length {width}, like the embeddings it is compared with; "
            f"got {tuple(x.shape)}."
        )


def _matrix(name: str, value: ArrayLike, beside: tuple[ArrayLike, ...]) -> Tensor:
    return lift(name, _shaped(name, tensor(name, value, beside=beside)))


def _shaped(name: str, x: Tensor) -> Tensor:
    if x.layout is not torch.strided:
        raise ValueError(f"{name} must be dense, got {x.layout}. Pass {name}.to_dense().")
    if x.ndim != 2:
        raise ValueError(
            f"{name} must have shape (n, d), one embedding per row, got {tuple(x.shape)}."
            + (f" For a single pair pass {name}[None]." if x.ndim == 1 else "")
        )
    if x.shape[1] == 0:
        raise ValueError(f"{name} must have at least one column, got {tuple(x.shape)}.")
    return x


def _squeeze(name: str, x: Tensor) -> str:
    return f" Pass {name}.squeeze(1)." if x.ndim == 2 and x.shape[1] == 1 else ""


class _Lift(torch.autograd.Function):
    """Implements `lift`. The gradient has the dtype of `x` and becomes infinite on overflow."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return torch.where(torch.isfinite(wide), wide, torch.nan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.to(ctx.dtype)
