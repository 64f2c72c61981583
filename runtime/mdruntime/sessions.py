"""A backend of independent sessions, which may be closed between runs where memory is short."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mdruntime.errors import BundleError, SamplingError
from mdruntime.session import CLOSED, ON_DEMAND, Feeds, Outputs, Session

__all__ = ["OnDemand", "Sessions"]

_IN_TURNS = ("denoiser", *ON_DEMAND)  # graphs of which one at a time is needed


class Sessions:
    """A backend whose sessions have nothing in common."""

    def __init__(
        self, provider: str, opened: Callable[[str], Session], *, reduce_memory: bool = False
    ) -> None:
        """Take the provider's name and what opens the session of a graph."""
        self.provider = provider
        self._opened = opened
        self._reduce_memory = reduce_memory
        self._sessions: dict[str, Session] = {}

    def session(self, graph: str) -> Session:
        """Return the session of a graph."""
        if graph not in self._sessions:
            self._sessions[graph] = self._new(graph)
        return self._sessions[graph]

    def _new(self, graph: str) -> Session:
        if not (self._reduce_memory and graph in _IN_TURNS):
            return self._opened(graph)
        session = OnDemand(self.provider, partial(self._opened, graph))
        session.open()  # what is wrong with it is found out now
        return session

    def release(self, graph: str) -> None:
        """Close the session of a graph until it runs again, where memory is short."""
        session = self._sessions.get(graph)
        if isinstance(session, OnDemand):
            session.release()

    @property
    def notes(self) -> list[str]:
        """What the sessions say of themselves, those that say anything."""
        return [note for one in self._sessions.values() for note in getattr(one, "notes", ())]

    def clone(self) -> "Sessions":
        """Return a backend with clones of the sessions."""
        twin = Sessions(self.provider, self._opened, reduce_memory=self._reduce_memory)
        twin._sessions = {graph: session.clone() for graph, session in self._sessions.items()}
        return twin

    def close(self) -> None:
        """Close all sessions."""
        for session in self._sessions.values():
            session.close()


class OnDemand:
    """A session that is opened when it runs, and released at will; satisfies ``session.Session``.

    Keys and values go when it is. A pass that would need those of a pass before is refused.
    """

    def __init__(self, provider: str, opened: Callable[[], Session]) -> None:
        """Take the provider's name and what opens the session."""
        self.provider = provider
        self._opened = opened
        self._inner: Session | None = None
        self._closed = False  # for good
        self._canvas = 0  # rows of the canvases; 0: of a graph without caches
        self._filled = False  # whether the caches hold what a pass has computed
        self._sent = 0  # bytes of inputs, before the inner session was opened

    @property
    def uploaded(self) -> int:
        """Bytes of inputs that went to the device, over all runs."""
        return self._sent + int(getattr(self._inner, "uploaded", 0))

    @property
    def notes(self) -> list[str]:
        """What the session says of itself while it is open."""
        return list(getattr(self._inner, "notes", ()))

    def open(self) -> Session:
        """Return the session itself, opened if it was released."""
        if self._closed:
            raise BundleError(CLOSED)
        if self._inner is None:
            self._inner, self._filled = self._opened(), False
            if self._canvas:
                self._inner.start(self._canvas)
        return self._inner

    def start(self, canvas: int) -> None:
        """Say that the next passes are over canvases of this many rows, from a full pass on."""
        self._canvas, self._filled = canvas, False
        self.open().start(canvas)  # opened here, lest it counts as time of the pass

    def run(self, feeds: Feeds, fetch: Sequence[str]) -> Outputs:
        """Run the graph once and return the outputs named in ``fetch``."""
        session = self.open()
        if self._canvas and feeds["positions"].shape[1] == self._canvas:
            self._filled = True
        elif self._canvas and not self._filled:
            raise SamplingError(
                "keys and values of this generation were given up when its memory was; finish a "
                "generation before you decode others with reduce_memory, or run them on a clone()"
            )
        return session.run(feeds, fetch)

    def views(self, sequences: int) -> list[Any] | None:
        """Return the caches of so many sequences, to be read and written."""
        found = self.open().views(sequences)
        self._filled = True
        return found

    def clone(self) -> "OnDemand":
        """Return a session that shares the weights but not the caches, for another thread."""
        twin = OnDemand(self.provider, self._opened)
        twin._inner = None if self._inner is None else self._inner.clone()
        return twin

    def release(self) -> None:
        """Release the memory until the next run."""
        self._sent = self.uploaded
        if self._inner is not None:
            self._inner.close()
        self._inner = None

    def close(self) -> None:
        """Release the memory for good."""
        self.release()
        self._closed = True
