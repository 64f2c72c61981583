"""``mdruntime bench``: how long loading, passes and samples take on this device."""

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path

from mdruntime.bench import NOISY, Bench, Spread, bench
from mdruntime.bundle import open_bundle
from mdruntime.cli_compare import compared, read_bench
from mdruntime.cli_tuned import closed, device_options
from mdruntime.errors import SamplingError
from mdruntime.machine import Machine
from mdruntime.manifest import Manifest
from mdruntime.records import to_json
from mdruntime.runner import Runner
from mdruntime.tuned import read_tuned

__all__ = ["add_flags", "check_counts", "noise_line", "run", "say_machine", "unit_of"]

_MOST = 4096  # samples at a time, and repeats


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add("--presets", default="", metavar="NAMES", help="such as fast,best; all if not given")
    both = ("A.json", "B.json")
    add("--compare", type=Path, nargs=2, metavar=both, help="two outputs of --json, side by side")
    add("--no-tuned", action="store_true", help="leave out what mdruntime tune chose")
    add_counts(parser)


def add_counts(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how much is measured."""
    add = parser.add_argument
    add("--batch-size", type=int, default=1, metavar="N", help="samples that run together")
    add("--repeats", type=int, default=7, metavar="R", help="of each measurement; quick ones more")


def check_counts(options: argparse.Namespace) -> None:
    """Refuse counts out of range.

    Raises:
        SamplingError: naming the flag, its range and what was found.
    """
    for name in ("batch_size", "repeats"):
        value = getattr(options, name)
        if not 1 <= value <= _MOST:
            raise SamplingError(f"{name} must be between 1 and {_MOST}, got {value}")


def run(options: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    check_counts(options)
    if (options.bundle is None) == (options.compare is None):
        raise SamplingError("pass either a bundle, or --compare A.json B.json")
    if options.compare is not None:
        for line in compared(*map(read_bench, options.compare)):
            print(line)
        return 0
    began = time.perf_counter()
    bundle = open_bundle(options.bundle)
    choice = None if options.no_tuned else read_tuned(bundle)
    runner = Runner(bundle, options.provider, tuned=choice, **device_options(options))
    load_ms = 1000 * (time.perf_counter() - began)
    with closed(runner):
        found = bench(
            runner,
            [name.strip() for name in options.presets.split(",") if name.strip()],
            batch=options.batch_size,
            repeats=options.repeats,
            load_ms=load_ms,
        )
    if options.json:
        print(json.dumps({**to_json(found), "noisy": found.noisy}))
    else:
        _say(found, bundle.manifest)
    return 0


def unit_of(manifest: Manifest) -> str:
    """Return what a sample of the bundle is."""
    return "text" if manifest.image is None else "image"


def _say(found: Bench, manifest: Manifest) -> None:
    unit = unit_of(manifest)
    print(f"{found.model}, {found.precision}: {manifest.weights.summary}")
    say_machine(found.machine)
    print(f"  loaded in  {found.load_ms:.0f} ms")
    print(f"  batch      {found.batch}")
    if found.peak_mb:
        print(f"  memory     {found.peak_mb:.0f} MB at most, all of this process")
    print(f"\n{'passes of the batch, ms':32} {'unguided':>10} {'guided':>10}")
    for line in _pass_lines(found):
        print(line)
    if found.condition_ms >= 0.05:
        print(f"{'condition, once a batch':32} {found.condition_ms:10.2f}")
    print(f"{f'decoder, each {unit}':32} {found.decoder_ms:10.2f}")
    head = " ".join(f"{name:>8}" for name in ("median", "minimum", "p90", "passes", "decoder"))
    print(f"\n{f'ms of one {unit}':21} {head} {'host':>7} {'n':>4}")
    for name, spread in found.presets.items():
        print(_preset_line(name, spread))
    if found.noisy:
        print(f"\n{noise_line(found.noise)}")


def _pass_lines(found: Bench) -> Iterable[str]:
    times = {(each.rows, each.guided): each.ms for each in found.passes}
    sizes = sorted({rows for rows, _ in times}, reverse=True)
    for rows in sizes:
        kind = "full" if rows == sizes[0] else "partial"
        cells = [times.get((rows, guided)) for guided in (False, True)]
        texts = [f"{'-' if ms is None else f'{ms:.2f}':>10}" for ms in cells]
        print_rows = f"{kind}, {rows} row{'s' if rows != 1 else ''}"
        yield f"{print_rows:32} {' '.join(texts)}"


def _preset_line(name: str, spread: Spread) -> str:
    numbers = (spread.median_ms, spread.minimum_ms, spread.p90_ms)
    parts = (spread.denoiser_ms, spread.images_ms)
    cells = " ".join(f"{ms:8.2f}" for ms in (*numbers, *parts))
    return f"{name:21} {cells} {spread.host_ms:7.2f} {spread.repeats:4}"


def say_machine(machine: Machine) -> None:
    """Print what the numbers depend on besides the bundle."""
    threads = f"{machine.threads} thread{'s' if machine.threads != 1 else ''}"
    print(f"  device     {machine.device}")
    print(f"  provider   {machine.provider}, {threads}")
    print(f"  versions   {', '.join(f'{name} {v}' for name, v in machine.versions.items())}")
    print(f"  date       {machine.date}")


def noise_line(noise: float) -> str:
    """Return the warning that the numbers were disturbed."""
    return (
        f"noisy: slow repeats took {noise:.0%} more than the fastest (over {NOISY:.0%}); close\n"
        "what else is running and measure again before you trust these numbers"
    )
