"""Passes against what the machine can do at best, and where the rest of their time goes."""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mdruntime.bundle import Bundle
from mdruntime.ceiling import Ceiling
from mdruntime.costs import Kind
from mdruntime.ort import open_ort
from mdruntime.probe import Clock, Probe
from mdruntime.profiled import Node, Run, read_profile
from mdruntime.runner import Runner
from mdruntime.session import Session, spelling_of
from mdruntime.sessions import Sessions
from mdruntime.timing import interleaved

__all__ = ["Operator", "PassProfile", "PassWork", "Roofline", "profile_passes", "roofline"]

_SMALL = 16  # rows of the partial pass whose operators are told
_SECONDS = 30  # after which no pass is profiled again


@dataclass(frozen=True, slots=True)
class PassWork:
    """What an unguided pass of the whole batch has to do at least."""

    rows: int  # of a sequence
    gigaflop: float  # of its products
    weight_mb: float  # of the weights that these read
    uncounted: tuple[str, ...]  # products whose shapes the profile does not tell


@dataclass(frozen=True, slots=True)
class Operator:
    """All of a pass that one kind of operator does."""

    name: str
    calls: int
    ms: float
    gigaflop: float  # of products; 0 where it does none
    product: bool


@dataclass(frozen=True, slots=True)
class PassProfile:
    """The operators of one pass, the fastest: whatever disturbs a machine, it only slows it."""

    rows: int  # of a sequence
    ms: float  # of the whole pass, profiling included
    operators: tuple[Operator, ...]  # the slowest first

    @property
    def between_ms(self) -> float:
        """Time of the pass in which no operator ran: ONNX Runtime's own, and the profile's."""
        return max(0.0, self.ms - sum(each.ms for each in self.operators))


@dataclass(frozen=True, slots=True)
class Roofline:
    """The machine's best, and what passes ask of it."""

    ceiling: Ceiling
    passes: tuple[PassWork, ...]  # rows falling
    operators: tuple[PassProfile, ...] = ()


def profile_passes(
    bundle: Bundle,
    *,
    threads: int = 0,
    precision: str = "",
    batch: int = 1,
    repeats: int = 1,
    clock: Clock = time.perf_counter,
) -> dict[int, list[Run]]:
    """Run unguided passes in a session of ONNX Runtime's CPU provider that keeps a profile.

    Args:
        bundle: an opened bundle; its weights are loaded once more.
        threads: CPU threads; 0 takes as many as the process may use.
        precision: one that the bundle was exported in; its own if empty.
        batch: samples that run together.
        repeats: of each pass; the first, cold one does not count.
        clock: that tells the seconds.

    Returns:
        the runs by the rows of a sequence that they recomputed, a full pass and those of buckets.
    """
    spelling, manifest = spelling_of(bundle, "cpu", precision), bundle.manifest
    with tempfile.TemporaryDirectory(prefix="mdruntime-profile-") as folder:
        options: dict[str, Any] = {"threads": threads, "spelling": spelling}
        session = open_ort(bundle, "denoiser", "cpu", profile=Path(folder), **options)

        def opened(graph: str) -> Session:
            return session if graph == "denoiser" else open_ort(bundle, graph, "cpu", **options)

        with closing(Runner.over(bundle, Sessions("cpu", opened))) as runner:
            shapes = runner.counted().shapes
            sizes = sorted({*manifest.buckets, manifest.denoiser.canvas})
            probe = Probe(runner, Kind(batch, False, False), sizes, clock)
            points = [point for point in probe.points if point[0] or point == probe.points[0]]
            jobs: dict[tuple[int, int], Callable[[], float]] = {
                point: partial(probe.ms, *point) for point in points
            }
            interleaved(jobs, repeats=repeats, seconds=_SECONDS, clock=clock)
            runs = read_profile(session.profiled())
    found: dict[int, list[Run]] = {}
    for shape, run in list(zip(shapes, runs, strict=True))[len(jobs) :]:
        found.setdefault(shape.rows, []).append(run)
    return found


def roofline(ceiling: Ceiling, runs: dict[int, list[Run]], *, operators: bool) -> Roofline:
    """Return what passes ask of a machine, and their operators if these are wanted.

    Args:
        ceiling: the machine's best.
        runs: by rows, as ``profile_passes`` returns them.
        operators: tell those of a full pass, and of one with about 16 rows.
    """
    sizes = sorted(runs, reverse=True)
    told = dict.fromkeys([sizes[0], min(sizes, key=lambda rows: abs(rows - _SMALL))])
    return Roofline(
        ceiling,
        tuple(_pass_work(rows, runs[rows][0].nodes) for rows in sizes),
        tuple(_pass_profile(rows, runs[rows]) for rows in told) if operators else (),
    )


def _pass_work(rows: int, nodes: Sequence[Node]) -> PassWork:
    works = [node.work for node in nodes if node.work is not None]
    uncounted = {node.operator for node in nodes if node.product and node.work is None}
    return PassWork(
        rows,
        sum(work.gigaflop for work in works),
        sum(work.weight_mb for work in works),
        tuple(sorted(uncounted)),
    )


def _pass_profile(rows: int, runs: Sequence[Run]) -> PassProfile:
    run = min(runs, key=lambda each: each.ms)
    kinds = sorted(_operators(run.nodes), key=lambda each: -each.ms)
    return PassProfile(rows, run.ms, tuple(kinds))


def _operators(nodes: Sequence[Node]) -> Iterable[Operator]:
    for name, calls in Counter(node.operator for node in nodes).items():
        alike = [node for node in nodes if node.operator == name]
        gigaflop = sum(node.work.gigaflop for node in alike if node.work is not None)
        yield Operator(name, calls, sum(n.ms for n in alike), gigaflop, alike[0].product)
