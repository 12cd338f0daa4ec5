"""What a loss does to each row, in numbers and words."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from nearfar.doctor.rules import diagnose
from nearfar.engine.observe import watch
from nearfar.inputs import ArrayLike
from nearfar.insight.evidence import batch_evidence, row_evidence
from nearfar.insight.explanation import SHOWN, Explanation, Row
from nearfar.insight.forces import forces_of
from nearfar.insight.observation import Observation
from nearfar.insight.readings import labels, read_force, readings
from nearfar.listed import listed_pairs, listed_triplets
from nearfar.losses.base import unwrap
from nearfar.losses.own import Rule, batch_loss, name_of, with_rule


def explain(
    loss: Callable[..., Tensor], *data: ArrayLike | Rule, **hyperparameters: Any
) -> Explanation:
    r"""Show what a loss does to each row: its distances, its loss, its force, and why.

    The loss function itself is run and differentiated, so this is what training does. For row i
    with a distance :math:`d_i`, the force is :math:`\partial \ell_i / \partial d_i` (negated for a
    similarity): above 0 it pulls together, below 0 it pushes apart.

    For a whole-batch loss, the strongest forces are shown; `nearfar.forces` has more. Settings that
    are as they are by default are left out. With `group`, all processes call it, and each shows the
    rows of its own batch; only the loss is that of all.

    Args:
        loss: one of nearfar's losses, as a function or a module; or `nearfar.batch_loss`.
        data: the data arguments of the loss: embeddings, distances, labels. For `batch_loss`, its
            rule comes first.
        hyperparameters: its keyword arguments; those of a module are already set.

    Returns:
        An `Explanation`: print it, or read its rows, totals and findings.

    Raises:
        TypeError: `loss` is not one of nearfar's losses.
        ValueError: any error of the loss itself.

    >>> from nearfar import contrastive_loss_from_distance
    >>> print(explain(contrastive_loss_from_distance, [0.5, 0.3, 1.5], [True, False, False]))
    contrastive_loss_from_distance()
    3 rows, mean loss 0.2467 (sum 0.74), 67% active, pull 1, push 1.4
    <BLANKLINE>
    row  label       distance    loss  force     reading
    ---  ----------  --------  ------  --------  ----------------------------------
      0  similar       0.5000  0.2500  pull 1    similar but apart: pulled together
      1  dissimilar    0.3000  0.4900  push 1.4  too close: pushed apart
      2  dissimilar    1.5000  0.0000  none      far enough apart: no penalty

    Source: the gradient of any contrastive loss is a weighted sum over pairs (Wang et al.,
    "Multi-Similarity Loss", CVPR 2019, section 3).
    """
    function, given, settings = unwrap(loss, data, hyperparameters)
    with watch() as record:
        per_row = function(*given, **settings, reduction="none")
        if not record:
            return _explain_batch(function, given, settings)
        derivatives = torch.autograd.grad(per_row.sum(), [m.values for m in record])
    seen = Observation.of(per_row, record, derivatives)
    columns = [_column(seen, role) for role in seen.measured]
    rows = tuple(
        Row(
            index,
            label,
            {column.name: column.values[index] for column in columns},
            row_loss,
            {column.name: column.forces[index] for column in columns},
            reading,
        )
        for index, (label, row_loss, reading) in enumerate(
            zip(labels(seen), seen.per_row.tolist(), readings(seen), strict=True)
        )
    )
    every_force = torch.cat([force.flatten() for force in seen.forces.values()])
    return Explanation(
        loss=function.__name__,
        hyperparameters=_plain(function, settings),
        rows=rows,
        n=len(rows),
        total=float(seen.per_row.sum()),
        mean=float(seen.per_row.sum()) / max(len(rows), 1),
        active_share=float(seen.active.sum()) / max(len(rows), 1),
        pull=float(every_force.clamp(min=0).sum()),
        push=float((-every_force).clamp(min=0).sum()),
        findings=diagnose(row_evidence(function, given, settings, seen)).findings,
    )


def _explain_batch(
    function: Callable[..., Tensor], data: tuple[ArrayLike, ...], settings: dict[str, Any]
) -> Explanation:
    """The strongest forces of a whole-batch loss, and the totals over all forces."""
    shown = forces_of(function, data, settings, k=SHOWN)
    with torch.no_grad():
        total = float(function(*data, **settings, reduction="sum"))
    acting = shown.pull + shown.push
    n = len(acting)
    active = int((acting > 1e-6 * acting.max()).sum()) if n else 0
    columns = (shown.anchor, shown.other, shown.similar, shown.closeness, shown.force)
    rows = tuple(
        Row(
            anchor,
            "similar" if similar else "dissimilar",
            {"closeness": closeness},
            None,
            {"closeness": force},
            read_force(similar, force),
            other,
        )
        for anchor, other, similar, closeness, force in zip(
            *(column.tolist() for column in columns), strict=True
        )
    )
    return Explanation(
        loss=function.__name__,
        hyperparameters=_plain(function, settings),
        rows=rows,
        n=n,
        total=total,
        mean=shown.loss,
        active_share=active / max(n, 1),
        pull=float(shown.pull.sum()),
        push=float(shown.push.sum()),
        findings=diagnose(batch_evidence(function, data, settings, acting)).findings,
        listed=_listed(settings, n),
        n_of_all=shown.n_of_all,
    )


def _listed(settings: dict[str, Any], n: int) -> str | None:
    """How many pairs or triplets a loss is over, if they are listed."""
    here = torch.device("cpu")
    if (triplets := settings.get("triplets")) is not None:
        return f"{len(listed_triplets(triplets, here))} listed triplets"
    if (pairs := settings.get("pairs")) is None:
        return None
    similar, dissimilar = listed_pairs(pairs, n, here)
    return f"{len(similar.row) + len(dissimilar.row)} listed pairs"


def _plain(function: Callable[..., Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that are single values, and the names of functions; data is left out.

    So is what is as it is by default.
    """
    shown: dict[str, Any] = {"rule": name_of(settings["rule"])} if "rule" in settings else {}
    takes = inspect.signature(batch_loss if function is with_rule else function).parameters
    for name, value in settings.items():
        value = value.item() if isinstance(value, Tensor) and not value.ndim else value
        value = name_of(value) if callable(value) and name != "rule" else value
        if isinstance(value, int | float | str) and value != takes[name].default:
            shown[name] = value
    return shown


@dataclass(frozen=True)
class _Column:
    """What a loss measured in one role, row by row."""

    name: str
    values: list[float]
    forces: list[float]


def _column(seen: Observation, role: str) -> _Column:
    """The column of a role; for many negatives, the nearest and the total push on all."""
    measure, force = seen.measured[role], seen.forces[role]
    kind = measure.closeness
    names = {
        "pair": kind,
        "positive": f"{kind} to positive",
        "negative": f"{kind} to negative",
        "second negative": f"{kind} between negatives",
    }
    if measure.values.ndim == 1:
        return _Column(names[role], measure.values.tolist(), force.tolist())
    nearest = measure.values.max(1).values if measure.values.shape[1] else force.sum(1) - inf
    return _Column(f"largest {names[role]}", nearest.tolist(), force.sum(1).tolist())
