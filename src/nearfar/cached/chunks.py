"""How the rows of a batch are cut into chunks: so many rows each, or so many tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Collate = Callable[[Any], Any]


@dataclass
class Chunks:
    """The inputs of one encoder, in chunks.

    Attributes:
        inputs: what the encoder is given, one a chunk.
        sizes: the rows of each chunk.
        order: (n,) which row of the batch is where in the chunks, one chunk after the other; None:
            in the order of the batch.
        empty: makes a chunk without rows.
    """

    inputs: list[Any]
    sizes: list[int]
    order: Tensor | None
    empty: Callable[[], Any]

    def fill_up(self, number: int) -> None:
        """Have at least so many chunks; those that are added have no rows."""
        while len(self.inputs) < number:
            self.inputs.append(self.empty())
            self.sizes.append(0)


def cut(
    inputs: Any, collate: Collate | None, size: int | None, tokens: int | None, name: str
) -> Chunks:
    """Cut the inputs of one encoder.

    Args:
        inputs: tensors, or what `collate` makes tensors of.
        collate: takes some of the inputs.
        size: rows a chunk.
        tokens: tokens a chunk, padding included; if `size` is None.
        name: what the inputs are called in errors.
    """
    if size is None:
        assert tokens is not None
        return _by_tokens(collate(inputs) if collate else inputs, tokens, name)
    if collate is not None:
        taken = _of_sequence(inputs, collate, name)
        n = len(inputs)
    else:
        inputs = _as_tree(inputs)
        n = _rows(inputs, name)

        def taken(start: int, stop: int) -> Any:
            return _map_tensors(lambda x: x[start:stop], inputs)

    bounds = [(start, min(start + size, n)) for start in range(0, max(n, 1), size)]
    chunks = [taken(start, stop) for start, stop in bounds]
    return Chunks(chunks, [stop - start for start, stop in bounds], None, lambda: taken(0, 0))


def _of_sequence(inputs: Any, collate: Collate, name: str) -> Callable[[int, int], Any]:
    if not (hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__")) or isinstance(
        inputs, Mapping | str
    ):
        raise TypeError(
            f"with collate, {name} must be a sequence of which slices can be taken, one item a "
            f"row, such as a list of strings; got {type(inputs).__name__}."
        )
    return lambda start, stop: collate(inputs[start:stop])


def _as_tree(inputs: Any) -> Any:
    """A plain dict for any mapping: that of a tokenizer is no pytree."""
    return dict(inputs) if isinstance(inputs, Mapping) else inputs


def _map_tensors(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def _rows(inputs: Any, name: str) -> int:
    """How many rows all tensors of the inputs have."""
    rows = set[int]()
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor):
            rows.add(leaf.shape[0] if leaf.dim() else -1)
            if leaf.requires_grad and not leaf.is_leaf:
                raise ValueError(
                    f"{name} must not be computed by what is trained: its graph serves one "
                    "backward, and there is one a chunk. Compute it inside the encode function."
                )
        elif not isinstance(leaf, None | bool | int | float):
            raise TypeError(
                f"{name} must be tensors with a row per item, alone or in dicts, lists and tuples; "
                f"got {type(leaf).__name__}. Pass collate=, a function that makes tensors of some "
                f"of the items, such as a tokenizer."
            )
    if len(rows) != 1 or -1 in rows:
        found = ", ".join(f"{n} rows" if n >= 0 else "one number" for n in sorted(rows))
        raise ValueError(
            f"all tensors of {name} must have the same number of rows, got {found or 'none'}; "
            "what belongs to no row, the encode function can use by itself."
        )
    return rows.pop()


def _by_tokens(inputs: Any, budget: int, name: str) -> Chunks:
    """Rows of similar length together, each chunk without the padding that none of them needs."""
    inputs = _as_tree(inputs)
    if not isinstance(inputs, Mapping) or not {"attention_mask", "input_ids"} & set(inputs):
        raise TypeError(
            f"chunk_tokens counts the tokens of {name}, which must be a dict with an "
            f"attention_mask or input_ids, (n, length); got {type(inputs).__name__}. Use "
            "chunk_size for others."
        )
    n = _rows(inputs, name)
    lengths, width, at_end = _lengths(inputs, name)
    order = lengths.argsort(descending=True, stable=True)
    longest = lengths[order].tolist()

    def taken(start: int, stop: int) -> Any:
        kept = longest[start] if start < stop else width
        columns = slice(width - kept, None) if at_end else slice(kept)

        def trimmed(x: Tensor) -> Tensor:
            x = x[order[start:stop].to(x.device)]
            return x[:, columns] if x.dim() > 1 and x.shape[1] == width else x

        return _map_tensors(trimmed, inputs)

    bounds = list(_budgeted(longest, budget)) if n else [(0, 0)]
    chunks = [taken(start, stop) for start, stop in bounds]
    return Chunks(chunks, [stop - start for start, stop in bounds], order, lambda: taken(0, 0))


def _lengths(inputs: Mapping[str, Any], name: str) -> tuple[Tensor, int, bool]:
    """(n,) tokens of each row without its padding, the padded length, and on which side tokens end.

    Without a mask, nothing says what is padding.
    """
    mask = inputs.get("attention_mask")
    tokens = inputs["input_ids"] if mask is None else mask
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or not tokens.shape[1]:
        raise ValueError(
            f"chunk_tokens needs an attention_mask or input_ids of shape (n, length) in {name}, "
            f"got {tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__}."
        )
    width = tokens.shape[1]
    if mask is None:
        return torch.full((tokens.shape[0],), width), width, False
    real = (mask != 0).cpu()
    place = torch.arange(1, width + 1)
    last, first = (real * place).amax(1), (real.flip(1) * place).amax(1)
    at_end = bool((last == width).all())  # padded on the left, or not at all
    return (first if at_end else last).clamp(min=1), width, at_end


def _budgeted(lengths: Sequence[int], budget: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows, the longest first, whose padded length is within the budget."""
    start = 0
    while start < len(lengths):
        stop = min(start + max(1, budget // lengths[start]), len(lengths))
        yield start, stop
        start = stop
