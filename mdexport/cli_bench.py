"""``mdexport bench``: the runtime against PyTorch, on the same weights."""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import mdzoo
from mdexport.bench import AGAIN, ORIGINAL, Race, Times, race, times_as_fast
from mdexport.cli_models import find, sources
from mdexport.model import Model
from mdexport.rivals import TorchBackend
from mdruntime.bundle import Bundle, open_bundle
from mdruntime.cli_bench import noise_line, say_machine
from mdruntime.cli_roofline import pass_name
from mdruntime.errors import SamplingError
from mdruntime.first import FIRST_PASS_MB
from mdruntime.machine import Machine, this_machine
from mdruntime.manifest import Manifest
from mdruntime.records import to_json
from mdruntime.runner import Runner
from mdruntime.session import precisions_of

__all__ = ["bench_command"]

_EAGER, _COMPILED = "torch", "compiled"
_NOTE = "again: of what was asked for before, its first pass kept (load's first_pass_mb)"


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--checkpoint", metavar="PATH", help="the weights it was built from")
@click.option("--tokenizer", "--vqgan", metavar="PATH", help="weights of the image tokenizer")
@click.option("--compile", "compiled", is_flag=True, help="measure torch.compile too (minutes)")
@click.option("--rows", default="8,16,64,128", show_default=True, help="of partial passes")
@click.option("--threads", type=click.IntRange(0), default=0, help="of the CPU  [all]")
@click.option("--repeats", type=click.IntRange(1), default=7, show_default=True, help="of passes")
@click.option("--images", type=click.IntRange(0), default=3, show_default=True, help="of images")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def bench_command(bundle: Path, **options: Any) -> None:
    """Measure a BUNDLE in fp32 on this CPU against PyTorch, on the same weights.

    All contestants run in turn: the runtime in each precision of the bundle, the same passes in
    PyTorch, and images the way of the published repositories (whole canvases in PyTorch, with and
    without the class, sampled there). "products" are the matrix products of a pass alone.
    """
    opened = open_bundle(bundle)
    manifest = opened.manifest
    if manifest.precision != "fp32":
        raise SamplingError(
            f"a comparison with PyTorch needs a bundle in fp32, this one is {manifest.precision}; "
            "build one with: mdexport build --precision fp32"
        )
    rows = _rows(options["rows"], manifest)
    model = _model(manifest, options)
    with contextlib.ExitStack() as held:
        ours, keeping = (_ours(opened, options, kept) for kept in (0.0, FIRST_PASS_MB))
        runners = {**ours, **_rivals(opened, model, options)}
        for runner in (*runners.values(), *keeping.values()):
            held.callback(runner.close)
        machine = this_machine("cpu", next(iter(runners.values())).threads)
        torch.set_num_threads(machine.threads)
        found = race(
            runners,
            model,
            rows=rows,
            presets=_presets(manifest, list(ours), list(runners)) if options["images"] else {},
            keeping=keeping,
            repeats=options["repeats"],
            image_repeats=options["images"],
        )
    versions = {**machine.versions, "torch": torch.__version__}
    if options["as_json"]:
        click.echo(json.dumps(_facts(found, manifest, machine, versions)))
        return
    click.echo(f"{manifest.name}, {manifest.precision}: {manifest.weights.summary}")
    say_machine(machine)
    click.echo(f"  torch      {torch.__version__}")
    for line in _lines(found, manifest, list(runners)):
        click.echo(line)
    if warning := noise_line(found.noise, found.steal, found.waited):
        click.echo(f"\n{warning}")


def _rows(text: str, manifest: Manifest) -> list[int]:
    try:
        rows = sorted({int(part) for part in text.split(",") if part.strip()}, reverse=True)
    except ValueError:
        rows = [0]
    most = manifest.denoiser.length // manifest.denoiser.slots
    if rows and not min(rows) >= 1:
        raise SamplingError(f"--rows must be numbers from 1 to {most} such as 8,64, got {text!r}")
    return [size for size in rows if size < most]


def _model(manifest: Manifest, options: Mapping[str, Any]) -> Model:
    """Return the bundle's model in PyTorch."""
    entry = find(manifest.name)
    given = {
        "checkpoint": options["checkpoint"],
        "tokenizer": options["tokenizer"],
        "random_weights": manifest.weights.seed if manifest.weights.origin == "random" else None,
        "settings": (),
    }
    return mdzoo.load(entry, sources(entry, given))


def _ours(bundle: Bundle, options: Mapping[str, Any], first_pass_mb: float) -> dict[str, Runner]:
    """Return the runtime in each precision of the bundle."""
    kept = {"threads": options["threads"], "first_pass_mb": first_pass_mb}
    built = precisions_of(bundle.manifest)
    return {name: Runner(bundle, precision=name, **kept) for name in built}


def _rivals(bundle: Bundle, model: Model, options: Mapping[str, Any]) -> dict[str, Runner]:
    """Return PyTorch under the runtime's samplers."""
    rivals = {_EAGER: Runner.over(bundle, TorchBackend(model))}
    if options["compiled"]:
        rivals[_COMPILED] = Runner.over(bundle, TorchBackend(model, compiled=True))
    return rivals


def _presets(manifest: Manifest, ours: list[str], names: list[str]) -> dict[str, list[str]]:
    """Return which samples are drawn: the published sampler by all, others by the runtime."""
    drawn = {"published": [*names]}
    maskgit = manifest.presets["published"].order == "maskgit"
    if maskgit and manifest.denoiser.classes and manifest.image is not None:
        drawn["published"].append(ORIGINAL)
    return {**drawn, **dict.fromkeys(("balanced", "fast"), ours)}


def _lines(found: Race, manifest: Manifest, names: list[str]) -> list[str]:
    full = manifest.denoiser.canvas
    passes = {
        _pass_name(guided, size, full): times for (guided, size), times in found.passes.items()
    }
    medians = {name: _medians(times) for name, times in passes.items()}
    for size, times in found.products.items():
        medians[_pass_name(False, size, full)]["products"] = float(np.median(times))
    ratios = {name: _ratios(times, times[_EAGER]) for name, times in passes.items()}
    lines = ["", *_table("median ms of a pass, batch 1", medians, [*names, "products"], 1)]
    lines += ["", *_table(f"times as fast as {_EAGER}", ratios, names, 2)]
    ours, mine = names[0], min(found.passes[False, full][names[0]])
    best = min(found.products[full])
    speed, weights = (found.gigaflop[full] / (ms / 1000) for ms in (mine, best))
    lines += [
        "",
        f"a full pass: {found.gigaflop[full]:.1f} GFLOP, {speed:.0f} GFLOP/s in {ours}; its "
        f"products alone take {best / mine:.0%}",
        f"of that time in PyTorch, as if at {weights:.0f} GFLOP/s (minima of this run)",
    ]
    return [*lines, *_image_lines(found, names)] if found.images else lines


def _image_lines(found: Race, names: list[str]) -> list[str]:
    """Return the times of samples, and how these compare with the published repository's."""
    samples = {
        f"preset {preset}": found.images[preset] for preset in sorted(found.images, key=_kept)
    }
    medians = {name: _medians(times) for name, times in samples.items()}
    original = found.images["published"].get(ORIGINAL)
    if original is None:
        return ["", *_table("median ms of a sample", medians, names, 1), _NOTE]
    ratios = {name: _ratios(times, original) for name, times in samples.items()}
    return [
        "",
        *_table("median ms of a sample", medians, [*names, ORIGINAL], 1),
        "",
        *_table(f"times as fast as {ORIGINAL}", ratios, names, 2),
        "Ratios are medians over turns, in which all ran one after another.",
        _NOTE,
    ]


def _kept(preset: str) -> bool:
    """Whether answers of first passes were kept: these stand below the others."""
    return preset.endswith(AGAIN)


def _pass_name(guided: bool, rows: int, full: int) -> str:
    return pass_name(rows, full) + (", guided" if guided else "")


def _medians(times: Mapping[str, Times]) -> dict[str, float]:
    return {name: float(np.median(some)) for name, some in times.items()}


def _ratios(times: Mapping[str, Times], base: Times) -> dict[str, float]:
    return {name: times_as_fast(some, base) for name, some in times.items()}


def _table(
    title: str, rows: Mapping[str, Mapping[str, float]], columns: Sequence[str], digits: int
) -> list[str]:
    lines = [_row(title, columns)]
    for name, numbers in rows.items():
        cells = (f"{numbers[one]:.{digits}f}" if one in numbers else "" for one in columns)
        lines.append(_row(name, cells))
    return lines


def _row(what: str, cells: Iterable[str]) -> str:
    return (f"{what:29}" + "".join(f"{cell:>10}" for cell in cells)).rstrip()


def _facts(
    found: Race, manifest: Manifest, machine: Machine, versions: Mapping[str, str]
) -> dict[str, Any]:
    """Return all that was measured, for machines."""
    passes = [
        {"guided": guided, "rows": size, **{name: _spread(one) for name, one in some.items()}}
        for (guided, size), some in found.passes.items()
    ]
    return {
        "model": manifest.name,
        "weights": manifest.weights.origin,
        "machine": {**to_json(machine), "versions": versions},
        "passes": passes,
        "products": {size: _spread(one) for size, one in found.products.items()},
        "gigaflop": found.gigaflop,
        "samples": {
            preset: {name: _spread(one) for name, one in some.items()}
            for preset, some in found.images.items()
        },
        "noise": found.noise,
        "steal": found.steal,
        "waited": found.waited,
        "noisy": bool(noise_line(found.noise, found.steal, found.waited)),
    }


def _spread(times: Times) -> dict[str, Any]:
    """Return milliseconds over turns, and each of them: those of one turn may be compared."""
    return {
        "median": float(np.median(times)),
        "minimum": min(times),
        "p90": float(np.percentile(times, 90)),
        "repeats": len(times),
        "ms": list(times),
    }
