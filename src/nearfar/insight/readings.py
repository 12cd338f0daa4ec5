"""What happens to each row, in words."""

from math import exp, inf, isnan

import torch

from nearfar.insight.observation import Observation


def way(force: float) -> str:
    """A force in words: "pull 0.5", "push 0.5" or "none"."""
    if not force:
        return "none"
    return f"{'pull' if force > 0 else 'push'} {abs(force):.3g}"


def labels(seen: Observation) -> list[str | None]:
    """Whether each pair is similar; None for tuples, whose roles imply it."""
    pair = seen.measured.get("pair")
    if pair is None or pair.similar is None:
        return [None] * len(seen.per_row)
    if pair.similar.dtype is torch.bool:
        return ["similar" if similar else "dissimilar" for similar in pair.similar.tolist()]
    return [f"{degree:.3g} similar" for degree in pair.similar.tolist()]


def readings(seen: Observation) -> list[str]:
    """What happens to each row, in words."""
    losses = seen.per_row.tolist()
    if "pair" in seen.measured:
        pair = seen.measured["pair"]
        assert pair.similar is not None
        degrees, forces = pair.similar.double().tolist(), seen.forces["pair"].tolist()
        of_pairs = zip(pair.values.tolist(), degrees, forces, losses, strict=True)
        return [_read_pair(*row) for row in of_pairs]
    near, far = seen.measured["positive"], seen.measured["negative"]
    if near.closeness == "distance":
        second = seen.measured.get("second negative", far).values.tolist()
        of_tuples = zip(near.values.tolist(), far.values.tolist(), second, losses, strict=True)
        return [_read_tuple(*row) for row in of_tuples]
    others = far.values
    if not others.shape[1]:
        return ["no negatives: nothing to compare" for _ in losses]
    nearest = others.max(1)
    of_softmax = zip(
        near.values.tolist(), nearest.values.tolist(), nearest.indices.tolist(), losses, strict=True
    )
    what = "class" if near.closeness == "logit" else "negative"
    return [_read_softmax(what, *row) for row in of_softmax]


def _read_pair(d: float, degree: float, force: float, loss: float) -> str:
    if isnan(loss):
        return "not a number: an embedding is NaN or infinite"
    if d == 0:
        if degree == 1:
            return "identical: nothing to pull"
        return "identical but dissimilar: no direction to push in" if loss else "identical"
    if degree == 1:
        return "similar but apart: pulled together" if force else "similar and near: no penalty"
    if degree == 0:
        return "too close: pushed apart" if force else "far enough apart: no penalty"
    if not force:
        return "as far apart as its degree requires: at rest"
    return "too far for its degree: pulled" if force > 0 else "too close for its degree: pushed"


def _read_tuple(near: float, far: float, second: float, loss: float) -> str:
    if isnan(loss):
        return "not a number: an embedding is NaN or infinite"
    if loss == 0:
        return "negative far enough away: no penalty"
    if far <= near:
        return "negative nearer than the positive: wrong order"
    if second <= near:
        return "two negatives nearer to each other than the positive pair"
    return "right order, but within the margin"


def _read_softmax(what: str, near: float, far: float, nearest: int, loss: float) -> str:
    if isnan(loss):
        return "not a number: an embedding is NaN or infinite"
    if far == -inf:
        return "no negatives: nothing to compare"
    if far > near:
        return f"{what} {nearest} is closer: wrong one picked (p = {exp(-loss):.3g})"
    if far == near:
        return f"{what} {nearest} is equally close (p = {exp(-loss):.3g})"
    return f"right one picked (p = {exp(-loss):.3g})"


def read_force(similar: bool, force: float) -> str:
    """What a force in a whole batch does."""
    if similar:
        return (
            "similar but apart: pulled together" if force > 0 else "close enough: pushed slightly"
        )
    return "too close: pushed apart" if force < 0 else "dissimilar: pulled"
