"""Kernels for losses of triplets and quadruplets: the hardest rows of each anchor."""

import triton
import triton.language as tl

from nearfar.engine.gpu.kernels.tile import each, kinds, measured, products, some

_NONE = tl.constexpr(float("-inf"))
_LAST = tl.constexpr(2**31 - 1)


@triton.jit
def larger(best, at, z, counted, j):
    """(r,) the largest value so far and its column, of equal ones the first; those of a tile join.

    NaN is never the largest.
    """
    z = tl.where(counted, z, _NONE)
    top = tl.max(z, 1)
    first = tl.min(tl.where(z == top[:, None], j[None, :], _LAST), 1)
    better = top > best
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
