"""The generators of MaskBit (Weber et al. 2024, arXiv 2409.16211): tokens are bits.

A BERT (post-norm) over the positions of an image followed by one class row. A position holds two
tokens, each half of the bits of a code of the tokenizer and hidden on its own; there is no
embedding table: the transformer is given the bits themselves, -1 and 1, and 0 where hidden.
Source of the architecture: repository markweberdev/maskbit (Apache 2.0), ``modeling/bert.py``.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdruntime.manifest import ContextRow, DenoiserSpec
from mdzoo.checkpoint import CheckpointError, shape_of
from mdzoo.family import Family
from mdzoo.layers import FeedForward, LayerNorm
from mdzoo.names import Names
from mdzoo.transformer import Attention, Block, Stack, StackDenoiser

__all__ = [
    "FAMILY",
    "PUBLISHED",
    "MaskBit",
    "MaskBitConfig",
    "from_published",
    "infer",
    "to_published",
]

EPSILON = 1e-12  # of every normalisation
GROUPS = 2  # tokens per position


@dataclass(frozen=True, slots=True)
class MaskBitConfig:
    """Sizes of a MaskBit generator; its tokenizer's codes have ``bits`` bits."""

    grid: int  # positions on a side of the square image
    bits: int
    classes: int
    width: int
    depth: int
    heads: int
    hidden: int  # width of the MLP between its two maps

    def __post_init__(self) -> None:
        """Check what no tensor shape can tell, and that there is something to build."""
        if self.heads < 1 or self.width % self.heads:
            raise CheckpointError(
                f"heads must divide the width {self.width}, got {self.heads}; "
                "the checkpoint cannot tell it: pass --set heads=N"
            )
        if self.bits < GROUPS or self.bits % GROUPS:
            raise CheckpointError(
                f"the bits of a code must split in {GROUPS} groups, got {self.bits} bits; "
                "is the checkpoint one of MaskBit?"
            )

    @property
    def codebook(self) -> int:
        """Number of tokens there are in each group; the mask token comes after them."""
        return 2 ** (self.bits // GROUPS)

    @property
    def rows(self) -> int:
        """Positions of the image, which is also the row of the class."""
        return self.grid**2


def _block(config: MaskBitConfig) -> Block:
    width = config.width
    return Block(
        Attention(width, config.heads),
        FeedForward(width, config.hidden),
        LayerNorm(width, eps=EPSILON),
        LayerNorm(width, eps=EPSILON),
        post=True,
    )


class MaskBit(StackDenoiser):
    """The denoiser: tokens of either group in, logits over their codebook out.

    Satisfies ``mdexport.Denoiser``.
    """

    def __init__(self, config: MaskBitConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.bits = nn.Linear(config.bits, width)
        self.classes = nn.Embedding(config.classes + 1, width)  # the dropped class comes last
        self.positions = nn.Parameter(torch.zeros(config.rows + 1, width))
        self.norm_in = LayerNorm(width, eps=EPSILON)
        self.blocks = Stack(_block(config) for _ in range(config.depth))
        self.last = nn.Sequential(nn.Linear(width, width), nn.GELU(), LayerNorm(width, eps=EPSILON))
        self.head = nn.Linear(width, GROUPS * config.codebook)

    @property
    def spec(self) -> DenoiserSpec:
        """What the runtime has to know; it is written into the manifest unchanged."""
        config = self.config
        return DenoiserSpec(
            length=GROUPS * config.rows,
            canvas=config.rows + 1,
            first=0,
            grid=(config.grid, GROUPS * config.grid),
            patch=(1, GROUPS),
            codebook=config.codebook,
            mask_token=config.codebook,
            classes=config.classes,
            layers=config.depth,
            context=(ContextRow(position=config.rows, offset=0, dropped=config.classes),),
        )

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the published model's logits, without any cache.

        Args:
            tokens: int (batch, length), the groups of a position side by side, that of the lower
                bits first; the mask token where hidden.
            labels: int (batch,), -1 for the dropped class.

        Returns:
            (batch, length, codebook) float32.
        """
        context = torch.where(labels < 0, torch.full_like(labels, self.config.classes), labels)
        x = torch.cat([self._bits(tokens), self.classes(context)[:, None]], dim=1)
        return self._logits(self.blocks(self.norm_in(x + self.positions))[:, :-1])

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        columns: Tensor,
        caches: Sequence[Tensor],
        extras: Mapping[str, Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Recompute some rows of the canvas against the K/V caches; see ``mdexport.Denoiser``."""
        # The class stands where the first group of its row would be; other rows look up class 0.
        labelled = positions == self.config.rows
        classes = self.classes(torch.where(labelled, tokens[:, ::GROUPS], 0))
        x = torch.where(labelled[..., None], classes, self._bits(tokens))
        x = self.norm_in(x + F.embedding(positions, self.positions))
        x, refreshed = self.blocks.step(x, positions, caches, columns=columns)
        return self._logits(x), refreshed

    def _bits(self, tokens: Tensor) -> Tensor:
        """Embed int (rows, m * 2) by their bits as (rows, m, width)."""
        # Ids of classes may be greater, but have no bits.
        shown = F.embedding(tokens.clamp(max=self.config.codebook), self._signs())
        return self.bits(torch.unflatten(shown, 1, (-1, GROUPS)).flatten(2))

    def _signs(self) -> Tensor:
        """Return the bits of all tokens, the lowest first, and zeros: (codebook + 1, bits / 2)."""
        codebook, like = self.config.codebook, self.bits.weight
        weights = 2 ** torch.arange(self.config.bits // GROUPS, device=like.device)
        bits = torch.arange(codebook, device=like.device)[:, None] // weights % 2
        return F.pad(2 * bits - 1, (0, 0, 0, 1)).to(like.dtype)

    def _logits(self, x: Tensor) -> Tensor:
        weight, bias = self.head.weight.float(), self.head.bias.float()
        logits = F.linear(self.last(x).float(), weight, bias)
        return torch.unflatten(logits, 2, (GROUPS, self.config.codebook)).flatten(1, 2)


def initialise(model: nn.Module) -> None:
    """Draw small embeddings, as BERT does; PyTorch's unit variance trains slowly."""
    for name in ("classes.weight", "positions"):
        nn.init.normal_(model.get_parameter(name), std=0.02)


def infer(
    state: Mapping[str, Tensor], published: MaskBitConfig, settings: Mapping[str, int]
) -> MaskBitConfig:
    """Read sizes from shapes; take the published heads where the width is the published one.

    Args:
        state: tensors under their published names.
        published: the model that was asked for by name.
        settings: ``heads``, which no shape tells.

    Raises:
        CheckpointError: another architecture, or heads that must be told.
    """
    canvas, width = shape_of(state, "pos_emb", 3)[1:]
    grid = math.isqrt(canvas - 1)
    if grid < 1 or grid**2 != canvas - 1:
        raise CheckpointError(
            f"pos_emb must cover a square image and one class row, got {canvas} positions; "
            "is the checkpoint of another architecture?"
        )
    if width != published.width and "heads" not in settings:
        raise CheckpointError(
            f"the checkpoint has width {width} where the published model has {published.width}, "
            "so its number of attention heads is unknown: pass --set heads=N"
        )
    bits = "token_emb.weight" if "token_emb.weight" in state else "input_proj.weight"
    layers = [re.match(r"transformer\.layers\.(\d+)\.", key) for key in state]
    return MaskBitConfig(
        grid=grid,
        bits=shape_of(state, bits, 2)[1],
        classes=shape_of(state, "class_emb.weight", 2)[0] - 1,
        width=width,
        depth=len({found[1] for found in layers if found}),
        heads=settings.get("heads", published.heads),
        hidden=shape_of(state, "transformer.layers.0.1.net.0.weight", 2)[0],
    )


_NAMES = Names(
    (
        ("input_proj.", "bits."),
        ("token_emb.", "bits."),  # in some files
        ("class_emb.", "classes."),
        ("first_layer.0.", "norm_in."),
        ("transformer.layers.{i}.0.mha.in_proj_", "blocks.{i}.attention.qkv."),
        ("transformer.layers.{i}.0.mha.out_proj.", "blocks.{i}.attention.out."),
        ("transformer.layers.{i}.0.norm.", "blocks.{i}.norm1."),
        ("transformer.layers.{i}.1.net.0.", "blocks.{i}.mlp.up."),
        ("transformer.layers.{i}.1.net.2.", "blocks.{i}.mlp.down."),
        ("transformer.layers.{i}.1.norm.", "blocks.{i}.norm2."),
        ("last_layer.", "last."),
        ("prediction_layer.", "head."),
    )
)


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a published state dict under the names of ``MaskBit``."""
    ours = _NAMES.read(state)
    if "pos_emb" in ours:
        ours["positions"] = ours.pop("pos_emb")[0]
    return ours


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a ``MaskBit`` under its published names."""
    published = _NAMES.write(state)
    published["pos_emb"] = published.pop("positions")[None]
    return published


FAMILY = Family(
    name="maskbit",
    build=MaskBit,
    infer=infer,
    from_published=from_published,
    initialise=initialise,
    settings=("heads",),
)

PUBLISHED = {
    f"maskbit-{bits}bit": MaskBitConfig(
        grid=16, bits=bits, classes=1000, width=1024, depth=24, heads=16, hidden=4096
    )
    for bits in (10, 12, 14, 16, 18)
}
