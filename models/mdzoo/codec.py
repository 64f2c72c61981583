"""Images to tokens and back: quantisers between the networks of ``mdzoo.conv``, and loading."""

import math
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdzoo import checkpoint
from mdzoo.checkpoint import CheckpointError
from mdzoo.conv import ConvConfig, Decoder, Encoder, Style, levels

__all__ = ["Codebook", "ConvCodec", "assemble", "flipped"]


class Codebook(nn.Module):
    """The table of vectors that tokens stand for."""

    def __init__(self, codebook: int, embedding: int, *, unit: bool = False) -> None:
        super().__init__()
        self.unit = unit
        self.embedding = nn.Embedding(codebook, embedding)

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up int (batch, height, width) as (batch, embedding, height, width)."""
        return self._scale(self.embedding(tokens)).permute(0, 3, 1, 2)

    def nearest(self, latents: Tensor) -> Tensor:
        """Map (batch, embedding, height, width) to int64 (batch, height * width), row by row."""
        table = self._scale(self.embedding.weight.float())
        points = self._scale(latents.float().flatten(2).transpose(1, 2))
        # |z - e|^2 less |z|^2, which is the same for all entries.
        return (table.square().sum(dim=1) - 2 * points @ table.T).argmin(dim=-1)

    def _scale(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors.float(), dim=-1).to(vectors.dtype) if self.unit else vectors


class Signs(nn.Module):
    """Tokens whose bits, the least significant first, are the signs of a latent."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, tokens: Tensor) -> Tensor:
        """Write int (batch, height, width) as float32 (batch, bits, height, width) of -1 and 1."""
        bits = tokens.long()[:, None] // self._weights(tokens) % 2
        return (2 * bits - 1).float()

    def nearest(self, latents: Tensor) -> Tensor:
        """Map (batch, bits, height, width) to int64 (batch, height * width), row by row."""
        return ((latents > 0) * self._weights(latents)).sum(dim=1).flatten(1)

    def _weights(self, like: Tensor) -> Tensor:
        return 2 ** torch.arange(self.bits, device=like.device)[:, None, None]


class ConvCodec(nn.Module):
    """A convolutional tokenizer of images; satisfies ``mdzoo.decoder.Codec``.

    ``encoder`` is None where the checkpoint held a decoder only.
    """

    def __init__(self, config: ConvConfig) -> None:
        super().__init__()
        self.config = config
        style, latent, embedding = config.style, config.latent, config.embedding
        self.encoder = Encoder(config) if config.encodes else None
        self.decoder = Decoder(config)
        self.quantize = _quantiser(config)
        projects, encodes = style.projected, style.projected and config.encodes
        self.quant_conv = nn.Conv2d(latent, embedding, 1) if encodes else nn.Identity()
        self.post_quant_conv = nn.Conv2d(embedding, latent, 1) if projects else nn.Identity()

    @property
    def factor(self) -> int:
        """Pixels on a side of the square that becomes one token."""
        return self.config.factor

    @property
    def codebook(self) -> int:
        """Number of tokens there are."""
        return self.config.codebook

    @property
    def pixels(self) -> tuple[float, float]:
        """Values of black and white in ``decode``'s and ``encode``'s images."""
        return self.config.style.pixels

    def latents(self, images: Tensor) -> Tensor:
        """Return what the codebook is searched for: (batch, embedding, height / f, width / f).

        Args:
            images: (batch, 3, height, width) in ``pixels``, multiples of ``factor`` pixels.

        Raises:
            CheckpointError: there is no encoder.
            ValueError: sizes between two grids.
        """
        if self.encoder is None:
            raise CheckpointError(
                f"{type(self).__name__} must have an encoder to make tokens of images, found none "
                "in its checkpoint; load a checkpoint of the whole tokenizer"
            )
        height, width = images.shape[2:]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"height and width of images must be multiples of {self.factor} pixels, "
                f"got {height} x {width}; crop or resize them"
            )
        return self.quant_conv(self.encoder(images.to(self.encoder.conv_in.weight.dtype)))

    def encode(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, height, width) in ``pixels`` to int64 tokens (batch, h * w)."""
        return self.quantize.nearest(self.latents(images))

    def decode(self, tokens: Tensor) -> Tensor:
        """Return images (batch, 3, f * h, f * w), in ``pixels`` but for outliers, which stay.

        Args:
            tokens: int (batch, h, w), or (batch, h * w) of a square grid.
        """
        grid = tokens if tokens.ndim == 3 else _square(tokens)
        vectors = self.quantize(grid).to(self.decoder.conv_in.weight.dtype)
        return self.decoder(self.post_quant_conv(vectors))


def _quantiser(config: ConvConfig) -> Codebook | Signs:
    if config.style.signs:
        return Signs(config.latent)
    return Codebook(config.codebook, config.embedding, unit=config.style.unit)


def _square(tokens: Tensor) -> Tensor:
    side = math.isqrt(tokens.shape[1])
    if side**2 != tokens.shape[1]:
        raise ValueError(
            f"tokens must form a square grid, got {tokens.shape[1]} of them; "
            "pass other grids as (batch, height, width)"
        )
    return tokens.reshape(-1, side, side)


Codec = TypeVar("Codec", bound=ConvCodec)


def assemble(
    build: Callable[[ConvConfig], Codec], state: Mapping[str, Tensor], style: Style, source: str
) -> Codec:
    """Build a tokenizer of the sizes that a checkpoint has, and fill it.

    Args:
        build: the class.
        state: tensors under the names of its modules.
        style: of its family.
        source: where the tensors come from, for messages.

    Raises:
        CheckpointError: another architecture, or damaged weights.
    """
    with torch.device("meta"):
        codec = build(ConvConfig.from_state(state, style))
    codec.to_empty(device="cpu")
    checkpoint.fit(codec, state, source=source)
    return codec.eval()


def flipped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict whose decoder levels are counted from the other end.

    Here level 0 has the highest resolution; some publishers count from the lowest one.
    """
    lowest = levels(state) - 1

    def opposite(found: re.Match[str]) -> str:
        return f"{found[1]}{lowest - int(found[2])}."

    return {
        re.sub(r"^(decoder\.up\.)(\d+)\.", opposite, key): tensor for key, tensor in state.items()
    }
