"""Embeddings whose backward encodes again, for trainers that call backward themselves."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from nearfar.cached.chunks import Collate
from nearfar.cached.passes import Passes
from nearfar.cached.reductions import Encode


def cached_embeddings(
    encode: Sequence[Encode],
    inputs: Sequence[Any],
    *,
    chunk_size: int | None = None,
    chunk_tokens: int | None = None,
    collate: Sequence[Collate | None] | None = None,
) -> list[Any]:
    """What several encoders return for a whole batch, chunk by chunk and without activations.

    The two passes of `cached_backward`, which describes the arguments: the second runs within the
    backward of any loss of the embeddings, under the autocast of the first. So the loss may be
    scaled, divided and added to others as any loss. It has one backward, which adds to the `.grad`
    of the parameters: `torch.autograd.grad` finds no gradient of them. Where gradients are off,
    there is none.

    >>> net = torch.nn.Linear(3, 2, bias=False)
    >>> _ = torch.nn.init.eye_(net.weight)
    >>> x = torch.arange(18.0).reshape(6, 3).sin()
    >>> (z,) = cached_embeddings([net], [x], chunk_size=2)
    >>> (2 * z.square().sum()).backward()
    >>> torch.allclose(net.weight.grad, 4 * net(x).T @ x)
    True
    """
    passes = Passes(list(encode), list(inputs), collate, chunk_size, chunk_tokens)
    leaves, spec = tree_flatten(passes.first())
    learned = [i for i, x in enumerate(leaves) if x.requires_grad]
    if not learned or passes.single:
        return tree_unflatten(leaves, spec)  # type: ignore[no-any-return]
    found = [leaves[i] for i in learned]
    again = _Again.apply(_Second(passes, found), *found)  # type: ignore[no-untyped-call]
    for i, x in zip(learned, again, strict=True):
        leaves[i] = x
    return tree_unflatten(leaves, spec)  # type: ignore[no-any-return]


class _Second:
    """The second pass, once."""

    def __init__(self, passes: Passes, embeddings: Sequence[Tensor]) -> None:
        self._waiting: tuple[Passes, Sequence[Tensor]] | None = passes, embeddings

    def __call__(self, gradients: Sequence[Tensor | None]) -> None:
        if self._waiting is None:
            raise RuntimeError(
                "cached embeddings have one backward, which was called before: add the losses of "
                "one batch up, and call it for their sum."
            )
        (passes, embeddings), self._waiting = self._waiting, None
        for x, gradient in zip(embeddings, gradients, strict=True):
            x.grad = gradient
        del embeddings
        with torch.enable_grad():
            passes.second()


class _Again(torch.autograd.Function):
    """Embeddings as they are; their backward is the second pass."""

    @staticmethod
    def forward(ctx: Any, second: _Second, *embeddings: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.second = second
        return tuple(x.view_as(x) for x in embeddings)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        ctx.second(gradients)
        return (None,) * (1 + len(gradients))
