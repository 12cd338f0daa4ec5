"""Models that `fully_shard` (FSDP2) shards.

After a forward, parameters may be whole copies until the backward. Only the shards keep a gradient,
and what is written to them.
"""

from typing import Any

from torch import Tensor, nn


def is_shard(x: Tensor) -> bool:
    """Whether a tensor is a part of one that several processes hold: a DTensor."""
    return hasattr(x, "full_tensor")


def reshard(model: nn.Module) -> None:
    """Let every parameter be its shard."""
    for module in _sharded(model):
        module.reshard()


def whole_copies(model: nn.Module) -> list[Tensor]:
    """The copies that a forward computes with; after this, parameters are their shards."""
    copies = []
    for module in _sharded(model):  # one at a time: all may not fit
        module.unshard()
        copies += [p for p in module.parameters() if not is_shard(p)]
        module.reshard()
    return copies


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called with it."""
    return hasattr(module, "set_requires_gradient_sync")


def _sharded(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if is_sharded(module)]
