"""Sizes of aMUSEd's U-ViT, and the names of its published tensors.

Source: repository huggingface/diffusers (Apache 2.0), ``models/unets/uvit_2d.py``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from mdzoo.checkpoint import CheckpointError, shape_of
from mdzoo.names import Names

__all__ = ["MICRO", "UVitConfig", "from_published", "to_published"]

MICRO = 5
"""Numbers of the micro-conditioning: width, height, two of the crop, aesthetic score."""

SUPPORTED = {"use_bias": False, "ln_elementwise_affine": True}
"""Settings of diffusers that no published model has otherwise."""


@dataclass(frozen=True, slots=True)
class UVitConfig:
    """Sizes of a U-ViT; the defaults are those of aMUSEd 256."""

    size: int = 16  # tokens on a side of the square image
    patch: int = 1  # of which so many on a side share a row of the canvas
    vocabulary: int = 8256
    codebook: int = 8192
    embedding: int = 768  # width of the tables of tokens, before and after
    channels: int = 768  # width of the stages
    blocks: int = 3  # of each stage
    block_heads: int = 12
    width: int = 1024  # of the transformer
    depth: int = 22
    heads: int = 16
    hidden: int = 2816  # width of the gated MLPs
    text: int = 768  # width of the text's states
    pooled: int = 768  # width of the text's summary
    micro: int = 256  # of the sinusoids of each number of the micro-conditioning
    eps: float = 1e-6

    def __post_init__(self) -> None:
        """Check what no tensor shape can tell."""
        heads = ("heads", self.heads, self.width), ("block_heads", self.block_heads, self.channels)
        for name, count, width in heads:
            if not 1 <= count <= width:
                raise CheckpointError(
                    f"{name} must lie between 1 and the width {width}, got {count}; "
                    f"the checkpoint cannot tell it: pass --set {name}=N"
                )
        if self.size < 1 or self.size % self.patch:
            raise CheckpointError(
                f"size must be a multiple of {self.patch}, the tokens on a side of a patch, "
                f"got {self.size}: pass --set size=N"
            )
        if min(self.blocks, self.depth) < 1:
            raise CheckpointError(
                f"stages and transformer must have a block each, got {self.blocks} and "
                f"{self.depth}; is the checkpoint of another architecture?"
            )
        if self.micro < 2 or self.micro % 2:
            raise CheckpointError(
                f"micro must be even, half of it cosines, got {self.micro}; "
                "is the checkpoint of another architecture?"
            )

    @property
    def slots(self) -> int:
        """Tokens that share a row of the canvas."""
        return self.patch**2

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the canvas in rows."""
        return self.size // self.patch, self.size // self.patch

    @classmethod
    def from_json(cls, published: Mapping[str, Any]) -> Self:
        """Read what a published ``config.json`` states; defaults are those of diffusers.

        Raises:
            CheckpointError: a setting of another architecture.
        """
        for name, wanted in SUPPORTED.items():
            if published.get(name, wanted) != wanted:
                raise CheckpointError(
                    f"the transformer's {name} must be {wanted}, found {published[name]!r} in its "
                    "config; convert a model of aMUSEd"
                )
        if bool(published.get("downsample")) != bool(published.get("upsample")):
            raise CheckpointError(
                "the transformer must have downsample and upsample, or neither, "
                "found one of them in its config; convert a model of aMUSEd"
            )
        return cls(
            size=published.get("sample_size", 64),
            patch=2 if published.get("downsample") else 1,
            vocabulary=published.get("vocab_size", 8256),
            codebook=published.get("codebook_size", 8192),
            embedding=published.get("in_channels", 768),
            channels=published.get("block_out_channels", 768),
            blocks=published.get("num_res_blocks", 3),
            block_heads=published.get("block_num_heads", 12),
            width=published.get("hidden_size", 1024),
            depth=published.get("num_hidden_layers", 22),
            heads=published.get("num_attention_heads", 16),
            hidden=published.get("intermediate_size", 2816),
            text=published.get("encoder_hidden_size", 768),
            pooled=published.get("cond_embed_dim", 768),
            micro=published.get("micro_cond_encode_dim", 256),
            eps=published.get("layer_norm_eps", 1e-6),
        )

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], published: "UVitConfig", settings: Mapping[str, int]
    ) -> Self:
        """Read all sizes from shapes; from the published model only what is sure to be the same.

        Args:
            state: tensors under their published names.
            published: the model that was asked for.
            settings: ``size``, ``heads``, ``block_heads`` and ``pooled``, which no shape tells.

        Raises:
            CheckpointError: another architecture, or sizes that must be told.
        """
        vocabulary, embedding = shape_of(state, "embed.embeddings.weight", 2)
        width, text = shape_of(state, "encoder_proj.weight", 2)
        channels = shape_of(state, "embed.conv.weight", 4)[0]
        patch = 2 if "down_block.downsample.norm.weight" in state else 1
        pooled = settings.get("pooled", published.pooled)
        return cls(
            size=settings.get("size", published.size // published.patch * patch),
            patch=patch,
            vocabulary=vocabulary,
            codebook=shape_of(state, "mlm_layer.conv2.weight", 4)[0],
            embedding=embedding,
            channels=channels,
            blocks=_count(state, "down_block.res_blocks"),
            block_heads=_heads(
                settings, "block_heads", channels, published.channels, published.block_heads
            ),
            width=width,
            depth=_count(state, "transformer_layers"),
            heads=_heads(settings, "heads", width, published.width, published.heads),
            hidden=shape_of(state, "transformer_layers.0.ff.net.2.weight", 2)[1],
            text=text,
            pooled=pooled,
            micro=(shape_of(state, "cond_embed.linear_1.weight", 2)[1] - pooled) // MICRO,
            eps=published.eps,
        )


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    found = [re.match(rf"{re.escape(prefix)}\.(\d+)\.", key) for key in state]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _heads(settings: Mapping[str, int], name: str, width: int, published: int, heads: int) -> int:
    """Return the number of heads that was told, or that of the published model of this width."""
    if name not in settings and width != published:
        raise CheckpointError(
            f"the checkpoint has width {width} where the published model has {published}, "
            f"so its number of attention heads is unknown: pass --set {name}=N"
        )
    return settings.get(name, heads)


def _stage_names(published: str, ours: str) -> tuple[tuple[str, str], ...]:
    conv, attention = f"{published}.res_blocks.{{i}}.", f"{published}.attention_blocks.{{i}}."
    block = f"{ours}.{{i}}."
    return (
        (conv + "depthwise.", block + "conv.depthwise."),
        (conv + "norm.", block + "conv.norm."),
        (conv + "channelwise_linear_1.", block + "conv.up."),
        (conv + "channelwise_norm.", block + "conv.response."),
        (conv + "channelwise_linear_2.", block + "conv.down."),
        (conv + "cond_embeds_mapper.", block + "modulation."),
        (attention + "kv_mapper.", block + "text."),
        (attention + "norm{j}.", block + "norm{j}."),
        (attention + "attn{j}.to_q.", block + "cross{j}.query."),
        (attention + "attn{j}.to_kv.", block + "cross{j}.kv."),
        (attention + "attn{j}.to_out.0.", block + "cross{j}.out."),
    )


_LAYER = "transformer_layers.{i}."
_CROSS = (
    "down_block.attention_blocks.{i}.attn{j}.",
    "up_block.attention_blocks.{i}.attn{j}.",
    _LAYER + "attn2.",
)
_NAMES = Names(
    renamed=(
        ("encoder_proj.", "text."),
        ("encoder_proj_layer_norm.", "text_norm."),
        ("cond_embed.linear_1.", "summary.0."),
        ("cond_embed.linear_2.", "summary.2."),
        ("embed.embeddings.", "embed.table."),
        ("embed.layer_norm.", "embed.norm."),
        ("embed.conv.", "embed.out."),
        ("down_block.downsample.norm.", "embed.patch_norm."),
        ("down_block.downsample.conv.", "embed.patch."),
        ("down_block.downsample.Conv2d_0.", "embed.patch."),  # older files
        *_stage_names("down_block", "down"),
        ("project_to_hidden_norm.", "enter_norm."),
        ("project_to_hidden.", "enter."),
        (_LAYER + "modulation.", "layers.{i}.modulation."),
        (_LAYER + "norm{j}.norm.", "layers.{i}.norm{j}."),
        (_LAYER + "attn1.to_qkv.", "layers.{i}.attention.qkv."),
        (_LAYER + "attn1.to_out.0.", "layers.{i}.attention.out."),
        (_LAYER + "attn2.to_q.", "layers.{i}.cross.query."),
        (_LAYER + "attn2.to_kv.", "layers.{i}.cross.kv."),
        (_LAYER + "attn2.to_out.0.", "layers.{i}.cross.out."),
        (_LAYER + "ff.net.0.up.", "layers.{i}.mlp.up."),
        (_LAYER + "ff.net.0.gate.", "layers.{i}.mlp.gate."),
        (_LAYER + "ff.net.2.", "layers.{i}.mlp.down."),
        ("project_from_hidden_norm.", "leave_norm."),
        ("project_from_hidden.", "leave."),
        *_stage_names("up_block", "up"),
        ("up_block.upsample.norm.", "head.patch_norm."),
        ("up_block.upsample.conv.", "head.patch."),
        ("mlm_layer.conv1.", "head.enter."),
        ("mlm_layer.layer_norm.", "head.norm."),
        ("mlm_layer.conv2.", "head.table."),
    ),
    joined=(
        (
            tuple(f"{_LAYER}attn1.to_{part}.weight" for part in "qkv"),
            _LAYER + "attn1.to_qkv.weight",
        ),
        *(
            (tuple(f"{cross}to_{part}.weight" for part in "kv"), cross + "to_kv.weight")
            for cross in _CROSS
        ),
        (
            tuple(f"{_LAYER}norm{part}.linear.weight" for part in "123"),
            _LAYER + "modulation.weight",
        ),
    ),
    divided=(
        (
            _LAYER + "ff.net.0.proj.weight",
            (_LAYER + "ff.net.0.up.weight", _LAYER + "ff.net.0.gate.weight"),
        ),
    ),
)
_POINTWISE = ("embed.out.weight", "head.enter.weight", "head.table.weight")


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a published state dict under the names of ``UVit2D``.

    Convolutions of single positions, or of single patches, become linear maps.
    """
    found = _NAMES.read(state)
    for name, tensor in found.items():
        if tensor.ndim != 4:
            continue
        if name in _POINTWISE and tensor.shape[2:] == (1, 1):
            found[name] = tensor[:, :, 0, 0]
        elif name == "embed.patch.weight":
            found[name] = tensor.permute(0, 2, 3, 1).flatten(1)
        elif name == "head.patch.weight":
            found[name] = tensor.permute(2, 3, 1, 0).flatten(0, 2)
        elif ".response." in name:
            found[name] = tensor[0, 0, 0]
    return found


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a ``UVit2D`` under its published names."""
    found = dict(state)
    for name, tensor in state.items():
        if name in _POINTWISE:
            found[name] = tensor[:, :, None, None]
        elif name == "embed.patch.weight":
            found[name] = torch.unflatten(tensor, 1, (2, 2, -1)).permute(0, 3, 1, 2)
        elif name == "head.patch.weight":
            found[name] = torch.unflatten(tensor, 0, (2, 2, -1)).permute(3, 2, 0, 1)
        elif ".response." in name:
            found[name] = tensor[None, None, None]
    return _NAMES.write(found)
