"""Fakes shared by the tests of the sampler: model-free denoisers that always see everything."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from mdruntime.head import draw
from mdruntime.randomness import Purpose, Randomness
from mdruntime.sampler import Denoise, Pass, Result, Tokens


@dataclass(frozen=True, slots=True)
class Lookup:
    """A denoiser that looks its logits up by the state of the whole canvas.

    The canvas, read as digits in base codebook + 1, is a number; modulo the table's length it
    names a row. With a row per canvas that is any denoiser, with fewer a chaotic one. All of
    the canvas is looked at in partial passes too, so nothing is ever stale.
    """

    table: NDArray[np.float32]  # (states, length, codebook)
    canvas: Tokens  # (batch, length), as last seen

    def __call__(self, request: Pass) -> Result:
        if request.positions is None:
            self.canvas[request.samples] = request.tokens
        else:
            self.canvas[request.samples[:, None], request.positions] = request.tokens
        states, length, codebook = self.table.shape
        digits = np.array([(codebook + 1) ** place % states for place in range(length)])
        logits = self.table[self.canvas[request.samples].astype(np.int64) @ digits % states]
        logits = np.take_along_axis(logits, request.wanted[..., None], axis=1)
        return Result(draw(logits, request.controls, request.uniforms), logits)


class Bulk(Randomness):
    """Random numbers of another stream for a whole batch at once: for laws, which need many."""

    def take(self, samples: Sequence[int]) -> "Bulk":
        return Bulk(self.seed, [self.indices[sample] for sample in samples])

    def bits(self, purpose: Purpose, turn: int, count: int) -> NDArray[np.uint64]:
        counter = np.array([0, purpose, turn, 0], np.uint64)
        stream = np.random.Philox(counter=counter, key=np.array([self.seed, 1 << 63], np.uint64))
        wide: NDArray[np.uint64] = stream.random_raw((max(self.indices) + 1) * count)
        return wide.reshape(-1, count)[np.array(self.indices)]


@pytest.fixture(scope="session")
def lookup() -> Callable[[NDArray[np.float32], int], Denoise]:
    """Return a function from a table (states, length, codebook) and a batch size to a fake."""

    def build(table: NDArray[np.float32], batch: int) -> Denoise:
        return Lookup(table, np.zeros((batch, table.shape[1]), np.int32))

    return build


@pytest.fixture(scope="session")
def bulk() -> Callable[[int, int], Randomness]:
    """Return a function from a seed and a batch size to random numbers."""
    return lambda seed, batch: Bulk(seed, range(batch))


@pytest.fixture
def toy(lookup: Callable[[NDArray[np.float32], int], Denoise]) -> Callable[[int], Denoise]:
    """Return a function from a batch size to a chaotic denoiser of 4 x 4 tokens out of 8."""
    table = np.random.default_rng(0).normal(0, 2, (97, 16, 8)).astype(np.float32)
    return lambda batch: lookup(table, batch)
