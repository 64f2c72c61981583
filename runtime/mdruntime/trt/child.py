"""The process that TensorRT runs in while engines are made: ``python -m mdruntime.trt.child``.

Whoever builds engines loads neither TensorRT nor CUDA: a builder that crashes, or that the system
kills for want of memory, ends this process only, and all its memory is free afterwards. A request
comes as one line of JSON on standard input, whose end means: give up. Events leave as lines of JSON
on standard output; whatever else is printed goes to standard error, which is the log.
"""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mdruntime.bundle import open_bundle
from mdruntime.cuda import open_cuda
from mdruntime.records import from_json, to_json
from mdruntime.trt import api
from mdruntime.trt.build import Here
from mdruntime.trt.builder import PlanRequest, build_plan
from mdruntime.trt.identity import BuildOptions, current
from mdruntime.trt.launch import KINDS, Event, kind_of
from mdruntime.trt.memory import Memory, host_memory
from mdruntime.trt.trial import compare_times, try_out

__all__ = ["main", "perform"]

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Task:
    """What a task is given."""

    data: Any
    emit: Callable[[Event], None]
    cancelled: Callable[[], bool]
    say: Say


def perform(
    request: Event, emit: Callable[[Event], None], cancelled: Callable[[], bool], say: Say
) -> None:
    """Do what is asked for and emit events: the last one is ``done`` or ``failed``.

    Args:
        request: ``task``, one of probe, build, verify and compare, and its ``data``.
        emit: takes an event.
        cancelled: says whether to give up.
        say: takes a line of the log.
    """
    tasks = {"probe": _probe, "build": _build, "verify": _verify, "compare": _compare}
    try:
        task = _Task(request["data"], emit, cancelled, say)
        result = tasks[request["task"]](api.import_tensorrt(), task)
        emit({"event": "done", "result": to_json(result)})
    except KINDS as error:
        emit({"event": "failed", "kind": kind_of(error), "text": str(error)})


def _probe(trt: ModuleType, task: _Task) -> Here:
    cuda = open_cuda()
    bundle = open_bundle(task.data["bundle"], check=False)
    options = from_json(BuildOptions, task.data["options"], "options")
    free, total = cuda.memory()
    host, shared = host_memory()
    return Here(current(bundle, cuda, trt, options), Memory(free, host, shared), total)


def _build(trt: ModuleType, task: _Task) -> Any:
    def tell(share: float, phase: str) -> None:
        task.emit({"event": "progress", "share": share, "phase": phase})

    request = from_json(PlanRequest, task.data, "request")
    return build_plan(trt, api.logger(trt, task.say), request, tell, task.cancelled)


def _verify(trt: ModuleType, task: _Task) -> Any:
    return try_out(open_bundle(task.data["bundle"], check=False), Path(task.data["plans"]))


def _compare(trt: ModuleType, task: _Task) -> Any:
    bundle = open_bundle(task.data["bundle"], check=False)
    return compare_times(bundle, Path(task.data["plans"]), Path(task.data["then"]))


def main() -> None:
    """Read a request, perform it, and exit."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print too; events keep a channel of their own
    request = json.loads(_first_line())
    gone = threading.Event()
    threading.Thread(target=_watch, args=(gone,), daemon=True).start()

    def emit(event: Event) -> None:
        try:
            events.write(json.dumps(event) + "\n")
            events.flush()
        except OSError:  # nobody listens any more; raised into TensorRT, it would end in a crash
            gone.set()

    perform(request, emit, gone.is_set, _say)
    with contextlib.suppress(OSError):
        events.close()


def _say(line: str) -> None:
    """Write a line to the log at once: a process that is killed loses what is not written."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _first_line() -> bytes:
    """Read a line without a buffer, which would hold a lock when the process exits."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            break
        line += byte
    return bytes(line)


def _watch(gone: threading.Event) -> None:
    """Wait for the end of standard input: the parent is gone, or wants the task to end."""
    while os.read(0, 1):
        pass
    gone.set()


if __name__ == "__main__":
    main()
