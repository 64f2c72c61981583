"""``mdruntime build``: TensorRT engines of a bundle, made and verified on this device."""

import argparse
import json
import shlex
import sys
import textwrap
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdruntime.bundle import Bundle, open_bundle
from mdruntime.errors import ProviderError, SamplingError
from mdruntime.records import to_json
from mdruntime.trt.build import build
from mdruntime.trt.identity import BuildOptions
from mdruntime.trt.steps import Progress
from mdruntime.trt.store import LOG, Engines, minutes

__all__ = ["add_flags", "build_here", "run"]

_WIDTH = 80
_INDENT = 30
_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
_HEARTBEAT_S = 10.0  # between lines where nothing can be overwritten
_MOST_MIB = 1 << 20


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add, default = parser.add_argument, BuildOptions()
    add("--max-batch", type=int, default=default.max_batch, metavar="N", help="largest batch")
    add("--int8", action="store_true", help="use int8 if it is faster here and exact enough")
    add("--version-compatible", action="store_true", help="let newer TensorRT load the engines")
    add("--hardware-compatible", action="store_true", help="let other GPUs load the engines")
    add(
        "--optimisation-level",
        type=int,
        default=default.optimisation_level,
        metavar="N",
        help="0 builds fastest, 5 tries everything; default 3",
    )
    add("--workspace", type=int, default=0, metavar="MB", help="memory that tactics may use")
    add("--force", action="store_true", help="build again what is there already")
    add("--verbose", action="store_true", help="say what the builder is at")


def run(options: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    choices = BuildOptions(
        max_batch=options.max_batch,
        int8=options.int8,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        optimisation_level=options.optimisation_level,
    )
    if not 0 <= options.workspace <= _MOST_MIB:
        raise SamplingError(
            f"workspace must be between 0 (half of what is free) and {_MOST_MIB} MB, "
            f"got {options.workspace}"
        )
    bundle = open_bundle(options.bundle)
    if not options.json:
        manifest = bundle.manifest
        print(f"{manifest.name}, {manifest.precision}: {manifest.weights.summary}", flush=True)
    tell = _JsonLines() if options.json else _Lines(verbose=options.verbose)
    workspace = options.workspace << 20
    engines = _follow(build(bundle, choices, force=options.force, workspace=workspace), tell)
    _say_engines(bundle, engines, as_json=options.json)
    if not options.json:
        target = shlex.quote(str(bundle.folder))
        print(f"Next:\n  mdruntime bench {target} --provider tensorrt")
    return 0


def build_here(folder: Path, choices: BuildOptions, *, as_json: bool) -> str:
    """Build engines of a fresh bundle where that is possible.

    Args:
        folder: the bundle.
        choices: how to build.
        as_json: print JSON lines.

    Returns:
        Why none were built: there is no TensorRT or no GPU; empty where they were.
    """
    from importlib.util import find_spec  # slow, and of no use to other commands

    if find_spec("tensorrt") is None:
        return "TensorRT is not installed here"
    bundle = open_bundle(folder, check=False)
    try:
        engines = _follow(build(bundle, choices), _JsonLines() if as_json else _Lines())
    except ProviderError as error:
        return " ".join(str(error).split())
    _say_engines(bundle, engines, as_json=as_json)
    return ""


def _follow(steps: Generator[Progress, None, Engines], tell: "_Lines | _JsonLines") -> Engines:
    """Tell every step and return the engines."""
    try:
        while True:
            tell(next(steps))
    except StopIteration as end:
        engines: Engines = end.value
        return engines
    except MemoryError as error:  # what helps here is not what helps elsewhere
        raise OSError(f"out of memory: {error}") from None
    finally:
        steps.close()
        tell.close()


def _say_engines(bundle: Bundle, engines: Engines, *, as_json: bool) -> None:
    """Print what was published."""
    record, place = engines.record, engines.folder.relative_to(bundle.folder)
    if as_json:
        print(json.dumps({"engines": str(engines.folder), **to_json(record)}))
        return
    size = sum(plan.bytes for plan in record.plans.values())
    print(f"verified on this device: {place} ({size / 1e6:.1f} MB)")
    if record.fusion_barrier:
        print(f"attention is kept from being fused, which went wrong here: see {LOG} there")


@dataclass
class _Lines:
    """Lines for people: one that is overwritten while a step goes on, then one that stays."""

    verbose: bool = False
    said: float = field(default_factory=time.monotonic)
    open: bool = False

    def __call__(self, progress: Progress) -> None:
        """Print a step."""
        head = f"[{progress.step}/{progress.steps}] {progress.name}"
        if progress.done:
            line = f"{head:18} {progress.seconds:7.1f} s  {progress.detail}"
            indent = " " * _INDENT
            for part in textwrap.wrap(line, _WIDTH, subsequent_indent=indent, **_WORDS):
                self._print(part, stays=True)
        elif sys.stdout.isatty():
            self._print(_running(head, progress, self.verbose), stays=False)
        elif time.monotonic() - self.said >= _HEARTBEAT_S or (
            progress.seconds == 0 and progress.detail
        ):
            self._print(_running(head, progress, self.verbose), stays=True)

    def close(self) -> None:
        """End a line that was to be overwritten."""
        if self.open:
            print(flush=True)

    def _print(self, line: str, *, stays: bool) -> None:
        start = "\r\033[K" if self.open else ""
        text = line if stays else line[: _WIDTH - 1]
        print(f"{start}{text}", end="\n" if stays else "", flush=True)
        self.open = not stays
        self.said = time.monotonic()


def _running(head: str, progress: Progress, verbose: bool) -> str:
    """Return a line of at most 80 columns about a step that goes on."""
    words = [f"{progress.share:4.0%}"] if progress.share else []
    words += [minutes(progress.seconds)] if progress.seconds >= 1 else []
    if progress.left_s is not None:
        words.append(f"about {minutes(progress.left_s)} left")
    if progress.detail and (verbose or not progress.seconds):
        words.append(progress.detail)
    return f"{head:18} {', '.join(words)}"[:_WIDTH].rstrip()


class _JsonLines:
    """A line of JSON for each step that is done."""

    def __call__(self, progress: Progress) -> None:
        """Print a step."""
        if progress.done:
            facts: dict[str, Any] = {"step": progress.name, "s": round(progress.seconds, 3)}
            print(json.dumps({**facts, "detail": progress.detail}), flush=True)

    def close(self) -> None:
        """Do nothing: every line is whole."""
