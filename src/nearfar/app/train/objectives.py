"""The losses that can be trained, and how the arguments of each are formed from a batch.

A form calls a loss, whose hyperparameters are bound, on pairs or tuples that it makes from a batch.
It returns the loss and the active share: the share of pairs or tuples whose loss is not zero.
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
from nearfar.app.names import DEFAULTS
from nearfar.app.train.config import Setting
from nearfar.app.train.encoders import Embedder
from nearfar.distance import Distance, check_euclidean, unit
from nearfar.registry import Data

LossFunction = Callable[..., Tensor]
LossAndActive = tuple[Tensor, Tensor]
FromPairs = Callable[[LossFunction, Tensor, Tensor, Tensor], LossAndActive]
NEGATIVES = 8  # random negatives per ordered pair (anchor, positive)


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of items.

    Attributes:
        x: (n, d) embeddings.
        identity: (n,) int64, from 0 to c - 1 for c training identities.
        generator: for random choices.
        proxies: (c, d) learned proxies of the training identities; None unless the objective
            needs them.
    """

    x: Tensor
    identity: Tensor
    generator: torch.Generator
    proxies: Tensor | None = None


FromBatch = Callable[[LossFunction, Batch], LossAndActive]


@dataclass(frozen=True)
class Objective:
    """A loss that can be trained.

    Attributes:
        loss: the loss function.
        hyperparameters: the hyperparameters that can be set, and their defaults for embeddings of
            length 1.
        from_batch: computes the loss of a batch of items.
        from_pairs: computes the loss of given pairs; None if pairs do not suffice.
        similar_only: whether only the similar ones of given pairs are used.
        proxies: whether it learns a proxy for each training identity.
        fewest_identities: the fewest identities a batch must hold.
    """

    loss: LossFunction
    hyperparameters: Mapping[str, Setting]
    from_batch: FromBatch
    from_pairs: FromPairs | None = None
    similar_only: bool = False
    proxies: bool = False
    fewest_identities: int = 2


def whole_batch(loss: LossFunction, batch: Batch) -> LossAndActive:
    """The batch as it is: every item against every other."""
    with torch.no_grad():
        per_anchor = loss(batch.x, batch.identity, reduction="none")
    return loss(batch.x, batch.identity), _active(per_anchor)


def against_proxies(loss: LossFunction, batch: Batch) -> LossAndActive:
    """The batch against the proxies of all training identities."""
    with torch.no_grad():
        per_anchor = loss(batch.x, batch.proxies, batch.identity, reduction="none")
    return loss(batch.x, batch.proxies, batch.identity), _active(per_anchor)


def every_pair(loss: LossFunction, batch: Batch) -> LossAndActive:
    """All n (n - 1) / 2 pairs; the similar ones weigh as much in total as the dissimilar ones."""
    x, identity = batch.x, batch.identity
    first, second = torch.triu_indices(len(x), len(x), offset=1, device=x.device)
    similar = identity[first] == identity[second]
    per_pair = loss(x[first], x[second], similar, reduction="none")
    return per_pair[similar].mean() + per_pair[~similar].mean(), _active(per_pair)


def triplets(loss: LossFunction, batch: Batch) -> LossAndActive:
    """Every ordered pair (anchor, positive), each with a few random negatives."""
    x, identity, generator = batch.x, batch.identity, batch.generator
    anchor, positive = _anchors(identity)
    negative = _random_negative(identity, [anchor], generator)
    per_triplet = loss(x[anchor], x[positive], x[negative], reduction="none")
    return per_triplet.mean(), _active(per_triplet)


def quadruplets(loss: LossFunction, batch: Batch) -> LossAndActive:
    """Triplets, each with a second negative of a third identity."""
    x, identity, generator = batch.x, batch.identity, batch.generator
    anchor, positive = _anchors(identity)
    negative = _random_negative(identity, [anchor], generator)
    negative2 = _random_negative(identity, [anchor, negative], generator)
    rows = (x[anchor], x[positive], x[negative], x[negative2])
    per_quadruplet = loss(*rows, reduction="none")
    return per_quadruplet.mean(), _active(per_quadruplet)


def item_against_item(loss: LossFunction, batch: Batch) -> LossAndActive:
    """One item of each identity as query, another as positive; further items make more such rows.

    Each identity occurs once per set of rows, so that the positives of other rows are true
    negatives. Identities with a single item are left out.
    """
    columns, _ = _columns(batch.identity)
    return _each_pair_of(loss, batch.x, columns)


def item_against_all(loss: LossFunction, batch: Batch) -> LossAndActive:
    """As `item_against_item`; single items are additional negatives for every query."""
    columns, alone = _columns(batch.identity)
    if len(alone):
        loss = partial(loss, hard_negatives=batch.x[alone])
    return _each_pair_of(loss, batch.x, columns)


def item_against_classes(loss: LossFunction, batch: Batch) -> LossAndActive:
    """Classify each item by its cosines to the proxies of all training identities."""
    assert batch.proxies is not None
    scores = unit(batch.x) @ unit(batch.proxies).T
    per_item = loss(scores, batch.identity, reduction="none")
    return per_item.mean(), _active(per_item)


def given_pairs(loss: LossFunction, x1: Tensor, x2: Tensor, similar: Tensor) -> LossAndActive:
    """The given pairs; batches hold as many similar as dissimilar ones."""
    degrees = {"similar_label": 1} if similar.is_floating_point() else {}
    per_pair = loss(x1, x2, similar, reduction="none", **degrees)
    return per_pair.mean(), _active(per_pair)


def similar_pairs(loss: LossFunction, x1: Tensor, x2: Tensor, similar: Tensor) -> LossAndActive:
    """Given similar pairs; the second items of the other rows are the negatives."""
    per_query = loss(x1, x2, reduction="none")
    return per_query.mean(), _active(per_query)


def of_cosines(loss: LossFunction) -> LossFunction:
    """A loss of scores as one of cosines, which could not approach 0 without a temperature."""

    @wraps(loss)
    def scaled(cosines: Tensor, target: Tensor, *, temperature: float, **settings: Any) -> Tensor:
        return loss(cosines / temperature, target, **settings)

    return scaled


# The forms by the kind of data that a loss takes ...
FORMS: Mapping[Data, Callable[..., Objective]] = {
    "batch": partial(Objective, from_batch=whole_batch),
    "towers": partial(
        Objective, from_batch=item_against_item, from_pairs=similar_pairs, similar_only=True
    ),
    "proxies": partial(Objective, from_batch=against_proxies, proxies=True),
}
# ... and of losses of rows, by the names of their arguments.
ROW_FORMS: Mapping[tuple[str, ...], Callable[..., Objective]] = {
    ("x1", "x2", "y"): partial(Objective, from_batch=every_pair, from_pairs=given_pairs),
    ("anchor", "positive", "negative"): partial(Objective, from_batch=triplets),
    ("anchor", "positive", "negative", "negative2"): partial(Objective, from_batch=quadruplets),
    ("logits", "target"): partial(Objective, from_batch=item_against_classes, proxies=True),
}


def _formed(listed: registry.Loss, hyperparameters: Mapping[str, Setting]) -> Objective:
    """How a loss of the list is trained."""
    loss: LossFunction = getattr(nearfar, listed.function)
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
    """The objectives of all losses in `DEFAULTS`, in the same order."""
    listed = {loss.name: loss for loss in registry.LOSSES}
    return {name: _formed(listed[name], settings) for name, settings in DEFAULTS.items()}


OBJECTIVES = _objectives()


class WithProxies(nn.Module):
    """An embedder together with the proxies that a loss learns for the training identities.

    The proxies are not part of the verifier: only the embedder is saved with the run.
    """

    def __init__(self, embedder: Embedder, n_proxies: int) -> None:
        super().__init__()
        self.embedder = embedder
        # Short vectors: only their direction matters, and a long one turns slowly.
        directions = unit(torch.randn(n_proxies, embedder.embedding_dim))
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
    """A sentence for errors: which losses have this hyperparameter; empty if none has."""
    having = [name for name, o in OBJECTIVES.items() if key in o.hyperparameters]
    return f" {key!r} belongs to: {', '.join(having)}." if having else ""


def resolve(name: str, given: Mapping[str, Setting]) -> dict[str, Setting]:
    """All hyperparameters of a loss: the given ones, and defaults for the rest.

    Raises:
        InputError: the loss has no such hyperparameter, or refuses its value.
    """
    chosen = objective(name)
    for key in given:
        if key not in chosen.hyperparameters:
            has = ", ".join(chosen.hyperparameters)
            raise InputError(f"the {name} loss has no {key!r}; it has: {has}.{belonging(key)}")
    settings = {**chosen.hyperparameters, **given}
    try:  # the loss knows its ranges best; six items of three identities suit every form
        if "distance" in settings:
            check_euclidean(settings["distance"], "the tool compares embeddings")  # type: ignore[arg-type]
        identity = torch.arange(6) // 2
        batch = Batch(torch.eye(6, 3), identity, torch.Generator(), torch.eye(3))
        chosen.from_batch(partial(chosen.loss, **settings), batch)
    except (TypeError, ValueError) as error:
        raise InputError(f"the {name} loss refuses its hyperparameters: {error}") from None
    return settings


def verifier_distance(name: str, hyperparameters: Mapping[str, Setting]) -> Distance:
    """The distance by which the trained loss compares embeddings."""
    return hyperparameters.get("distance", "cosine")  # type: ignore[return-value]


def _columns(identity: Tensor) -> tuple[Sequence[Tensor], Tensor]:
    """K columns of rows, each with one item of every identity; and the rows of single items."""
    counts = torch.bincount(identity)[identity]
    rows = (counts > 1).nonzero()[:, 0]
    order = rows[identity[rows].argsort(stable=True)]
    return order.view(-1, int(counts.max())).unbind(1), (counts == 1).nonzero()[:, 0]


def _each_pair_of(loss: LossFunction, x: Tensor, columns: Sequence[Tensor]) -> LossAndActive:
    """Items of the first column as queries for the second, of the third for the fourth, ..."""
    per_query = torch.cat(
        [
            loss(x[query], x[positive], reduction="none")
            for query, positive in zip(columns[::2], columns[1::2], strict=False)
        ]
    )
    return per_query.mean(), _active(per_query)


def _anchors(identity: Tensor) -> tuple[Tensor, Tensor]:
    """Every ordered pair (anchor, positive), each `NEGATIVES` times."""
    match = identity[:, None] == identity[None, :]
    match.fill_diagonal_(False)
    anchor, positive = match.nonzero().repeat_interleave(NEGATIVES, dim=0).unbind(1)
    return anchor, positive


def _random_negative(identity: Tensor, of: list[Tensor], generator: torch.Generator) -> Tensor:
    """For each row, a random item whose identity differs from those of all `of` rows."""
    eligible = torch.ones(len(of[0]), len(identity), dtype=torch.bool, device=identity.device)
    for rows in of:
        eligible &= identity[rows][:, None] != identity[None, :]
    draw = torch.rand(eligible.shape, generator=generator).to(identity.device)
    return draw.masked_fill(~eligible, -1).argmax(1)


def _active(per_row: Tensor) -> Tensor:
    return (per_row.detach() > 0).float().mean()
