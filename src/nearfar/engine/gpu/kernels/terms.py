"""What a pair adds to a loss, and the derivatives, where operators alone cannot say it."""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus_and_slope(x):
    """log(1 + e^x), accurate near 0 too, and its derivative."""
    e = tl.exp2(-tl.abs(x) * _LOG2E)
    one = 1 + e
    # log(1 + e) from the rounded 1 + e; where that is 1, it is e.
    log = tl.where(one == 1, e, tl.log2(one) * _LN2 * (e / tl.where(one == 1, 1.0, one - 1)))
    slope = tl.where(x > 0, 1.0, e) / one
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log, slope


@triton.jit
def hinge(x):
    """max(0, x), and its derivative, 0 at 0."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL), tl.where(x > 0, 1.0, 0.0)


@triton.jit
def match(z, numbers):
    """A pair that matches, classified by a sigmoid: the loss, and its derivative."""
    loss, slope = softplus_and_slope(-z)
    return loss, -slope


@triton.jit
def no_match(z, numbers):
    """Likewise a pair that does not match."""
    return softplus_and_slope(z)


@triton.jit
def pick(z, top, rest):
    """A positive against its anchor's negatives: the loss, by their log-sum-exp, by z."""
    loss, wrong = softplus_and_slope((top - z) + rest)
    return loss, wrong, -wrong


@triton.jit
def pick_decoupled(z, top, rest):
    """The same without the positive in its denominator; 0 without negatives."""
    some = rest > float("-inf")
    one = tl.where(some, 1.0, 0.0) + tl.zeros_like(z)
    return tl.where(some, (top - z) + rest, 0.0), one, -one


@triton.jit
def lifted(d, i_top, i_rest, j_top, j_rest):
    """A positive pair against the negatives of both its ends: half the square of the excess."""
    of_i, of_j = i_top + i_rest, j_top + j_rest
    high = tl.maximum(of_i, of_j)
    base = tl.where(high == float("-inf"), 0.0, high)
    power = tl.exp2((of_i - base) * _LOG2E)
    total = power + tl.exp2((of_j - base) * _LOG2E)
    far = base + tl.log2(total) * _LN2
    excess = d + far
    excess = tl.maximum(excess, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return excess * excess / 2, excess * power / tl.where(total > 0, total, 1.0), excess
