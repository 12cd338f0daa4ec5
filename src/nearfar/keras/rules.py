"""The losses of rows against all columns, and their forces; see `nearfar.keras.chunks`."""

from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

from keras import ops


class LogSum(NamedTuple):
    """The logarithm of a sum of exponentials, as `most + log(total)`, (c, 1) each.

    Attributes:
        most: the largest exponent, 0 where there is none.
        total: the sum of e^(z - most), 0 where there is nothing to sum.
        share: (c, m) how much each exponential contributes; they add up to 1, or are all 0.
    """

    most: Any
    total: Any
    share: Any

    @classmethod
    def of(cls, z: Any, mask: Any) -> "LogSum":
        z = ops.where(mask, z, -inf)
        most = ops.max(z, axis=1, keepdims=True)
        most = ops.where(most == -inf, 0.0, most)
        each = ops.exp(z - most)
        total = ops.sum(each, axis=1, keepdims=True)
        return cls(most, total, each / ops.where(total == 0, 1.0, total))

    def minus(self, z: Any) -> Any:
        """log(total) + most - z; large exponents that are close lose no digits. -inf for no sum."""
        return (self.most - z) + ops.log(self.total)


def pick_one(z: Any, positive: Any, negative: Any) -> tuple[Any, Callable[[], Any]]:
    """log(1 + sum_n e^(z_n - z_p)), for one positive per row."""
    negatives = LogSum.of(z, negative)
    gap = negatives.minus(ops.sum(ops.where(positive, z, 0.0), axis=1, keepdims=True))

    def forces() -> Any:
        wrong = ops.sigmoid(gap)
        return ops.where(positive, -wrong, wrong * negatives.share)

    return ops.softplus(gap)[:, 0], forces


def pick_all(z: Any, positive: Any, negative: Any) -> tuple[Any, Callable[[], Any]]:
    """The mean over p of log(sum e^z) - z_p, where the sum includes all positives."""
    logs = LogSum.of(z, ops.logical_or(positive, negative))
    count = ops.sum(ops.cast(positive, z.dtype), axis=1, keepdims=True)
    divisor = ops.where(count > 0, count, 1.0)
    loss = ops.sum(ops.where(positive, logs.minus(z), 0.0) / divisor, axis=1)

    def forces() -> Any:
        pushes = ops.where(count > 0, logs.share, 0.0)
        return pushes - ops.cast(positive, z.dtype) / divisor

    return loss, forces


def pick_each(z: Any, positive: Any, negative: Any) -> tuple[Any, Callable[[], Any]]:
    """The sum over p of log(1 + sum_n e^(z_n - z_p))."""
    negatives = LogSum.of(z, negative)
    gap = negatives.minus(z)
    loss = ops.sum(ops.where(positive, ops.softplus(gap), 0.0), axis=1)

    def forces() -> Any:
        wrong = ops.where(positive, ops.sigmoid(gap), 0.0)
        return ops.sum(wrong, axis=1, keepdims=True) * negatives.share - wrong

    return loss, forces


def classify_each(z: Any, positive: Any, negative: Any) -> tuple[Any, Callable[[], Any]]:
    """Each pair by itself: log(1 + e^-z) for a positive, log(1 + e^z) for a negative."""
    signed = ops.where(positive, -z, z)
    loss = ops.sum(ops.softplus(signed), axis=1)

    def forces() -> Any:
        wrong = ops.sigmoid(signed)
        return ops.where(positive, -wrong, wrong)

    return loss, forces
