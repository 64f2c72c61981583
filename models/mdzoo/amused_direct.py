"""aMUSEd's transformer on its own, to be compared with recordings of the original's."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from mdruntime.manifest import DenoiserSpec
from mdzoo import checkpoint, folder
from mdzoo.amused import AmusedConfig, spec_of
from mdzoo.uvit2d import UVit2D
from mdzoo.uvit2d_config import MICRO, UVitConfig, from_published

__all__ = ["DirectAmused", "load_direct"]

_TOLD = ("size", "heads", "block_heads")


class DirectAmused(nn.Module):
    """Tokens and what a text encoder made of prompts in, logits over the codebook out."""

    def __init__(self, transformer: UVit2D) -> None:
        super().__init__()
        self.transformer = transformer

    @property
    def spec(self) -> DenoiserSpec:
        """Its canvas."""
        return spec_of(self.transformer.config)

    @property
    def widths(self) -> dict[str, int]:
        """Numbers on the last axis of each input of ``direct``."""
        config = self.transformer.config
        return {
            "encoder_hidden_states": config.text,
            "pooled_text_emb": config.pooled,
            "micro_conds": MICRO,
        }

    def direct(self, tokens: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return logits float32 (batch, length, codebook).

        Args:
            tokens: int (batch, length).
            inputs: ``encoder_hidden_states``, ``pooled_text_emb`` and ``micro_conds``, as in
                diffusers.
        """
        size = self.transformer.config.size
        logits = self.transformer(tokens.reshape(-1, size, size), **inputs)
        return logits.flatten(2).transpose(1, 2)


def load_direct(path: Path, published: AmusedConfig, settings: Mapping[str, int]) -> DirectAmused:
    """Load the transformer of a published folder, its own folder, or its file.

    Args:
        path: what was given.
        published: sizes that no shape tells, where there is no config beside the weights.
        settings: the same, as a user says them; they win over the config.

    Raises:
        CheckpointError: the weights are missing, damaged or of another architecture.
    """
    path = folder.root(path)
    path = path / "transformer" if (path / "transformer").is_dir() else path
    state = checkpoint.read(path, strip=("transformer.",))
    place = path if path.is_dir() else path.parent
    if (place / "config.json").is_file():
        told = {name: settings[name] for name in _TOLD if name in settings}
        config = replace(UVitConfig.from_json(folder.read_json(place, "config.json")), **told)
    else:
        config = UVitConfig.from_state(state, published.transformer, settings)
    model = UVit2D(config)
    checkpoint.fit(model, from_published(state), source=str(path.name))
    return DirectAmused(model.eval())
