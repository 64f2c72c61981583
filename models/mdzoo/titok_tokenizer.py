"""The image tokenizers of TiTok (Yu et al. 2024, arXiv 2406.07550): an image is 32 to 128 tokens.

Two vision transformers around a codebook. Each sees a class row, one row per patch of the image,
and the latent tokens: the encoder reads patches and hands over the latent rows; the decoder is
given latent rows and mask rows for the patches, where it predicts what google's tokenizer
(``mdzoo.maskgit_vqgan``) would have found there; the decoder of that one paints the pixels.
Source: repository bytedance/1d-tokenizer (Apache 2.0), ``modeling/titok.py`` and
``modeling/modules/blocks.py``, whose names the modules bear.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdzoo import checkpoint, maskgit_vqgan
from mdzoo.checkpoint import CheckpointError, shape_of
from mdzoo.codec import Codebook
from mdzoo.conv import ConvConfig
from mdzoo.layers import FeedForward, LayerNorm
from mdzoo.maskgit_vqgan import MaskGITVQGAN
from mdzoo.names import Names
from mdzoo.transformer import Attention, Block, Stack

__all__ = ["PUBLISHED", "TiTokTokenizer", "TokenizerConfig", "TowerConfig", "load", "to_published"]

PUBLISHED_HEAD = 64  # head size of all published towers, which no shape tells
PAINTER = ConvConfig(encodes=False, style=maskgit_vqgan.STYLE)


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """Sizes of a vision transformer."""

    width: int
    depth: int
    heads: int
    hidden: int  # width of the MLP between its two maps

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], half: str, head_size: int) -> Self:
        """Read the sizes of the encoder or decoder from the shapes of a published state dict."""
        width = shape_of(state, f"{half}.class_embedding", 2)[1]
        if width % head_size:
            raise CheckpointError(
                f"the width of the {half} must be a multiple of its head size {head_size}, got "
                f"{width}; is the checkpoint of another architecture?"
            )
        blocks = [re.match(rf"{half}\.transformer\.(\d+)\.", key) for key in state]
        return cls(
            width=width,
            depth=len({found[1] for found in blocks if found}),
            heads=width // head_size,
            hidden=shape_of(state, f"{half}.transformer.0.mlp.c_fc.weight", 2)[0],
        )


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """Sizes of a tokenizer."""

    length: int  # tokens of an image
    encoder: TowerConfig
    decoder: TowerConfig
    grid: int = 16  # patches on a side of the square image
    patch: int = 16  # pixels on a side of a patch, for the encoder
    embedding: int = 12  # size of a codebook entry
    codebook: int = 4096
    painter: ConvConfig = PAINTER  # google's tokenizer, which turns a patch to pixels

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], painter: ConvConfig, head_size: int) -> Self:
        """Read the other sizes from the shapes of a published state dict."""
        rows = shape_of(state, "encoder.positional_embedding", 2)[0]
        grid = math.isqrt(rows - 1)
        if grid < 1 or grid**2 != rows - 1:
            raise CheckpointError(
                "encoder.positional_embedding must cover a square image and one class row, got "
                f"{rows} rows; is the checkpoint of another architecture?"
            )
        codebook, embedding = shape_of(state, "quantize.embedding.weight", 2)
        return cls(
            length=shape_of(state, "latent_tokens", 2)[0],
            encoder=TowerConfig.from_state(state, "encoder", head_size),
            decoder=TowerConfig.from_state(state, "decoder", head_size),
            grid=grid,
            patch=shape_of(state, "encoder.patch_embed.weight", 4)[2],
            embedding=embedding,
            codebook=codebook,
            painter=painter,
        )


def _block(config: TowerConfig) -> Block:
    width = config.width
    attention, mlp = Attention(width, config.heads), FeedForward(width, config.hidden)
    return Block(attention, mlp, LayerNorm(width), LayerNorm(width))


def _learnt(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)


class _Tower(nn.Module):
    """A vision transformer over a class row, rows of patches, and latent rows."""

    def __init__(self, config: TowerConfig, patches: int, length: int) -> None:
        super().__init__()
        width = config.width
        self.class_embedding = _learnt(1, width)
        self.positional_embedding = _learnt(patches + 1, width)
        self.latent_token_positional_embedding = _learnt(length, width)
        self.ln_pre = LayerNorm(width)
        self.transformer = Stack(_block(config) for _ in range(config.depth))
        self.ln_post = LayerNorm(width)

    def _rows(self, patches: Tensor, latents: Tensor) -> Tensor:
        """Transform (batch, patches, width) and (batch, length, width), the class row before."""
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        x = torch.cat([first, patches], dim=1) + self.positional_embedding
        y = latents + self.latent_token_positional_embedding
        return self.transformer(self.ln_pre(torch.cat([x, y], dim=1)))


class Encoder(_Tower):
    """Images to the vectors of latent tokens."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config.encoder, config.grid**2, config.length)
        width, patch = config.encoder.width, config.patch
        self.patch_embed = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.conv_out = nn.Conv2d(width, config.embedding, kernel_size=1)

    def forward(self, images: Tensor, latents: Tensor) -> Tensor:
        """Return (batch, embedding, 1, length).

        Args:
            images: (batch, 3, height, width) in [0, 1].
            latents: (length, width), what stands in the latent rows at first.
        """
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = self._rows(patches, latents.expand(images.shape[0], -1, -1))
        x = self.ln_post(x[:, 1 + patches.shape[1] :])
        # The published weights were trained with this mixture of axes: no transposition.
        x = x.reshape(x.shape[0], x.shape[2], x.shape[1], 1)
        return self.conv_out(x).transpose(2, 3)


class Decoder(_Tower):
    """Vectors of latent tokens to what google's tokenizer would have found at each patch."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config.decoder, config.grid**2, config.length)
        width = config.decoder.width
        self.grid = config.grid
        self.mask_token = _learnt(1, 1, width)
        self.decoder_embed = nn.Linear(config.embedding, width)
        self.ffn = nn.Sequential(
            nn.Conv2d(width, 2 * width, kernel_size=1),
            nn.Tanh(),
            nn.Conv2d(2 * width, config.painter.codebook, kernel_size=1),
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Map (batch, embedding, 1, length) to logits (batch, google's codebook, grid, grid)."""
        y = self.decoder_embed(latents.flatten(2).transpose(1, 2))
        x = self._rows(self.mask_token.expand(y.shape[0], self.grid**2, -1), y)
        x = self.ln_post(x[:, 1 : 1 + self.grid**2])
        return self.ffn(x.transpose(1, 2).unflatten(2, (self.grid, self.grid)))


class TiTokTokenizer(nn.Module):
    """Images to tokens and back; satisfies ``mdzoo.decoder.Codec``."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_tokens = _learnt(config.length, config.encoder.width)
        self.encoder = Encoder(config)
        self.quantize = Codebook(config.codebook, config.embedding, unit=True)
        self.decoder = Decoder(config)
        self.vqgan = MaskGITVQGAN(config.painter)

    @property
    def factor(self) -> int:
        """No square becomes a token: tokens have no place."""
        return 0

    @property
    def side(self) -> int:
        """Pixels on a side of the square images."""
        return self.config.grid * self.config.patch

    @property
    def codebook(self) -> int:
        """Number of tokens there are."""
        return self.config.codebook

    @property
    def pixels(self) -> tuple[float, float]:
        """Values of black and white in ``decode``'s and ``encode``'s images."""
        return self.vqgan.pixels

    def latents(self, images: Tensor) -> Tensor:
        """Return what the codebook is searched for, (batch, embedding, 1, length).

        Args:
            images: (batch, 3, height, width) in [0, 1], of the one size there is.

        Raises:
            ValueError: images of another size.
        """
        height, width = images.shape[2:]
        if (height, width) != (self.side, self.side):
            raise ValueError(
                f"images must have {self.side} x {self.side} pixels, got {height} x {width}; "
                "crop or resize them"
            )
        return self.encoder(images.to(self.latent_tokens.dtype), self.latent_tokens)

    def encode(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, height, width) in [0, 1] to int64 tokens (batch, length)."""
        return self.quantize.nearest(self.latents(images))

    def decode(self, tokens: Tensor) -> Tensor:
        """Map int (batch, length) to images (batch, 3, height, width), in [0, 1] but for outliers.

        A patch is painted from a mixture of google's codebook entries, by their probabilities.
        """
        table = self.vqgan.get_parameter("quantize.embedding.weight")
        shares = self.decoder(self.quantize(tokens[:, None])).float().softmax(dim=1)
        return self.vqgan.decoder(F.conv2d(shares.to(table.dtype), table.T[..., None, None]))


_NAMES = Names(
    tuple(
        (f"{half}.transformer.{{i}}.{theirs}", f"{half}.transformer.{{i}}.{ours}")
        for half in ("encoder", "decoder")
        for theirs, ours in (
            ("ln_1.", "norm1."),
            ("attn.in_proj_", "attention.qkv."),
            ("attn.out_proj.", "attention.out."),
            ("ln_2.", "norm2."),
            ("mlp.c_fc.", "mlp.up."),
            ("mlp.c_proj.", "mlp.down."),
        )
    )
)
_PAINTER = ("pixel_decoder.", "pixel_quantize.")


def load(
    state: Mapping[str, Tensor], *, source: str, head_size: int = PUBLISHED_HEAD
) -> TiTokTokenizer:
    """Build a tokenizer from published tensors.

    Args:
        state: tensors under their published names.
        source: where they come from, for messages.
        head_size: of all attention, which no shape tells.

    Raises:
        CheckpointError: another architecture, or damaged weights.
    """
    shape_of(state, "pixel_quantize.embedding.weight", 2)  # later tokenizers paint without it
    painter = {key: tensor for key, tensor in state.items() if key.startswith(_PAINTER)}
    vqgan = maskgit_vqgan.load(painter, source=source)
    ours = _NAMES.read({key: state[key] for key in state if key not in painter})
    ours |= {f"vqgan.{key}": tensor for key, tensor in vqgan.state_dict().items()}
    with torch.device("meta"):
        codec = TiTokTokenizer(TokenizerConfig.from_state(state, vqgan.config, head_size))
    codec.to_empty(device="cpu")
    checkpoint.fit(codec, ours, source=source)
    return codec.eval()


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a ``TiTokTokenizer`` under its published names."""
    painter = {k.removeprefix("vqgan."): w for k, w in state.items() if k.startswith("vqgan.")}
    rest = {k: w for k, w in state.items() if not k.startswith("vqgan.")}
    published = maskgit_vqgan.to_published(painter)
    return _NAMES.write(rest) | {f"pixel_{key}": published[key] for key in published}


def _published(length: int, width: int, depth: int) -> TokenizerConfig:
    tower = TowerConfig(width, depth, width // PUBLISHED_HEAD, 4 * width)
    return TokenizerConfig(length, encoder=tower, decoder=tower)


PUBLISHED = {
    "titok-l32": _published(32, 1024, 24),
    "titok-b64": _published(64, 768, 12),
    "titok-s128": _published(128, 512, 8),
}
