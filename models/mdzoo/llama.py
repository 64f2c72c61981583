"""SMDM (Nie et al. 2024, arXiv 2410.18514) and LLaDA (Nie et al. 2025, arXiv 2502.09992).

The Llama transformer over text without its causal mask: RMSNorm before attention and SwiGLU MLP,
rotary positions, no biases, an output head of its own. The two differ in the names and the
layout of their files, the base of the rotation, and where the mask token stands.
Sources: repositories ML-GSAI/SMDM, ``lit_gpt/diffmodel.py`` (Apache-2.0 licence), and
ML-GSAI/LLaDA with its published configuration (MIT licence).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdruntime.manifest import DenoiserSpec
from mdzoo.checkpoint import CheckpointError, shape_of
from mdzoo.family import Family
from mdzoo.layers import GatedFeedForward, RMSNorm, rotary
from mdzoo.llama_names import SMDM, Layout, bare, from_published, layout_of, to_published
from mdzoo.transformer import Attention, Block, Stack, StackDenoiser

__all__ = [
    "FAMILY",
    "HEADS",
    "PUBLISHED",
    "Llama",
    "LlamaConfig",
    "from_published",
    "infer",
    "initialise",
    "to_published",
]

NEVER = -1e30  # a logit; guidance subtracts logits, which with infinities would give NaN
LLADA_VOCABULARY, LLADA_MASK = 126464, 126336


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Sizes of a bidirectional Llama."""

    length: int  # tokens of the texts it was trained on
    vocabulary: int  # rows of the embedding table
    scored: int  # rows of the output head: the first ones of the vocabulary
    mask: int
    width: int
    depth: int
    heads: int
    hidden: int  # width of the MLP between its maps
    layout: Layout = SMDM

    def __post_init__(self) -> None:
        """Check what no tensor shape can tell."""
        if self.heads < 1 or self.width % (2 * self.heads):
            raise CheckpointError(
                f"heads must divide the width {self.width} into even parts, got {self.heads}; "
                "the checkpoint cannot tell it: pass --set heads=N"
            )
        if not 0 <= self.mask < self.vocabulary:
            raise CheckpointError(
                f"the mask token must be one of {self.vocabulary} embedding rows, got {self.mask}: "
                "pass --set mask=N"
            )
        if self.length < 1:
            raise CheckpointError(f"length must be positive, got {self.length}: --set length=N")
        if self.scored > self.vocabulary:
            raise CheckpointError(
                f"the head must score tokens of the {self.vocabulary} embedding rows, found "
                f"{self.scored} rows; is it of another architecture?"
            )

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def codebook(self) -> int:
        """How many ids can be drawn: all scored ones, less the mask token where it is the last."""
        return self.scored - 1 if self.mask == self.scored - 1 else self.scored


def _smdm(width: int, depth: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        length=2048,
        vocabulary=32001,
        scored=32000,
        mask=32000,
        width=width,
        depth=depth,
        heads=heads,
        hidden=4 * width,
    )


PUBLISHED = {"smdm-170m": _smdm(768, 18, 12), "smdm-1028m": _smdm(1792, 20, 14)}

HEADS = {
    (4096, 12288): 32,  # LLaDA; all others are sizes of SMDM, from 6M to 2121M
    (640, 1600): 8,
    **{(64 * heads, 256 * heads): heads for heads in (4, 6, 8, 9, 10, 12, 14, 16)},
    **{(128 * heads, 512 * heads): heads for heads in (10, 11, 12, 14, 16, 17)},
}
"""Heads by width and width of the MLP."""


class Llama(StackDenoiser):
    """The denoiser: token ids in, logits over the codebook out; satisfies ``mdexport.Denoiser``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.blocks = Stack(_block(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.scored, bias=False)

    @property
    def spec(self) -> DenoiserSpec:
        """What the runtime has to know; it is written into the manifest unchanged."""
        config = self.config
        return DenoiserSpec(
            length=config.length,
            canvas=config.length,
            first=0,
            grid=(config.length,),
            patch=(1,),
            codebook=config.codebook,
            mask_token=config.mask,
            classes=0,
            layers=config.depth,
            context=(),
            flexible=True,
        )

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the published model's logits, without any cache.

        Args:
            tokens: int (batch, length), of any length; the mask token where hidden.
            labels: no part of it; there are no classes.

        Returns:
            (batch, length, scored) float32, whatever the model says of the mask token included.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        rotation = rotary(positions, self.config.head_size, self.config.layout.base)
        return self._logits(self.blocks(self.tokens(tokens), rotation), self.config.scored)

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        columns: Tensor,
        caches: Sequence[Tensor],
        extras: Mapping[str, Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Recompute some rows of the canvas against the K/V caches; see ``mdexport.Denoiser``."""
        config = self.config
        rotation = rotary(positions, config.head_size, config.layout.base)
        x = self.tokens(tokens)
        x, refreshed = self.blocks.step(x, positions, caches, rotation, columns=columns)
        logits = self._logits(x, config.codebook)
        if config.mask < config.codebook:  # with tokens behind it, it cannot be cut off
            ids = torch.arange(config.codebook, device=logits.device)
            logits = torch.where(ids == config.mask, NEVER, logits)
        return logits, refreshed

    def _logits(self, x: Tensor, columns: int) -> Tensor:
        return F.linear(self.norm(x).float(), self.head.weight[:columns].float())


def _block(config: LlamaConfig) -> Block:
    width = config.width
    grouped = config.layout.grouped
    return Block(
        Attention(width, config.heads, bias=False, out_bias=False, grouped=grouped),
        GatedFeedForward(width, config.hidden),
        RMSNorm(width),
        RMSNorm(width),
    )


def initialise(model: nn.Module) -> None:
    """Draw small embeddings; PyTorch's unit variance trains slowly."""
    nn.init.normal_(model.get_parameter("tokens.weight"), std=0.02)


def infer(
    state: Mapping[str, Tensor], published: LlamaConfig, settings: Mapping[str, int]
) -> LlamaConfig:
    """Read sizes from shapes; heads are those of the published models of the same widths.

    Args:
        state: tensors under the published names of either model.
        published: the model that was asked for by name; its length holds unless told otherwise.
        settings: ``heads``, ``mask`` or ``length``, which no shape tells.

    Raises:
        CheckpointError: another architecture, or sizes that must be told.
    """
    state = bare(state)
    layout = layout_of(state)
    vocabulary, width = shape_of(state, layout.theirs("tokens.weight"), 2)
    hidden = shape_of(state, layout.theirs("blocks.0.mlp.gate.weight"), 2)[0]
    blocks = layout.theirs("blocks.")
    return LlamaConfig(
        length=settings.get("length", published.length),
        vocabulary=vocabulary,
        scored=shape_of(state, layout.theirs("head.weight"), 2)[0],
        mask=settings["mask"] if "mask" in settings else _mask(layout, vocabulary),
        width=width,
        depth=len({key[len(blocks) :].split(".")[0] for key in state if key.startswith(blocks)}),
        heads=settings["heads"] if "heads" in settings else _heads(width, hidden, published),
        hidden=hidden,
        layout=layout,
    )


def _mask(layout: Layout, vocabulary: int) -> int:
    if layout == SMDM:
        return vocabulary - 1
    if vocabulary == LLADA_VOCABULARY:
        return LLADA_MASK
    raise CheckpointError(
        f"the checkpoint has {vocabulary} embedding rows where LLaDA-8B has {LLADA_VOCABULARY}, "
        "so its mask token is unknown: pass --set mask=N"
    )


def _heads(width: int, hidden: int, published: LlamaConfig) -> int:
    if (width, hidden) in HEADS:
        return HEADS[width, hidden]
    if width == published.width:
        return published.heads
    raise CheckpointError(
        f"the checkpoint has width {width} and an MLP of {hidden}, as no published model has, "
        "so its number of attention heads is unknown: pass --set heads=N"
    )


FAMILY = Family(
    name="llama",
    build=Llama,
    infer=infer,
    from_published=from_published,
    initialise=initialise,
    settings=("heads", "mask", "length"),
    prefixes=("model.",),
)
