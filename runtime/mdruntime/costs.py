"""What passes cost on a device, between the sizes at which it was measured.

The time of a pass is taken to be a part that depends on the rows it recomputes, and one that
depends on the columns it gives logits of. Full passes at several numbers of columns show the
second part, passes over several numbers of rows the first.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mdruntime.passes import PassShape

__all__ = ["Costs", "Kind", "Surface"]


class Kind(NamedTuple):
    """What passes have in common that are interpolated between."""

    samples: int
    guided: bool  # whether each sample also runs without its condition
    logits: bool  # whether logits leave the device, as MaskGIT's exact law needs them


@dataclass(frozen=True, slots=True)
class Surface:
    """The time of passes of one kind, over rows and columns."""

    rows: tuple[int, ...]  # rising
    less_ms: tuple[float, ...]  # what passes over so many rows take less than full passes
    columns: tuple[int, ...]  # rising
    full_ms: tuple[float, ...]  # of full passes with so many columns

    def ms(self, rows: int, columns: int) -> float:
        """Return the time of a pass in milliseconds."""
        full = np.interp(columns, self.columns, self.full_ms)
        return max(0.0, float(full - np.interp(rows, self.rows, self.less_ms)))


@dataclass(frozen=True, slots=True)
class Costs:
    """What is to be known of a bundle on this device to foresee how long samples take."""

    batch: int
    surfaces: dict[Kind, Surface]
    condition_ms: float  # of a batch: computed once for all its passes
    decoder_ms: float  # of a sample
    noise: float  # by how much the slowest repeats exceed the fastest ones, as a share

    def passes_ms(self, shapes: Iterable[PassShape], *, logits: bool = False) -> float:
        """Return the time of passes in milliseconds, each of at most ``batch`` samples."""
        return sum(self._pass_ms(shape, logits) for shape in shapes)

    def _pass_ms(self, shape: PassShape, logits: bool) -> float:
        guided = shape.sequences > shape.samples
        alike = sorted(
            (kind.samples, surface.ms(shape.rows, shape.columns))
            for kind, surface in self.surfaces.items()
            if (kind.guided, kind.logits) == (guided, logits)
        )
        samples, ms = zip(*alike, strict=True)
        return float(np.interp(shape.samples, samples, ms))
