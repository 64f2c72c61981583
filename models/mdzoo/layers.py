"""Norms, rotations, MLPs and row arithmetic, of which ``mdzoo.transformer`` is composed.

Sensitive arithmetic (norms, rotations) stays in float32 whatever the weights are.

Shapes use the field's axes: rows (sequences of a pass), m (the canvas positions a pass
recomputes), canvas (all of its positions), heads, head_size, width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "FeedForward",
    "GatedFeedForward",
    "LayerNorm",
    "RMSNorm",
    "Rotary",
    "modulate",
    "refresh",
    "rms",
    "rotary",
    "rotate",
    "take_rows",
]

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of rotary position embedding, float32 (rows, 1, m, head_size / 2) each."""

Activation = Callable[[Tensor], Tensor]


class LayerNorm(nn.LayerNorm):
    """Layer normalisation computed in float32 whatever the precision of its input.

    A float16 sum of squares overflows at activations that trained transformers reach.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of ``x``; the result has the dtype of ``x``."""
        bias = None if self.bias is None else self.bias.float()
        y = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), bias, self.eps)
        return y.to(x.dtype)


def rms(x: Tensor, eps: float) -> Tensor:
    """Divide the last axis of ``x`` by its root mean square, in float32."""
    wide = x.float()
    # Divided, not times a reciprocal root: that the ONNX exporter fuses into RMSNormalization, with
    # float16 input and float32 scale, which ONNX Runtime refuses.
    return wide / torch.sqrt(wide.square().mean(dim=-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a weight and perhaps a bias, computed in float32."""

    def __init__(self, width: int, *, eps: float = 1e-5, bias: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of ``x``; the result has the dtype of ``x``."""
        y = rms(x, self.eps) * self.weight.float()
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype)


def rotary(positions: Tensor, head_size: int, base: float = 10_000.0) -> Rotary:
    """Return the rotations of rotary position embedding (Su et al. 2021, arXiv 2104.09864).

    Args:
        positions: int (rows, m).
        head_size: even.
        base: of the geometric series of wavelengths.
    """
    half = head_size // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float32, device=positions.device) / half)
    angle = positions.float()[:, None, :, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotation: Rotary) -> Tensor:
    """Rotate pairs (i, i + head_size / 2) of ``x`` (rows, heads, m, head_size): NeoX layout."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


def refresh(cache: Tensor, positions: Tensor, new: Tensor) -> Tensor:
    """Return ``cache`` with the rows at ``positions`` replaced.

    Args:
        cache: (rows, heads, canvas, head_size).
        positions: int (rows, m), the canvas positions of ``new``; repeating one is harmless as
            long as its values repeat too.
        new: (rows, heads, m, head_size).
    """
    rows, heads = cache.shape[0], cache.shape[1]
    row = torch.arange(rows, device=cache.device)[:, None, None]
    head = torch.arange(heads, device=cache.device)[None, :, None]
    return cache.index_put((row, head, positions.long()[:, None, :]), new)


def take_rows(x: Tensor, columns: Tensor) -> Tensor:
    """Return ``x`` (rows, m, ...) at int ``columns`` (rows, k), as (rows, k, ...)."""
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    return x[row, columns.long()]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return ``x (1 + scale) + shift``; shift and scale (rows, width) hold for all positions."""
    return x * (1 + scale[:, None]) + shift[:, None]


class FeedForward(nn.Module):
    """Two linear maps around an activation."""

    def __init__(
        self,
        width: int,
        hidden: int,
        dropout: float = 0.0,
        *,
        activation: Activation = F.gelu,
    ) -> None:
        """Take the sizes; the activation is the exact GELU (by the error function) by default."""
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        return self.down(self.dropout(self.activation(self.up(x))))


class GatedFeedForward(nn.Module):
    """``down(activation(gate(x)) * up(x))``, without biases: SwiGLU, GEGLU (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int, *, activation: Activation = F.silu) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        return self.down(self.activation(self.gate(x)) * self.up(x))
