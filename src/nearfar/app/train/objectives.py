"""The losses that can be trained, and how the arguments of each are formed from a batch.

A form takes the loss with its hyperparameters bound, calls it on what it made of the batch, and
returns the loss and the active share: the share of its pairs or tuples that still cost anything.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

import nearfar
from nearfar import registry
from nearfar.app.errors import InputError
from nearfar.app.train.config import Setting
from nearfar.app.train.names import DEFAULTS
from nearfar.distance import Distance, unit
from nearfar.registry import Data

Loss = Callable[..., Tensor]
Step = tuple[Tensor, Tensor]
FromPairs = Callable[[Loss, Tensor, Tensor, Tensor], Step]
NEGATIVES = 8  # random negatives for every ordered (anchor, positive)


@dataclass(frozen=True, eq=False)
class Batch:
    """What a loss is formed from.

    Attributes:
        x: (n, d) embeddings.
        identity: (n,) int64, from 0 to the number of training identities.
        generator: of whatever is drawn at random.
        proxies: (c, d), one learned for each training identity; None unless the objective asks.
    """

    x: Tensor
    identity: Tensor
    generator: torch.Generator
    proxies: Tensor | None = None


FromBatch = Callable[[Loss, Batch], Step]


@dataclass(frozen=True)
class Objective:
    """A loss that can be trained.

    Attributes:
        loss: the function.
        hyperparameters: those that can be set, with defaults for embeddings of length 1.
        from_batch: forms its arguments from a batch.
        from_pairs: the same from the two sides of given pairs; None where pairs do not suffice.
        similar_only: of given pairs, it takes the similar ones.
        proxies: it learns one embedding for each identity of the training set.
        fewest_identities: that a batch must hold.
    """

    loss: Loss
    hyperparameters: Mapping[str, Setting]
    from_batch: FromBatch
    from_pairs: FromPairs | None = None
    similar_only: bool = False
    proxies: bool = False
    fewest_identities: int = 2


def whole_batch(loss: Loss, batch: Batch) -> Step:
    """The batch as it is, every item against every other."""
    with torch.no_grad():
        per_anchor = loss(batch.x, batch.identity, reduction="none")
    return loss(batch.x, batch.identity), _active(per_anchor)


def against_proxies(loss: Loss, batch: Batch) -> Step:
    """The batch against the learned embedding of every training identity."""
    with torch.no_grad():
        per_anchor = loss(batch.x, batch.proxies, batch.identity, reduction="none")
    return loss(batch.x, batch.proxies, batch.identity), _active(per_anchor)


def every_pair(loss: Loss, batch: Batch) -> Step:
    """All n (n - 1) / 2 pairs; the few similar ones weigh as much as all the others."""
    x, identity = batch.x, batch.identity
    first, second = torch.triu_indices(len(x), len(x), offset=1, device=x.device)
    similar = identity[first] == identity[second]
    per_pair = loss(x[first], x[second], similar, reduction="none")
    return per_pair[similar].mean() + per_pair[~similar].mean(), _active(per_pair)


def triplets(loss: Loss, batch: Batch) -> Step:
    """Every ordered (anchor, positive), each with a few random negatives."""
    x, identity, generator = batch.x, batch.identity, batch.generator
    anchor, positive = _anchors(identity)
    negative = _stranger(identity, [anchor], generator)
    per_triplet = loss(x[anchor], x[positive], x[negative], reduction="none")
    return per_triplet.mean(), _active(per_triplet)


def quadruplets(loss: Loss, batch: Batch) -> Step:
    """The same, each negative with a second one of a third identity."""
    x, identity, generator = batch.x, batch.identity, batch.generator
    anchor, positive = _anchors(identity)
    negative = _stranger(identity, [anchor], generator)
    negative2 = _stranger(identity, [anchor, negative], generator)
    rows = (x[anchor], x[positive], x[negative], x[negative2])
    per_quadruplet = loss(*rows, reduction="none")
    return per_quadruplet.mean(), _active(per_quadruplet)


def item_against_item(loss: Loss, batch: Batch) -> Step:
    """One item of each identity as query, another as positive; the items left make more such rows.

    An identity is in a set of rows once, so that another row's positive is truly a negative. One
    with a single item has no row.
    """
    columns, _ = _columns(batch.identity)
    return _each_pair_of(loss, batch.x, columns)


def item_against_all(loss: Loss, batch: Batch) -> Step:
    """The same; identities with a single item are further negatives of every query."""
    columns, alone = _columns(batch.identity)
    if len(alone):
        loss = partial(loss, hard_negatives=batch.x[alone])
    return _each_pair_of(loss, batch.x, columns)


def item_against_classes(loss: Loss, batch: Batch) -> Step:
    """Each item's cosines to the learned direction of every training identity, as scores."""
    assert batch.proxies is not None
    scores = unit(batch.x) @ unit(batch.proxies).T
    per_item = loss(scores, batch.identity, reduction="none")
    return per_item.mean(), _active(per_item)


def given_pairs(loss: Loss, x1: Tensor, x2: Tensor, similar: Tensor) -> Step:
    """The pairs as they are labelled; batches hold as many similar as dissimilar ones."""
    degrees = {"similar_label": 1} if similar.is_floating_point() else {}
    per_pair = loss(x1, x2, similar, reduction="none", **degrees)
    return per_pair.mean(), _active(per_pair)


def similar_pairs(loss: Loss, x1: Tensor, x2: Tensor, similar: Tensor) -> Step:
    """Similar pairs; the other rows' second items are the negatives."""
    per_query = loss(x1, x2, reduction="none")
    return per_query.mean(), _active(per_query)


def of_cosines(loss: Loss) -> Loss:
    """A loss of scores as one of cosines, which without a temperature could not come near 0."""

    @wraps(loss)
    def scaled(cosines: Tensor, target: Tensor, *, temperature: float, **settings: Any) -> Tensor:
        return loss(cosines / temperature, target, **settings)

    return scaled


# How the arguments of a loss are formed: by what it takes ...
FORMS: Mapping[Data, Callable[..., Objective]] = {
    "batch": partial(Objective, from_batch=whole_batch),
    "towers": partial(
        Objective, from_batch=item_against_item, from_pairs=similar_pairs, similar_only=True
    ),
    "proxies": partial(Objective, from_batch=against_proxies, proxies=True),
}
# ... and of rows, by the names of its arguments.
ROW_FORMS: Mapping[tuple[str, ...], Callable[..., Objective]] = {
    ("x1", "x2", "y"): partial(Objective, from_batch=every_pair, from_pairs=given_pairs),
    ("anchor", "positive", "negative"): partial(Objective, from_batch=triplets),
    ("anchor", "positive", "negative", "negative2"): partial(Objective, from_batch=quadruplets),
    ("logits", "target"): partial(Objective, from_batch=item_against_classes, proxies=True),
}


def _formed(listed: registry.Loss, hyperparameters: Mapping[str, Setting]) -> Objective:
    """How a loss of the list is trained."""
    loss: Loss = getattr(nearfar, listed.function)
    takes = inspect.signature(loss).parameters
    data = tuple(name for name, p in takes.items() if p.kind is p.POSITIONAL_OR_KEYWORD)
    form = ROW_FORMS[data] if listed.data == "rows" else FORMS[listed.data]
    if "hard_negatives" in takes:
        form = partial(form, from_batch=item_against_all)
    if "temperature" in hyperparameters and "temperature" not in takes:
        loss = of_cosines(loss)
    # The second margin is between two negatives, of different identities.
    fewest = 3 if "margin2" in takes else 2
    return form(loss, hyperparameters, fewest_identities=fewest)


def _objectives() -> Mapping[str, Objective]:
    """Every loss of `DEFAULTS`, in that order."""
    listed = {loss.name: loss for loss in registry.LOSSES}
    return {name: _formed(listed[name], settings) for name, settings in DEFAULTS.items()}


OBJECTIVES = _objectives()


class WithProxies(nn.Module):
    """An embedder, and beside it the embeddings that a loss learns for the training identities.

    They are no part of the verifier: only the embedder is written to the run.
    """

    def __init__(self, embedder: nn.Module, n_proxies: int, embedding_dim: int) -> None:
        super().__init__()
        self.embedder = embedder
        # Short ones, since only their direction counts, and long ones turn slowly.
        directions = unit(torch.randn(n_proxies, embedding_dim))
        self.proxies = nn.Parameter(0.1 * directions) if n_proxies else None

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.embedder(x)
        return embedding


def objective(name: str) -> Objective:
    """The objective of this name.

    Raises:
        InputError: an unknown name; the message lists the choices.
    """
    if name not in OBJECTIVES:
        raise InputError(f"unknown loss {name!r}; the choices are: {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[name]


def belonging(key: str) -> str:
    """Which losses have a hyperparameter, as a sentence to add to an error; empty: none has."""
    having = [name for name, o in OBJECTIVES.items() if key in o.hyperparameters]
    return f" {key!r} belongs to: {', '.join(having)}." if having else ""


def resolve(name: str, given: Mapping[str, Setting]) -> dict[str, Setting]:
    """All hyperparameters of a loss: the given ones, and defaults for the rest.

    Raises:
        InputError: one that the loss does not have, or a value it refuses.
    """
    chosen = objective(name)
    for key in given:
        if key not in chosen.hyperparameters:
            has = ", ".join(chosen.hyperparameters)
            raise InputError(f"the {name} loss has no {key!r}; it has: {has}.{belonging(key)}")
    settings = {**chosen.hyperparameters, **given}
    try:  # the loss knows its ranges best; six items of three identities suit every form
        identity = torch.arange(6) // 2
        batch = Batch(torch.eye(6, 3), identity, torch.Generator(), torch.eye(3))
        chosen.from_batch(partial(chosen.loss, **settings), batch)
    except (TypeError, ValueError) as error:
        raise InputError(f"the {name} loss refuses its hyperparameters: {error}") from None
    return settings


def verifier_distance(name: str, hyperparameters: Mapping[str, Setting]) -> Distance:
    """What the trained loss compares embeddings with."""
    return hyperparameters.get("distance", "cosine")  # type: ignore[return-value]


def _columns(identity: Tensor) -> tuple[Sequence[Tensor], Tensor]:
    """K columns of rows, each with an item of every identity of K; and the rows of single items."""
    counts = torch.bincount(identity)[identity]
    rows = (counts > 1).nonzero()[:, 0]
    order = rows[identity[rows].argsort(stable=True)]
    return order.view(-1, int(counts.max())).unbind(1), (counts == 1).nonzero()[:, 0]


def _each_pair_of(loss: Loss, x: Tensor, columns: Sequence[Tensor]) -> Step:
    """The first column's items as queries of the second's, the third's of the fourth's, ..."""
    per_query = torch.cat(
        [
            loss(x[query], x[positive], reduction="none")
            for query, positive in zip(columns[::2], columns[1::2], strict=False)
        ]
    )
    return per_query.mean(), _active(per_query)


def _anchors(identity: Tensor) -> tuple[Tensor, Tensor]:
    """Every ordered (anchor, positive), each `NEGATIVES` times."""
    match = identity[:, None] == identity[None, :]
    match.fill_diagonal_(False)
    anchor, positive = match.nonzero().repeat_interleave(NEGATIVES, dim=0).unbind(1)
    return anchor, positive


def _stranger(identity: Tensor, of: list[Tensor], generator: torch.Generator) -> Tensor:
    """For each row a random item whose identity none of these rows has."""
    eligible = torch.ones(len(of[0]), len(identity), dtype=torch.bool, device=identity.device)
    for rows in of:
        eligible &= identity[rows][:, None] != identity[None, :]
    draw = torch.rand(eligible.shape, generator=generator).to(identity.device)
    return draw.masked_fill(~eligible, -1).argmax(1)


def _active(per_row: Tensor) -> Tensor:
    return (per_row.detach() > 0).float().mean()
