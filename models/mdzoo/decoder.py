"""From tokens to pixels and back: tokenizers as the exporter wants them.

Tokens are int (batch, length), images uint8 (batch, height, width, 3).
"""

from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["Codec", "Images", "Tokens"]


class Codec(Protocol):
    """What every tokenizer of images has."""

    @property
    def factor(self) -> int:
        """Pixels on a side of the square that becomes one position."""

    @property
    def codebook(self) -> int:
        """Number of tokens there are."""

    @property
    def pixels(self) -> tuple[float, float]:
        """Values of black and white in its images."""

    def decode(self, tokens: Tensor) -> Tensor:
        """Map int (batch, length) to float images (batch, 3, height, width) in ``pixels``."""

    def encode(self, images: Tensor) -> Tensor:
        """Map float images (batch, 3, height, width) in ``pixels`` to int (batch, length)."""


class Images(nn.Module):
    """A tokenizer's decoder, with its range of pixels brought to 0 to 255."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, tokens: Tensor) -> Tensor:
        """Decode int (batch, length), clip, and put the channels last."""
        black, white = self.codec.pixels
        pixels = (self.codec.decode(tokens).float() - black) * (255 / (white - black))
        return pixels.clamp(0, 255).round().permute(0, 2, 3, 1).to(torch.uint8)


class Tokens(nn.Module):
    """A tokenizer's encoder, for images of 0 to 255: the inverse of ``Images``."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, images: Tensor) -> Tensor:
        """Encode uint8 (batch, height, width, 3) as int32 (batch, length)."""
        black, white = self.codec.pixels
        pixels = images.permute(0, 3, 1, 2).float() * ((white - black) / 255) + black
        return self.codec.encode(pixels).to(torch.int32)
