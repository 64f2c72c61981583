"""How likely is a text, byte by byte? An n-gram model with interpolated Kneser-Ney smoothing.

Source: Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling",
section 2.7 (interpolation) and equation 26 (the discount), over bytes instead of words. A gram of
up to eight bytes is a number of 64 bits, its last byte the lowest, so all grams that share a
context are neighbours in a sorted array: sums over a context are differences of running sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Level", "NGram", "learnt", "windows"]

LONGEST = 8  # bytes of a gram
LEAST, MOST = 0.1, 0.95  # bounds of a discount, for texts too small to estimate it

Grams = NDArray[np.uint64]  # (count,)
Places = NDArray[np.int64]  # (count,)


@dataclass(frozen=True, slots=True)
class Level:
    """The grams of one length."""

    grams: Grams  # sorted, each once
    sums: NDArray[np.int64]  # (count + 1,): running sums of their counts, from 0

    @property
    def discount(self) -> float:
        """What is taken from every count and given to shorter contexts."""
        counts = np.diff(self.sums)
        once, twice = (int((counts == number).sum()) for number in (1, 2))
        return min(MOST, max(LEAST, once / max(1, once + 2 * twice)))

    def mix(self, grams: Grams, shorter: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return p(last byte | the bytes before it).

        Args:
            grams: of this length, in any order.
            shorter: float64 (count,), the same probability without the first byte of the context.
        """
        ends = np.uint64(255)
        place, behind = self._places(grams, grams)
        first, after = self._places(grams & ~ends, grams | ends)
        count, total = self.sums[behind] - self.sums[place], self.sums[after] - self.sums[first]
        kinds = after - first
        kept = np.maximum(count - self.discount, 0) + self.discount * kinds * shorter
        return np.where(total > 0, kept / np.maximum(total, 1), shorter)

    def _places(self, first: Grams, last: Grams) -> tuple[Places, Places]:
        """Return where the known grams from ``first`` to ``last`` begin and end."""
        return self.grams.searchsorted(first), self.grams.searchsorted(last, side="right")


@dataclass(frozen=True, slots=True)
class NGram:
    """A model of bytes; contexts that it never met are shortened until it met them."""

    levels: tuple[Level, ...]  # grams of one byte first

    def probabilities(self, grams: Grams) -> NDArray[np.float64]:
        """Return p(last byte | the bytes before it) of grams of the greatest length."""
        probability = np.full(len(grams), 1 / 256)
        for length, level in enumerate(self.levels, 1):
            probability = level.mix(grams & _mask(length), probability)
        return probability

    def bits(self, texts: Sequence[str]) -> float:
        """Return the mean of -log2 p over the bytes of texts.

        Raises:
            ValueError: there is no byte.
        """
        # Bytes in the same context cost the same, and sorted ones are found faster.
        grams, counts = np.unique(windows(texts, len(self.levels)), return_counts=True)
        if not len(grams):
            raise ValueError("texts must hold at least a byte, got only empty ones")
        return float(-(counts * np.log2(self.probabilities(grams))).sum() / counts.sum())


def learnt(texts: Sequence[str], length: int = LONGEST) -> NGram:
    """Return the model of texts.

    Args:
        texts: at least one of them not empty.
        length: bytes of the longest grams, 1 to 8.

    Raises:
        ValueError: the length is out of range, or there is no byte.
    """
    grams, counts = np.unique(windows(texts, length), return_counts=True)
    if not len(grams):
        raise ValueError("texts must hold at least a byte, got only empty ones")
    levels = [_level(grams, counts)]
    for shorter in range(length - 1, 0, -1):
        # The count of a shorter gram is the number of bytes that were met before it.
        grams, counts = np.unique(grams & _mask(shorter), return_counts=True)
        levels.append(_level(grams, counts))
    return NGram(tuple(reversed(levels)))


def windows(texts: Sequence[str], length: int) -> Grams:
    """Return every byte of texts with the bytes before it, as numbers of ``length`` bytes.

    A text begins after a newline, as paragraphs do; what would be before that is 0.

    Raises:
        ValueError: the length is out of range.
    """
    if not 1 <= length <= LONGEST:
        raise ValueError(f"grams must have 1 to {LONGEST} bytes, got {length}")
    before = (b"\0" * (length - 2) + b"\n")[: length - 1]
    encoded = [text.encode() for text in texts]
    stream = np.frombuffer(b"".join(before + text for text in encoded), np.uint8)
    predicted = np.repeat(
        np.tile([False, True], len(encoded)),
        [size for text in encoded for size in (length - 1, len(text))],
    )
    grams = np.zeros(len(stream), np.uint64)
    for back in range(length):
        shifted = stream[: len(stream) - back].astype(np.uint64) << np.uint64(8 * back)
        grams[back:] |= shifted
    return grams[predicted]


def _level(grams: Grams, counts: NDArray[np.int64]) -> Level:
    return Level(grams, np.append(0, np.cumsum(counts)).astype(np.int64))


def _mask(length: int) -> np.uint64:
    return np.uint64(256**length - 1)
