"""Forces times rows, in the precision of a comparison, without touching torch's own settings."""

import torch
from torch import Tensor

from nearfar.engine.gpu.comparison import Comparison, Grid
from nearfar.engine.gpu.kernels import tiles as kernels
from nearfar.engine.gpu.shapes import shape_of


def multiply(
    compared: Comparison,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    more: bool = False,
    scale: Tensor | None = None,
) -> None:
    """The matrix product a @ b in float32.

    Args:
        compared: whose precision counts.
        a: (r, k) in its dtype.
        b: (k, c) likewise.
        out: (r, c) float32, where the product is put.
        more: whether it is added to what is there.
        scale: by which the product is divided; None: 1.
    """
    if scale is not None:
        found = torch.empty_like(out)
        multiply(compared, a, b, found)
        found.div_(scale)
        if more:
            out.add_(found)
        else:
            out.copy_(found)
    elif a.dtype is torch.float32:
        _by_kernel(compared, a, b, out, more=more)
    elif not a.is_cuda:
        out.addmm_(a.float(), b.float(), beta=int(more))
    elif more:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _by_kernel(compared: Comparison, a: Tensor, b: Tensor, out: Tensor, *, more: bool) -> None:
    """A product of float32: torch's own has the precision that its user set for all products."""
    (r, depth), c = a.shape, b.shape[1]
    shape = shape_of("multiply", a.dtype, compared.chunk, a.device, compared.request.limits)
    tiles = -(-r // shape.rows) * -(-c // shape.columns)
    compared.launch(
        kernels.multiply,
        Grid(shape, tiles, c, 1, (tiles, 1, 1)),
        *(a, b, out, r, c, depth, *a.stride(), *b.stride(), out.stride(0)),
        MORE=more,
    )
