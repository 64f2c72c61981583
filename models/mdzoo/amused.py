"""aMUSEd: images from text by a masked transformer (Patil et al. 2024, arXiv 2401.01808).

The text tower of CLIP reads the prompt; a U-ViT (``mdzoo.uvit2d``) denoises the tokens. All that
only the prompt decides is in ``condition`` and leaves the graph of a pass: more than a third of
the transformer's parameters, and the text tower.

Source: repository huggingface/diffusers (Apache 2.0), ``pipelines/amused``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mdruntime.manifest import DenoiserSpec
from mdzoo import checkpoint, clip, folder, uvit2d_config
from mdzoo.checkpoint import CheckpointError
from mdzoo.clip import ClipConfig, ClipText
from mdzoo.family import Family
from mdzoo.uvit2d import UVit2D
from mdzoo.uvit2d_config import UVitConfig

__all__ = [
    "FAMILY",
    "PUBLISHED",
    "Amused",
    "AmusedConfig",
    "load_folder",
    "read_folder",
    "spec_of",
]

PARTS = ("transformer", "text_encoder")
"""Folders of a published model that hold the denoiser; their names stand before all tensors."""

AESTHETIC = 6.0
"""The score that the published pipeline asks for."""


@dataclass(frozen=True, slots=True)
class AmusedConfig:
    """Sizes of an aMUSEd denoiser."""

    transformer: UVitConfig = field(default_factory=UVitConfig)
    text: ClipConfig = field(default_factory=ClipConfig)
    factor: int = 16  # pixels on the side of a token

    def __post_init__(self) -> None:
        """Check that the parts belong together."""
        takes = self.transformer.text, self.transformer.pooled
        gives = self.text.width, self.text.projection
        if takes != gives:
            raise CheckpointError(
                f"the transformer reads texts of widths {takes} (states, summary), "
                f"the text encoder writes {gives}; take both from one model"
            )


def spec_of(config: UVitConfig) -> DenoiserSpec:
    """Return what the runtime has to know of a transformer's canvas."""
    return DenoiserSpec(
        length=config.size**2,
        canvas=config.grid[0] * config.grid[1],
        first=0,
        grid=(config.size, config.size),
        patch=(config.patch, config.patch),
        codebook=config.codebook,
        mask_token=config.vocabulary - 1,
        classes=0,
        layers=config.depth,
        context=(),
    )


class Amused(nn.Module):
    """The denoiser: tokens and a prompt in, logits over the codebook out.

    Satisfies ``mdexport.Denoiser``; its labels are prompts, int (batch, n).
    """

    micro: Tensor

    def __init__(self, config: AmusedConfig) -> None:
        super().__init__()
        self.config = config
        self.text_encoder = ClipText(config.text)
        self.transformer = UVit2D(config.transformer)
        side = float(config.transformer.size * config.factor)
        # Width, height and two numbers of the crop of the image, and the aesthetic score.
        micro = torch.tensor([side, side, 0.0, 0.0, AESTHETIC])
        self.register_buffer("micro", micro, persistent=False)

    @property
    def spec(self) -> DenoiserSpec:
        """What the runtime has to know; it is written into the manifest unchanged."""
        return spec_of(self.config.transformer)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the published model's logits, without any cache.

        Args:
            tokens: int (batch, length), the mask token where hidden.
            labels: prompts int (batch, n), that without a prompt being an empty one.

        Returns:
            (batch, length, codebook) float32.
        """
        size = self.config.transformer.size
        logits = self.transformer(tokens.reshape(-1, size, size), *self._read(labels))
        return logits.flatten(2).transpose(1, 2)

    def condition(self, labels: Tensor) -> dict[str, Tensor]:
        """Return what only the prompts decide, see ``UVit2D.prepare``."""
        return self.transformer.prepare(*self._read(labels))

    def empty_caches(self, rows: int, canvas: int) -> dict[str, Tensor]:
        """Return zeros for K/V of every layer, and for what enters the stages."""
        return self.transformer.empty_caches(rows, canvas)

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        columns: Tensor,
        caches: Sequence[Tensor],
        extras: Mapping[str, Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Recompute some rows of the canvas against the caches; see ``mdexport.Denoiser``."""
        return self.transformer.step(tokens, positions, columns, caches, extras)

    def _read(self, prompts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states, summary = self.text_encoder(prompts)
        return states, summary, self.micro.expand(prompts.shape[0], -1)


def initialise(model: nn.Module) -> None:
    """Draw small embeddings; all other weights begin as PyTorch has them."""
    assert isinstance(model, Amused)
    clip.initialise(model.text_encoder)
    nn.init.normal_(model.transformer.embed.table.weight, std=0.02)


def infer(
    state: Mapping[str, Tensor], published: AmusedConfig, settings: Mapping[str, int]
) -> AmusedConfig:
    """Read sizes from shapes; take from the published model only what is sure to be the same.

    Args:
        state: tensors under their published names, each behind that of its part and a dot.
        published: the model that was asked for by name, or what its folder states.
        settings: ``size``, ``heads``, ``block_heads`` or ``text_heads``, which no shape tells.

    Raises:
        CheckpointError: another architecture, or sizes that must be told.
    """
    parts = _parts(state)
    absent = [part for part in PARTS if not parts[part]]
    if absent:
        raise CheckpointError(
            f"the checkpoint must hold {' and '.join(PARTS)}, found no {' and '.join(absent)}; "
            "name the folder that holds both"
        )
    text = ClipConfig.from_state(parts["text_encoder"], published.text, settings.get("text_heads"))
    told = {**settings, "pooled": text.projection}
    transformer = UVitConfig.from_state(parts["transformer"], published.transformer, told)
    return replace(published, transformer=transformer, text=text)


def _parts(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {
        part: {
            name.removeprefix(f"{part}."): tensor
            for name, tensor in state.items()
            if name.startswith(f"{part}.")
        }
        for part in PARTS
    }


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a published state dict under the names of ``Amused``; others keep theirs."""
    parts = _parts(state)
    renamed = {
        "transformer": uvit2d_config.from_published(parts["transformer"]),
        "text_encoder": clip.from_published(parts["text_encoder"]),
    }
    others = {name: state[name] for name in state if name.partition(".")[0] not in PARTS}
    return others | _whole(renamed)


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of an ``Amused`` under its published names."""
    parts = _parts(state)
    return _whole(
        {
            "transformer": uvit2d_config.to_published(parts["transformer"]),
            "text_encoder": clip.to_published(parts["text_encoder"]),
        }
    )


def _whole(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()
    }


def read_folder(path: Path) -> tuple[dict[str, Tensor], AmusedConfig]:
    """Return the weights of a folder that diffusers saved, and the sizes that it states.

    Args:
        path: the folder, also of a hub's cache.

    Returns:
        Tensors under their published names, each behind that of its part; and the sizes.

    Raises:
        CheckpointError: a part is missing or damaged, or of another architecture.
    """
    path = folder.root(path)
    config = AmusedConfig(
        transformer=UVitConfig.from_json(folder.read_json(path, "transformer/config.json")),
        text=ClipConfig.from_json(folder.read_json(path, "text_encoder/config.json")),
        factor=_factor(path),
    )
    _check_mask(path, config.transformer.vocabulary - 1)
    return _whole({part: checkpoint.read(path / part) for part in PARTS}), config


def _factor(path: Path) -> int:
    if not (path / "vqvae" / "config.json").is_file():
        return 16
    widths = folder.read_json(path, "vqvae/config.json").get("block_out_channels", (64,))
    return 2 ** (len(widths) - 1)


def _check_mask(path: Path, expected: int) -> None:
    if not (path / "scheduler" / "scheduler_config.json").is_file():
        return
    found = folder.read_json(path, "scheduler/scheduler_config.json").get("mask_token_id", expected)
    if found != expected:
        raise CheckpointError(
            f"{path} must have the last id of its vocabulary, {expected}, as its mask token, "
            f"found {found!r} in its scheduler's config; convert a model of aMUSEd"
        )


def load_folder(path: Path) -> Amused:
    """Load the denoiser of a folder that diffusers saved.

    Raises:
        CheckpointError: a part is missing, damaged, or does not fit what its config states.
    """
    state, stated = read_folder(path)
    found = infer(state, stated, {})
    if found != stated:
        raise CheckpointError(
            f"{path} must hold the weights of its configs, found {_differences(found, stated)}; "
            "download both again"
        )
    model = Amused(found)
    checkpoint.fit(model, from_published(state), source=str(path))
    return model.eval()


def _differences(found: AmusedConfig, stated: AmusedConfig) -> str:
    pairs: list[tuple[str, Any, Any]] = [
        (f"{part} {entry.name}", getattr(ours, entry.name), getattr(theirs, entry.name))
        for part, ours, theirs in (
            ("transformer", found.transformer, stated.transformer),
            ("text encoder", found.text, stated.text),
        )
        for entry in fields(ours)
    ]
    return ", ".join(f"{name} {was} instead of {want}" for name, was, want in pairs if was != want)


FAMILY = Family(
    name="amused",
    build=Amused,
    infer=infer,
    from_published=from_published,
    initialise=initialise,
    settings=("size", "heads", "block_heads", "text_heads"),
    folder=load_folder,
)

PUBLISHED = {
    "amused-256": AmusedConfig(),
    "amused-512": AmusedConfig(transformer=UVitConfig(size=32, patch=2)),
}
