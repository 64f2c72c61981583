"""The image tokenizer of MaskGIT (Chang et al. 2022, arXiv 2202.04200), as google released it.

A VQGAN without attention, in which shortcuts of changing width project what the block computed.
Source: repository google-research/maskgit (Apache 2.0), ``maskgit/nets/vqgan_tokenizer.py``. The
same weights are published under four sets of names: google's flax tree, openMUSE and TiTok's
separate file, MAGE's file, and the decoder inside every TiTok tokenizer.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from mdzoo.codec import ConvCodec, assemble
from mdzoo.conv import ConvConfig, Style
from mdzoo.names import Names

__all__ = ["PUBLISHED", "MaskGITVQGAN", "load", "to_published"]

STYLE = Style(
    bias=False,
    echo=True,
    attention=False,
    extra=0,
    pooled=True,
    projected=False,
    pixels=(0.0, 1.0),
)

PUBLISHED = ConvConfig(style=STYLE)

# Of openMUSE. The names of MAGE are ours, and those of TiTok are openMUSE's.
_NAMES = Names(
    (
        ("encoder.mid.0.", "encoder.mid.block_1."),
        ("encoder.mid.1.", "encoder.mid.block_2."),
        ("decoder.mid.0.", "decoder.mid.block_1."),
        ("decoder.mid.1.", "decoder.mid.block_2."),
        ("decoder.up.{i}.upsample_conv.", "decoder.up.{i}.upsample.conv."),
    )
)

PARTS = {"vqgan.": "", "pixel_decoder.": "decoder.", "pixel_quantize.": "quantize."}
"""Prefixes under which files of larger models hold this one."""


class MaskGITVQGAN(ConvCodec):
    """Images to tokens and back; pixels are in [0, 1]."""


def load(state: Mapping[str, Tensor], *, source: str) -> MaskGITVQGAN:
    """Build a tokenizer from published tensors.

    Args:
        state: tensors under any of their published names, alone or among those of a MAGE or TiTok
            model; names of flax are joined by slashes. A TiTok file has no encoder for pixels.
        source: where they come from, for messages.

    Raises:
        CheckpointError: another architecture, or damaged weights.
    """
    flax = any("/" in key for key in state)
    ours = _from_flax(state) if flax else _NAMES.read(_part(state))
    return assemble(MaskGITVQGAN, ours, STYLE, source)


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a ``MaskGITVQGAN`` under the names of openMUSE."""
    return _NAMES.write(state)


def _part(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    parts = {
        after + key.removeprefix(before): state[key]
        for key in state
        for before, after in PARTS.items()
        if key.startswith(before)
    }
    return parts or state


_INSIDE = {
    "GroupNorm_0": "norm1",
    "Conv_0": "conv1",
    "GroupNorm_1": "norm2",
    "Conv_1": "conv2",
    "Conv_2": "nin_shortcut",
}
"""Layers of a residual block: flax numbers them in the order of their use."""


def _from_flax(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    layers = _flax_layers(state)
    return {_flax_name(key, layers): _flax_tensor(key, state[key]) for key in state}


def _flax_layers(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return our names of the layers that flax numbers in the order of their use."""
    lowest = _numbered(state, "decoder/Conv") - 2  # one doubles each level above the lowest
    blocks = (_numbered(state, "decoder/ResBlock") - 2) // (lowest + 1)
    steps = [divmod(k, blocks) for k in range(blocks * (lowest + 1))]
    encoder = ["down.{}.block.{}".format(*step) for step in steps] + ["mid.block_1", "mid.block_2"]
    decoder = ["mid.block_1", "mid.block_2"]
    decoder += [f"up.{lowest - level}.block.{block}" for level, block in steps]
    doublings = [f"up.{level}.upsample.conv" for level in range(lowest, 0, -1)]
    names = {
        "encoder/ResBlock": encoder,
        "encoder/Conv": ["conv_in", "conv_out"],
        "encoder/GroupNorm": ["norm_out"],
        "decoder/ResBlock": decoder,
        "decoder/Conv": ["conv_in", *doublings, "conv_out"],
        "decoder/GroupNorm": ["norm_out"],
    }
    return {
        f"{kind}_{number}": f"{kind.partition('/')[0]}.{name}"
        for kind, ordered in names.items()
        for number, name in enumerate(ordered)
    }


def _numbered(state: Mapping[str, Tensor], kind: str) -> int:
    found = {match[1] for key in state if (match := re.match(rf"{kind}_(\d+)/", key))}
    return len(found)


def _flax_name(key: str, layers: Mapping[str, str]) -> str:
    if key == "quantizer/codebook":
        return "quantize.embedding.weight"
    half, layer, *inside, leaf = key.split("/") if key.count("/") > 1 else ("", key, "")
    ours = [layers.get(f"{half}/{layer}", key)]
    ours += [_INSIDE.get(name, name) for name in inside]
    return ".".join([*ours, "bias" if leaf == "bias" else "weight"])


def _flax_tensor(key: str, tensor: Tensor) -> Tensor:
    # Flax stores kernels as (height, width, in, out).
    kernel = key.endswith("/kernel") and tensor.ndim == 4
    return tensor.permute(3, 2, 0, 1) if kernel else tensor
