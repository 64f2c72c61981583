"""What a build tells while it goes on, and how long it may still take."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdruntime.trt.launch import Launch

__all__ = ["Progress", "Steps"]

_ENOUGH = 0.05  # share of a build from which on its speed says something


@dataclass(frozen=True, slots=True)
class Progress:
    """A step that begins, goes on, or is done."""

    step: int
    steps: int
    name: str
    detail: str = ""
    seconds: float = 0.0  # since it began
    share: float = 0.0  # that is done, as the builder counts it
    left_s: float | None = None  # seconds it may still take; None: nothing is known
    done: bool = False


@dataclass
class Steps:
    """A numbered series of tasks, each in a process of its own."""

    launch: Launch
    log: Path
    clock: Callable[[], float]
    steps: int = 1  # expected
    step: int = 0
    began: float = 0.0  # of the step
    first: float = -1.0  # when the first step began

    def begin(self, name: str, detail: str = "") -> Progress:
        """Begin the next step, in the log too."""
        self.note(f"{name} begins")
        self.step += 1
        self.steps = max(self.steps, self.step)
        self.began = self.clock()
        self.first = self.began if self.first < 0 else self.first
        return Progress(self.step, self.steps, name, detail)

    def end(self, name: str, detail: str) -> Progress:
        """Say that the step is done, in the log too."""
        self.note(f"{name}: {detail}")
        return Progress(self.step, self.steps, name, detail, self._seconds(), 1.0, 0.0, True)

    def run(
        self, name: str, task: str, data: Any, expected_s: float = 0.0
    ) -> Generator[Progress, None, Any]:
        """Run a task and return its result, yielding how far it is.

        Args:
            name: of the step.
            task: see ``child``.
            data: arguments of the task.
            expected_s: what it took the last time; 0 if it is not known.
        """
        events = self.launch({"task": task, "data": data}, self.log)
        share, phase = 0.0, ""
        try:
            for event in events:
                if event.get("event") == "done":
                    return event["result"]
                share, phase = event.get("share", share), event.get("phase", phase)
                seconds = self._seconds()
                left = _left(seconds, share, expected_s)
                yield Progress(self.step, self.steps, name, phase, seconds, share, left)
        finally:
            events.close()
        raise AssertionError("a task ended without a result")

    def note(self, line: str) -> None:
        """Write a line of our own into the log."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"[mdruntime] {line}\n")

    def total(self) -> float:
        """Return the seconds since the first step began."""
        return self.clock() - self.first

    def _seconds(self) -> float:
        return self.clock() - self.began


def _left(seconds: float, share: float, expected_s: float) -> float | None:
    """Estimate the seconds that are left; the last build knows better than the phases."""
    if expected_s > seconds:
        return expected_s - seconds
    return seconds * (1 - share) / share if share > _ENOUGH else None
