"""Where the time of a sample goes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import mdruntime
from mdruntime.bench import bench
from mdruntime.bundle import open_bundle
from mdruntime.machine import peak_mb
from mdruntime.pipeline import Pipeline
from mdruntime.runner import Runner
from mdruntime.session import Feeds, FunctionSession, Outputs, Session
from mdruntime.sessions import Sessions
from mdruntime.watch import WatchedBackend


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_each_graph_has_its_time() -> None:
    clock = Clock()

    def opened(graph: str) -> Session:
        def work(feeds: object) -> dict[str, np.ndarray]:
            clock.now += {"denoiser": 0.25, "decoder": 0.5}[graph]
            return {"y": np.zeros(1)}

        return FunctionSession(work)

    backend = WatchedBackend(Sessions("function", opened), clock)
    for graph in ("denoiser", "decoder", "denoiser"):
        session = backend.session(graph)
        session.start(4)
        session.run({}, ["y"])
        clock.now += 10
    spent = {graph: (each.runs, each.ms) for graph, each in backend.spent.items()}
    assert spent == {"denoiser": (2, 500), "decoder": (1, 500)}
    twin = backend.clone()
    twin.session("decoder").run({}, ["y"])
    assert (twin.spent["decoder"].ms, backend.spent["decoder"].ms) == (500, 500)
    assert (twin.provider, twin.notes, list(twin.spent)) == ("function", [], ["decoder"])
    backend.session("denoiser").clone().run({}, ["y"])
    assert backend.spent["denoiser"].ms == 500


def test_bytes_of_sessions_that_count_none_are_those_handed_over() -> None:
    def double(feeds: Feeds) -> dict[str, np.ndarray]:
        return {"y": np.zeros((2, *feeds["x"].shape), np.float32), "z": np.zeros(9)}

    backend = WatchedBackend(Sessions("function", lambda _: FunctionSession(double)))
    for rows in (3, 5):
        backend.session("denoiser").run({"x": np.zeros(rows, np.int32)}, ["y"])
    spent = backend.spent["denoiser"]
    assert (spent.runs, spent.sent, spent.fetched) == (2, 4 * 8, 2 * 4 * 8)
    assert spent.tensors == {"x": 4 * 8, "y": 2 * 4 * 8}  # what was not fetched is not counted


def test_bytes_of_sessions_that_count_are_their_own() -> None:
    class Steady(FunctionSession):
        uploaded = 100

        def run(self, feeds: Feeds, fetch: Sequence[str]) -> Outputs:
            self.uploaded += 8
            return super().run(feeds, fetch)

    steady = Steady(lambda _: {"y": np.zeros(1)})
    backend = WatchedBackend(Sessions("function", lambda _: steady))
    for _ in range(3):
        backend.session("denoiser").run({"x": np.zeros(1000)}, ["y"])
    assert backend.spent["denoiser"].sent == 24


def test_a_watched_runner_draws_the_same(digits_bundle: Path) -> None:
    bundle = open_bundle(digits_bundle, check=False)
    runner = Runner(bundle)
    spent = runner.watched()
    assert runner.watched() is spent
    with Pipeline(runner) as pipeline, mdruntime.load(digits_bundle, check=False) as plain:
        assert np.array_equal(pipeline.generate([3], seed=1), plain.generate([3], seed=1))
    assert set(spent) == {"denoiser", "decoder"}


def test_parts_of_a_sample_add_up(digits_bundle: Path) -> None:
    runner = Runner(open_bundle(digits_bundle, check=False))
    found = bench(runner, ["fast", "best"], batch=2, repeats=3)
    runner.close()
    for spread in found.presets.values():
        whole = spread.denoiser_ms + spread.images_ms + spread.host_ms
        assert spread.denoiser_ms > 0 < spread.images_ms
        assert spread.minimum_ms <= whole * (1 + 1e-9)
        assert whole <= spread.p90_ms * 3
    assert 10 < found.peak_mb == pytest.approx(peak_mb(), rel=0.5)
