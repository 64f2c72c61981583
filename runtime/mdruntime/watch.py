"""A backend that knows how long each of its graphs ran."""

import time
from collections.abc import Callable, Sequence

from mdruntime.session import Backend, Feeds, Outputs, Session, Wrapper

__all__ = ["WatchedBackend"]


class WatchedBackend:
    """A backend whose sessions add up their time; satisfies ``session.Backend``."""

    def __init__(self, backend: Backend, clock: Callable[[], float] = time.perf_counter) -> None:
        """Take a backend, which is closed with this one, and a clock that tells seconds."""
        self._backend, self._clock = backend, clock
        self.provider = backend.provider
        self.ms: dict[str, float] = {}
        """Milliseconds by graph, feeds and results included; to be cleared at will."""

    def session(self, graph: str) -> Session:
        """Return the session of a graph."""
        return _Watched(self._backend.session(graph), graph, self.ms, self._clock)

    def release(self, graph: str) -> None:
        """Pass it on."""
        self._backend.release(graph)

    @property
    def notes(self) -> list[str]:
        """Those of the backend."""
        return self._backend.notes

    def clone(self) -> "WatchedBackend":
        """Return a backend for another thread, with times of its own."""
        return WatchedBackend(self._backend.clone(), self._clock)

    def close(self) -> None:
        """Close the backend."""
        self._backend.close()


class _Watched(Wrapper):
    """A session whose time is added up."""

    def __init__(
        self, session: Session, graph: str, ms: dict[str, float], clock: Callable[[], float]
    ) -> None:
        super().__init__(session)
        self._graph, self._ms, self._clock = graph, ms, clock

    def run(self, feeds: Feeds, fetch: Sequence[str]) -> Outputs:
        began = self._clock()
        outputs = super().run(feeds, fetch)
        spent = 1000 * (self._clock() - began)
        self._ms[self._graph] = self._ms.get(self._graph, 0.0) + spent
        return outputs

    def clone(self) -> "_Watched":
        return _Watched(self.inner.clone(), self._graph, {}, self._clock)
