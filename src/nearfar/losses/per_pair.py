"""The losses of listed pairs or triplets, one by one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nearfar.inputs import ArrayLike, tensor
from nearfar.listed import listed_triplets
from nearfar.losses.base import error_of_all, unwrap
from nearfar.losses.batch import row_weight
from nearfar.losses.listed import Listed, as_listed
from nearfar.reduction import EACH_PAIR


@dataclass(frozen=True, eq=False)
class PairLosses:
    """The loss of each listed pair, in the order of the list.

    Attributes:
        positive: (p,) of the similar pairs.
        negative: (q,) of the dissimilar ones; empty where only positives have a loss of their own.
    """

    positive: Tensor
    negative: Tensor


def per_pair(
    loss: Callable[..., Tensor], *data: ArrayLike | None, **hyperparameters: Any
) -> PairLosses | Tensor:
    r"""The loss of each listed pair or triplet, for a mean, weights or statistics of your own.

    The losses are differentiable, in memory linear in the number of pairs, whatever the width of
    the rows.

    Args:
        loss: `batch_contrastive_loss`, `batch_cosine_loss`, `nt_xent_loss` and `lifted_pair_loss`
            (one loss per similar pair), `batch_triplet_loss`, `batch_loss` with a `PairRule`; or a
            module of one.
        data: the data arguments of the loss: embeddings and labels, which may be None.
        hyperparameters: its keyword arguments, with `pairs` or `triplets`, and without `reduction`.

    Returns:
        `PairLosses`; with `triplets`, (t,) losses.

    Raises:
        TypeError: no list, or a loss that is not a sum over pairs or triplets.
        ValueError: any error of the loss itself.

    >>> from nearfar import batch_contrastive_loss, per_pair
    >>> x = torch.tensor([[0.0, 0], [0, 0.5], [0.25, 0]])
    >>> found = per_pair(batch_contrastive_loss, x, None, pairs=([[0, 1]], [[0, 2], [1, 2]]))
    >>> found.positive, found.negative
    (tensor([0.2500]), tensor([0.5625, 0.1945]))
    """
    with error_of_all(loss, hyperparameters):
        if "reduction" in hyperparameters:
            raise TypeError("per_pair returns the loss of each pair: leave reduction out.")
    function, given, settings = unwrap(loss, data, hyperparameters)
    weight = settings.pop("weight", None)  # of a row; the loss is asked for pairs
    with error_of_all(function, settings):
        x, labels, listed = _data(given, settings)
        by = row_weight(weight, tensor("x", x))
    found = function(x, labels, **settings, reduction=EACH_PAIR)
    if listed is None:
        triplets = settings["triplets"]
        return found if by is None else found * by[listed_triplets(triplets, found.device)[:, 0]]
    assert listed[2].listed is not None
    (near, _), (far, _) = listed[2].listed.positive, listed[2].listed.negative
    if by is not None:
        found = found * by[torch.cat([near, far])[: len(found)]]
    return PairLosses(found[: len(near)], found[len(near) :])


def _data(
    given: tuple[Any, ...], settings: dict[str, Any]
) -> tuple[ArrayLike, ArrayLike | None, Listed | None]:
    """The rows, their labels, and the listed pairs; None: triplets are listed."""
    pairs, triplets = settings.get("pairs"), settings.get("triplets")
    if pairs is None and triplets is None:
        raise TypeError(
            "per_pair needs the pairs: pass pairs=(similar, dissimilar), or triplets= to a loss of "
            "triplets."
        )
    if not given:
        raise TypeError("per_pair needs the embeddings by position, as in per_pair(loss, x, ...).")
    x, labels = given if len(given) == 2 else (*given, settings.pop("labels", None))
    if triplets is not None:
        return x, labels, None
    assert pairs is not None
    return x, labels, as_listed(x, labels, settings.get("reference"), pairs, settings.get("group"))
