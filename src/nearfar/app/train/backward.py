"""Forward and backward of a training batch, in chunks where it may be large."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning_fabric import Fabric
from torch import Tensor

from nearfar.app.data.content import Batch
from nearfar.app.train.objectives import LossAndActive
from nearfar.cached.backward import cached_backward


def backward(
    network: Any,
    x: Batch,
    loss_of: Callable[[Tensor], LossAndActive],
    fabric: Fabric,
    chunk_tokens: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds the gradients of a batch; returns its embeddings, (n, d), the loss and the active share.

    Args:
        network: prepared items to embeddings.
        x: n prepared items.
        loss_of: the loss and the active share of their embeddings.
        fabric: runs the backward of a batch that is not cut.
        chunk_tokens: how many tokens are encoded at a time; None: the whole batch.
    """
    if chunk_tokens is None or not (isinstance(x, Mapping) and "attention_mask" in x):
        embeddings: Tensor = network(x)
        loss, active = loss_of(embeddings)
        fabric.backward(loss)
        return embeddings, loss, active
    seen: list[Tensor] = []

    def watched(embeddings: Tensor) -> Tensor:
        loss, active = loss_of(embeddings)
        seen.extend((embeddings, active))
        return loss

    loss = cached_backward(network, x, watched, chunk_tokens=chunk_tokens)
    embeddings, active = seen
    return embeddings, loss, active
