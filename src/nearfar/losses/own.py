"""User-defined losses: a rule in plain torch, over every pair of the batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor

from nearfar.distance import Distance, DistanceName
from nearfar.engine.anchor_sums import anchor_loss, gradients_of
from nearfar.engine.closeness import Closeness, Tile, by_distance
from nearfar.engine.graph import leaves
from nearfar.engine.meeting import Group, over_processes
from nearfar.engine.norms import DistanceFunction, OfFunction
from nearfar.engine.pair_sums import (
    MeanOver,
    PairKernel,
    PairSum,
    Pull,
    SomePairs,
    Term,
    over_list,
    pair_loss,
    shares,
)
from nearfar.engine.precision import Precision
from nearfar.engine.relation import Relation
from nearfar.engine.step import Answer, Executor, Request, run
from nearfar.engine.walk import Walk
from nearfar.inputs import ArrayLike, switch
from nearfar.listed import Pairs
from nearfar.losses.batch import as_batch, row_weight
from nearfar.losses.similarity import Similarity, by_similarity
from nearfar.reduction import Reduction
from nearfar.reference import ReferenceLike

# (n,) closeness, and the learned tensors -> (n,) losses, or these and their derivatives.
PairTerm = Callable[..., Tensor | tuple[Tensor, Tensor]]
# A tile, and the learned tensors -> (r,) losses, or these and how much each counts in the mean.
AnchorTerm = Callable[..., Tensor | tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PairRule:
    r"""A loss that is a sum over pairs, for `batch_loss`.

    .. math:: \sum_{(i,j)\ \text{similar}} f(d_{ij})
              + \sum_{(i,j)\ \text{dissimilar}} g(d_{ij})

    A term takes a tensor of distances or similarities, of any shape, and returns the loss of each.
    Autograd derives it, unless the term returns a pair: the losses and their derivatives. If
    `batch_loss` is given `learned` tensors, they follow the distances, and autograd derives both
    terms.

    Args:
        positive: f, the term of similar pairs.
        negative: g, the term of dissimilar pairs.
        balanced: if true, reduction="mean" is the mean over similar pairs plus the mean over
            dissimilar ones; if false, the mean over all pairs.
        kernel: the same terms as a GPU kernel runs them, several times as fast as in plain torch;
            see `PairKernel`. It is not used where there are learned tensors.
    """

    positive: PairTerm
    negative: PairTerm
    balanced: bool = True
    kernel: PairKernel | None = None


@dataclass(frozen=True)
class AnchorRule:
    r"""A loss that sees each anchor with all rows it is compared with, for `batch_loss`.

    Args:
        loss: takes a `Tile` of some anchors against all columns, and the `learned` tensors if there
            are any. It returns (r,) losses, one per anchor, or these and (r,) counts, numbers or
            bool. The mean is the sum of the losses divided by the sum of the counts. An anchor that
            has nothing to compare counts 0; its loss is then taken to be 0. Without counts, each
            anchor counts 1.
        force: takes the same, and returns the (r, m) derivatives of each anchor's loss with respect
            to its closeness to each column. None: autograd derives them, which takes longer. The
            learned tensors are left to autograd in any case.
    """

    loss: AnchorTerm
    force: Callable[..., Tensor] | None = None


Rule: TypeAlias = PairRule | AnchorRule | AnchorTerm


@over_processes
def batch_loss(
    rule: Rule,
    x: ArrayLike,
    labels: ArrayLike | None,
    *,
    distance: Distance | DistanceFunction | None = None,
    similarity: Similarity | None = None,
    normalize: bool = False,
    learned: Sequence[Tensor] = (),
    pairs: Pairs | None = None,
    weight: ArrayLike | None = None,
    reference: ReferenceLike | None = None,
    group: Group | None = None,
    precision: Precision | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""A loss of your own over every pair of the batch, exact and in memory linear in the batch.

    The rule is plain torch. It sees one block of the batch at a time, as a `Tile`: the distances or
    similarities of some anchors to all rows, and which pairs are similar. Everything else (blocks,
    gradients, reductions) works as in the losses of the library.

    Args:
        rule: a function of a tile, as the `loss` of an `AnchorRule`; an `AnchorRule`, which may
            also give its derivative; or a `PairRule`, for a loss that adds up over pairs.
        x: (n, d) embeddings, any floating dtype.
        labels: (n,) class ids, or (n, c) bool multi-labels; rows that share a label are similar.
            May be None with `pairs`.
        distance: "euclidean", "sqeuclidean", "cosine", "snr", "manhattan" or the p of a p-norm, if
            the rule takes distances; or a function of your own, of (r, d) anchors and (c, d) other
            rows, which returns (r, c) distances in plain torch. Autograd derives it, a tile at a
            time, so its derivative must be finite between equal rows: a row also meets itself.
        similarity: "inner_product", "cosine" or "sqeuclidean" (minus the squared Euclidean
            distance), if it takes similarities. Pass one of the two.
        normalize: scale all rows to length 1 first; "cosine" does in any case.
        learned: tensors of the rule, such as a learned margin, which get gradients. They are passed
            to the rule after the tile. The rule may use no other tensor that requires a gradient.
        pairs: the only pairs that count, as a miner found them, or as (similar, dissimilar), each
            (k, 2) indices of an anchor and of another row of the batch or the reference; None: all.
            A `PairRule` counts a pair as often as it is listed. In the tile of another rule, pairs
            that are not listed are neither positive nor negative.
        weight: (n,) how much each anchor counts, 0 or more.
        reference: a `Reference` to compare with instead of the batch itself.
        group: the processes that the batch is spread over: "world", a process group, a dimension of
            a DeviceMesh, or `nearfar.distributed.over(...)` of one; None: this one has all of it.
        precision: of matrix products, "float32", "tf32", "bfloat16" or "float16"; None: that of the
            context `nearfar.precision`, or its default.
        reduction: "mean" over the anchors, weighted by the counts that the rule returns (over the
            pairs for a `PairRule`), "active" over those whose loss is not 0, (low, high) over those
            between; "sum", or "none" for (n,) losses, one per anchor.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider.

    Raises:
        TypeError: labels that are not class ids or bool multi-labels; both or neither of distance
            and similarity; a rule that cannot be called; a rule or a distance that returns
            something other than tensors.
        ValueError: a shape, length, device or hyperparameter out of range; a rule or a distance
            that returns another shape than it should, or uses a tensor that requires a gradient
            and is not among `learned`.

    >>> def pull(tile):  # the mean distance to the positives
    ...     counts = tile.positive.sum(1)
    ...     return (tile.closeness * tile.positive).sum(1) / counts.clamp(min=1), counts > 0
    >>> x = torch.tensor([[0.0, 0], [0, 1], [3, 0]], requires_grad=True)
    >>> batch_loss(pull, x, [0, 0, 1], distance="euclidean")
    tensor(1., grad_fn=<_StepBackward>)
    >>> contrastive = PairRule(lambda d: d**2, lambda d: (2 - d).relu() ** 2)
    >>> batch_loss(contrastive, x.detach(), [0, 0, 1], distance="euclidean")
    tensor(1.)
    >>> def below_1(a, b):  # all far rows are about as far
    ...     return 1 - (-torch.cdist(a, b, p=1)).exp()
    >>> batch_loss(contrastive, x.detach(), [0, 0, 1], distance=below_1)
    tensor(1.4691)

    Source: the gradient of any contrastive loss is a weighted sum over pairs (Wang et al.,
    "Multi-Similarity Loss", CVPR 2019, section 3).
    """
    closeness = _closeness(distance, similarity)
    check_rule(rule)
    switch("normalize", normalize)
    _check_learned(learned)
    rows, columns, relation = as_batch(x, labels, reference, reduction, pairs, group)
    weights = row_weight(weight, rows)
    if isinstance(rule, PairRule):
        executor = partial(_pair_executor, rule, learned, closeness)
    else:
        given = rule if isinstance(rule, AnchorRule) else AnchorRule(rule)
        force = None if given.force is None else _checked_force(given.force)
        executor = partial(anchor_loss, _checked(given.loss), force, learned, closeness)
    return run(
        executor,
        rows,
        columns,
        relation,
        closeness=closeness,
        normalize=normalize or "cosine" in (distance, similarity),
        reduction=reduction,
        precision=precision,
        group=group,
        weight=weights,
        learned=learned,
    )


def with_rule(x: ArrayLike, labels: ArrayLike | None, *, rule: Rule, **settings: Any) -> Tensor:
    """`batch_loss` as the other losses are called: first the data, then all settings by name."""
    return batch_loss(rule, x, labels, **settings)


# Messages name what the caller knows.
with_rule.__name__ = with_rule.__qualname__ = batch_loss.__name__


def name_of(rule: object) -> str:
    """What to call a rule where it is shown."""
    if isinstance(rule, PairRule):
        return f"PairRule({name_of(rule.positive)}, {name_of(rule.negative)})"
    function = rule.loss if isinstance(rule, AnchorRule) else rule
    function = function.func if isinstance(function, partial) else function
    return str(getattr(function, "__name__", type(function).__name__))


def _closeness(
    distance: Distance | DistanceFunction | None, similarity: Similarity | None
) -> Closeness:
    """What the rule sees; a cosine wants unit rows."""
    if (distance is None) == (similarity is None):
        names = [", ".join(map(repr, get_args(of))) for of in (DistanceName, Similarity)]
        raise TypeError(
            f"batch_loss needs either distance ({names[0]}, a number p for the p-norm, or a "
            f"function) or similarity ({names[1]}); got distance={distance!r}, "
            f"similarity={similarity!r}."
        )
    if similarity is not None:
        return by_similarity(similarity)
    assert distance is not None
    if callable(distance):
        return OfFunction(_checked_distance(distance))
    return by_distance(distance)


def _checked_distance(function: DistanceFunction) -> DistanceFunction:
    """The function, with errors that say what it should have returned."""
    wanted = "distance must return one distance for each anchor and other row"

    def checked(a: Tensor, b: Tensor) -> Tensor:
        found = function(a, b)
        if not isinstance(found, Tensor):
            raise TypeError(f"{wanted}, as a tensor; got {_kind(found)}.")
        _check_shape(wanted, (a.shape[0], b.shape[0]), found)
        leaf = _unlisted(found, a, b)
        if leaf is not None:
            raise ValueError(
                f"distance uses a tensor of shape {tuple(leaf.shape)} that requires a gradient, "
                "and would leave it without one. Apply it to the embeddings before the loss, or "
                "detach() it."
            )
        return found.to(a.dtype)

    return checked


def check_rule(rule: object) -> None:
    """Refuse what is no rule."""
    if isinstance(rule, PairRule):
        for term in (rule.positive, rule.negative):
            if not callable(term):
                raise TypeError(
                    "the terms of a nearfar.PairRule must be functions of a tensor, such as "
                    "torch.square, or torch.zeros_like where pairs cost nothing; got "
                    f"{_kind(term)}."
                )
        if not isinstance(rule.kernel, PairKernel | None):
            raise TypeError(
                "the kernel of a nearfar.PairRule must be a nearfar.PairKernel of the same terms, "
                f"or None; got {_kind(rule.kernel)}."
            )
        return
    function = rule.loss if isinstance(rule, AnchorRule) else rule
    if not callable(function):
        raise TypeError(
            "rule must be a function of a tile, a nearfar.AnchorRule of one, or a "
            f"nearfar.PairRule; got {_kind(function)}."
        )


def _check_learned(learned: object) -> None:
    if not isinstance(learned, Sequence) or not all(isinstance(t, Tensor) for t in learned):
        raise TypeError(
            f"learned must be a sequence of tensors, such as (beta,); got {_kind(learned)}."
        )


def _checked(rule: AnchorTerm) -> Callable[..., tuple[Tensor, Tensor]]:
    """The rule, with counts, and with errors that say what it should have returned."""
    wanted = "the rule must return a tensor of losses, one per anchor, or two, losses and counts"

    def checked(tile: Tile, *learned: Tensor) -> tuple[Tensor, Tensor]:
        loss, counts = _one_or_two(rule(tile, *learned), wanted)
        found = (loss,) if counts is None else (loss, counts)
        hint = " Sum over the columns, or give one loss per pair as a nearfar.PairRule."
        _check_shape(wanted, tile.closeness.shape[:1], *found, hint=hint)
        _refuse_unlisted(loss, tile.closeness, *learned)
        return loss, torch.ones_like(loss, dtype=torch.bool) if counts is None else counts

    return checked


def _checked_force(force: Callable[..., Tensor]) -> Callable[..., Tensor]:
    wanted = "force must return one derivative for each distance or similarity of the tile"

    def checked(tile: Tile, *learned: Tensor) -> Tensor:
        found = force(tile, *learned)
        if not isinstance(found, Tensor):
            raise TypeError(f"{wanted}; got {_kind(found)}.")
        _check_shape(wanted, tile.closeness.shape, found)
        return found

    return checked


def _one_or_two(found: object, wanted: str) -> tuple[Tensor, Tensor | None]:
    """What a rule or term returned: losses, and what it may return beside them."""
    first, second = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(first, Tensor) or not isinstance(second, Tensor | None):
        raise TypeError(f"{wanted}; got {_kind(found)}.")
    return first, second


def _kind(found: object) -> str:
    """The type of a value; of a tuple, the types of its parts."""
    if isinstance(found, tuple):
        return f"({', '.join(map(_kind, found))})"
    return type(found).__name__


def _check_shape(wanted: str, shape: Sequence[int], *found: Tensor, hint: str = "") -> None:
    if any(tensor.shape != shape for tensor in found):
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in found)
        raise ValueError(f"{wanted}, of shape {tuple(shape)}; got {shapes}.{hint}")


def _refuse_unlisted(loss: Tensor, *listed: Tensor) -> None:
    """Refuse a rule whose losses depend on a tensor that would be left without its gradient."""
    leaf = _unlisted(loss, *listed)
    if leaf is not None:
        raise ValueError(
            f"the rule uses a tensor of shape {tuple(leaf.shape)} that requires a gradient, "
            "and would leave it without one. Pass it, or what is computed of it, as one of "
            "learned=(...), which the rule takes after the tile; or detach() it."
        )


def _unlisted(found: Tensor, *listed: Tensor) -> Tensor | None:
    """A tensor that requires a gradient and that another was computed of, if it is not listed."""
    others = (leaf for leaf in leaves(found) if not any(leaf is tensor for tensor in listed))
    return next(others, None)


def _pair_executor(
    rule: PairRule, learned: Sequence[Tensor], closeness: Closeness, relation: Relation
) -> Executor:
    """A sum over pairs; with learned tensors it runs anchor by anchor, derived by autograd."""
    over: MeanOver = "kinds" if rule.balanced else "pairs"
    if not learned:
        near, far = (_with_derivative(term) for term in (rule.positive, rule.negative))
        return pair_loss(PairSum(near, far, over, rule.kernel), closeness, relation)

    def execute(request: Request) -> Answer:
        fixed = [tensor.detach() for tensor in learned]
        near, far = (
            _with_derivative(partial(_called, term, fixed))
            for term in (rule.positive, rule.negative)
        )
        summed, kept = PairSum(near, far, over), request.kept
        if relation.listed is not None:
            terms = partial(_learned_terms, rule, learned)
            return over_list(summed, terms, closeness, relation, request)
        if kept is None:
            positive_weight, counts = shares(summed, relation, request)
        else:
            some = SomePairs(summed, [(lambda d, loss: kept.outside(loss),) * 2])
            positive_weight, counts = some.shares(Walk(request, closeness, relation, buffers=12))

        def loss(tile: Tile, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            near, far = (
                _of_each(term(tile.closeness, *tensors), tile.closeness)[0]
                for term in (rule.positive, rule.negative)
            )
            if kept is not None:
                near, far = (t.masked_fill(kept.outside(t.detach()), 0) for t in (near, far))
            per_row = (near * positive_weight).where(tile.positive, 0).sum(1)
            per_row = per_row + far.where(tile.negative, 0).sum(1)
            return per_row, torch.ones_like(per_row)

        by_anchors = anchor_loss(_checked(loss), None, learned, closeness, relation)
        return replace(by_anchors(replace(request, kept=None)), counts=counts)

    return execute


def _learned_terms(
    rule: PairRule, learned: Sequence[Tensor], near: Tensor, far: Tensor
) -> tuple[Tensor, Tensor, Pull]:
    """The losses of listed pairs, and what derives them and the learned tensors."""
    tensors = [t.detach().requires_grad_(t.requires_grad) for t in learned]
    ends = [d.detach().requires_grad_() for d in (near, far)]
    with torch.enable_grad():
        losses = [
            _of_each(term(d, *tensors), d)[0]
            for term, d in zip((rule.positive, rule.negative), ends, strict=True)
        ]
    for loss, d in zip(losses, ends, strict=True):
        _refuse_unlisted(loss, d, *tensors)

    def pull(of_near: Tensor, of_far: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
        wanted = [t for t in tensors if t.requires_grad]
        with torch.enable_grad():
            # A weight of 0 is a pair that does not count, whatever its derivative.
            total = (losses[0] * of_near).sum() + (losses[1] * of_far).sum()
        by_near, by_far, *found = gradients_of(total, [*ends, *wanted])
        each = iter(found)
        return by_near, by_far, [next(each) if t.requires_grad else None for t in tensors]

    return losses[0].detach(), losses[1].detach(), pull


def _called(term: PairTerm, learned: Sequence[Tensor], closeness: Tensor) -> Any:
    return term(closeness, *learned)


def _with_derivative(term: PairTerm) -> Term:
    """A term that returns losses and derivatives; autograd derives one that returns only losses."""
    gives_derivative = True

    def both(closeness: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal gives_derivative
        if gives_derivative:
            loss, force = _of_each(term(closeness), closeness)
            if force is not None:
                return _apart(loss, closeness), _apart(force, closeness, loss)
            gives_derivative = False
        leaf = closeness.detach().requires_grad_()
        with torch.enable_grad():
            loss, _ = _of_each(term(leaf), leaf)
        _refuse_unlisted(loss, leaf)
        if loss.requires_grad:
            (force,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
        else:
            force = torch.zeros_like(closeness)
        return _apart(loss.detach(), closeness), _apart(force, closeness)

    return both


_WANTED = (
    "a term of a PairRule must return the loss of each pair, or losses and derivatives, as tensors "
    "like the one it is given"
)


def _of_each(found: object, closeness: Tensor) -> tuple[Tensor, Tensor | None]:
    """The losses that a term returned, and their derivatives if it gives them."""
    loss, force = _one_or_two(found, _WANTED)
    if loss.shape != closeness.shape or (force is not None and force.shape != loss.shape):
        _check_shape(_WANTED, closeness.shape, *((loss,) if force is None else (loss, force)))
    return loss, force


def _apart(found: Tensor, *others: Tensor) -> Tensor:
    """What a term returned, in memory of its own, since the engine overwrites it."""
    if found.dtype is not others[0].dtype:
        return found.to(others[0].dtype)
    address = found.data_ptr()
    if 0 in found.stride() or any(address == other.data_ptr() for other in others):
        return found.clone()
    return found
