"""The columns of a batch: their embeddings, and which of their texts are equal."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from sentence_transformers.base.losses import has_static_embedding_input
from sentence_transformers.base.losses.gradcache import _create_minibatch, _get_batch_size
from sentence_transformers.base.losses.merged_forward import embed_columns
from torch import Tensor, nn

from nearfar.cached.embeddings import cached_embeddings

Column = dict[str, Any]
# What the features of a text hold beside settings; other tensors are images, sounds or layouts.
_TEXT = {"input_ids", "attention_mask", "token_type_ids", "prompt_length"}
_NO_SIGN = 2**63 - 1


def embedded(model: nn.Module, columns: Sequence[Column]) -> list[Tensor]:
    """(n, d) of each column, with all activations; alike columns share a forward."""
    found: list[Tensor] = embed_columns(model, columns)
    return found


def embedded_in_chunks(model: nn.Module, columns: Sequence[Column], size: int) -> list[Tensor]:
    """(n, d) of each column, without activations: they are encoded again in the backward."""
    if isinstance(model, nn.Sequential) and has_static_embedding_input(model):
        raise ValueError(
            "cached cuts a batch by its rows, and the inputs of a StaticEmbedding are one list of "
            "all tokens. It keeps no activations that were worth it: leave cached out."
        )
    cuts = [partial(_chunk, column) for column in columns]
    rows = [range(_get_batch_size(column)) for column in columns]
    encode = partial(_encode, model)
    return cached_embeddings([encode] * len(rows), rows, chunk_size=size, collate=cuts)


def _chunk(column: Column, rows: range) -> Column:
    """Some rows: only the library knows how the features of each kind of model are laid out."""
    found: Column = _create_minibatch(column, rows.start, rows.stop)
    return found


def _encode(model: nn.Module, column: Column) -> Tensor:
    # A copy, since modules put what they compute in it, where it would stay alive.
    found: Tensor = model(dict(column))["sentence_embedding"]
    return found


def rows_of(column: Column) -> int:
    """How many texts there are."""
    if "offsets" in column:  # where each text of a StaticEmbedding begins
        return len(column["offsets"])
    return int(_get_batch_size(column))


def text_ids(column: Column) -> Tensor | None:
    """(n,) int64, 0 or more, equal for equal tokens; None: the column is not of padded texts.

    The tokens that are not padding are mixed with their places and added up, modulo 2^63: different
    texts get the same id with a chance of about 1e-19 a pair. So no value is read, processes find
    the same ids, and the padding does not matter.
    """
    tokens, mask = column.get("input_ids"), column.get("attention_mask")
    tensors = {name for name, x in column.items() if isinstance(x, Tensor)}
    if not isinstance(tokens, Tensor) or not isinstance(mask, Tensor) or tensors - _TEXT:
        return None
    if tokens.ndim != 2 or mask.shape != tokens.shape:
        return None
    mask = (mask != 0).to(torch.int64)
    mixed = _mixed(tokens.to(torch.int64) + mask.cumsum(1) * 2**32)
    return _mixed((mixed * mask).sum(1)) & _NO_SIGN


def _mixed(x: Tensor) -> Tensor:
    """Well mixed 64 bits: the finalizer of splitmix64 (Steele, Lea & Flood 2014)."""
    x = _folded(x, 30) * -4658895280553007687
    x = _folded(x, 27) * -7723592293110705685
    return _folded(x, 31)


def _folded(x: Tensor, bits: int) -> Tensor:
    """The exclusive or of x and of x shifted to the right as if there were no sign."""
    return torch.bitwise_xor(x, (x >> bits) & (2 ** (64 - bits) - 1))
