"""MaskGIT as released by valeoai (Besnier and Chen 2023, arXiv 2310.14400, version 1.0).

A bidirectional pre-LN transformer over image tokens followed by one class token, with a stem and
a last layer, an output head tied to the embedding table, and an output bias per position.
Source of the architecture: repository valeoai/Halton-MaskGIT, branch v1.0 (MIT licence).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdruntime.manifest import ContextRow, DenoiserSpec
from mdzoo.checkpoint import CheckpointError, shape_of
from mdzoo.family import Family
from mdzoo.layers import FeedForward, LayerNorm
from mdzoo.names import Names
from mdzoo.transformer import Attention, Block, Stack, StackDenoiser

STEM_EPSILON = 1e-12  # the blocks use PyTorch's default of 1e-5


@dataclass(frozen=True, slots=True)
class MaskGITConfig:
    """Sizes of a MaskGIT denoiser.

    The one vocabulary holds, in this order: codebook ids, the mask token, the classes, and the
    dropped class of classifier-free guidance.
    """

    grid: int  # tokens on a side of the square image
    codebook: int
    classes: int
    width: int
    depth: int
    heads: int
    hidden: int  # width of the MLP between its two maps

    def __post_init__(self) -> None:
        """Check what no tensor shape can tell."""
        if self.heads < 1 or self.width % self.heads:
            raise CheckpointError(
                f"heads must divide the width {self.width}, got {self.heads}; "
                "the checkpoint cannot tell it: pass --set heads=N"
            )
        if self.codebook < 1 or self.classes < 1:
            raise CheckpointError(
                f"the vocabulary must hold codes and classes, got {self.codebook} and "
                f"{self.classes}: pass another --set classes=N"
            )

    @property
    def length(self) -> int:
        """Number of image tokens."""
        return self.grid**2

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding table."""
        return self.codebook + self.classes + 2

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], *, heads: int, classes: int) -> Self:
        """Read all sizes from the shapes of a published state dict.

        Args:
            state: tensors under their published names.
            heads: number of attention heads, which no shape tells.
            classes: number of classes; what is left of the vocabulary is the codebook.
        """
        canvas, width = shape_of(state, "pos_emb", 3)[1:]
        grid = math.isqrt(canvas - 1)
        if grid**2 != canvas - 1:
            raise CheckpointError(
                f"pos_emb must cover a square image and one class token, got {canvas} positions"
            )
        layers = [re.match(r"transformer\.layers\.(\d+)\.", key) for key in state]
        return cls(
            grid=grid,
            codebook=shape_of(state, "tok_emb.weight", 2)[0] - classes - 2,
            classes=classes,
            width=width,
            depth=1 + max((int(found[1]) for found in layers if found), default=-1),
            heads=heads,
            hidden=shape_of(state, "transformer.layers.0.1.fn.net.0.weight", 2)[0],
        )


def _mlp(width: int) -> list[nn.Module]:
    return [LayerNorm(width, eps=STEM_EPSILON), nn.Linear(width, width), nn.GELU()]


def _block(config: MaskGITConfig, dropout: float) -> Block:
    width = config.width
    return Block(
        Attention(width, config.heads),
        FeedForward(width, config.hidden, dropout),
        LayerNorm(width),
        LayerNorm(width),
        dropout=dropout,
    )


class MaskGIT(StackDenoiser):
    """The denoiser: token ids in, logits over the codebook out.

    Satisfies ``mdexport.Denoiser``.
    """

    def __init__(self, config: MaskGITConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.tokens = nn.Embedding(config.vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(config.length + 1, width))
        self.bias = nn.Parameter(torch.zeros(config.length + 1, config.vocabulary))
        self.dropout = nn.Dropout(dropout)
        self.stem = nn.Sequential(
            *_mlp(width), LayerNorm(width, eps=STEM_EPSILON), nn.Linear(width, width)
        )
        self.blocks = Stack(_block(config, dropout) for _ in range(config.depth))
        self.last = nn.Sequential(*_mlp(width), LayerNorm(width, eps=STEM_EPSILON))

    @property
    def spec(self) -> DenoiserSpec:
        """What the runtime has to know; it is written into the manifest unchanged."""
        config = self.config
        return DenoiserSpec(
            length=config.length,
            canvas=config.length + 1,
            first=0,
            grid=(config.grid, config.grid),
            patch=(1, 1),
            codebook=config.codebook,
            mask_token=config.codebook,
            classes=config.classes,
            layers=config.depth,
            context=(
                ContextRow(
                    position=config.length,
                    offset=config.codebook + 1,
                    dropped=config.vocabulary - 1,
                ),
            ),
        )

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the published model's logits, without any cache.

        Args:
            tokens: int (batch, length), the mask token where hidden.
            labels: int (batch,), -1 for the dropped class.

        Returns:
            (batch, length, codebook + 1) float32; the last column is the mask token's.
        """
        config = self.config
        dropped = torch.full_like(labels, config.vocabulary - 1)
        context = torch.where(labels < 0, dropped, config.codebook + 1 + labels)
        ids = torch.cat([tokens, context[:, None]], dim=1)
        x = self.stem(self.dropout(self.tokens(ids) + self.positions))
        return self._logits(self.blocks(x), self.bias, config.codebook + 1)[:, :-1]

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        columns: Tensor,
        caches: Sequence[Tensor],
        extras: Mapping[str, Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Recompute some rows of the canvas against the K/V caches; see ``mdexport.Denoiser``."""
        x = self.stem(self.tokens(tokens) + F.embedding(positions, self.positions))
        x, refreshed = self.blocks.step(x, positions, caches, columns=columns)
        codebook = self.config.codebook
        wanted = positions.gather(1, columns.long())
        bias = F.embedding(wanted, self.bias[:, :codebook])
        return self._logits(x, bias, codebook), refreshed

    def _logits(self, x: Tensor, bias: Tensor, columns: int) -> Tensor:
        table = self.tokens.weight[:columns].float()
        return F.linear(self.last(x).float(), table) + bias[..., :columns].float()


def initialise(model: nn.Module) -> None:
    """Draw small embeddings, as BERT does; PyTorch's unit variance trains slowly."""
    for name in ("tokens.weight", "positions"):
        nn.init.normal_(model.get_parameter(name), std=0.02)


def infer(
    state: Mapping[str, Tensor], published: MaskGITConfig, settings: Mapping[str, int]
) -> MaskGITConfig:
    """Read sizes from shapes; take from the published model only what is sure to be the same.

    Args:
        state: tensors under their published names.
        published: the model that was asked for by name.
        settings: ``heads``, ``classes`` or ``codebook``, which no shape tells.

    Raises:
        CheckpointError: another architecture, or sizes that must be told.
    """
    rows, width = shape_of(state, "tok_emb.weight", 2)
    told = dict(settings)
    if "codebook" in told:
        told.setdefault("classes", rows - told["codebook"] - 2)
    if rows != published.vocabulary and "classes" not in told:
        raise CheckpointError(
            f"the checkpoint has {rows} embedding rows where the published model has "
            f"{published.vocabulary}, so its codebook cannot be told from its classes: "
            "pass --set classes=N"
        )
    if width != published.width and "heads" not in told:
        raise CheckpointError(
            f"the checkpoint has width {width} where the published model has {published.width}, "
            "so its number of attention heads is unknown: pass --set heads=N"
        )
    return MaskGITConfig.from_state(
        state,
        heads=told.get("heads", published.heads),
        classes=told.get("classes", published.classes),
    )


_NAMES = Names(
    (
        ("tok_emb.", "tokens."),
        ("first_layer.0.", "stem.0."),
        ("first_layer.2.", "stem.1."),
        ("first_layer.4.", "stem.3."),
        ("first_layer.6.", "stem.4."),
        ("transformer.layers.{i}.0.norm.", "blocks.{i}.norm1."),
        ("transformer.layers.{i}.0.fn.mha.in_proj_", "blocks.{i}.attention.qkv."),
        ("transformer.layers.{i}.0.fn.mha.out_proj.", "blocks.{i}.attention.out."),
        ("transformer.layers.{i}.1.norm.", "blocks.{i}.norm2."),
        ("transformer.layers.{i}.1.fn.net.0.", "blocks.{i}.mlp.up."),
        ("transformer.layers.{i}.1.fn.net.3.", "blocks.{i}.mlp.down."),
        ("last_layer.0.", "last.0."),
        ("last_layer.2.", "last.1."),
        ("last_layer.4.", "last.3."),
    )
)


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a published state dict under the names of ``MaskGIT``."""
    renamed = _NAMES.read(state)
    if "pos_emb" in renamed:
        renamed["positions"] = renamed.pop("pos_emb")[0]
    return renamed


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a ``MaskGIT`` under its published names."""
    renamed = _NAMES.write(state)
    renamed["pos_emb"] = renamed.pop("positions")[None]
    return renamed


FAMILY = Family(
    name="maskgit",
    build=MaskGIT,
    infer=infer,
    from_published=from_published,
    initialise=initialise,
    settings=("heads", "classes", "codebook"),
)
