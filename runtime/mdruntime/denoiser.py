"""A denoiser at work: from the sampler's requests to feeds of the graph and back.

The graph knows *rows*, sequences with K/V caches of their own. A sample is one row, or two under
classifier-free guidance; unconditional rows stand behind all conditional ones, so that a pass
without guidance uses a prefix of the caches.
"""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mdruntime.errors import SamplingError
from mdruntime.head import Draws, draw
from mdruntime.manifest import DenoiserSpec
from mdruntime.sampler import Pass, Result
from mdruntime.session import Feeds, Session

__all__ = ["HEADS", "Denoiser", "labels_of", "tokens_of", "whole"]

HEADS = ("graph", "numpy")
_LARGEST = 2**64 - 1


class Denoiser:
    """The labels of a batch and a session: satisfies ``sampler.Denoise``."""

    def __init__(
        self, session: Session, spec: DenoiserSpec, labels: Sequence[int], *, head: str = "graph"
    ) -> None:
        """Bind a batch to a session.

        Args:
            session: of the denoiser graph.
            spec: its canvas.
            labels: (batch,), -1 for samples without a class.
            head: draw tokens in the ``graph``, or in ``numpy`` from the logits it returns.
        """
        if head not in HEADS:
            raise SamplingError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
        self._session = session
        self._spec = spec
        self._labels = np.asarray(labels, np.int64)
        self._head = head
        self._guided = False

    def __call__(self, request: Pass) -> Result:
        """Run one pass."""
        if request.positions is not None:
            return self._run(request, *self._some_rows(request, request.positions))
        self._guided = bool(np.any(self._weights(request) != 0))
        result = self._run(request, *self._whole_canvas(request))
        return _columns(result, slice(self._spec.first, self._spec.first + self._spec.length))

    def _weights(self, request: Pass) -> NDArray[np.float32]:
        # Without a label both rows would be the same, and guidance the identity.
        labelled = self._labels[request.samples] >= 0
        return np.where(labelled, request.controls.guidance, np.float32(0))

    def _whole_canvas(self, request: Pass) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        spec, active = self._spec, len(request.samples)
        columns = slice(spec.first, spec.first + spec.length)
        tokens = np.zeros((self._rows(active), spec.canvas), np.int32)
        tokens[:, columns] = self._doubled(request.tokens)
        labels = self._labels[request.samples]
        for row in spec.context:
            tokens[:, row.position] = row.dropped
            tokens[:active, row.position] = np.where(labels < 0, row.dropped, row.offset + labels)
        positions = np.broadcast_to(np.arange(spec.canvas, dtype=np.int32), tokens.shape)
        uniforms = np.zeros((active, spec.canvas), np.float32)
        uniforms[:, columns] = request.uniforms
        return tokens, positions, uniforms

    def _some_rows(
        self, request: Pass, positions: NDArray[np.int64]
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        rows = (positions + self._spec.first).astype(np.int32)
        return self._doubled(request.tokens), self._doubled(rows), request.uniforms

    def _rows(self, active: int) -> int:
        return 2 * active if self._guided else active

    def _doubled(self, rows: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([rows, rows]) if self._guided else rows

    def _feeds(
        self, request: Pass, tokens: NDArray[Any], positions: NDArray[Any], uniforms: NDArray[Any]
    ) -> Feeds:
        active = len(request.samples)
        conditional = np.arange(active, dtype=np.int32)
        return {
            "tokens": tokens,
            "positions": positions,
            "conditional": conditional,
            "unconditional": conditional + np.int32(active if self._guided else 0),
            "guidance": self._weights(request),
            "temperature": request.controls.temperature,
            "beta": request.controls.beta,
            "token_beta": request.controls.token_beta,
            "uniforms": uniforms,
        }

    def _run(
        self, request: Pass, tokens: NDArray[Any], positions: NDArray[Any], uniforms: NDArray[Any]
    ) -> Result:
        feeds = self._feeds(request, tokens, positions, uniforms)
        if self._head == "numpy":
            logits = self._session.run(feeds, ["logits"])["logits"]
            return Result(draw(logits, request.controls, uniforms), logits)
        fetch = [*Draws._fields, *(["logits"] if request.logits else [])]
        outputs = self._session.run(feeds, fetch)
        draws = Draws(*(outputs[name] for name in Draws._fields))
        return Result(draws, outputs.get("logits"))


def _columns(result: Result, columns: slice) -> Result:
    def cut(values: NDArray[Any]) -> NDArray[Any]:
        return values[:, columns]

    logits = None if result.logits is None else cut(result.logits)
    return Result(Draws(*map(cut, result.draws)), logits)


def whole(name: str, value: Any, low: int = 0) -> int:
    """Return a whole number of 64 bits, ``low`` or larger; refuse all else under its name."""
    try:
        number = operator.index(value)
    except TypeError:
        raise SamplingError(f"{name} must be a whole number, got {value!r}") from None
    if not low <= number <= _LARGEST:
        raise SamplingError(f"{name} must be between {low} and 2**64 - 1, got {number}")
    return number


def labels_of(spec: DenoiserSpec, labels: Sequence[int] | None, count: int) -> list[int]:
    """Return the class of each sample, -1 for none, once it is known to be one of the model's."""
    if labels is None:
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
    if given.ndim != 2 or given.shape[1] != spec.length or len(given) == 0:
        raise SamplingError(
            f"tokens must have shape (batch, {spec.length}) or (batch, "
            f"{', '.join(map(str, spec.grid))}), got {np.shape(given)}"
        )
    if not np.issubdtype(given.dtype, np.integer) or not _known(spec, given).all():
        raise SamplingError(
            f"tokens must be integers from 0 to {spec.codebook - 1}, or the mask token "
            f"{spec.mask_token} where hidden"
        )
    return given.astype(np.int32)


def _known(spec: DenoiserSpec, tokens: NDArray[Any]) -> NDArray[np.bool_]:
    return (tokens >= 0) & (tokens < spec.codebook) | (tokens == spec.mask_token)
