"""The image tokenizers of LlamaGen (Sun et al. 2024, arXiv 2406.06525).

A taming VQGAN whose codebook is searched by direction: entries and latents have length one.
Source: repository FoundationVision/LlamaGen (MIT licence), ``tokenizer/tokenizer_image``.
"""

from collections.abc import Mapping

from torch import Tensor

from mdzoo.codec import ConvCodec, assemble, flipped
from mdzoo.conv import ConvConfig, Style
from mdzoo.names import Names

__all__ = ["VQ8", "VQ16", "LlamaGenVQ", "load", "to_published"]

STYLE = Style(unit=True)

VQ16 = ConvConfig(embedding=8, codebook=16384, style=STYLE)
VQ8 = ConvConfig(widths=(128, 256, 256, 512), embedding=8, codebook=16384, style=STYLE)

_NAMES = Names(
    (
        ("encoder.mid.0.", "encoder.mid.block_1."),
        ("encoder.mid.1.", "encoder.mid.attn_1."),
        ("encoder.mid.2.", "encoder.mid.block_2."),
        ("encoder.conv_blocks.{i}.res.", "encoder.down.{i}.block."),
        ("encoder.conv_blocks.", "encoder.down."),
        ("decoder.mid.0.", "decoder.mid.block_1."),
        ("decoder.mid.1.", "decoder.mid.attn_1."),
        ("decoder.mid.2.", "decoder.mid.block_2."),
        ("decoder.conv_blocks.{i}.res.", "decoder.up.{i}.block."),
        ("decoder.conv_blocks.", "decoder.up."),
    )
)


class LlamaGenVQ(ConvCodec):
    """Images to tokens and back; pixels are in [-1, 1]."""


def load(state: Mapping[str, Tensor], *, source: str) -> LlamaGenVQ:
    """Build a tokenizer from published tensors.

    Args:
        state: tensors under their published names.
        source: where they come from, for messages.

    Raises:
        CheckpointError: another architecture, or damaged weights.
    """
    used = "quantize.codebook_used"  # statistics of training
    weights = _NAMES.read({key: state[key] for key in state if key != used})
    return assemble(LlamaGenVQ, flipped(weights), STYLE, source)


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a ``LlamaGenVQ`` under its published names."""
    return _NAMES.write(flipped(state))
