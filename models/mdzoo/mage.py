"""MAGE (Li et al. 2023, arXiv 2211.09117): a masked autoencoder over image tokens.

The encoder sees a constant first row and all tokens, hidden ones included; but what it makes of a
hidden token is thrown away: the decoder gets the encoder's output of the first row there. An
output head over the embedding table follows. Images have no class: the first row holds the same
"fake" class always. Source of the architecture: repository LTH14/mage, ``models_mage.py``, with
its sampler ``gen_img_uncond.py``, which drops no token from the encoder (MIT licence).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdruntime.manifest import ContextRow, DenoiserSpec
from mdzoo.family import Family
from mdzoo.layers import FeedForward, LayerNorm, refresh, take_rows
from mdzoo.mage_checkpoint import PUBLISHED, MAGEConfig, from_published, infer, to_published
from mdzoo.transformer import Attention, Block, Stack

__all__ = ["FAMILY", "MAGE", "PUBLISHED", "MAGEConfig", "from_published", "infer", "to_published"]

EPSILON = 1e-6  # of all norms but the head's, which has PyTorch's default of 1e-5
VISIBLE = "visible"


def _stack(depth: int, width: int, heads: int, hidden: int) -> Stack:
    return Stack(
        Block(
            Attention(width, heads),
            FeedForward(width, hidden),
            LayerNorm(width, eps=EPSILON),
            LayerNorm(width, eps=EPSILON),
        )
        for _ in range(depth)
    )


class MAGE(nn.Module):
    """The denoiser: token ids in, logits over the codebook out.

    Satisfies ``mdexport.Denoiser``.
    """

    def __init__(self, config: MAGEConfig) -> None:
        super().__init__()
        self.config = config
        width, inner = config.width, config.decoder_width
        self.tokens = nn.Embedding(config.mask + 1, width)
        self.positions = nn.Parameter(torch.zeros(config.length + 1, width))
        self.stem = LayerNorm(width, eps=EPSILON)
        self.encoder = _stack(config.depth, width, config.heads, config.hidden)
        self.encoder_norm = LayerNorm(width, eps=EPSILON)
        self.bridge = nn.Linear(width, inner)
        self.decoder_positions = nn.Parameter(torch.zeros(config.length + 1, inner))
        self.decoder = _stack(
            config.decoder_depth, inner, config.decoder_heads, config.decoder_hidden
        )
        self.decoder_norm = LayerNorm(inner, eps=EPSILON)
        self.head = nn.Sequential(nn.Linear(inner, width), nn.GELU(), LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(config.mask + 1))

    @property
    def spec(self) -> DenoiserSpec:
        """What the runtime has to know; it is written into the manifest unchanged.

        The first row changes with any token, and the decoder's input at every hidden row with it:
        hence every pass recomputes it.
        """
        config = self.config
        return DenoiserSpec(
            length=config.length,
            canvas=config.length + 1,
            first=1,
            grid=(config.grid, config.grid),
            patch=(1, 1),
            codebook=config.codebook,
            mask_token=config.mask,
            classes=0,
            layers=config.depth + config.decoder_depth,
            context=(ContextRow(position=0, offset=-1, dropped=config.fake),),
            visible=True,
            refresh_context=True,
        )

    def encode(self, tokens: Tensor) -> Tensor:
        """Return the encoder's output (batch, 1 + length, width) of int (batch, length)."""
        ids = F.pad(tokens, (1, 0), value=self.config.fake)
        x = self.stem(self.tokens(ids) + self.positions)
        return self.encoder_norm(self.encoder(x))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the published model's logits of codebook ids, without any cache.

        Args:
            tokens: int (batch, length), the mask token where hidden.
            labels: int (batch,), whatever they are: images have no class here.

        Returns:
            (batch, length, codebook) float32.
        """
        y = self.bridge(self.encode(tokens))
        hidden = F.pad(tokens == self.config.mask, (1, 0))
        y = torch.where(hidden[..., None], y[:, :1], y) + self.decoder_positions
        return self._logits(self.decoder(y)[:, 1:])

    def condition(self, labels: Tensor) -> dict[str, Tensor]:
        """Return nothing: there is no condition."""
        return {}

    def empty_caches(self, rows: int, canvas: int) -> dict[str, Tensor]:
        """Return zeros for keys and values of every layer of both stacks."""
        return self.encoder.empty_caches(rows, canvas, "encoder.") | self.decoder.empty_caches(
            rows, canvas, "decoder."
        )

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        columns: Tensor,
        caches: Sequence[Tensor],
        extras: Mapping[str, Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Recompute some rows of the canvas against the K/V caches; see ``mdexport.Denoiser``.

        The first row must be one of them. Unlike the original, the last encoder layer stops after
        the keys and values of hidden rows, whose output is thrown away, and the last decoder layer
        after those of rows whose logits are not wanted: the result is the same.
        """
        split = 2 * self.config.depth
        visible = extras[VISIBLE]
        x = self.stem(self.tokens(tokens) + F.embedding(positions, self.positions))
        x, encoded = self.encoder.step(x, positions, caches[:split], columns=visible)
        y = self.bridge(self.encoder_norm(x))
        places = positions.gather(1, visible.long())
        y = self._fill(y, places, positions, tokens == self.config.mask)
        y, decoded = self.decoder.step(y, positions, caches[split:], columns=columns)
        return self._logits(y), encoded + decoded

    def _fill(self, y: Tensor, places: Tensor, positions: Tensor, hidden: Tensor) -> Tensor:
        """Return the decoder's input (rows, m, decoder width).

        Args:
            y: (rows, v, decoder width), of the visible rows.
            places: int (rows, v), their positions on the canvas.
            positions: int (rows, m), of all rows of this pass.
            hidden: bool (rows, m), those which get what the first row of the canvas has.
        """
        canvas = y.new_zeros(y.shape[0], 1, self.config.length + 1, y.shape[-1])
        canvas = refresh(canvas, places, y[:, None])[:, 0]
        y = torch.where(hidden[..., None], canvas[:, :1], take_rows(canvas, positions))
        return y + F.embedding(positions, self.decoder_positions)

    def _logits(self, y: Tensor) -> Tensor:
        table = self.tokens.weight[: self.config.codebook].float()
        bias = self.bias[: self.config.codebook].float()
        return F.linear(self.head(self.decoder_norm(y)).float(), table, bias)


def initialise(model: nn.Module) -> None:
    """Draw small embeddings, as the authors do."""
    for name in ("tokens.weight", "positions", "decoder_positions"):
        nn.init.normal_(model.get_parameter(name), std=0.02)


FAMILY = Family(
    name="mage",
    build=MAGE,
    infer=infer,
    from_published=from_published,
    initialise=initialise,
    settings=("heads", "decoder_heads", "codebook"),
    prefixes=("model.",),
)
