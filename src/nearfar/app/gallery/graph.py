"""The graph of neighbours of a block (HNSW), by usearch."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np

from nearfar.app.gallery.rows import Array
from nearfar.distance import Distance, EuclideanDistance

# How many neighbours are looked at to place a row: at usearch's own 128, a graph takes three times
# as long, and the graphs of all blocks together find enough.
_EXPANSION = 64
# How many rows are added at a time, so that Ctrl-C need not wait.
_AT_A_TIME = 4096


def available(distance: Distance) -> bool:
    """Whether there can be graphs by this distance."""
    return distance in get_args(EuclideanDistance) and find_spec("usearch") is not None


def save_graph(path: Path, x: Array, distance: Distance) -> None:
    """Build the graph of these rows, (n, d), and write it."""
    from usearch.index import Index

    graph = Index(ndim=x.shape[1], metric="l2sq", dtype="f16", expansion_add=_EXPANSION)
    for start in range(0, len(x), _AT_A_TIME):
        part = _prepared(x[start : start + _AT_A_TIME], distance)
        graph.add(np.arange(start, start + len(part)), part)
    graph.save(str(path))


def open_graph(path: Path, n: int) -> Any:
    """The graph in a file, of which only what is used comes into memory; None if it is damaged."""
    from usearch.index import Index

    try:
        found = Index.restore(str(path), view=True)
    except Exception:  # usearch raises several kinds
        return None
    return found if found is not None and len(found) == n else None


def near(graph: Any, x: Array, k: int, distance: Distance) -> Array:
    """(q, k) int64, rows near each of x, (q, d), nearest first; -1 if fewer were found."""
    found = np.full((len(x), k), -1)
    matches = graph.search(_prepared(x, distance), k)
    keys = matches.keys.astype(np.int64).reshape(len(x), -1)
    counts = np.asarray(getattr(matches, "counts", [keys.shape[1]])).reshape(-1, 1)
    found[:, : keys.shape[1]] = np.where(np.arange(keys.shape[1]) < counts, keys, -1)
    return found


def _prepared(x: Array, distance: Distance) -> Array:
    """Rows whose Euclidean distance orders them like the distance."""
    x = np.asarray(x, np.float32)
    if distance != "cosine":
        return x
    length = np.linalg.norm(x, axis=1, keepdims=True)
    scaled: Array = x / np.where(length > 0, length, 1)
    return scaled
