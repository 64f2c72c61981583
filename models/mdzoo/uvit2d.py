"""The masked transformer of aMUSEd: a U-ViT over image tokens (Patil et al. 2024, 2401.01808).

Convolutional stages before and after a transformer without positional embedding, with the text
in cross-attention throughout and its summary, with the micro-conditioning, in adaLN.

Source: repository huggingface/diffusers (Apache 2.0), ``models/unets/uvit_2d.py``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mdzoo import checkpoint
from mdzoo.amused_layers import Head, Layer, Prepared, Stage, StageBlock, TokenEmbedding
from mdzoo.layers import RMSNorm, refresh, take_rows
from mdzoo.transformer import Stack
from mdzoo.uvit2d_config import MICRO, UVitConfig, from_published

__all__ = ["UVit2D", "load"]


class UVit2D(nn.Module):
    """Token ids and the states of a text in, logits over the codebook out."""

    def __init__(self, config: UVitConfig) -> None:
        super().__init__()
        self.config = config
        width, channels, eps = config.width, config.channels, config.eps
        self.text = nn.Linear(config.text, width, bias=False)
        self.text_norm = RMSNorm(width, eps=eps)
        self.summary = nn.Sequential(
            nn.Linear(config.pooled + MICRO * config.micro, width, bias=False),
            nn.SiLU(),
            nn.Linear(width, width, bias=False),
        )
        self.embed = TokenEmbedding(
            config.vocabulary, config.embedding, channels, config.slots, eps
        )
        self.down = _stage(config)
        self.enter_norm = RMSNorm(channels, eps=eps)
        self.enter = nn.Linear(channels, width, bias=False)
        self.layers = Stack(
            Layer(width, config.heads, config.hidden, eps) for _ in range(config.depth)
        )
        self.leave_norm = RMSNorm(width, eps=eps)
        self.leave = nn.Linear(width, channels, bias=False)
        self.up = _stage(config)
        self.head = Head(channels, config.embedding, config.codebook, config.slots, eps)

    def forward(
        self,
        ids: Tensor,
        encoder_hidden_states: Tensor,
        pooled_text_emb: Tensor,
        micro_conds: Tensor,
    ) -> Tensor:
        """Return what the original does, without any cache; the arguments have its names.

        Args:
            ids: int (batch, height, width), the mask token where hidden.
            encoder_hidden_states: (batch, n, text), states of the text.
            pooled_text_emb: (batch, pooled), its summary.
            micro_conds: (batch, 5).

        Returns:
            Logits float32 (batch, codebook, height, width).
        """
        patch = self.config.patch
        grid = ids.shape[1] // patch, ids.shape[2] // patch
        cells = ids.reshape(-1, grid[0], patch, grid[1], patch).transpose(2, 3)
        prepared = self.prepare(encoder_hidden_states, pooled_text_emb, micro_conds)
        x = self.embed(cells.flatten(3).flatten(1, 2))
        x = self.down(x, grid, _of_stage(prepared, 0))
        x = self.enter(self.enter_norm(x))
        for index, layer in enumerate(self.layers):
            x = layer(x, _of_layer(prepared, index))
        x = self.leave(self.leave_norm(x))
        logits = self.head(self.up(x, grid, _of_stage(prepared, 1)))
        logits = torch.unflatten(logits, 1, (*grid, patch, patch)).transpose(2, 3)
        return logits.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)

    def prepare(
        self, encoder_hidden_states: Tensor, pooled_text_emb: Tensor, micro_conds: Tensor
    ) -> dict[str, Tensor]:
        """Return by name what only the prompt decides, of the weights' dtype.

        Returns:
            ``modulation`` (batch, depth, 6, width), ``text`` (batch, depth, 2, heads, n,
            head_size), and for both stages together ``stage_modulation`` (batch, 2, blocks, 2,
            channels) and ``stage_text`` (batch, 2, blocks, 2, 2, block_heads, n, head_size).
        """
        dtype = self.text.weight.dtype
        text = self.text_norm(self.text(encoder_hidden_states.to(dtype)))
        micro = _sinusoids(micro_conds, self.config.micro).to(dtype)
        summary = self.summary(torch.cat([pooled_text_emb.to(dtype), micro], dim=1))
        active = nn.functional.silu(summary)
        layers = [cast(Layer, layer).prepare(text, active) for layer in self.layers]
        stages = [_prepare_stage(stage, text, active) for stage in (self.down, self.up)]
        modulation, keys = _stacked(layers)
        stage_modulation, stage_keys = _stacked(stages)
        return {
            "modulation": modulation,
            "text": keys,
            "stage_modulation": stage_modulation,
            "stage_text": stage_keys,
        }

    def empty_caches(self, rows: int, canvas: int) -> dict[str, Tensor]:
        """Return zeros: K/V of every layer, and what enters the stages at every position.

        That is ``embedded`` and ``left``, (rows, canvas, channels) each: the stages see the whole
        canvas in every pass, the maps before them only the rows that it recomputes.
        """
        caches = self.layers.empty_caches(rows, canvas)
        shape = (rows, canvas, self.config.channels)
        for name in ("embedded", "left"):
            caches[name] = torch.zeros_like(self.enter.weight[:1, :1]).expand(shape).clone()
        return caches

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        columns: Tensor,
        caches: Sequence[Tensor],
        prepared: Mapping[str, Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Recompute some rows of the canvas against the caches; see ``mdexport.Denoiser``."""
        *pairs, embedded, left = caches
        grid, slots = self.config.grid, self.config.slots
        embedded = _refresh(
            embedded, positions, self.embed(tokens.reshape(*positions.shape, slots))
        )
        x = take_rows(self.down(embedded, grid, _of_stage(prepared, 0)), positions)
        x = self.enter(self.enter_norm(x))
        refreshed: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            pair, part = pairs[2 * index : 2 * index + 2], _of_layer(prepared, index)
            x, fresh = cast(Layer, layer).step(x, positions, pair, part)
            refreshed += fresh
        left = _refresh(left, positions, self.leave(self.leave_norm(x)))
        y = self.up(left, grid, _of_stage(prepared, 1))
        logits = self.head(take_rows(y, positions.gather(1, columns.long())))
        return logits, [*refreshed, embedded, left]


def _stage(config: UVitConfig) -> Stage:
    return Stage(
        StageBlock(config.channels, config.block_heads, config.width, config.eps)
        for _ in range(config.blocks)
    )


def _prepare_stage(stage: Stage, text: Tensor, condition: Tensor) -> Prepared:
    return _stacked([block.prepare(text, condition) for block in stage.blocks()])


def _stacked(parts: Sequence[Prepared]) -> Prepared:
    """Stack what several parts keep of a prompt on axis 1."""
    first, second = zip(*parts, strict=True)
    return torch.stack(first, dim=1), torch.stack(second, dim=1)


def _of_layer(prepared: Mapping[str, Tensor], index: int) -> Prepared:
    return prepared["modulation"][:, index], prepared["text"][:, index]


def _of_stage(prepared: Mapping[str, Tensor], index: int) -> Prepared:
    return prepared["stage_modulation"][:, index], prepared["stage_text"][:, index]


def _refresh(cache: Tensor, positions: Tensor, new: Tensor) -> Tensor:
    """Return ``cache`` (rows, canvas, width) with ``new`` (rows, m, width) at its positions."""
    return refresh(cache[:, None], positions, new[:, None])[:, 0]


def _sinusoids(numbers: Tensor, width: int) -> Tensor:
    """Return cosines, then sines, of each number, float32 (batch, n * width)."""
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=numbers.device)
    angle = numbers.float()[..., None] * torch.exp(index * (-math.log(10_000) / half))
    return torch.cat([angle.cos(), angle.sin()], dim=-1).flatten(1)


def load(state: Mapping[str, Tensor], published: Mapping[str, Any], *, source: str) -> UVit2D:
    """Build a U-ViT on its own, without the text encoder that a denoiser needs.

    Args:
        state: tensors under their published names.
        published: the settings in its ``config.json``.
        source: where both come from, for messages.

    Raises:
        CheckpointError: another architecture, sizes that differ, or damaged weights.
    """
    model = UVit2D(UVitConfig.from_json(published))
    checkpoint.fit(model, from_published(state), source=source)
    return model.eval()
