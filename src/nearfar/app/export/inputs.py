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

from nearfar.app.data.fit import Fit
from nearfar.app.data.images import read_images
from nearfar.app.errors import InputError
from nearfar.app.train.encoders import Embedder
from nearfar.app.train.run import Run

TEST_IMAGE, TOKENIZER = "test_image.png", "tokenizer.json"
N_TESTS = 4  # items in the test vectors
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

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of those axes, from the first, whose size is not fixed."""

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
    names, axes = ("x",), ("n",)

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
        fit: how image files of 8 bits become what the model takes; None if they do not.
    """

    shape: tuple[int, ...]
    mean: Tensor
    deviation: Tensor
    dtype: torch.dtype
    fit: Fit | None
    names, axes = ("x",), ("n",)

    def module(self, embedder: Embedder) -> nn.Module:
        return WithPreparation(embedder)

    def described(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        described = {"kind": "image", "shape": list(self.shape), "dtype": dtype}
        if self.fit is None:
            return {**described, "image_files": False}
        names = ("resample", "resized", "keeps_shape")
        resize = {name: getattr(self.fit, name) for name in names}
        return {**described, "image_files": True, "resize": resize}

    def examples(self, n: int) -> tuple[Tensor, ...]:
        """Blotches, which differ more than noise does."""
        coarse = torch.randn(n, self.shape[0], 4, 4, generator=torch.Generator().manual_seed(0))
        x = interpolate(coarse, self.shape[1:], mode="bilinear")
        if self.dtype is torch.uint8:
            return ((128 + 128 * x).clamp(0, 255).to(torch.uint8),)
        return (self.mean + 2 * self.deviation * x,)

    def write_beside(self, folder: Path) -> Arrays:
        """An image file with all that decoding has to get right, and the pixels that it gives."""
        if self.fit is None:
            return {}
        _, height, width = self.shape
        file = folder / TEST_IMAGE
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6  # lies on its side
        _picture(3 * width + 1, 2 * height + 1).save(file, exif=exif)
        pixels, _ = read_images([file], self.fit)
        return {"image_pixels": pixels[0].numpy()}


class OfTokens(nn.Module):
    """An embedder of texts that are tokens already; all else that it takes is left to itself."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder = embedder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = {"input_ids": input_ids, "attention_mask": attention_mask}
        embedding: Tensor = self.embedder(tokens)
        return embedding


@dataclass(frozen=True, eq=False)
class Texts:
    """(n, length) int64 tokens and their mask.

    Attributes:
        model: a SentenceTransformer.
        tokens: makes tokens of texts.
    """

    model: Any
    tokens: Any
    names, axes = ("input_ids", "attention_mask"), ("n", "length")

    def module(self, embedder: Embedder) -> nn.Module:
        return OfTokens(embedder)

    def described(self) -> dict[str, Any]:
        name = self.model.default_prompt_name
        return {
            "kind": "text",
            "shape": ["length"],
            "dtype": "int64",
            "image_files": False,
            "prompt": self.model.prompts[name] if name else "",  # put before each text
            "most_tokens": self.tokens.limit,
        }

    def examples(self, n: int) -> tuple[Tensor, ...]:
        tokens = self.tokens(_texts(n))
        return tuple(tokens[name] for name in self.names)

    def write_beside(self, folder: Path) -> Arrays:
        """The tokenizer, which also pads and cuts off; and the texts of the test vectors."""
        from tokenizers import Tokenizer

        own = self.model.tokenizer
        tokenizer = Tokenizer.from_str(own.backend_tokenizer.to_str())
        tokenizer.enable_padding(pad_id=own.pad_token_id, pad_token=own.pad_token)
        tokenizer.no_truncation()
        if self.tokens.limit is not None:
            tokenizer.enable_truncation(self.tokens.limit)
        tokenizer.save(str(folder / TOKENIZER))
        return {"texts": np.array(_texts(N_TESTS))}


def input_of(run: Run) -> ModelInput:
    """What the exported model of a run takes.

    Raises:
        InputError: an older nearfar did not write what is needed.
    """
    embedder = run.embedder
    if embedder.reads.texts:
        encoder: Any = embedder.encoder
        return Texts(encoder.model, embedder.prepare)
    shape = embedder.reads.shape or ()
    if len(shape) == 1:
        return Vectors(embedder.mean, embedder.deviation)
    dtype = run.summary["data"].get("dtype")
    if dtype not in ("uint8", "float32"):
        raise InputError(
            f"{run.path} does not say whether it was trained on images of 8 bits: an older nearfar "
            f"trained it. Train again: nearfar train --config {run.path}/config.toml --out NEW"
        )
    fit = embedder.reads.fit if dtype == "uint8" and shape[0] in (1, 3) else None
    return Images(shape, embedder.mean, embedder.deviation, getattr(torch, dtype), fit)


def _texts(n: int) -> list[str]:
    """Texts of different lengths, of which the longest are cut off."""
    words = ["Near,", "far:", "größer", "≠", "kleiner;", "wo", "ist", "das?", "近い", "遠い", "12"]
    return [" ".join((words[i % 11 :] + words[: i % 11]) * (1 + 7 * i % 40)) for i in range(n)]


def _picture(width: int, height: int) -> Image.Image:
    """RGBA: a ramp of colour with a sharp edge, half of it translucent."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    edge = np.where(x > 2 * y, 255, 0)
    alpha = np.where(x + y > 255, 255, 90)
    return Image.fromarray(np.stack([x, y, edge, alpha], 2).astype(np.uint8))
