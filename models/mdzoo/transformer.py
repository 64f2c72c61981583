"""The masked-transformer core: attention over an explicit K/V cache, blocks, and stacks of them.

A family composes ``Block`` from the norms, the attention and the MLP of its paper; ``Stack`` runs
blocks over the whole canvas, or over some of its rows against caches. The softmax is computed in
float32: in exported graphs the exporter writes that into the Attention operator.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdzoo.layers import Rotary, modulate, refresh, rms, rotate, take_rows

__all__ = ["Attention", "Block", "Stack", "StackDenoiser"]


class Attention(nn.Module):
    """Bidirectional multi-head attention whose queries may be a subset of the canvas.

    Queries, keys and values come from one fused product: three separate ones invite compilers
    to fuse them horizontally, which some get wrong.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        inner: int = 0,
        bias: bool = True,
        out_bias: bool = True,
        normalised: float = 0.0,
        grouped: bool = False,
    ) -> None:
        """Build the projections.

        Args:
            width: of the residual stream.
            heads: number of heads; divides ``inner``.
            inner: width of all heads together; 0 stands for ``width``.
            bias: of the fused projection.
            out_bias: of the output projection.
            normalised: if positive, queries and keys are divided by their root mean square over
                all heads together (QK norm), with this epsilon.
            grouped: whether the fused projection returns query, key and value of the first head,
                then of the second and so on, in place of the queries of all heads first.
        """
        super().__init__()
        inner = inner or width
        self.heads = heads
        self.head_size = inner // heads
        self.normalised = normalised
        self.grouped = grouped
        self.qkv = nn.Linear(width, 3 * inner, bias=bias)
        self.out = nn.Linear(inner, width, bias=out_bias)

    def forward(self, x: Tensor, rotation: Rotary | None = None) -> Tensor:
        """Attend among all positions of ``x`` (rows, canvas, width), without a cache."""
        return self._attend(*self._project(x, rotation))

    def step(
        self,
        x: Tensor,
        positions: Tensor,
        cache: Sequence[Tensor],
        rotation: Rotary | None = None,
        columns: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Attend from ``x`` (rows, m, width) to the canvas; return the refreshed cache too.

        Args:
            x: the rows that this pass recomputes.
            positions: int (rows, m), where on the canvas they are.
            cache: keys and values, (rows, heads, canvas, head_size) each.
            rotation: of the positions, where the family rotates.
            columns: int (rows, k), those of the m rows whose result is wanted; all by default.
        """
        query, new_key, new_value = self._project(x, rotation)
        if columns is not None:
            query = take_rows(query.transpose(1, 2), columns).transpose(1, 2)
        keys = refresh(cache[0], positions, new_key)
        values = refresh(cache[1], positions, new_value)
        return self._attend(query, keys, values), [keys, values]

    def _project(self, x: Tensor, rotation: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self._parts(self.qkv(x))
        if self.normalised:
            query = rms(query, self.normalised).to(x.dtype)
            key = rms(key, self.normalised).to(x.dtype)
        query, key, value = self._split(query), self._split(key), self._split(value)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        return query, key, value

    def _parts(self, fused: Tensor) -> tuple[Tensor, ...]:
        if not self.grouped:
            return fused.chunk(3, dim=-1)
        parts = fused.view(*fused.shape[:-1], self.heads, 3, self.head_size).unbind(-2)
        return tuple(part.flatten(-2) for part in parts)

    def _split(self, x: Tensor) -> Tensor:
        heads = x.reshape(x.shape[0], x.shape[1], self.heads, self.head_size)
        return heads.transpose(1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block, composed of its parts.

    Pre-norm: ``x + f(norm(x))`` for the attention, then for the MLP. Post-norm (as BERT):
    ``norm(x + f(x))``. Modulated (adaLN, Peebles and Xie 2023): pre-norm with shift, scale and
    gate of either part from outside.
    """

    def __init__(
        self,
        attention: Attention,
        mlp: nn.Module,
        norm1: nn.Module,
        norm2: nn.Module,
        *,
        post: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = norm1
        self.attention = attention
        self.norm2 = norm2
        self.mlp = mlp
        self.post = post
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, rotation: Rotary | None = None, modulation: Tensor | None = None
    ) -> Tensor:
        """Transform the whole canvas (rows, canvas, width), without a cache."""
        mixed = self.attention(self._before(x, modulation), rotation)
        return self._after(x, mixed, modulation)

    def step(
        self,
        x: Tensor,
        positions: Tensor,
        cache: Sequence[Tensor],
        rotation: Rotary | None = None,
        modulation: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Transform some rows (rows, m, width) of the canvas against its cache.

        Args:
            x: these rows.
            positions: int (rows, m).
            cache: keys and values of this block.
            rotation: of the positions.
            modulation: (rows, 6, width): shift, scale and gate of the attention, then of the MLP.
            columns: int (rows, k), those of the m rows whose result is wanted; all by default.
        """
        before = self._before(x, modulation)
        mixed, fresh = self.attention.step(before, positions, cache, rotation, columns)
        x = x if columns is None else take_rows(x, columns)
        return self._after(x, mixed, modulation), fresh

    def _before(self, x: Tensor, modulation: Tensor | None) -> Tensor:
        if self.post:
            return x
        y = self.norm1(x)
        return y if modulation is None else modulate(y, modulation[:, 0], modulation[:, 1])

    def _after(self, x: Tensor, mixed: Tensor, modulation: Tensor | None) -> Tensor:
        mixed = self.dropout(mixed)
        if self.post:
            x = self.norm1(x + mixed)
            return self.norm2(x + self.dropout(self.mlp(x)))
        if modulation is None:
            x = x + mixed
            return x + self.dropout(self.mlp(self.norm2(x)))
        x = x + modulation[:, None, 2] * mixed
        y = modulate(self.norm2(x), modulation[:, 3], modulation[:, 4])
        return x + modulation[:, None, 5] * self.dropout(self.mlp(y))


class Stack(nn.ModuleList):
    """Blocks one after the other, and the caches of all of them.

    Caches are flat lists: keys and values of block 0, of block 1, and so on.
    """

    def forward(
        self, x: Tensor, rotation: Rotary | None = None, modulation: Tensor | None = None
    ) -> Tensor:
        """Transform the whole canvas; ``modulation`` is (rows, layers, 6, width)."""
        for index, block in enumerate(self):
            x = block(x, rotation, None if modulation is None else modulation[:, index])
        return x

    def step(
        self,
        x: Tensor,
        positions: Tensor,
        caches: Sequence[Tensor],
        rotation: Rotary | None = None,
        modulation: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Transform some rows against the caches; return them refreshed too.

        Where ``columns`` are given, the result holds only these of the m rows, (rows, k, width):
        the last block then stops after the keys and values of all others.
        """
        refreshed: list[Tensor] = []
        for index, block in enumerate(self.blocks()):
            part = None if modulation is None else modulation[:, index]
            pair = caches[2 * index : 2 * index + 2]
            wanted = columns if index == len(self) - 1 else None
            x, fresh = block.step(x, positions, pair, rotation, part, wanted)
            refreshed += fresh
        return x, refreshed

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks under their own type."""
        return (cast(Block, block) for block in self)

    def empty_caches(self, rows: int, canvas: int, prefix: str = "") -> dict[str, Tensor]:
        """Return zeros for the caches by name, (rows, heads, canvas, head_size) each."""
        found = {}
        for index, block in enumerate(self.blocks()):
            attention = block.attention
            shape = (rows, attention.heads, canvas, attention.head_size)
            for part in ("key", "value"):
                weight = attention.qkv.weight
                found[f"{prefix}{index}.{part}"] = torch.zeros(
                    shape, dtype=weight.dtype, device=weight.device
                )
        return found


class StackDenoiser(nn.Module):
    """What denoisers have in common whose passes remember no more than one stack's caches."""

    blocks: Stack

    def condition(self, labels: Tensor) -> dict[str, Tensor]:
        """Return nothing: no class or prompt enters but through rows of the canvas."""
        return {}

    def empty_caches(self, rows: int, canvas: int) -> dict[str, Tensor]:
        """Return zeros for keys and values of every layer."""
        return self.blocks.empty_caches(rows, canvas)
