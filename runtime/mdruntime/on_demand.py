"""Sessions that may be closed between runs, where memory is short."""

from collections.abc import Callable, Sequence
from typing import Any

from mdruntime.errors import SamplingError
from mdruntime.session import Feeds, Outputs, Session

__all__ = ["OnDemand"]


class OnDemand:
    """A session that is opened when it runs, and closed at will; satisfies ``session.Session``.

    Keys and values go when it is closed. A pass that would need those of a pass before is refused.
    """

    def __init__(self, provider: str, opened: Callable[[], Session]) -> None:
        """Take the provider's name and what opens the session."""
        self.provider = provider
        self._opened = opened
        self._inner: Session | None = None
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
        """Return the session itself, opened if it was closed."""
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

    def close(self) -> None:
        """Release the memory until the next run."""
        self._sent = self.uploaded
        if self._inner is not None:
            self._inner.close()
        self._inner = None
