"""Run a task in a process of its own: see ``child``."""

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, TextIO

from mdruntime.errors import (
    BundleError,
    EngineError,
    MdruntimeError,
    ProviderError,
    SamplingError,
    VerificationError,
)

__all__ = ["KINDS", "Event", "Launch", "error_of", "kind_of", "launch"]

Event = dict[str, Any]
Launch = Callable[[Event, Path], Generator[Event, None, None]]
"""From a request and a log file to events; closing it cancels the task."""

KINDS: tuple[type[BaseException], ...] = (
    ProviderError,
    EngineError,
    VerificationError,
    SamplingError,
    BundleError,
    MdruntimeError,
    MemoryError,
    KeyboardInterrupt,
    OSError,
)
"""Errors that a task may end with, the special ones first."""

_PATIENCE_S = 10  # after which a task that was told to give up is ended
_TICK_S = 1.0
_KILLED = -9
_CHUNK = 1 << 16


def kind_of(error: BaseException) -> str:
    """Return the name of the kind that an error is sent as."""
    return next(kind.__name__ for kind in KINDS if isinstance(error, kind))


def error_of(event: Event) -> BaseException:
    """Return the error that a task failed of."""
    kinds = {kind.__name__: kind for kind in KINDS}
    return kinds[event["kind"]](event["text"])


def launch(request: Event, log: Path) -> Generator[Event, None, None]:
    """Run a task and yield its events, and an empty one for every second without.

    Args:
        request: see ``child``.
        log: file that everything else is appended to.

    Raises:
        MdruntimeError: what the task failed of, or that its process died.
        MemoryError: the system killed it.
    """
    with log.open("a", encoding="utf-8") as text:
        process = _start(text)
    try:
        yield from _events(process, request, log)
    finally:
        _end(process)


def _start(log: TextIO) -> "subprocess.Popen[bytes]":
    # In a session of its own: Ctrl-C reaches the parent only, which then asks the child to stop.
    return subprocess.Popen(
        [sys.executable, "-m", "mdruntime.trt.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        start_new_session=True,
        env=_environment(),
    )


def _environment() -> dict[str, str]:
    """Let the child find this very package, and nothing in the folder it happens to start in."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    found = {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    return {**os.environ, **found, "PYTHONSAFEPATH": "1"}


def _events(process: "subprocess.Popen[bytes]", request: Event, log: Path) -> Iterator[Event]:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died already; its exit code says why
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
    for line in _lines(process):
        event: Event = json.loads(line) if line else {}
        if event.get("event") == "failed":
            raise error_of(event)
        yield event
        if event.get("event") == "done":
            return
    raise _death(process.wait(), log)


def _lines(process: "subprocess.Popen[bytes]") -> Iterator[bytes]:
    """Yield lines of standard output, and an empty one for every second without."""
    assert process.stdout is not None
    number, rest = process.stdout.fileno(), b""
    while True:
        if not select.select([number], [], [], _TICK_S)[0]:
            yield b""
            continue
        chunk = os.read(number, _CHUNK)
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line for line in lines if line)


def _death(code: int, log: Path) -> BaseException:
    if code == _KILLED:
        return MemoryError(
            "the system killed the process that built the engine, as it does when memory runs "
            "out; stop other processes, add swap, or try a smaller --workspace or --max-batch"
        )
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    last = _last_line(log)
    return MdruntimeError(
        f"the process that builds engines ended with {how}{f': {last}' if last else ''}"
    )


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Tell the child to give up, wait a while, and end it."""
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
    for end in (process.terminate, process.kill):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE_S)
            return
        end()
    process.wait()
