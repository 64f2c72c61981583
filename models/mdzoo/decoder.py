"""From tokens to pixels: the decoders as the exporter wants them.

Each is a module from int tokens (batch, length) to uint8 images (batch, height, width, 3).
"""

import torch
from torch import Tensor, nn

from mdzoo.vqgan import VQGAN

__all__ = ["Palette", "VQGANImages"]


class Palette(nn.Module):
    """Every token is one pixel; its id is a grey level."""

    levels: Tensor

    def __init__(self, grid: int, levels: int) -> None:
        super().__init__()
        self.grid = grid
        values = torch.linspace(0, 255, levels).round()
        self.register_buffer("levels", values[:, None].repeat(1, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        """Look the grey levels up."""
        pixels = nn.functional.embedding(tokens, self.levels)
        return pixels.reshape(-1, self.grid, self.grid, 3).to(torch.uint8)


class VQGANImages(nn.Module):
    """A VQGAN's decoder, with its range of [-1, 1] brought to 0 to 255."""

    def __init__(self, vqgan: VQGAN) -> None:
        super().__init__()
        self.vqgan = vqgan

    def forward(self, tokens: Tensor) -> Tensor:
        """Decode, clip, and put the channels last."""
        pixels = (self.vqgan.decode(tokens).float() + 1) * 127.5
        return pixels.clamp(0, 255).round().permute(0, 2, 3, 1).to(torch.uint8)
