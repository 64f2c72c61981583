"""The image tokenizers of MaskBit (Weber et al. 2024, arXiv 2409.16211).

The networks of google's tokenizer with strided convolutions, around a quantiser without a
codebook: a latent's signs are the bits of its code. The generator splits each code in two groups,
of which each is a token of its own. Source: repository markweberdev/maskbit (Apache 2.0),
``modeling/conv_vqgan.py`` and ``modeling/quantizer/lookup_free.py``.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mdzoo.checkpoint import CheckpointError
from mdzoo.codec import ConvCodec, assemble, flipped
from mdzoo.conv import ConvConfig, Style
from mdzoo.names import Names

__all__ = ["MaskBitVQ", "join", "load", "published", "split", "to_published"]

GROUPS = 2  # tokens per position

STYLE = Style(
    bias=False, echo=True, attention=False, extra=0, projected=False, signs=True, pixels=(0.0, 1.0)
)

BUFFERS = ("quantize.bits_to_indices", "quantize.codebook")
"""Tables in the published files that follow from the number of bits."""

_NAMES = Names(
    (
        ("encoder.mid.res_blocks.0.", "encoder.mid.block_1."),
        ("encoder.mid.res_blocks.1.", "encoder.mid.block_2."),
        ("encoder.down.{i}.res_blocks.", "encoder.down.{i}.block."),
        ("encoder.down.{i}.down_conv.", "encoder.down.{i}.downsample.conv."),
        ("decoder.mid.res_blocks.0.", "decoder.mid.block_1."),
        ("decoder.mid.res_blocks.1.", "decoder.mid.block_2."),
        ("decoder.up.{i}.res_blocks.", "decoder.up.{i}.block."),
        ("decoder.up.{i}.upsample_conv.", "decoder.up.{i}.upsample.conv."),
    )
)


def published(bits: int) -> ConvConfig:
    """Return the sizes of the published tokenizer of 10, 12, 14, 16 or 18 bits."""
    return ConvConfig(latent=bits, embedding=bits, codebook=2**bits, style=STYLE)


def join(tokens: Tensor, bits: int) -> Tensor:
    """Return codes, int64 (batch, positions), of tokens.

    Args:
        tokens: int (batch, 2 * positions); the group of the lower bits comes first.
        bits: of a code, an even number.
    """
    low, high = tokens.long()[:, ::GROUPS], tokens.long()[:, 1::GROUPS]
    return low + high * 2 ** (bits // GROUPS)


def split(codes: Tensor, bits: int) -> Tensor:
    """Return the tokens, int64 (batch, 2 * positions), of codes: the inverse of ``join``."""
    classes = 2 ** (bits // GROUPS)
    return torch.stack((codes % classes, codes // classes), dim=2).flatten(1)


class MaskBitVQ(ConvCodec):
    """Images to tokens and back, two tokens a position; pixels are in [0, 1]."""

    def __init__(self, config: ConvConfig) -> None:
        if config.latent % GROUPS:
            raise CheckpointError(
                f"the bits of a code must split in {GROUPS} groups, got {config.latent} bits; "
                "is the checkpoint one of MaskBit?"
            )
        super().__init__(config)

    @property
    def codebook(self) -> int:
        """Number of tokens there are in each group."""
        return 2 ** (self.config.latent // GROUPS)

    def encode(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, height, width) to int64 tokens (batch, 2 * h * w)."""
        return split(super().encode(images), self.config.latent)

    def decode(self, tokens: Tensor) -> Tensor:
        """Return images (batch, 3, f * h, f * w), in [0, 1] but for outliers, which stay.

        Args:
            tokens: int (batch, 2 * h * w) of a square grid.
        """
        return super().decode(join(tokens, self.config.latent))


def load(state: Mapping[str, Tensor], *, source: str) -> MaskBitVQ:
    """Build a tokenizer from published tensors.

    Args:
        state: tensors under their published names.
        source: where they come from, for messages.

    Raises:
        CheckpointError: another architecture, or damaged weights.
    """
    weights = {key: tensor for key, tensor in state.items() if key not in BUFFERS}
    return assemble(MaskBitVQ, flipped(_NAMES.read(weights)), STYLE, source)


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a ``MaskBitVQ`` under its published names."""
    return _NAMES.write(flipped(state))
