"""The published files of the bidirectional Llamas of ``mdzoo.llama``: names and order of rows.

Sources: repositories ML-GSAI/SMDM, ``lit_gpt/diffmodel.py``, and ML-GSAI/LLaDA.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LLADA", "SMDM", "Layout", "bare", "from_published", "layout_of", "to_published"]


@dataclass(frozen=True, slots=True)
class Layout:
    """What distinguishes the published files of one model from the other's."""

    grouped: bool  # whether rows of the fused projection stand head by head
    base: float  # of the rotary positions
    names: tuple[tuple[str, str], ...]  # part of a published name, the same of ours

    def ours(self, key: str) -> str:
        """Return our name of a tensor of theirs."""
        for before, after in self.names:
            key = key.replace(before, after)
        return key

    def theirs(self, key: str) -> str:
        """Return their name of a tensor of ours, or the beginning of both."""
        for after, before in self.names:
            key = key.replace(before, after)
        return key


SMDM = Layout(
    grouped=True,
    base=10_000.0,
    names=(
        ("transformer.wte.", "tokens."),
        ("transformer.ln_f.", "norm."),
        ("lm_head.", "head."),
        ("transformer.h.", "blocks."),
        (".norm_1.", ".norm1."),
        (".norm_2.", ".norm2."),
        (".attn.attn.", ".attention.qkv."),
        (".attn.proj.", ".attention.out."),
        (".mlp.swiglu.w1.", ".mlp.gate."),
        (".mlp.swiglu.w2.", ".mlp.up."),
        (".mlp.swiglu.w3.", ".mlp.down."),
    ),
)
LLADA = Layout(
    grouped=False,
    base=500_000.0,
    names=(
        ("transformer.wte.", "tokens."),
        ("transformer.ln_f.", "norm."),
        ("transformer.ff_out.", "head."),
        ("transformer.blocks.", "blocks."),
        (".attn_norm.", ".norm1."),
        (".ff_norm.", ".norm2."),
        (".attn_out.", ".attention.out."),
        (".ff_proj.", ".mlp.gate."),
        (".up_proj.", ".mlp.up."),
        (".ff_out.", ".mlp.down."),
    ),
)
FUSED = ".attention.qkv.weight"
PARTS = tuple(f".{part}_proj.weight" for part in "qkv")
"""What LLaDA has in place of the fused projection."""


def bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the prefix that LLaDA's names have."""
    return {key.removeprefix("model."): tensor for key, tensor in state.items()}


def layout_of(state: Mapping[str, Tensor]) -> Layout:
    """Return which model the (bare) names are of."""
    return LLADA if any(key.startswith("transformer.blocks.") for key in state) else SMDM


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a published state dict of either model under the names of ``Llama``."""
    state = bare(state)
    layout = layout_of(state)
    renamed = {layout.ours(key): tensor for key, tensor in state.items()}
    for key in [key for key in renamed if key.endswith(PARTS[0])]:
        block = key.removesuffix(PARTS[0])
        if all(block + part in renamed for part in PARTS):
            parts = [renamed.pop(block + part) for part in PARTS]
            renamed[block + FUSED] = torch.cat(parts)
    return renamed


def to_published(state: Mapping[str, Tensor], layout: Layout = SMDM) -> dict[str, Tensor]:
    """Return the state dict of a ``Llama`` under the published names of ``layout``."""
    if layout == SMDM:
        return {layout.theirs(key): tensor for key, tensor in state.items()}
    split: dict[str, Tensor] = {}
    for key, tensor in state.items():
        block = key.removesuffix(FUSED)
        parts = dict(zip(PARTS, tensor.chunk(3), strict=True)) if block != key else {"": tensor}
        split |= {block + part: values for part, values in parts.items()}
    return {f"model.{layout.theirs(key)}": tensor for key, tensor in split.items()}
