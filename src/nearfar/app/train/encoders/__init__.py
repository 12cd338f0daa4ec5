"""Networks from items to embeddings of length 1, by the name that --encoder gives."""

from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from nearfar.app.data.reads import Reads
from nearfar.app.errors import InputError
from nearfar.app.names import AUTO, PRETRAINED, is_pretrained
from nearfar.app.train.config import TrainConfig
from nearfar.app.train.encoders.builtin import ConvNet, mlp
from nearfar.app.train.encoders.embedder import Embedder
from nearfar.app.train.encoders.own import checked, find

__all__ = ["Embedder", "build", "load_folder", "reads_of", "save_folder"]
SMALLEST_SIDE = 4


class Library(Protocol):
    """A module that uses a library of pretrained networks."""

    def reads(self, config: TrainConfig) -> Reads:
        """What the network of this config reads."""

    def build(self, config: TrainConfig, reads: Reads, *, weights: bool) -> Embedder:
        """The network of this config, with its pretrained weights or without any."""


class SavesItself(Library, Protocol):
    """A module whose library writes a network as a folder that it opens by itself."""

    def save(self, embedder: Embedder, folder: Path) -> None:
        """Write the folder."""

    def load(self, folder: Path) -> Embedder:
        """The network that a folder holds."""


def reads_of(config: TrainConfig) -> Reads:
    """What the encoder of a config reads, as far as it is known before the data are read.

    Raises:
        InputError: there is no such pretrained network, or its library is missing.
    """
    if is_pretrained(config.encoder):
        return _library(config.encoder).reads(config)
    return Reads(image_size=config.image_size)


def build(config: TrainConfig, reads: Reads, *, weights: bool = True) -> Embedder:
    """The encoder of a config.

    Args:
        config: the config.
        reads: what it reads.
        weights: whether a pretrained network has its weights already; a run brings its own.

    Raises:
        InputError: the encoder does not exist or fails, or does not map (n, *shape) to
            (n, embedding_dim).
    """
    if is_pretrained(config.encoder):
        return _library(config.encoder).build(config, reads, weights=weights)
    shape, embedding_dim = reads.shape, config.embedding_dim
    assert shape is not None
    assert embedding_dim is not None  # its default depends on the encoder
    if config.encoder != AUTO:
        factory = find(config.encoder)
        return Embedder(
            checked(config.encoder, factory, shape, embedding_dim), reads, embedding_dim
        )
    if len(shape) == 1:
        return Embedder(mlp(shape, embedding_dim), reads, embedding_dim)
    if min(shape[1:]) < SMALLEST_SIDE:
        raise InputError(
            f"images of {shape[1]} x {shape[2]} are too small for the built-in "
            f"network, which needs {SMALLEST_SIDE} x {SMALLEST_SIDE}. Pass them as vectors."
        )
    return Embedder(ConvNet(shape, embedding_dim), reads, embedding_dim)


def save_folder(embedder: Embedder, config: TrainConfig, folder: Path) -> None:
    """Write a network that saves itself; see `names.saves_itself`."""
    cast(SavesItself, _library(config.encoder)).save(embedder, folder)


def load_folder(config: TrainConfig, folder: Path) -> Embedder:
    """The network in a folder that `save_folder` wrote.

    Raises:
        InputError: it cannot be used.
    """
    return cast(SavesItself, _library(config.encoder)).load(folder)


def _library(encoder: str) -> Library:
    return cast(Library, import_module(PRETRAINED[encoder.partition(":")[0]]))
