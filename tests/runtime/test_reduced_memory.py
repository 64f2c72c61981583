"""Where memory is short, one large graph is in memory at a time, and all results stay the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mdruntime
from mdruntime.cli import main
from mdruntime.ort_open import _SHARED
from mdruntime.runner import Runner
from mdruntime.session import open_backend

LARGE = ("denoiser", "decoder", "encoder")
CACHED: dict[str, Any] = {"order": "halton", "refresh_interval": 4, "rounds": 8}


def held(folder: Path) -> set[str]:
    """Return which large graphs of a bundle are in this process's memory."""
    keys: list[Any] = list(_SHARED)
    paths = [path for _, (_, path, *_) in keys]
    found = {path.stem for path in paths if path.parent == folder.resolve()}
    return found & set(LARGE)


@pytest.fixture
def small(digits_bundle: Path) -> mdruntime.Pipeline:
    return mdruntime.load(digits_bundle, check=False, threads=1, reduce_memory=True)


@pytest.fixture
def usual(digits_bundle: Path) -> mdruntime.Pipeline:
    return mdruntime.load(digits_bundle, check=False, threads=2)


@pytest.fixture
def altered_folder(altered: Callable[[], Path]) -> Path:
    """A copy of the digits' bundle, which nothing else has in memory."""
    return altered()


def test_graphs_take_turns_and_images_stay_the_same(
    usual: mdruntime.Pipeline, altered_folder: Path
) -> None:
    with mdruntime.load(altered_folder, check=False, reduce_memory=True) as pipeline:
        assert held(altered_folder) == {"denoiser"}
        for seed in range(3):
            found = pipeline.generate([3, 5, 3], seed=seed, batch_size=2, **CACHED)
            assert held(altered_folder) == set()
            expected = usual.generate([3, 5, 3], seed=seed, batch_size=2, **CACHED)
            np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(pipeline.encode(found), usual.encode(found))
        varied = pipeline.vary(found, 0.5, [3, 5, 3], seed=9)
        np.testing.assert_array_equal(varied, usual.vary(found, 0.5, [3, 5, 3], seed=9))
        assert held(altered_folder) == set()


def test_steps_keep_their_keys_and_values_while_canvases_are_looked_at(
    small: mdruntime.Pipeline, usual: mdruntime.Pipeline
) -> None:
    looked: list[Any] = []
    expected: list[Any] = []
    for pipeline, pictures in ((small, looked), (usual, expected)):
        for step in pipeline.steps([7], seed=1, **CACHED):
            pictures.append(pipeline.preview(step.tokens))
    np.testing.assert_array_equal(np.concatenate(looked), np.concatenate(expected))


def test_steps_that_were_left_do_not_keep_the_denoiser(altered_folder: Path) -> None:
    with mdruntime.load(altered_folder, check=False, reduce_memory=True) as pipeline:
        steps = pipeline.steps([7], seed=1, **CACHED)
        next(steps)
        del steps
        pipeline.decode(np.zeros((1, 64), np.int32))
        assert held(altered_folder) == set()


def test_a_generation_that_was_overtaken_is_an_error_here_too(small: mdruntime.Pipeline) -> None:
    steps = small.steps([7], seed=1, **CACHED)
    next(steps)
    small.generate([1])
    with pytest.raises(mdruntime.SamplingError, match="another generation began"):
        next(steps)


def test_clones_work_on_their_own(small: mdruntime.Pipeline, usual: mdruntime.Pipeline) -> None:
    steps = small.steps([7], seed=1, **CACHED)
    next(steps)
    twin = small.clone()
    np.testing.assert_array_equal(twin.generate([4], seed=2), usual.generate([4], seed=2))
    for step in steps:
        tokens = step.tokens
    twin.close()
    for step in usual.steps([7], seed=1, **CACHED):
        expected = step.tokens
    np.testing.assert_array_equal(tokens, expected)


def test_a_pass_over_keys_and_values_that_are_gone_is_refused(digits_bundle: Path) -> None:
    bundle = mdruntime.open_bundle(digits_bundle, check=False)
    runner = Runner(bundle, threads=1, reduce_memory=True)
    steps = mdruntime.Pipeline(runner).steps([7], seed=1, **CACHED)
    next(steps)
    runner._backend.release("denoiser")
    with pytest.raises(mdruntime.SamplingError, match="given up"):
        next(steps)
    runner.close()


def test_a_pipeline_that_was_closed_stays_so(altered_folder: Path) -> None:
    pipeline = mdruntime.load(altered_folder, check=False, reduce_memory=True)
    pipeline.generate([1])
    pipeline.close()
    with pytest.raises(mdruntime.BundleError, match="the pipeline is closed"):
        pipeline.generate([1])
    assert held(altered_folder) == set()


def test_first_passes_are_kept_over_it(digits_bundle: Path) -> None:
    options: dict[str, Any] = {"threads": 1, "check": False}
    small = mdruntime.load(digits_bundle, reduce_memory=True, first_pass_mb=8, **options)
    plain = mdruntime.load(digits_bundle, first_pass_mb=0, **options)
    for seed in range(4):
        found, expected = (one.generate([2], seed=seed, **CACHED) for one in (small, plain))
        np.testing.assert_array_equal(found, expected)
    assert small._runner.first_passes.hits == 2


def test_counts_and_sums_go_on_when_a_graph_is_loaded_again(digits_bundle: Path) -> None:
    bundle = mdruntime.open_bundle(digits_bundle, check=False)
    sums = []
    for reduce_memory in (False, True):
        runner = Runner(bundle, threads=1, reduce_memory=reduce_memory)
        spent, pipeline = runner.watched(), mdruntime.Pipeline(runner)
        counted = pipeline.counted()
        for seed in range(2):
            pipeline.generate([1], seed=seed, rounds=4)
        passes = spent["denoiser"]
        sums.append((passes.runs, passes.sent, passes.fetched, len(counted.shapes)))
        runner.close()
    assert sums[0] == sums[1]
    assert sums[0][0] == 8


def test_without_it_graphs_stay(digits_bundle: Path) -> None:
    backend = open_backend(mdruntime.open_bundle(digits_bundle, check=False), "cpu", threads=1)
    decoder, denoiser = backend.session("decoder"), backend.session("denoiser")
    backend.release("decoder")
    backend.release("denoiser")
    assert backend.session("decoder") is decoder
    decoder.run({"tokens": np.zeros((1, 64), np.int32)}, ["images"])
    assert backend.session("denoiser") is denoiser
    backend.close()


def test_a_command_that_makes_images_ends_without_the_denoiser(
    altered_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    decode = mdruntime.Pipeline.decode

    def look(pipeline: mdruntime.Pipeline, tokens: Any) -> Any:
        found = decode(pipeline, tokens)
        seen.append(held(altered_folder))
        return found

    monkeypatch.setattr(mdruntime.Pipeline, "decode", look)
    command = ["generate", str(altered_folder), "-l", "3", "--count", "3", "--batch-size", "2"]
    assert main([*command, "-o", str(tmp_path / "a.png")]) == 0
    assert seen == [set()]
    assert (
        main([*command, "-o", str(tmp_path / "b.png"), "--animate", str(tmp_path / "b.gif")]) == 0
    )
    assert seen[-1] == {"denoiser", "decoder"}
    assert (tmp_path / "a.png").read_bytes()[:8] == (tmp_path / "b.png").read_bytes()[:8]
