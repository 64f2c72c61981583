"""What the samples of a batch are conditioned on: classes, prompts, tokens that are given."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mdruntime.errors import SamplingError
from mdruntime.manifest import DenoiserSpec

__all__ = ["Conditions", "labels_of", "text_of", "tokens_of", "whole"]

_LARGEST = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Conditions:
    """The conditions of a batch, row by row; what a model does not have is left out.

    Under classifier-free guidance each sample also runs without its condition: without the label,
    with the negative prompt, or with the given tokens hidden.
    """

    labels: NDArray[np.int64]  # (batch,), the class of each sample, -1 for none
    prompts: NDArray[np.int32] | None = None  # (batch, tokens), for the condition graph
    negative: NDArray[np.int32] | None = None  # (batch, tokens), in the place of no prompt
    given: NDArray[np.bool_] | None = None  # (batch, length), tokens that guidance is about

    @classmethod
    def of(cls, labels: Sequence[int]) -> "Conditions":
        """Return the conditions of samples that have a class at most (-1: none)."""
        return cls(np.asarray(labels, np.int64))

    def take(self, samples: NDArray[np.int64]) -> "Conditions":
        """Return the conditions of some samples of the batch."""

        def some(part: NDArray[Any] | None) -> NDArray[Any] | None:
            return None if part is None else part[samples]

        return Conditions(
            self.labels[samples], some(self.prompts), some(self.negative), some(self.given)
        )

    @property
    def guidable(self) -> NDArray[np.bool_]:
        """Whether a sample has a condition that guidance could strengthen, (batch,)."""
        found = self.labels >= 0
        if self.prompts is not None:
            found = found | True
        if self.given is not None:
            found = found | self.given.any(axis=1)
        return found

    def inputs(self) -> NDArray[np.int32]:
        """Return inputs of the condition graph: all conditional rows, then all unconditional."""
        if self.prompts is None or self.negative is None:
            bare = np.full_like(self.labels, -1)
            return np.concatenate([self.labels, bare]).astype(np.int32)
        return np.concatenate([self.prompts, self.negative])


def whole(name: str, value: Any, low: int = 0) -> int:
    """Return a whole number of 64 bits, ``low`` or larger; refuse all else under its name."""
    try:
        number = operator.index(value)
    except TypeError:
        raise SamplingError(f"{name} must be a whole number, got {value!r}") from None
    if not low <= number <= _LARGEST:
        raise SamplingError(f"{name} must be between {low} and 2**64 - 1, got {number}")
    return number


def text_of(name: str, value: Any) -> str:
    """Return a user's text; refuse all else, and half characters, under its name."""
    if not isinstance(value, str):
        raise SamplingError(f"{name} must be text, got {str(value)[:40]!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise SamplingError(
            f"{name} must be valid Unicode, got {value[:40]!r}; pass it as UTF-8"
        ) from None
    return value


def labels_of(spec: DenoiserSpec, labels: Sequence[int] | None, count: int) -> list[int]:
    """Return the class of each sample, -1 for none, once it is known to be one of the model's."""
    if labels is None:
        if spec.classes and not spec.unconditional:
            raise SamplingError(
                f"this model draws nothing without a class; pass labels from 0 to "
                f"{spec.classes - 1}"
            )
        return [-1] * whole("count", count, 1)
    given = np.asarray(labels)
    if spec.classes == 0:
        raise SamplingError("this model has no classes; leave labels out")
    if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer):
        raise SamplingError(f"labels must be a list of whole numbers, not empty, got {labels!r}")
    for label in given.tolist():
        if not 0 <= label < spec.classes:
            raise SamplingError(f"labels must be between 0 and {spec.classes - 1}, got {label}")
    return given.tolist()


def tokens_of(spec: DenoiserSpec, tokens: ArrayLike) -> NDArray[np.int32]:
    """Return a user's canvases as (batch, length), once they are known to be canvases."""
    given = np.asarray(tokens)
    if given.ndim == 3 and given.shape[1:] == spec.grid:
        given = given.reshape(len(given), -1)
    if given.ndim != 2 or not _fits(spec, given.shape[1]) or len(given) == 0:
        most = "at most " if spec.flexible else ""
        raise SamplingError(
            f"tokens must have shape (batch, {most}{spec.length}) or (batch, "
            f"{', '.join(map(str, spec.grid))}), got {np.shape(given)}"
        )
    if not np.issubdtype(given.dtype, np.integer) or not _known(spec, given).all():
        raise SamplingError(
            f"tokens must be integers from 0 to {spec.codebook - 1}, or the mask token "
            f"{spec.mask_token} where hidden"
        )
    return given.astype(np.int32)


def _fits(spec: DenoiserSpec, length: int) -> bool:
    return 0 < length <= spec.length if spec.flexible else length == spec.length


def _known(spec: DenoiserSpec, tokens: NDArray[Any]) -> NDArray[np.bool_]:
    return (tokens >= 0) & (tokens < spec.codebook) | (tokens == spec.mask_token)
