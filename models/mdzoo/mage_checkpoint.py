"""Published files of MAGE: sizes from shapes, and names. The model itself is ``mdzoo.mage``.

Source of the format: repository LTH14/mage, ``models_mage.py`` (MIT licence). A file holds the
image tokenizer under ``vqgan.`` too.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mdzoo.checkpoint import CheckpointError, shape_of

__all__ = ["PUBLISHED", "MAGEConfig", "from_published", "infer", "to_published"]

CLASSES = 1000  # rows of the embedding table between codebook and mask token
FAKE_CLASS = 76  # the one of them that every image has: row 1100 of the published table

Names = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MAGEConfig:
    """Sizes of a MAGE denoiser.

    The one vocabulary holds codebook ids, classes and the mask token, in this order.
    """

    grid: int  # tokens on a side of the square image
    codebook: int
    classes: int
    width: int
    depth: int
    heads: int
    hidden: int  # width of the MLP between its two maps
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    decoder_hidden: int

    def __post_init__(self) -> None:
        """Check what no tensor shape can tell."""
        for name, heads, width in (
            ("heads", self.heads, self.width),
            ("decoder_heads", self.decoder_heads, self.decoder_width),
        ):
            if heads < 1 or width % heads:
                raise CheckpointError(
                    f"{name} must divide the width {width}, got {heads}; "
                    f"the checkpoint cannot tell it: pass --set {name}=N"
                )
        if self.codebook < 1 or self.classes <= FAKE_CLASS:
            raise CheckpointError(
                f"the vocabulary must hold a codebook, more than {FAKE_CLASS} classes and a mask "
                f"token, got {self.codebook} codes and {self.classes} classes: "
                "pass --set codebook=N"
            )

    @property
    def length(self) -> int:
        """Number of image tokens."""
        return self.grid**2

    @property
    def mask(self) -> int:
        """Id of the mask token, the last row of the embedding table."""
        return self.codebook + self.classes

    @property
    def fake(self) -> int:
        """Id that the first row of the canvas always has."""
        return self.codebook + FAKE_CLASS


def _published(width: int, depth: int, heads: int) -> MAGEConfig:
    return MAGEConfig(
        grid=16,
        codebook=1024,
        classes=CLASSES,
        width=width,
        depth=depth,
        heads=heads,
        hidden=4 * width,
        decoder_width=width,
        decoder_depth=8,
        decoder_heads=16,
        decoder_hidden=4 * width,
    )


PUBLISHED = {"mage-base": _published(768, 12, 12), "mage-large": _published(1024, 24, 16)}


def infer(
    state: Mapping[str, Tensor], published: MAGEConfig, settings: Mapping[str, int]
) -> MAGEConfig:
    """Read sizes from shapes, and numbers of heads off the published models of the same width.

    Args:
        state: tensors under their published names.
        published: the model that was asked for by name.
        settings: ``heads``, ``decoder_heads`` or ``codebook``, which no shape tells.

    Raises:
        CheckpointError: another architecture, or sizes that must be told.
    """
    vocabulary, width = shape_of(state, "token_emb.word_embeddings.weight", 2)
    inner = shape_of(state, "decoder_embed.weight", 2)[0]
    codebook = settings["codebook"] if "codebook" in settings else _codebook(state, vocabulary)
    known = [*PUBLISHED.values(), published]
    heads = {config.width: config.heads for config in known}
    decoder_heads = {config.decoder_width: config.decoder_heads for config in known}
    return MAGEConfig(
        grid=_grid(state),
        codebook=codebook,
        classes=vocabulary - codebook - 1,
        width=width,
        depth=_depth(state, "blocks"),
        heads=_heads("heads", width, heads, settings),
        hidden=shape_of(state, "blocks.0.mlp.fc1.weight", 2)[0],
        decoder_width=inner,
        decoder_depth=_depth(state, "decoder_blocks"),
        decoder_heads=_heads("decoder_heads", inner, decoder_heads, settings),
        decoder_hidden=shape_of(state, "decoder_blocks.0.mlp.fc1.weight", 2)[0],
    )


def _codebook(state: Mapping[str, Tensor], vocabulary: int) -> int:
    table = "vqgan.quantize.embedding.weight"  # most files hold the image tokenizer too
    return shape_of(state, table, 2)[0] if table in state else vocabulary - CLASSES - 1


def _grid(state: Mapping[str, Tensor]) -> int:
    canvas = shape_of(state, "token_emb.position_embeddings.weight", 2)[0]
    grid = math.isqrt(canvas - 1)
    if grid < 1 or grid**2 != canvas - 1:
        raise CheckpointError(
            "the position embeddings must cover one class token and a square image, "
            f"got {canvas} positions; is the checkpoint of another architecture?"
        )
    return grid


def _depth(state: Mapping[str, Tensor], stack: str) -> int:
    found = [re.match(rf"{stack}\.(\d+)\.", key) for key in state]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _heads(name: str, width: int, known: Mapping[int, int], settings: Mapping[str, int]) -> int:
    if name not in settings and width not in known:
        raise CheckpointError(
            f"the checkpoint has width {width} where the published models have "
            f"{' and '.join(map(str, known))}, so its number of {name} is unknown: "
            f"pass --set {name}=N"
        )
    return settings[name] if name in settings else known[width]


# Published name, our name: what names begin with, and what follows the number of a block.
_BEGINNINGS = (
    ("token_emb.word_embeddings.", "tokens."),
    ("token_emb.position_embeddings.weight", "positions"),
    ("token_emb.LayerNorm.", "stem."),
    ("blocks.", "encoder."),
    ("norm.", "encoder_norm."),
    ("decoder_embed.", "bridge."),
    ("decoder_pos_embed_learned", "decoder_positions"),
    ("decoder_blocks.", "decoder."),
    ("mlm_layer.fc.", "head.0."),
    ("mlm_layer.ln.", "head.2."),
    ("mlm_layer.bias", "bias"),
)
_PARTS = (
    (".attn.qkv.", ".attention.qkv."),
    (".attn.proj.", ".attention.out."),
    (".mlp.fc1.", ".mlp.up."),
    (".mlp.fc2.", ".mlp.down."),
)

# In the file, but no part of generation: the image tokenizer, which is read by its own loader,
# the fixed positions, and what was left of the masked autoencoder of pixels.
_UNUSED = re.compile(
    r"vqgan\..*|cls_token|pos_embed|mask_token|decoder_pos_embed|token_emb\.position_ids"
    r"|(patch_embed\.proj|decoder_pred)\.(weight|bias)"
)


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a published state dict under the names of ``MAGE``."""
    renamed = {
        _rename(key, _BEGINNINGS, _PARTS): tensor
        for key, tensor in state.items()
        if not _UNUSED.fullmatch(key)
    }
    if "decoder_positions" in renamed:
        renamed["decoder_positions"] = renamed["decoder_positions"].squeeze(0)
    if "bias" in renamed:
        renamed["bias"] = renamed["bias"].flatten()
    return renamed


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a ``MAGE`` under its published names."""
    beginnings, parts = (
        [(ours, theirs) for theirs, ours in names] for names in (_BEGINNINGS, _PARTS)
    )
    renamed = {_rename(key, beginnings, parts): tensor for key, tensor in state.items()}
    renamed["decoder_pos_embed_learned"] = renamed["decoder_pos_embed_learned"][None]
    renamed["mlm_layer.bias"] = renamed["mlm_layer.bias"][None, None]
    return renamed


def _rename(key: str, beginnings: Names, parts: Names) -> str:
    for before, after in beginnings:
        if key.startswith(before):
            key = after + key.removeprefix(before)
            break
    for before, after in parts:
        key = key.replace(before, after)
    return key
