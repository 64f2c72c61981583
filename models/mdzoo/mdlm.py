"""MDLM (Sahoo et al. 2024, arXiv 2406.07524) and SDTT (Deschenaux and Gulcehre 2024), its students.

A bidirectional pre-LN transformer with rotary positions over the tokens of a text. The published
one (``mdzoo.dit``) is modulated by the noise level, which these models are trained and sampled
with at zero; the modulation, constant then, is folded into the norms and the maps beside it.
Sources: repository kuleshov-group/mdlm (Apache-2.0 licence) and, for the students' sizes,
jdeschena/sdtt.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdruntime.manifest import DenoiserSpec
from mdzoo.checkpoint import CheckpointError, shape_of
from mdzoo.dit import CONDITIONING, DIT, FREQUENCIES, MDLMConfig, positions_of
from mdzoo.family import Family
from mdzoo.layers import FeedForward, LayerNorm, rotary
from mdzoo.transformer import Attention, Block, Stack, StackDenoiser

__all__ = [
    "FAMILY",
    "MDLM",
    "PUBLISHED",
    "MDLMConfig",
    "from_published",
    "infer",
    "initialise",
    "to_published",
]

PUBLISHED = {
    "mdlm-owt": MDLMConfig(1024, 50257, width=768, depth=12, heads=12, hidden=3072),
    "sdtt-small": MDLMConfig(1024, 50257, width=768, depth=12, heads=12, hidden=3072),
    "sdtt-medium": MDLMConfig(1024, 50257, width=1024, depth=24, heads=16, hidden=4096),
    "sdtt-large": MDLMConfig(1024, 50257, width=1536, depth=24, heads=16, hidden=6144),
}


def _block(config: MDLMConfig) -> Block:
    width = config.width
    gelu = partial(F.gelu, approximate="tanh")
    return Block(
        Attention(width, config.heads, bias=False, out_bias=False),
        FeedForward(width, config.hidden, activation=gelu),
        LayerNorm(width),
        LayerNorm(width),
    )


class MDLM(StackDenoiser):
    """The denoiser: token ids in, logits over the codebook out; satisfies ``mdexport.Denoiser``.

    The published model at noise level zero, with nothing left that depends on it.
    """

    def __init__(self, config: MDLMConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.codebook + 1, config.width)
        self.blocks = Stack(_block(config) for _ in range(config.depth))
        self.norm = LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.codebook + 1)

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
            mask_token=config.codebook,
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
            (batch, length, codebook + 1) float32; the last column is the mask token's.
        """
        rotation = rotary(positions_of(tokens), self.config.head_size)
        x = self.blocks(self.tokens(tokens), rotation)
        return self._logits(x, self.config.codebook + 1)

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        columns: Tensor,
        caches: Sequence[Tensor],
        extras: Mapping[str, Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Recompute some rows of the canvas against the K/V caches; see ``mdexport.Denoiser``."""
        rotation = rotary(positions, self.config.head_size)
        x = self.tokens(tokens)
        x, refreshed = self.blocks.step(x, positions, caches, rotation, columns=columns)
        return self._logits(x, self.config.codebook), refreshed

    def _logits(self, x: Tensor, columns: int) -> Tensor:
        weight, bias = self.head.weight[:columns].float(), self.head.bias[:columns].float()
        return F.linear(self.norm(x).float(), weight, bias)


def initialise(model: nn.Module) -> None:
    """Draw small embeddings; PyTorch's unit variance trains slowly."""
    nn.init.normal_(model.get_parameter("tokens.weight"), std=0.02)


def infer(
    state: Mapping[str, Tensor], published: MDLMConfig, settings: Mapping[str, int]
) -> MDLMConfig:
    """Read sizes from shapes; heads are those of the published model of the same width.

    Args:
        state: tensors under their published names.
        published: the model that was asked for by name; its length holds unless told otherwise.
        settings: ``heads`` or ``length``, which no shape tells.

    Raises:
        CheckpointError: another architecture, or sizes that must be told.
    """
    width = shape_of(state, "vocab_embed.embedding", 2)[1]
    known = {config.width: config.heads for config in (*PUBLISHED.values(), published)}
    if width not in known and "heads" not in settings:
        raise CheckpointError(
            f"the checkpoint has width {width} where the published model has {published.width}, "
            "so its number of attention heads is unknown: pass --set heads=N"
        )
    heads = settings.get("heads", known.get(width, 1))
    return _sizes(state, heads=heads, length=settings.get("length", published.length))


def _sizes(state: Mapping[str, Tensor], *, heads: int, length: int) -> MDLMConfig:
    vocabulary, width = shape_of(state, "vocab_embed.embedding", 2)
    found = (re.match(r"blocks\.(\d+)\.", key) for key in state)
    return MDLMConfig(
        length=length,
        codebook=vocabulary - 1,
        width=width,
        depth=len({number[1] for number in found if number}),
        heads=heads,
        hidden=shape_of(state, "blocks.0.mlp.0.weight", 2)[0],
    )


# Part of a published name, the same of ours.
_NAMES = (
    ("vocab_embed.embedding", "tokens.weight"),
    (".attn_qkv.", ".attention.qkv."),
    (".attn_out.", ".attention.out."),
    (".mlp.0.", ".mlp.up."),
    (".mlp.2.", ".mlp.down."),
    ("output_layer.norm_final.", "norm."),
    ("output_layer.linear.", "head."),
)


def _rename(key: str, names: Iterable[tuple[str, str]]) -> str:
    for before, after in names:
        key = key.replace(before, after)
    return key


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a published state dict under the names of ``MDLM``, its modulation folded in.

    It folds in float64, so that every weight is rounded once.

    Raises:
        CheckpointError: a tensor that takes part is missing or of another shape.
    """
    depth = _checked(state).depth
    rest = dict(state)
    c = _condition(rest)
    for index in range(depth):
        prefix = f"blocks.{index}."
        shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(rest, prefix, c, 6)
        _fold_norm(rest, f"{prefix}norm1", shift1, scale1)
        _fold_norm(rest, f"{prefix}norm2", shift2, scale2)
        _fold_gate(rest, f"{prefix}attn_out.weight", gate1)
        _fold_gate(rest, f"{prefix}mlp.2.weight", gate2)
        _fold_gate(rest, f"{prefix}mlp.2.bias", gate2)
    _fold_norm(rest, "output_layer.norm_final", *_modulation(rest, "output_layer.", c, 2))
    return {_rename(key, _NAMES): tensor for key, tensor in rest.items()}


def _checked(state: Mapping[str, Tensor]) -> MDLMConfig:
    """Return the sizes of a state dict that has all tensors of the published model."""
    config = _sizes(state, heads=1, length=1)
    conditioning, frequencies = shape_of(state, "sigma_map.mlp.0.weight", 2)
    with torch.device("meta"):
        expected = DIT(config, conditioning, frequencies).state_dict()
    for name, tensor in expected.items():
        shape, wanted = shape_of(state, name, tensor.ndim), tuple(tensor.shape)
        if shape != wanted:
            raise CheckpointError(
                f"{name!r} must be of shape {wanted} beside the other tensors, got {shape}; "
                "is the checkpoint of another architecture?"
            )
    return config


def _condition(rest: dict[str, Tensor]) -> Tensor:
    """Take ``sigma_map`` out; return what it makes of noise level zero, float64."""
    names = [f"sigma_map.mlp.{index}.{part}" for index in (0, 2) for part in ("weight", "bias")]
    weight1, bias1, weight2, bias2 = (rest.pop(name).double() for name in names)
    count = weight1.shape[1]
    zero = (torch.arange(count, device=weight1.device) < count // 2).double()  # cosines, then sines
    return F.silu(F.linear(F.silu(F.linear(zero, weight1, bias1)), weight2, bias2))


def _modulation(rest: dict[str, Tensor], prefix: str, c: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Take the map to a modulation out; return the modulation, float64 (width,) each."""
    weight, bias = (rest.pop(f"{prefix}adaLN_modulation.{part}") for part in ("weight", "bias"))
    return F.linear(c, weight.double(), bias.double()).chunk(parts)


def _fold_norm(rest: dict[str, Tensor], name: str, shift: Tensor, scale: Tensor) -> None:
    rest[f"{name}.weight"] = (rest[f"{name}.weight"] * (1 + scale)).float()
    rest[f"{name}.bias"] = shift.float()


def _fold_gate(rest: dict[str, Tensor], name: str, gate: Tensor) -> None:
    weight = rest[name]
    rest[name] = (gate[:, None] * weight if weight.ndim == 2 else gate * weight).float()


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a published state dict that folds to that of an ``MDLM``.

    Of the many it is one whose modulation does not depend on the noise level.
    """
    backwards = [(ours, theirs) for theirs, ours in _NAMES]
    published = {_rename(key, backwards): tensor for key, tensor in state.items()}
    for name in [key for key in published if key.endswith(".norm1.bias")]:
        prefix = name.removesuffix("norm1.bias")
        shift1, shift2 = published.pop(name), published.pop(f"{prefix}norm2.bias")
        none, one = torch.zeros_like(shift1), torch.ones_like(shift1)
        published |= _constant(prefix, [shift1, none, one, shift2, none, one])
    shift = published.pop("output_layer.norm_final.bias")
    published |= _constant("output_layer.", [shift, torch.zeros_like(shift)])
    for index, inputs in ((0, FREQUENCIES), (2, CONDITIONING)):
        published[f"sigma_map.mlp.{index}.weight"] = torch.zeros(CONDITIONING, inputs)
        published[f"sigma_map.mlp.{index}.bias"] = torch.zeros(CONDITIONING)
    return published


def _constant(prefix: str, modulation: Sequence[Tensor]) -> dict[str, Tensor]:
    bias = torch.cat(list(modulation))
    weight = torch.zeros(len(bias), CONDITIONING)
    return {f"{prefix}adaLN_modulation.weight": weight, f"{prefix}adaLN_modulation.bias": bias}


FAMILY = Family(
    name="mdlm",
    build=MDLM,
    infer=infer,
    from_published=from_published,
    initialise=initialise,
    settings=("heads", "length"),
    prefixes=("backbone.",),
)
