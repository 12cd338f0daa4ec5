"""What an exported model takes: one class for each kind of item."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from nearfar.app.errors import InputError
from nearfar.app.train.encoders import Embedder
from nearfar.app.train.fit import Fit
from nearfar.app.train.images import read_images
from nearfar.app.train.run import Run

TEST_IMAGE = "test_image.png"
Arrays = Mapping[str, npt.NDArray[Any]]


class ModelInput(Protocol):
    """The input of a model of one kind of item."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors that the model takes."""

    def module(self, embedder: Embedder) -> nn.Module:
        """What is exported: such tensors to embeddings."""

    def described(self) -> dict[str, Any]:
        """For `threshold.json`."""

    def examples(self, n: int) -> tuple[Tensor, ...]:
        """n made-up items, since items of the user may be private; the same each time."""

    def write_beside(self, folder: Path) -> Arrays:
        """Write the files that reading an item needs, or is tested by; arrays for the test."""


class WithPreparation(nn.Module):
    """An embedder of items as they are read, so that a user has nothing to prepare."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder = embedder

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.embedder(self.embedder.prepare(x))
        return embedding


@dataclass(frozen=True, eq=False)
class Vectors:
    """(n, d) float32.

    Attributes:
        mean: (d,) of the training items.
        deviation: (d,) their standard deviation.
    """

    mean: Tensor
    deviation: Tensor
    names = ("x",)

    def module(self, embedder: Embedder) -> nn.Module:
        return WithPreparation(embedder)

    def described(self) -> dict[str, Any]:
        shape = [len(self.mean)]
        return {"kind": "vector", "shape": shape, "dtype": "float32", "image_files": False}

    def examples(self, n: int) -> tuple[Tensor, ...]:
        x = torch.randn(n, len(self.mean), generator=torch.Generator().manual_seed(0))
        return (self.mean + self.deviation * x,)

    def write_beside(self, folder: Path) -> Arrays:
        return {}


@dataclass(frozen=True, eq=False)
class Images:
    """(n, c, h, w) uint8 from 0 to 255; or float32, if training items were read as such.

    Attributes:
        shape: (c, h, w).
        mean: (c, 1, 1) of the training items, where 8 bits are from 0 to 1.
        deviation: (c, 1, 1) their standard deviation.
        dtype: the dtype of the training items.
    """

    shape: tuple[int, ...]
    mean: Tensor
    deviation: Tensor
    dtype: torch.dtype
    names = ("x",)

    def module(self, embedder: Embedder) -> nn.Module:
        return WithPreparation(embedder)

    def described(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        described = {"kind": "image", "shape": list(self.shape), "dtype": dtype}
        return {**described, "image_files": self.fits_files}

    @property
    def fits_files(self) -> bool:
        """Whether image files of 8 bits hold what the model takes."""
        return self.dtype is torch.uint8 and self.shape[0] in (1, 3)

    def examples(self, n: int) -> tuple[Tensor, ...]:
        """Blotches, which differ more than noise does."""
        coarse = torch.randn(n, self.shape[0], 4, 4, generator=torch.Generator().manual_seed(0))
        x = interpolate(coarse, self.shape[1:], mode="bilinear")
        if self.dtype is torch.uint8:
            return ((128 + 128 * x).clamp(0, 255).to(torch.uint8),)
        return (self.mean + 2 * self.deviation * x,)

    def write_beside(self, folder: Path) -> Arrays:
        """An image file with all that decoding has to get right, and the pixels that it gives."""
        if not self.fits_files:
            return {}
        _, height, width = self.shape
        file = folder / TEST_IMAGE
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6  # lies on its side
        _picture(3 * width + 1, 2 * height + 1).save(file, exif=exif)
        pixels, _ = read_images([file], Fit.to(self.shape))
        return {"image_pixels": pixels[0].numpy()}


def input_of(run: Run) -> ModelInput:
    """What the exported model of a run takes.

    Raises:
        InputError: an older nearfar did not write what is needed.
    """
    embedder = run.embedder
    shape = embedder.reads.shape or ()
    if len(shape) == 1:
        return Vectors(embedder.mean, embedder.deviation)
    dtype = run.summary["data"].get("dtype")
    if dtype not in ("uint8", "float32"):
        raise InputError(
            f"{run.path} does not say whether it was trained on images of 8 bits: an older nearfar "
            f"trained it. Train again: nearfar train --config {run.path}/config.toml --out NEW"
        )
    return Images(shape, embedder.mean, embedder.deviation, getattr(torch, dtype))


def _picture(width: int, height: int) -> Image.Image:
    """RGBA: a ramp of colour with a sharp edge, half of it translucent."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    edge = np.where(x > 2 * y, 255, 0)
    alpha = np.where(x + y > 255, 255, 90)
    return Image.fromarray(np.stack([x, y, edge, alpha], 2).astype(np.uint8))
