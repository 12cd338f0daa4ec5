"""An encoder as a verifier uses it: its input standardised, its embeddings of length 1."""

import torch
from torch import Tensor, nn

from nearfar.app.train.content import Batch, as_input
from nearfar.app.train.reads import Reads
from nearfar.distance import unit


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

    @property
    def reads(self) -> Reads:
        """What it reads."""
        return Reads(self.input_shape)

    def prepare(self, batch: Batch) -> Tensor:
        """What `forward` takes: uint8 images as numbers from 0 to 1."""
        return as_input(batch)

    def standardise(self, mean: Tensor, deviation: Tensor) -> None:
        """Set the mean and deviation to those of the training items, one per channel or column."""
        self.mean.copy_(mean.view_as(self.mean))
        # A constant column has deviation 0 up to rounding; it is not scaled.
        constant = deviation <= 1e-6 * mean.abs()
        self.deviation.copy_(deviation.masked_fill(constant, 1).view_as(self.deviation))

    def forward(self, x: Tensor) -> Tensor:
        """(n, *input_shape) to (n, embedding_dim)."""
        embedding: Tensor = self.encoder((x - self.mean) / self.deviation)
        return unit(embedding)
