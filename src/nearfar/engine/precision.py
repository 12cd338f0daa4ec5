"""The precision of matrix products: which one a loss is to use, and rounding to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from nearfar.inputs import one_of

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
# Whether rows may be rounded before they are multiplied: where torch would round them too, only if
# asked, or never, since nothing is multiplied.
Rounding = Literal["as torch", "if asked", "never"]

_precision: ContextVar[Precision | None] = ContextVar("precision", default=None)


@contextmanager
def precision(precision: Precision) -> Iterator[None]:
    """Set the precision of the matrix products of every whole-batch loss called inside the block.

    Lower precision is faster on an accelerator. Rows are rounded to it before they are multiplied
    with each other, and so are forces before they are multiplied with rows. Everything else stays
    float32: the sums inside the products, exponentials, losses and gradients. The `precision`
    argument of a loss goes before that of the context.

    Without either, a CPU uses "float32". An accelerator uses what `torch.mm` would: the dtype of
    `torch.autocast` where that is on, else that of the embeddings, and "tf32" for float32 where
    `torch.backends.cuda.matmul` allows it. Distances, and minus the squared distance as a
    similarity, use "float32" unless asked, since near rows lose their digits. float64 embeddings,
    and rows whose distance is no product ("snr", "manhattan", a p-norm or a function of your own),
    are never rounded: the argument raises an error for them, and the context leaves them alone.

    On a CPU, rounded numbers are multiplied in float32. This gives the result of an accelerator,
    and is no faster than float32. A graph of `torch.compile` cannot see the context: where
    `info_nce_loss` with `negatives` is compiled, pass the argument.

    Args:
        precision: "float32", "tf32" (10 bits after the leading one), "bfloat16" (7 bits) or
            "float16" (10 bits, up to 65,504; what is larger becomes infinite).

    Raises:
        ValueError: another precision.

    >>> import nearfar as nf
    >>> x, y = torch.tensor([[1.0, 0.1], [0.1, 1]]), torch.tensor([[1.0, 0.2], [0.3, 1]])
    >>> with nf.precision("bfloat16"):
    ...     nf.clip_loss(x, y, scale=4.0)
    tensor(0.0722)
    >>> nf.clip_loss(x, y, scale=4.0)
    tensor(0.0723)
    """
    one_of("precision", precision, Precision)
    token = _precision.set(precision)
    try:
        yield
    finally:
        _precision.reset(token)


def chosen(
    asked: Precision | None, rounding: Rounding, *rows: Tensor | None, traced: bool = False
) -> Precision:
    """The precision of one call.

    Args:
        asked: the argument of the loss.
        rounding: whether rows may be rounded for what they are compared by.
        rows: all rows and columns, as the caller gave them; None: no others.
        traced: whether `torch.compile` takes the call into a graph, where no context can be read.

    Raises:
        ValueError: an unknown precision, or one that cannot be used.
    """
    given = [x for x in rows if x is not None]
    double = any(x.dtype is torch.float64 for x in given)
    if asked is not None:
        one_of("precision", asked, Precision)
        if asked != "float32":
            _refuse(asked, rounding, double=double)
    if double or rounding == "never":
        return "float32"
    wanted = asked or (None if traced and torch.compiler.is_compiling() else _precision.get())
    if wanted is not None:
        return wanted
    return "float32" if given[0].is_cpu or rounding == "if asked" else _of_torch(given)


def _refuse(asked: Precision, rounding: Rounding, *, double: bool) -> None:
    if double:
        raise ValueError(
            f"precision={asked!r} cannot be used with float64 embeddings, which are computed in "
            "float64: pass x.float(), or leave precision out."
        )
    if rounding == "never":
        raise ValueError(
            f"precision={asked!r} cannot be used with a distance that is not computed from matrix "
            'products: leave precision out, or take distance="euclidean", "sqeuclidean" or '
            '"cosine".'
        )


def _of_torch(given: list[Tensor]) -> Precision:
    """What torch would use for a product of these tensors here."""
    device, dtype = given[0].device.type, reduce(torch.promote_types, (x.dtype for x in given))
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if dtype is torch.bfloat16:
        return "bfloat16"
    if dtype is torch.float16:
        return "float16"
    return "tf32" if device == "cuda" and _allows_tf32() else "float32"


def _allows_tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    # Once this newer setting was used, asking for the older one raises an error.
    newer = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32) if newer is None else newer == "tf32"


# torch's types of the precisions that have one.
NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def rounded(x: Tensor, precision: Precision) -> Tensor:
    """Numbers rounded to a precision, to even where two are as near, in the dtype they had.

    "float32" leaves them as they are. Elsewhere they are in new memory, and what the precision
    cannot hold is infinite.
    """
    if precision == "float32":
        return x
    if precision != "tf32":
        return x.to(NARROW[precision]).to(x.dtype)
    bits = x.view(torch.int32)
    # Just below half of the last bit that is kept, or half of it where that bit is 1.
    carried = (bits >> _DROPPED).bitwise_and_(1).add_(bits).add_(2 ** (_DROPPED - 1) - 1)
    kept = carried.bitwise_and_(-(2**_DROPPED)).view(x.dtype)
    return torch.where(x.isnan(), x, kept)  # the carry may run over the exponent of a NaN


_DROPPED = 13  # bits of a float32 that tf32 does not have


def rounded_forces(force: Tensor, precision: Precision, *, fine: bool) -> Tensor:
    """Forces rounded to a precision; none of their tile is lost in float16 for being small.

    Args:
        force: (r, c).
        precision: of the product that they are for.
        fine: whether they may be the sum of two rounded numbers, which are multiplied one by one.
    """
    if precision == "float32" or not force.numel():
        return force
    if precision == "float16":
        up = up_to_float16(force)
        return _rounded_once_or_twice(force * up, precision, fine=fine).div_(up)
    return _rounded_once_or_twice(force, precision, fine=fine)


def _rounded_once_or_twice(x: Tensor, precision: Precision, *, fine: bool) -> Tensor:
    first = rounded(x, precision)
    return first.add_(rounded(x - first, precision)) if fine else first


def up_to_float16(force: Tensor) -> Tensor:
    """A power of two that brings the largest of some forces near the largest float16."""
    exponent = 15 - force.abs().amax().frexp().exponent
    return torch.ldexp(force.new_ones(()), exponent.clamp(-126, 126))
