"""Halton-MaskGIT as released by valeoai (Besnier et al. 2025, arXiv 2503.17076).

A bidirectional transformer over image tokens and a register row. The class is no token: it sets
shift, scale and gate of every block (adaLN, Peebles and Xie 2023, arXiv 2212.09748), so all maps
that depend on it alone are in ``condition`` and leave the graph of a pass.
Source of the architecture: repository valeoai/Halton-MaskGIT, ``Network/transformer.py`` (MIT).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdruntime.manifest import ContextRow, DenoiserSpec
from mdzoo.checkpoint import CheckpointError, shape_of
from mdzoo.family import Family
from mdzoo.layers import GatedFeedForward, RMSNorm, modulate
from mdzoo.names import Names
from mdzoo.transformer import Attention, Block, Stack, StackDenoiser

EPSILON = 1e-5  # of all norms, and of queries and keys


@dataclass(frozen=True, slots=True)
class HaltonConfig:
    """Sizes of a Halton-MaskGIT denoiser.

    The one embedding table holds, in this order: codebook ids, the mask token, the register.
    """

    grid: int  # tokens on a side of the square image
    codebook: int
    classes: int
    width: int
    depth: int
    heads: int
    hidden: int  # width of the MLP between its maps

    def __post_init__(self) -> None:
        """Check what no tensor shape can tell."""
        if not 1 <= self.heads <= self.width:
            raise CheckpointError(
                f"heads must be 1 to {self.width}, got {self.heads}: pass --set heads=N"
            )

    @property
    def length(self) -> int:
        """Number of image tokens."""
        return self.grid**2

    @property
    def inner(self) -> int:
        """Width of all heads together; less than ``width`` where heads do not divide it."""
        return self.heads * (self.width // self.heads)


def _block(config: HaltonConfig) -> Block:
    width, inner = config.width, config.inner
    attention = Attention(
        width, config.heads, inner=inner, bias=False, out_bias=False, normalised=EPSILON
    )
    norm1, norm2 = RMSNorm(width, eps=EPSILON), RMSNorm(width, eps=EPSILON)
    return Block(attention, GatedFeedForward(width, config.hidden), norm1, norm2)


class Halton(StackDenoiser):
    """The denoiser: token ids in, logits over the codebook out.

    Satisfies ``mdexport.Denoiser``. The register is the row behind the image; it has no position,
    so the table of positions ends with zeros.
    """

    def __init__(self, config: HaltonConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.tokens = nn.Embedding(config.codebook + 2, width)
        self.positions = nn.Parameter(torch.zeros(config.length + 1, width))
        self.classes = nn.Embedding(config.classes + 1, width)  # the last is the dropped class
        self.modulations = nn.ModuleList(nn.Linear(width, 6 * width) for _ in range(config.depth))
        self.blocks = Stack(_block(config) for _ in range(config.depth))
        self.last_norm = RMSNorm(width, eps=EPSILON, bias=True)
        self.last_modulation = nn.Linear(width, 2 * width)
        self.bias = nn.Parameter(torch.zeros(config.codebook + 1))

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
            context=(ContextRow(config.length, offset=-1, dropped=config.codebook + 1),),
        )

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the published model's logits, without any cache; see ``mdexport.Denoiser``.

        Returns:
            (batch, length, codebook + 1) float32; the last column is the mask token's.
        """
        ids = F.pad(tokens, (0, 1), value=self.config.codebook + 1)
        extras = self.condition(labels)
        x = self.blocks(self.tokens(ids) + self.positions, modulation=extras["modulation"])
        return self._logits(x[:, :-1], extras["last"], self.config.codebook + 1)

    def condition(self, labels: Tensor) -> dict[str, Tensor]:
        """Return what classes int (batch,), -1 for the dropped one, do to blocks and last norm.

        Returns:
            ``modulation`` (batch, depth, 6, width), see ``mdzoo.transformer.Block``, and ``last``
            (batch, 2, width), shift and scale.
        """
        width, depth = self.config.width, self.config.depth
        dropped = torch.full_like(labels, self.config.classes)
        y = F.silu(self.classes(torch.where(labels < 0, dropped, labels)))
        parts = torch.stack([linear(y) for linear in self.modulations], dim=1)
        return {
            "modulation": parts.reshape(-1, depth, 6, width),
            "last": self.last_modulation(y).reshape(-1, 2, width),
        }

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        columns: Tensor,
        caches: Sequence[Tensor],
        extras: Mapping[str, Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Recompute some rows of the canvas against the K/V caches; see ``mdexport.Denoiser``."""
        x = self.tokens(tokens) + F.embedding(positions, self.positions)
        x, refreshed = self.blocks.step(
            x, positions, caches, modulation=extras["modulation"], columns=columns
        )
        logits = self._logits(x, extras["last"], self.config.codebook)
        return logits, refreshed

    def _logits(self, x: Tensor, last: Tensor, columns: int) -> Tensor:
        x = modulate(self.last_norm(x).float(), last[:, 0].float(), last[:, 1].float())
        return F.linear(x, self.tokens.weight[:columns].float(), self.bias[:columns].float())


def initialise(model: nn.Module) -> None:
    """Draw small tokens and positions; PyTorch's unit variance trains slowly.

    The modulations are not set to zero, as for training: a random model whose gates are shut
    would pass every comparison of its attention and its MLPs.
    """
    nn.init.normal_(model.get_parameter("tokens.weight"), std=0.02)
    nn.init.normal_(model.get_parameter("positions").detach()[:-1], std=0.02)


def infer(
    state: Mapping[str, Tensor], published: HaltonConfig, settings: Mapping[str, int]
) -> HaltonConfig:
    """Read sizes from shapes; take the heads from the published model of the same width.

    Raises:
        CheckpointError: another architecture, or heads that must be told.
    """
    state = _untied(state)
    rows, width = shape_of(state, "tok_emb.weight", 2)
    known = {config.width: config.heads for config in (*PUBLISHED.values(), published)}
    if width not in known and "heads" not in settings:
        raise CheckpointError(
            f"the checkpoint has width {width} where the published models have "
            f"{', '.join(map(str, sorted(known)))}, so its number of attention heads is unknown: "
            "pass --set heads=N"
        )
    numbers = {key.split(".")[2] for key in state if key.startswith("transformer.layers.")}
    config = HaltonConfig(
        grid=math.isqrt(shape_of(state, "pos_emb.weight", 2)[0]),
        codebook=rows - 1,
        classes=shape_of(state, "cls_emb.weight", 2)[0] - 1,
        width=width,
        depth=len(numbers),
        heads=settings.get("heads", known.get(width, 0)),
        hidden=shape_of(state, "transformer.layers.0.ff.w1.weight", 2)[0],
    )
    inner = shape_of(state, "transformer.layers.0.attn.wq.weight", 2)[0]
    if config.inner != inner:
        raise CheckpointError(
            f"{config.heads} heads at width {width} must have queries of {config.inner} numbers "
            f"in all, found {inner}: pass another --set heads=N"
        )
    return config


def _untied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with one copy of the embedding table; tools that drop copies keep any."""
    rest = dict(state)
    if "head.weight" in rest:
        head = rest.pop("head.weight")
        table = rest.setdefault("tok_emb.weight", head)
        if head is not table and not torch.equal(table.float(), head.float()):
            raise CheckpointError(
                "head.weight must be the same table as tok_emb.weight, found another: they are "
                "one parameter of this architecture; download the checkpoint again"
            )
    return rest


_BLOCK = "transformer.layers.{i}."
_QKV = tuple(f"{_BLOCK}attn.{part}.weight" for part in ("wq", "wk", "wv"))

_NAMES = Names(
    renamed=(
        ("tok_emb.", "tokens."),
        ("cls_emb.", "classes."),
        ("pos_emb.weight", "positions"),
        (_BLOCK + "mlp.1.", "modulations.{i}."),
        (_BLOCK + "ln1.", "blocks.{i}.norm1."),
        (_BLOCK + "attn.qkv.", "blocks.{i}.attention.qkv."),
        (_BLOCK + "attn.wo.", "blocks.{i}.attention.out."),
        (_BLOCK + "ln2.", "blocks.{i}.norm2."),
        (_BLOCK + "ff.w1.", "blocks.{i}.mlp.gate."),
        (_BLOCK + "ff.w2.", "blocks.{i}.mlp.down."),
        (_BLOCK + "ff.w3.", "blocks.{i}.mlp.up."),
        ("last_norm.norm_final.", "last_norm."),
        ("last_norm.mlp.1.", "last_modulation."),
        ("head.bias", "bias"),
    ),
    joined=((_QKV, _BLOCK + "attn.qkv.weight"),),
)


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a published state dict under the names of ``Halton``."""
    rest = _untied(state)
    register = rest.pop("reg_tokens.weight", torch.zeros(0))
    last = {"tok_emb.weight": register, "pos_emb.weight": torch.zeros_like(register)}
    for key, row in last.items():
        if key in rest and rest[key].shape[1:] == row.shape[1:]:
            rest[key] = torch.cat([rest[key], row])
    return _NAMES.read(rest)


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a ``Halton`` under its published names."""
    found = _NAMES.write(state)
    table = found["tok_emb.weight"]
    found["tok_emb.weight"] = found["head.weight"] = table[:-1]
    found["reg_tokens.weight"] = table[-1:]
    found["pos_emb.weight"] = found["pos_emb.weight"][:-1]
    return found


FAMILY = Family(
    name="halton",
    build=Halton,
    infer=infer,
    from_published=from_published,
    initialise=initialise,
    settings=("heads",),
)

_TINY = HaltonConfig(
    grid=16, codebook=16384, classes=1000, width=384, depth=6, heads=6, hidden=1024
)
_SMALL = replace(_TINY, width=512, depth=12, hidden=1536)  # six heads of 85 beside a width of 512
_BASE = replace(_TINY, width=768, depth=12, heads=12, hidden=2048)

PUBLISHED = {
    "halton-tiny-256": _TINY,
    "halton-small-256": _SMALL,
    "halton-base-256": _BASE,
    "halton-small-384": replace(_SMALL, grid=24),
    "halton-base-384": replace(_BASE, grid=24),
    "halton-large-384": replace(_BASE, grid=24, width=1024, depth=24, heads=16, hidden=2816),
}
