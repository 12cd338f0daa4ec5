"""What a run begins with: its data, read and split, and a new network."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from nearfar.app.data.drop import NOTHING, read_drop
from nearfar.app.data.items import Items, Pairs, items_of, read_data
from nearfar.app.data.pairs import doubtful
from nearfar.app.data.reads import Reads
from nearfar.app.errors import InputError
from nearfar.app.names import is_pretrained
from nearfar.app.train.config import TrainConfig
from nearfar.app.train.config_file import to_toml
from nearfar.app.train.encoders import Embedder, build, reads_of
from nearfar.app.train.objectives import OBJECTIVES, objective
from nearfar.app.train.run import (
    refuse_inside,
    refuse_inside_run,
)
from nearfar.app.train.split import (
    Split,
    split_items,
    split_pairs,
)
from nearfar.app.train.task import Task
from nearfar.app.train.words import data_in_words, split_in_words


def read_task(config: TrainConfig, say: Callable[..., None]) -> Task:
    """Read and split the data, and refuse a loss that they cannot train."""
    if is_pretrained(config.encoder):
        build(config, reads_of(config))  # weights that are missing must show before data are read
    say(f"reading {config.data}")
    data = read_configured(config)
    split = split_data(data, config)
    task = Task(config, objective(config.loss), data, split)
    _refuse_unsuitable(task)
    say(f"  {data_in_words(data)}")
    for note in items_of(data).notes:
        say(f"note: {note}", style="yellow")
    if isinstance(data, Pairs) and (note := doubtful(data)):
        say(f"note: {note}", style="yellow")
    say(f"  {split_in_words(data, split, config.single)}")
    return task


def refuse_unwritable(config: TrainConfig, out: Path) -> None:
    """Refuse, before training, what could not be written afterwards."""
    try:
        to_toml(config).encode()
    except UnicodeEncodeError:
        raise InputError(f"{config.data!r} is not valid text: rename it.") from None
    refuse_inside(out, config.data)
    refuse_inside_run(out)


def read_configured(config: TrainConfig, reads: Reads | None = None) -> Items | Pairs:
    """The data named by a config, for a new network or for what one `reads`."""
    return read_data(
        config.data,
        reads or reads_of(config),
        similar_label=config.similar_label,
        identity_depth=config.identity_depth,
        drop=NOTHING if config.drop is None else read_drop(Path(config.drop)),
    )


def split_data(data: Items | Pairs, config: TrainConfig) -> Split:
    """The split that a config determines."""
    shares = {"calibration": config.calibration_share, "test": config.test_share}
    if isinstance(data, Items):
        return split_items(data, **shares, seed=config.seed, single=config.single)
    if config.single is not None:
        raise InputError(
            f"--single is for data with identities, but {config.data} holds pairs, where an item "
            "without a similar pair is a dissimilar example anyway. Leave the option out."
        )
    return split_pairs(data, **shares, seed=config.seed)


def make_embedder(config: TrainConfig, items: Items, split: Split) -> Embedder:
    """A new network that standardises its input by the training items."""
    embedder = build(config, replace(reads_of(config), shape=items.content.shape))
    if embedder.pretrained:
        return embedder
    rows = torch.isin(items.identity, split.train).nonzero()[:, 0]
    embedder.standardise(*items.content.moments(rows))
    return embedder


def _refuse_unsuitable(task: Task) -> None:
    """Refuse a loss that this data cannot train."""
    config, chosen, split = task.config, task.objective, task.split
    if isinstance(task.data, Pairs) and chosen.from_pairs is None:
        able = ", ".join(name for name, other in OBJECTIVES.items() if other.from_pairs)
        raise InputError(
            f"--loss {config.loss} needs to know which items share an identity, but {config.data} "
            f"only says which pairs are similar. Use --loss {able}; or give a folder or .npz."
        )
    if chosen.fewest_identities > len(split.train):
        raise InputError(
            f"--loss {config.loss} needs {chosen.fewest_identities} training identities, but "
            f"{config.data} leaves {len(split.train)}. Add some."
        )
    if chosen.fewest_identities > config.identities:
        raise InputError(
            f"--loss {config.loss} needs {chosen.fewest_identities} identities in a batch, but "
            f"--identities is {config.identities}. Raise it."
        )
