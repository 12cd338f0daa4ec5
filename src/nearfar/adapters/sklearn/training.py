"""What a training of an embedding is made of: the network, the loss, the batches."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import nearfar
from nearfar.adapters.sklearn.pairs import Bools, Integers
from nearfar.cached.replay import kept_randomness
from nearfar.distance import unit
from nearfar.distributed.samplers import ClassBatches
from nearfar.inputs import positive_integer
from nearfar.registry import LOSSES, find


class Batch(NamedTuple):
    """Rows of the data, and what a loss is told of them.

    Attributes:
        rows: (n,) int64.
        labels: (n,) int64 class ids; None if pairs are listed.
        listed: `pairs`, if they are.
    """

    rows: Tensor
    labels: Tensor | None
    listed: Mapping[str, Any]


def network_of(n_features: int, hidden: Sequence[int], embedding_dim: int) -> nn.Module:
    """Linear layers of these widths, with a ReLU between each two.

    Raises:
        TypeError: `hidden` is no sequence.
        ValueError: a width that is not 1 or more.
    """
    if not isinstance(hidden, Sequence | np.ndarray):
        raise TypeError(f"hidden must be a sequence of widths, such as (128,); got {hidden!r}.")
    widths = [n_features, *(positive_integer("hidden", width) for width in hidden)]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.Linear(widths[-1], positive_integer("embedding_dim", embedding_dim))
    )


def loss_of(
    loss: str | nn.Module, settings: Mapping[str, float], n_classes: int | None, dim: int
) -> nn.Module:
    """The loss of this name with these settings, or a copy of a module, whose own they are.

    Args:
        loss: a name of the registry, or a module.
        settings: what the caller has set.
        n_classes: the number of classes; None: only pairs are known.
        dim: of the embedding.

    Raises:
        TypeError: the loss has no such setting.
        ValueError: an unknown name, settings beside a module, or a loss of proxies without classes.
    """
    if isinstance(loss, nn.Module):
        if settings:
            given = ", ".join(settings)
            raise ValueError(
                f"a loss given as a module has its own {given}: leave {given} at None."
            )
        return deepcopy(loss)
    known = [one for one in LOSSES if one.takes("batch") or one.takes("proxies")]
    listed = find(loss) if isinstance(loss, str) else None
    if listed not in known:
        names = ", ".join(one.name for one in known)
        raise ValueError(f"loss must be a module or one of {names}; got {loss!r}.")
    module = getattr(nearfar, listed.module)
    if not listed.takes("proxies"):
        made: nn.Module = module(**settings)
    elif n_classes is None:
        raise ValueError(f"{loss} learns a proxy of each class, but pairs have no classes.")
    else:
        made = module(n_classes, dim, **settings)
    return made


class Unit(nn.Module):
    """Rows at length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return unit(x)


class OfClasses:
    """Batches of P classes x K items.

    Args:
        ids: (n,) class ids from 0 to c - 1, on the device of the loss.
        classes: P; all of them if there are fewer.
        items: K.
        seed: of the order.
    """

    def __init__(self, ids: Tensor, classes: int, items: int, seed: int) -> None:
        self._ids, n_classes = ids, int(ids.max()) + 1
        self._batches = ClassBatches(ids, classes=min(classes, n_classes), items=items, seed=seed)

    def __len__(self) -> int:
        return len(self._batches)

    def epoch(self, number: int) -> Iterator[Batch]:
        self._batches.set_epoch(number)
        for chosen in self._batches:
            rows = torch.tensor(chosen)
            yield Batch(rows, self._ids[rows], {})


class OfPairs:
    """Batches of listed pairs, of which those of one item come together.

    A loss that compares the positives of an anchor with its negatives learns from an item only
    where both are in one batch.

    Args:
        index: (n, 2) the two items of each pair.
        similar: (n,) bool.
        size: pairs of a batch.
        seed: of the order.
    """

    def __init__(self, index: Integers, similar: Bools, size: int, seed: int) -> None:
        self._index, self._similar = torch.from_numpy(index), torch.from_numpy(similar)
        self._size, self._seed = size, seed

    def __len__(self) -> int:
        return -(-len(self._index) // self._size)

    def epoch(self, number: int) -> Iterator[Batch]:
        random = np.random.default_rng([self._seed, number])
        rank = torch.from_numpy(random.permutation(int(self._index.max()) + 1))
        order = rank[self._index].amin(1).argsort()
        for chosen in torch.split(order, self._size):
            rows, ends = self._index[chosen].unique(return_inverse=True)  # type: ignore[no-untyped-call]
            both_ways = torch.cat([ends, ends.flip(1)])
            near = self._similar[chosen].repeat(2)
            yield Batch(rows, None, {"pairs": (both_ways[near], both_ways[~near])})


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of torch by a seed; afterwards those of the caller go on where they were."""
    torch.empty(0, device=device)  # an accelerator that has not begun has no state to be kept
    with kept_randomness():
        # Not torch.manual_seed, which also seeds accelerators that begin only later.
        torch.default_generator.manual_seed(seed)
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)
        yield


def train(
    network: nn.Module,
    loss: nn.Module,
    x: Tensor,
    batches: OfClasses | OfPairs,
    *,
    epochs: int,
    learning_rate: float,
    weight_decay: float,
) -> list[float]:
    """Train both by AdamW, whose learning rate falls to 0 as a cosine; the mean loss of each epoch.

    Raises:
        ValueError: the loss is not one number, or became infinite or NaN.
    """
    parameters = [*network.parameters(), *loss.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    curve = []
    network.train()
    for number in range(epochs):
        total = 0.0
        for rows, labels, listed in batches.epoch(number):
            value = loss(network(x[rows]), labels, **listed)
            if value.numel() != 1:
                raise ValueError(
                    "loss must give one number for a batch, as with reduction='mean'; got shape "
                    f"{tuple(value.shape)}."
                )
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            total += value.item()
        curve.append(total / len(batches))
        if not np.isfinite(curve[-1]):
            raise ValueError(
                f"the loss became {curve[-1]} in epoch {number + 1}: training diverged. Lower "
                "learning_rate, or scale the features, as by StandardScaler."
            )
    network.eval()
    return curve
