"""The image tokenizer of aMUSEd (Patil et al. 2024, arXiv 2401.01808).

A VQGAN without attention, written in the terms of diffusers. Source: repository
huggingface/diffusers (Apache 2.0), ``models/autoencoders/vq_model.py`` and ``vae.py``.
"""

from collections.abc import Callable, Mapping
from typing import Any, Self

from torch import Tensor

from mdzoo.checkpoint import CheckpointError
from mdzoo.codec import ConvCodec, assemble, flipped
from mdzoo.conv import GROUPS, ConvConfig, Style
from mdzoo.names import Names

__all__ = ["PUBLISHED", "VQModel", "load", "read_config", "to_published"]

STYLE = Style(attention=False, pixels=(0.0, 1.0))

PUBLISHED = ConvConfig(
    widths=(128, 256, 256, 512, 768), latent=64, embedding=64, codebook=8192, style=STYLE
)

SUPPORTED = {
    "act_fn": ("silu", "silu"),
    "norm_num_groups": (GROUPS, GROUPS),
    "norm_type": ("group", "group"),
    "mid_block_add_attention": (False, True),
    "in_channels": (3, 3),
    "out_channels": (3, 3),
}
"""Where models of diffusers differ: the setting that is built here, and the one by default."""

_NAMES = Names(
    (
        (
            "encoder.down_blocks.{i}.resnets.{j}.conv_shortcut.",
            "encoder.down.{i}.block.{j}.nin_shortcut.",
        ),
        ("encoder.down_blocks.{i}.resnets.", "encoder.down.{i}.block."),
        ("encoder.down_blocks.{i}.downsamplers.0.", "encoder.down.{i}.downsample."),
        ("encoder.mid_block.resnets.0.", "encoder.mid.block_1."),
        ("encoder.mid_block.resnets.1.", "encoder.mid.block_2."),
        ("encoder.conv_norm_out.", "encoder.norm_out."),
        (
            "decoder.up_blocks.{i}.resnets.{j}.conv_shortcut.",
            "decoder.up.{i}.block.{j}.nin_shortcut.",
        ),
        ("decoder.up_blocks.{i}.resnets.", "decoder.up.{i}.block."),
        ("decoder.up_blocks.{i}.upsamplers.0.", "decoder.up.{i}.upsample."),
        ("decoder.mid_block.resnets.0.", "decoder.mid.block_1."),
        ("decoder.mid_block.resnets.1.", "decoder.mid.block_2."),
        ("decoder.conv_norm_out.", "decoder.norm_out."),
    )
)


class VQModel(ConvCodec):
    """Images to tokens and back; pixels are in [0, 1].

    Whoever casts it to half precision gets it in float32: the published weights reach
    activations beyond the range of float16, which come out as NaN.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Module.to, half and float all come here, also those of a module around this one.
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        applied: Self = super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        return applied


def read_config(published: Mapping[str, Any]) -> ConvConfig:
    """Return the sizes that a published ``config.json`` states.

    Args:
        published: settings under the names of diffusers, whose defaults hold where one is absent.

    Raises:
        CheckpointError: a setting of another architecture.
    """
    for name, (wanted, default) in SUPPORTED.items():
        if published.get(name, default) != wanted:
            raise CheckpointError(
                f"the tokenizer's {name} must be {wanted!r}, found {published.get(name, default)!r}"
                " in its config; convert a model of aMUSEd"
            )
    widths = tuple(published.get("block_out_channels", (64,)))
    latent = published.get("latent_channels", 3)
    return ConvConfig(
        widths=widths,
        stem=widths[0],
        blocks=published.get("layers_per_block", 1),
        latent=latent,
        embedding=published.get("vq_embed_dim") or latent,
        codebook=published.get("num_vq_embeddings", 256),
        style=STYLE,
    )


def load(
    state: Mapping[str, Tensor], *, source: str, config: Mapping[str, Any] | None = None
) -> VQModel:
    """Build a tokenizer from published tensors.

    Args:
        state: tensors under their published names.
        source: where they come from, for messages.
        config: the published settings, to be checked; sizes are read from shapes.

    Raises:
        CheckpointError: another architecture, or damaged weights.
    """
    codec = assemble(VQModel, flipped(_NAMES.read(state)), STYLE, source)
    if config is not None and (stated := read_config(config)) != codec.config:
        raise CheckpointError(
            f"{source} must hold the tokenizer of its config, {stated}, found {codec.config}; "
            "download both again"
        )
    return codec


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a ``VQModel`` under its published names."""
    return _NAMES.write(flipped(state))
