"""Kernels for wide rows: the rule of a loss as what follows on the product of a tile.

Programs take one tile after the other. Rows and columns come as tensor descriptors `X` and `Y`,
which fetch blocks of CHUNK numbers of ROWS or COLUMNS rows, 0 beyond the ends.
"""

import triton
import triton.language as tl

from nearfar.engine.gpu.kernels.log_sums import (
    exponent,
    force_on,
    gathered,
    no_sums,
    store_sums,
)
from nearfar.engine.gpu.kernels.tile import dot, kinds, loaded, place

_LOG2E = tl.constexpr(1.4426950408889634)
_NONE = tl.constexpr(float("-inf"))
# Rows of tiles that are taken together, so that programs at work share their operands.
_GROUP = tl.constexpr(8)
# Exponentials of numbers this far below the largest are normal numbers.
_SPREAD = tl.constexpr(80.0)


@triton.jit
def tile_of(number, down, across):
    """The row and column of a tile."""
    size = _GROUP * across
    first = (number // size) * _GROUP
    high = tl.minimum(down - first, _GROUP)
    return first + (number % size) % high, (number % size) // high


@triton.jit
def product_of(
    X, Y, row, column, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PRODUCT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) the inner products of rows from `row` on with columns from `column` on."""
    z = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, WIDTH, CHUNK):
        z = dot(X.load([row, k]), Y.load([column, k]).T, PRODUCT, z)
    return z


@triton.jit
def halves(z):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def quarters(z):
    """A tile in four, from left to right: one after the other they need fewer registers."""
    left, right = halves(z)
    first, second = halves(left)
    third, fourth = halves(right)
    return first, second, third, fourth


@triton.jit
def sums_of_both(z, negative, far, far_fn: tl.constexpr):
    """The sums of exponentials of negatives, and their tops: by row, and by column.

    One exponential a pair serves both, unless they lie too far apart for that.
    """
    e, slope = exponent(z, far_fn, far)
    low = tl.min(e)
    e = tl.where(negative, e, _NONE)
    high = tl.max(e)
    if high - low < _SPREAD:
        terms = tl.exp2((e - tl.where(high == _NONE, 0.0, high)) * _LOG2E)
        of_i, of_j = tl.sum(terms, 1), tl.sum(terms, 0)
        i_top, j_top = high + tl.zeros_like(of_i), high + tl.zeros_like(of_j)
    else:
        i_top, of_i = top_and_sum(e, 1)
        j_top, of_j = top_and_sum(e, 0)
    return i_top, of_i, j_top, of_j


@triton.jit
def top_and_sum(e, axis: tl.constexpr):
    """The largest exponents along an axis, and the sums of exponentials relative to them."""
    top = tl.max(e, axis)
    base = tl.where(top == _NONE, 0.0, top)
    return top, tl.sum(tl.exp2((e - tl.expand_dims(base, axis)) * _LOG2E), axis)


@triton.jit
def collect_tiles(
    X, Y, I, J, OF_I, OF_J, words, far, near,
    far_fn: tl.constexpr, near_fn: tl.constexpr, TOGETHER: tl.constexpr, BOTH: tl.constexpr,
    LABELS: tl.constexpr, SELVES: tl.constexpr, PRODUCT: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sums of the rows over each tile and, if `BOTH` are anchors, those of the columns."""
    down, across = tl.cdiv(I.count, ROWS), tl.cdiv(J.count, COLUMNS)
    for number in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        p, q = tile_of(number, down, across)
        z = product_of(X, Y, p * ROWS, q * COLUMNS, WIDTH, CHUNK, PRODUCT, ROWS, COLUMNS)
        i, j = p * ROWS + tl.arange(0, ROWS), q * COLUMNS + tl.arange(0, COLUMNS)
        if BOTH:
            positive, negative = kinds(I, J, i, j, words, LABELS, SELVES, False)
            total = tl.sum(tl.where(positive, z, 0.0), 1)
            i_top, of_i, j_top, of_j = sums_of_both(z, negative, far, far_fn)
            store_sums(OF_I, (i_top, of_i, i_top, of_i, total), q, i, I)
            store_sums(OF_J, (j_top, of_j, j_top, of_j, j_top), p, j, J)
        else:
            sums = no_sums(ROWS)
            left, right = halves(z)
            parts = quarters(left) + quarters(right)
            for k in tl.static_range(8):
                j = q * COLUMNS + k * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
                positive, negative = kinds(I, J, i, j, words, LABELS, SELVES, False)
                sums = gathered(
                    sums, OF_I, parts[k], positive, negative, far, near, far_fn, near_fn, TOGETHER
                )  # fmt: skip
            store_sums(OF_I, sums, q, i, I)


@triton.jit
def join(TOP, SUM, OUT_TOP, OUT_SUM, parts, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sums over all parts (parts, n), relative to one top for each of the n anchors."""
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    top = tl.full((COLUMNS,), _NONE, tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for part in range(0, parts, ROWS):
        i = part + tl.arange(0, ROWS)
        at, inside = i[:, None] * n + j[None, :], (i < parts)[:, None] & (j < n)[None, :]
        tops = tl.load(TOP + at, mask=inside, other=_NONE)
        higher = tl.maximum(top, tl.max(tops, 0))
        base = tl.where(higher == _NONE, 0.0, higher)
        shares = tl.exp2((tops - base[None, :]) * _LOG2E)
        more = tl.sum(tl.load(SUM + at, mask=inside, other=0.0) * shares, 0)
        total = total * tl.exp2((top - base) * _LOG2E) + more
        top = higher
    tl.store(OUT_TOP + j, top, mask=j < n)
    tl.store(OUT_SUM + j, total, mask=j < n)


@triton.jit
def forces(
    X, Y, Z, F, I, J, OF_I, OF_J, SCALE, BY_SCALE, words, far, near, low, high,
    far_fn: tl.constexpr, near_fn: tl.constexpr, term: tl.constexpr,
    KEPT: tl.constexpr, TOGETHER: tl.constexpr, BY_I: tl.constexpr, BY_J: tl.constexpr,
    STORED: tl.constexpr, LABELS: tl.constexpr, SELVES: tl.constexpr, PRODUCT: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the forces on each pair into the strip `F`.

    If products are `STORED`, they are in the strip `Z`. Else tiles are multiplied here, and `F` is
    a descriptor that takes a quarter of a tile.

    Args:
        SCALE: by which forces are multiplied, so that float16 holds them; None: 1.
        BY_SCALE: see `log_sums.pull`; of each tile.
    """
    scale = tl.load(SCALE) if SCALE is not None else 1.0
    down, across = tl.cdiv(I.count, ROWS), tl.cdiv(J.count, COLUMNS)
    for number in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        p, q = tile_of(number, down, across)
        row, column = p * ROWS, q * COLUMNS
        i = row + tl.arange(0, ROWS)
        by_scale = tl.zeros((ROWS,), tl.float32)
        if STORED:
            j = column + tl.arange(0, COLUMNS)
            z = loaded(Z, I, J, i, j)
            force = force_from(
                z, I, J, i, j, OF_I, OF_J, words,
                far, near, low, high, far_fn, near_fn, term, KEPT, TOGETHER, BY_I, BY_J,
                LABELS, SELVES,
            )  # fmt: skip
            if BY_SCALE is not None:
                by_scale += tl.sum(force * z, 1)
            inside = (i < I.count)[:, None] & (j < J.count)[None, :]
            tl.store(place(F, i, j), (force * scale).to(F.numbers.dtype.element_ty), mask=inside)
        else:
            z = product_of(X, Y, row, column, WIDTH, CHUNK, PRODUCT, ROWS, COLUMNS)
            parts = quarters(z)
            for k in tl.static_range(4):
                start = column + k * (COLUMNS // 4)
                force = force_from(
                    parts[k], I, J, i, start + tl.arange(0, COLUMNS // 4), OF_I, OF_J, words,
                    far, near, low, high, far_fn, near_fn, term, KEPT, TOGETHER, BY_I, BY_J,
                    LABELS, SELVES,
                )  # fmt: skip
                if BY_SCALE is not None:
                    by_scale += tl.sum(force * parts[k], 1)
                F.store([row, start], (force * scale).to(F.dtype))
        if BY_SCALE is not None:
            tl.store(BY_SCALE + q * I.count + i, by_scale, mask=i < I.count)


@triton.jit
def force_from(
    z, I, J, i, j, OF_I, OF_J, words, far, near, low, high,
    far_fn: tl.constexpr, near_fn: tl.constexpr, term: tl.constexpr,
    KEPT: tl.constexpr, TOGETHER: tl.constexpr, BY_I: tl.constexpr, BY_J: tl.constexpr,
    LABELS: tl.constexpr, SELVES: tl.constexpr,
):  # fmt: skip
    """(r, c) the forces on pairs with these products."""
    positive, negative = kinds(I, J, i, j, words, LABELS, SELVES, False)
    return force_on(
        z, positive, negative, OF_I, OF_J, I, J, i, j, far, near, low, high,
        far_fn, near_fn, term, False, KEPT, TOGETHER, BY_I, BY_J,
    )  # fmt: skip


@triton.jit
def multiply(
    A, B, OUT, r, c, depth, a_row, a_step, b_step, b_column, out_row,
    MORE: tl.constexpr, PRODUCT: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The matrix product (r, depth) @ (depth, c) of float32; `MORE`: added to what is there."""
    p, q = tile_of(tl.program_id(0), tl.cdiv(r, ROWS), tl.cdiv(c, COLUMNS))
    i, j = p * ROWS + tl.arange(0, ROWS), q * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, CHUNK)
    a = A + i.to(tl.int64)[:, None] * a_row + k.to(tl.int64)[None, :] * a_step
    b = B + k.to(tl.int64)[:, None] * b_step + j.to(tl.int64)[None, :] * b_column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, depth, CHUNK):
        left = (first + k) < depth
        some_a = tl.load(a, mask=(i < r)[:, None] & left[None, :], other=0.0)
        some_b = tl.load(b, mask=left[:, None] & (j < c)[None, :], other=0.0)
        total = dot(some_a, some_b, PRODUCT, total)
        a += CHUNK * a_step
        b += CHUNK * b_step
    out = OUT + i.to(tl.int64)[:, None] * out_row + j[None, :]
    inside = (i < r)[:, None] & (j < c)[None, :]
    if MORE:
        total += tl.load(out, mask=inside, other=0.0)
    tl.store(out, total, mask=inside)
