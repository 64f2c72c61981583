"""The four experiments: what grows, what is timed, and how it should grow."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from arithmetic import Arithmetic, arithmetic_of
from fit import Expected, Fit, fitted
from mdruntime import Sampling
from mdruntime.conditions import Conditions
from mdruntime.costs import Kind
from mdruntime.passes import PassShape, foreseen
from mdruntime.probe import Probe, request_of
from mdruntime.prompt import conditions_of
from mdruntime.runner import Runner
from mdzoo import CATALOGUE
from turns import Tell, in_turns

__all__ = ["FULL", "SHORT", "Experiment", "Line", "Plan", "batches", "lengths", "rounds", "rows"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run, and how often."""

    images: str  # model with a canvas of its own, for batches, rows and rounds
    text: str  # model whose canvas is free
    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    rows: tuple[int, ...]
    rounds: tuple[int, ...]
    few: int  # rows of the partial passes that canvases and batches are compared with
    repeats: int  # of each job that count
    shortest: float  # seconds before which a job goes on although they are made
    longest: float  # after which it is not run again


FULL = Plan(
    images="maskgit256",
    text="mdlm-owt",
    lengths=(256, 384, 512, 768, 1024),
    batches=(1, 2, 4, 8, 16, 32, 64),
    rows=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    rounds=(4, 8, 16, 32, 64),
    few=8,
    repeats=5,
    shortest=1,
    longest=15,
)
SHORT = Plan(
    images="digits",
    text="prose",
    lengths=(32, 64, 128),
    batches=(1, 2, 4, 8),
    rows=(1, 4, 16, 64),
    rounds=(4, 8, 16, 32),
    few=4,
    repeats=3,
    shortest=0.1,
    longest=1,
)
INTERVAL = 8  # rounds that share a full pass
FIXED = 4  # full passes, where their number stays


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that was timed at all sizes."""

    label: str
    expected: Expected
    sizes: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]  # of each size, run by run
    flops: tuple[float, ...]  # of each size

    @property
    def medians(self) -> list[float]:
        """The time at each size."""
        return [float(np.median(runs)) for runs in self.ms]

    @property
    def measured(self) -> Fit:
        """How the time grows."""
        return fitted(self.sizes, self.medians)

    @property
    def counted(self) -> Fit:
        """How the arithmetic grows."""
        return fitted(self.sizes, self.flops)


@dataclass(frozen=True, slots=True)
class Experiment:
    """What grows, in a model."""

    name: str
    grows: str  # label of an axis
    model: str  # and what its weights are
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """A time to be taken, and what is computed meanwhile."""

    ms: Callable[[], float]
    flops: float


Jobs = Mapping[str, Mapping[int, Job]]  # by label and size


def _timed(jobs: Jobs, expected: Mapping[str, Expected], plan: Plan, tell: Tell) -> Iterator[Line]:
    # Size by size, so that all lines of a size see the machine of the same moments.
    sizes = sorted({size for line in jobs.values() for size in line})
    each = {(size, label): jobs[label][size].ms for size in sizes for label in jobs}
    found = in_turns(
        each, repeats=plan.repeats, shortest=plan.shortest, longest=plan.longest, tell=tell
    )
    for label, line in jobs.items():
        yield Line(
            label,
            expected[label],
            tuple(sizes),
            tuple(tuple(found[size, label]) for size in sizes),
            tuple(line[size].flops for size in sizes),
        )


def _sizes(model: str) -> Arithmetic:
    return arithmetic_of(CATALOGUE[model].config)


def _probe(runner: Runner, batch: int, length: int = 0) -> Probe:
    """Return passes without guidance, whose logits stay in the graph."""
    return Probe(runner, Kind(batch, False, False), (), time.perf_counter, length=length)


def _told(runner: Runner) -> str:
    """Return which model was run, in Markdown."""
    manifest = runner.manifest
    seed = f" of seed {manifest.weights.seed}" if manifest.weights.seed >= 0 else ""
    return f"`{manifest.name}`, {manifest.weights.origin} weights{seed}, {manifest.precision}."


def _pass(probe: Probe, shape: PassShape, counted: Arithmetic) -> Job:
    count = 0 if shape.full else shape.rows  # a probe's name for a full pass
    return Job(partial(probe.ms, count, shape.columns), counted.flops(shape))


def lengths(runner: Runner, plan: Plan, tell: Tell) -> Experiment:
    """Time passes over canvases of several lengths."""
    some = f"{plan.few} rows"
    expected = {
        "full pass, one token drawn": Expected(
            0.95,
            2,
            "maps cost the same for every row, attention in proportion to the canvas for every "
            "row: between 1 and 2, and the nearer to 2 the longer the canvas",
        ),
        "full pass, all drawn": Expected(
            0.95, 2, "the same, and the head in proportion to the rows: a little nearer to 1"
        ),
        some: Expected(
            -0.1, 0.5, "only attention's reach grows; maps and weights stay what they are"
        ),
    }
    full, drawn, _ = expected
    counted, jobs = _sizes(plan.text), {label: dict[int, Job]() for label in expected}
    with ExitStack() as stack:
        for size in plan.lengths:
            # Caches of its own: those of another canvas would be made anew in every turn.
            probe = _probe(stack.enter_context(closing(runner.clone())), 1, size)
            for label, count, columns in (
                (full, size, 1),
                (drawn, size, size),
                (some, plan.few, plan.few),
            ):
                shape = PassShape(1, 1, count, columns, size)
                jobs[label][size] = _pass(probe, shape, counted)
        lines = tuple(_timed(jobs, expected, plan, tell))
    return Experiment("length", "tokens of the canvas", _told(runner), lines)


def batches(runner: Runner, plan: Plan, tell: Tell) -> Experiment:
    """Time passes over several samples at once."""
    some = f"{plan.few} rows"
    expected = {
        "full pass": Expected(
            0.85, 1.1, "each sample costs the same; weights are read once for all of them"
        ),
        some: Expected(
            0.3, 1.05, "reading the weights is much of the time while there are few rows in all"
        ),
    }
    full, _ = expected
    counted, canvas = _sizes(plan.images), runner.manifest.denoiser.canvas
    jobs = {label: dict[int, Job]() for label in expected}
    for size in plan.batches:
        probe = _probe(runner, size)
        for label, count, columns in ((full, canvas, 1), (some, plan.few, plan.few)):
            shape = PassShape(size, size, count, columns, canvas)
            jobs[label][size] = _pass(probe, shape, counted)
    lines = tuple(_timed(jobs, expected, plan, tell))
    return Experiment("batch", "samples in a batch", _told(runner), lines)


def rows(runner: Runner, plan: Plan, tell: Tell) -> Experiment:
    """Time partial passes over several numbers of rows."""
    expected = Expected(
        0.4, 1.05, "each row costs the same, but weights are read and operators begun for any"
    )
    counted, canvas = _sizes(plan.images), runner.manifest.denoiser.canvas
    probe, label = _probe(runner, 1), "partial pass, all its rows drawn"
    probe.ms(0, 1)  # fills the caches
    shapes = {size: PassShape(1, 1, size, size, canvas) for size in plan.rows}
    jobs = {size: _pass(probe, shape, counted) for size, shape in shapes.items()}
    lines = tuple(_timed({label: jobs}, {label: expected}, plan, tell))
    return Experiment("rows", "rows recomputed", _told(runner), lines)


def _plans(turns: int) -> dict[str, Sampling]:
    """Return the samplers of so many rounds, all of the same order."""
    base = Sampling(order="halton", rounds=turns, refresh="recent")
    return {
        "full passes only": base,
        f"a full pass every {INTERVAL} rounds": base.but(refresh_interval=INTERVAL),
        f"{FIXED} full passes": base.but(refresh_interval=max(1, turns // FIXED)),
    }


def rounds(runner: Runner, plan: Plan, tell: Tell) -> Experiment:
    """Time the tokens of whole samples, without the decoder."""
    spans = (
        Expected(0.9, 1.1, "every round is a full pass"),
        Expected(
            0,
            0.85,
            f"a full pass less than one in {INTERVAL} rounds, or one at least; all partial passes "
            "together recompute every row a few times, however many they are",
        ),
        Expected(0, 0.6, "full passes stay as many; of partial passes only the fixed part grows"),
    )
    counted = _sizes(plan.images)
    expected = dict(zip(_plans(FIXED), spans, strict=True))
    jobs = {label: dict[int, Job]() for label in expected}
    for turns in plan.rounds:
        for label, sampling in _plans(turns).items():
            flops = counted.total(foreseen(runner.manifest, sampling))
            jobs[label][turns] = Job(partial(_sample_ms, runner, sampling), flops)
    lines = tuple(_timed(jobs, expected, plan, tell))
    return Experiment("rounds", "rounds of a sample", _told(runner), lines)


def _sample_ms(runner: Runner, sampling: Sampling) -> float:
    """Return the time of one sample's tokens."""
    began = time.perf_counter()
    for _ in runner.finish(runner.blank(1), _conditions(runner), 1, asdict(sampling)):
        pass
    return 1000 * (time.perf_counter() - began)


def _conditions(runner: Runner) -> Conditions:
    request = request_of(runner.manifest, 1)
    return conditions_of(runner.bundle, request.get("labels"), request.get("prompts"), "", 1)
