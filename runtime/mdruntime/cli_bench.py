"""``mdruntime bench``: how long loading, passes and samples take on this device."""

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from mdruntime.bench import NOISY, Bench, Copied, Spread, bench
from mdruntime.bundle import Bundle, open_bundle
from mdruntime.ceiling import better, measure_ceiling
from mdruntime.cli_compare import compared, read_bench
from mdruntime.cli_roofline import operator_lines, pass_name, roofline_lines
from mdruntime.cli_tuned import closed, device_options
from mdruntime.errors import ProviderError, SamplingError
from mdruntime.machine import Machine
from mdruntime.manifest import Manifest
from mdruntime.records import to_json
from mdruntime.roofline import profile_passes, roofline
from mdruntime.runner import Runner
from mdruntime.steal import STOLEN
from mdruntime.tuned import read_tuned
from mdruntime.waiting import WAITED

__all__ = ["add_flags", "check_counts", "noise_line", "run", "say_machine", "unit_of"]

_MOST = 4096  # samples at a time, and repeats


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add("--presets", default="", metavar="NAMES", help="such as fast,best; all if not given")
    both = ("A.json", "B.json")
    add("--compare", type=Path, nargs=2, metavar=both, help="two outputs of --json, side by side")
    add("--no-tuned", action="store_true", help="leave out what mdruntime tune chose")
    add("--batches", default="", metavar="SIZES", help="such as 1,2,4,8: samples a second of each")
    add("--operators", action="store_true", help="where passes spend their time (provider cpu)")
    add("--no-roofline", action="store_true", help="leave out what the machine can do at best")
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
    batches = _batches(options.batches)
    if options.operators and options.no_roofline:
        raise SamplingError(
            "--operators are set against the roofline, and --no-roofline leaves that out; "
            "leave out one of the two"
        )
    if options.operators and options.provider != "cpu":
        raise ProviderError(
            f"--operators is for provider 'cpu', got {options.provider!r}; leave it out, or choose "
            "--provider cpu"
        )
    began = time.perf_counter()
    bundle = open_bundle(options.bundle)
    found = _measured(bundle, options, batches, began)
    if options.json:
        print(json.dumps({**to_json(found), "noisy": found.noisy}))
    else:
        _say(found, bundle.manifest)
    return 0


def _batches(text: str) -> list[int]:
    """Return the numbers of ``--batches``, each once."""
    words = [word.strip() for word in text.split(",")] if text else []
    for word in words:
        if not (word.isdecimal() and 1 <= int(word) <= _MOST):
            raise SamplingError(
                f"--batches takes numbers between 1 and {_MOST}, got {word!r}; "
                "write them with commas between them, such as --batches 1,2,4,8"
            )
    return list(dict.fromkeys(map(int, words)))


def _measured(
    bundle: Bundle, options: argparse.Namespace, batches: list[int], began: float
) -> Bench:
    """Measure a bundle whose loading began at a time, and the machine before and after it."""
    choice = None if options.no_tuned else read_tuned(bundle)
    runner = Runner(bundle, options.provider, tuned=choice, **device_options(options))
    load_ms = 1000 * (time.perf_counter() - began)
    limited = options.provider == "cpu" and not options.no_roofline
    presets = [name.strip() for name in options.presets.split(",") if name.strip()]
    with closed(runner):
        for name in presets:  # a wrong one shows before anything is measured
            runner.sampling(name, {})
        before = measure_ceiling(runner.threads) if limited else None
        found = bench(
            runner,
            presets,
            batch=options.batch_size,
            repeats=options.repeats,
            load_ms=load_ms,
            batches=batches,
        )
    if before is None:
        return found
    runs = profile_passes(
        bundle,
        threads=options.threads,
        precision=options.precision,
        batch=options.batch_size,
        repeats=options.repeats if options.operators else 1,
    )
    ceiling = better(before, measure_ceiling(runner.threads))
    return replace(found, roofline=roofline(ceiling, runs, operators=options.operators))


def unit_of(manifest: Manifest) -> str:
    """Return what a sample of the bundle is."""
    return "text" if manifest.image is None else "image"


def _say(found: Bench, manifest: Manifest) -> None:
    unit = unit_of(manifest)
    print(f"{found.model}, {found.precision}: {manifest.weights.summary}")
    say_machine(found.machine)
    print(f"  loaded in  {found.load_ms:.0f} ms, first {unit} after {found.first_ms:.0f} ms")
    print(f"  batch      {found.batch}")
    if found.peak_mb:
        print(f"  memory     {found.peak_mb:.0f} MB at most, all of this process")
    others = f"{found.steal:.1%} stolen by the host, {found.waited:.1%} waiting"
    print(f"  noise      {found.noise:.0%} between repeats, {others}")
    tables = [_pass_lines(found, unit), _preset_lines(found, unit), _copied_lines(found)]
    if found.batches:
        tables.append(_batch_lines(found, unit))
    if found.roofline is not None:
        ceiling, told = found.roofline.ceiling, found.roofline.operators
        tables.append(roofline_lines(found.roofline, found.passes))
        tables += [operator_lines(ceiling, each, found.passes) for each in told]
    for lines in tables:
        print()
        for line in lines:
            print(line)
    if found.noisy:
        print(f"\n{noise_line(found.noise, found.steal, found.waited)}")


def _pass_lines(found: Bench, unit: str) -> Iterable[str]:
    yield f"{'passes of the batch, ms':32} {'unguided':>10} {'guided':>10}"
    times = {(each.rows, each.guided): each.ms for each in found.passes}
    sizes = sorted({rows for rows, _ in times}, reverse=True)
    for rows in sizes:
        cells = [times.get((rows, guided)) for guided in (False, True)]
        texts = [f"{'-' if ms is None else f'{ms:.2f}':>10}" for ms in cells]
        yield f"{pass_name(rows, sizes[0]):32} {' '.join(texts)}"
    if found.condition_ms >= 0.05:
        yield f"{'condition, once a batch':32} {found.condition_ms:10.2f}"
    yield f"{f'decoder, each {unit}':32} {found.decoder_ms:10.2f}"


def _preset_lines(found: Bench, unit: str) -> Iterable[str]:
    head = " ".join(f"{name:>8}" for name in ("median", "minimum", "p90", "passes", "decoder"))
    yield f"{f'ms of one {unit}':21} {head} {'host':>7} {'n':>4}"
    for name, spread in found.presets.items():
        yield _preset_line(name, spread)


def _preset_line(name: str, spread: Spread) -> str:
    numbers = (spread.median_ms, spread.minimum_ms, spread.p90_ms)
    parts = (spread.denoiser_ms, spread.images_ms)
    cells = " ".join(f"{ms:8.2f}" for ms in (*numbers, *parts))
    return f"{name:21} {cells} {spread.host_ms:7.2f} {spread.repeats:4}"


def _copied_lines(found: Bench) -> Iterable[str]:
    """Yield what crosses between the sampler and the graphs."""
    head = f"{'passes':>8} {'to a pass':>11} {'from it':>11} {'other graphs':>12} {'caches':>11}"
    yield f"{'bytes copied, a batch':21} {head}"
    for name, spread in found.presets.items():
        if spread.copied is not None:
            yield f"{name:21} {_copied_cells(spread.copied)}"


def _copied_cells(copied: Copied) -> str:
    passes = max(copied.passes, 1)
    sent, fetched = copied.to_passes / passes, copied.from_passes / passes
    whole = f"{copied.others:12.0f} {copied.caches:11.0f}"
    return f"{copied.passes:8.1f} {sent:11.0f} {fetched:11.0f} {whole}"


def _batch_lines(found: Bench, unit: str) -> Iterable[str]:
    head = f"{'ms':>16} {f'{unit}s a second':>16} {f'ms of one {unit}':>16} {'n':>4}"
    yield f"{'batch':21} {head}"
    for each in found.batches:
        cells = f"{each.ms:16.2f} {each.per_second:16.2f} {each.ms / each.batch:16.2f}"
        yield f"{each.batch:<21} {cells} {each.repeats:4}"


def say_machine(machine: Machine) -> None:
    """Print what the numbers depend on besides the bundle."""
    threads = f"{machine.threads} thread{'s' if machine.threads != 1 else ''}"
    print(f"  device     {machine.device}")
    print(f"  provider   {machine.provider}, {threads}")
    print(f"  versions   {', '.join(f'{name} {v}' for name, v in machine.versions.items())}")
    print(f"  date       {machine.date}")


def noise_line(noise: float, steal: float = 0.0, waited: float = 0.0) -> str:
    """Return the warning that the numbers were disturbed, and by what."""
    lines = []
    if noise > NOISY:
        lines += [
            f"noisy: slow repeats took {noise:.0%} more than the fastest (over {NOISY:.0%}); close",
            "what else is running and measure again before you trust these numbers",
        ]
    if steal > STOLEN:
        lines += [
            f"noisy: the host gave {steal:.0%} of the cores' time to others (over {STOLEN:.0%});",
            "measure again when it has less to do",
        ]
    if waited > WAITED:
        lines += [
            f"noisy: threads waited {waited:.0%} of their time for cores that others had (over",
            f"{WAITED:.0%}); close what else is running, or use fewer --threads",
        ]
    return "\n".join(lines)
