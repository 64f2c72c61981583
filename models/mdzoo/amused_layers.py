"""Parts of the U-ViT of aMUSEd (Patil et al. 2024, arXiv 2401.01808).

Every map of the prompt alone lives in a ``prepare``; whoever has run these once needs only the
``forward`` and ``step`` of the parts in each pass. Positions are rows of (rows, canvas, width),
also between convolutions: all of these but one are maps of single positions.

Source: repository huggingface/diffusers (Apache 2.0), ``models/unets/uvit_2d.py``,
``models/attention.py`` and ``models/normalization.py``.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdzoo.layers import GatedFeedForward, LayerNorm, RMSNorm, modulate
from mdzoo.transformer import Attention

__all__ = ["Head", "Layer", "Prepared", "Stage", "TokenEmbedding"]

Prepared = tuple[Tensor, Tensor]
"""What a part keeps of a prompt: shifts and scales, and keys and values of its text."""

STAGE_EPSILON = 1e-6  # of the norms before attention in stages, whatever the others have


class CrossAttention(nn.Module):
    """Attention to a text that is the same in every pass: its keys and values come prepared."""

    def __init__(self, width: int, heads: int, text: int) -> None:
        """Take the widths of the queries' stream and of the text."""
        super().__init__()
        self.heads = heads
        self.head_size = width // heads
        inner = heads * self.head_size
        self.query = nn.Linear(width, inner, bias=False)
        self.kv = nn.Linear(text, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)

    def prepare(self, text: Tensor) -> Tensor:
        """Return keys and values (rows, 2, heads, n, head_size) of a text (rows, n, width)."""
        return self.kv(text).unflatten(-1, (2, self.heads, self.head_size)).permute(0, 2, 3, 1, 4)

    def forward(self, x: Tensor, prepared: Tensor) -> Tensor:
        """Attend from ``x`` (rows, m, width) to the text."""
        query = self.query(x).unflatten(-1, (self.heads, self.head_size)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, prepared[:, 0], prepared[:, 1])
        return self.out(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A layer of the transformer: attention, attention to the text, gated MLP.

    Each follows a norm that the condition scales and shifts; that of the MLP is centred.
    """

    def __init__(self, width: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        inner = heads * (width // heads)
        self.modulation = nn.Linear(width, 6 * width, bias=False)
        self.norm1 = RMSNorm(width, eps=eps)
        self.attention = Attention(width, heads, inner=inner, bias=False, out_bias=False)
        self.norm2 = RMSNorm(width, eps=eps)
        self.cross = CrossAttention(width, heads, width)
        self.norm3 = LayerNorm(width, eps=eps, bias=False)
        self.mlp = GatedFeedForward(width, hidden, activation=F.gelu)

    def prepare(self, text: Tensor, condition: Tensor) -> Prepared:
        """Return what only the prompt decides.

        Args:
            text: (rows, n, width).
            condition: (rows, width), activated.

        Returns:
            Scale and shift of each part (rows, 6, width), and (rows, 2, heads, n, head_size).
        """
        return self.modulation(condition).unflatten(1, (6, -1)), self.cross.prepare(text)

    def forward(self, x: Tensor, prepared: Prepared) -> Tensor:
        """Transform the whole canvas (rows, canvas, width), without a cache."""
        modulation, text = prepared
        x = x + self.attention(_modulated(self.norm1(x), modulation[:, 0:2]))
        return self._rest(x, modulation, text)

    def step(
        self, x: Tensor, positions: Tensor, cache: Sequence[Tensor], prepared: Prepared
    ) -> tuple[Tensor, list[Tensor]]:
        """Transform some rows (rows, m, width) of the canvas against the layer's cache."""
        modulation, text = prepared
        before = _modulated(self.norm1(x), modulation[:, 0:2])
        mixed, fresh = self.attention.step(before, positions, cache)
        return self._rest(x + mixed, modulation, text), fresh

    def _rest(self, x: Tensor, modulation: Tensor, text: Tensor) -> Tensor:
        x = x + self.cross(_modulated(self.norm2(x), modulation[:, 2:4]), text)
        return x + self.mlp(_modulated(self.norm3(x), modulation[:, 4:6]))


def _modulated(x: Tensor, pair: Tensor) -> Tensor:
    """Scale and shift ``x`` (rows, m, width) by ``pair`` (rows, 2, width), the scale first."""
    return modulate(x, pair[:, 1], pair[:, 0])


class GlobalResponseNorm(nn.Module):
    """Channels scaled by how strong they are, all over the canvas (arXiv 2301.00808), in float32.

    Strength is the norm over all positions, relative to its mean over the channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(width))
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Scale (rows, canvas, width); the result has the dtype of ``x``."""
        wide = x.float()
        norm = wide.square().sum(dim=1, keepdim=True).sqrt()
        strength = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        y = self.gamma.float() * (wide * strength) + self.beta.float() + wide
        return y.to(x.dtype)


class ConvBlock(nn.Module):
    """A ConvNeXt V2 block: the only part, beside attention, in which positions mix."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = RMSNorm(channels, eps=eps)
        self.up = nn.Linear(channels, 4 * channels, bias=False)
        self.response = GlobalResponseNorm(4 * channels)
        self.down = nn.Linear(4 * channels, channels, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Transform (rows, height * width, channels) of a canvas of (height, width)."""
        image = torch.unflatten(x.transpose(1, 2), 2, grid)
        y = self.norm(self.depthwise(image).flatten(2).transpose(1, 2))
        return x + self.down(self.response(F.gelu(self.up(y))))


class StageBlock(nn.Module):
    """A convolution that the condition scales and shifts, and attention to the text, twice."""

    def __init__(self, channels: int, heads: int, width: int, eps: float) -> None:
        super().__init__()
        self.conv = ConvBlock(channels, eps)
        self.modulation = nn.Linear(width, 2 * channels, bias=False)
        # Where the text has the right width already, the original leaves it as it is.
        self.text = nn.Linear(width, channels, bias=False) if width != channels else None
        self.norm1 = RMSNorm(channels, eps=STAGE_EPSILON)
        self.cross1 = CrossAttention(channels, heads, channels)
        self.norm2 = RMSNorm(channels, eps=STAGE_EPSILON)
        self.cross2 = CrossAttention(channels, heads, channels)

    def prepare(self, text: Tensor, condition: Tensor) -> Prepared:
        """As ``Layer.prepare``: (rows, 2, channels), (rows, 2, 2, heads, n, head_size)."""
        if self.text is not None:
            text = self.text(F.silu(text))
        pairs = [self.cross1.prepare(text), self.cross2.prepare(text)]
        return self.modulation(condition).unflatten(1, (2, -1)), torch.stack(pairs, dim=1)

    def forward(self, x: Tensor, grid: tuple[int, int], prepared: Prepared) -> Tensor:
        """Transform the whole canvas (rows, height * width, channels)."""
        modulation, text = prepared
        x = _modulated(self.conv(x, grid), modulation)
        x = x + self.cross1(self.norm1(x), text[:, 0])
        return x + self.cross2(self.norm2(x), text[:, 1])


class Stage(nn.ModuleList):
    """The blocks before, or after, the transformer."""

    def forward(self, x: Tensor, grid: tuple[int, int], prepared: Prepared) -> Tensor:
        """Transform the whole canvas; ``prepared`` is that of all blocks, stacked on axis 1."""
        for index, block in enumerate(self):
            x = block(x, grid, (prepared[0][:, index], prepared[1][:, index]))
        return x

    def blocks(self) -> Iterator[StageBlock]:
        """Yield the blocks under their own type."""
        return (cast(StageBlock, block) for block in self)


class TokenEmbedding(nn.Module):
    """Tokens to rows of the canvas; the tokens of a patch become one row."""

    def __init__(
        self, vocabulary: int, embedding: int, channels: int, slots: int, eps: float
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, embedding)
        self.norm = RMSNorm(embedding, eps=eps)
        self.out = nn.Linear(embedding, channels, bias=False)
        # The original's convolution of 2 x 2 with stride 2, as a map of single patches.
        self.patch_norm = RMSNorm(channels, eps=eps) if slots > 1 else None
        self.patch = nn.Linear(slots * channels, channels, bias=False) if slots > 1 else None

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed int (rows, m, slots) as (rows, m, channels)."""
        x = self.out(self.norm(self.table(tokens)))
        if self.patch_norm is not None and self.patch is not None:
            return self.patch(self.patch_norm(x).flatten(2))
        return x.flatten(2)


class Head(nn.Module):
    """Rows of the canvas to logits of their tokens."""

    def __init__(
        self, channels: int, embedding: int, codebook: int, slots: int, eps: float
    ) -> None:
        super().__init__()
        self.slots = slots
        # The original's transposed convolution of 2 x 2 with stride 2.
        self.patch_norm = RMSNorm(channels, eps=eps) if slots > 1 else None
        self.patch = nn.Linear(channels, slots * channels, bias=False) if slots > 1 else None
        self.enter = nn.Linear(channels, embedding, bias=False)
        self.norm = RMSNorm(embedding, eps=eps)
        self.table = nn.Linear(embedding, codebook, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, k, channels) to float32 (rows, k * slots, codebook)."""
        if self.patch_norm is not None and self.patch is not None:
            x = self.patch(self.patch_norm(x)).unflatten(2, (self.slots, -1)).flatten(1, 2)
        return F.linear(self.norm(self.enter(x)).float(), self.table.weight.float())
