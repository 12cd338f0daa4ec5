"""What the kernels do on one tile: who is similar to whom, how close they are, and the way back.

A program owns some rows i of one side and walks over the rows j of the other side, a tile at a
time. The owners are the rows of the comparison or, where it is `FLIPPED`, its columns.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from nearfar.engine.gpu.language import INTERPRETED

_UPCAST = tl.constexpr(INTERPRETED)
_LARGEST = tl.constexpr(3.4028234663852886e38)


class Side(NamedTuple):
    """The rows or the columns of a comparison.

    Attributes:
        operand: (count, WIDTH) rows as they are multiplied, 0 beyond their d numbers.
        exact: (count, d) the rows in float32; None: never measured again.
        squares: (count,) their squared lengths; None: not needed.
        labels: (count,) class ids or (count, words) int32, 32 labels a word; None: none.
        match: (count,) the column that is similar to a row; None: not listed so.
        own: (count,) the column that is the row itself; None: not listed so.
        down: by which the rows were multiplied, so that their squares are finite; None: 1.
        count: how many rows.
        first: the number of the first of them, where they are a part of a side.
    """

    operand: Any
    exact: Any
    squares: Any
    labels: Any
    match: Any
    own: Any
    down: Any
    count: Any
    first: Any = 0


class Strip(NamedTuple):
    """A number for each pair of some rows and all columns.

    Attributes:
        numbers: (rows, pitch) of which the first columns are used.
        pitch: how many numbers a row takes.
    """

    numbers: Any
    pitch: Any


@triton.jit
def dot(a, b, PRODUCT: tl.constexpr, total=None):
    """The matrix product, summed in float32; `PRODUCT` says how float32 is multiplied."""
    if _UPCAST:  # the interpreter multiplies bfloat16 wrongly
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRODUCT)


@triton.jit
def some(side, i, k, WIDTH: tl.constexpr):
    """(r, c) the numbers `k` of the rows `i` of a side; 0 beyond the last row."""
    at = i.to(tl.int64)[:, None] * WIDTH + k[None, :]
    return tl.load(side.operand + at, mask=(i < side.count)[:, None], other=0.0)


@triton.jit
def each(values, i, side):
    """(r,) what is known of each of the rows `i`."""
    return tl.load(values + i, mask=i < side.count, other=0)


@triton.constexpr_function
def steps(wide, chunk):
    """How many numbers of a row are multiplied at a time."""
    return min(chunk, 32) if wide else chunk


@triton.jit
def products(I, J, i, j, a, b, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PRODUCT: tl.constexpr):
    """(r, c) inner products. Rows of one chunk are given; others are loaded a few numbers a time.

    So are those of float32, which take several registers a number.
    """
    STEP: tl.constexpr = steps(I.operand.dtype.element_ty == tl.float32, CHUNK)
    if STEP == WIDTH:
        return dot(a, b.T, PRODUCT)
    else:
        total = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
        for start in range(0, WIDTH, STEP):
            k = start + tl.arange(0, STEP)
            total += dot(some(I, i, k, WIDTH), some(J, j, k, WIDTH).T, PRODUCT)
        return total


@triton.jit
def place(strip, i, j):
    """(r, c) where a strip holds the numbers of pairs."""
    return strip.numbers + i.to(tl.int64)[:, None] * strip.pitch + j[None, :]


@triton.jit
def loaded(strip, I, J, i, j):
    """(r, c) the numbers of pairs in a strip."""
    inside = (i < I.count)[:, None] & (j < J.count)[None, :]
    return tl.load(place(strip, i, j), mask=inside, other=0.0)


@triton.jit
def kinds(I, J, i, j, words, LABELS: tl.constexpr, SELVES: tl.constexpr, FLIPPED: tl.constexpr):
    """(r, c) bool: the similar pairs, and the dissimilar ones. A row and itself are neither."""
    i_number, j_number = (I.first + i)[:, None], (J.first + j)[None, :]
    if LABELS == "diagonal":
        same = i_number == j_number
    elif LABELS == "match":
        if FLIPPED:
            same = i_number == each(J.match, j, J)[None, :]
        else:
            same = each(I.match, i, I)[:, None] == j_number
    elif LABELS == "classes":
        same = each(I.labels, i, I)[:, None] == each(J.labels, j, J)[None, :]
    else:
        shared = tl.zeros((i.shape[0], j.shape[0]), tl.int32)
        for word in range(0, words):
            of_i = tl.load(I.labels + i * words + word, mask=i < I.count, other=0)
            of_j = tl.load(J.labels + j * words + word, mask=j < J.count, other=0)
            shared = shared | (of_i[:, None] & of_j[None, :])
        same = shared != 0
    compared = (i < I.count)[:, None] & (j < J.count)[None, :]
    if SELVES == "diagonal":
        compared = compared & (i_number != j_number)
    elif SELVES == "named":
        if FLIPPED:
            compared = compared & (i_number != each(J.own, j, J)[None, :])
        else:
            compared = compared & (each(I.own, i, I)[:, None] != j_number)
    return compared & same, compared & (same == 0)


@triton.jit
def measured(z, compared, I, J, i, j, d, MEASURE: tl.constexpr, CANCELS: tl.constexpr):
    """The closeness (r, c) from inner products `z`, and which pairs were measured again.

    Where digits cancel, a distance is taken from the differences of the rows. A tile without such
    a pair skips that.
    """
    if MEASURE == "product":
        return z, compared
    else:
        if MEASURE == "cosine":
            value = 1 - z
            again = compared & (value <= CANCELS)
        else:
            length = each(I.squares, i, I)[:, None] + each(J.squares, j, J)[None, :]
            value = length - 2 * z
            again = compared & (value <= CANCELS * length)
        if any_of(again):
            exact = tl.zeros_like(z)
            for k in range(0, d):
                gap = difference(I, J, i, j, k, d)
                exact += gap * gap
            if MEASURE == "cosine":
                exact = exact / 2
            value = tl.where(again, exact, value)
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if MEASURE == "euclidean":
            value = scaled_up(tl.sqrt(value), I)
        elif MEASURE != "cosine":
            value = scaled_up(scaled_up(value, I), I)
        if MEASURE == "halved":
            value = value / 2
        if MEASURE == "negated":
            value = -value
        return value, again


@triton.jit
def scaled_up(value, I):
    """A length of rows before they were scaled down, at most the largest number."""
    if I.down is not None:
        value = tl.minimum(value / tl.load(I.down), _LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return value


@triton.jit
def any_of(mask):
    """Whether any of a tile (r, c) is true."""
    return tl.max(tl.max(mask.to(tl.int32), 1), 0) > 0


@triton.jit
def difference(I, J, i, j, k, d):
    """(r, c) the differences of number `k` of the rows."""
    of_i = tl.load(I.exact + i.to(tl.int64) * d + k, mask=i < I.count, other=0.0)
    of_j = tl.load(J.exact + j.to(tl.int64) * d + k, mask=j < J.count, other=0.0)
    return of_i[:, None] - of_j[None, :]


@triton.jit
def pulled(
    total, along, force, z, again, b, I, J, i, j, d, first,
    CHUNK: tl.constexpr, MEASURE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Add the gradient of sum(force * z) by the rows `i`, their numbers from `first` on.

    It is `total` (r, CHUNK) plus `along` (r,) times the rows themselves.

    Args:
        force: (r, c), 0 for pairs that are not compared.
        z: (r, c) the closeness.
        again: (r, c) bool, which pairs were measured again.
        b: (c, CHUNK) the numbers of the rows `j`.
    """
    if MEASURE == "euclidean":
        force = tl.where(z > 0, force / tl.where(z > 0, z, 1.0), 0.0)
    elif MEASURE == "sqeuclidean":
        force = 2 * force
    elif MEASURE == "negated":
        force = -2 * force
    if I.down is not None:
        force = force / tl.load(I.down)
    if MEASURE == "product":
        total += summed(force, b, PRODUCT)
    else:
        if any_of(again):
            here = tl.arange(0, CHUNK)
            of_these = tl.where(again, force, 0.0)
            force = tl.where(again, 0.0, force)
            for k in range(0, CHUNK):
                if first + k < d:
                    pull = tl.sum(of_these * difference(I, J, i, j, first + k, d), 1)
                    total += tl.where((here == k)[None, :], pull[:, None], 0.0)
        total -= summed(force, b, PRODUCT)
        if MEASURE != "cosine":  # of unit rows, which lose what is along them on the way back
            along += tl.sum(force, 1)
    return total, along


@triton.jit
def summed(force, b, PRODUCT: tl.constexpr):
    """(r, CHUNK) the sums of the rows `j` times the forces (r, c)."""
    if b.dtype == tl.float16:
        # Scaled so that the largest force of a row is near 2^14, or small ones would become 0.
        largest = tl.maximum(tl.max(tl.abs(force), 1), 1e-30)
        scale = tl.exp2(14 - tl.ceil(tl.log2(largest)))[:, None]
        return dot((force * scale).to(tl.float16), b, PRODUCT) / scale
    else:
        return dot(force.to(b.dtype), b, PRODUCT)


@triton.jit
def store_gradient(OUT, total, along, I, i, k, first, d, MEASURE: tl.constexpr):
    """Write the gradient of the rows `i` of one part, see `pulled`."""
    at = i.to(tl.int64)[:, None] * d + (first + k)[None, :]
    inside = (i < I.count)[:, None] & (first + k < d)[None, :]
    if MEASURE != "product":
        total += along[:, None] * tl.load(I.exact + at, mask=inside, other=0.0)
    part = tl.program_id(1).to(tl.int64) * I.count * d
    tl.store(OUT + part + at, total, mask=inside)
