"""The forces of a loss on one batch, against distance: what a report draws."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nearfar.app.train.task import Task
from nearfar.engine.observe import Measured, watch, watch_forces
from nearfar.engine.relation import Block
from nearfar.registry import find

N_SIMILAR, N_DISSIMILAR = 400, 800  # points of a plot


@dataclass(frozen=True, eq=False)
class ForceSample:
    """Some of the forces of a batch.

    Attributes:
        distance: (q,) how far apart the two are.
        force: (q,) the derivative of the loss by that: > 0 pulls together, < 0 pushes apart.
        similar: (q,) bool.
    """

    distance: Tensor
    force: Tensor
    similar: Tensor


def sample_forces(task: Task, x: Tensor, rows: Tensor, proxies: Tensor | None) -> ForceSample:
    """Similar and dissimilar ones spread evenly over distance, a fixed number of each.

    Args:
        task: whose loss it is.
        x: (m, d) embeddings of `task.items_in(rows)`.
        rows: of the batch.
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
        # A logit is a cosine by the temperature; both grow as a distance shrinks.
        unit = {"distance": -1.0, "similarity": 1.0, "logit": float(temperature)}[m.closeness]
        distance = m.values if unit < 0 else 1 - unit * m.values
        there = m.values.isfinite()
        parts.append([distance[there], (-derivative / unit)[there], similar[there]])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _whole_batch(task: Task, step: Any) -> list[Tensor]:
    def summed(*data: Any, reduction: str = "mean", **keywords: Any) -> Tensor:
        """Only a loss that is one number shows its forces; a form may ask for one an anchor."""
        value = task.loss(*data, reduction="mean", **keywords)
        return value if reduction == "mean" else value[None]

    every = _Every()
    with watch_forces(every):
        step(summed, generator=torch.Generator())
    closeness, force, similar = every.result()
    listed = find(task.config.loss)
    # Losses of pairs show distances, the cosine ones too; others show what they compare.
    of_pairs = listed is not None and listed.pair_margin is not None
    measures = of_pairs or "distance" in task.config.hyperparameters
    return [closeness if measures else 1 - closeness, force, similar]


class _Every:
    """Keeps every force that is shown, of anchors and others that are a pair."""

    def __init__(self) -> None:
        self.done: list[list[Tensor]] = []
        self.open: list[list[Tensor]] = []  # that may still be scaled

    def begin(self) -> None:
        self.done, self.open = self.done + self.open, []

    def tile(
        self,
        n_anchors: int,
        rows: slice,
        columns: slice,
        block: Block,
        closeness: Tensor,
        pull: Tensor,
    ) -> None:
        positive, negative = block.masks()
        there = positive | negative
        self.open.append([closeness[there], pull[there], positive[there]])

    def scale(self, by: Tensor | float) -> None:
        self.done += [[closeness, pull * by, positive] for closeness, pull, positive in self.open]
        self.open = []

    def result(self) -> list[Tensor]:
        return [torch.cat(column) for column in zip(*self.done, *self.open, strict=True)]


def _spread(distance: Tensor, wanted: Tensor, n: int) -> Tensor:
    """Up to n rows of those wanted, evenly spaced in the order of their distance."""
    rows = wanted.nonzero()[:, 0]
    rows = rows[distance[rows].argsort(stable=True)]
    return rows[torch.linspace(0, len(rows) - 1, min(n, len(rows))).round().long()]
