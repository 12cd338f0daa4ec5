"""Small networks that are trained from scratch: convolutions for images, two layers for vectors."""

import torch
from torch import Tensor, nn


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


def _widths(side: int) -> list[int]:
    """Channels of each block: 32 pixels take 4 blocks, 64 take 5."""
    n_blocks = max(side.bit_length() - 2, 1)
    return [32, 64, 128, 128, *[128] * n_blocks][:n_blocks]
