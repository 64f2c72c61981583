"""Pipelines of one process over one bundle hold its weights once."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import mdruntime
from mdruntime.bundle import MANIFEST
from mdruntime.manifest import dump
from mdruntime.sampling import Sampling


def opened(pipeline: mdruntime.Pipeline, graph: str = "denoiser") -> Any:
    """Return what sessions share."""
    return pipeline._runner.session(graph)._opened  # type: ignore[attr-defined]


def test_pipelines_over_one_bundle_share_its_weights(digits_bundle: Path) -> None:
    one, two = (mdruntime.load(digits_bundle, check=False) for _ in range(2))
    other = mdruntime.load(digits_bundle, check=False, threads=1 if one._runner.threads > 1 else 2)
    assert opened(one) is opened(two)
    assert opened(one, "decoder") is opened(two, "decoder")
    assert opened(one) is not opened(other)
    first = two.generate(labels=[1], seed=1)  # each has caches of its own
    steps = one.steps(labels=[2], seed=3, order="halton", refresh_interval=4)
    next(steps)
    two.generate(labels=[7], seed=2, order="moment")
    for step in steps:
        tokens = step.tokens
    again = mdruntime.load(digits_bundle, check=False)
    for step in again.steps(labels=[2], seed=3, order="halton", refresh_interval=4):
        expected = step.tokens
    np.testing.assert_array_equal(tokens, expected)
    one.close()
    np.testing.assert_array_equal(two.generate(labels=[1], seed=1), first)


def test_weights_go_with_the_last_pipeline(digits_bundle: Path) -> None:
    pipelines = [mdruntime.load(digits_bundle, check=False) for _ in range(2)]
    held = weakref.ref(opened(pipelines[0]))
    for pipeline in pipelines:
        assert held() is not None
        pipeline.close()
    gc.collect()
    assert held() is None


def test_another_build_in_the_same_place_is_another_model(altered: Callable[[], Path]) -> None:
    folder = altered()
    pipeline = mdruntime.load(folder, check=False)
    manifest = replace(pipeline.manifest, presets={"default": Sampling(rounds=3)})
    (folder / MANIFEST).write_bytes(dump(manifest))
    other = mdruntime.load(folder, check=False)
    assert opened(pipeline) is not opened(other)
