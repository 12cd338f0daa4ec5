"""The two passes over some encoders: all chunks are encoded, and later encoded once more."""

import warnings
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nearfar.cached.chunks import Collate, cut
from nearfar.cached.reductions import Encode, Reductions, modules_of
from nearfar.cached.replay import autocast_now, kept_randomness, kept_statistics
from nearfar.cached.tower import Tower
from nearfar.inputs import positive_integer


class Passes:
    """The passes over a batch.

    Args:
        encode, inputs, chunk_size, chunk_tokens, collate: see `cached_backward`.

    Attributes:
        towers: the encoders with their inputs.
        single: whether the batch is encoded once, with a graph: each encoder has one chunk.
    """

    def __init__(
        self,
        encode: Encode | Sequence[Encode],
        inputs: Any,
        collate: Collate | Sequence[Collate | None] | None,
        chunk_size: int | Sequence[int | None] | None,
        chunk_tokens: int | Sequence[int | None] | None,
    ) -> None:
        self.towers = _towers(encode, inputs, collate, chunk_size, chunk_tokens)
        self._modules = [modules_of(tower.encode) for tower in self.towers]
        self._reductions = Reductions(self._modules)
        for i, tower in enumerate(self.towers):
            tower.chunks.fill_up(self._reductions.agree(i, len(tower.chunks.inputs)))
        _warn_of_batch_norm(self.towers, self._modules)
        # Processes take the same collectives in the same order, however many chunks each has.
        one_each = all(len(tower.chunks.inputs) == 1 for tower in self.towers)
        self.single = one_each and not self._reductions.ddp

    def first(self) -> list[Any]:
        """What the encoders return for the whole batch."""
        torch.clear_autocast_cache()  # the caller may have made casts without a gradient
        self._autocast = autocast_now()
        if torch.is_grad_enabled():
            for i, tower in enumerate(self.towers):
                self._reductions.rehearse(i, tower.rehearse)
        with self._reductions.first_pass():
            for i, tower in enumerate(self.towers):
                for chunk in range(len(tower.chunks.inputs)):
                    self._reductions.begin((i, chunk))
                    tower.encode_first(chunk, self.single)
                tower.join()
        return [tower.output() for tower in self.towers]

    def second(self) -> None:
        """Encode again, and take the gradients that the embeddings have got to the parameters."""
        reductions, towers = self._reductions, self.towers
        jobs = [(i, chunk) for i, t in enumerate(towers) for chunk in range(len(t.chunks.inputs))]
        gradients = [tower.gradients() for tower in towers]
        torch.clear_autocast_cache()
        with (
            kept_randomness(),
            kept_statistics(chain(*self._modules)),
            self._autocast(),
            reductions.second_pass(jobs),
        ):
            for i, chunk in jobs:
                awaited = reductions.awaits((i, chunk))
                if awaited or towers[i].learns_from(chunk, gradients[i]):
                    with reductions.during((i, chunk)):
                        towers[i].encode_again(chunk, gradients[i], awaited)


def _towers(
    encode: Encode | Sequence[Encode],
    inputs: Any,
    collate: Collate | Sequence[Collate | None] | None,
    chunk_size: int | Sequence[int | None] | None,
    chunk_tokens: int | Sequence[int | None] | None,
) -> list[Tower]:
    """The encoders with their inputs, cut into chunks."""
    several = isinstance(encode, list | tuple)
    encoders: Sequence[Encode] = encode if several else [encode]  # type: ignore[assignment, list-item]
    n = len(encoders)
    if several and not (isinstance(inputs, list | tuple) and len(inputs) == n):
        found = f"{len(inputs)}" if isinstance(inputs, list | tuple) else type(inputs).__name__
        raise ValueError(
            f"inputs must be a tuple with the inputs of each of the {n} encoders, got {found}; a "
            "network for several inputs is given several times, encode=(net, net)."
        )
    each = inputs if several else [inputs]
    sizes = _for_each("chunk_size", chunk_size, n)
    budgets = _for_each("chunk_tokens", chunk_tokens, n)
    collates = _for_each("collate", collate, n)
    towers = []
    for i in range(n):
        place = f"[{i}]" if several else ""
        if not callable(encoders[i]):
            raise TypeError(f"encode{place} must be a module or function, got {encoders[i]!r}.")
        if (sizes[i] is None) == (budgets[i] is None):
            raise ValueError(
                "exactly one of chunk_size, rows a chunk, and chunk_tokens, tokens a chunk, must "
                f"be given for each encoder; got chunk_size={sizes[i]}, chunk_tokens={budgets[i]}."
            )
        for name, number in (("chunk_size", sizes[i]), ("chunk_tokens", budgets[i])):
            if number is not None:
                positive_integer(name, number)
        chunks = cut(each[i], collates[i], sizes[i], budgets[i], f"inputs{place}")
        towers.append(Tower(f"encode{place}", encoders[i], chunks))
    return towers


def _for_each(name: str, value: Any, n: int) -> Sequence[Any]:
    """A setting of each encoder: the same for all, or a tuple."""
    if not isinstance(value, list | tuple):
        return [value] * n
    if len(value) != n:
        raise ValueError(f"{name} must have one entry for each of {n} encoders, got {len(value)}.")
    return value


def _warn_of_batch_norm(towers: Sequence[Tower], modules: Sequence[Sequence[nn.Module]]) -> None:
    cut_up = (
        group for tower, group in zip(towers, modules, strict=True) if len(tower.chunks.inputs) > 1
    )
    found = [m for m in chain(*cut_up) if isinstance(m, _BatchNorm) and m.training]
    if found:
        warnings.warn(
            f"{type(found[0]).__name__} in training mode normalises each chunk by itself, so the "
            "gradients are not those of the whole batch: use a norm of single rows, such as "
            "LayerNorm or GroupNorm, or put these modules in eval mode.",
            stacklevel=4,
        )
