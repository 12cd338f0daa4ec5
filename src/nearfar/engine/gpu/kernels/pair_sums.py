"""Kernels for losses that are a sum over pairs."""

import triton
import triton.language as tl

from nearfar.engine.gpu.kernels.tile import (
    each,
    kinds,
    loaded,
    measured,
    place,
    products,
    pulled,
    some,
    store_gradient,
)


@triton.jit
def left_out(loss, z, positive, LIMITS, low, high, KEPT: tl.constexpr):
    """(r, c) bool, the pairs that do not count.

    `LIMITS` holds the distance of the nearest negative, within which no positive counts, and of the
    farthest positive, beyond which no negative does; None: all count. NaN counts.
    """
    out = positive & False
    if LIMITS is not None:
        out = out | tl.where(positive, z <= tl.load(LIMITS), z >= tl.load(LIMITS + 1))
    if KEPT:
        out = out | (loss <= low) | (loss >= high)
    return out


@triton.jit
def terms_of(
    z, positive, negative, share, LIMITS, numbers, low, high,
    positive_fn: tl.constexpr, negative_fn: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """(r, c) the losses of pairs, the derivatives, and which pairs count."""
    near, pull = positive_fn(z, numbers)
    far, push = negative_fn(z, numbers)
    loss, force = tl.where(positive, near, far), tl.where(positive, pull, push)
    counted = positive | negative
    counted = counted & (left_out(loss, z, positive, LIMITS, low, high, KEPT) == 0)
    by = tl.where(positive, share, 1.0)
    return tl.where(counted, loss * by, 0.0), tl.where(counted, force * by, 0.0), counted


@triton.jit
def visit(
    I, J, I_WEIGHT, J_WEIGHT, SHARE, LIMITS, BIAS, LOSS, FORCES, BY_SCALE, OUT,
    d, words, split, numbers, low, high,
    positive_fn: tl.constexpr, negative_fn: tl.constexpr, KEPT: tl.constexpr,
    LABELS: tl.constexpr, SELVES: tl.constexpr, FLIPPED: tl.constexpr,
    MEASURE: tl.constexpr, CANCELS: tl.constexpr, PRODUCT: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The losses of the rows `I`, and their gradient: CHUNK numbers of each, over a part of `J`.

    A pair acts by the weights of both ends that are anchors. What is None is not an anchor, or not
    wanted.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * split
    first = tl.program_id(2) * CHUNK
    k = tl.arange(0, CHUNK)
    a = some(I, i, k, WIDTH)
    share = tl.load(SHARE) if SHARE is not None else 1.0
    bias = tl.load(BIAS) if BIAS is not None else 0.0
    losses = tl.zeros((ROWS,), tl.float32)
    forces = tl.zeros((ROWS,), tl.float32)
    by_scale = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, CHUNK), tl.float32)
    along = tl.zeros((ROWS,), tl.float32)
    for column in range(start, tl.minimum(start + split, J.count), COLUMNS):
        j = column + tl.arange(0, COLUMNS)
        b = some(J, j, first + k, WIDTH)
        z = products(I, J, i, j, a, b, WIDTH, CHUNK, PRODUCT)
        positive, negative = kinds(I, J, i, j, words, LABELS, SELVES, FLIPPED)
        z, again = measured(z, positive | negative, I, J, i, j, d, MEASURE, CANCELS)
        loss, force, counted = terms_of(
            z + bias, positive, negative, share, LIMITS, numbers, low, high,
            positive_fn, negative_fn, KEPT,
        )  # fmt: skip
        if LOSS is not None:
            losses += tl.sum(loss, 1)
        if OUT is not None:
            weight = tl.zeros_like(z)
            if I_WEIGHT is not None:
                weight += each(I_WEIGHT, i, I)[:, None]
            if J_WEIGHT is not None:
                weight += each(J_WEIGHT, j, J)[None, :]
            force = force * weight
            if FORCES is not None:
                forces += tl.sum(force, 1)
            if BY_SCALE is not None:  # see `log_sums.pull`
                by_scale += tl.sum(force * z, 1)
            total, along = pulled(
                total, along, force, z, again, b, I, J, i, j, d, first,
                CHUNK, MEASURE, PRODUCT,
            )  # fmt: skip
    at = tl.program_id(1) * I.count + i
    inside = i < tl.where(first == 0, I.count, 0)  # the first chunk speaks for all
    if LOSS is not None:
        tl.store(LOSS + at, losses, mask=inside)
    if FORCES is not None:
        tl.store(FORCES + at, forces, mask=inside)
    if BY_SCALE is not None:
        tl.store(BY_SCALE + at, by_scale, mask=inside)
    if OUT is not None:
        store_gradient(OUT, total, along, I, i, k, first, d, MEASURE)


@triton.jit
def visit_strip(
    Z, F, I, J, WEIGHT, SHARE, BIAS, LOSS, FORCES, BY_SCALE, words, numbers,
    positive_fn: tl.constexpr, negative_fn: tl.constexpr,
    LABELS: tl.constexpr, SELVES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The losses of the rows `I`, whose products are in the strip `Z`; their forces go into `F`."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    bias = tl.load(BIAS) if BIAS is not None else 0.0
    share = tl.load(SHARE)
    weight = each(WEIGHT, i, I)[:, None]
    losses = tl.zeros((ROWS,), tl.float32)
    forces = tl.zeros((ROWS,), tl.float32)
    by_scale = tl.zeros((ROWS,), tl.float32)
    for column in range(0, J.count, COLUMNS):
        j = column + tl.arange(0, COLUMNS)
        z = loaded(Z, I, J, i, j)
        positive, negative = kinds(I, J, i, j, words, LABELS, SELVES, False)
        loss, force, counted = terms_of(
            z + bias, positive, negative, share, None, numbers, 0.0, 0.0,
            positive_fn, negative_fn, False,
        )  # fmt: skip
        losses += tl.sum(loss, 1)
        if F is not None:
            force = force * weight
            if FORCES is not None:
                forces += tl.sum(force, 1)
            if BY_SCALE is not None:  # see `log_sums.pull`
                by_scale += tl.sum(force * z, 1)
            inside = (i < I.count)[:, None] & (j < J.count)[None, :]
            tl.store(place(F, i, j), force.to(F.numbers.dtype.element_ty), mask=inside)
    tl.store(LOSS + i, losses, mask=i < I.count)
    if FORCES is not None:
        tl.store(FORCES + i, forces, mask=i < I.count)
    if BY_SCALE is not None:
        tl.store(BY_SCALE + i, by_scale, mask=i < I.count)


@triton.jit
def look(
    I, J, LIMITS, BIAS, NEAREST, FARTHEST, POSITIVES, NEGATIVES,
    d, words, split, numbers, low, high,
    positive_fn: tl.constexpr, negative_fn: tl.constexpr, KEPT: tl.constexpr,
    LABELS: tl.constexpr, SELVES: tl.constexpr,
    MEASURE: tl.constexpr, CANCELS: tl.constexpr, PRODUCT: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """How many pairs of the rows `I` count, or how near negatives and how far positives are."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * split
    k = tl.arange(0, CHUNK)
    a = some(I, i, k, WIDTH)
    bias = tl.load(BIAS) if BIAS is not None else 0.0
    nearest = tl.full((ROWS,), float("inf"), tl.float32)
    farthest = tl.full((ROWS,), float("-inf"), tl.float32)
    positives = tl.zeros((ROWS,), tl.int32)
    negatives = tl.zeros((ROWS,), tl.int32)
    for column in range(start, tl.minimum(start + split, J.count), COLUMNS):
        j = column + tl.arange(0, COLUMNS)
        z = products(I, J, i, j, a, some(J, j, k, WIDTH), WIDTH, CHUNK, PRODUCT)
        positive, negative = kinds(I, J, i, j, words, LABELS, SELVES, False)
        z, again = measured(z, positive | negative, I, J, i, j, d, MEASURE, CANCELS)
        if NEAREST is not None:
            nearest = tl.minimum(nearest, tl.min(tl.where(negative, z, float("inf")), 1))
            farthest = tl.maximum(farthest, tl.max(tl.where(positive, z, float("-inf")), 1))
        else:
            loss, force, counted = terms_of(
                z + bias, positive, negative, 1.0, LIMITS, numbers, low, high,
                positive_fn, negative_fn, KEPT,
            )  # fmt: skip
            positives += tl.sum((counted & positive).to(tl.int32), 1)
            negatives += tl.sum((counted & negative).to(tl.int32), 1)
    at, inside = tl.program_id(1) * I.count + i, i < I.count
    if NEAREST is not None:
        tl.store(NEAREST + at, nearest, mask=inside)
        tl.store(FARTHEST + at, farthest, mask=inside)
    else:
        tl.store(POSITIVES + at, positives, mask=inside)
        tl.store(NEGATIVES + at, negatives, mask=inside)
