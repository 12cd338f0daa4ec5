"""A sample of the forces that a loss exerts on one batch, which a report plots over distance."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nearfar.app.train.task import Task
from nearfar.engine.closeness import Tile
from nearfar.engine.observe import Measured, watch, watch_forces
from nearfar.registry import find

N_SIMILAR, N_DISSIMILAR = 400, 800  # points in a plot


@dataclass(frozen=True, eq=False)
class ForceSample:
    """The forces on some pairs of a batch.

    Attributes:
        distance: (q,) distance of each pair.
        force: (q,) derivative of the loss by the distance: > 0 pulls together, < 0 pushes apart.
        similar: (q,) bool.
    """

    distance: Tensor
    force: Tensor
    similar: Tensor


def sample_forces(task: Task, x: Tensor, rows: Tensor, proxies: Tensor | None) -> ForceSample:
    """The forces on a fixed number of similar and of dissimilar pairs, evenly spread by distance.

    Args:
        task: gives the loss.
        x: (m, d) embeddings of `task.items_in(rows)`.
        rows: rows of the batch.
        proxies: as in `Task.step`.
    """
    x = x.detach().requires_grad_()
    step = partial(task.step, x=x, rows=rows, proxies=None if proxies is None else proxies.detach())
    with watch() as record:
        loss, _ = step(task.loss, generator=torch.Generator())
    if record:
        found = _aligned(loss, record, task.config.hyperparameters.get("temperature", 1.0))
    else:
        found = _whole_batch(task, step)
    distance, force, similar = (part.detach().cpu() for part in found)
    chosen = torch.cat(
        [
            _spread(distance, similar, N_SIMILAR),
            _spread(distance, ~similar, N_DISSIMILAR),
        ]
    )
    return ForceSample(distance[chosen], force[chosen], similar[chosen])


def _aligned(loss: Tensor, record: list[Measured], temperature: Any) -> list[Tensor]:
    derivatives = torch.autograd.grad(loss, [m.values for m in record])
    parts = []
    for m, derivative in zip(record, derivatives, strict=True):
        similar = torch.full_like(m.values, m.role == "positive", dtype=torch.bool)
        if m.similar is not None:
            similar = m.similar if m.similar.dtype is torch.bool else m.similar > 0.5
        # A logit is a cosine over the temperature; it grows as the distance shrinks.
        unit = -1.0 if m.closeness == "distance" else float(temperature)
        distance = m.values if unit < 0 else 1 - unit * m.values
        there = m.values.isfinite()
        parts.append([distance[there], (-derivative / unit)[there], similar[there]])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _whole_batch(task: Task, step: Any) -> list[Tensor]:
    def summed(*data: Any, reduction: str = "mean", **keywords: Any) -> Tensor:
        """Only a scalar loss has forces, but a form may ask for one loss per anchor."""
        value = task.loss(*data, reduction="mean", **keywords)
        return value if reduction == "mean" else value[None]

    collected = _AllForces()
    with watch_forces(collected):
        step(summed, generator=torch.Generator())
    closeness, force, similar = collected.result()
    listed = find(task.config.loss)
    # Losses of pairs show distances, the cosine ones too; others show what they compare.
    of_pairs = listed is not None and listed.pair_margin is not None
    measures = of_pairs or "distance" in task.config.hyperparameters
    return [closeness if measures else 1 - closeness, force, similar]


class _AllForces:
    """Collects the forces on all pairs of a batch, tile by tile."""

    def __init__(self) -> None:
        self.done: list[list[Tensor]] = []
        self.open: list[list[Tensor]] = []  # not scaled yet

    def begin(self) -> None:
        self.done, self.open = self.done + self.open, []

    def tile(self, n_anchors: int, tile: Tile, pull: Tensor) -> None:
        there = tile.positive | tile.negative
        self.open.append([tile.closeness[there], pull[there], tile.positive[there]])

    def scale(self, by: Tensor | float) -> None:
        self.done += [[closeness, pull * by, positive] for closeness, pull, positive in self.open]
        self.open = []

    def result(self) -> list[Tensor]:
        return [torch.cat(column) for column in zip(*self.done, *self.open, strict=True)]


def _spread(distance: Tensor, wanted: Tensor, n: int) -> Tensor:
    """Up to n of the wanted rows, evenly spaced in order of distance."""
    rows = wanted.nonzero()[:, 0]
    rows = rows[distance[rows].argsort(stable=True)]
    return rows[torch.linspace(0, len(rows) - 1, min(n, len(rows))).round().long()]
