"""What the catalogue says of a model, what a user gives, and what comes out of loading."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from mdruntime.manifest import DenoiserSpec, ImageSpec, PromptSpec, TextSpec, WeightsSpec
from mdruntime.sampling import Sampling
from mdruntime.study import Study
from mdzoo.family import Family, ZooDenoiser

__all__ = ["Entry", "Images", "Model", "Sources"]


@dataclass(frozen=True, slots=True)
class Images:
    """How the tokens of a model become images, and images tokens."""

    load: Callable[..., nn.Module]
    """From tensors under published names, and ``source=`` for messages, to a tokenizer."""
    random: Callable[[Any], nn.Module]
    """From the denoiser's sizes to a tokenizer with random weights."""
    inside: str = ""
    """Where in the denoiser's checkpoint it is: ``file`` among its tensors, or a folder in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A model that can be asked for by name."""

    name: str
    family: Family[Any]
    task: str
    summary: str
    config: Any  # of the published weights; a checkpoint's own sizes win over it
    files: Mapping[str, str]  # option of the command line to where that file is published
    licence: str
    presets: Mapping[str, Sampling]
    images: Images | None = None
    text: TextSpec | None = None
    shipped: str = ""  # file of this package that holds the weights
    shipped_tokenizer: str = ""  # the one that holds its tokenizer, if that is one

    @property
    def needs_tokenizer(self) -> bool:
        """Whether its tokenizer is in a file of its own."""
        return bool(self.shipped_tokenizer or "--tokenizer" in self.files)

    @property
    def parameters(self) -> int:
        """Parameters of the denoiser, of its conditioning too."""
        return sum(tensor.numel() for tensor in self._outline().parameters())

    @property
    def spec(self) -> DenoiserSpec:
        """Canvas of the published model."""
        return cast(ZooDenoiser, self._outline()).spec

    @property
    def samplers(self) -> str:
        """What of the sampling paper the model can be run with, in words."""
        known = "Halton on a line" if self.text is not None else "Halton"
        guided = ", guidance" if self.spec.unconditional and self.task != "image" else ""
        return f"moment (3), partial caching (4.1), hybrid with {known} (4.2){guided}"

    def _outline(self) -> nn.Module:
        """Return the denoiser without weights."""
        with torch.device("meta"):
            return self.family.build(self.config)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where weights come from: files, a seed, or what this package ships."""

    checkpoint: Path | None = None
    tokenizer: Path | None = None
    """Weights of the image tokenizer, or tokenizer.json of a text model."""
    random_seed: int | None = None
    settings: Mapping[str, int] = field(default_factory=dict)
    """Sizes that shapes cannot tell; which they are is the family's."""
    extra_tensors: bool = False
    """Whether a file may hold tensors without a place in the denoiser: see ``unused_tensors``."""


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model; satisfies ``mdexport.Model``."""

    name: str
    family: str
    task: str
    denoiser: ZooDenoiser
    decoder: nn.Module | None
    encoder: nn.Module | None
    image: ImageSpec | None
    text: TextSpec | None
    prompt: PromptSpec | None
    files: Mapping[str, bytes]
    weights: WeightsSpec
    presets: Mapping[str, Sampling]
    study: Study | None
