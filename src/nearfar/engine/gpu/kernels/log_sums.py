"""Kernels for losses of log-sum-exps: collect the sums, the terms of positives, and the forces."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from nearfar.engine.gpu.kernels.tile import (
    any_of,
    each,
    kinds,
    loaded,
    measured,
    products,
    pulled,
    some,
    store_gradient,
)

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_NONE = tl.constexpr(float("-inf"))


class Sums(NamedTuple):
    """What is collected for each anchor, (splits, n) each; None: not wanted.

    Attributes:
        top, far: the sum of the exponentials of negatives is `far` times e^top.
        near_top, near: likewise for the positives; without a top of their own, relative to `top`.
        total: the sum of the positives.
    """

    top: Any
    far: Any
    near_top: Any
    near: Any
    total: Any


class Pulls(NamedTuple):
    """What is known of each anchor once its sums are complete, (n,) each; None: not needed.

    Attributes:
        top, rest: the log-sum-exp in two parts; the rest is -inf where nothing was summed.
        by_far: the derivative of the loss by it.
        near, by_near: the log-sum-exp of the positives, likewise.
        by_total: the derivative by each positive's closeness.
        weight: how much the anchor counts.
    """

    top: Any
    rest: Any
    by_far: Any
    near: Any
    by_near: Any
    by_total: Any
    weight: Any


@triton.jit
def exponent(z, function: tl.constexpr, numbers):
    """The exponent of a closeness, and its derivative. Without a function, the closeness itself."""
    if function is None:
        return z, 1.0
    else:
        return function(z, numbers)


@triton.jit
def running(top, total, e, included):
    """A running sum of exponentials, and its top: the largest exponent."""
    higher = tl.maximum(top, tl.max(tl.where(included, e, _NONE), 1))
    base = tl.where(higher == _NONE, 0.0, higher)
    terms = tl.where(included, tl.exp2((e - base[:, None]) * _LOG2E), 0.0)
    return higher, total * tl.exp2((top - base) * _LOG2E) + tl.sum(terms, 1)


@triton.jit
def products_or(
    Z, I, J, i, j, a, k,
    STORED: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """(r, c) inner products, from the strip `Z` if they are stored."""
    if STORED:
        return loaded(Z, I, J, i, j)
    else:
        return products(I, J, i, j, a, some(J, j, k, WIDTH), WIDTH, CHUNK, PRODUCT)


@triton.jit
def no_sums(ROWS: tl.constexpr):
    """The sums of anchors before the first pair, see `Sums`."""
    none = tl.full((ROWS,), _NONE, tl.float32)
    zero = tl.zeros((ROWS,), tl.float32)
    return none, zero, none, zero, zero


@triton.jit
def gathered(
    sums, OUT, z, positive, negative, far, near,
    far_fn: tl.constexpr, near_fn: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Running sums of the anchors I, with the pairs of one more tile.

    `TOGETHER`: exponentials of positives are relative to the top of all terms.
    """
    top, far_sum, near_top, near_sum, total = sums
    if OUT.total is not None:
        total += tl.sum(tl.where(positive, z, 0.0), 1)
    e, slope = exponent(z, far_fn, far)
    if TOGETHER:
        higher = tl.maximum(top, tl.max(tl.where(positive | negative, e, _NONE), 1))
        base = tl.where(higher == _NONE, 0.0, higher)
        terms = tl.exp2((e - base[:, None]) * _LOG2E)
        before = tl.exp2((top - base) * _LOG2E)
        far_sum = far_sum * before + tl.sum(tl.where(negative, terms, 0.0), 1)
        near_sum = near_sum * before + tl.sum(tl.where(positive, terms, 0.0), 1)
        top = higher
    else:
        top, far_sum = running(top, far_sum, e, negative)
        if OUT.near is not None:
            e, slope = exponent(z, near_fn, near)
            near_top, near_sum = running(near_top, near_sum, e, positive)
    return top, far_sum, near_top, near_sum, total


@triton.jit
def store_sums(OUT, sums, part, i, I):
    """Write the sums of the anchors `i` over a part of the other side."""
    top, far_sum, near_top, near_sum, total = sums
    at, inside = part * I.count + i, i < I.count
    tl.store(OUT.top + at, top, mask=inside)
    tl.store(OUT.far + at, far_sum, mask=inside)
    if OUT.near_top is not None:
        tl.store(OUT.near_top + at, near_top, mask=inside)
    if OUT.near is not None:
        tl.store(OUT.near + at, near_sum, mask=inside)
    if OUT.total is not None:
        tl.store(OUT.total + at, total, mask=inside)


@triton.jit
def collect(
    I, J, Z, OUT, d, words, split, far, near,
    far_fn: tl.constexpr, near_fn: tl.constexpr, TOGETHER: tl.constexpr, STORED: tl.constexpr,
    LABELS: tl.constexpr, SELVES: tl.constexpr, FLIPPED: tl.constexpr,
    MEASURE: tl.constexpr, CANCELS: tl.constexpr, PRODUCT: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sums of the anchors `I` over a part of `J`, `split` rows long; see `gathered`."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * split
    k = tl.arange(0, CHUNK)
    a = some(I, i, k, WIDTH)
    sums = no_sums(ROWS)
    for column in range(start, tl.minimum(start + split, J.count), COLUMNS):
        j = column + tl.arange(0, COLUMNS)
        z = products_or(Z, I, J, i, j, a, k, STORED, WIDTH, CHUNK, PRODUCT)
        positive, negative = kinds(I, J, i, j, words, LABELS, SELVES, FLIPPED)
        z, again = measured(z, positive | negative, I, J, i, j, d, MEASURE, CANCELS)
        sums = gathered(sums, OUT, z, positive, negative, far, near, far_fn, near_fn, TOGETHER)
    store_sums(OUT, sums, tl.program_id(1), i, I)


@triton.jit
def share(e, top, rest):
    """The exponential of `e`, as a share of the sum whose logarithm is top + rest."""
    return tl.exp2(((e - top) - rest) * _LOG2E)


@triton.jit
def two_shares(e, positive, i_top, i_rest, j_top, j_rest, i_far, j_far, i_near, j_near):
    """(r, c) the shares of both ends times their derivatives, of negatives or of positives.

    One exponential a pair serves both ends, unless their logarithms lie too far apart for that.
    """
    i_log, j_log = i_top + i_rest, j_top + j_rest
    i_some, j_some = i_log < -_NONE, j_log < -_NONE
    high = tl.maximum(
        tl.max(tl.where(i_some, i_log, _NONE), 0), tl.max(tl.where(j_some, j_log, _NONE), 0)
    )
    low = tl.minimum(
        tl.min(tl.where(i_some, i_log, -_NONE), 0), tl.min(tl.where(j_some, j_log, -_NONE), 0)
    )
    if high - low < 60:
        middle = tl.where(high < low, 0.0, high / 2 + low / 2)
        i_by, j_by = share(middle, i_top, i_rest), share(middle, j_top, j_rest)
        far = (i_by * i_far)[:, None] + (j_by * j_far)[None, :]
        near = (i_by * i_near)[:, None] + (j_by * j_near)[None, :]
        found = tl.exp2((e - middle) * _LOG2E) * tl.where(positive, near, far)
    else:
        of_i = share(e, i_top[:, None], i_rest[:, None])
        of_j = share(e, j_top[None, :], j_rest[None, :])
        found = of_i * tl.where(positive, i_near[:, None], i_far[:, None])
        found += of_j * tl.where(positive, j_near[None, :], j_far[None, :])
    return found


@triton.jit
def collect_terms(
    I, J, Z, OF_I, OF_J, LOSS, BY_FAR, INSIDE, d, words, split, low, high,
    term: tl.constexpr, BOTH_ENDS: tl.constexpr, KEPT: tl.constexpr, STORED: tl.constexpr,
    LABELS: tl.constexpr, SELVES: tl.constexpr,
    MEASURE: tl.constexpr, CANCELS: tl.constexpr, PRODUCT: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of each anchor's positives the sum of their terms and of their derivatives by the log."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * split
    k = tl.arange(0, CHUNK)
    a = some(I, i, k, WIDTH)
    i_top, i_rest = each(OF_I.top, i, I)[:, None], each(OF_I.rest, i, I)[:, None]
    i_weight = each(OF_I.weight, i, I)[:, None]
    loss_sum = tl.zeros((ROWS,), tl.float32)
    by_sum = tl.zeros((ROWS,), tl.float32)
    number = tl.zeros((ROWS,), tl.float32)
    for column in range(start, tl.minimum(start + split, J.count), COLUMNS):
        j = column + tl.arange(0, COLUMNS)
        positive, negative = kinds(I, J, i, j, words, LABELS, SELVES, False)
        if any_of(positive):
            z = products_or(Z, I, J, i, j, a, k, STORED, WIDTH, CHUNK, PRODUCT)
            z, again = measured(z, positive, I, J, i, j, d, MEASURE, CANCELS)
            if BOTH_ENDS:
                j_top, j_rest = each(OF_J.top, j, J)[None, :], each(OF_J.rest, j, J)[None, :]
                loss, by_log, _ = term(z, i_top, i_rest, j_top, j_rest)
                by_log = by_log * (i_weight + each(OF_J.weight, j, J)[None, :])
            else:
                loss, by_log, _ = term(z, i_top, i_rest)
                by_log = by_log * i_weight
            counted = positive
            if KEPT:
                counted = counted & ((loss <= low) | (loss >= high) == 0)
            loss_sum += tl.sum(tl.where(counted, loss, 0.0), 1)
            by_sum += tl.sum(tl.where(counted, by_log, 0.0), 1)
            number += tl.sum(counted.to(tl.float32), 1)
    at, inside = tl.program_id(1) * I.count + i, i < I.count
    tl.store(LOSS + at, loss_sum, mask=inside)
    tl.store(BY_FAR + at, by_sum, mask=inside)
    tl.store(INSIDE + at, number, mask=inside)


@triton.jit
def log_of(OF, i, side):
    """The log-sum-exps of rows in two parts, inf where nothing was summed: a share of it is 0."""
    rest = each(OF.rest, i, side)
    return each(OF.top, i, side), tl.where(rest == _NONE, -_NONE, rest)


@triton.jit
def force_of_term(
    z, positive, OF_I, OF_J, I, J, i, j, low, high,
    term: tl.constexpr, BOTH_ENDS: tl.constexpr, KEPT: tl.constexpr,
    BY_I: tl.constexpr, BY_J: tl.constexpr,
):  # fmt: skip
    """The derivatives by the closeness of positives of the terms of the anchors I, and of J."""
    force = tl.zeros_like(z)
    if BY_I:
        i_top, i_rest = each(OF_I.top, i, I)[:, None], each(OF_I.rest, i, I)[:, None]
        if BOTH_ENDS:
            j_top, j_rest = each(OF_J.top, j, J)[None, :], each(OF_J.rest, j, J)[None, :]
            loss, _, by_z = term(z, i_top, i_rest, j_top, j_rest)
        else:
            loss, _, by_z = term(z, i_top, i_rest)
        by_z = by_z * each(OF_I.weight, i, I)[:, None]
        if KEPT:
            by_z = tl.where((loss <= low) | (loss >= high), 0.0, by_z)
        force += by_z
    if BY_J:
        j_top, j_rest = each(OF_J.top, j, J)[None, :], each(OF_J.rest, j, J)[None, :]
        if BOTH_ENDS:
            i_top, i_rest = each(OF_I.top, i, I)[:, None], each(OF_I.rest, i, I)[:, None]
            loss, _, by_z = term(z, j_top, j_rest, i_top, i_rest)
        else:
            loss, _, by_z = term(z, j_top, j_rest)
        by_z = by_z * each(OF_J.weight, j, J)[None, :]
        if KEPT:
            by_z = tl.where((loss <= low) | (loss >= high), 0.0, by_z)
        force += by_z
    return force


@triton.jit
def force_on(
    z, positive, negative, OF_I, OF_J, I, J, i, j, far, near, low, high,
    far_fn: tl.constexpr, near_fn: tl.constexpr, term: tl.constexpr,
    BOTH_ENDS: tl.constexpr, KEPT: tl.constexpr, TOGETHER: tl.constexpr,
    BY_I: tl.constexpr, BY_J: tl.constexpr,
):  # fmt: skip
    """(r, c) the forces on the pairs of a tile of the anchors I, of J, or of both."""
    e, slope = exponent(z, far_fn, far)
    if BY_I and BY_J:
        i_top, i_rest = log_of(OF_I, i, I)
        j_top, j_rest = log_of(OF_J, j, J)
        i_far, j_far = each(OF_I.by_far, i, I), each(OF_J.by_far, j, J)
        i_near, j_near = i_far, j_far
        if TOGETHER:
            i_near, j_near = each(OF_I.by_near, i, I), each(OF_J.by_near, j, J)
        force = two_shares(e, positive, i_top, i_rest, j_top, j_rest, i_far, j_far, i_near, j_near)
    elif BY_I:
        top, rest = log_of(OF_I, i, I)
        by = each(OF_I.by_far, i, I)[:, None]
        if TOGETHER:
            by = tl.where(positive, each(OF_I.by_near, i, I)[:, None], by)
        force = share(e, top[:, None], rest[:, None]) * by
    else:
        top, rest = log_of(OF_J, j, J)
        by = each(OF_J.by_far, j, J)[None, :]
        if TOGETHER:
            by = tl.where(positive, each(OF_J.by_near, j, J)[None, :], by)
        force = share(e, top[None, :], rest[None, :]) * by
    force = force * slope
    if term is not None:
        pull = force_of_term(
            z, positive, OF_I, OF_J, I, J, i, j, low, high, term, BOTH_ENDS, KEPT, BY_I, BY_J
        )
    else:
        pull = tl.zeros_like(z)
        if TOGETHER:
            pull = force
        if near_fn is not None:
            e, slope = near_fn(z, near)
            if BY_I:
                pull += (
                    share(e, each(OF_I.near, i, I)[:, None], 0.0)
                    * slope
                    * each(OF_I.by_near, i, I)[:, None]
                )
            if BY_J:
                pull += (
                    share(e, each(OF_J.near, j, J)[None, :], 0.0)
                    * slope
                    * each(OF_J.by_near, j, J)[None, :]
                )
        else:
            if BY_I:
                pull += each(OF_I.by_total, i, I)[:, None]
            if BY_J:
                pull += each(OF_J.by_total, j, J)[None, :]
    return tl.where(negative, force, tl.where(positive, pull, 0.0))


@triton.jit
def pull(
    I, J, OF_I, OF_J, OUT, BY_SCALE, d, words, split, far, near, low, high,
    far_fn: tl.constexpr, near_fn: tl.constexpr, term: tl.constexpr,
    BOTH_ENDS: tl.constexpr, KEPT: tl.constexpr, TOGETHER: tl.constexpr,
    BY_I: tl.constexpr, BY_J: tl.constexpr,
    LABELS: tl.constexpr, SELVES: tl.constexpr, FLIPPED: tl.constexpr,
    MEASURE: tl.constexpr, CANCELS: tl.constexpr, PRODUCT: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of the rows `I`: CHUNK numbers of each, over a part of `J`.

    `BY_SCALE` takes the sums of forces times closeness, of which the gradient of a scale is made:
    the forces are not rounded there, and they cancel. None: it is not wanted.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * split
    first = tl.program_id(2) * CHUNK
    k = tl.arange(0, CHUNK)
    a = some(I, i, k, WIDTH)
    total = tl.zeros((ROWS, CHUNK), tl.float32)
    along = tl.zeros((ROWS,), tl.float32)
    by_scale = tl.zeros((ROWS,), tl.float32)
    for column in range(start, tl.minimum(start + split, J.count), COLUMNS):
        j = column + tl.arange(0, COLUMNS)
        b = some(J, j, first + k, WIDTH)
        z = products(I, J, i, j, a, b, WIDTH, CHUNK, PRODUCT)
        positive, negative = kinds(I, J, i, j, words, LABELS, SELVES, FLIPPED)
        z, again = measured(z, positive | negative, I, J, i, j, d, MEASURE, CANCELS)
        force = force_on(
            z, positive, negative, OF_I, OF_J, I, J, i, j, far, near, low, high,
            far_fn, near_fn, term, BOTH_ENDS, KEPT, TOGETHER, BY_I, BY_J,
        )  # fmt: skip
        if BY_SCALE is not None:
            by_scale += tl.sum(force * z, 1)
        total, along = pulled(
            total, along, force, z, again, b, I, J, i, j, d, first, CHUNK, MEASURE, PRODUCT
        )
    store_gradient(OUT, total, along, I, i, k, first, d, MEASURE)
    if BY_SCALE is not None:
        at = tl.program_id(1) * I.count + i
        tl.store(BY_SCALE + at, by_scale, mask=i < tl.where(first == 0, I.count, 0))
