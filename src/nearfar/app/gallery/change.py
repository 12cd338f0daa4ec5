"""Add rows to a gallery, or remove identities from it; what is there stays as it is."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches

import numpy as np
import torch

from nearfar.app.errors import InputError
from nearfar.app.gallery.graph import available, save_graph
from nearfar.app.gallery.nearest import nearest_rows
from nearfar.app.gallery.rows import Array, Rows, encoded
from nearfar.app.gallery.store import (
    GRAPH,
    Block,
    Gallery,
    Recall,
    commit,
    with_graph,
    write_block,
    write_blocks,
)

# From so many rows, full blocks get graphs; fewer are compared faster than graphs are built.
_LARGE = 200_000
_RECALL_QUERIES, _RECALL_K = 200, 10
_SAME = 1e-5  # by how much the numbers of one item's embeddings may differ

Progress = Callable[[str], None]


def add(gallery: Gallery, parts: Iterable[Rows], progress: Progress) -> tuple[Gallery, int]:
    """Add rows, of identities that are there or new, but none a second time.

    The caller holds the lock (`store.writing`). The rows count from the first moment that the
    manifest is replaced; graphs follow, block by block.

    Args:
        gallery: what is there.
        parts: the rows; they may come piece by piece.
        progress: called with a line of text now and then.

    Returns:
        What the gallery is then, and how many rows were there already.
    """
    # Blocks that are nearly empty are written again with the new rows, and so is the last, if it
    # is not full: there are never many.
    full = gallery.block_rows
    last = gallery.blocks[-1:]
    refilled = [
        block
        for block in gallery.blocks
        if block.n < full // 2 or (block in last and block.n < full)
    ]
    kept = [block for block in gallery.blocks if block not in refilled]
    count = _Count(gallery.blocks)
    written = write_blocks(
        gallery, _all(refilled, count.watched(parts), lambda n: progress(f"{n:,} rows"))
    )
    gallery = replace(
        gallery,
        n_identities=gallery.n_identities + count.new(),
        blocks=(*kept, *written),
    )
    commit(gallery)
    return _with_graphs(gallery, progress), count.n_known


def remove(gallery: Gallery, identities: Iterable[str]) -> tuple[Gallery, int]:
    """Remove identities: their rows are deleted from the files. The caller holds the lock.

    A block that held some is written again without them, and without its graph, which holds them
    too; it gets one when rows are added.

    Returns:
        What is left, and how many rows were removed.

    Raises:
        InputError: one of them is not there; nothing is removed.
    """
    wanted = encoded(dict.fromkeys(identities))
    seen: set[bytes] = set()
    blocks: list[Block] = []
    holding = [np.isin(block.read().identity, wanted) for block in gallery.blocks]
    for block, gone in zip(gallery.blocks, holding, strict=True):
        seen.update(np.unique(block.read().identity[gone]).tolist())
    for name in wanted.tolist():
        if name not in seen:
            raise InputError(_unknown(gallery, name.decode()))
    for block, gone in zip(gallery.blocks, holding, strict=True):
        if not gone.any():
            blocks.append(block)
        elif not gone.all():
            blocks.append(write_block(gallery.path, block.whole()[~gone]))
    left = replace(gallery, blocks=tuple(blocks), n_identities=gallery.n_identities - len(seen))
    if not any(block.indexed for block in left.blocks):
        left = replace(left, recall=None)
    commit(left)
    return left, gallery.n - left.n


class _Count:
    """Lets the rows pass that a gallery lacks, and counts the others and the new identities."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = blocks
        self._names: Array = np.empty(0, "S1")
        self.n_known = 0

    def watched(self, parts: Iterable[Rows]) -> Iterator[Rows]:
        for part in parts:
            known = np.zeros(len(part), bool)
            for block in self._blocks:
                known |= _among(part, block.read())
            self.n_known += int(known.sum())
            self._names = np.union1d(self._names, part.identity)
            yield part[~known]

    def new(self) -> int:
        """How many identities of the rows so far the gallery lacks."""
        names = self._names
        for block in self._blocks:
            names = names[~np.isin(names, block.read().identity)]
        return len(names)


def _among(rows: Rows, held: Rows) -> Array:
    """(n,) bool: which rows are among those held: the same names, and nearly the same embedding.

    The same item has not quite the same embedding if it was embedded beside others.
    """
    keys, of_held = (np.char.add(np.char.add(a.identity, b"\0"), a.name) for a in (rows, held))
    found = np.isin(keys, of_held)
    at: dict[bytes, list[int]] = {}
    for i in np.flatnonzero(np.isin(of_held, keys[found])).tolist():
        at.setdefault(of_held[i], []).append(i)
    for i in np.flatnonzero(found).tolist():
        found[i] = (np.abs(held.x[at[keys[i]]] - rows.x[i]).max(1) <= _SAME).any()
    return found


def _all(
    blocks: Iterable[Block], parts: Iterable[Rows], progress: Callable[[int], None]
) -> Iterator[Rows]:
    for block in blocks:
        yield block.whole()
    n = 0
    for part in parts:
        yield part
        n += len(part)
        progress(n)


def _with_graphs(gallery: Gallery, progress: Progress) -> Gallery:
    """Graphs for the blocks of a large gallery that have none, and how much they find."""
    if gallery.n < _LARGE or not available(gallery.distance):
        return gallery
    last = gallery.blocks[-1]  # it is written again when rows are added, unless it is full
    lacking = [
        i
        for i, block in enumerate(gallery.blocks)
        if not block.indexed and block.n >= gallery.block_rows // (1 if block is last else 2)
    ]
    for done, i in enumerate(lacking):
        progress(f"indexing block {done + 1} of {len(lacking)}")
        block = gallery.blocks[i]
        save_graph(block.path(GRAPH), block.read().x, gallery.distance)
        blocks = (*gallery.blocks[:i], with_graph(block), *gallery.blocks[i + 1 :])
        gallery = replace(gallery, blocks=blocks)
        commit(gallery)
    gallery = replace(gallery, recall=measured_recall(gallery))
    commit(gallery)
    return gallery


def measured_recall(gallery: Gallery, seed: int = 0) -> Recall:
    """How many of the nearest rows of some of its rows the graphs find, of those found exactly."""
    random = np.random.default_rng(seed)
    picked = np.sort(random.choice(gallery.n, min(_RECALL_QUERIES, gallery.n), replace=False))
    starts = np.cumsum([0, *(block.n for block in gallery.blocks)])
    x = [
        np.array(block.read().x[picked[(picked >= start) & (picked < start + block.n)] - start])
        for block, start in zip(gallery.blocks, starts, strict=False)
    ]
    queries = torch.from_numpy(np.concatenate(x))
    k = min(_RECALL_K + 1, gallery.n)  # a row is its own nearest
    found, right = (
        nearest_rows(gallery, queries, k, exact=exact)[1].tolist() for exact in (False, True)
    )
    own = np.searchsorted(starts, picked, "right") - 1
    shared = possible = 0
    for a, b, i, row in zip(
        found, right, own.tolist(), (picked - starts[own]).tolist(), strict=True
    ):
        others = {*map(tuple, b)} - {(i, row)}
        shared += len(others & {*map(tuple, a)})
        possible += len(others)
    return Recall(_RECALL_K, len(queries), shared / max(1, possible), gallery.n)


def _unknown(gallery: Gallery, name: str) -> str:
    known: set[str] = set()
    for block in gallery.blocks:
        known.update(
            one.decode("utf-8", "replace") for one in np.unique(block.read().identity).tolist()
        )
    alike = get_close_matches(name, sorted(known), n=1)
    return (
        f"{gallery.path} holds no identity {name!r}"
        + (f"; did you mean {alike[0]!r}?" if alike else ".")
        + " Nothing was removed."
    )
