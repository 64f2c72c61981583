"""``mdexport study``: measure the quality of what a bundle makes under many samplers."""

import contextlib
import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mdexport.study import Progress, Store, load_judge, measure, sign
from mdexport.study_plans import default_plans, read_plans
from mdruntime.bundle import Bundle, open_bundle
from mdruntime.manifest import Manifest
from mdruntime.pipeline import Pipeline
from mdruntime.records import to_json
from mdruntime.runner import Runner
from mdruntime.study import Study, StudyRow, chosen, pareto
from mdruntime.text import TextPipeline

__all__ = ["study_command", "table"]

_PATH = click.Path(path_type=Path)
_WIDTH = 38  # of a sampler's name


@click.command("study")
@click.argument("bundle", type=_PATH)
@click.option("--judge", required=True, metavar="FILE.py:NAME", help="what says how good it is")
@click.option("--plans", type=_PATH, metavar="FILE.json", help="samplers  [a grid around presets]")
@click.option("--samples", type=click.IntRange(1), default=620, show_default=True, help="a seed")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="how many")
@click.option("--batch-size", type=click.IntRange(1), default=62, show_default=True)
@click.option("--threads", type=click.IntRange(0), default=0, help="of the CPU  [all]")
@click.option("--store", type=_PATH, metavar="FILE.json", help="results  [BUNDLE.runs.json]")
@click.option("--keep-presets", is_flag=True, help="leave fast, balanced and best as they are")
@click.option("--json", "as_json", is_flag=True, help="print JSON lines")
def study_command(bundle: Path, **options: Any) -> None:
    """Measure samplers of a BUNDLE and write the quality table into it.

    The judge is a callable of a Python file. It returns an object with a text measure, the score
    that is the quality (smaller is better), and a method score(samples, labels) that returns
    numbers by name. Results are kept as they come: an interrupted study goes on where it was.
    The presets fast, balanced (default) and best become samplers of the table.
    """
    opened = open_bundle(bundle)
    plans = default_plans(opened.manifest)
    if options["plans"] is not None:
        plans = read_plans(options["plans"], opened.manifest)
    judge = load_judge(options["judge"])  # last, since judges may train something first
    path = options["store"] or _beside(bundle)
    store = Store(path, opened.manifest, judge.measure, options["samples"])
    say = _json_line if options["as_json"] else _line
    with contextlib.closing(Runner(opened, threads=options["threads"])) as runner, _kept(store):
        pipeline = Pipeline(runner) if opened.manifest.text is None else TextPipeline(runner)
        for progress in measure(
            pipeline,
            judge,
            plans,
            store,
            samples=options["samples"],
            seeds=range(options["seeds"]),
            batch_size=options["batch_size"],
        ):
            say(progress)
    study = store.study(plans)
    manifest = sign(opened, study, presets=not options["keep_presets"])
    _say_done(opened, manifest, study, options)


def _beside(bundle: Path) -> Path:
    folder = bundle.resolve()
    return folder.with_name(f"{folder.name}.runs.json")


@contextlib.contextmanager
def _kept(store: Store) -> Any:
    """Say where an interrupted study goes on."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"results so far are in {store.path}; the same command goes on", err=True)
        raise


def _line(progress: Progress) -> None:
    if progress.seconds is not None:
        head = f"[{progress.run}/{progress.runs}] seed {progress.seed}, {progress.name}"
        click.echo(f"{head:58} {progress.quality:10.5g} {progress.seconds:7.1f} s")


def _json_line(progress: Progress) -> None:
    if progress.seconds is not None:
        click.echo(json.dumps(to_json(progress)))


def _say_done(bundle: Bundle, manifest: Manifest, study: Study, options: Mapping[str, Any]) -> None:
    rows = {} if options["keep_presets"] else chosen(study.rows)
    if options["as_json"]:
        presets = {name: row.name for name, row in rows.items()}
        facts = {"bundle": str(bundle.folder), "study": to_json(study), "presets": presets}
        click.echo(json.dumps(facts))
        return
    click.echo(f"\n{manifest.name}, {manifest.precision}: {manifest.weights.summary}")
    click.echo(table(study))
    for name, row in rows.items():
        click.echo(f"preset {name + (' (default)' if name == 'balanced' else ''):18} {row.name}")
    target = shlex.quote(str(bundle.folder))
    click.echo(f"the table is in {bundle.folder}. Next:\n  mdruntime tune {target} --budget 200ms")


def table(study: Study) -> str:
    """Return the quality table as text of at most 80 columns, cheapest sampler first."""
    front = {row.name for row in pareto(study.rows)}
    rows = sorted(study.rows, key=lambda row: (row.cost, row.quality))
    counts = [row.samples for row in rows]
    samples = " to ".join(map(str, sorted({min(counts), max(counts)})))
    return "\n".join(
        [
            f"  {'sampler':{_WIDTH}}{'passes':>7}{'cost':>8}  {study.measure[:22]:>11}",
            *(_row(row, "*" if row.name in front else " ") for row in rows),
            "* no other is both cheaper and better. Cost: in full passes, of one sample.",
            f"Smaller is better; mean and 95 % interval over the seeds of {samples} samples.",
        ]
    )


def _row(row: StudyRow, mark: str) -> str:
    name = row.name if len(row.name) < _WIDTH else row.name[: _WIDTH - 2] + "…"
    spread = "one seed" if row.seeds == 1 else f"± {_short((row.high - row.low) / 2)}"
    numbers = f"{row.passes:7.1f}{row.cost:8.2f}  {row.quality:>11.5g} {spread:>10}"
    return f"{mark} {name:{_WIDTH}}{numbers}"


def _short(value: float) -> str:
    """Return a number with two digits that count."""
    digits = 1 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(digits, 0), 6)}f}" if value < 1e5 else f"{value:.1e}"
