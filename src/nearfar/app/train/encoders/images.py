"""Pretrained networks for images: `timm:NAME` and `torchvision:NAME`."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from nearfar.app.data.fit import Fit, Resample
from nearfar.app.data.reads import Reads
from nearfar.app.errors import InputError
from nearfar.app.names import FROM_LIBRARY, RANDOM
from nearfar.app.train.config import TrainConfig
from nearfar.app.train.encoders.embedder import Embedder
from nearfar.app.train.encoders.weights import checksum, load_file
from nearfar.extras import needs

_SOURCES = {
    "timm": "nearfar.app.train.encoders.from_timm",
    "torchvision": "nearfar.app.train.encoders.from_torchvision",
}


@dataclass(frozen=True)
class Described:
    """What a library says about a network, and about its pretrained weights.

    Attributes:
        side: of its square images.
        resized: the side to which the image is resized before its centre is cut out.
        keeps_shape: whether only the shorter side is.
        resample: how pixels are weighted.
        mean: of each channel, for pixels from 0 to 1.
        deviation: likewise.
        licence: of the weights; empty if it is not stated.
        version: of the library.
    """

    side: int
    resized: int
    keeps_shape: bool
    resample: Resample
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    licence: str
    version: str


class Source(Protocol):
    """A module for one library."""

    def describe(self, name: str) -> Described:
        """The network of this name.

        Raises:
            InputError: there is none, or it cannot be used.
        """

    def make(self, name: str, side: int, *, pretrained: bool) -> tuple[nn.Module, tuple[str, ...]]:
        """The network from images to features, and the names of the classifiers it is without.

        Raises:
            Exception: of any kind, if it takes no such images or its weights cannot be had.
        """


def reads(config: TrainConfig) -> Reads:
    """What the network of this config reads: images as it was evaluated on."""
    source, name = _source(config)
    network = source.describe(name)
    side = config.image_size or network.side
    fit = Fit(
        side,
        side,
        channels=3,
        resample=network.resample,
        resized=side * network.resized // network.side,
        keeps_shape=network.keeps_shape,
    )
    return Reads(shape=(3, side, side), own_fit=fit)


def build(config: TrainConfig, reads: Reads, *, weights: bool) -> Embedder:
    """The network of this config, with its pretrained weights or without any."""
    source, name = _source(config)
    network = source.describe(name)
    assert reads.shape is not None
    side = reads.shape[1]
    wanted = (config.weights or FROM_LIBRARY) if weights else RANDOM
    encoder, classifiers = _made(source, config, side, pretrained=wanted == FROM_LIBRARY)
    encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on a CPU
    if wanted not in (FROM_LIBRARY, RANDOM):
        load_file(encoder, classifiers, wanted, config.encoder)
    features = _features(encoder, config, side)
    head = None
    if config.embedding_dim is not None or config.freeze:
        head = nn.Linear(features, config.embedding_dim or features, bias=False)
        nn.init.orthogonal_(head.weight)
    embedder = Embedder(
        encoder,
        reads,
        config.embedding_dim or features,
        head=head,
        pretrained=True,
        origin=_origin(config, network, encoder) if weights else {},
    )
    embedder.standardise(torch.tensor(network.mean), torch.tensor(network.deviation))
    return embedder


def _source(config: TrainConfig) -> tuple[Source, str]:
    library, _, name = config.encoder.partition(":")
    try:
        with needs("vision"):
            import_module(library)
    except (ImportError, RuntimeError, OSError) as error:  # missing, or not made for this torch
        raise InputError(f"--encoder {config.encoder}: {error}") from None
    return cast(Source, import_module(_SOURCES[library])), name


def _made(
    source: Source, config: TrainConfig, side: int, *, pretrained: bool
) -> tuple[nn.Module, tuple[str, ...]]:
    _, name = _source(config)
    try:
        return source.make(name, side, pretrained=pretrained)
    except InputError:
        raise
    except Exception as error:  # libraries raise any kind without a network
        if not pretrained:
            raise _misfit(config, side, error) from None
        raise InputError(
            f"the weights of {config.encoder} are not in the cache and cannot be downloaded "
            f"({_first_line(error)}). Give them as a file, --weights FILE; or start from --weights "
            f"{RANDOM}."
        ) from None


def _features(encoder: nn.Module, config: TrainConfig, side: int) -> int:
    """How many features the network has of an image; a try on two grey ones."""
    try:
        with torch.no_grad():
            found: Tensor = encoder.eval()(torch.zeros(2, 3, side, side))
            _, features = found.shape
    except Exception as error:  # almost any kind
        raise _misfit(config, side, error) from None
    encoder.train()
    return features


def _misfit(config: TrainConfig, side: int, error: Exception) -> InputError:
    advice = "Leave out --image-size." if config.image_size else "Choose another network."
    return InputError(
        f"--encoder {config.encoder} cannot make features of images of {side} x {side}: "
        f"{_first_line(error)} {advice}"
    )


def _origin(config: TrainConfig, network: Described, encoder: nn.Module) -> Mapping[str, str]:
    """Where the network comes from, for the summary of the run."""
    assert config.weights is not None  # its default depends on the encoder
    licence = {FROM_LIBRARY: network.licence, RANDOM: "none needed"}.get(config.weights, "")
    return {
        "name": config.encoder,
        "library": network.version,
        "weights": config.weights,
        "weights_sha256": checksum(encoder),
        "licence": licence or "not stated",
    }


def _first_line(error: Exception) -> str:
    text = " ".join((str(error).strip() or type(error).__name__).splitlines()[0].split())
    return text if text.endswith(".") else f"{text}."
