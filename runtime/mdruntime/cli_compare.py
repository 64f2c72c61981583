"""``mdruntime bench --compare``: two benchmarks side by side."""

import json
from collections.abc import Iterable
from pathlib import Path

from mdruntime.bench import Bench
from mdruntime.cli_roofline import count_of_rows
from mdruntime.errors import BundleError
from mdruntime.records import from_json

__all__ = ["compared", "read_bench"]


def read_bench(path: Path) -> Bench:
    """Read what ``mdruntime bench --json`` printed.

    Raises:
        BundleError: it cannot be read, or is something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError("it holds no object")
        data.pop("noisy", None)
        return from_json(Bench, data, "it")
    except (OSError, ValueError, BundleError) as error:
        reason = str(error).split(";")[0]
        raise BundleError(
            f"{str(path)!r} is no benchmark ({reason}); make one with: "
            f"mdruntime bench BUNDLE --json > {path.name}"
        ) from None


def compared(before: Bench, after: Bench) -> Iterable[str]:
    """Yield lines with the times of both, and how many times faster the second one is."""
    for name, one, other in _differences(before, after):
        yield f"{name:10} {one}  ->  {other}"
    yield f"{'ms':32} {'before':>10} {'after':>10} {'faster':>8}"
    old, new = dict(_times(before)), dict(_times(after))
    for name, ms in old.items():
        if name in new:
            yield _line(name, ms, new[name])
    if before.noisy or after.noisy:
        yield "noisy: what is less than the noise apart says nothing; measure again"


def _times(found: Bench) -> Iterable[tuple[str, float]]:
    """Yield the name of each time, and its milliseconds; not those that older versions lack."""
    for each in sorted(found.passes, key=lambda each: (each.rows, each.guided), reverse=True):
        yield f"pass, {count_of_rows(each.rows)}{', guided' if each.guided else ''}", each.ms
    yield "load", found.load_ms
    if found.first_ms:
        yield "first sample", found.first_ms
    yield "condition", found.condition_ms
    yield "decoder", found.decoder_ms
    for name, spread in found.presets.items():
        yield f"preset {name}", spread.median_ms
    for batch in found.batches:
        yield f"batch of {batch.batch}", batch.ms


def _differences(before: Bench, after: Bench) -> Iterable[tuple[str, str, str]]:
    """Yield what else is not the same, and so may be why times differ."""
    pairs = {
        "model": (before.model, after.model),
        "precision": (before.precision, after.precision),
        "weights": (before.weights, after.weights),
        "batch": (before.batch, after.batch),
        "device": (before.machine.device, after.machine.device),
        "provider": (before.machine.provider, after.machine.provider),
        "threads": (before.machine.threads, after.machine.threads),
        "versions": (before.machine.versions, after.machine.versions),
    }
    for name, (one, other) in pairs.items():
        if one != other:
            yield name, str(one), str(other)


def _line(what: str, before: float, after: float) -> str:
    ratio = f"{before / after:8.2f}" if after > 0 else f"{'-':>8}"
    return f"{what:32} {before:10.2f} {after:10.2f} {ratio}"
