"""A denoiser at work: from the sampler's requests to feeds of the graph and back.

The graph knows *rows*, sequences with caches of their own. A sample is one row, or two under
classifier-free guidance; unconditional rows stand behind all conditional ones, so that a pass
without guidance uses a prefix of the caches.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdruntime.conditions import Conditions
from mdruntime.errors import SamplingError
from mdruntime.first import FirstPass
from mdruntime.head import Draws, draw
from mdruntime.layout import layout_of
from mdruntime.manifest import DenoiserSpec, GraphSpec
from mdruntime.sampler import Pass, Positions, Result, padded
from mdruntime.session import Feeds, Session

__all__ = ["CONDITION", "HEADS", "VISIBLE", "Condition", "Denoiser", "conditioner"]

Condition = Callable[[NDArray[np.int32]], Mapping[str, NDArray[Any]]]
"""From conditions (n, ...) to what the denoiser needs of them, (n, ...) each, by name."""

HEADS = ("graph", "numpy")
CONDITION = "condition."
"""Before the names of the condition graph's outputs, where they are the denoiser's inputs."""
VISIBLE = "visible"
"""Input of denoisers that must know which of a pass's rows hold no hidden token."""


class Denoiser:
    """The conditions of a batch and a session: satisfies ``sampler.Denoise``."""

    def __init__(
        self,
        session: Session,
        spec: DenoiserSpec,
        conditions: Conditions,
        *,
        head: str = "graph",
        condition: Condition | None = None,
        first: FirstPass | None = None,
    ) -> None:
        """Bind a batch to a session.

        Args:
            session: of the denoiser graph.
            spec: its canvas.
            conditions: of the batch.
            head: draw tokens in the ``graph``, or in ``numpy`` from the logits it returns.
            condition: the condition graph, where the bundle has one: see ``conditioner``.
            first: runs the first pass, where answers of such are kept.
        """
        if head not in HEADS:
            raise SamplingError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
        self._session = session
        self._spec = spec
        self._conditions = conditions
        self._head = head
        self._guided = False
        self._first = first  # None once it has run
        self._extras = {} if condition is None else _extras(condition, conditions)

    def __call__(self, request: Pass) -> Result:
        """Run one pass."""
        if request.positions is None:
            self._begin(request)
            rows = np.tile(np.arange(self._layout.canvas), (len(request.samples), 1))
        else:
            self._canvas[request.samples[:, None], request.positions] = request.tokens
            rows = self._rows(request.positions)
        return self._run(request, rows)

    def _begin(self, request: Pass) -> None:
        batch, length = len(self._conditions.labels), request.tokens.shape[1]
        self._layout = layout_of(self._spec, length)
        self._canvas = np.zeros((batch, length), np.int32)
        self._canvas[request.samples] = request.tokens
        self._guided = bool(np.any(self._weights(request) != 0))
        self._session.start(self._layout.canvas)

    def _weights(self, request: Pass) -> NDArray[np.float32]:
        # Without a condition both rows would be the same, and guidance the identity.
        guidable = self._conditions.guidable[request.samples] & self._spec.unconditional
        return np.where(guidable, request.controls.guidance, np.float32(0))

    def _rows(self, positions: Positions) -> Positions:
        """Return the canvas rows (active, m) to recompute for these tokens."""
        rows = self._layout.rows(positions)
        if self._spec.slots > 1:
            rows = padded([np.unique(row) for row in rows])
        if self._spec.refresh_context:
            context = [row.position for row in self._spec.context]
            rows = np.concatenate([np.tile(context, (len(rows), 1)), rows], axis=1)
        return rows

    def _ids(self, samples: Positions) -> NDArray[np.int32]:
        """Return the ids of all canvas rows, (graph rows, canvas, slots)."""
        given, labels = self._conditions.given, self._conditions.labels[samples]
        tokens = self._canvas[samples]
        ids = self._layout.ids(tokens, labels)
        if not self._guided:
            return ids
        if given is not None:
            tokens = np.where(given[samples], np.int32(self._spec.mask_token), tokens)
        return np.concatenate([ids, self._layout.ids(tokens, np.full_like(labels, -1))])

    def _feeds(self, request: Pass, rows: Positions, wanted: Positions) -> dict[str, NDArray[Any]]:
        """Return the feeds of a pass over ``rows`` with logits of the rows ``wanted``."""
        active = len(request.samples)
        conditional = np.arange(active, dtype=np.int32)
        columns = _columns(rows, wanted, self._layout.canvas)
        ids, rows = self._ids(request.samples), self._doubled(rows)
        tokens = np.take_along_axis(ids, rows[..., None], axis=1)
        feeds = {
            "tokens": tokens.reshape(len(tokens), -1),
            "positions": rows.astype(np.int32),
            "columns": self._doubled(columns).astype(np.int32),
            "conditional": conditional,
            "unconditional": conditional + np.int32(active if self._guided else 0),
            "guidance": self._weights(request),
            "temperature": request.controls.temperature,
            "beta": request.controls.beta,
            "token_beta": request.controls.token_beta,
        }
        if self._spec.visible:
            feeds[VISIBLE] = _visible(tokens[..., 0], self._spec.mask_token)
        return {**feeds, **self._conditioned(request.samples)}

    def _conditioned(self, samples: Positions) -> dict[str, NDArray[Any]]:
        batch = len(self._conditions.labels)
        rows = np.concatenate([samples, samples + batch]) if self._guided else samples
        return {name: values[rows] for name, values in self._extras.items()}

    def _doubled(self, rows: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([rows, rows]) if self._guided else rows

    def _run(self, request: Pass, rows: Positions) -> Result:
        slots = self._spec.slots
        wanted = self._layout.rows(request.wanted)
        if slots > 1:
            distinct = padded([np.unique(row) for row in wanted])
            column = _columns(distinct, wanted, self._layout.canvas)
            index = column * slots + self._layout.slots(request.wanted)
        else:
            distinct, index = wanted, np.tile(np.arange(wanted.shape[1]), (len(wanted), 1))
        distinct = _two(distinct)
        uniforms = np.zeros((len(rows), distinct.shape[1] * slots), np.float32)
        np.put_along_axis(uniforms, index, request.uniforms, axis=1)
        feeds = {**self._feeds(request, rows, distinct), "uniforms": uniforms}
        return self._answer(request, feeds, index)

    def _everywhere(self, request: Pass) -> NDArray[np.int32]:
        """Return the rows (graph rows, K) of a full pass that hold a hidden token."""
        hidden = self._canvas[request.samples] == self._spec.mask_token
        tokens = padded([np.flatnonzero(row) for row in hidden])
        rows = padded([np.unique(row) for row in self._layout.rows(tokens)])
        return self._doubled(_two(rows)).astype(np.int32)

    def _answer(self, request: Pass, feeds: Feeds, index: Positions) -> Result:
        """Run the graph, and pick from its outputs what was wanted."""

        def pick(values: NDArray[Any]) -> NDArray[Any]:
            return np.take_along_axis(values, index, axis=1)

        numpy = self._head == "numpy"
        fetch = [] if numpy else list(Draws._fields)
        if numpy or request.logits:
            fetch.append("logits")
        first, self._first = self._first, None
        if first is None:
            outputs = self._session.run(feeds, fetch)
        else:
            outputs = first.run(feeds, fetch, self._everywhere(request), self._spec.codebook)
        logits = outputs.get("logits")
        if logits is not None:
            logits = np.take_along_axis(logits, index[..., None], axis=1)
        if numpy:
            assert logits is not None
            return Result(draw(logits, request.controls, request.uniforms), logits)
        return Result(Draws(*(pick(outputs[name]) for name in Draws._fields)), logits)


def _two(rows: Positions) -> Positions:
    """Return rows (active, k) with a single one of them, k = 1, repeated.

    Products with a single row are rounded in another way on some CPUs. A sample would depend on
    how many run together, and on where else logits were wanted.
    """
    return np.repeat(rows, 2, axis=1) if rows.shape[1] == 1 else rows


def _columns(rows: Positions, wanted: Positions, canvas: int) -> Positions:
    """Return where in ``rows`` (active, m) each of ``wanted`` (active, k) stands."""
    where = np.zeros((len(rows), canvas), np.int64)
    np.put_along_axis(where, rows, np.arange(rows.shape[1])[None], axis=1)
    return np.take_along_axis(where, wanted, axis=1)


def _visible(ids: NDArray[np.int32], mask_token: int) -> NDArray[np.int32]:
    """Return the columns (rows, v) of ids that are not hidden; there is one in every row."""
    return padded([np.flatnonzero(row != mask_token) for row in ids]).astype(np.int32)


def conditioner(session: Session, graph: GraphSpec) -> Condition:
    """Return a condition graph as a function from its input to its outputs by name."""
    fetch = [tensor.name for tensor in graph.outputs]
    return lambda inputs: session.run({graph.inputs[0].name: inputs}, fetch)


def _extras(condition: Condition, conditions: Conditions) -> dict[str, NDArray[Any]]:
    """Compute what stays the same over a trajectory, once for every distinct condition."""
    distinct, index = np.unique(conditions.inputs(), axis=0, return_inverse=True)
    outputs = condition(distinct)
    return {CONDITION + name: values[index.ravel()] for name, values in outputs.items()}
