"""The generators of TiTok (Yu et al. 2024, arXiv 2406.07550): a class, and 32 to 128 tokens.

Two transformers over one class token followed by the tokens of an image, which have an order but
no place. L-32 and B-64 use that of BERT (post-norm), S-128 one with long skip connections
(U-ViT, Bao et al. 2022, arXiv 2209.12152; pre-norm). Source of the architecture: repository
bytedance/1d-tokenizer (Apache 2.0), ``modeling/maskgit.py``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdruntime.manifest import ContextRow, DenoiserSpec
from mdzoo.checkpoint import CheckpointError, shape_of
from mdzoo.family import Family
from mdzoo.layers import FeedForward, LayerNorm, take_rows
from mdzoo.titok_checkpoint import POSITIONS, bare, blocks_of, from_published
from mdzoo.transformer import Attention, Block, Stack, StackDenoiser

__all__ = ["FAMILY", "PUBLISHED", "TiTok", "TiTokConfig"]

BERT_EPSILON = 1e-12  # the U-ViT has PyTorch's default of 1e-5


@dataclass(frozen=True, slots=True)
class TiTokConfig:
    """Sizes of a TiTok generator.

    The one vocabulary holds, in this order: codebook ids, the mask token, the classes, and the
    dropped class of classifier-free guidance.
    """

    length: int  # tokens of an image
    codebook: int
    classes: int
    width: int
    depth: int
    heads: int
    hidden: int  # width of the MLP between its two maps
    skips: bool  # U-ViT in place of BERT

    def __post_init__(self) -> None:
        """Check what no tensor shape can tell, and that there is something to build."""
        if self.heads < 1 or self.width % self.heads:
            raise CheckpointError(
                f"heads must divide the width {self.width}, got {self.heads}; "
                "the checkpoint cannot tell it: pass --set heads=N"
            )
        if min(self.length, self.classes, self.depth) < 1 or (self.skips and self.depth % 2 == 0):
            raise CheckpointError(
                "a TiTok generator must have tokens, classes and blocks, an odd number of blocks "
                f"if it has long skips, got {self}; is the checkpoint of another architecture?"
            )

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding table."""
        return self.codebook + self.classes + 2


def _block(config: TiTokConfig) -> Block:
    width, epsilon = config.width, 1e-5 if config.skips else BERT_EPSILON
    return Block(
        Attention(width, config.heads, bias=not config.skips),
        FeedForward(width, config.hidden),
        LayerNorm(width, eps=epsilon),
        LayerNorm(width, eps=epsilon),
        post=not config.skips,
    )


class TiTok(StackDenoiser):
    """The denoiser: token ids in, logits over the codebook out.

    Satisfies ``mdexport.Denoiser``.
    """

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.tokens = nn.Embedding(config.vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(config.length + 1, width))
        self.norm_in = nn.Identity() if config.skips else LayerNorm(width, eps=BERT_EPSILON)
        self.blocks = Stack(_block(config) for _ in range(config.depth))
        bridges = config.depth // 2 if config.skips else 0
        self.skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(bridges))
        self.norm_out = LayerNorm(width) if config.skips else nn.Identity()
        self.head = nn.Linear(width, config.codebook)

    @property
    def spec(self) -> DenoiserSpec:
        """What the runtime has to know; it is written into the manifest unchanged."""
        config = self.config
        context = ContextRow(position=0, offset=config.codebook + 1, dropped=config.vocabulary - 1)
        return DenoiserSpec(
            length=config.length,
            canvas=config.length + 1,
            first=1,
            grid=(config.length,),
            patch=(1,),
            codebook=config.codebook,
            mask_token=config.codebook,
            classes=config.classes,
            layers=config.depth,
            context=(context,),
        )

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the published model's logits, without any cache.

        Args:
            tokens: int (batch, length), the mask token where hidden.
            labels: int (batch,), -1 for the dropped class.

        Returns:
            (batch, length, codebook) float32.
        """
        config = self.config
        dropped = torch.full_like(labels, config.vocabulary - 1)
        context = torch.where(labels < 0, dropped, config.codebook + 1 + labels)
        ids = torch.cat([context[:, None], tokens], dim=1)
        blocks = list(self.blocks.blocks())
        x = self.norm_in(self.tokens(ids) + self.positions)
        x = self._through(x, lambda index, y: blocks[index](y))
        return self._logits(x[:, 1:])

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        columns: Tensor,
        caches: Sequence[Tensor],
        extras: Mapping[str, Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Recompute some rows of the canvas against the K/V caches; see ``mdexport.Denoiser``.

        Long skips join a row with itself, so they need no cache.
        """
        blocks, refreshed = list(self.blocks.blocks()), list[Tensor]()

        def apply(index: int, x: Tensor) -> Tensor:
            x, fresh = blocks[index].step(x, positions, caches[2 * index : 2 * index + 2])
            refreshed.extend(fresh)
            return x

        x = self.norm_in(self.tokens(tokens) + F.embedding(positions, self.positions))
        x = self._through(x, apply)
        return self._logits(take_rows(x, columns)), refreshed

    def _through(self, x: Tensor, apply: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Apply the blocks by number; the last of them meet what the first of them returned."""
        kept: list[Tensor] = []
        bridges = len(self.skips)
        for index in range(self.config.depth):
            rising = index - (self.config.depth - bridges)
            if rising >= 0:
                x = self.skips[rising](torch.cat([x, kept.pop()], dim=-1))
            x = apply(index, x)
            if index < bridges:
                kept.append(x)
        return x

    def _logits(self, x: Tensor) -> Tensor:
        weight, bias = self.head.weight.float(), self.head.bias.float()
        return F.linear(self.norm_out(x).float(), weight, bias)


def initialise(model: nn.Module) -> None:
    """Draw small embeddings, as BERT does; PyTorch's unit variance trains slowly."""
    for name in ("tokens.weight", "positions"):
        nn.init.normal_(model.get_parameter(name), std=0.02)


# Tensors that tell the sizes: table of tokens, positions, and the first map of an MLP.
_BERT_SIZES = (
    "embeddings.word_embeddings.weight",
    POSITIONS,
    "encoder.layer.0.intermediate.dense.weight",
)
_UVIT_SIZES = ("embeddings.weight", "pos_embed", "mid_block.mlp.fc1.weight")


def infer(
    state: Mapping[str, Tensor], published: TiTokConfig, settings: Mapping[str, int]
) -> TiTokConfig:
    """Read sizes from shapes; take the published heads where width and architecture agree.

    Args:
        state: tensors under their published names.
        published: the model that was asked for by name.
        settings: ``heads``, which no shape tells.

    Raises:
        CheckpointError: another architecture, or heads that must be told.
    """
    state = bare(state)
    skips = "pos_embed" in state
    table, positions, mlp = _UVIT_SIZES if skips else _BERT_SIZES
    rows, width = shape_of(state, table, 2)
    if (skips, width) != (published.skips, published.width) and "heads" not in settings:
        kinds = ("BERT", "U-ViT")
        raise CheckpointError(
            f"the checkpoint is a {kinds[skips]} of width {width} where the published model is a "
            f"{kinds[published.skips]} of width {published.width}, so its number of attention "
            "heads is unknown: pass --set heads=N"
        )
    codebook = shape_of(state, "lm_head.weight", 2)[0]
    return TiTokConfig(
        length=shape_of(state, positions, 3 if skips else 2)[-2] - 1,
        codebook=codebook,
        classes=rows - codebook - 2,
        width=width,
        depth=blocks_of(state),
        heads=settings.get("heads", published.heads),
        hidden=shape_of(state, mlp, 2)[0],
        skips=skips,
    )


FAMILY = Family(
    name="titok",
    build=TiTok,
    infer=infer,
    from_published=from_published,
    initialise=initialise,
    settings=("heads",),
    prefixes=("model.",),
)


def _bert(length: int) -> TiTokConfig:
    return TiTokConfig(
        length=length,
        codebook=4096,
        classes=1000,
        width=768,
        depth=24,
        heads=16,
        hidden=3072,
        skips=False,
    )


PUBLISHED = {
    "titok-l32": _bert(32),
    "titok-b64": _bert(64),
    "titok-s128": replace(_bert(128), width=1024, depth=21, hidden=4096, skips=True),
}
