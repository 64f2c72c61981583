"""A backend that knows how long each of its graphs ran, and what was copied to and from them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mdruntime.session import Backend, Feeds, Outputs, Session, Wrapper

__all__ = ["Spent", "WatchedBackend"]


@dataclass(slots=True)
class Spent:
    """What the runs of a graph came to."""

    ms: float = 0.0  # feeds and results included
    runs: int = 0
    sent: int = 0  # bytes to the graph that were copied; all of the feeds where it counts none
    fetched: int = 0  # bytes of what it returned
    tensors: dict[str, int] = field(default_factory=dict)  # bytes of feeds and results, by name


class WatchedBackend:
    """A backend whose sessions add up their time and bytes; satisfies ``session.Backend``."""

    def __init__(self, backend: Backend, clock: Callable[[], float] = time.perf_counter) -> None:
        """Take a backend, which is closed with this one, and a clock that tells seconds."""
        self._backend, self._clock = backend, clock
        self.provider = backend.provider
        self.spent: dict[str, Spent] = {}
        """By graph; to be cleared at will."""

    def session(self, graph: str) -> Session:
        """Return the session of a graph."""
        return _Watched(self._backend.session(graph), graph, self.spent, self._clock)

    def release(self, graph: str) -> None:
        """Pass it on."""
        self._backend.release(graph)

    @property
    def notes(self) -> list[str]:
        """Those of the backend."""
        return self._backend.notes

    def clone(self) -> "WatchedBackend":
        """Return a backend for another thread, with sums of its own."""
        return WatchedBackend(self._backend.clone(), self._clock)

    def close(self) -> None:
        """Close the backend."""
        self._backend.close()


class _Watched(Wrapper):
    """A session whose runs are added up."""

    def __init__(
        self, session: Session, graph: str, spent: dict[str, Spent], clock: Callable[[], float]
    ) -> None:
        super().__init__(session)
        self._graph, self._spent, self._clock = graph, spent, clock

    def run(self, feeds: Feeds, fetch: Sequence[str]) -> Outputs:
        before, began = getattr(self.inner, "uploaded", 0), self._clock()
        outputs = super().run(feeds, fetch)
        spent = self._spent.setdefault(self._graph, Spent())
        spent.ms += 1000 * (self._clock() - began)
        spent.runs += 1
        for name, array in (*feeds.items(), *outputs.items()):
            spent.tensors[name] = spent.tensors.get(name, 0) + array.nbytes
        handed = sum(array.nbytes for array in feeds.values())
        # Sessions of devices leave out what lies there already.
        spent.sent += getattr(self.inner, "uploaded", before + handed) - before
        spent.fetched += sum(array.nbytes for array in outputs.values())
        return outputs

    def clone(self) -> "_Watched":
        return _Watched(self.inner.clone(), self._graph, {}, self._clock)
