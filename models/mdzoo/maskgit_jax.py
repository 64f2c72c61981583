"""The original MaskGIT of Google Research (Chang et al. 2022, arXiv 2202.04200).

A bidirectional transformer as BERT's: post-LN blocks over one class token followed by image
tokens, and an output head tied to the embedding table. It knows no dropped class.
Source of the architecture: repository google-research/maskgit, ``maskgit/nets/
maskgit_transformer.py`` (Apache-2.0), written in flax; names are paths in its tree of parameters.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdruntime.manifest import ContextRow, DenoiserSpec
from mdzoo.checkpoint import CheckpointError, shape_of
from mdzoo.family import Family
from mdzoo.layers import FeedForward, LayerNorm
from mdzoo.names import Names
from mdzoo.transformer import Attention, Block, Stack, StackDenoiser

EPSILON = 1e-12  # of all norms

_gelu = partial(F.gelu, approximate="tanh")


@dataclass(frozen=True, slots=True)
class MaskGITJaxConfig:
    """Sizes of a MaskGIT denoiser of the original code.

    The one vocabulary holds, in this order: codebook ids, the classes, the mask token. The
    original writes the mask as -1, which picks the last row of a table.
    """

    grid: int  # tokens on a side of the square image
    codebook: int
    classes: int
    width: int
    depth: int
    heads: int
    hidden: int  # width of the MLP between its two maps

    def __post_init__(self) -> None:
        """Check what shapes may contradict."""
        if self.width % self.heads:
            raise CheckpointError(
                f"the width {self.width} must be a multiple of the {self.heads} heads; "
                "is the checkpoint of another architecture?"
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
        return self.codebook + self.classes + 1


def _block(config: MaskGITJaxConfig) -> Block:
    width = config.width
    return Block(
        Attention(width, config.heads),
        FeedForward(width, config.hidden, activation=_gelu),
        LayerNorm(width, eps=EPSILON),
        LayerNorm(width, eps=EPSILON),
        post=True,
    )


class MaskGITJax(StackDenoiser):
    """The denoiser: token ids in, logits over the codebook out.

    Satisfies ``mdexport.Denoiser``.
    """

    def __init__(self, config: MaskGITJaxConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.tokens = nn.Embedding(config.vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(config.length + 1, width))
        self.norm = LayerNorm(width, eps=EPSILON)
        self.blocks = Stack(_block(config) for _ in range(config.depth))
        self.dense = nn.Linear(width, width)
        self.last_norm = LayerNorm(width, eps=EPSILON)
        self.bias = nn.Parameter(torch.zeros(config.vocabulary))

    @property
    def spec(self) -> DenoiserSpec:
        """What the runtime has to know; it is written into the manifest unchanged."""
        config = self.config
        return DenoiserSpec(
            length=config.length,
            canvas=config.length + 1,
            first=1,
            grid=(config.grid, config.grid),
            patch=(1, 1),
            codebook=config.codebook,
            mask_token=config.vocabulary - 1,
            classes=config.classes,
            layers=config.depth,
            context=(ContextRow(0, offset=config.codebook, dropped=config.codebook),),
            unconditional=False,
        )

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the published model's logits, without any cache.

        Args:
            tokens: int (batch, length), the mask token where hidden.
            labels: int (batch,); -1, which the model does not know, stands for class 0.

        Returns:
            (batch, length, vocabulary) float32; what follows the codebook is never drawn.
        """
        context = (self.config.codebook + labels.clamp(min=0)).to(tokens.dtype)
        ids = torch.cat([context[:, None], tokens], dim=1)
        x = self.blocks(self.norm(self.tokens(ids) + self.positions))
        return self._logits(x[:, 1:], self.config.vocabulary)

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        columns: Tensor,
        caches: Sequence[Tensor],
        extras: Mapping[str, Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Recompute some rows of the canvas against the K/V caches; see ``mdexport.Denoiser``."""
        x = self.norm(self.tokens(tokens) + F.embedding(positions, self.positions))
        x, refreshed = self.blocks.step(x, positions, caches, columns=columns)
        return self._logits(x, self.config.codebook), refreshed

    def _logits(self, x: Tensor, columns: int) -> Tensor:
        x = self.last_norm(_gelu(self.dense(x))).float()
        return F.linear(x, self.tokens.weight[:columns].float(), self.bias[:columns].float())


def initialise(model: nn.Module) -> None:
    """Draw small embeddings, as BERT does; PyTorch's unit variance trains slowly."""
    for name in ("tokens.weight", "positions"):
        nn.init.normal_(model.get_parameter(name), std=0.02)


def infer(
    state: Mapping[str, Tensor], published: MaskGITJaxConfig, settings: Mapping[str, int]
) -> MaskGITJaxConfig:
    """Read sizes from shapes; only the vocabulary's division may have to be told.

    Raises:
        CheckpointError: another architecture, or a codebook that cannot be told from classes.
    """
    rows, width = shape_of(state, "Embed_0/word_embeddings/embedding", 2)
    told = dict(settings)
    if "codebook" in told:
        told.setdefault("classes", rows - told["codebook"] - 1)
    if rows != published.vocabulary and "classes" not in told:
        raise CheckpointError(
            f"the checkpoint has {rows} embedding rows where the published model has "
            f"{published.vocabulary}, so its codebook cannot be told from its classes: "
            "pass --set classes=N"
        )
    classes = told.get("classes", published.classes)
    canvas = shape_of(state, "Embed_0/position_embeddings/embedding", 2)[0]
    numbers = {key.split("/")[0] for key in state if key.startswith("TransformerLayer_")}
    return MaskGITJaxConfig(
        grid=math.isqrt(canvas - 1),
        codebook=rows - classes - 1,
        classes=classes,
        width=width,
        depth=len(numbers),
        heads=shape_of(state, _ATTENTION.format(i=0) + "query/kernel", 3)[1],
        hidden=shape_of(state, "TransformerLayer_0/Mlp_0/intermediate_output/kernel", 2)[1],
    )


_LAYER = "TransformerLayer_{i}/"
_ATTENTION = _LAYER + "Attention_0/self_attention/"
_QKV = ("query", "key", "value")

_NAMES = Names(  # of tensors that have been through _torch
    renamed=(
        ("Embed_0/word_embeddings/embedding", "tokens.weight"),
        ("Embed_0/position_embeddings/embedding", "positions"),
        ("Embed_0/embeddings_ln/", "norm."),
        (_ATTENTION + "qkv/", "blocks.{i}.attention.qkv."),
        (_ATTENTION + "out/", "blocks.{i}.attention.out."),
        (_LAYER + "Attention_0/attention_output_ln/", "blocks.{i}.norm1."),
        (_LAYER + "Mlp_0/intermediate_output/", "blocks.{i}.mlp.up."),
        (_LAYER + "Mlp_0/layer_output/", "blocks.{i}.mlp.down."),
        (_LAYER + "Mlp_0/layer_output_ln/", "blocks.{i}.norm2."),
        ("MlmLayer_0/mlm_dense/", "dense."),
        ("MlmLayer_0/mlm_ln/", "last_norm."),
        ("MlmLayer_0/mlm_bias/bias", "bias"),
    ),
    joined=tuple(
        (tuple(f"{_ATTENTION}{part}/{kind}" for part in _QKV), f"{_ATTENTION}qkv/{kind}")
        for kind in ("weight", "bias")
    ),
)


def _torch(path: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Return a tensor as PyTorch has it: heads in one axis with their sizes, outputs first."""
    if path.endswith("/kernel") and tensor.ndim in (2, 3):
        matrix = tensor.flatten(0, 1) if "/out/" in path and tensor.ndim == 3 else tensor.flatten(1)
        return path.replace("/kernel", "/weight"), matrix.t()
    if path.endswith("/bias"):
        return path, tensor.flatten()
    return path.replace("/scale", "/weight"), tensor


def _flax(path: str, tensor: Tensor, heads: int) -> tuple[str, Tensor]:
    """Return a tensor as flax has it; the inverse of ``_torch``."""
    if "_ln/" in path:
        return path.replace("/weight", "/scale"), tensor
    if path.endswith("/weight"):
        path, tensor = path.replace("/weight", "/kernel"), tensor.t()
    if path.split("/")[-2] in _QKV:
        tensor = tensor.reshape(*tensor.shape[:-1], heads, -1)
    if path.endswith("/out/kernel"):
        tensor = tensor.reshape(heads, -1, tensor.shape[1])
    return path, tensor


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a published tree, flat, under the names of ``MaskGITJax``."""
    return _NAMES.read(dict(_torch(*item) for item in state.items()))


def to_published(state: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Return the state dict of a ``MaskGITJax`` under its published paths, with their shapes."""
    return dict(_flax(*item, heads) for item in _NAMES.write(state).items())


FAMILY = Family(
    name="maskgit-jax",
    build=MaskGITJax,
    infer=infer,
    from_published=from_published,
    initialise=initialise,
    settings=("classes", "codebook"),
)

_256 = MaskGITJaxConfig(
    grid=16, codebook=1024, classes=1000, width=768, depth=24, heads=16, hidden=3072
)
PUBLISHED = {"maskgit-jax-256": _256, "maskgit-jax-512": replace(_256, grid=32)}
