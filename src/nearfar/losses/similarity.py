"""What a loss of similarities compares rows by."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from nearfar.distance import unit
from nearfar.engine.closeness import Closeness, NegatedSquares, Product
from nearfar.engine.meeting import Group
from nearfar.engine.precision import Precision
from nearfar.engine.relation import Relation
from nearfar.engine.step import Executor, run
from nearfar.inputs import ArrayLike, lift, one_of, switch
from nearfar.losses.batch import row_weight
from nearfar.reduction import Reduction

# With rows at length 1, the inner product is the cosine.
Similarity = Literal["inner_product", "cosine", "sqeuclidean"]


def by_similarity(similarity: Similarity) -> Closeness:
    """The measure of a similarity; cosine wants unit rows.

    Raises:
        ValueError: an unknown similarity; the message lists the choices.
    """
    one_of("similarity", similarity, Similarity)
    return NegatedSquares() if similarity == "sqeuclidean" else Product()


def run_by_similarity(
    executor: Callable[[Closeness, Relation], Executor],
    rows: Tensor,
    columns: Tensor | None,
    relation: Relation,
    *,
    similarity: Similarity,
    normalize: bool,
    reduction: Reduction,
    precision: Precision | None,
    scale: float | Tensor | None = None,
    bias: float | Tensor | None = None,
    weight: ArrayLike | None = None,
    group: Group | None = None,
) -> Tensor:
    """Run the executor of a similarity times a scale; see `run`.

    Args:
        executor: what computes the loss, given the similarity and which pairs are similar.
        rows: (n, d).
        columns: (m, d); None: the rows themselves.
        relation: which pairs are similar.
        similarity: its name.
        normalize: whether rows are scaled to length 1; for "cosine" they always are.
        reduction: see `Reduction`.
        precision: see `run`.
        scale: above 0; None for 1.
        bias: what is added to each scaled similarity.
        weight: (n,) how much each row counts, not yet checked.
        group: see `run`.

    Raises:
        ValueError: an unknown similarity; the message lists the choices.
    """
    closeness = by_similarity(similarity)
    switch("normalize", normalize)
    normalize = normalize or similarity == "cosine"
    weights = row_weight(weight, rows)
    if similarity != "sqeuclidean":
        return run(
            partial(executor, closeness),
            rows,
            columns,
            relation,
            closeness=closeness,
            normalize=normalize,
            reduction=reduction,
            precision=precision,
            scale=scale,
            bias=bias,
            weight=weights,
            group=group,
        )
    # t |x - y|^2 is the squared distance of the rows times the root of t.
    by = scale.detach().reshape(()).sqrt() if isinstance(scale, Tensor) else (scale or 1.0) ** 0.5
    return run(
        partial(executor, closeness),
        _scaled("x", rows, normalize, by),
        None if columns is None else _scaled("reference.x", columns, normalize, by),
        relation,
        closeness=closeness,
        normalize=False,
        reduction=reduction,
        precision=precision,
        bias=bias,
        weight=weights,
        contained=scale,
        group=group,
    )


def _scaled(name: str, x: Tensor, normalize: bool, by: float | Tensor) -> Tensor:
    x = lift(name, x)
    by = by.to(x.dtype) if isinstance(by, Tensor) else by
    if normalize:
        return unit(x) * by
    # What cannot be held is the largest number: NaN stands for rows that are not finite.
    most = torch.finfo(x.dtype).max
    return (x * by).clamp(-most, most) + 0 * x
