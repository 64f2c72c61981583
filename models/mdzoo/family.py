"""What a family of denoisers has to offer, so that the catalogue can load any of its models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from mdruntime.manifest import DenoiserSpec

__all__ = ["Config", "Family", "State", "ZooDenoiser"]

State = Mapping[str, Tensor]
"""Tensors by name."""

Config = TypeVar("Config")


class ZooDenoiser(Protocol):
    """A denoiser of this package: satisfies ``mdexport.Denoiser``, and says its sizes."""

    config: Any

    @property
    def spec(self) -> DenoiserSpec:
        """The canvas; it is written into the manifest unchanged."""

    def __call__(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the published model's logits, without any cache."""

    def condition(self, labels: Tensor) -> dict[str, Tensor]:
        """Return by name what stays the same over a trajectory."""

    def empty_caches(self, rows: int, canvas: int) -> dict[str, Tensor]:
        """Return the caches of ``rows`` sequences by name, all zero."""

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        columns: Tensor,
        caches: Any,
        extras: Mapping[str, Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Recompute some rows of the canvas against the caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family(Generic[Config]):
    """Models of one architecture, and how their published files become modules."""

    name: str
    build: Callable[[Config], nn.Module]
    """From sizes to a denoiser with PyTorch's initial weights."""
    infer: Callable[[State, Config, Mapping[str, int]], Config]
    """Sizes of a state dict under its published names: from its shapes; what they cannot tell
    comes from the settings, or from the published model of the name that was asked for."""
    from_published: Callable[[State], dict[str, Tensor]]
    """From published names to ours; what the family does not use is left out."""
    initialise: Callable[[nn.Module], None]
    """Draw random weights that a trained model could have begun with."""
    settings: tuple[str, ...] = ()
    """What --set may name: the sizes that tensor shapes cannot tell."""
    prefixes: tuple[str, ...] = ()
    """What may stand before all published names, such as "backbone."; taken off repeatedly."""
    folder: Callable[[Path], nn.Module] | None = None
    """Loader of a published folder of several parts, where a family has no single file."""
