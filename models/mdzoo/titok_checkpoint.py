"""The names of the tensors in TiTok's generators: those of their files, and ours.

Files of L-32 and B-64 speak as transformers' ``BertModel`` does, that of S-128 as timm's blocks do.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mdzoo.checkpoint import shape_of
from mdzoo.names import Names

__all__ = ["POSITIONS", "bare", "blocks_of", "from_published", "to_published"]

_LAYER = "encoder.layer.{i}."

_BERT = Names(
    renamed=(
        ("embeddings.word_embeddings.", "tokens."),
        ("embeddings.LayerNorm.", "norm_in."),
        (f"{_LAYER}attention.self.qkv.", "blocks.{i}.attention.qkv."),
        (f"{_LAYER}attention.output.dense.", "blocks.{i}.attention.out."),
        (f"{_LAYER}attention.output.LayerNorm.", "blocks.{i}.norm1."),
        (f"{_LAYER}intermediate.dense.", "blocks.{i}.mlp.up."),
        (f"{_LAYER}output.dense.", "blocks.{i}.mlp.down."),
        (f"{_LAYER}output.LayerNorm.", "blocks.{i}.norm2."),
        ("lm_head.", "head."),
    ),
    joined=tuple(
        (
            tuple(f"{_LAYER}attention.self.{part}.{leaf}" for part in ("query", "key", "value")),
            f"{_LAYER}attention.self.qkv.{leaf}",
        )
        for leaf in ("weight", "bias")
    ),
)

_UVIT_BLOCK = (
    ("norm1.", "norm1."),
    ("attn.qkv.", "attention.qkv."),
    ("attn.proj.", "attention.out."),
    ("norm2.", "norm2."),
    ("mlp.fc1.", "mlp.up."),
    ("mlp.fc2.", "mlp.down."),
)

POSITIONS = "embeddings.position_embeddings.weight"
_TYPES = "embeddings.token_type_embeddings.weight"


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a published state dict under the names of ``TiTok``."""
    published = bare(state)
    names = _uvit(blocks_of(published)) if "pos_embed" in published else _BERT
    return names.read(_placed(published))


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a ``TiTok`` under its published names."""
    ours = dict(state)
    positions = ours.pop("positions")
    if "norm_in.weight" not in ours:
        names = _uvit(_count(ours, r"blocks\.(\d+)\."))
        return {**names.write(ours), "pos_embed": positions[None]}
    published = _BERT.write(ours)
    published |= {POSITIONS: positions, _TYPES: torch.zeros_like(positions[:2])}
    return {f"model.{key}": tensor for key, tensor in published.items()}


def bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off the prefix that only the files of BERT keep."""
    return {key.removeprefix("model."): tensor for key, tensor in state.items()}


def blocks_of(state: Mapping[str, Tensor]) -> int:
    """Count the blocks of a published state dict without prefix."""
    blocks = _count(state, r"encoder\.layer\.(\d+)\.")
    return blocks or 2 * _count(state, r"in_blocks\.(\d+)\.") + 1


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({found[1] for key in state if (found := re.match(pattern, key))})


def _placed(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the positions our name; BERT's type of a row is 0 always, thus part of its position."""
    if "pos_embed" in published:
        published["positions"] = published.pop("pos_embed")[0]
    elif POSITIONS in published:
        width = shape_of(published, POSITIONS, 2)[1]
        if shape_of(published, _TYPES, 2)[1] == width:
            kind = published.pop(_TYPES)[0].float()
            published["positions"] = published.pop(POSITIONS).float() + kind
    return published


def _uvit(depth: int) -> Names:
    half = depth // 2
    places = [(f"in_blocks.{i}.", f"blocks.{i}.") for i in range(half)]
    places += [("mid_block.", f"blocks.{half}.")]
    places += [(f"out_blocks.{i}.", f"blocks.{half + 1 + i}.") for i in range(half)]
    return Names(
        (
            ("embeddings.", "tokens."),
            ("norm.", "norm_out."),
            ("lm_head.", "head."),
            ("out_blocks.{i}.skip_linear.", "skips.{i}."),
            *(
                (outside[0] + inside[0], outside[1] + inside[1])
                for outside in places
                for inside in _UVIT_BLOCK
            ),
        )
    )
