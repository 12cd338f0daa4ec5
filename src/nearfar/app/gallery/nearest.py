"""The nearest rows and identities of a gallery, block by block: memory does not grow with it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nearfar.app.gallery.graph import available, near, open_graph
from nearfar.app.gallery.rows import Array, Rows
from nearfar.app.gallery.store import GRAPH, ITEMS, Block, Gallery
from nearfar.distance import between_rows
from nearfar.engine.slices import spans
from nearfar.evaluate.nearest import nearest

_QUERIES = 64  # searched at a time
_MOST_BY_GRAPH = 2000  # more neighbours than these are searched exactly


@dataclass(frozen=True)
class Match:
    """An identity near a query.

    Attributes:
        identity: its name.
        item: the name of its nearest item.
        distance: of the query to that item.
    """

    identity: str
    item: str
    distance: float


def nearest_identities(
    gallery: Gallery, x: Tensor, k: int, *, exact: bool = False
) -> list[list[Match]]:
    """The k nearest identities of each query, each by its nearest item.

    Args:
        gallery: where to search.
        x: (q, d) queries.
        k: how many identities; fewer are found if there are fewer.
        exact: whether every row is compared, without graphs.

    Raises:
        MissingError: another process has replaced a block.
        InputError: a file is damaged.
    """
    found: list[list[Match]] = []
    for rows in spans(len(x), _QUERIES):
        found += _identities(gallery, x[rows], min(k, gallery.n_identities), exact)
    return found


def uses_graphs(gallery: Gallery, k: int) -> bool:
    """Whether a search for k identities begins with graphs."""
    by_graph = any(block.indexed for block in gallery.blocks) and available(gallery.distance)
    return by_graph and _wanted(gallery, k) <= _MOST_BY_GRAPH


def _wanted(gallery: Gallery, k: int) -> int:
    """How many rows are likely to show k identities."""
    return min(gallery.n, 2 * k * -(-gallery.n // gallery.n_identities))


def _identities(gallery: Gallery, x: Tensor, k: int, exact: bool) -> list[list[Match]]:
    """For a few queries; those whose nearest rows show too few identities are searched further."""
    if not k:
        return [[] for _ in x]
    wanted = _wanted(gallery, k)
    found: list[list[Match]] = [[] for _ in x]
    blocks = [block.read() for block in gallery.blocks]
    left = list(range(len(x)))
    while left:
        distance, place = nearest_rows(gallery, x[left], wanted, exact=exact)
        for i, far, rows in zip(left, distance.tolist(), place.tolist(), strict=True):
            found[i] = _distinct(gallery.blocks, blocks, far, rows, k)
        left = [i for i in left if len(found[i]) < k and wanted < gallery.n]
        wanted = min(gallery.n, 8 * wanted)
    return found


def _distinct(
    blocks: Sequence[Block],
    rows: Sequence[Rows],
    distances: Sequence[float],
    places: Sequence[Sequence[int]],
    k: int,
) -> list[Match]:
    """The first k identities among rows, nearest first."""
    best: dict[bytes, Match] = {}
    for distance, (block, row) in zip(distances, places, strict=True):
        if block < 0 or len(best) == k:
            break
        held = rows[block]
        identity = held.identity[row]
        if identity not in best:
            try:
                best[identity] = Match(identity.decode(), held.name[row].decode(), distance)
            except UnicodeDecodeError:
                raise blocks[block].damaged(ITEMS) from None
    return list(best.values())


def nearest_rows(
    gallery: Gallery, x: Tensor, k: int, *, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """The distances to the k nearest rows, (q, k), and where they are, (q, k, 2).

    Nearest first; a place is a block and a row of it, -1 and at infinity where graphs found fewer.
    """
    by_graph = not exact and k <= _MOST_BY_GRAPH and available(gallery.distance)
    distance, place = torch.empty(len(x), 0), torch.empty(len(x), 0, 2, dtype=torch.int64)
    for number, block in enumerate(gallery.blocks):
        far, rows = _of_block(block, x, min(k, block.n), gallery, by_graph)
        where = torch.stack([torch.full_like(rows, number).where(rows >= 0, -1), rows], 2)
        distance, order = torch.cat([distance, far], 1).sort(dim=1, stable=True)
        place = torch.cat([place, where], 1)
        place = place.gather(1, order[:, :, None].expand_as(place))
        distance, place = distance[:, :k], place[:, :k]
    return distance, place


def _of_block(
    block: Block, x: Tensor, k: int, gallery: Gallery, by_graph: bool
) -> tuple[Tensor, Tensor]:
    """(q, k) distances and rows of a block, nearest first."""
    graph = open_graph(block.path(GRAPH), block.n) if by_graph and block.indexed else None
    held = (block.whole() if graph is None else block.read()).x
    if graph is None:
        found = nearest(x, k=k, distance=gallery.distance, reference=torch.from_numpy(held))
        rows = found.indices
    else:
        rows = torch.from_numpy(near(graph, x.numpy(), k, gallery.distance))
    # Measured as `verify` does, so that a distance is the same wherever it is printed.
    with_rows = _taken(held, rows.flatten().clamp(min=0).numpy())
    block.refuse_damaged(with_rows)
    repeated = x.repeat_interleave(k, 0)
    distance = between_rows(repeated, torch.from_numpy(with_rows), gallery.distance).view_as(rows)
    distance, order = distance.masked_fill(rows < 0, torch.inf).sort(dim=1, stable=True)
    return distance, rows.gather(1, order)


def _taken(held: Array, rows: Array) -> Array:
    """Copies of some rows."""
    found: Array = np.array(held[rows], np.float32)
    return found
