"""`cached_backward`: the two passes, and the loss between them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nearfar.cached.chunks import Collate
from nearfar.cached.passes import Passes
from nearfar.cached.reductions import Encode
from nearfar.cached.replay import without_autocast

Loss = Callable[..., Tensor]


def cached_backward(
    encode: Encode | Sequence[Encode],
    inputs: Any,
    loss: Loss,
    *,
    chunk_size: int | Sequence[int | None] | None = None,
    chunk_tokens: int | Sequence[int | None] | None = None,
    collate: Collate | Sequence[Collate | None] | None = None,
    scaler: torch.amp.GradScaler | float | None = None,
) -> Tensor:
    r"""Backward for a batch of any size, in the memory that encoding one chunk of it takes.

    In place of `loss(encode(inputs)).backward()`. The gradients are the same, and every row still
    meets every other. The batch is encoded in chunks, of which only the embeddings
    :math:`z_i = f(x_i; \theta)` are kept. The loss gives the gradient of each embedding, and each
    chunk is encoded once more to take it on to the parameters:

    .. math:: \frac{\partial L}{\partial \theta} = \sum_{\text{chunks } C} \sum_{i \in C}
              \frac{\partial L}{\partial z_i} \frac{\partial z_i}{\partial \theta}

    The second time, a chunk gets the same random numbers (dropout), the same autocast, and leaves
    running statistics alone. A batch of one chunk is encoded once. Gradients are added to `.grad`,
    those of parameters that the loss learns too.

    With `DistributedDataParallel` and `fully_shard`, gradients are reduced once, with the last
    chunk. The loss is called once on each process, so it may gather; processes may have different
    numbers of rows, or none.

    Args:
        encode: a module or function of some rows of `inputs`, called with them as its one argument.
            It returns a tensor with a row for each of them, or a dict or tuple of such. A tuple:
            several encoders, among which a network may occur more than once. Then `inputs` is a
            tuple too, and `chunk_size`, `chunk_tokens` and `collate` may be, with None where an
            encoder needs none.
        inputs: a tensor, or tensors in dicts, lists and tuples, all with the same number of rows.
            With `collate`, any sequence, such as a list of strings.
        loss: a function of what the encoders return for the whole batch, one argument each; it
            returns a number. Labels are what it closes over: `lambda z: sup_con_loss(z, labels)`.
        chunk_size: rows a chunk.
        chunk_tokens: tokens a chunk, padding included, in place of `chunk_size`, for dicts with
            an `attention_mask` (or `input_ids`), (n, length). Rows of similar length are encoded
            together, without the padding that none of them needs; the loss sees the order of the
            batch. A longer row is a chunk of its own.
        collate: a function that makes inputs of `encode` of some items of `inputs`. With
            `chunk_tokens` it is called once, with all items.
        scaler: a `torch.amp.GradScaler`, or a number that multiplies the gradients.

    Returns:
        The loss, (), without a gradient and not scaled.

    Raises:
        TypeError: inputs of a wrong kind.
        ValueError: not exactly one of `chunk_size` and `chunk_tokens`; tensors or outputs whose
            rows differ; a loss that is no single number, or needs no gradient.
        RuntimeError: called where gradients are off.

    >>> import nearfar as nf
    >>> net, labels = torch.nn.Linear(3, 2, bias=False), torch.arange(6) % 2
    >>> _ = torch.nn.init.eye_(net.weight)
    >>> x = torch.arange(18.0).reshape(6, 3).sin()
    >>> nf.cached_backward(net, x, lambda z: nf.sup_con_loss(z, labels), chunk_size=2)
    tensor(1.2699)
    >>> net.weight.grad
    tensor([[ 0.5604,  1.2762,  0.8187],
            [ 1.2762, -0.5604, -1.8818]])
    """
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "cached_backward computes gradients, which are off here: call it outside of "
            "torch.no_grad() and torch.inference_mode()."
        )
    passes = Passes(encode, inputs, collate, chunk_size, chunk_tokens)
    value = _backward(loss, passes.first(), scaler)
    if not passes.single:
        passes.second()
    return value


def _backward(
    loss: Loss, embeddings: Sequence[Any], scaler: torch.amp.GradScaler | float | None
) -> Tensor:
    """The loss, once its gradients have reached the embeddings and what it learns."""
    value = loss(*embeddings)
    if not isinstance(value, Tensor) or value.dim() > 0:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"loss must return one number, a tensor of shape (), got {found}; use "
            'reduction="mean" or "sum".'
        )
    if not value.requires_grad:
        raise ValueError(
            "the loss needs no gradient: no parameter of an encoder or of the loss requires one, "
            "or the loss has detached what it was given."
        )
    if scaler is None:
        scaled = value
    elif hasattr(scaler, "scale"):
        scaled = scaler.scale(value)
    else:
        scaled = value * scaler
    with without_autocast():
        scaled.backward()  # type: ignore[no-untyped-call]
    return value.detach()
