"""What all commands that make something do with the choice of ``mdruntime tune``."""

import argparse
import sys
from typing import Any

from mdruntime.bundle import Bundle
from mdruntime.machine import device_name
from mdruntime.records import to_json
from mdruntime.runner import Runner
from mdruntime.tuned import read_tuned

__all__ = ["open_runner", "say_tuned", "tuned_facts"]

_PRESETS = ("default", "tuned")  # that stand for the choice


def open_runner(bundle: Bundle, options: argparse.Namespace) -> Runner:
    """Open a bundle, with what was chosen for this device unless that is not wanted."""
    choice = None if options.no_tuned else read_tuned(bundle)
    return Runner(
        bundle, options.provider, threads=options.threads, head=options.head, tuned=choice
    )


def say_tuned(runner: Runner, options: argparse.Namespace) -> None:
    """Say whose choice the sampler is, and whether it was made for what is in use."""
    tuned = runner.tuned
    if tuned is None or options.preset not in _PRESETS or options.quiet or options.json:
        return
    line = f"sampler {tuned.name!r}, tuned for {tuned.made_for}"
    if tuned.strange(runner.provider, runner.threads):
        here = f"{runner.provider}, {runner.threads} thread(s), {device_name(runner.provider)}"
        line += f"; this is {here}: 'mdruntime tune' measures here"
    print(line, file=sys.stderr)


def tuned_facts(runner: Runner, preset: str) -> dict[str, Any] | None:
    """Return which choice of ``mdruntime tune`` is in use, and what it was made for."""
    tuned = runner.tuned
    if tuned is None or preset not in _PRESETS:
        return None
    machine, strange = tuned.machine, tuned.strange(runner.provider, runner.threads)
    made_for = {"batch": tuned.batch, **to_json(machine)}
    return {"name": tuned.name, "made_for": made_for, "made_here": not strange}
