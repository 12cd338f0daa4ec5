"""Networks from items to embeddings of length 1."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from nearfar.app.errors import InputError
from nearfar.distance import unit

AUTO = "auto"
SMALLEST_SIDE = 4
Factory = Callable[[tuple[int, ...], int], nn.Module]


class Embedder(nn.Module):
    """An encoder whose input is standardised and whose output is scaled to length 1.

    The mean and standard deviation of the training items, one number per channel or column, are
    saved as part of the model.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, encoder: nn.Module, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder = encoder
        self.input_shape = input_shape
        shape = (input_shape[0], *[1] * (len(input_shape) - 1))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("deviation", torch.ones(shape))

    def standardise(self, x: Tensor) -> None:
        """Set the mean and deviation to those of training items, (n, *input_shape)."""
        axes = [0, *range(2, x.ndim)]
        deviation, mean = torch.std_mean(x, axes, correction=0)
        self.mean.copy_(mean.view_as(self.mean))
        # A constant column has deviation 0 up to rounding; it is not scaled.
        constant = deviation <= 1e-6 * mean.abs()
        self.deviation.copy_(deviation.masked_fill(constant, 1).view_as(self.deviation))

    def forward(self, x: Tensor) -> Tensor:
        """(n, *input_shape) to (n, embedding_dim)."""
        embedding: Tensor = self.encoder((x - self.mean) / self.deviation)
        return unit(embedding)


class ConvNet(nn.Module):
    """3 x 3 convolutions that each halve the image, down to about 2 x 2; then a linear layer."""

    def __init__(self, input_shape: tuple[int, ...], embedding_dim: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        blocks: list[nn.Module] = []
        for out in _widths(min(height, width)):
            # Pooling first leaves a quarter of the work for the normalisation.
            blocks += [
                nn.Conv2d(channels, out, 3, padding=1, bias=False),
                nn.MaxPool2d(2),
                nn.BatchNorm2d(out),
                nn.ReLU(inplace=True),
            ]
            channels, height, width = out, height // 2, width // 2
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels * height * width, embedding_dim)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast on a CPU

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) to (n, embedding_dim)."""
        features = self.blocks(x.contiguous(memory_format=torch.channels_last))
        embedding: Tensor = self.head(features.flatten(1))
        return embedding


def mlp(input_shape: tuple[int, ...], embedding_dim: int) -> nn.Module:
    """A network with two hidden layers."""
    width = min(max(2 * input_shape[0], 64), 512)
    return nn.Sequential(
        nn.Linear(input_shape[0], width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, embedding_dim),
    )


def build(name: str, input_shape: tuple[int, ...], embedding_dim: int) -> Embedder:
    """The encoder of this name: "auto" for one that suits the input, or package.module:factory.

    Raises:
        InputError: the factory does not exist or fails, or its network does not map
            (n, *input_shape) to (n, embedding_dim).
    """
    if name != AUTO:
        factory = _find(name)
    elif len(input_shape) == 1:
        factory = mlp
    elif min(input_shape[1:]) < SMALLEST_SIDE:
        raise InputError(
            f"images of {input_shape[1]} x {input_shape[2]} are too small for the built-in "
            f"network, which needs {SMALLEST_SIDE} x {SMALLEST_SIDE}. Pass them as vectors."
        )
    else:
        factory = ConvNet
    if name == AUTO:
        return Embedder(factory(input_shape, embedding_dim), input_shape)
    return _checked(name, factory, input_shape, embedding_dim)


def _widths(side: int) -> list[int]:
    """Channels of each block: 32 pixels take 4 blocks, 64 take 5."""
    n_blocks = max(side.bit_length() - 2, 1)
    return [32, 64, 128, 128, *[128] * n_blocks][:n_blocks]


def _find(name: str) -> Factory:
    module_name, _, factory_name = name.partition(":")
    if not module_name or not factory_name:
        raise InputError(
            f"--encoder must be {AUTO!r} or package.module:factory, got {name!r}. The factory is "
            "called as factory(input_shape, embedding_dim) and returns a torch.nn.Module."
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does; a console script does not
    try:
        factory: Factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, TypeError, ValueError) as error:  # for a relative or an empty name
        raise InputError(f"--encoder {name}: cannot import {module_name!r}: {error}") from None
    except AttributeError:
        raise InputError(f"--encoder {name}: {module_name!r} has no {factory_name!r}.") from None
    return factory


def _checked(
    name: str, factory: Factory, input_shape: tuple[int, ...], embedding_dim: int
) -> Embedder:
    """The user's encoder, tried on two items of zeros."""
    try:
        encoder = factory(input_shape, embedding_dim)
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"it returned {type(encoder).__name__}, not a torch.nn.Module")
        with torch.no_grad():
            shape = tuple(encoder.eval()(torch.zeros(2, *input_shape)).shape)
    except Exception as error:
        raise InputError(
            f"--encoder {name}: factory({input_shape}, {embedding_dim}) failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    if shape != (2, embedding_dim):
        raise InputError(
            f"--encoder {name} turns (2, {', '.join(map(str, input_shape))}) into {shape}; it must "
            f"give (2, {embedding_dim}), one embedding of --embedding-dim numbers per item."
        )
    return Embedder(encoder.train(), input_shape)
