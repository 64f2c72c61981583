"""Passes of one shape, and when they become CUDA graphs.

TensorRT's documentation (working with CUDA graphs) asks for two things. A context must have run
once with the shapes before it is captured, or work that belongs to the change of shapes is
captured too. And who changes a context makes the graphs captured from it undefined: so each graph
has a context of its own, which is never touched again.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mdruntime.cuda import Cuda, Graph, Stream
from mdruntime.errors import ProviderError
from mdruntime.trt.buffers import Place
from mdruntime.trt.engine import Context
from mdruntime.trt.fitting import Fit

__all__ = ["Kept", "Passes"]

_EAGER_RUNS = 2  # of a shape before it is captured: most shapes of a text never come again
_MOST_GRAPHS = 32
_MOST_KEPT = 64
_FAILURES = (ProviderError, MemoryError)  # the first of CUDA and of TensorRT


@dataclass(slots=True)
class Kept:
    """A pass: profile, shapes, addresses, and its graph where it has one."""

    fit: Fit
    inputs: dict[str, Place]
    steady: dict[str, Place]
    outputs: dict[str, Place]
    upload: int  # bytes
    download: int
    addresses: Mapping[str, int]
    runs: int = 0
    context: Context | None = None  # that the graph was captured from
    graph: Graph | None = None

    def drop(self) -> None:
        """Give the graph back."""
        graph, self.graph, self.context = self.graph, None, None
        if graph is not None:
            graph.close()


class Passes:
    """All passes that are kept, by shapes; those unused for longest go first."""

    def __init__(self, cuda: Cuda, create: Callable[[], Context]) -> None:
        """Take CUDA, and what creates a context."""
        self.notes: list[str] = []
        self._cuda, self._create = cuda, create
        self._kept: OrderedDict[Any, Kept] = OrderedDict()
        self._eager: Context | None = None
        self._on = True

    @property
    def eager(self) -> Context:
        """The context of all runs that are no graphs."""
        if self._eager is None:
            self._eager = self._create()
        return self._eager

    @property
    def graphs(self) -> int:
        """How many CUDA graphs there are."""
        return sum(kept.graph is not None for kept in self._kept.values())

    def find(self, key: Any) -> Kept | None:
        """Return the pass of a key, which counts as used now."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def add(self, key: Any, kept: Kept) -> None:
        """Keep a pass, and drop another where there are too many."""
        while len(self._kept) >= _MOST_KEPT:
            self._kept.popitem(last=False)[1].drop()
        self._kept[key] = kept

    def clear(self) -> None:
        """Drop all passes: their addresses are no more."""
        for kept in self._kept.values():
            kept.drop()
        self._kept.clear()

    def close(self) -> None:
        """Drop all passes and contexts."""
        self.clear()
        self._eager = None

    def launch(self, kept: Kept, stream: Stream) -> None:
        """Put a pass on a stream; inputs lie on the device by then, or earlier on the stream."""
        kept.runs += 1
        if kept.graph is not None:
            kept.graph.launch(stream)
        elif self._on and kept.runs > _EAGER_RUNS and self.graphs < _MOST_GRAPHS:
            self._capture(kept, stream)
        else:
            _run(self.eager, kept, stream)

    def _capture(self, kept: Kept, stream: Stream) -> None:
        """Run a pass in a new context, and capture what that context does next."""
        try:
            context = self._create()
        except _FAILURES as error:
            self._give_up(error)
            _run(self.eager, kept, stream)
            return
        _run(context, kept, stream)
        stream.synchronize()  # what changing shapes takes is over before the recording begins
        try:
            with self._cuda.capture(stream) as captured:
                context.enqueue(stream)
        except _FAILURES as error:
            self._give_up(error)
            return
        kept.context, kept.graph = context, captured.graph

    def _give_up(self, error: Exception) -> None:
        self._on = False
        self.notes.append(f"no CUDA graphs from now on, which makes passes slower: {error}")


def _run(context: Context, kept: Kept, stream: Stream) -> None:
    context.reshape(kept.fit, stream)
    context.bind(kept.addresses)
    context.enqueue(stream)
