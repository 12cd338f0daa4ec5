"""The task of a run: how batches are drawn, and the loss of a batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from nearfar.app.data.items import Items, Pairs, items_of
from nearfar.app.train.batches import balanced_items, balanced_pairs, similar_pairs
from nearfar.app.train.config import TrainConfig
from nearfar.app.train.objectives import Batch, LossAndActive, LossFunction, Objective
from nearfar.app.train.split import Split


@dataclass(frozen=True, eq=False)
class Task:
    """A loss on the training identities of some data.

    Attributes:
        config: the config of the run.
        objective: the objective named by `config.loss`.
        data: all items or pairs.
        split: the split of their identities.
    """

    config: TrainConfig
    objective: Objective
    data: Items | Pairs
    split: Split

    @property
    def items(self) -> Items:
        return items_of(self.data)

    @property
    def n_proxies(self) -> int:
        return len(self.split.train) if self.objective.proxies else 0

    @cached_property
    def loss(self) -> LossFunction:
        """The loss with its hyperparameters."""
        return partial(self.objective.loss, **self.config.hyperparameters)

    @cached_property
    def target(self) -> Tensor:
        """(n,) class of each item, 0 to c - 1; meaningful for the c training identities only."""
        return torch.searchsorted(self.split.train, self.items.identity)

    def batches(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Batches without end: rows of items or rows of pairs, P x K items in either case."""
        config = self.config
        if isinstance(self.data, Pairs):
            draw = similar_pairs if self.objective.similar_only else balanced_pairs
            n_pairs = config.identities * config.items // 2
            return draw(self.data, self.split.train, n_pairs=n_pairs, generator=generator)
        return balanced_items(
            self.data.identity,
            self.split.train,
            n_identities=config.identities,
            n_items=config.items,
            generator=generator,
        )

    def items_in(self, rows: Tensor) -> Tensor:
        """The items of a batch; for pairs, all first items and then all second items."""
        data = self.data
        return torch.cat([data.a[rows], data.b[rows]]) if isinstance(data, Pairs) else rows

    def step(
        self,
        loss: LossFunction,
        x: Tensor,
        rows: Tensor,
        proxies: Tensor | None,
        generator: torch.Generator,
    ) -> LossAndActive:
        """The loss of a batch and its active share.

        Args:
            loss: `self.loss`, or a wrapper of it.
            x: (m, d) embeddings of `items_in(rows)`.
            rows: rows of the batch.
            proxies: (c, d) learned proxies of the training identities, for losses that need them.
            generator: for random choices.
        """
        if isinstance(self.data, Pairs):
            assert self.objective.from_pairs is not None
            x1, x2 = x.chunk(2)
            return self.objective.from_pairs(loss, x1, x2, self.data.similar[rows].to(x.device))
        batch = Batch(x, self.target[rows].to(x.device), generator, proxies)
        return self.objective.from_batch(loss, batch)
