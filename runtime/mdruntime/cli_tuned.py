"""What all commands that run a bundle do with it, and with the choice of ``mdruntime tune``."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mdruntime.bundle import Bundle
from mdruntime.machine import device_name
from mdruntime.records import to_json
from mdruntime.runner import Runner
from mdruntime.tuned import read_tuned

__all__ = ["closed", "device_options", "open_runner", "say_tuned", "tuned_facts"]

_PRESETS = ("default", "tuned")  # that stand for the choice


def device_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return how all commands let a bundle run on this device, besides the provider."""
    return {
        "threads": options.threads,
        "reduce_memory": options.reduce_memory,
        "precision": options.precision,
        "first_pass_mb": options.first_pass_mb,
    }


def open_runner(bundle: Bundle, options: argparse.Namespace) -> Runner:
    """Open a bundle, with what was chosen for this device unless that is not wanted."""
    choice = None if options.no_tuned else read_tuned(bundle)
    return Runner(
        bundle, options.provider, head=options.head, tuned=choice, **device_options(options)
    )


@contextmanager
def closed(runner: Runner) -> Iterator[None]:
    """Close a runner at the end, and say what was not as it should be while it ran."""
    try:
        yield
    finally:
        for note in runner.notes:
            print(f"mdruntime: {note}", file=sys.stderr)
        runner.close()


def say_tuned(runner: Runner, options: argparse.Namespace) -> None:
    """Say whose choice the sampler is, and whether it was made for what is in use."""
    tuned = runner.tuned
    if tuned is None or options.preset not in _PRESETS or options.quiet or options.json:
        return
    line = f"sampler {tuned.name!r}, tuned for {tuned.made_for}"
    if tuned.strange(runner.provider, runner.threads, runner.precision):
        threads, device = f"{runner.threads} thread(s)", device_name(runner.provider)
        here = f"{runner.provider}, {runner.precision}, {threads}, {device}"
        line += f"; this is {here}: 'mdruntime tune' measures here"
    print(line, file=sys.stderr)


def tuned_facts(runner: Runner, preset: str) -> dict[str, Any] | None:
    """Return which choice of ``mdruntime tune`` is in use, and what it was made for."""
    tuned = runner.tuned
    if tuned is None or preset not in _PRESETS:
        return None
    strange = tuned.strange(runner.provider, runner.threads, runner.precision)
    made_for = {"batch": tuned.batch, "precision": tuned.precision, **to_json(tuned.machine)}
    return {"name": tuned.name, "made_for": made_for, "made_here": not strange}
