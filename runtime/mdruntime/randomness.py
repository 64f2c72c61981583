"""Counter-based random numbers: a sample's result depends on its seed and index only.

Every number is addressed by (seed, sample index, purpose, round, position) and computed by
Philox 4x64-10 (Salmon et al. 2011), never drawn from a running state. So neither the size of the
batch nor the order of the samples nor the backend can change a result.

The bits come from ``numpy.random.Philox``, whose stream NumPy guarantees; the conversion to
floating point is spelled out here, because NumPy does not guarantee that of ``Generator``.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

__all__ = ["Purpose", "Randomness"]


class Purpose(IntEnum):
    """What a random number decides; each purpose has a stream of its own."""

    TOKEN = 0  # the inverse CDF of a position's token
    POSITION = 1  # the Gumbel noise of a position's score
    PERMUTATION = 2  # orders that are drawn before the first pass
    REDRAW = 3  # the second token of MaskGIT's exact choose-then-sample form
    SCHEDULE = 4  # the round in which an ancestral sampler reveals a token
    EDIT = 5  # the tokens that a variation of an image hides


class Randomness:
    """The random numbers of a batch of samples."""

    def __init__(self, seed: int, indices: Sequence[int]) -> None:
        """Address the samples ``indices`` (batch,) of ``seed``; both are 64-bit unsigned."""
        self.seed = seed
        self.indices = tuple(indices)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.indices)

    def take(self, samples: Sequence[int]) -> "Randomness":
        """Return the randomness of some samples of the batch."""
        return Randomness(self.seed, [self.indices[sample] for sample in samples])

    def bits(self, purpose: Purpose, turn: int, count: int) -> NDArray[np.uint64]:
        """Return uint64 (batch, count): the bits of ``purpose`` in round or pass ``turn``."""
        counter = np.array([0, purpose, turn, 0], np.uint64)
        return np.stack(
            [
                np.random.Philox(
                    counter=counter, key=np.array([self.seed, index], np.uint64)
                ).random_raw(count)
                for index in self.indices
            ]
        )

    def uniforms(self, purpose: Purpose, turn: int, count: int) -> NDArray[np.float32]:
        """Return float32 (batch, count) in [0, 1), all multiples of 2**-24."""
        bits = self.bits(purpose, turn, count) >> np.uint64(40)
        return bits.astype(np.float32) * np.float32(2.0**-24)

    def gumbels(self, turn: int, count: int) -> NDArray[np.float64]:
        """Return float64 (batch, count) from the Gumbel(0, 1) distribution.

        In float64, because the largest Gumbel that a coarse grid of uniforms can give is small
        (7.6 in float16), and cutting the tail off lowers the temperature without a word.
        """
        bits = self.bits(Purpose.POSITION, turn, count) >> np.uint64(12)
        uniforms = (bits.astype(np.float64) + 0.5) * 2.0**-52  # exact, hence below 1
        return -np.log(-np.log(uniforms))
