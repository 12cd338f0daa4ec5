"""The two passes of `cached_backward`."""

import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nearfar.cached.chunks import Collate, cut
from nearfar.cached.reductions import Encode, Reductions, modules_of
from nearfar.cached.replay import kept_randomness, kept_statistics, without_autocast
from nearfar.cached.tower import Tower
from nearfar.inputs import positive_integer

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
    towers = _towers(encode, inputs, collate, chunk_size, chunk_tokens)
    modules = [modules_of(tower.encode) for tower in towers]
    reductions = Reductions(modules)
    for i, tower in enumerate(towers):
        tower.chunks.fill_up(reductions.agree(i, len(tower.chunks.inputs)))
    _warn_of_batch_norm(towers, modules)
    torch.clear_autocast_cache()  # the caller may have made casts without a gradient
    # Processes take the same collectives in the same order, however many chunks each has.
    one_pass = all(len(tower.chunks.inputs) == 1 for tower in towers) and not reductions.ddp
    for i, tower in enumerate(towers):
        reductions.rehearse(i, tower.rehearse)
    _first_pass(towers, reductions, one_pass)
    if one_pass:
        return _backward(loss, towers, scaler)
    value = _backward(loss, towers, scaler)
    with kept_randomness(), kept_statistics(chain(*modules)):
        _second_pass(towers, reductions)
    return value


def _first_pass(towers: Sequence[Tower], reductions: Reductions, with_graph: bool) -> None:
    with reductions.first_pass():
        for i, tower in enumerate(towers):
            for chunk in range(len(tower.chunks.inputs)):
                reductions.begin((i, chunk))
                tower.encode_first(chunk, with_graph)
            tower.join()


def _backward(
    loss: Loss, towers: Sequence[Tower], scaler: torch.amp.GradScaler | float | None
) -> Tensor:
    """The loss, once its gradients have reached the embeddings and what it learns."""
    value = loss(*(tower.output() for tower in towers))
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


def _second_pass(towers: Sequence[Tower], reductions: Reductions) -> None:
    jobs = [(i, chunk) for i, t in enumerate(towers) for chunk in range(len(t.chunks.inputs))]
    gradients = [tower.gradients() for tower in towers]
    torch.clear_autocast_cache()
    with reductions.second_pass(jobs):
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
            stacklevel=3,
        )
