"""Kernels for losses of triplets and quadruplets: the hardest rows of each anchor, or all rows.

Rows and columns of all triplets are sorted by class, so that the positives of an anchor are next to
each other: the slot of a positive is its place among the columns of its class. A launch takes
`slots` of them, from `base` on.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from nearfar.engine.gpu.kernels.tile import (
    any_of,
    each,
    kinds,
    measured,
    products,
    pulled,
    some,
    store_gradient,
)

_NONE = tl.constexpr(float("-inf"))
_LAST = tl.constexpr(2**31 - 1)
_LARGEST = tl.constexpr(3.4028234663852886e38)


class Run(NamedTuple):
    """Where the class of each row lies on the other side, (count,) int32 each.

    Attributes:
        first: the first row of its class.
        size: how many rows its class has, itself included.
    """

    first: Any
    size: Any


class Anchors(NamedTuple):
    """What is known of the rows of a side as anchors.

    Attributes:
        run: where the columns of their classes are.
        threshold: (slots, count) the distances of their positives plus the margin, which negatives
            must exceed; -inf for itself.
        pull: (slots, count) the derivatives by the distances of the positives, unweighted.
        weight: (count,) how much each anchor counts.
    """

    run: Any
    threshold: Any
    pull: Any
    weight: Any


@triton.jit
def larger(best, at, z, counted, name):
    """(r,) the largest value so far and its column, of equal ones the first; those of a tile join.

    NaN is never the largest. The columns have names (c,), by which one is the first.
    """
    z = tl.where(counted, z, _NONE)
    top = tl.max(z, 1)
    first = tl.min(tl.where(z == top[:, None], name[None, :], _LAST), 1)
    better = (top > best) | ((top == best) & (first < at))
    return tl.where(better, top, best), tl.where(better, first, at)


@triton.jit
def extremes(
    I, J, AVOIDED, NEAR, NEAR_AT, FAR, FAR_AT, d, words, split,
    FARTHEST: tl.constexpr, LABELS: tl.constexpr, SELVES: tl.constexpr,
    MEASURE: tl.constexpr, CANCELS: tl.constexpr, PRODUCT: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The farthest or nearest positive and the nearest negative of each anchor, over a part of `J`.

    Stored are distances that grow with how good a choice is, and columns, -1 for none.

    Args:
        AVOIDED: (n,) a class of which no negative is taken; None: no class.
        NEAR, NEAR_AT: of the positive, the distance, or its negation, and the column; None: not
            wanted.
        FAR, FAR_AT: of the negative, the negated distance and the column.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * split
    k = tl.arange(0, CHUNK)
    a = some(I, i, k, WIDTH)
    near = tl.full((ROWS,), _NONE, tl.float32)
    far = tl.full((ROWS,), _NONE, tl.float32)
    near_at = tl.full((ROWS,), -1, tl.int32)
    far_at = tl.full((ROWS,), -1, tl.int32)
    for column in range(start, tl.minimum(start + split, J.count), COLUMNS):
        j = column + tl.arange(0, COLUMNS)
        z = products(I, J, i, j, a, some(J, j, k, WIDTH), WIDTH, CHUNK, PRODUCT)
        positive, negative = kinds(I, J, i, j, words, LABELS, SELVES, False)
        z, again = measured(z, positive | negative, I, J, i, j, d, MEASURE, CANCELS)
        if NEAR is not None:
            near, near_at = larger(near, near_at, z if FARTHEST else -z, positive, j)
        if AVOIDED is not None:
            allowed = each(AVOIDED, i, I)[:, None] != each(J.labels, j, J)[None, :]
            negative = negative & allowed
        far, far_at = larger(far, far_at, -z, negative, j)
    at, inside = tl.program_id(1) * I.count + i, i < I.count
    if NEAR is not None:
        tl.store(NEAR + at, near, mask=inside)
        tl.store(NEAR_AT + at, near_at, mask=inside)
    tl.store(FAR + at, far, mask=inside)
    tl.store(FAR_AT + at, far_at, mask=inside)


@triton.jit
def span(run, i, side, base):
    """From where to where the classes of the rows `i` lie that have a slot `base`."""
    first, size = each(run.first, i, side), each(run.size, i, side)
    low = tl.min(tl.where(size > base, first, _LAST), 0)
    return low, tl.max(tl.where(size > base, first + size, 0), 0)


@triton.jit
def slots_of(run, i, side, base, slots):
    """(r,) how many slots each of the rows `i` has, from `base` on, at most `slots`."""
    return tl.minimum(each(run.size, i, side) - base, slots)


@triton.jit
def set_thresholds(
    I, J, OF, d, words, base, slots, margin,
    LABELS: tl.constexpr, SELVES: tl.constexpr,
    MEASURE: tl.constexpr, CANCELS: tl.constexpr, PRODUCT: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The thresholds of the anchors `I`; their pulls become 0."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, CHUNK)
    a = some(I, i, k, WIDTH)
    first, size = each(OF.run.first, i, I), slots_of(OF.run, i, I, base, slots)
    low, high = span(OF.run, i, I, base)
    for column in range(low, high, COLUMNS):
        j = column + tl.arange(0, COLUMNS)
        z = products(I, J, i, j, a, some(J, j, k, WIDTH), WIDTH, CHUNK, PRODUCT)
        positive, negative = kinds(I, J, i, j, words, LABELS, SELVES, False)
        z, again = measured(z, positive, I, J, i, j, d, MEASURE, CANCELS)
        slot = j[None, :] - first[:, None] - base
        here = (slot >= 0) & (slot < size[:, None]) & (i < I.count)[:, None]
        at = slot * I.count + i[:, None]
        threshold = tl.where(positive, tl.minimum(z + margin, _LARGEST), _NONE)
        tl.store(OF.threshold + at, threshold, mask=here)
        tl.store(OF.pull + at, tl.zeros_like(z), mask=here)


@triton.jit
def violation_of(threshold, far, low, high, term: tl.constexpr, KEPT: tl.constexpr):
    """(r, c) the losses of the triplets of one slot, their slopes, and how many count.

    Without a range, those with a loss that is not 0 count.
    """
    violation = threshold - far
    loss, slope = term(violation)
    if KEPT:
        out = (loss <= low) | (loss >= high) | (violation == _NONE)
        return tl.where(out, 0.0, loss), tl.where(out, 0.0, slope), tl.where(out, 0.0, 1.0)
    else:
        return loss, slope, slope


@triton.jit
def of_anchors(
    OF, i, side, far, times, stores, base, slots, low, high,
    term: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """The triplets of the rows `i` with the negatives of a tile, whose pulls are stored.

    Args:
        far: (r, c) the distances of negatives, inf for all other pairs.
        times: (r, c) how often a triplet counts.
        stores: (r,) bool, whose pulls this program stores.

    Returns:
        (r, c) losses, how many triplets count, and the slopes, of each negative.
    """
    loss, number, force = tl.zeros_like(far), tl.zeros_like(far), tl.zeros_like(far)
    size = slots_of(OF.run, i, side, base, slots)
    for slot in range(0, tl.max(size, 0)):
        at, here = slot * side.count + i, slot < size
        known = tl.load(OF.threshold + at, mask=here, other=_NONE)
        value, slope, counted = violation_of(known[:, None], far, low, high, term, KEPT)
        loss += value
        force += slope
        if KEPT:
            number += counted
        pull = tl.load(OF.pull + at, mask=here, other=0.0) + tl.sum(slope * times, 1)
        tl.store(OF.pull + at, pull, mask=here & stores)
    tl.debug_barrier()  # the next tile reads the pulls that this one stored
    return loss, number if KEPT else force, force


@triton.jit
def by_anchors(
    OF, j, side, far, base, slots, low, high, term: tl.constexpr, KEPT: tl.constexpr
):  # fmt: skip
    """(r, c) the slopes of the triplets of which the rows `j` are the anchors."""
    force = tl.zeros_like(far)
    size = slots_of(OF.run, j, side, base, slots)
    for slot in range(0, tl.max(size, 0)):
        known = tl.load(OF.threshold + slot * side.count + j, mask=slot < size, other=_NONE)
        value, slope, counted = violation_of(known[None, :], far, low, high, term, KEPT)
        force += slope
    return force


@triton.jit
def push(
    I, J, OF_I, OF_J, I_THIRD, J_THIRD, MOST, LOSS, NUMBER, OUT, d, words, base, slots, low, high,
    term: tl.constexpr, KEPT: tl.constexpr, FLIPPED: tl.constexpr,
    LABELS: tl.constexpr, SELVES: tl.constexpr,
    MEASURE: tl.constexpr, CANCELS: tl.constexpr, PRODUCT: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """All triplets of the anchors `I`, and the gradient of the rows `I` as and by negatives.

    A negative acts by the slots of both ends that are anchors. What is None is not an anchor, or
    not wanted.

    Args:
        I_THIRD, J_THIRD: (count,) how many columns are of the class of a row; a triplet then counts
            once for each column of a third class. None: it counts once.
        MOST: how many slots any anchor has; beyond these there is nothing to do.
        LOSS, NUMBER: (count,) float64 and int64, to which is added.
        OUT: (count, d), to which the gradient is added.
    """
    if base >= tl.load(MOST):
        return
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(2) * CHUNK
    k = tl.arange(0, CHUNK)
    a = some(I, i, k, WIDTH)
    stores = i < tl.where(first == 0, I.count, 0)
    losses, numbers = tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.int64)
    total, along = tl.zeros((ROWS, CHUNK), tl.float32), tl.zeros((ROWS,), tl.float32)
    for column in range(0, J.count, COLUMNS):
        j = column + tl.arange(0, COLUMNS)
        positive, negative = kinds(I, J, i, j, words, LABELS, SELVES, FLIPPED)
        b = some(J, j, first + k, WIDTH)
        z = products(I, J, i, j, a, b, WIDTH, CHUNK, PRODUCT)
        z, again = measured(z, negative, I, J, i, j, d, MEASURE, CANCELS)
        far, times = tl.where(negative, z, -_NONE), 1
        if I_THIRD is not None:
            columns = I.count if FLIPPED else J.count
            times = columns - each(I_THIRD, i, I)[:, None] - each(J_THIRD, j, J)[None, :]
        force = tl.zeros_like(z)
        some_slots = tl.where(any_of(negative), slots, 0)
        if OF_I is not None:
            loss, number, force = of_anchors(
                OF_I, i, I, far, times, stores, base, some_slots, low, high, term, KEPT
            )
            losses += tl.sum(loss * times, 1).to(tl.float64)
            if I_THIRD is not None:  # more than a float32 counts
                numbers += tl.sum(number.to(tl.int64) * times, 1)
            else:
                numbers += tl.sum(number, 1).to(tl.int64)
            force = force * each(OF_I.weight, i, I)[:, None]
        if OUT is not None:
            if OF_J is not None:
                by_j = by_anchors(OF_J, j, J, far, base, some_slots, low, high, term, KEPT)
                force += by_j * each(OF_J.weight, j, J)[None, :]
            total, along = pulled(
                total, along, -force * times, z, again, b, I, J, i, j, d, first,
                CHUNK, MEASURE, PRODUCT,
            )  # fmt: skip
    if OF_I is not None:
        tl.store(LOSS + i, tl.load(LOSS + i, mask=stores, other=0.0) + losses, mask=stores)
        tl.store(NUMBER + i, tl.load(NUMBER + i, mask=stores, other=0) + numbers, mask=stores)
    if OUT is not None:
        total += stored(OUT, I, i, k, first, d)
        store_gradient(OUT, total, along, I, i, k, first, d, MEASURE)


@triton.jit
def names(NAMES, j, side):
    """(c,) the names of the columns `j`; that of no column is beyond the last."""
    return tl.load(NAMES + j, mask=j < side.count, other=_LAST)


@triton.jit
def beyond(
    I, J, OF, NAMES, FAR, FAR_AT, MOST, LOSS, NUMBER, d, words, base, slots, margin, low, high,
    term: tl.constexpr, KEPT: tl.constexpr, LABELS: tl.constexpr, SELVES: tl.constexpr,
    MEASURE: tl.constexpr, CANCELS: tl.constexpr, PRODUCT: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """For each positive of the anchors `I` the nearest negative beyond its threshold, and the loss.

    If none is beyond it, the farthest negative. The pulls become the slopes of these triplets.

    Args:
        NAMES: (columns,) int32, their places in the batch, where the first of equal ones is chosen.
        FAR, FAR_AT: (slots, count) the negated distances of the negatives, and their names.
        LOSS, NUMBER: (count,) float64 and int64, to which is added.
    """
    if base >= tl.load(MOST):
        return
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, CHUNK)
    a = some(I, i, k, WIDTH)
    last = tl.full((ROWS,), _NONE, tl.float32)
    last_at = tl.full((ROWS,), -1, tl.int32)
    size = slots_of(OF.run, i, I, base, slots)
    most = tl.max(size, 0)
    for slot in range(0, most):
        at, here = slot * I.count + i, slot < size
        tl.store(FAR + at, last, mask=here)
        tl.store(FAR_AT + at, last_at, mask=here)
    for column in range(0, J.count, COLUMNS):
        j = column + tl.arange(0, COLUMNS)
        positive, negative = kinds(I, J, i, j, words, LABELS, SELVES, False)
        tl.debug_barrier()  # a tile reads what the one before it stored
        if any_of(negative):
            z = products(I, J, i, j, a, some(J, j, k, WIDTH), WIDTH, CHUNK, PRODUCT)
            z, again = measured(z, negative, I, J, i, j, d, MEASURE, CANCELS)
            name = names(NAMES, j, J)
            last, last_at = larger(last, last_at, z, negative, name)
            for slot in range(0, most):
                at, here = slot * I.count + i, slot < size
                near = tl.load(OF.threshold + at, mask=here, other=0.0)
                best = tl.load(FAR + at, mask=here, other=0.0)
                best_at = tl.load(FAR_AT + at, mask=here, other=-1)
                farther = negative & (z > near[:, None])
                best, best_at = larger(best, best_at, -z, farther, name)
                tl.store(FAR + at, best, mask=here)
                tl.store(FAR_AT + at, best_at, mask=here)
    tl.debug_barrier()
    losses, numbers = tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.int64)
    for slot in range(0, most):
        at, here = slot * I.count + i, slot < size
        chosen = tl.load(FAR_AT + at, mask=here, other=-1)
        far = tl.where(chosen < 0, last, -tl.load(FAR + at, mask=here, other=0.0))
        chosen = tl.where(chosen < 0, last_at, chosen)
        far = tl.where(chosen < 0, -_NONE, far)
        near = tl.load(OF.threshold + at, mask=here, other=_NONE)
        loss, slope, counted = violation_of(near + margin, far, low, high, term, KEPT)
        losses += loss.to(tl.float64)
        numbers += counted.to(tl.int64)
        tl.store(FAR_AT + at, chosen, mask=here)
        tl.store(OF.pull + at, slope, mask=here)
    inside = i < I.count
    tl.store(LOSS + i, tl.load(LOSS + i, mask=inside, other=0.0) + losses, mask=inside)
    tl.store(NUMBER + i, tl.load(NUMBER + i, mask=inside, other=0) + numbers, mask=inside)


@triton.jit
def chosen_by(OF, FAR_AT, i, side, name, base, slots):
    """(r, c) how strongly the anchors `i` push each of the rows of these names."""
    force = tl.zeros((i.shape[0], name.shape[0]), tl.float32)
    size = slots_of(OF.run, i, side, base, slots)
    for slot in range(0, tl.max(size, 0)):
        at, here = slot * side.count + i, slot < size
        chosen = tl.load(FAR_AT + at, mask=here, other=-1)
        by = tl.load(OF.pull + at, mask=here, other=0.0)
        force += tl.where(chosen[:, None] == name[None, :], by[:, None], 0.0)
    return force * each(OF.weight, i, side)[:, None]


@triton.jit
def push_chosen(
    I, J, OF_I, OF_J, NAMES, FAR_AT, MOST, OUT, d, words, base, slots,
    FLIPPED: tl.constexpr, LABELS: tl.constexpr, SELVES: tl.constexpr,
    MEASURE: tl.constexpr, CANCELS: tl.constexpr, PRODUCT: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of the rows `I` as and by the negatives that `beyond` chose, added to `OUT`."""
    if base >= tl.load(MOST):
        return
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(2) * CHUNK
    k = tl.arange(0, CHUNK)
    a = some(I, i, k, WIDTH)
    total, along = stored(OUT, I, i, k, first, d), tl.zeros((ROWS,), tl.float32)
    for column in range(0, J.count, COLUMNS):
        j = column + tl.arange(0, COLUMNS)
        force = tl.zeros((ROWS, COLUMNS), tl.float32)
        if OF_I is not None:
            force += chosen_by(OF_I, FAR_AT, i, I, names(NAMES, j, J), base, slots)
        if OF_J is not None:
            force += chosen_by(OF_J, FAR_AT, j, J, names(NAMES, i, I), base, slots).T
        b = some(J, j, first + k, WIDTH)
        z = products(I, J, i, j, a, b, WIDTH, CHUNK, PRODUCT)
        z, again = measured(z, force > 0, I, J, i, j, d, MEASURE, CANCELS)
        total, along = pulled(
            total, along, -force, z, again, b, I, J, i, j, d, first, CHUNK, MEASURE, PRODUCT
        )
    store_gradient(OUT, total, along, I, i, k, first, d, MEASURE)


@triton.jit
def stored(OUT, I, i, k, first, d):
    """(r, CHUNK) the gradient of the rows `i` so far."""
    inside = (i < I.count)[:, None] & (first + k < d)[None, :]
    at = i.to(tl.int64)[:, None] * d + (first + k)[None, :]
    return tl.load(OUT + at, mask=inside, other=0.0)


@triton.jit
def pull(
    I, J, RUN, OF_I, OF_J, MOST, OUT, d, words, base, slots,
    FLIPPED: tl.constexpr, LABELS: tl.constexpr, SELVES: tl.constexpr,
    MEASURE: tl.constexpr, CANCELS: tl.constexpr, PRODUCT: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of the rows `I` by their positives, added to `OUT`.

    Args:
        RUN: where their classes are in `J`.
        MOST: how many slots any anchor has.
    """
    if base >= tl.load(MOST):
        return
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    low, high = span(RUN, i, I, 0)
    first = tl.program_id(2) * CHUNK
    k = tl.arange(0, CHUNK)
    a = some(I, i, k, WIDTH)
    total, along = tl.zeros((ROWS, CHUNK), tl.float32), tl.zeros((ROWS,), tl.float32)
    for column in range(low, high, COLUMNS):
        j = column + tl.arange(0, COLUMNS)
        b = some(J, j, first + k, WIDTH)
        z = products(I, J, i, j, a, b, WIDTH, CHUNK, PRODUCT)
        positive, negative = kinds(I, J, i, j, words, LABELS, SELVES, FLIPPED)
        z, again = measured(z, positive, I, J, i, j, d, MEASURE, CANCELS)
        force = tl.zeros_like(z)
        if OF_I is not None:
            slot = j[None, :] - each(OF_I.run.first, i, I)[:, None] - base
            here = positive & (slot >= 0) & (slot < slots)
            by = tl.load(OF_I.pull + slot * I.count + i[:, None], mask=here, other=0.0)
            force += by * each(OF_I.weight, i, I)[:, None]
        if OF_J is not None:
            slot = i[:, None] - each(OF_J.run.first, j, J)[None, :] - base
            here = positive & (slot >= 0) & (slot < slots)
            by = tl.load(OF_J.pull + slot * J.count + j[None, :], mask=here, other=0.0)
            force += by * each(OF_J.weight, j, J)[None, :]
        total, along = pulled(
            total, along, force, z, again, b, I, J, i, j, d, first, CHUNK, MEASURE, PRODUCT
        )
    total += stored(OUT, I, i, k, first, d)
    store_gradient(OUT, total, along, I, i, k, first, d, MEASURE)
