"""The kernel for the second terms of quadruplets: negative pairs against all positive pairs."""

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


class Table(NamedTuple):
    """Thresholds in segments, ascending within each, and what was found below them.

    Attributes:
        entries: (t,) the thresholds.
        until: (t + 1,) the total weight of the entries before each; None: each has weight 1.
        start, stop: (s,) int32, the segments.
        count: (copies, t + s) int64, how many values belong before each entry and after the one
            before it; behind each segment one for those above all, which stays 0.
        sum: (copies, t + s) int64, the sums of these values, as whole numbers of a small unit.
        copies: how many there are, so that fewer programs add to the same number.
        buckets: t + s.
        steps: how many halvings find a place in the longest segment.
    """

    entries: Any
    until: Any
    start: Any
    stop: Any
    count: Any
    sum: Any
    copies: Any
    buckets: Any
    steps: Any


@triton.jit
def place_of(TABLE, start, stop, z, steps):
    """(r, c) int32, where values belong in their segments: after the entries that are no larger."""
    place = start + tl.zeros(z.shape, tl.int32)
    for halving in range(0, steps):
        step = 1 << (steps - 1 - halving)
        probe = place + (step - 1)
        inside = probe < stop
        entry = tl.load(TABLE.entries + probe, mask=inside, other=0.0)
        place = tl.where(inside & (entry <= z), place + step, place)
    return place


@triton.jit
def beyond(TABLE, place, stop):
    """(r, c) the weight of the entries from each place on."""
    if TABLE.until is None:
        return (stop - place).to(tl.float32)
    else:
        until = tl.load(TABLE.until + place + tl.zeros_like(stop))
        return (tl.load(TABLE.until + stop + tl.zeros_like(place)) - until).to(tl.float32)


@triton.jit
def noted(TABLE, segment, place, start, stop, negative, units, number, total):
    """Add values to the sums below each entry.

    Most values may lie below all entries: those are returned, summed by row.
    """
    below = negative & (place < stop)
    lowest = below & (place == start)
    copy = (tl.program_id(0) % TABLE.copies).to(tl.int64) * TABLE.buckets
    at = copy + place + segment
    one = tl.full(place.shape, 1, tl.int64)
    tl.atomic_add(TABLE.count + at, one, mask=below & (place > start), sem="relaxed")
    tl.atomic_add(TABLE.sum + at, units, mask=below & (place > start), sem="relaxed")
    number += tl.sum(lowest.to(tl.int32), 1)
    return number, total + tl.sum(tl.where(lowest, units, 0), 1)


@triton.jit
def push_pairs(
    I, J, ALL, CLASS, SCALE, OUT, d, words,
    LABELS: tl.constexpr, SELVES: tl.constexpr,
    MEASURE: tl.constexpr, CANCELS: tl.constexpr, PRODUCT: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Negative pairs of `I` against the positive pairs of all classes but their own two.

    Args:
        ALL: the thresholds of all positive pairs, in one segment.
        CLASS: those of each class; the labels are its segments.
        SCALE: by which a value is multiplied to be a whole number of units.
        OUT: (count, d), the gradient of the rows `I` by both orders of each pair; None: not wanted.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(2) * CHUNK
    k = tl.arange(0, CHUNK)
    a = some(I, i, k, WIDTH)
    inside = i < tl.where(first == 0, I.count, 0)
    scale, last = tl.load(SCALE), tl.load(ALL.stop)
    own = each(I.labels, i, I).to(tl.int32)
    start, stop = tl.load(CLASS.start + own)[:, None], tl.load(CLASS.stop + own)[:, None]
    total, along = tl.zeros((ROWS, CHUNK), tl.float32), tl.zeros((ROWS,), tl.float32)
    number, sums = tl.zeros((ROWS,), tl.int64), tl.zeros((ROWS,), tl.int64)
    of_class, sums_of_class = tl.zeros((ROWS,), tl.int64), tl.zeros((ROWS,), tl.int64)
    for column in range(0, J.count, COLUMNS):
        j = column + tl.arange(0, COLUMNS)
        b = some(J, j, first + k, WIDTH)
        z = products(I, J, i, j, a, b, WIDTH, CHUNK, PRODUCT)
        positive, negative = kinds(I, J, i, j, words, LABELS, SELVES, False)
        z, again = measured(z, negative, I, J, i, j, d, MEASURE, CANCELS)
        place = place_of(ALL, 0, last, z, ALL.steps)
        acts = negative & (place < last)
        steps = tl.where(any_of(acts), CLASS.steps, 0)
        own_place = place_of(CLASS, start, stop, z, steps)
        units = (z.to(tl.float64) * scale + 0.5).to(tl.int64)
        tells = acts & inside[:, None]
        number, sums = noted(ALL, 0, place, 0, last, tells, units, number, sums)
        of_class, sums_of_class = noted(
            CLASS, own[:, None], own_place, start, stop, tells, units, of_class, sums_of_class
        )
        if OUT is not None:
            other = each(J.labels, j, J).to(tl.int32)
            start_j = tl.load(CLASS.start + other)[None, :]
            stop_j = tl.load(CLASS.stop + other)[None, :]
            force = beyond(ALL, place, last) - beyond(CLASS, own_place, stop)
            force -= beyond(CLASS, place_of(CLASS, start_j, stop_j, z, steps), stop_j)
            force = tl.where(acts, -2 * force, 0.0)
            total, along = pulled(
                total, along, force, z, again, b, I, J, i, j, d, first, CHUNK, MEASURE, PRODUCT
            )
    tl.atomic_add(ALL.count + tl.zeros_like(i), number, mask=inside, sem="relaxed")
    tl.atomic_add(ALL.sum + tl.zeros_like(i), sums, mask=inside, sem="relaxed")
    at = tl.load(CLASS.start + own) + own
    tl.atomic_add(CLASS.count + at, of_class, mask=inside, sem="relaxed")
    tl.atomic_add(CLASS.sum + at, sums_of_class, mask=inside, sem="relaxed")
    if OUT is not None:
        store_gradient(OUT, total, along, I, i, k, first, d, MEASURE)
