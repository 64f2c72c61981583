"""DIT, the diffusion transformer over text of MDLM (Sahoo et al. 2024, arXiv 2406.07524).

A bidirectional pre-LN transformer with rotary positions, modulated by the noise level, exactly as
published: ``mdzoo.mdlm`` has the model that is exported.
Source: repository kuleshov-group/mdlm, ``models/dit.py`` (Apache-2.0 licence).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdzoo.checkpoint import CheckpointError
from mdzoo.layers import LayerNorm, Rotary, modulate, rotary, rotate

__all__ = ["CONDITIONING", "DIT", "FREQUENCIES", "MDLMConfig", "positions_of"]

FREQUENCIES = 256  # numbers that the noise level is written in, half of them cosines
CONDITIONING = 128  # numbers that the modulation is computed from


@dataclass(frozen=True, slots=True)
class MDLMConfig:
    """Sizes of an MDLM denoiser; its vocabulary is the codebook, then the mask token."""

    length: int  # tokens of the texts it was trained on
    codebook: int
    width: int
    depth: int
    heads: int
    hidden: int  # width of the MLP between its two maps

    def __post_init__(self) -> None:
        """Check what no tensor shape can tell."""
        if self.length < 1:
            raise CheckpointError(f"length must be positive, got {self.length}: --set length=N")
        if self.heads < 1 or self.width % (2 * self.heads):
            raise CheckpointError(
                f"heads must divide the width {self.width} into even parts, got {self.heads}; "
                "the checkpoint cannot tell it: pass --set heads=N"
            )

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.width // self.heads


def positions_of(tokens: Tensor) -> Tensor:
    """Return the positions (1, length) of a text ``tokens`` (batch, length)."""
    return torch.arange(tokens.shape[1], device=tokens.device)[None]


class DITBlock(nn.Module):
    """A block as published."""

    def __init__(self, config: MDLMConfig, conditioning: int) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden
        self.heads = config.heads
        self.norm1 = LayerNorm(width, bias=False)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = LayerNorm(width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width)
        )
        self.adaLN_modulation = nn.Linear(conditioning, 6 * width)

    def forward(self, x: Tensor, rotation: Rotary, c: Tensor) -> Tensor:
        """Transform ``x`` (batch, length, width) under ``c`` (batch, conditioning)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        mixed = self._attend(modulate(self.norm1(x), shift1, scale1), rotation)
        x = x + gate1[:, None] * self.attn_out(mixed)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))

    def _attend(self, x: Tensor, rotation: Rotary) -> Tensor:
        packed = self.attn_qkv(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        query, key = rotate(query, rotation), rotate(key, rotation)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).flatten(2)


class DIT(nn.Module):
    """The published model, noise level and all: parameters of its names, in its order."""

    def __init__(
        self, config: MDLMConfig, conditioning: int = CONDITIONING, frequencies: int = FREQUENCIES
    ) -> None:
        super().__init__()
        width, vocabulary = config.width, config.codebook + 1
        self.config = config
        self.frequencies = frequencies
        self.vocab_embed = nn.ParameterDict({"embedding": torch.zeros(vocabulary, width)})
        self.sigma_map = nn.ModuleDict(
            {
                "mlp": nn.Sequential(
                    nn.Linear(frequencies, conditioning),
                    nn.SiLU(),
                    nn.Linear(conditioning, conditioning),
                )
            }
        )
        self.blocks = nn.ModuleList(DITBlock(config, conditioning) for _ in range(config.depth))
        self.output_layer = nn.ModuleDict(
            {
                "norm_final": LayerNorm(width, bias=False),
                "linear": nn.Linear(width, vocabulary),
                "adaLN_modulation": nn.Linear(conditioning, 2 * width),
            }
        )

    def forward(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        """Return raw logits (batch, length, codebook + 1).

        Args:
            tokens: int (batch, length).
            sigma: noise levels, float32 (batch,).
        """
        half = self.frequencies // 2
        series = torch.exp(-math.log(10_000) * torch.arange(half, device=sigma.device) / half)
        angle = sigma[:, None] * series
        c = F.silu(self.sigma_map["mlp"](torch.cat([angle.cos(), angle.sin()], dim=-1)))
        rotation = rotary(positions_of(tokens), self.config.head_size)
        x = self.vocab_embed["embedding"][tokens]
        for block in self.blocks:
            x = block(x, rotation, c)
        last = self.output_layer
        shift, scale = last["adaLN_modulation"](c).chunk(2, dim=-1)
        return last["linear"](modulate(last["norm_final"](x), shift, scale))
