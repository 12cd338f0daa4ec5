"""Losses of one's own: a rule in plain torch, over every pair of the batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from nearfar.distance import Distance
from nearfar.engine.anchor_sums import anchor_loss
from nearfar.engine.closeness import Closeness, Product, Tile, by_distance
from nearfar.engine.pair_sums import PairSum, Term, pair_loss
from nearfar.engine.relation import Relation
from nearfar.engine.step import Answer, Executor, Request, run
from nearfar.inputs import ArrayLike, tracing
from nearfar.losses.batch import as_batch, one_of, row_weight
from nearfar.reduction import Reduction
from nearfar.reference import Reference

Similarity = Literal["cosine", "inner_product"]

# Of (n,) closeness, and the learned tensors -> (n,) losses, or these and their derivatives.
PairTerm = Callable[..., Tensor | tuple[Tensor, Tensor]]
# Of a tile, and the learned tensors -> (r,) losses, or these and how much each counts in the mean.
AnchorTerm = Callable[..., Tensor | tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PairRule:
    r"""A loss that adds up over pairs, for `batch_loss`.

    .. math:: \sum_{(i,j)\ \text{similar}} f(d_{ij})
              + \sum_{(i,j)\ \text{dissimilar}} g(d_{ij})

    A term takes a tensor of distances or similarities, of any shape, and returns one loss for each,
    as a new tensor. Its derivative is left to autograd, unless the term returns a pair: the losses
    and their derivatives. If `batch_loss` is given `learned` tensors, they follow the distances.

    Args:
        positive: f, the term of similar pairs.
        negative: g, the term of dissimilar pairs.
        balanced: whether reduction="mean" is the mean over similar pairs plus the mean over
            dissimilar ones, or the mean over all pairs.
    """

    positive: PairTerm
    negative: PairTerm
    balanced: bool = True


@dataclass(frozen=True)
class AnchorRule:
    r"""A loss of each anchor and everyone it is compared with, for `batch_loss`.

    Args:
        loss: takes a `Tile` of some anchors against all columns, and the `learned` tensors if there
            are any. It returns (r,) losses, one per anchor, or these and (r,) numbers: how much
            each anchor counts in the mean, 0 for one that has nothing to compare.
        force: takes the same, and returns (r, m) derivatives of each anchor's loss by its closeness
            to everyone. None: autograd derives them, which takes longer.
    """

    loss: AnchorTerm
    force: Callable[..., Tensor] | None = None


def batch_loss(
    rule: PairRule | AnchorRule | AnchorTerm,
    x: ArrayLike,
    labels: ArrayLike,
    *,
    distance: Distance | None = None,
    similarity: Similarity | None = None,
    learned: Sequence[Tensor] = (),
    weight: ArrayLike | None = None,
    reference: Reference | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""A loss of your own over every pair of the batch, exact and in memory linear in the batch.

    The rule is plain torch. It sees a block of the batch at a time, as a `Tile`: the anchors'
    distances or similarities to everyone, and who is similar to whom. All the rest, the blocks,
    the gradient of the rows, the reductions, works as in the losses of the library.

    Args:
        rule: a function of a tile, which returns one loss per anchor; an `AnchorRule`, which may
            also give its derivative; or a `PairRule`, for a loss that adds up over pairs.
        x: (n, d) embeddings, any floating dtype.
        labels: (n,) class ids, or (n, c) bool multi-labels, where sharing one makes a pair similar.
        distance: "euclidean", "sqeuclidean" or "cosine", or
        similarity: "cosine" or "inner_product": what the rule sees. One of the two is needed.
        learned: tensors of the rule, such as a learned margin, which get gradients. They are passed
            to the rule after the tile.
        weight: (n,) how much each anchor counts, 0 or more.
        reference: a `Reference` to compare with instead of the batch itself.
        reduction: "mean" over the anchors, weighted by the counts that the rule returns (for a
            `PairRule` over the pairs); "sum", or "none" for (n,) losses, one per anchor.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels; both or neither of distance
            and similarity; a rule that returns something else than tensors.
        ValueError: a shape, length, device or hyperparameter out of range, or a rule that returns
            another shape than one loss per anchor.

    >>> def pull(tile):  # the mean distance to the positives
    ...     counts = tile.positive.sum(1)
    ...     return (tile.closeness * tile.positive).sum(1) / counts.clamp(min=1), counts > 0
    >>> x = torch.tensor([[0.0, 0], [0, 1], [3, 0]], requires_grad=True)
    >>> batch_loss(pull, x, [0, 0, 1], distance="euclidean")
    tensor(1., grad_fn=<_StepBackward>)
    >>> contrastive = PairRule(lambda d: d**2, lambda d: (2 - d).relu() ** 2)
    >>> batch_loss(contrastive, x.detach(), [0, 0, 1], distance="euclidean")
    tensor(1.)

    Source: the gradient of any contrastive loss is a weighted sum over pairs (Wang et al.,
    "Multi-Similarity Loss", CVPR 2019, section 3).
    """
    closeness, normalize = _closeness(distance, similarity)
    _check_learned(learned)
    rows, columns, relation = as_batch(x, labels, reference, reduction)
    weights = row_weight(weight, rows)
    if isinstance(rule, PairRule):
        executor = _pair_executor(rule, learned, closeness, relation, weights, reduction)
    else:
        given = rule if isinstance(rule, AnchorRule) else AnchorRule(rule)
        executor = anchor_loss(_checked(given.loss), given.force, learned, closeness, relation)
    return run(
        executor,
        rows,
        columns,
        normalize=normalize,
        reduction=reduction,
        weight=weights,
        learned=learned,
    )


def _closeness(distance: Distance | None, similarity: Similarity | None) -> tuple[Closeness, bool]:
    """What the rule sees, and whether rows are scaled to length 1 for it."""
    if (distance is None) == (similarity is None):
        raise TypeError(
            'batch_loss needs either distance ("euclidean", "sqeuclidean" or "cosine") or '
            f'similarity ("cosine" or "inner_product"); got distance={distance!r}, '
            f"similarity={similarity!r}."
        )
    if distance is not None:
        return by_distance(distance), distance == "cosine"
    one_of("similarity", similarity, Similarity)
    return Product(), similarity == "cosine"


def _check_learned(learned: object) -> None:
    if not isinstance(learned, Sequence) or not all(isinstance(t, Tensor) for t in learned):
        raise TypeError(f"learned must be a sequence of tensors, such as (beta,); got {learned!r}.")


def _checked(rule: AnchorTerm) -> Callable[..., tuple[Tensor, Tensor]]:
    """The rule, with counts, and with errors that say what it should have returned."""

    def checked(tile: Tile, *learned: Tensor) -> tuple[Tensor, Tensor]:
        found = rule(tile, *learned)
        loss, counts = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
        anchors = tile.closeness.shape[:1]
        if counts is None and isinstance(loss, Tensor):
            counts = torch.ones_like(loss, dtype=torch.bool)
        if not isinstance(loss, Tensor) or not isinstance(counts, Tensor):
            raise TypeError(
                "the rule must return a tensor of losses, one per anchor, or two tensors, losses "
                f"and counts; got {found!r}."
            )
        if loss.shape != anchors or counts.shape != anchors:
            raise ValueError(
                f"the rule must return one loss, and one count, for each of its {anchors[0]} "
                f"anchors, of shape ({anchors[0]},); got {tuple(loss.shape)} and "
                f"{tuple(counts.shape)}. Sum over the columns, or give one loss per pair as a "
                "nearfar.PairRule."
            )
        return loss, counts

    return checked


def _pair_executor(
    rule: PairRule,
    learned: Sequence[Tensor],
    closeness: Closeness,
    relation: Relation,
    weight: Tensor | None,
    reduction: Reduction,
) -> Executor:
    """A sum over pairs; with learned tensors, anchor by anchor and by autograd."""
    positive_weight, counts = mean_over_pairs(rule, relation, weight, reduction)
    if not learned:
        near, far = (_with_derivative(term) for term in (rule.positive, rule.negative))
        return pair_loss(PairSum(near, far, positive_weight, counts), closeness, relation)

    def loss(tile: Tile, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        near, far = (
            _losses(term(tile.closeness, *tensors)) for term in (rule.positive, rule.negative)
        )
        per_row = (near * positive_weight).where(tile.positive, 0).sum(1)
        per_row = per_row + far.where(tile.negative, 0).sum(1)
        return per_row, torch.ones_like(per_row)

    by_anchors = anchor_loss(loss, None, learned, closeness, relation)

    def execute(request: Request) -> Answer:
        return replace(by_anchors(request), counts=counts)

    return execute


def mean_over_pairs(
    rule: PairRule, relation: Relation, weight: Tensor | None, reduction: Reduction
) -> tuple[Tensor | float, Tensor | None]:
    """How much a positive pair counts beside a negative one, and how many pairs each row has."""
    if reduction != "mean":
        return 1.0, None
    positives, negatives = relation.n_positives(), relation.n_negatives()
    if not rule.balanced:
        return 1.0, positives + negatives
    near, far = (n.sum() if weight is None else (n * weight).sum() for n in (positives, negatives))
    if positives.is_cpu and not tracing():  # elsewhere, reading a number would stall the device
        return (far.item() or 1.0) / (near.item() or 1.0), negatives
    return torch.where(far > 0, far, 1) / torch.where(near > 0, near, 1), negatives


def _with_derivative(term: PairTerm) -> Term:
    """A term that returns losses and derivatives, by autograd where it does not itself."""
    its_own = True

    def both(closeness: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal its_own
        found = term(closeness) if its_own else None
        if isinstance(found, tuple):
            loss, force = found
            return _apart(loss, closeness), _apart(force, closeness)
        its_own = False
        leaf = closeness.detach().requires_grad_()
        with torch.enable_grad():
            loss = _losses(term(leaf))
            (force,) = torch.autograd.grad(loss.sum(), leaf, materialize_grads=True)
        return _apart(loss.detach(), closeness), force

    return both


def _apart(found: Tensor, closeness: Tensor) -> Tensor:
    """What a term returned, in memory of its own: the engine overwrites it."""
    return found.clone() if found.data_ptr() == closeness.data_ptr() else found


def _losses(found: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return found[0] if isinstance(found, tuple) else found
