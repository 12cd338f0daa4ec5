"""Which classes meet in which batch of an epoch.

The items of a class are cut into chunks of K, and every batch takes one chunk from each of P
classes. Everything here is about numbers of chunks, and knows no item.
"""

from bisect import bisect_left
from itertools import pairwise
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]


def number_of_batches(chunks: Ints, n_classes: int, *, drop_last: bool) -> int:
    """How many batches of `n_classes` different classes there are in an epoch.

    Args:
        chunks: (c,) the chunks of each class, of which there are at least `n_classes`.
        n_classes: P, the classes of a batch.
        drop_last: as many batches as can be filled with chunks drawn once; otherwise as few as can
            hold every chunk.
    """
    total = int(chunks.sum())
    if not drop_last:
        return max(-(-total // n_classes), int(chunks.max()))
    # A class can be in each batch once. What n batches could hold minus what they need is concave
    # in n and 0 for none, so once n batches are too many, more are too.
    most = range(1, total // n_classes + 1)
    return bisect_left(most, True, key=lambda n: np.minimum(chunks, n).sum() < n * n_classes)


def chunks_drawn(chunks: Ints, n_classes: int, n_batches: int, random: np.random.Generator) -> Ints:
    """(c,) how many chunks of each class fill the batches; at most one a batch.

    What has to be left out, or drawn again, is spread evenly over the classes.
    """
    drawn: Ints = np.minimum(chunks, n_batches)
    missing = n_batches * n_classes - int(drawn.sum())
    if missing < 0:
        return drawn - _evenly(drawn, -missing, random)
    return drawn + _evenly(n_batches - drawn, missing, random)


def _evenly(capacity: Ints, total: int, random: np.random.Generator) -> Ints:
    """(c,) numbers that add up to `total`, equal up to 1 except where the capacity is less."""
    levels = range(int(capacity.max()) + 1)
    level = bisect_left(levels, total, key=lambda n: np.minimum(capacity, n).sum())
    share: Ints = np.minimum(capacity, level)
    surplus = int(share.sum()) - total
    share[random.choice(np.flatnonzero(share == level), surplus, replace=False)] -= 1
    return share


def meet(drawn: Ints, n_batches: int, random: np.random.Generator) -> tuple[Ints, Ints]:
    """Puts the chunks into batches at random, those of one class into different batches.

    The chunks, class after class in random order, fill a table row by row; a batch is a column. A
    class lies in one row, or ends one and begins the next. So each row can be shuffled freely, but
    for one class, which keeps out of the columns that it has in the row above.

    Args:
        drawn: (c,) how many chunks of each class, none above `n_batches`.
        n_batches: the number of batches, which divides the number of chunks.
        random: for the order.

    Returns:
        classes: (n_batches, P) the classes of each batch.
        numbers: (n_batches, P) which chunk of its class, counted from 0.
    """
    order = random.permutation(len(drawn))
    count = drawn[order]
    classes = np.repeat(order, count)
    numbers = np.arange(len(classes)) - np.repeat(count.cumsum() - count, count)
    table = np.arange(len(classes)).reshape(-1, n_batches)
    ends, begins = classes[table[:-1, -1]], classes[table[1:, 0]]
    random.permuted(table, axis=1, out=table)
    for k, (above, row) in enumerate(pairwise(table)):
        if ends[k] == begins[k]:
            _keep_out(classes[above] == ends[k], classes[row] == ends[k], row, random)
    # Without this a process would have the same classes throughout an epoch.
    table = random.permuted(table.T, axis=1)
    return classes[table], numbers[table]


def _keep_out(
    taken: np.ndarray[Any, Any], chunk: np.ndarray[Any, Any], row: Ints, random: np.random.Generator
) -> None:
    """Moves the marked chunks of a row, in place, to random columns that are not taken."""
    chosen = np.zeros_like(taken)
    chosen[random.choice(np.flatnonzero(~taken), int(chunk.sum()), replace=False)] = True
    row[chosen], row[~chosen] = row[chunk], row[~chunk]
