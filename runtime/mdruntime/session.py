"""The seam between samplers and backends: one graph on one execution provider."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mdruntime.bundle import Bundle
from mdruntime.errors import ProviderError

__all__ = ["PROVIDERS", "Feeds", "FunctionSession", "Outputs", "Session", "open_session"]

Array = NDArray[Any]
Feeds = Mapping[str, Array]
Outputs = dict[str, Array]

PROVIDERS = ("cpu", "cuda")


class Session(Protocol):
    """A graph that can be run.

    K/V caches are no business of the caller: the session keeps them on its device between runs,
    for as many sequences as the last full pass had.
    """

    provider: str

    def start(self, canvas: int) -> None:
        """Say that the next passes are over canvases of this many rows, from a full pass on."""

    def run(self, feeds: Feeds, fetch: Sequence[str]) -> Outputs:
        """Run the graph once and return the outputs named in ``fetch``."""

    def clone(self) -> "Session":
        """Return a session that shares the weights but not the caches, for another thread."""

    def close(self) -> None:
        """Release the device's memory."""


class FunctionSession:
    """A function in a session's clothes: makes every sampler testable without a model."""

    provider = "function"

    def __init__(self, function: Callable[[Feeds], Mapping[str, Array]]) -> None:
        """Take the function from feeds to outputs."""
        self.function = function

    def start(self, canvas: int) -> None:
        """Do nothing: a function keeps no caches."""

    def run(self, feeds: Feeds, fetch: Sequence[str]) -> Outputs:
        """Call the function and return the outputs named in ``fetch``."""
        outputs = self.function(feeds)
        return {name: np.asarray(outputs[name]) for name in fetch}

    def clone(self) -> "FunctionSession":
        """Return a session around the same function."""
        return FunctionSession(self.function)

    def close(self) -> None:
        """Do nothing: a function holds no memory of a device."""


def open_session(
    bundle: Bundle, graph: str, provider: str, *, threads: int = 0, spelling: str = ""
) -> Session:
    """Open a graph of a bundle on the execution provider asked for, and on no other.

    Args:
        bundle: an opened bundle.
        graph: name of the graph.
        provider: one of ``PROVIDERS``.
        threads: CPU threads; 0 takes as many as the process may use.
        spelling: open the graph as it is spelled for another backend.

    Raises:
        ProviderError: the provider or its package is not available here.
    """
    if provider not in PROVIDERS:
        raise ProviderError(f"provider must be one of {', '.join(PROVIDERS)}, got {provider!r}")
    from mdruntime.ort import OrtSession

    path = bundle.path(graph, spelling)
    return OrtSession(path, bundle.manifest.graphs[graph], provider, threads=threads)
