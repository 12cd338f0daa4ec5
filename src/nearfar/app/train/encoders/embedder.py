"""An encoder as a verifier uses it: its input standardised, its embeddings of length 1."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from nearfar.app.data.content import Batch, as_input
from nearfar.app.data.reads import Reads
from nearfar.distance import unit


class Embedder(nn.Module):
    """An encoder whose input is standardised and whose output is scaled to length 1.

    The mean and standard deviation of the training items, one number per channel or column, are
    saved as part of the model.

    Attributes:
        encoder: the network: items to features.
        head: what follows it: features to embeddings.
        embedding_dim: the dimensions of an embedding.
        reads: what it reads.
        prepare: what makes the input of `forward`, on the CPU, of items as they are read.
        pretrained: whether the encoder was trained before, and standardises in its own way.
        origin: where a pretrained encoder comes from, for the summary of a run.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        reads: Reads,
        embedding_dim: int,
        *,
        head: nn.Module | None = None,
        prepare: Callable[[Batch], Batch] | None = None,
        pretrained: bool = False,
        origin: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head or nn.Identity()
        self.reads, self.embedding_dim = reads, embedding_dim
        self.prepare: Callable[[Batch], Batch] = prepare or as_input
        self.pretrained = pretrained
        self.origin = origin or {}
        first, *rest = reads.shape or (1,)
        shape = (first, *[1] * len(rest))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("deviation", torch.ones(shape))

    def standardise(self, mean: Tensor, deviation: Tensor) -> None:
        """Set the mean and deviation to those of the training items, one per channel or column."""
        self.mean.copy_(mean.view_as(self.mean))
        # A constant column has deviation 0 up to rounding; it is not scaled.
        constant = deviation <= 1e-6 * mean.abs()
        self.deviation.copy_(deviation.masked_fill(constant, 1).view_as(self.deviation))

    def features(self, x: Batch) -> Tensor:
        """What the encoder makes of prepared items, (n, features)."""
        if self.reads.shape:
            x = (x - self.mean) / self.deviation
        found: Tensor = self.encoder(x)
        return found

    def forward(self, x: Batch) -> Tensor:
        """Prepared items, for instance (n, *shape), to (n, embedding_dim)."""
        return unit(self.head(self.features(x)))
