"""``mdruntime tune``: choose the sampler for this device."""

import argparse
import json
from functools import partial
from typing import Any

import numpy as np

from mdruntime.bench import NOISY
from mdruntime.bundle import Bundle, open_bundle
from mdruntime.cli_bench import add_counts, check_counts, noise_line, say_machine, unit_of
from mdruntime.cli_tuned import closed, device_options
from mdruntime.duration import milliseconds
from mdruntime.generation import time_samplings
from mdruntime.machine import Machine, this_machine
from mdruntime.records import to_json
from mdruntime.runner import Runner
from mdruntime.tune import Estimate, Tuning, check_quality, pick, settled, study_of, tune
from mdruntime.tuned import TUNED_FORMAT, Tuned, check_place, save_tuned

__all__ = ["add_flags", "run"]

_CLOSE = 0.15
"""Share within which a prediction counts as right."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    goal = parser.add_argument_group("what to choose (one of these)")
    only = goal.add_mutually_exclusive_group(required=True)
    only.add_argument("--budget", metavar="TIME", help="of a sample: 200ms, 1.5s or 200 (ms)")
    only.add_argument("--quality", metavar="NAME", help="best, balanced or fast")
    add = parser.add_argument
    add_counts(parser)
    add("--check", action="store_true", help="measure the choice once more, to compare")
    add("--dry-run", action="store_true", help="choose and print, but keep no file")


def run(options: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    check_counts(options)
    goal = _goal(options)
    bundle = open_bundle(options.bundle)
    study_of(bundle.manifest)  # what is missing shows before anything is measured
    if not options.dry_run:
        check_place(bundle.folder)
    runner = Runner(bundle, options.provider, **device_options(options))
    with closed(runner):
        counts = {"batch": options.batch_size, "repeats": options.repeats}
        tuning, choice = settled(runner, tune(runner, **counts), partial(pick, **goal), **counts)
        machine = this_machine(runner.provider, runner.threads)
        measured = _measured(runner, choice, options) if options.check else None
    tuned = _tuned(bundle, choice, machine, runner.precision, options)
    path = None if options.dry_run else save_tuned(tuned, bundle.folder)
    if options.json:
        file = None if path is None else str(path)
        print(json.dumps({**_facts(tuning, tuned), "measured_ms": measured, "file": file}))
        return 0
    _say(tuning, bundle, machine, runner.precision, options.batch_size)
    _say_rows(tuning, choice)
    if measured is not None:
        _say_check(choice.ms, measured)
    if path is not None:
        print(f"wrote {path}: 'default' and 'tuned' stand for this sampler from now on")
    return 0


def _goal(options: argparse.Namespace) -> dict[str, Any]:
    """Return what to pick by."""
    if options.budget is not None:
        return {"budget_ms": milliseconds(options.budget)}
    check_quality(options.quality)
    return {"quality": options.quality}


def _measured(runner: Runner, choice: Estimate, options: argparse.Namespace) -> float:
    """Return the median time of a sample of the choice."""
    sampling = {choice.row.name: choice.row.sampling}
    times = time_samplings(runner, sampling, batch=options.batch_size, repeats=options.repeats)
    return float(np.median(times[choice.row.name]))


def _tuned(
    bundle: Bundle,
    choice: Estimate,
    machine: Machine,
    precision: str,
    options: argparse.Namespace,
) -> Tuned:
    return Tuned(
        format=TUNED_FORMAT,
        bundle=bundle.manifest.digest,
        name=choice.row.name,
        sampling=choice.row.sampling,
        predicted_ms=round(choice.ms, 3),
        quality=choice.row.quality,
        measure=study_of(bundle.manifest).measure,
        batch=options.batch_size,
        machine=machine,
        precision=precision,
    )


def _facts(tuning: Tuning, tuned: Tuned) -> dict[str, Any]:
    """Return all that is known, for machines."""
    rows = [
        {
            "name": estimate.row.name,
            "ms": round(estimate.ms, 3),
            "quality": estimate.row.quality,
            "low": estimate.row.low,
            "high": estimate.row.high,
            "cost": estimate.row.cost,
            "passes": estimate.row.passes,
            "sampling": to_json(estimate.row.sampling),
            "foreseen": estimate.foreseen,
            "measured": estimate.measured,
            "front": estimate.row.name in tuning.front,
        }
        for estimate in tuning.estimates
    ]
    chosen = {key: value for key, value in to_json(tuned).items() if key != "digest"}
    return {"chosen": chosen, "rows": rows, "noise": tuning.noise, "noisy": tuning.noise > NOISY}


def _say(tuning: Tuning, bundle: Bundle, machine: Machine, precision: str, batch: int) -> None:
    """Print what the table below depends on."""
    manifest = bundle.manifest
    unit = unit_of(manifest)
    print(f"{manifest.name}, {precision}: {manifest.weights.summary}")
    say_machine(machine)
    print(f"  batch      {batch}; ms are of one {unit}, decoder included")
    print(f"  quality    {study_of(manifest).measure} of {unit}s, smaller is better")
    if tuning.noise > NOISY:
        print(noise_line(tuning.noise))


def _say_rows(tuning: Tuning, choice: Estimate) -> None:
    """Print the rows that no other one beats and the choice; the rest only as a number."""
    shown = [e for e in tuning.estimates if e.row.name in tuning.front or e is choice]
    title = f"{'sampler':28} {'rounds':>6} {'ms':>9} {'quality':>7} {'95 % interval':>16}"
    print(f"\n  {title} {'cost':>7}")
    for estimate in shown:
        print(_line(estimate, chosen=estimate is choice))
    print("* the choice, timed by whole samples; most other ms are foreseen from passes")
    print("  rounds: /substeps; cost: in full passes, guidance counts twice")
    if not all(estimate.foreseen for estimate in shown):
        print("~ its number of passes depends on the sample: taken from the study's mean")
    if len(shown) < len(tuning.estimates):
        others = len(tuning.estimates) - len(shown)
        print(f"{others} more that one of these beats in time and quality: see --json")


def _line(estimate: Estimate, *, chosen: bool) -> str:
    row, mark = estimate.row, "*" if chosen else " "
    rounds = f"{row.sampling.rounds}/{row.sampling.substeps}"
    ms = f"{'' if estimate.foreseen else '~'}{estimate.ms:.1f}"
    interval = f"{row.low:.4g} to {row.high:.4g}"
    return (
        f"{mark} {row.name[:28]:28} {rounds:>6} {ms:>9} {row.quality:7.4g} {interval:>16} "
        f"{row.cost:7.4g}"
    )


def _say_check(expected: float, measured: float) -> None:
    error = expected / measured - 1
    verdict = "" if abs(error) <= _CLOSE else f", which is beyond {_CLOSE:.0%}"
    print(f"check: expected {expected:.1f} ms, measured {measured:.1f} ms: {error:+.0%}{verdict}")
