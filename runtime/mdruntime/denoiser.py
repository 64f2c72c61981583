"""A denoiser at work: from the sampler's requests to feeds of the graph and back.

The graph knows *rows*, sequences with K/V caches of their own. A sample is one row, or two under
classifier-free guidance; unconditional rows stand behind all conditional ones, so that a pass
without guidance uses a prefix of the caches.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdruntime.errors import SamplingError
from mdruntime.head import Draws, draw
from mdruntime.manifest import DenoiserSpec
from mdruntime.sampler import Pass, Result
from mdruntime.session import Feeds, Session

__all__ = ["HEADS", "Denoiser"]

HEADS = ("graph", "numpy")


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
