"""The text tower of CLIP (Radford et al. 2021, arXiv 2103.00020), as text-to-image models use it.

A causal pre-LN transformer over the tokens of a prompt. Source: repository
huggingface/transformers (Apache 2.0), ``models/clip/modeling_clip.py``, for the names and for
which states a caller gets.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdzoo.checkpoint import CheckpointError, shape_of
from mdzoo.layers import FeedForward, LayerNorm
from mdzoo.names import Names
from mdzoo.transformer import Attention, Block, Stack

__all__ = ["ClipConfig", "ClipText", "from_published", "initialise", "to_published"]

HIGHEST = 2
"""An ``end`` by which older configurations mean the highest id of each prompt."""


def quick_gelu(x: Tensor) -> Tensor:
    """Return ``x sigmoid(1.702 x)``, the approximation of GELU in OpenAI's weights."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


@dataclass(frozen=True, slots=True)
class ClipConfig:
    """Sizes of a text tower; the defaults are those of CLIP ViT-L/14."""

    vocabulary: int = 49408
    positions: int = 77  # tokens of a prompt, padding included
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072  # width of the MLPs between their two maps
    projection: int = 768
    activation: str = "gelu"
    end: int = 49407  # id at which a prompt ends, or HIGHEST
    eps: float = 1e-5

    def __post_init__(self) -> None:
        """Check what no tensor shape can tell."""
        if self.heads < 1 or self.width % self.heads:
            raise CheckpointError(
                f"heads of the text encoder must divide its width {self.width}, got {self.heads}; "
                "the checkpoint cannot tell it: pass --set text_heads=N"
            )
        if self.activation not in ACTIVATIONS:
            raise CheckpointError(
                f"hidden_act of the text encoder must be one of {', '.join(ACTIVATIONS)}, "
                f"found {self.activation!r} in its config; convert a model of CLIP"
            )

    @classmethod
    def from_json(cls, published: Mapping[str, Any]) -> Self:
        """Read what a published ``config.json`` states; defaults are those of transformers."""
        return cls(
            vocabulary=published.get("vocab_size", 49408),
            positions=published.get("max_position_embeddings", 77),
            width=published.get("hidden_size", 512),
            depth=published.get("num_hidden_layers", 12),
            heads=published.get("num_attention_heads", 8),
            hidden=published.get("intermediate_size", 2048),
            projection=published.get("projection_dim", 512),
            activation=published.get("hidden_act", "quick_gelu"),
            end=published.get("eos_token_id", 49407),
            eps=published.get("layer_norm_eps", 1e-5),
        )

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], published: "ClipConfig", heads: int | None = None
    ) -> Self:
        """Read all sizes from the shapes of a published state dict.

        Args:
            state: tensors under their published names.
            published: knows the heads of its width, and what no shape tells.
            heads: of a tower of another width.
        """
        vocabulary, width = shape_of(state, "text_model.embeddings.token_embedding.weight", 2)
        if heads is None and width != published.width:
            raise CheckpointError(
                f"the text encoder has width {width} where the published one has "
                f"{published.width}, so its number of attention heads is unknown: "
                "pass --set text_heads=N"
            )
        layers = [re.match(r"text_model\.encoder\.layers\.(\d+)\.", key) for key in state]
        same = vocabulary == published.vocabulary
        return cls(
            vocabulary=vocabulary,
            positions=shape_of(state, "text_model.embeddings.position_embedding.weight", 2)[0],
            width=width,
            depth=1 + max((int(found[1]) for found in layers if found), default=-1),
            heads=published.heads if heads is None else heads,
            hidden=shape_of(state, "text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
            projection=shape_of(state, "text_projection.weight", 2)[0],
            activation=published.activation,
            end=published.end if same or published.end == HIGHEST else vocabulary - 1,
            eps=published.eps,
        )


class CausalAttention(Attention):
    """Attention of every token to itself and to those before it.

    It is spelled out: a prompt passes once, and backends differ in what masks their fused
    operators understand.
    """

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        count = query.shape[2]
        hidden = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1)
        scores = (query.float() * self.head_size**-0.5) @ key.float().transpose(-1, -2)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        mixed = weights.to(value.dtype) @ value
        return self.out(mixed.transpose(1, 2).flatten(2))


def _block(config: ClipConfig) -> Block:
    width, eps = config.width, config.eps
    return Block(
        CausalAttention(width, config.heads),
        FeedForward(width, config.hidden, activation=ACTIVATIONS[config.activation]),
        LayerNorm(width, eps=eps),
        LayerNorm(width, eps=eps),
    )


class ClipText(nn.Module):
    """A prompt's tokens in; states of all its positions, and one vector for all of it, out."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Parameter(torch.zeros(config.positions, config.width))
        self.blocks = Stack(_block(config) for _ in range(config.depth))
        self.norm = LayerNorm(config.width, eps=config.eps)
        self.projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return what transformers calls ``hidden_states[-2]`` and ``text_embeds``.

        Args:
            ids: int (batch, n), n up to ``positions``.

        Returns:
            The states before the last block, (batch, n, width), and the projection of the
            normalised last state where the prompt ends, (batch, projection).
        """
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        before = x
        for block in self.blocks:
            before, x = x, block(x)
        last = x[torch.arange(x.shape[0], device=x.device), self._ends(ids)]
        return before, self.projection(self.norm(last))

    def _ends(self, ids: Tensor) -> Tensor:
        ids = ids.int()
        found = ids if self.config.end == HIGHEST else (ids == self.config.end).int()
        return found.argmax(dim=1)  # the first of equals, where padding repeats the end


def initialise(model: ClipText) -> None:
    """Draw small embeddings, as CLIP does."""
    nn.init.normal_(model.tokens.weight, std=0.02)
    nn.init.normal_(model.positions, std=0.01)


_LAYER = "text_model.encoder.layers.{i}."
_NAMES = Names(
    renamed=(
        ("text_model.embeddings.token_embedding.", "tokens."),
        ("text_model.embeddings.position_embedding.weight", "positions"),
        (_LAYER + "self_attn.qkv.", "blocks.{i}.attention.qkv."),
        (_LAYER + "self_attn.out_proj.", "blocks.{i}.attention.out."),
        (_LAYER + "layer_norm1.", "blocks.{i}.norm1."),
        (_LAYER + "layer_norm2.", "blocks.{i}.norm2."),
        (_LAYER + "mlp.fc1.", "blocks.{i}.mlp.up."),
        (_LAYER + "mlp.fc2.", "blocks.{i}.mlp.down."),
        ("text_model.final_layer_norm.", "norm."),
        ("text_projection.", "projection."),
    ),
    joined=tuple(
        (
            tuple(f"{_LAYER}self_attn.{part}_proj.{kind}" for part in "qkv"),
            f"{_LAYER}self_attn.qkv.{kind}",
        )
        for kind in ("weight", "bias")
    ),
)


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a published state dict under the names of ``ClipText``."""
    return _NAMES.read(state)


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a ``ClipText`` under its published names."""
    return _NAMES.write(state)
