"""Does cost grow as it should, with canvas, batch, rows and rounds?

Command   python examples/scaling/scaling.py                   (or: ... --short)
Time      eight minutes on 2 CPU cores that do nothing else, and four to build two models the first
          time; at most 5 GB of memory
Result    results/scaling.md and four charts beside it

Times of passes and samples of random weights, built from a seed. A straight line through the
logarithms of sizes and times has the exponent of the growth as its slope. It stands beside that of
the arithmetic at the same sizes, and beside where it should lie.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mdruntime
from mdruntime import MdruntimeError
from mdruntime.runner import Runner

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper"))
from experiments import FULL, SHORT, Experiment, Plan, batches, lengths, rounds, rows
from lab import machine
from scaling_page import write
from turns import Tell

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "scaling"


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    bundles: Path  # folder that holds a bundle of each model
    results: Path
    threads: int  # 0: all
    only: tuple[str, ...]  # experiments
    repeats: int  # 0: what the plan has
    short: bool


EXPERIMENTS: dict[str, Callable[[Runner, Plan, Tell], Experiment]] = {
    "length": lengths,
    "batch": batches,
    "rows": rows,
    "rounds": rounds,
}
_OF_TEXT = ("length",)


def options_of(argv: Sequence[str] | None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundles", type=Path, default=BUILD / "bundles", metavar="FOLDER")
    parser.add_argument("--results", type=Path, help="folder  [results beside the script]")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 takes all")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--repeats", type=int, default=0, help="of every time; for a first look")
    parser.add_argument("--short", action="store_true", help="tiny models: a first look")
    given = parser.parse_args(argv)
    if min(given.threads, given.repeats) < 0:
        parser.error("--threads and --repeats must be 0 or more")
    looking = given.short or given.repeats
    return Options(
        bundles=given.bundles,
        results=given.results or (BUILD / "short" if looking else HERE / "results"),
        threads=given.threads,
        only=tuple(given.only),
        repeats=given.repeats,
        short=given.short,
    )


def bundle(folder: Path, model: str) -> Path:
    """Return a bundle of a model with random weights, built now if there is none."""
    target = folder / model
    if not (target / "manifest.json").exists():
        options = ("--random-weights", "0", "--no-engines", "--no-encoder", "-o", str(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "mdexport", "build", "-m", model, *options]
        if subprocess.run(command, check=False).returncode:
            raise MdruntimeError(f"no bundle of {model!r} in {folder}, and none could be built")
    return target


def measured(options: Options, plan: Plan) -> list[Experiment]:
    """Run the experiments that were asked for."""
    found = []
    for name in options.only:
        folder = bundle(options.bundles, plan.text if name in _OF_TEXT else plan.images)
        opened = mdruntime.open_bundle(folder, check=False)
        runner = Runner(opened, "cpu", threads=options.threads)
        try:
            found.append(EXPERIMENTS[name](runner, plan, _teller(name)))
        finally:
            runner.close()
    return found


def _teller(name: str) -> Tell:
    return lambda line: print(f"{name}: {line}", flush=True)


def main(argv: Sequence[str] | None = None, plan: Plan | None = None) -> int:
    """Measure, write the page and its charts, and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = options_of(arguments)
    chosen = plan or (SHORT if options.short else FULL)
    if options.repeats:
        chosen = replace(chosen, repeats=options.repeats, shortest=0, longest=1)
    try:
        found = measured(options, chosen)
    except MdruntimeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    command = shlex.join(["python", "examples/scaling/scaling.py", *arguments])
    context = f"`{command}`\n({machine(options.threads)})"
    if chosen is not FULL:
        context += "\n\n**A first look: nothing here is a result.**"
    for line in write(options.results, context, found):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
