"""What the scripts share: options, bundles, runs that are kept, and pages of results."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mdruntime
from grids import Scale, label, scale_of, tuning
from mdexport.study import Judge, Store, load_judge, measure
from mdruntime import MdruntimeError, Sampling
from mdruntime.machine import this_machine
from mdruntime.study import StudyRow
from page import Section, page

__all__ = ["Lab", "Options", "Rows", "Script", "machine", "main", "options_of"]

Rows = dict[Sampling, StudyRow]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODELS = ("glyphs", "prose")
SHORT_SAMPLES = {True: 20, False: 8}  # of image models and of text models


@dataclass(frozen=True, slots=True)
class Options:
    """The options of every script."""

    models: tuple[str, ...]
    bundles: Path  # folder that holds a bundle of each model
    results: Path
    samples: int  # of every seed; 0: what suits the model
    seeds: tuple[int, ...]
    threads: int  # of the CPU; 0: all
    judge: str  # "file.py:name"; empty: the model's own
    short: bool


@dataclass(frozen=True, slots=True)
class Script:
    """A script: its question, and how it is answered."""

    name: str
    title: str
    claim: str  # what the paper says
    findings: Callable[["Lab", str], Section]  # for one model
    general: Callable[["Lab"], Section] | None = None  # without any model


class Lab:
    """Runs samplers of models, and keeps what was measured."""

    def __init__(self, options: Options) -> None:
        """Take the options; bundles and judges are made when they are first needed."""
        self.options = options
        self.short = options.short
        self.threads = options.threads
        self.results = options.results
        self._judges: dict[str, Judge] = {}
        self.results.mkdir(parents=True, exist_ok=True)

    def bundle(self, model: str) -> Path:
        """Return the folder of a model's bundle, built now if there is none."""
        folder = self.options.bundles / model
        if not (folder / "manifest.json").exists():
            command = [sys.executable, "-m", "mdexport", "build", "-m", model, "-o", str(folder)]
            folder.parent.mkdir(parents=True, exist_ok=True)
            if subprocess.run(command, check=False).returncode:
                raise MdruntimeError(
                    f"no bundle of {model!r} in {self.options.bundles}, and none could be built; "
                    f"try 'mdexport build -m {model} -o {folder}'"
                )
        return folder

    def open(self, model: str) -> mdruntime.Pipeline | mdruntime.TextPipeline:
        """Return the pipeline of a model's bundle."""
        folder = self.bundle(model)
        # What is counted and timed is a request that nobody made before.
        options: dict[str, Any] = {"threads": self.threads, "tuned": False, "first_pass_mb": 0}
        if mdruntime.open_bundle(folder, check=False).manifest.image is None:
            return mdruntime.load_text(folder, **options)
        return mdruntime.load(folder, **options)

    def scale(self, model: str) -> Scale:
        """Return the numbers that suit a model."""
        return scale_of(mdruntime.open_bundle(self.bundle(model), check=False).manifest)

    def judge(self, model: str) -> Judge:
        """Return what scores a model's samples."""
        if model not in self._judges:
            spec = self.options.judge or f"{HERE / 'judges.py'}:{model}"
            self._judges[model] = load_judge(spec)
        return self._judges[model]

    def samples(self, model: str) -> int:
        """Return how many samples of a model every seed makes."""
        scale = self.scale(model)
        if self.short and not self.options.samples:
            return SHORT_SAMPLES[scale.schedule == "cosine"]
        return self.options.samples or scale.samples

    def run(self, model: str, samplings: Iterable[Sampling]) -> Rows:
        """Return the quality of samplers; only what was never measured is run.

        Results are kept in ``results/MODEL.json``, which all scripts share.
        """
        scale, judge, samples = self.scale(model), self.judge(model), self.samples(model)
        wanted = list(dict.fromkeys(samplings))
        plans = {label(sampling): sampling for sampling in wanted}
        with self.open(model) as pipeline:
            path = self.results / f"{model}.json"
            store = Store(path, pipeline.manifest, judge.measure, samples)
            for step in measure(
                pipeline,
                judge,
                plans,
                store,
                samples=samples,
                seeds=self.options.seeds,
                batch_size=scale.batch,
            ):
                if step.quality is not None:
                    print(
                        f"{model}: {step.run} of {step.runs}, {step.name}, seed {step.seed}: "
                        f"{judge.measure} {step.quality:.4g}, {step.seconds:.1f} s",
                        flush=True,
                    )
            return dict(zip(wanted, store.study(plans).rows, strict=True))

    def base(self, model: str) -> Sampling:
        """Return what all samplers of a model share, the guidance that suits MaskGIT included."""
        scale = self.scale(model)
        found = self.run(model, tuning(scale))
        if not found:
            return scale.base
        best = min(found, key=lambda sampling: found[sampling].quality)
        return scale.base.but(guidance=best.guidance)

    def measure_of(self, model: str) -> str:
        """Return the name of a model's measure of quality."""
        return f"{self.judge(model).measure} (smaller is better)"


def options_of(doc: str | None, argv: Sequence[str]) -> Options:
    """Read a script's command line."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS), metavar="NAME")
    parser.add_argument("--bundles", type=Path, default=ROOT / "build" / "paper" / "bundles")
    parser.add_argument("--results", type=Path, help="folder  [results beside the script]")
    parser.add_argument("--samples", type=int, default=0, help="of every seed")
    parser.add_argument("--seeds", type=int, default=0, help="how many")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 takes all")
    parser.add_argument("--judge", default="", metavar="FILE.py:NAME", help="of all models")
    parser.add_argument("--short", action="store_true", help="few samples: a first look")
    given = parser.parse_args(argv)
    if min(given.samples, given.seeds, given.threads) < 0:
        parser.error("--samples, --seeds and --threads must be 0 or more")
    usual = ROOT / "build" / "paper" / "short" if given.short else HERE / "results"
    return Options(
        models=tuple(given.models),
        bundles=given.bundles,
        results=given.results or usual,
        samples=given.samples,
        seeds=tuple(range(given.seeds or (2 if given.short else 5))),
        threads=given.threads,
        judge=given.judge,
        short=given.short,
    )


def machine(threads: int) -> str:
    """Return date, processor and versions, in a line."""
    found = this_machine("cpu", threads)
    versions = ", ".join(f"{name} {number}" for name, number in found.versions.items())
    return f"{found.date}, {found.device}, {found.threads} thread(s), {versions}"


def main(script: Script, doc: str | None, argv: Sequence[str] | None = None) -> int:
    """Run a script on all models and write ``results/NAME.md``; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    lab = Lab(options_of(doc, arguments))
    try:
        sections = [script.general(lab)] if script.general is not None else []
        sections += [script.findings(lab, model) for model in lab.options.models]
    except MdruntimeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    command = shlex.join(["python", f"examples/paper/{script.name}.py", *arguments])
    context = f"`{command}`\n({machine(lab.threads)})"
    if lab.short:
        context += "\n\n**A first look with few samples: nothing here is a result.**"
    path = lab.results / f"{script.name}.md"
    page(path, script.title, script.claim, context, sections)
    for section in sections:
        print(section.title, *(verdict.line for verdict in section.verdicts), sep="\n")
    print(f"wrote {path}")
    return 0
