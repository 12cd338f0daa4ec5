"""One encoder and its part of the batch, which it encodes chunk by chunk, once and once again."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from nearfar.cached.chunks import Chunks
from nearfar.cached.reductions import Encode
from nearfar.cached.replay import kept_randomness, random_state, without_autocast


class Tower:
    """What the passes over an encoder share.

    Attributes:
        name: what the encoder is called in errors.
        encode: the encoder.
        chunks: its inputs.
    """

    def __init__(self, name: str, encode: Encode, chunks: Chunks) -> None:
        self.name, self.encode, self.chunks = name, encode, chunks
        self._parts: list[list[Tensor]] = []  # of each chunk, the tensors the encoder returned
        self._spec: TreeSpec | None = None  # how they are nested
        self._learned: list[list[bool]] = []  # which of them need a gradient
        self._replay: list[Callable[[], None]] = []
        self._joined: list[Tensor] = []  # the tensors of the whole batch, in its order

    def rehearse(self) -> None:
        """Encode the first chunk and send zeros back."""
        with kept_randomness():
            leaves, _ = self._run(0)
        _send_back([(x, torch.zeros_like(x)) for x in leaves if x.requires_grad])

    def encode_first(self, chunk: int, with_graph: bool) -> None:
        """Encode a chunk and keep the embeddings.

        Their graph is dropped at once, and they are copied out of what they may be views of. The
        graph is made all the same: so compiled code and attention kernels are those of the second
        pass and draw the same numbers, and it is known from which chunks something is learned.
        """
        self._replay.append(random_state())
        leaves, spec = self._run(chunk)
        if self._spec not in (None, spec):
            raise ValueError(f"{self.name} returned {spec} for a chunk, and {self._spec} before.")
        self._spec = spec
        self._learned.append([x.requires_grad for x in leaves])
        self._parts.append(leaves if with_graph else [x.detach().clone() for x in leaves])

    def join(self) -> None:
        """Join the chunks, in the order of the batch."""
        for parts in zip(*self._parts, strict=True):
            if len({(x.shape[1:], x.dtype) for x in parts}) > 1:
                shapes = sorted({f"{x.dtype} {tuple(x.shape)}" for x in parts})
                raise ValueError(
                    f"{self.name} must return rows of one shape and dtype for every chunk, got "
                    f"{', '.join(shapes)}: pool or pad them."
                )
            x = torch.cat(parts) if len(parts) > 1 else parts[0]
            if self.chunks.order is not None:
                x = x[self.chunks.order.argsort().to(x.device)]
            self._joined.append(x)
        for i, x in enumerate(self._joined):
            if x.grad_fn is None and any(learned[i] for learned in self._learned):
                x.requires_grad_()
        self._parts.clear()

    def output(self) -> Any:
        """What the encoder would return for the whole batch."""
        assert self._spec is not None
        return tree_unflatten(self._joined, self._spec)

    def gradients(self) -> list[Tensor | None]:
        """Those of the embeddings, in the order of the chunks; the embeddings are dropped."""
        order = self.chunks.order
        found = [x.grad for x in self._joined]
        self._joined.clear()
        if order is None:
            return found
        return [None if g is None else g[order.to(g.device)] for g in found]

    def learns_from(self, chunk: int, gradients: Sequence[Tensor | None]) -> bool:
        pairs = zip(self._learned[chunk], gradients, strict=True)
        return any(learned and gradient is not None for learned, gradient in pairs)

    def encode_again(self, chunk: int, gradients: Sequence[Tensor | None], awaited: bool) -> None:
        """Encode a chunk as the first time, and take the gradients back to the parameters.

        Args:
            chunk: which.
            gradients: of the embeddings.
            awaited: whether there must be a backward, even for embeddings that the loss left out.
        """
        self._replay[chunk]()
        leaves, _ = self._run(chunk)
        start = sum(self.chunks.sizes[:chunk])
        rows = slice(start, start + self.chunks.sizes[chunk])
        pairs = []
        for x, gradient in zip(leaves, gradients, strict=True):
            if x.requires_grad and (gradient is not None or awaited):
                pairs.append((x, torch.zeros_like(x) if gradient is None else gradient[rows]))
        _send_back(pairs)

    def _run(self, chunk: int) -> tuple[list[Tensor], TreeSpec]:
        """The tensors that the encoder returns for a chunk, each with a row per row of it."""
        leaves, spec = tree_flatten(self.encode(self.chunks.inputs[chunk]))
        rows = self.chunks.sizes[chunk]
        for x in leaves:
            if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] != rows:
                found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(
                    f"{self.name} must return tensors with one row for each of the {rows} rows of "
                    f"a chunk, got {found}. What belongs to no row, such as a temperature, the "
                    "loss can use without the encoder."
                )
        return leaves, spec


def _send_back(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Take the gradients of some tensors back to what they were computed from."""
    if pairs:
        outputs, gradients = zip(*pairs, strict=True)
        with without_autocast():
            torch.autograd.backward(outputs, gradients)
