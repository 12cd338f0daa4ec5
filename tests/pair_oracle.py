"""Losses over listed pairs by definition, term by term; imports nothing from the library.

A term is a loss, the anchor it belongs to, and its kind: a mean is taken over each kind, and the
means are added.
"""

from collections.abc import Callable, Sequence
from math import inf

import torch
from torch import Tensor

Pair = tuple[int, int]
Term = tuple[Tensor, int, str]
# Rows, columns, similar pairs, dissimilar pairs -> terms.
Terms = Callable[[Tensor, Tensor, Sequence[Pair], Sequence[Pair]], list[Term]]


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum().sqrt()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / (a.norm() * b.norm())


def contrastive(a: Tensor, b: Tensor, near: Sequence[Pair], far: Sequence[Pair]) -> list[Term]:
    found = [(_distance(a[i], b[j]) ** 2, i, "similar") for i, j in near]
    return found + [((1 - _distance(a[i], b[j])).relu() ** 2, i, "dissimilar") for i, j in far]


def hard_contrastive(a: Tensor, b: Tensor, near: Sequence[Pair], far: Sequence[Pair]) -> list[Term]:
    nearest = min((_distance(a[i], b[j]).item() for i, j in far), default=inf)
    farthest = max((_distance(a[i], b[j]).item() for i, j in near), default=-inf)
    near = [(i, j) for i, j in near if _distance(a[i], b[j]).item() > nearest]
    far = [(i, j) for i, j in far if _distance(a[i], b[j]).item() < farthest]
    return contrastive(a, b, near, far)


def cosine(a: Tensor, b: Tensor, near: Sequence[Pair], far: Sequence[Pair]) -> list[Term]:
    found = [(1 - _cosine(a[i], b[j]), i, "similar") for i, j in near]
    return found + [(_cosine(a[i], b[j]).relu(), i, "dissimilar") for i, j in far]


def of_anchors(
    loss: Callable[[Tensor, Tensor], Tensor | None], closeness: Callable[[Tensor, Tensor], Tensor]
) -> Terms:
    """A loss of each anchor's closeness to its positives and negatives; None: it does not count."""

    def terms(a: Tensor, b: Tensor, near: Sequence[Pair], far: Sequence[Pair]) -> list[Term]:
        found: list[Term] = []
        for i in range(len(a)):
            ends = ([closeness(a[i], b[j]) for k, j in pairs if k == i] for pairs in (near, far))
            to_near, to_far = (torch.stack(d) if d else a.new_zeros(0) for d in ends)
            value = loss(to_near, to_far)
            if value is not None:
                found.append((value, i, "anchor"))
        return found

    return terms


def nt_xent(a: Tensor, b: Tensor, near: Sequence[Pair], far: Sequence[Pair]) -> list[Term]:
    found: list[Term] = []
    for i, p in near:
        z = [_cosine(a[i], b[j]) / 0.5 for k, j in far if k == i]
        positive = _cosine(a[i], b[p]) / 0.5
        found.append((torch.stack([positive, *z]).logsumexp(0) - positive, i, "pair"))
    return found


def lifted_pair(a: Tensor, b: Tensor, near: Sequence[Pair], far: Sequence[Pair]) -> list[Term]:
    found: list[Term] = []
    for i, p in near:
        push = [1 - _distance(a[k], b[j]) for end in (i, p) for k, j in far if k == end]
        if push:
            excess = (_distance(a[i], b[p]) + torch.stack(push).logsumexp(0)).relu()
            found.append((excess**2 / 2, i, "pair"))
        else:
            found.append((a.new_zeros(()) + 0 * a.sum(), i, "pair"))
    return found


def _sup_con(near: Tensor, far: Tensor) -> Tensor | None:
    if not len(near):
        return None
    near, far = near / 0.1, far / 0.1
    return torch.cat([near, far]).logsumexp(0) - near.mean()


def _decoupled(near: Tensor, far: Tensor) -> Tensor | None:
    if not (len(near) and len(far)):
        return None
    return (far / 0.1).logsumexp(0) - (near / 0.1).mean()


def _multi_similarity(near: Tensor, far: Tensor) -> Tensor | None:
    if not len(near) + len(far):
        return None
    pull = (1 + (-2 * (near - 0.5)).exp().sum()).log() / 2
    return pull + (1 + (50 * (far - 0.5)).exp().sum()).log() / 50


def _circle(near: Tensor, far: Tensor) -> Tensor | None:
    if not (len(near) and len(far)):
        return None
    push = (far.detach() + 0.25).relu() * 2 * (far - 0.25)
    pull = -(1.25 - near.detach()).relu() * 2 * (near - 0.75)
    return torch.nn.functional.softplus(push.logsumexp(0) + pull.logsumexp(0))


def _lifted(near: Tensor, far: Tensor) -> Tensor | None:
    if not (len(near) and len(far)):
        return None
    return (near.logsumexp(0) + (1 - far).logsumexp(0)).relu()


def _nca(near: Tensor, far: Tensor) -> Tensor | None:
    if not len(near):
        return None
    return torch.cat([near, far]).logsumexp(0) - near.logsumexp(0)


def _negated_square(a: Tensor, b: Tensor) -> Tensor:
    return -2 * (a / a.norm() - b / b.norm()).square().sum()


nca = of_anchors(_nca, _negated_square)
sup_con = of_anchors(_sup_con, _cosine)
decoupled_sup_con = of_anchors(_decoupled, _cosine)
multi_similarity = of_anchors(_multi_similarity, _cosine)
circle = of_anchors(_circle, _cosine)
lifted = of_anchors(_lifted, _distance)


def reduced(
    terms: list[Term], reduction: object, n: int, weight: Sequence[float] | None = None
) -> Tensor:
    """The terms as a mean, a mean over some of them, a sum, or (n,) sums."""
    w = [1.0] * n if weight is None else list(map(float, weight))
    zero = torch.zeros((), dtype=torch.float64)
    if reduction == "none":
        rows = [[t * w[i] for t, i, _ in terms if i == row] for row in range(n)]
        return torch.stack([sum(row, zero) for row in rows])
    if reduction == "sum":
        return sum((t * w[i] for t, i, _ in terms), zero)
    low, high = {"mean": (-inf, inf), "active": (0, inf)}.get(reduction, reduction)  # type: ignore
    kept = [(t, i, kind) for t, i, kind in terms if low < t.item() < high]
    total = zero
    for kind in sorted({kind for *_, kind in kept}):
        of_kind = [(t * w[i], w[i]) for t, i, other in kept if other == kind]
        whole = sum(share for _, share in of_kind)
        total = total + sum((t for t, _ in of_kind), zero) / (whole or 1)
    return total
