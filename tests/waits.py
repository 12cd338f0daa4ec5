"""An accelerator that notices when the host waits for it.

The meta device stands for one. To the losses it is one, since it is no CPU. Its tensors have shapes
and no values: there is nothing to read.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nearfar.engine.budget import tile_shape


class WaitsError(Exception):
    """The host waited for the accelerator."""


class _Operations(TorchDispatchMode):
    """Raises `WaitsError` where an operation needs values on the other side."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            result = func(*args, **(kwargs or {}))
        except RuntimeError as error:  # also where the shape of the result depends on values
            if "meta" in str(error).lower():
                raise WaitsError(func) from error
            raise
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        if len({t.device for t in tensors}) > 1:
            raise WaitsError(f"{func} copies")
        # CUDA finds marked entries first, and only then writes to them.
        if "index_put" in func.name() and any(
            t is not None and t.dtype is torch.bool for t in args[1]
        ):
            raise WaitsError(func)
        return result


class _Copies(TorchFunctionMode):
    """Raises `WaitsError` where a number of the host is copied to the device."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and result.is_meta
        written = func is Tensor.__setitem__ and any(
            isinstance(t, Tensor) for t in tree_leaves(args[1])
        )
        if (made or written) and not isinstance(args[-1], Tensor):
            raise WaitsError(f"{func} copies")
        return result


@contextmanager
def accelerator(tile: tuple[int, int] | None = None) -> Iterator[None]:
    """Raises `WaitsError` where the host waits; with tiles of this shape."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda device: False)  # meta has none
        patch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
        with _Operations(), _Copies(), tile_shape(*tile) if tile else nullcontext():
            yield


def there(x: Tensor, *, learned: bool = False) -> Tensor:
    """A tensor of the same shape on the accelerator."""
    return torch.empty_like(x, device="meta", requires_grad=learned)
