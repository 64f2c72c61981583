"""What a pass computes, counted from the sizes of the transformer."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mdruntime.passes import PassShape

__all__ = ["Arithmetic", "arithmetic_of"]


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Sizes of a transformer whose rows are tokens."""

    width: int
    layers: int
    hidden: int  # of the perceptrons
    codebook: int

    def flops(self, shape: PassShape) -> float:
        """Return the operations of a pass's matrix products, two for each multiplication.

        The last layer computes keys and values of all rows, and the rest where logits are wanted.
        """
        keys_and_values = 4 * self.width**2
        rest = 4 * self.width**2 + 4 * self.width * self.hidden + 4 * self.width * shape.canvas
        inner = (self.layers - 1) * shape.rows * (keys_and_values + rest)
        last = shape.rows * keys_and_values + shape.columns * rest
        head = 2 * shape.columns * self.width * self.codebook
        return float(shape.sequences * (inner + last + head))

    def total(self, shapes: Iterable[PassShape]) -> float:
        """Return the operations of all passes of a sampler."""
        return sum(map(self.flops, shapes))


def arithmetic_of(config: Any) -> Arithmetic:
    """Return the sizes in a configuration of the MaskGIT or the MDLM family."""
    return Arithmetic(config.width, config.depth, config.hidden, config.codebook)
