"""Evidence for the doctor from a loss that is being explained."""

from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Any

from torch import Tensor

from nearfar.distance import length
from nearfar.doctor.evidence import Apart, Evidence
from nearfar.doctor.examine import examined, of_batch, of_embeddings
from nearfar.doctor.pushes import FEWEST
from nearfar.inputs import ArrayLike, batch, tensor
from nearfar.insight.observation import Observation
from nearfar.labels import batch_labels
from nearfar.registry import find


def row_evidence(
    function: Callable[..., Tensor],
    data: tuple[ArrayLike, ...],
    settings: dict[str, Any],
    seen: Observation,
) -> Evidence:
    """Evidence from a loss that compares its rows one by one."""
    rows = tensor("data", data[0])
    closeness = next(iter(seen.measured.values())).closeness
    embedded = rows.ndim == 2 and closeness != "logit"
    name = function.__name__
    return Evidence(
        loss=name,
        settings=settings,
        apart=Apart(*seen.similar_and_not(), closeness),
        lengths=length(rows.detach().double()).cpu() if embedded else None,
        broken=seen.per_row.isnan(),
        active=seen.active,
        wakes=_wakes(name, seen),
        held=_held(seen),
    )


def batch_evidence(
    function: Callable[..., Tensor],
    data: tuple[ArrayLike, ...],
    settings: dict[str, Any],
    acting: Tensor,
) -> Evidence:
    """Evidence from a whole batch.

    Args:
        function: the loss, over (x, labels), two towers, or (x, proxies, labels).
        data: its data arguments.
        settings: its other arguments.
        acting: (n,) the sum of the absolute forces of each anchor.
    """
    if settings.get("group") is not None:  # forces from and to rows that are not here
        return Evidence(loss=function.__name__, settings=settings, broken=acting.isnan())
    if data[-1] is None:  # a list says which rows are similar
        evidence = Evidence(settings=settings)
    elif examined(function):
        evidence = of_batch(function, data, settings)
    else:
        x = batch("x", data[0])
        evidence = of_embeddings(x, batch_labels(data[-1], like=x), settings)
    return replace(evidence, loss=function.__name__, broken=acting.isnan(), active=acting > 0)


def _wakes(name: str, seen: Observation) -> float | None:
    """The margin at which the first row would become active."""
    near, apart = seen.similar_and_not()
    if "pair" in seen.measured:
        apart = apart[apart > 0]  # at distance 0 no margin gives a direction
    elif apart.shape == near.shape:
        apart = apart - near
    if not len(apart):
        return None
    listed = find(name)
    of_cosine = listed is not None and listed.pair_margin == "cosine"
    return 1 - float(apart.min()) if of_cosine else float(apart.min())


def _held(seen: Observation) -> Tensor | None:
    """For rows whose negatives matter, the largest share of the push that one negative receives.

    None: no row has enough negatives.
    """
    push = seen.forces.get("negative")
    if push is None or push.ndim != 2 or not push.shape[1]:
        return None
    others = (seen.measured["negative"].values > -inf).sum(1)
    if not (others >= FEWEST).any():
        return None
    contested = (seen.per_row > 0.05) & (others >= FEWEST)  # elsewhere the push is negligible
    return -push.min(1).values[contested] / -push.sum(1)[contested]
