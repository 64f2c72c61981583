"""``mdexport bench``: the runtime against PyTorch, on the same weights."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch

import mdzoo
from mdexport.bench import ORIGINAL, Race, Spread, race
from mdexport.cli_models import find, sources
from mdexport.model import Model
from mdexport.rivals import TorchBackend
from mdruntime.bench import NOISY
from mdruntime.bundle import Bundle, open_bundle
from mdruntime.cli_bench import noise_line, say_machine
from mdruntime.errors import SamplingError
from mdruntime.machine import Machine, this_machine
from mdruntime.manifest import Manifest
from mdruntime.records import to_json
from mdruntime.runner import Runner
from mdruntime.session import INT8

__all__ = ["bench_command"]

_EAGER, _COMPILED = "torch", "compiled"


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
        runners = _runners(opened, model, options)
        for runner in runners.values():
            held.callback(runner.close)
        machine = this_machine("cpu", next(iter(runners.values())).threads)
        torch.set_num_threads(machine.threads)
        found = race(
            runners,
            model,
            rows=rows,
            presets=_presets(manifest, list(runners)) if options["images"] else {},
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
    if found.noise > NOISY:
        click.echo(f"\n{noise_line(found.noise)}")


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


def _runners(bundle: Bundle, model: Model, options: Mapping[str, Any]) -> dict[str, Runner]:
    threads = options["threads"]
    runners = {"fp32": Runner(bundle, threads=threads)}
    if INT8 in bundle.manifest.graphs["denoiser"].spellings:
        runners[INT8] = Runner(bundle, threads=threads, precision=INT8)
    runners[_EAGER] = Runner.over(bundle, TorchBackend(model))
    if options["compiled"]:
        runners[_COMPILED] = Runner.over(bundle, TorchBackend(model, compiled=True))
    return runners


def _presets(manifest: Manifest, names: list[str]) -> dict[str, list[str]]:
    """Return which samples are drawn: the published sampler by all, others by the runtime."""
    drawn = {"published": [*names]}
    maskgit = manifest.presets["published"].order == "maskgit"
    if maskgit and manifest.denoiser.classes and manifest.image is not None:
        drawn["published"].append(ORIGINAL)
    ours = [name for name in names if name not in (_EAGER, _COMPILED)]
    return {**drawn, **dict.fromkeys(("balanced", "fast"), ours)}


def _lines(found: Race, manifest: Manifest, names: list[str]) -> list[str]:
    full = manifest.denoiser.canvas
    lines = ["", _row("median ms of a pass, batch 1", [*names, "products"])]
    for (guided, size), spreads in found.passes.items():
        what = f"{'full' if size == full else 'partial'}, {size} rows"
        cells = [_ms(spreads[name]) for name in names]
        products = "" if guided else _ms(found.products[size])
        lines.append(_row(what + (", guided" if guided else ""), [*cells, products]))
    ours = next(iter(names))
    best = found.products[full].minimum
    speed = found.gigaflop[full] / (found.passes[False, full][ours].minimum / 1000)
    weights = found.gigaflop[full] / (best / 1000)
    lines += [
        "",
        f"a full pass: {found.gigaflop[full]:.1f} GFLOP, {speed:.0f} GFLOP/s in {ours}; its "
        f"products alone take {best / found.passes[False, full][ours].minimum:.0%}",
        f"of that time in PyTorch, as if at {weights:.0f} GFLOP/s (minima of this run)",
    ]
    if found.images:
        columns = [*names, ORIGINAL] if _original(found) else names
        lines += ["", _row("median ms of a sample", columns)]
    for preset, spreads in found.images.items():
        cells = [_ms(spreads[name]) if name in spreads else "" for name in columns]
        lines.append(_row(f"preset {preset}", cells))
    return lines


def _original(found: Race) -> bool:
    return any(ORIGINAL in spreads for spreads in found.images.values())


def _row(what: str, cells: list[str]) -> str:
    return f"{what:29}" + "".join(f"{cell:>10}" for cell in cells)


def _ms(spread: Spread) -> str:
    return f"{spread.median:.1f}"


def _facts(
    found: Race, manifest: Manifest, machine: Machine, versions: Mapping[str, str]
) -> dict[str, Any]:
    """Return all that was measured, for machines."""
    passes = [
        {"guided": guided, "rows": size, **{name: to_json(one) for name, one in some.items()}}
        for (guided, size), some in found.passes.items()
    ]
    return {
        "model": manifest.name,
        "weights": manifest.weights.origin,
        "machine": {**to_json(machine), "versions": versions},
        "passes": passes,
        "products": {size: to_json(one) for size, one in found.products.items()},
        "gigaflop": found.gigaflop,
        "samples": {
            preset: {name: to_json(one) for name, one in some.items()}
            for preset, some in found.images.items()
        },
        "noise": found.noise,
        "noisy": found.noise > NOISY,
    }
