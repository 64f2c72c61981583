"""Attention over an explicit K/V cache, and layers whose sensitive arithmetic stays in float32.

Shapes use the field's axes: rows (sequences of a pass), m (the canvas positions a pass
recomputes), length (all positions of the canvas), heads, head_size, width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Cache = tuple[Tensor, Tensor]
"""One layer's keys and values of every canvas position, (rows, heads, canvas, head_size) each."""


class LayerNorm(nn.LayerNorm):
    """Layer normalisation computed in float32 whatever the precision of its input.

    A float16 sum of squares overflows at activations that trained transformers reach.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of ``x``; the result has the dtype of ``x``."""
        y = F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return y.to(x.dtype)


def refresh(cache: Tensor, positions: Tensor, new: Tensor) -> Tensor:
    """Return ``cache`` with the rows at ``positions`` replaced.

    Args:
        cache: (rows, heads, length, head_size).
        positions: int (rows, m), the canvas positions of ``new``; repeating one is harmless as
            long as its values repeat too.
        new: (rows, heads, m, head_size).
    """
    rows, heads = cache.shape[0], cache.shape[1]
    row = torch.arange(rows, device=cache.device)[:, None, None]
    head = torch.arange(heads, device=cache.device)[None, :, None]
    return cache.index_put((row, head, positions.long()[:, None, :]), new)


class Attention(nn.Module):
    """Bidirectional multi-head attention whose queries may be a subset of the canvas.

    Queries, keys and values come from one fused product: three separate ones invite compilers
    to fuse them horizontally, which some get wrong.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend among all positions of ``x`` (rows, length, width), without a cache."""
        query, key, value = self._project(x)
        return self._attend(query, key, value)

    def step(self, x: Tensor, positions: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Attend from ``x`` (rows, m, width) to the canvas; return the refreshed cache too."""
        query, new_key, new_value = self._project(x)
        keys, values = cache
        keys = refresh(keys, positions, new_key)
        values = refresh(values, positions, new_value)
        return self._attend(query, keys, values), (keys, values)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        packed = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (rows, m, 3, heads, head_size)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear maps around a GELU (exact, by the error function)."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        return self.down(self.dropout(F.gelu(self.up(x))))


class Block(nn.Module):
    """A pre-LN transformer block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = LayerNorm(width)
        self.mlp = FeedForward(width, hidden, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform the whole canvas (rows, length, width), without a cache."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))

    def step(self, x: Tensor, positions: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Transform some rows (rows, m, width) of the canvas against its cache."""
        mixed, cache = self.attention.step(self.norm1(x), positions, cache)
        x = x + mixed
        return x + self.mlp(self.norm2(x)), cache
