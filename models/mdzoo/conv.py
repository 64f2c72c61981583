"""The convolutional networks of all image tokenizers, and the few points in which they differ.

Every published tokenizer descends from the VQGAN (Esser et al. 2021, arXiv 2012.09841): an encoder
of residual blocks that halves the image level by level, and a decoder that mirrors it. Source:
repository CompVis/taming-transformers (MIT licence), ``taming/modules/diffusionmodules/model.py``,
whose names the modules bear. ``Style`` lists what the descendants changed.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

from torch import Tensor, nn
from torch.nn import functional as F

from mdzoo.checkpoint import CheckpointError, shape_of

__all__ = ["ConvConfig", "Decoder", "Encoder", "Style", "levels"]

GROUPS = 32  # of every group normalisation


@dataclass(frozen=True, slots=True)
class Style:
    """What differs between families; the defaults are those of taming-transformers."""

    bias: bool = True  # of the residual convolutions and of the encoder's first one
    echo: bool = False  # shortcuts project what the block computed in place of its input
    attention: bool = True  # in the middle, and after every block of the lowest resolution
    extra: int = 1  # blocks that a decoder's level has more than an encoder's
    pooled: bool = False  # resolution is halved by averages in place of strided convolutions
    projected: bool = True  # 1 x 1 convolutions stand between codebook and networks
    unit: bool = False  # codebook entries and latents are scaled to length one
    signs: bool = False  # no codebook: a latent's signs are the bits of its token
    pixels: tuple[float, float] = (-1.0, 1.0)  # values of black and white


@dataclass(frozen=True, slots=True)
class ConvConfig:
    """Sizes of a tokenizer; the defaults are those of the published ``imagenet_f16_1024``.

    Level 0 works at the resolution of the image, and each level after it at half of that of the
    level before.
    """

    widths: tuple[int, ...] = (128, 128, 256, 256, 512)  # channels of each level
    stem: int = 128  # channels of the encoder's first convolution
    blocks: int = 2  # residual blocks per level of the encoder
    latent: int = 256  # channels between encoder or decoder and the projections
    embedding: int = 256  # size of a codebook entry
    codebook: int = 1024
    encodes: bool = True  # some files hold a decoder only
    style: Style = Style()

    def __post_init__(self) -> None:
        """Check that there is something to build, and what group normalisation demands."""
        channels = (self.stem, *self.widths)
        if not self.widths or self.blocks < 1 or any(w < 1 or w % GROUPS for w in channels):
            raise CheckpointError(
                f"a tokenizer must have levels, blocks, and channels in multiples of {GROUPS}, got "
                f"levels of {self.widths} channels after {self.stem} and {self.blocks} blocks; "
                "is the checkpoint of another architecture?"
            )

    @property
    def factor(self) -> int:
        """Pixels on a side of the square that becomes one token."""
        return 2 ** (len(self.widths) - 1)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], style: Style = Style()) -> Self:
        """Read all sizes from the shapes of a state dict.

        Args:
            state: tensors under the names of these modules.
            style: what no shape tells.
        """
        level = "decoder.up.{}.block.0.conv1.weight".format
        widths = [shape_of(state, level(i), 4)[0] for i in range(levels(state) or 1)]
        encodes = any(key.startswith("encoder.") for key in state)
        latent = shape_of(state, "decoder.conv_in.weight", 4)[1]
        codebook, embedding = 2**latent, latent
        if not style.signs:
            codebook, embedding = shape_of(state, "quantize.embedding.weight", 2)
        return cls(
            widths=tuple(widths),
            stem=shape_of(state, "encoder.conv_in.weight", 4)[0] if encodes else widths[0],
            blocks=_count(state, r"decoder\.up\.0\.block\.(\d+)\.") - style.extra,
            latent=latent,
            embedding=embedding,
            codebook=codebook,
            encodes=encodes,
            style=style,
        )


def levels(state: Mapping[str, Tensor]) -> int:
    """Count the resolutions of a decoder."""
    return _count(state, r"decoder\.up\.(\d+)\.")


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


def _conv(channels_in: int, channels_out: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=bias)


class ResidualBlock(nn.Module):
    """Two normalised convolutions around a shortcut, which projects when the width changes."""

    def __init__(self, channels_in: int, channels_out: int, style: Style) -> None:
        super().__init__()
        same = channels_in == channels_out
        self.echo = style.echo and not same
        self.norm1 = GroupNorm(channels_in)
        self.conv1 = _conv(channels_in, channels_out, bias=style.bias)
        self.norm2 = GroupNorm(channels_out)
        self.conv2 = _conv(channels_out, channels_out, bias=style.bias)
        before = channels_out if self.echo else channels_in
        shortcut = nn.Conv2d(before, channels_out, 1, bias=style.bias)
        self.nin_shortcut = nn.Identity() if same else shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels_in, height, width) to (batch, channels_out, height, width)."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.nin_shortcut(y if self.echo else x) + y


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


# What a network lacks is an identity, which leaves no trace in the state dict.


def _middle(width: int, style: Style) -> nn.Sequential:
    return _named(
        block_1=ResidualBlock(width, width, style),
        attn_1=Attention(width) if style.attention else nn.Identity(),
        block_2=ResidualBlock(width, width, style),
    )


def _halve(width: int, style: Style) -> nn.Module:
    if style.pooled:
        return nn.AvgPool2d(2)
    # Padded on the right and at the bottom only.
    return _named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2))


def _double(width: int) -> nn.Sequential:
    return _named(nearest=nn.Upsample(scale_factor=2), conv=_conv(width, width))


class Level(nn.Module):
    """Residual blocks of one resolution."""

    def __init__(self, before: int, width: int, blocks: int, style: Style, *, lowest: bool) -> None:
        super().__init__()
        channels = [before] + [width] * (blocks - 1)
        attend = lowest and style.attention
        self.block = nn.ModuleList(ResidualBlock(each, width, style) for each in channels)
        self.attn = nn.ModuleList(Attention(width) if attend else nn.Identity() for _ in channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, before, height, width) to (batch, width, height, width)."""
        for block, attention in zip(self.block, self.attn, strict=True):
            x = attention(block(x))
        return x


class DownLevel(Level):
    """A level of the encoder; all but the lowest halve the resolution."""

    def __init__(self, before: int, width: int, blocks: int, style: Style, *, lowest: bool) -> None:
        super().__init__(before, width, blocks, style, lowest=lowest)
        self.downsample = nn.Identity() if lowest else _halve(width, style)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, before, height, width) to the channels and size of the next level."""
        return self.downsample(super().forward(x))


class UpLevel(Level):
    """A level of the decoder; all but the highest double the resolution."""

    def __init__(
        self, before: int, width: int, blocks: int, style: Style, *, lowest: bool, highest: bool
    ) -> None:
        super().__init__(before, width, blocks, style, lowest=lowest)
        self.upsample = nn.Identity() if highest else _double(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, before, height, width) to the channels and size of the next level."""
        return self.upsample(super().forward(x))


class Encoder(nn.Module):
    """Images to feature maps, from the highest resolution to the lowest."""

    def __init__(self, config: ConvConfig) -> None:
        super().__init__()
        widths, style, lowest = config.widths, config.style, len(config.widths) - 1
        self.conv_in = _conv(3, config.stem, bias=style.bias)
        self.down = nn.ModuleList(
            DownLevel(before, width, config.blocks, style, lowest=i == lowest)
            for i, (before, width) in enumerate(pairwise((config.stem, *widths)))
        )
        self.mid = _middle(widths[-1], style)
        self.norm_out = GroupNorm(widths[-1])
        # Where no projection follows, this convolution is one itself.
        wide = _conv(widths[-1], config.latent)
        self.conv_out = wide if style.projected else nn.Conv2d(widths[-1], config.latent, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, 3, height, width) to (batch, latent, height / f, width / f)."""
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Feature maps to images; levels bear the encoder's numbers, so the last one comes first."""

    def __init__(self, config: ConvConfig) -> None:
        super().__init__()
        widths, style, lowest = config.widths, config.style, len(config.widths) - 1
        blocks = config.blocks + style.extra
        self.conv_in = _conv(config.latent, widths[-1])
        self.mid = _middle(widths[-1], style)
        self.up = nn.ModuleList(
            UpLevel(before, width, blocks, style, lowest=i == lowest, highest=i == 0)
            for i, (width, before) in enumerate(pairwise((*widths, widths[-1])))
        )
        self.norm_out = GroupNorm(widths[0])
        self.conv_out = _conv(widths[0], 3)

    def forward(self, latents: Tensor) -> Tensor:
        """Map (batch, latent, height, width) to (batch, 3, f * height, f * width)."""
        x = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
