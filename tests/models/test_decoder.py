"""The exporter's view of tokenizers, on one whose images are known."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mdzoo.decoder import Images, Tokens


class Fixed(nn.Module):
    factor, codebook = 1, 4

    def __init__(self, pixels: tuple[float, float]) -> None:
        super().__init__()
        self.pixels = pixels
        self.seen = torch.zeros(0)

    def decode(self, tokens: Tensor) -> Tensor:
        black, white = self.pixels
        return (black + tokens.reshape(-1, 1, 1, 4) * (white - black) / 2).repeat(1, 3, 1, 1)

    def encode(self, images: Tensor) -> Tensor:
        self.seen = images
        return torch.zeros(len(images), 4, dtype=torch.int64)


@pytest.mark.parametrize("pixels", [(-1.0, 1.0), (0.0, 1.0)])
def test_black_and_white_are_0_and_255_and_outliers_are_clipped(
    pixels: tuple[float, float],
) -> None:
    codec = Fixed(pixels)
    images = Images(codec)(torch.tensor([[-1, 0, 2, 3]])).numpy()
    assert images.shape == (1, 1, 4, 3)
    assert images[0, 0, :, 1].tolist() == [0, 0, 255, 255]
    tokens = Tokens(codec)(
        torch.tensor([0, 255, 51, 0], dtype=torch.uint8).repeat(3, 1).T[None, None]
    )
    assert tokens.dtype == torch.int32
    black, white = pixels
    expected = [black, white, black + (white - black) / 5, black]
    np.testing.assert_allclose(codec.seen[0, 2, 0], expected, atol=1e-6)
