"""Use a trained run: measure it, compare two items, embed data."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nearfar.app.data.address import read_item
from nearfar.app.data.content import Content
from nearfar.app.data.items import Items, Pairs, items_of, read_data
from nearfar.app.data.pairs import doubtful
from nearfar.app.errors import InputError
from nearfar.app.output import whole_file
from nearfar.app.train.compare import Comparison, compare
from nearfar.app.train.measure import embed, embed_items, measure
from nearfar.app.train.prepare import read_configured, split_data
from nearfar.app.train.record import n_learned_from
from nearfar.app.train.run import Run, read_run, refuse_inside, refuse_inside_run
from nearfar.distance import Distance, between_rows


@dataclass(frozen=True)
class Decision:
    """Whether two items are the same.

    Attributes:
        same: whether their distance is at most the threshold.
        distance: the distance of their embeddings.
        threshold: the threshold of the run.
        far: the false-accept rate at which the threshold was fitted.
        measure: the name of the distance.
        likelihood_ratio: how many times as likely such a distance is for same pairs as for
            different ones; None if the run is older than that.
        at_limit: whether it would be further from 1 if there were more calibration identities.
        prior: the share of same pairs that the user expects; None: not told.
        probability: of "same" at that prior.
    """

    same: bool
    distance: float
    threshold: float
    far: float
    measure: Distance
    likelihood_ratio: float | None
    at_limit: bool
    prior: float | None
    probability: float | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def render(self) -> list[str]:
        """For a terminal."""
        return [
            f"{'same' if self.same else 'different'}: {self.measure} distance {self.distance:.4f} "
            f"{'<=' if self.same else '>'} threshold {self.threshold:.4f}, fitted to accept "
            f"{self.far:.3g} of different pairs",
            *filter(None, [self._evidence(), self._doubt(), self._belief()]),
        ]

    def _evidence(self) -> str:
        ratio = self.likelihood_ratio
        if ratio is None:
            return "no likelihood ratio: the run was trained by an older nearfar; train again"
        one, other = ("same", "different") if ratio >= 1 else ("different", "same")
        times = max(ratio, 1 / ratio)
        shown = f"{times:,.0f}" if times >= 10 else f"{times:.2g}"
        return (
            f"such a distance is {'at least ' * self.at_limit}{shown} times as likely for {one} "
            f"pairs as for {other} ones"
        )

    def _doubt(self) -> str:
        """A threshold that accepts what the evidence speaks against is too loose."""
        if not self.same or self.likelihood_ratio is None or self.likelihood_ratio >= 1:
            return ""
        return (
            "so the evidence speaks against the threshold, which lies where same pairs are rarer: "
            "it was fitted on too few pairs, or at a high false-accept rate; see nearfar doctor"
        )

    def _belief(self) -> str:
        if self.prior is None or self.probability is None:
            return ""
        # Rounded to 1, it would claim to be certain.
        shown = f"{self.probability:.4g}" if self.probability <= 0.9999 else "above 0.9999"
        return (
            f'probability of "same": {shown}, if {self.prior} of the pairs you compare are the same'
        )


def verify_items(path: Path, a: str, b: str, prior: float | None) -> Decision:
    """Compare the items at two addresses; see `address.read_item`.

    Args:
        path: the run folder.
        a: the address of one item.
        b: that of the other.
        prior: the share of same pairs; None: no probability is given.
    """
    run = read_run(path)
    if prior is not None and run.probability is None:
        raise InputError(f"--prior needs a probability. {_without_probability(path)}")
    x1, x2 = embed_addresses(run, [a, b]).chunk(2)
    return decide(run, float(between_rows(x1, x2, run.distance)), prior)


def embed_addresses(run: Run, addresses: Sequence[str]) -> Tensor:
    """(n, d) embeddings of the items at these addresses; see `address.read_item`.

    Raises:
        InputError: an item cannot be read, or its embedding is not finite.
    """
    return embed_read(run, [read_item(address, run.embedder.reads) for address in addresses])


def embed_read(run: Run, items: Sequence[Content]) -> Tensor:
    """(n, d) embeddings of items that were read one by one.

    Raises:
        InputError: an embedding is not finite.
    """
    x = torch.cat([embed(run.embedder, item) for item in items])
    if not x.isfinite().all():
        raise InputError(
            f"the network of {run.path} returns NaN or infinity for these items. Check them for "
            "huge numbers; or train again."
        )
    return x


def decide(run: Run, distance: float, prior: float | None) -> Decision:
    """Whether two items at this distance are the same, and how likely.

    Args:
        run: the run.
        distance: that of their embeddings.
        prior: the share of same pairs; None: no probability is given.
    """
    threshold = run.thresholds.learned
    ratio, at_limit, probability = None, False, None
    if run.probability is not None:
        ratio = run.probability.likelihood_ratio([distance]).item()
        at_limit = any(isclose(ratio, limit) for limit in run.probability.limits)
        if prior is not None:
            probability = replace(run.probability, prior=prior)([distance]).item()
    return Decision(
        distance <= threshold,
        distance,
        threshold,
        run.thresholds.far,
        run.distance,
        ratio,
        at_limit,
        prior,
        probability,
    )


def evaluate_run(
    path: Path,
    source: str | None,
    *,
    similar_label: int | None = None,
    identity_depth: int | None = None,
) -> tuple[Comparison, list[str]]:
    """The figures of a run, and notes about them for the user.

    Args:
        path: the run folder.
        source: the data to measure on, all of it; None for the test identities of the run.
        similar_label: for a table of pairs with numeric labels.
        identity_depth: for a folder, the depth of the subfolders that are identities.

    Raises:
        InputError: the run or the data cannot be used, or the run's own data has changed.
    """
    run = read_run(path)
    if source is None and similar_label is not None:
        raise InputError("--similar-label is for a table given as DATA; the run has its own.")
    if source is None and identity_depth is not None:
        raise InputError("--identity-depth is for a folder given as DATA; the run has its own.")
    if source is None:
        data = _own_data(run)
        return _measure(run, data, _tested(run, data)), _notes_of(run)
    data = read_data(
        source,
        run.embedder.reads,
        similar_label=similar_label,
        identity_depth=identity_depth,
    )
    _refuse_unmeasurable(source, data)
    found = _measure(run, data, torch.arange(len(items_of(data).identities)))
    notes = [*items_of(data).notes, doubtful(data) if isinstance(data, Pairs) else ""]
    return found, [*filter(None, notes), *_notes_of(run), *_optimism_notes(run, source, data)]


@dataclass(frozen=True)
class Embedded:
    """What `embed_data` wrote.

    Attributes:
        n: the number of items.
        d: the dimensions of an embedding.
        labelled: whether the identities are known.
        notes: notes for the user about how the data were read.
    """

    n: int
    d: int
    labelled: bool
    notes: Sequence[str]


def embed_data(
    path: Path, source: str, out: Path, *, overwrite: bool, identity_depth: int | None = None
) -> Embedded:
    """Write the embeddings of all items of some data as .npz.

    The file holds `x` (n, d), `names` (n,), and the identities `y` (n,) if they are known.
    """
    if out.suffix.lower() != ".npz":
        raise InputError(f"--out {out} must end in .npz.")
    refuse_inside(out, source)
    refuse_inside_run(out)
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists. Choose another --out, or add --overwrite to replace it.")
    items, x = embedded(read_run(path), source, identity_depth=identity_depth)
    arrays = {"x": x.numpy(), "names": np.array(items.names)}
    if bool((items.identity >= 0).all()):
        arrays["y"] = np.array(items.identities)[items.identity.numpy()]
    with whole_file(out) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    n, d = arrays["x"].shape
    return Embedded(n, d, "y" in arrays, items.notes)


def embedded(
    run: Run, source: str, *, labelled: bool = False, identity_depth: int | None = None
) -> tuple[Items, Tensor]:
    """The items of some data, and their embeddings, (n, d).

    Args:
        run: the run.
        source: the data.
        labelled: whether the identities must be known.
        identity_depth: for a folder, the depth of the subfolders that are identities.

    Raises:
        InputError: the data cannot be used, or an embedding is not finite.
    """
    data = read_data(
        source,
        run.embedder.reads,
        labelled=labelled,
        identity_depth=identity_depth,
    )
    items = items_of(data)
    return items, embed_items(run.embedder, items, torch.arange(len(items.names)))


def _notes_of(run: Run) -> list[str]:
    return [] if run.probability else [_without_probability(run.path)]


def _without_probability(path: Path) -> str:
    return (
        f'{path} has no probability of "same": it was trained by an older nearfar. Train again: '
        f"nearfar train --config {path}/config.toml --out NEW"
    )


def _own_data(run: Run) -> Items | Pairs:
    config = run.config
    try:
        # As the run read them: a newer library may say otherwise of its network.
        pretrained = run.embedder.pretrained
        data = read_configured(config, run.embedder.reads if pretrained else None)
    except InputError as error:
        raise InputError(
            f"{run.path} was trained on {config.data}: {error} A relative path starts at the "
            "current folder: run this from the folder where the run was trained."
        ) from None
    shape = items_of(data).content.shape
    if shape != run.embedder.reads.shape:
        raise InputError(
            f"{config.data} holds items of shape {shape}, but the network of {run.path} takes "
            f"{run.embedder.reads.shape}: one of them has changed. Train again."
        )
    if data.digest() != run.summary["data"]["sha256"]:
        raise InputError(
            f"{config.data} has changed since {run.path} was trained on it, so its test identities "
            f"are no longer known. Name the data to measure all of it: nearfar evaluate "
            f"{run.path} DATA"
        )
    return data


def _tested(run: Run, data: Items | Pairs) -> Tensor:
    """The test identities as the run recorded them, since a later version may split differently."""
    number = {name: i for i, name in enumerate(items_of(data).identities)}
    tested = run.summary["split"]["test"]
    if all(name in number for name in tested):
        return torch.tensor([number[name] for name in tested])
    return split_data(data, run.config).test  # identities have been renamed


def _optimism_notes(run: Run, source: str, data: Items | Pairs) -> list[str]:
    """A note if the run may have seen the data: the whole, some items, or names of identities."""
    if data.digest() == run.summary["data"]["sha256"]:
        return [
            f"{run.path} was trained on {source}, so these figures flatter it; "
            f"`nearfar evaluate {run.path}` measures the identities it has not seen."
        ]
    items = items_of(data)
    known = n_learned_from(run.path, items.content.fingerprints())
    if known:
        return [
            f"{run.path} has learned from {known:,} of the {len(items.names):,} items of {source}, "
            "which are identical bit for bit, so these figures flatter it. Evaluate on others."
        ]
    split = run.summary["split"]
    names = {*split["train"], *split["calibration"]}.intersection(items.identities)
    if names and not isinstance(data, Pairs):  # whose identities are only numbered
        return [
            f"{len(names):,} of the {len(items.identities):,} identities of {source} have names "
            f"that {run.path} has learned from ({min(names)!r}); if they are the same identities, "
            "these figures flatter it. Evaluate on others."
        ]
    return []


def _measure(run: Run, data: Items | Pairs, identities: Tensor) -> Comparison:
    found = measure(
        run.embedder,
        data,
        identities,
        distance=run.distance,
        raw_distance=run.thresholds.raw_distance,
        seed=run.config.seed,
    )
    return compare(found, run.thresholds, run.probability)


def _refuse_unmeasurable(source: str, data: Items | Pairs) -> None:
    """Refuse data without similar or without dissimilar pairs."""
    if isinstance(data, Pairs):
        similar = data.is_similar()[data.items.comparable(data.a, data.b)]
        n_similar, n_dissimilar = int(similar.sum()), int((~similar).sum())
    else:
        n_similar, n_dissimilar = int(data.can_be_similar().sum()), len(data.identities) - 1
    of = " of items of different groups" * (items_of(data).groups is not None)
    if not n_similar:
        raise InputError(f"{source} has no similar pairs{of} to measure on. Add some.")
    if not n_dissimilar:
        raise InputError(f"{source} has no dissimilar pairs{of} to measure on. Add some.")
