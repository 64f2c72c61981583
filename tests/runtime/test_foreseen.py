"""Passes that are foreseen are those that run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mdruntime
from mdruntime.errors import SamplingError
from mdruntime.passes import PassShape, cost, foreseen
from mdruntime.plan import make_plan, pass_rows
from mdruntime.sampling import Sampling
from mdruntime.schedule import hidden_counts

SAMPLINGS: list[dict[str, Any]] = [
    {"order": "maskgit"},
    {"order": "moment", "substeps": 3},
    {"order": "moment", "substeps": 3, "refresh": "recent", "refresh_interval": 2},
    {"order": "maskgit-exact", "substeps": 2},
    {"order": "halton-1d", "refresh_interval": 4},
    {"order": "hybrid", "exploration": (1.0, 0.0)},
    {"order": "entropy", "schedule": "arccos", "tokens": "tempered"},
    {"order": "vanilla", "schedule": "ancestral"},
]
GUIDED: list[dict[str, Any]] = [
    {},
    {"guidance": 1.5},
    {"guidance": 1.5, "guidance_interval": (0.4, 1.0)},
    {"guidance": 1.5, "guidance_schedule": "linear", "substeps": 2},
]


@pytest.mark.parametrize("options", SAMPLINGS, ids=lambda options: options["order"])
def test_passes_of_images_are_those_foreseen(digits_bundle: Path, options: dict[str, Any]) -> None:
    with mdruntime.load(digits_bundle, check=False, first_pass_mb=0) as pipeline:
        counted = pipeline.counted()
        for guided in GUIDED:
            if "substeps" in guided and options["order"] == "maskgit":
                continue
            sampling = Sampling(**{"rounds": 5, **options, **guided})
            for batch in (1, 3):
                counted.shapes.clear()
                pipeline.generate([2] * batch, preset="default", **fields(sampling))
                assert counted.shapes == foreseen(pipeline.manifest, sampling, batch=batch)


@pytest.mark.parametrize("length", [0, 20])
@pytest.mark.parametrize("options", SAMPLINGS, ids=lambda options: options["order"])
def test_passes_of_texts_are_those_foreseen(
    small_bundle: Callable[[str], Path], options: dict[str, Any], length: int
) -> None:
    with mdruntime.load_text(small_bundle("mdlm"), check=False, first_pass_mb=0) as pipeline:
        counted = pipeline.counted()
        sampling = Sampling(**{"rounds": 5, "guidance": 1.0, **options})
        for batch in (1, 2):
            counted.shapes.clear()
            pipeline.generate(count=batch, length=length, **fields(sampling))
            found = foreseen(pipeline.manifest, sampling, batch=batch, length=length)
            assert counted.shapes == found
            assert found[0].canvas == (length or pipeline.manifest.denoiser.canvas)


@pytest.mark.parametrize("family", ["maskgit", "titok", "maskbit"])
def test_passes_of_other_layouts_are_those_foreseen(
    small_bundle: Callable[[str], Path], family: str
) -> None:
    with mdruntime.load(small_bundle(family), check=False, first_pass_mb=0) as pipeline:
        counted, slots = pipeline.counted(), pipeline.manifest.denoiser.slots
        sampling = Sampling(rounds=4, order="moment", substeps=2, guidance=1.0)
        pipeline.generate([1, 1], **fields(sampling))
        found = foreseen(pipeline.manifest, sampling, batch=2)
        if slots == 1:
            assert counted.shapes == found
        # Where tokens share rows, it depends on the tokens chosen how many rows they stand in.
        for real, expected in zip(counted.shapes, found, strict=True):
            assert replace(real, rows=0, columns=0) == replace(expected, rows=0, columns=0)
            assert real.full == expected.full
            assert expected.rows / slots <= real.rows <= expected.rows * slots


def fields(sampling: Sampling) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in Sampling.__dataclass_fields__}


def test_the_cost_is_in_full_passes_and_counts_guidance_twice(digits_bundle: Path) -> None:
    manifest = mdruntime.open_bundle(digits_bundle, check=False).manifest
    plain = Sampling(rounds=7, order="moment")
    assert cost(foreseen(manifest, plain), 1) == 7
    assert cost(foreseen(manifest, plain, batch=3), 3) == 7
    assert cost(foreseen(manifest, plain.but(guidance=1.0)), 1) == 14
    cached = plain.but(substeps=2)
    plan = make_plan(64, hidden_counts("cosine", 7, 64), substeps=2)
    rows = sum(pass_rows(plan, "chosen", 65))
    assert cost(foreseen(manifest, cached), 1) == pytest.approx(rows / 65)
    assert cost([PassShape(2, 4, 5, 1, 10), PassShape(2, 2, 10, 1, 10)], 2) == 2


def test_an_entropy_bound_is_not_foreseen(digits_bundle: Path) -> None:
    manifest = mdruntime.open_bundle(digits_bundle, check=False).manifest
    with pytest.raises(SamplingError, match="depends on the model: count them as they run"):
        foreseen(manifest, Sampling(order="entropy", entropy_bound=1.0))
