"""What the exporter wants to know of a model besides its denoiser."""

from collections.abc import Mapping
from typing import Protocol

from torch import nn

from mdexport.denoiser import Denoiser
from mdruntime.manifest import ImageSpec, PromptSpec, TextSpec, WeightsSpec
from mdruntime.sampling import Sampling
from mdruntime.study import Study

__all__ = ["Model"]


class Model(Protocol):
    """What is exported."""

    @property
    def name(self) -> str:
        """As the catalogue has it."""

    @property
    def family(self) -> str:
        """Models of one architecture."""

    @property
    def task(self) -> str:
        """From what to what."""

    @property
    def denoiser(self) -> Denoiser:
        """A module in float32."""

    @property
    def decoder(self) -> nn.Module | None:
        """From int32 tokens (batch, length) to uint8 images (batch, height, width, 3)."""

    @property
    def encoder(self) -> nn.Module | None:
        """From uint8 images to int32 tokens, for editing."""

    @property
    def image(self) -> ImageSpec | None:
        """Size of the images, of an image model."""

    @property
    def text(self) -> TextSpec | None:
        """How text becomes tokens, of a text model."""

    @property
    def prompt(self) -> PromptSpec | None:
        """How prompts become inputs of the denoiser's ``condition``."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """Files that belong into the bundle as they are, such as a tokenizer, by path."""

    @property
    def weights(self) -> WeightsSpec:
        """Where the weights come from."""

    @property
    def presets(self) -> Mapping[str, Sampling]:
        """Sets of sampler options; one is named ``default``."""

    @property
    def study(self) -> Study | None:
        """Quality of these weights under different samplers, where it was measured."""
