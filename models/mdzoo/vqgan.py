"""The convolutional VQGAN of taming-transformers (Esser et al. 2021, arXiv 2012.09841).

An encoder from images to a grid of codebook entries, and a decoder back. Sources: repository
CompVis/taming-transformers (MIT licence), ``taming/modules/diffusionmodules/model.py`` and
``taming/models/vqgan.py``. Modules bear the published names: ``VQGAN.state_dict()`` has the keys
of the published checkpoints, and nothing is ever renamed.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

from torch import Tensor, nn
from torch.nn import functional as F

from mdzoo.checkpoint import CheckpointError, shape_of

__all__ = ["VQGAN", "Decoder", "Encoder", "VQGANConfig"]

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
        """Check that there is something to build, and what group normalisation demands."""
        widths = (self.channels, *self.widths)
        if not self.multipliers or self.blocks < 1 or any(w < 1 or w % GROUPS for w in widths):
            raise CheckpointError(
                f"a VQGAN must have levels, blocks, and channels in multiples of {GROUPS}, got "
                f"{self.channels} channels times {self.multipliers} and {self.blocks} blocks"
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
        channels, image = shape_of(state, "encoder.conv_in.weight", 4)[:2]
        level = "encoder.down.{}.block.0.conv1.weight".format
        levels = range(_count(state, r"encoder\.down\.(\d+)\."))
        codebook, embedding = shape_of(state, "quantize.embedding.weight", 2)
        return cls(
            channels=channels,
            multipliers=tuple(shape_of(state, level(i), 4)[0] // channels for i in levels),
            blocks=_count(state, r"encoder\.down\.0\.block\.(\d+)\."),
            latent=shape_of(state, "quant_conv.weight", 4)[1],
            embedding=embedding,
            codebook=codebook,
            image=image,
        )


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({found[1] for key in state if (found := re.match(pattern, key))})


class GroupNorm(nn.GroupNorm):
    """Group normalisation computed in float32 whatever the precision of its input."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (batch, channels, height, width); the result has the dtype of ``x``."""
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


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
        same = channels_in == channels_out
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels_in, height, width) to (batch, channels_out, height, width)."""
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(nn.Module):
    """Single-head attention among all pixels of a feature map, its softmax in float32."""

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


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _middle(width: int) -> nn.Sequential:
    return _named(
        block_1=ResidualBlock(width, width),
        attn_1=Attention(width),
        block_2=ResidualBlock(width, width),
    )


def _halve(width: int) -> nn.Sequential:
    # Padded on the right and at the bottom only.
    return _named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2))


def _double(width: int) -> nn.Sequential:
    return _named(nearest=nn.Upsample(scale_factor=2), conv=_conv(width, width))


class Level(nn.Module):
    """Residual blocks of one resolution, and the step to the next one.

    What a level lacks is an identity, which leaves no trace in the state dict.
    """

    def __init__(
        self, before: int, width: int, blocks: int, *, attend: bool, down: bool, up: bool
    ) -> None:
        super().__init__()
        widths = [before] + [width] * (blocks - 1)
        self.block = nn.ModuleList(ResidualBlock(channels, width) for channels in widths)
        self.attn = nn.ModuleList(Attention(width) if attend else nn.Identity() for _ in widths)
        self.downsample = _halve(width) if down else nn.Identity()
        self.upsample = _double(width) if up else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, before, height, width) to the channels and size of the next level."""
        for block, attention in zip(self.block, self.attn, strict=True):
            x = attention(block(x))
        return self.upsample(self.downsample(x))


class Encoder(nn.Module):
    """Images to feature maps, from the highest resolution to the lowest."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths, blocks, lowest = config.widths, config.blocks, len(config.widths) - 1
        self.conv_in = _conv(config.image, config.channels)
        self.down = nn.ModuleList(
            Level(before, width, blocks, attend=i == lowest, down=i < lowest, up=False)
            for i, (before, width) in enumerate(pairwise((config.channels, *widths)))
        )
        self.mid = _middle(widths[-1])
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = _conv(widths[-1], config.latent)

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, image, height, width) to (batch, latent, height / f, width / f)."""
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Feature maps to images; levels bear the encoder's numbers, so the last one comes first."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths, blocks, lowest = config.widths, config.blocks + 1, len(config.widths) - 1
        self.conv_in = _conv(config.latent, widths[-1])
        self.mid = _middle(widths[-1])
        self.up = nn.ModuleList(
            Level(before, width, blocks, attend=i == lowest, down=False, up=i > 0)
            for i, (width, before) in enumerate(pairwise((*widths, widths[-1])))
        )
        self.norm_out = GroupNorm(widths[0])
        self.conv_out = _conv(widths[0], config.image)

    def forward(self, latents: Tensor) -> Tensor:
        """Map (batch, latent, height, width) to (batch, image, f * height, f * width)."""
        x = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            x = level(x)
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
        """Map (batch, embedding, height, width) to int64 (batch, height * width), row by row."""
        table = self.embedding.weight.float()
        points = latents.float().flatten(2).transpose(1, 2)
        # |z - e|^2 less |z|^2, which is the same for all entries.
        return (table.square().sum(dim=1) - 2 * points @ table.T).argmin(dim=-1)


class VQGAN(nn.Module):
    """Images to tokens and back; pixels are in [-1, 1]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.codebook, config.embedding)
        self.quant_conv = nn.Conv2d(config.latent, config.embedding, 1)
        self.post_quant_conv = nn.Conv2d(config.embedding, config.latent, 1)

    def latents(self, images: Tensor) -> Tensor:
        """Return what the codebook is searched for: (batch, embedding, height / f, width / f).

        Args:
            images: (batch, 3, height, width) in [-1, 1], multiples of ``config.factor`` pixels.
        """
        factor = self.config.factor
        if images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"height and width of images must be multiples of {factor} pixels, "
                f"got {images.shape[2]} x {images.shape[3]}; crop or resize them"
            )
        return self.quant_conv(self.encoder(images.to(self.quant_conv.weight.dtype)))

    def encode(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, height, width) in [-1, 1] to int64 tokens (batch, h * w)."""
        return self.quantize.nearest(self.latents(images))

    def decode(self, tokens: Tensor) -> Tensor:
        """Return images (batch, 3, f * h, f * w), in [-1, 1] but for outliers, which stay.

        Args:
            tokens: int (batch, h, w), or (batch, h * w) of a square grid.
        """
        grid = tokens if tokens.ndim == 3 else _square(tokens)
        return self.decoder(self.post_quant_conv(self.quantize(grid)))


def _square(tokens: Tensor) -> Tensor:
    side = math.isqrt(tokens.shape[1])
    if side**2 != tokens.shape[1]:
        raise ValueError(
            f"tokens must form a square grid, got {tokens.shape[1]} of them; "
            "pass other grids as (batch, height, width)"
        )
    return tokens.reshape(-1, side, side)
