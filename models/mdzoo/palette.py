"""Tokens that are pixels: the image tokenizer of the digits."""

import torch
from torch import Tensor, nn

__all__ = ["Palette", "PaletteTokens"]


class Palette(nn.Module):
    """Every token is one pixel; its id is a grey level."""

    levels: Tensor
    factor = 1

    def __init__(self, grid: int, levels: int) -> None:
        super().__init__()
        self.grid = grid
        self.codebook = levels
        values = torch.linspace(0, 255, levels).round()
        self.register_buffer("levels", values[:, None].repeat(1, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map int (batch, length) to uint8 images (batch, height, width, 3)."""
        pixels = nn.functional.embedding(tokens, self.levels)
        return pixels.reshape(-1, self.grid, self.grid, 3).to(torch.uint8)


class PaletteTokens(nn.Module):
    """The nearest grey level of every pixel."""

    levels: Tensor

    def __init__(self, palette: Palette) -> None:
        super().__init__()
        self.register_buffer("levels", palette.levels[:, 0].float())

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 images (batch, height, width, 3) to int32 tokens (batch, length)."""
        grey = images.float().mean(dim=-1).flatten(1)
        distance = (grey[..., None] - self.levels.float()).abs()
        return distance.argmin(dim=-1).to(torch.int32)
