"""A trained run as a module: what `nearfar.load` returns."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from nearfar.app.data.address import read_item
from nearfar.app.data.content import Batch
from nearfar.app.train.run import Run
from nearfar.distance import Distance, between_rows
from nearfar.evaluate import PlattProbability
from nearfar.inputs import ArrayLike, tensor

Item = str | Path | ArrayLike


class Verifier(nn.Module):
    """A trained encoder, with what it takes to decide whether two items are the same.

    It is in evaluation mode, on the CPU. As with any module, `to(device)` moves it, and gradients
    are recorded unless `torch.inference_mode()` is on.

    Attributes:
        threshold: the largest distance at which two items count as the same.
        far: the false-accept rate at which the threshold was fitted.
        measure: the name of the distance.
        probability: of "same", called on distances, (n,) to (n,); None if the run is older than
            that. It holds if half of the pairs are the same; for another share,
            `dataclasses.replace(probability, prior=0.01)`.
        input_shape: the shape of one item: (d,) for vectors, (c, h, w) for images,
            () for texts.
    """

    threshold: float
    far: float
    measure: Distance
    probability: PlattProbability | None
    input_shape: tuple[int, ...]

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.embedder = run.embedder
        self.threshold = run.thresholds.learned
        self.far = run.thresholds.far
        self.measure = run.distance
        self.probability = run.probability
        self.input_shape = run.embedder.reads.shape or ()
        self.eval()

    def forward(self, x: Batch) -> Tensor:
        """Embeddings of length 1.

        Args:
            x: n items, as `transform` returns them.

        Returns:
            (n, d) float32.

        Raises:
            ValueError: `x` has another shape or dtype.
        """
        if self.input_shape:
            self._refuse_other_form(x)
        embedding: Tensor = self.embedder(x)
        return embedding

    def transform(self, *items: Item) -> Batch:
        """Read items the way that training read them.

        Args:
            items: each an image file, a .npy file, a vector as text ("0.1 0.2"), a row of some data
                ("glyphs:12"), or an array of `input_shape`. For an encoder of texts, each is a
                text.

        Returns:
            (n, ...) float32; images are upright, resized, and from 0 to 1. Of texts, their
            tokens, padded to one length.

        Raises:
            ValueError: there are no items, or one cannot be read or has another shape.
            TypeError: one is neither text nor numbers.
        """
        if not items:
            raise ValueError("transform needs items: model.transform('a.jpg', 'b.jpg').")
        prepare: Callable[[Batch], Batch] = self.embedder.prepare
        if self.embedder.reads.texts:
            return prepare([text for item in items for text in self._read(item)])
        return torch.cat([prepare(self._read(item)) for item in items])

    def distance(self, x1: ArrayLike, x2: ArrayLike) -> Tensor:
        """The distance of row i of `x1`, (n, d) embeddings, from row i of `x2`: (n,).

        Raises:
            ValueError: they are not of one shape.
        """
        x1, x2 = tensor("x1", x1), tensor("x2", x2)
        if x1.ndim != 2 or x1.shape != x2.shape:
            raise ValueError(
                f"x1 and x2 must both be (n, d), got {tuple(x1.shape)} and {tuple(x2.shape)}. To "
                "compare one with all, expand it: x2.expand_as(x1)."
            )
        return between_rows(x1, x2, self.measure)

    def same(self, x1: ArrayLike, x2: ArrayLike) -> Tensor:
        """Whether row i of `x1`, (n, d) embeddings, and row i of `x2` are the same: (n,) bool.

        Raises:
            ValueError: they are not of one shape.
        """
        # The threshold is a float64, to which torch would not lift the distances by itself.
        return self.distance(x1, x2).double() <= self.threshold

    def extra_repr(self) -> str:
        return f"{self.measure} distance, same up to {self.threshold:.4f} (far={self.far:.3g})"

    def _refuse_other_form(self, x: Batch) -> None:
        shape, dtype = self.input_shape, self.embedder.mean.dtype
        if isinstance(x, Tensor) and x.shape[1:] == shape and x.dtype is dtype:
            return
        got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        expected = ", ".join(map(str, ["n", *shape]))
        raise ValueError(f"x must be ({expected}) {dtype}, as transform returns it, got {got}.")

    def _read(self, item: Item) -> Batch:
        """A batch of one, as training reads it: (1, *input_shape) uint8 or float32, or a text."""
        if isinstance(item, str | Path):
            return read_item(str(item), self.embedder.reads).read(torch.tensor([0]))()
        if self.embedder.reads.texts:
            raise TypeError(f"an item must be a text, got {type(item).__name__}.")
        x = tensor("an item", item)
        if tuple(x.shape) != self.input_shape:
            raise ValueError(
                f"an item has shape {tuple(x.shape)}, but the run was trained on items of shape "
                f"{self.input_shape}."
            )
        x = x if x.dtype is torch.uint8 else x.float()
        if x.is_floating_point() and not x.isfinite().all():
            raise ValueError("an item holds NaN or infinity. Repair it.")
        return x[None]
