"""The size to which image files are brought, and how."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from PIL import Image

from nearfar.app.errors import InputError

SIDE = 32
LARGEST_SIDE = 2**16
Resample = Literal["bilinear", "bicubic"]
RESAMPLES: tuple[Resample, ...] = get_args(Resample)


@dataclass(frozen=True)
class Fit:
    """The size and channels to which images are converted.

    Attributes:
        width: in pixels.
        height: in pixels.
        channels: 1 for grey, 3 for RGB; None for grey if all images are grey, else RGB.
        resample: how pixels are weighted where the size changes.
        resized: the size before the centre is cut out, exactly as pretrained networks were
            evaluated. None: images are resized to width and height, by a faster approximation.
        keeps_shape: whether only the shorter side is resized to `resized`, and the longer in
            proportion; else both are.
    """

    width: int
    height: int
    channels: int | None = None
    resample: Resample = "bilinear"
    resized: int | None = None
    keeps_shape: bool = False

    @staticmethod
    def square(side: int | None) -> "Fit":
        return Fit(side or SIDE, side or SIDE)

    @staticmethod
    def to(shape: tuple[int, ...]) -> "Fit":
        """The fit for a network whose input shape is (c, h, w)."""
        channels, height, width = shape
        if channels not in (1, 3):
            raise InputError(
                f"the run was trained on {channels} channels, but image files have 1 or 3."
            )
        return Fit(width, height, channels)

    @staticmethod
    def read(held: Mapping[str, Any]) -> "Fit":
        """The fit that `asdict` made this of.

        Raises:
            ValueError: it is damaged.
            TypeError: likewise.
        """
        fit = Fit(**held)
        numbers = (fit.width, fit.height, fit.channels, fit.resized)
        whole = all(type(n) is int and 0 < n <= LARGEST_SIDE for n in numbers)
        if not whole or fit.resample not in RESAMPLES or type(fit.keeps_shape) is not bool:
            raise ValueError(held)
        return fit

    def of(self, image: Image.Image) -> Image.Image:
        """The image in this size."""
        resample = Image.Resampling[self.resample.upper()]
        if self.resized is None:
            return image.resize((self.width, self.height), resample, reducing_gap=3.0)
        size = (self.resized, self.resized)
        if self.keeps_shape:
            shorter = min(image.size)  # rounded as in torchvision
            size = (
                self.resized * image.width // shorter,
                self.resized * image.height // shorter,
            )
        image = image.resize(size, resample)
        left, top = (round((have - want) / 2) for have, want in zip(size, self.size, strict=True))
        return image.crop((left, top, left + self.width, top + self.height))

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def in_words(self) -> str:
        """For instance "resized to 256 on the shorter side, of which the centre is kept"."""
        if self.resized is None:
            return f"resized to {self.width} x {self.height}"
        how = f"resized to {self.resized}{' on the shorter side' * self.keeps_shape}"
        cut = self.keeps_shape or self.size != (self.resized, self.resized)
        return f"{how} ({self.resample}){', the centre is kept' * cut}"
