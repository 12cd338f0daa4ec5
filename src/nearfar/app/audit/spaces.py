"""The features by which items are compared: as they are given, or as networks learn them."""

from collections.abc import Callable

import torch
from torch import Tensor

from nearfar.app.audit.judge import Judged, judge
from nearfar.app.data.content import Arrays
from nearfar.app.data.items import Items
from nearfar.app.data.reads import Reads
from nearfar.app.names import FOR_ITEMS
from nearfar.app.train.batches import distort
from nearfar.app.train.config import TrainConfig
from nearfar.app.train.encoders import SMALLEST_SIDE, build
from nearfar.app.train.measure import embed
from nearfar.losses import proxy_softmax_loss

FOLDS, STEPS, BATCH = 2, 150, 256
DIM, SCALE, LEARNING_RATE = 128, 16.0, 0.003
FEWEST = 20  # items from which a network can learn


def given(items: Items) -> Tensor:
    """(n, d) features of items as they are: their numbers, less the mean of each."""
    x = _raw(items).flatten(1)
    return x - x.mean(0)


def _raw(items: Items) -> Tensor:
    return items.content.raw(torch.arange(len(items.content)))


def learned(items: Items, say: Callable[[str], None]) -> Judged | None:
    """Judge each item by a network that has not learned from it; None if the data are too small.

    The items are dealt to two folds at random. A network that learns the labels of one fold judges
    those of the other: a wrong label that it has seen would pull the item to it.
    """
    n, x = len(items.names), _raw(items)
    if n < FEWEST or min(x.shape[2:], default=SMALLEST_SIDE) < SMALLEST_SIDE:
        return None
    fold = torch.randperm(n, generator=torch.Generator().manual_seed(0)) % FOLDS
    parts = [torch.empty(n), *(torch.empty(n, dtype=torch.int64) for _ in range(2)), torch.empty(n)]
    for number in range(FOLDS):
        say(f"training network {number + 1} of {FOLDS} on half of the items, {STEPS} steps")
        held = (fold == number).nonzero()[:, 0]
        z = _embedded(x, items.identity, (fold != number).nonzero()[:, 0], seed=number)
        judged = judge(z, items.identity, held)
        found = (judged.margin, judged.suggested, judged.other, judged.own_distance)
        for whole, part in zip(parts, found, strict=True):
            whole[held] = part
    return Judged(*parts)


def _embedded(items: Tensor, identity: Tensor, rows: Tensor, *, seed: int) -> Tensor:
    """(n, d) embeddings of all items, by a network trained on some rows."""
    from nearfar.app.train.loop import deterministic

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), deterministic():
        torch.manual_seed(seed)
        config = TrainConfig("", FOR_ITEMS, embedding_dim=DIM)
        network = build(config, Reads(tuple(items.shape[1:]))).train()
        network.standardise(*Arrays(items).moments(rows))
        proxies = torch.nn.Parameter(torch.randn(int(identity.max()) + 1, DIM) / DIM**0.5)
        rates = [LEARNING_RATE, 3 * LEARNING_RATE]  # proxies get a gradient only now and then
        groups = [{"params": [*network.parameters()]}, {"params": [proxies]}]
        optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=STEPS + 1)
        for _ in range(STEPS):
            some = rows[torch.randperm(len(rows), generator=generator)[:BATCH]]
            x = items[some]
            x = distort(x, generator) if x.ndim == 4 else x
            loss = proxy_softmax_loss(network(x), proxies, identity[some], scale=SCALE)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return embed(network, Arrays(items))
