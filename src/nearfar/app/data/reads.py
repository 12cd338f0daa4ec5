"""What an encoder reads, which decides how data are read."""

from dataclasses import dataclass

from nearfar.app.data.fit import Fit


@dataclass(frozen=True)
class Reads:
    """What an encoder reads.

    Attributes:
        shape: the shape of an item, which all must have; image files are resized to it. None: a new
            network takes what there is.
        image_size: side to which image files are resized for a new network; None for 32.
        texts: whether it reads texts.
        own_fit: how a pretrained network reads image files; None: resized to `shape`.
    """

    shape: tuple[int, ...] | None = None
    image_size: int | None = None
    texts: bool = False
    own_fit: Fit | None = None

    @property
    def fit(self) -> Fit:
        """How image files are read."""
        if self.own_fit is not None:
            return self.own_fit
        if self.shape and len(self.shape) == 3:
            return Fit.to(self.shape)
        return Fit.square(self.image_size)
