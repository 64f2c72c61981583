"""The convolutional VQGAN of taming-transformers (Esser et al. 2021, arXiv 2012.09841).

An encoder from images to a grid of codebook entries, and a decoder back. Sources: repository
CompVis/taming-transformers (MIT licence), ``taming/modules/diffusionmodules/model.py`` and
``taming/models/vqgan.py``. Modules bear the published names: ``VQGAN.state_dict()`` has the keys
of the published checkpoints, and nothing is ever renamed.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdzoo.checkpoint import CheckpointError

GROUPS = 32  # of every group normalisation


@dataclass(frozen=True, slots=True)
class VQGANConfig:
    """Sizes of a VQGAN; the defaults are those of the published ``imagenet_f16_1024``.

    Level 0 works at the resolution of the image, and each level after it at half of that of the
    level before. Attention sits at the last one.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # a level has channels * multiplier channels
    blocks: int = 2  # residual blocks per level of the encoder; the decoder has one more
    latent: int = 256  # channels between the encoder or decoder and the codebook's projections
    embedding: int = 256  # size of a codebook entry
    codebook: int = 1024
    image: int = 3  # channels of an image

    def __post_init__(self) -> None:
        """Check what group normalisation demands."""
        for width in (self.channels, *self.widths):
            if width < 1 or width % GROUPS:
                raise CheckpointError(
                    f"channels of every VQGAN level must be a multiple of {GROUPS}, got {width}"
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, the highest resolution first."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @property
    def factor(self) -> int:
        """Pixels on a side of the square that becomes one token."""
        return 2 ** (len(self.multipliers) - 1)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Read all sizes from the shapes of a published state dict.

        Args:
            state: tensors under their published names.
        """
        channels, image = _shape(state, "encoder.conv_in.weight")[:2]
        levels = _count(state, r"encoder\.down\.(\d+)\.")
        widths = [_shape(state, f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)]
        codebook, embedding = _shape(state, "quantize.embedding.weight", dimensions=2)
        return cls(
            channels=channels,
            multipliers=tuple(width // channels for width in widths),
            blocks=_count(state, r"encoder\.down\.0\.block\.(\d+)\."),
            latent=_shape(state, "decoder.conv_in.weight")[1],
            embedding=embedding,
            codebook=codebook,
            image=image,
        )


def _shape(state: Mapping[str, Tensor], key: str, dimensions: int = 4) -> tuple[int, ...]:
    found = state.get(key)
    if found is None:
        raise CheckpointError(
            f"a VQGAN checkpoint must hold {key!r}, found {len(state)} other tensors "
            f"({', '.join(list(state)[:4])}, ...); is this file of another architecture?"
        )
    if found.ndim != dimensions:
        raise CheckpointError(
            f"{key!r} must have {dimensions} dimensions, got shape {tuple(found.shape)}"
        )
    return tuple(found.shape)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    numbers = [int(found[1]) for key in state if (found := re.match(pattern, key))]
    return max(numbers, default=-1) + 1


class GroupNorm(nn.GroupNorm):
    """Group normalisation computed in float32 whatever the precision of its input."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (batch, channels, height, width); the result has the dtype of ``x``."""
        y = F.group_norm(
            x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps
        )
        return y.to(x.dtype)


def _conv(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1)


class ResidualBlock(nn.Module):
    """Two normalised convolutions around a shortcut, which projects when the width changes."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(channels_in)
        self.conv1 = _conv(channels_in, channels_out)
        self.norm2 = GroupNorm(channels_out)
        self.conv2 = _conv(channels_out, channels_out)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels_in, height, width) to (batch, channels_out, height, width)."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """Single-head attention among all pixels of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (batch, channels, height, width) plus what its pixels gathered."""
        y = self.norm(x)
        # Scaling the queries, not the products, keeps the products in the range of float16.
        query = self.q(y).flatten(2).transpose(1, 2) * x.shape[1] ** -0.5
        key, value = self.k(y).flatten(2), self.v(y).flatten(2)
        weights = (query @ key).float().softmax(dim=-1).to(x.dtype)  # (batch, pixels, pixels)
        mixed = value @ weights.transpose(1, 2)
        return x + self.proj_out(mixed.unflatten(2, x.shape[2:]))


class Middle(nn.Module):
    """Attention between two residual blocks, at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = Attention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (batch, channels, height, width)."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """A convolution of stride 2, padded on the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Halve height and width."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Pixels repeated twice each way, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Double height and width."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention at the lowest one."""

    def __init__(self, channels_in: int, channels_out: int, blocks: int, lowest: bool) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * (blocks - 1)
        self.block = nn.ModuleList(ResidualBlock(width, channels_out) for width in widths)
        self.attn = nn.ModuleList(Attention(channels_out) for _ in widths if lowest)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels_in, height, width) to (batch, channels_out, height, width)."""
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        return x


class Encoder(nn.Module):
    """Images to feature maps, from the highest resolution to the lowest."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = _conv(config.image, config.channels)
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(zip((config.channels, *widths), widths, strict=False)):
            level = Level(before, width, config.blocks, lowest=i == len(widths) - 1)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = _conv(widths[-1], config.latent)

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, image, height, width) to (batch, latent, height / f, width / f)."""
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Feature maps to images; its levels are numbered as the encoder's and run backwards."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = _conv(config.latent, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for i, (width, before) in enumerate(zip(widths, (*widths[1:], widths[-1]), strict=True)):
            level = Level(before, width, config.blocks + 1, lowest=i == len(widths) - 1)
            if i > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = GroupNorm(widths[0])
        self.conv_out = _conv(widths[0], config.image)

    def forward(self, latents: Tensor) -> Tensor:
        """Map (batch, latent, height, width) to (batch, image, f * height, f * width)."""
        x = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    """The table of vectors that tokens stand for."""

    def __init__(self, codebook: int, embedding: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook, embedding)

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up int (batch, height, width) as (batch, embedding, height, width)."""
        return self.embedding(tokens).permute(0, 3, 1, 2)

    def nearest(self, latents: Tensor) -> Tensor:
        """Return the entries nearest to (batch, embedding, height, width).

        Returns:
            int64 (batch, height * width), row by row; distances are computed in float32.
        """
        table = self.embedding.weight.float()
        points = latents.float().flatten(2).transpose(1, 2)
        # |z - e|^2 without |z|^2, which is the same for all entries.
        return (table.square().sum(dim=1) - 2 * points @ table.T).argmin(dim=-1)
