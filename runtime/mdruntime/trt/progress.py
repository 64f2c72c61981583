"""From the phases that TensorRT's builder reports to one number that only grows."""

import threading
from dataclasses import dataclass, field

__all__ = ["Phases"]


@dataclass
class _Phase:
    parent: str
    steps: int
    done: int = 0


@dataclass
class Phases:
    """Nested phases of known lengths: a phase fills the step of its parent that is at work.

    Several threads may report at once (``IProgressMonitor`` of TensorRT's documentation).
    """

    _open: dict[str, _Phase] = field(default_factory=dict)
    _most: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, name: str, parent: str, steps: int) -> None:
        """Begin a phase; ``parent`` is empty where it stands alone."""
        with self._lock:
            self._open[name] = _Phase(parent, max(1, steps))

    def step(self, name: str, step: int) -> float:
        """Note that a step, counted from 0, is done, and return the share of everything."""
        with self._lock:
            if name in self._open:
                phase = self._open[name]
                phase.done = min(phase.steps, max(phase.done, step + 1))
            roots = [self._share(key) for key, one in self._open.items() if not self._inside(one)]
            self._most = max(self._most, *roots, 0.0)
            return self._most

    def finish(self, name: str) -> None:
        """End a phase; steps that were left out count as done."""
        with self._lock:
            self._open.pop(name, None)

    def _inside(self, phase: _Phase) -> bool:
        return phase.parent in self._open

    def _share(self, name: str) -> float:
        phase = self._open[name]
        inner = [self._share(key) for key, one in self._open.items() if one.parent == name]
        part = max(inner, default=0.0) if phase.done < phase.steps else 0.0
        return min(1.0, (phase.done + part) / phase.steps)
