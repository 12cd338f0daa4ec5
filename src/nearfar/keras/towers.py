"""Losses of two towers, where row i of one matches row i of the other, in memory linear in them."""

from typing import Any

from keras import ops

from nearfar.keras.checks import above_zero, chunk_rows
from nearfar.keras.chunks import Rule, anchor_losses, matched
from nearfar.keras.reduction import Reduction, reduce
from nearfar.keras.rows import number, row_weight, towers, unit
from nearfar.keras.rules import classify_each, pick_one


def info_nce_loss(
    query: Any,
    positive: Any,
    *,
    temperature: Any = 0.07,
    normalize: bool = True,
    symmetric: bool = False,
    weight: Any = None,
    reduction: Reduction = "mean",
    chunk_size: int = 256,
) -> Any:
    r"""Pick the positive out of the other rows' positives: softmax cross-entropy over similarities.

    With :math:`s_{ij} = q_i \cdot p_j / \tau`,

    .. math:: \ell_i = -\log \frac{e^{s_{ii}}}{\sum_j e^{s_{ij}}}
                     = \log\Bigl(1 + \sum_{j \ne i} e^{s_{ij} - s_{ii}}\Bigr)

    computed in the second form, which stays accurate when the loss is near 0 and cannot saturate
    when it is large.

    Args:
        query: (n, d) embeddings, any floating dtype.
        positive: (n, d) embeddings; row i is the match of row i of `query` and of no other.
        temperature: tau, above 0; a tensor may be learned.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        symmetric: the mean of both directions: each positive also picks its query out of all.
        weight: (n,) how much each query counts, 0 or more.
        reduction: "mean" over the queries, "sum", or "none" for one loss per query.
        chunk_size: how many queries are compared at a time; changes only memory and time.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider. The loss of a single query is 0.

    Raises:
        TypeError: embeddings that are not floating point numbers.
        ValueError: a shape or setting out of range.

    >>> eye = [[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]
    >>> print(f"{float(info_nce_loss(eye, eye, temperature=0.5)):.4f}")
    0.2395

    Source: van den Oord, Li & Vinyals, "Representation Learning with Contrastive Predictive
    Coding", 2018.
    """
    rows, columns = towers(query=query, positive=positive)
    scale = 1 / above_zero("temperature", temperature)
    losses = _compared(
        pick_one, rows, columns, scale, normalize=normalize, both=symmetric, size=chunk_size
    )
    return _over_matches(losses, weight, reduction)


def clip_loss(
    x: Any,
    y: Any,
    *,
    scale: Any,
    normalize: bool = True,
    weight: Any = None,
    reduction: Reduction = "mean",
    chunk_size: int = 256,
) -> Any:
    r"""Match two towers in both directions: softmax over the rows and over the columns.

    With :math:`z_{ij} = t\, x_i \cdot y_j`,

    .. math:: L = \frac{1}{2n} \sum_i \Bigl( -\log \frac{e^{z_{ii}}}{\sum_j e^{z_{ij}}}
                - \log \frac{e^{z_{ii}}}{\sum_j e^{z_{ji}}} \Bigr)

    Args:
        x: (n, d) embeddings of the first tower, any floating dtype.
        y: (n, d) embeddings of the second; row i matches row i of `x` and no other.
        scale: t = 1 / temperature, above 0; a tensor may be learned. `LossLayer` learns it as the
            paper does.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        weight: (n,) how much each match counts, 0 or more.
        reduction: "mean" over the n matches, "sum", or "none" for one loss per match.
        chunk_size: how many rows are compared at a time; changes only memory and time.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider. The loss of a single match is 0.

    Raises:
        TypeError: embeddings that are not floating point numbers.
        ValueError: a shape or setting out of range.

    >>> eye = [[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]
    >>> print(f"{float(clip_loss(eye, eye, scale=2.0)):.4f}")
    0.2395

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language
    Supervision", ICML 2021, figure 3.
    """
    rows, columns = towers(x=x, y=y)
    scale = above_zero("scale", scale)
    losses = _compared(
        pick_one, rows, columns, scale, normalize=normalize, both=True, size=chunk_size
    )
    return _over_matches(losses, weight, reduction)


def siglip_loss(
    x: Any,
    y: Any,
    *,
    scale: Any,
    bias: Any,
    normalize: bool = True,
    weight: Any = None,
    reduction: Reduction = "mean",
    chunk_size: int = 256,
) -> Any:
    r"""The sigmoid loss of two towers: each pair is classified by itself as a match or not.

    With :math:`z_{ij} = t\, x_i \cdot y_j + b`,

    .. math:: L = -\frac{1}{n} \sum_i \Bigl( \log \sigma(z_{ii})
                + \sum_{j \ne i} \log \sigma(-z_{ij}) \Bigr)

    Args:
        x: (n, d) embeddings of the first tower, any floating dtype.
        y: (n, d) embeddings of the second; row i matches row i of `x` and no other.
        scale: t, above 0; a tensor may be learned, as the paper does from 10. `LossLayer` learns
            its logarithm, as the paper does.
        bias: b; a tensor may be learned, as the paper does from -10.
        normalize: scale all rows to length 1 first, so that inner products are cosines.
        weight: (n,) how much each row of `x` counts, 0 or more.
        reduction: "mean" over the n rows (each a sum over n pairs, as in the paper), "sum", or
            "none" for one loss per row.
        chunk_size: how many rows are compared at a time; changes only memory and time.

    Returns:
        A scalar, or (n,) with reduction="none"; float32 or wider.

    Raises:
        TypeError: embeddings that are not floating point numbers.
        ValueError: a shape or setting out of range.

    >>> eye = [[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]
    >>> print(f"{float(siglip_loss(eye, eye, scale=10.0, bias=-5.0)):.4f}")
    0.0201

    Source: Zhai, Mustafa, Kolesnikov & Beyer, "Sigmoid Loss for Language Image Pre-Training",
    ICCV 2023.
    """
    rows, columns = towers(x=x, y=y)
    scale = above_zero("scale", scale)
    losses = _compared(
        classify_each, rows, columns, scale, bias, normalize=normalize, size=chunk_size
    )
    return _over_matches(losses, weight, reduction)


def _compared(
    rule: Rule,
    rows: Any,
    columns: Any,
    scale: Any,
    bias: Any = None,
    *,
    normalize: bool,
    both: bool = False,
    size: int,
) -> Any:
    """(n,) losses of row i against all columns; with `both`, the mean with those of column i."""
    if normalize:
        rows, columns = unit(rows), unit(columns)
    scaled = rows * number(scale, like=rows)
    if bias is not None:  # as one more coordinate of each row, beside a 1 of each column
        one = ops.ones_like(rows[:, :1])
        scaled = ops.concatenate([scaled, one * number(bias, like=rows)], axis=1)
        columns = ops.concatenate([columns, one], axis=1)
    relation, size = matched(scaled), chunk_rows(size)
    there = anchor_losses(rule, scaled, columns, relation, size)
    return (there + anchor_losses(rule, columns, scaled, relation, size)) / 2 if both else there


def _over_matches(losses: Any, weight: Any, reduction: Reduction) -> Any:
    return reduce(losses, ops.ones_like(losses), row_weight(weight, losses), reduction)
