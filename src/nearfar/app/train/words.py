"""What training says of its data, its network and its figures."""

from lightning_fabric import Fabric
from torch import nn

from nearfar.app.data.items import Items, Pairs, items_of
from nearfar.app.names import KEEP
from nearfar.app.train.config import TrainConfig
from nearfar.app.train.encoders import Embedder
from nearfar.app.train.measure import MeasuredPairs
from nearfar.app.train.split import (
    Split,
    rows_within,
    singles,
)


def data_in_words(data: Items | Pairs) -> str:
    items = items_of(data)
    content = items.content
    words = f"{len(content):,} {content.in_words()}, {len(items.identities):,} identities"
    if isinstance(data, Pairs):
        n_similar = int(data.is_similar().sum())
        words += f", {n_similar:,} similar and {len(data.a) - n_similar:,} dissimilar pairs"
    return words


def split_in_words(data: Items | Pairs, split: Split, single: str | None) -> str:
    sides = (split.train, split.calibration, split.test)
    words = "identities split into {} to train, {} to calibrate, {} to test".format(
        *map(len, sides)
    )
    if (of := items_of(data).split_groups) is not None:
        names = sorted({of[int(i)] for i in split.test} - {""})
        words += f" (test: {', '.join(names[:10])}{', ...' * (len(names) > 10)})"
    if isinstance(data, Items) and (n := int(singles(data).sum())):
        does = "serve as dissimilar examples" if single == KEEP else "are left out"
        words += f"; {n:,} with a single item {does}"
    if isinstance(data, Pairs):
        dropped = len(data.a) - sum(len(rows_within(data, side)) for side in sides)
        words += f"; {dropped:,} dissimilar pairs across two sides are left out"
        if n := int((~data.items.comparable(data.a, data.b)).sum()):
            words += f"; {n:,} pairs within one group are never measured"
    return words


def network_in_words(embedder: Embedder) -> str:
    origin = embedder.origin
    return (
        f"{origin['name']} of {origin['library']}, weights: {origin['weights']} (licence: "
        f"{origin['licence']}); images {embedder.reads.fit.in_words()}; embeddings of "
        f"{embedder.embedding_dim} dimensions"
        + (", by a new last layer" if isinstance(embedder.head, nn.Linear) else ", its features")
    )


def task_in_words(
    config: TrainConfig, embedder: Embedder, data: Items | Pairs, split: Split, fabric: Fabric
) -> str:
    settings = ", ".join(f"{k} {v}" for k, v in config.hyperparameters.items())
    size = sum(p.numel() for p in embedder.parameters())
    if isinstance(data, Pairs):
        batch = f"at most {config.identities * config.items // 2} pairs"
    else:
        several = int((~singles(data)[split.train]).sum())
        batch = f"{min(config.identities, several)} identities x {config.items} items"
        if several < len(split.train):
            batch += f" and up to {config.identities} single items"
    return (
        f"{size:,} parameters on {fabric.device} with the {config.loss} loss ({settings}): "
        f"{config.steps} steps of {batch}"
    )


def threshold_in_words(threshold: float, far: float, n_trials: int) -> str:
    words = f"same up to distance {threshold:.4f}: at most {far:.3g} of dissimilar pairs"
    if far * n_trials < 1:
        pairs = "pair of identities is" if n_trials == 1 else "pairs of identities are"
        words += f" ({n_trials:,} {pairs} too few to estimate such a rate)"
    return words


def pairs_in_words(measured: MeasuredPairs) -> str:
    pairs = measured.learned
    words = f"{pairs.n_similar:,} similar and {pairs.n_dissimilar:,} dissimilar pairs"
    if measured.n_left_out:
        n = len(measured.items)
        words += f" of {n:,} items, drawn from {n + measured.n_left_out:,}"
    return words
