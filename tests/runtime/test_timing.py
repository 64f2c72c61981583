"""What passes cost: found again on devices whose cost is known."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from mdruntime.bundle import Bundle, open_bundle
from mdruntime.manifest import GraphSpec, TensorSpec
from mdruntime.passes import PassShape, foreseen
from mdruntime.runner import Runner
from mdruntime.sampling import Sampling
from mdruntime.timing import interleaved, measure, noise_of

Fake = Callable[..., tuple[Runner, Any]]


@pytest.fixture(scope="module")
def bundle(digits_bundle: Path) -> Bundle:
    return open_bundle(digits_bundle, check=False)


def expected(device: Any, shape: PassShape, *, logits: bool = False) -> float:
    columns = shape.samples * shape.columns
    ms = device.start_ms + device.row_ms * shape.sequences * shape.rows
    return float(ms + (device.column_ms + device.logits_ms * logits) * columns)


def shapes_of(bundle: Bundle, batch: int, **options: Any) -> list[PassShape]:
    return foreseen(bundle.manifest, Sampling(**options), batch=batch)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_passes_of_all_sizes_are_foreseen_from_a_few(
    bundle: Bundle, fake_device: Fake, batch: int, guidance: float
) -> None:
    runner, device = fake_device(bundle)
    shapes = shapes_of(bundle, batch, rounds=6, substeps=3, guidance=guidance)
    shapes += shapes_of(bundle, batch, rounds=6, order="halton", guidance=guidance)
    needed = [(shape, logits) for shape, logits in product(shapes, (False, True))]
    costs = measure(runner, needed, batch=batch, repeats=3, clock=device.clock)
    for shape, logits in needed:
        ms = costs.passes_ms([shape], logits=logits)
        assert ms == pytest.approx(expected(device, shape, logits=logits))
    assert len({size[1:] for size in device.ran}) < len({(s.rows, s.columns) for s in shapes})
    assert costs.passes_ms(shapes) == pytest.approx(sum(expected(device, s) for s in shapes))
    assert costs.decoder_ms == pytest.approx(device.decoder_ms)
    assert costs.condition_ms == 0
    assert costs.noise == pytest.approx(0, abs=1e-6)


def test_batches_that_shrink_are_interpolated(bundle: Bundle, fake_device: Fake) -> None:
    runner, device = fake_device(bundle)
    shapes = shapes_of(bundle, 6, rounds=40, schedule="ancestral", order="vanilla")
    assert len({shape.samples for shape in shapes}) > 2
    costs = measure(runner, [(s, False) for s in shapes], batch=6, repeats=1, clock=device.clock)
    for shape in shapes:
        assert costs.passes_ms([shape]) == pytest.approx(expected(device, shape))


def test_only_what_is_needed_is_measured(bundle: Bundle, fake_device: Fake) -> None:
    for guidance in (0.0, 1.0):
        runner, device = fake_device(bundle)
        needed = [(shape, False) for shape in shapes_of(bundle, 2, rounds=4, guidance=guidance)]
        measure(runner, needed, batch=2, repeats=1, clock=device.clock)
        assert {size[:2] for size in device.ran} == {(4 if guidance else 2, 65)}


def test_text_is_timed_too(small_bundle: Callable[[str], Path], fake_device: Fake) -> None:
    bundle = open_bundle(small_bundle("mdlm"), check=False)
    runner, device = fake_device(bundle)
    shapes = shapes_of(bundle, 1, rounds=4, substeps=2, order="moment")
    costs = measure(runner, [(s, False) for s in shapes], batch=1, repeats=1, clock=device.clock)
    assert costs.passes_ms(shapes) == pytest.approx(sum(expected(device, s) for s in shapes))
    assert costs.decoder_ms == 0  # no graph runs


def test_what_is_computed_once_is_timed_once(bundle: Bundle, fake_device: Fake) -> None:
    graph = GraphSpec(
        file="denoiser.onnx",
        opset=23,
        spellings={},
        inputs=(TensorSpec("classes", "int32", ("n",)),),
        outputs=(TensorSpec("embedding", "float32", ("n", 3)),),
        caches=(),
        float32_operators=(),
    )
    manifest = replace(bundle.manifest, graphs={**bundle.manifest.graphs, "condition": graph})
    runner, device = fake_device(replace(bundle, manifest=manifest))
    (shape, *_) = shapes_of(bundle, 2, rounds=2)
    costs = measure(runner, [(shape, False)], batch=2, repeats=1, clock=device.clock)
    assert costs.condition_ms == pytest.approx(device.condition_ms)
    assert costs.passes_ms([shape]) == pytest.approx(expected(device, shape))


@pytest.mark.parametrize("family", ["maskbit", "titok"])
def test_canvases_of_other_layouts_are_timed(
    small_bundle: Callable[[str], Path], family: str
) -> None:
    """On the real graphs: that they run, with passes of the sizes that were asked for."""
    bundle = open_bundle(small_bundle(family), check=False)
    sampling = Sampling(rounds=3, substeps=2, order="moment", guidance=1.0)
    shapes = foreseen(bundle.manifest, sampling, batch=2)
    runner = Runner(bundle)
    costs = measure(runner, [(shape, False) for shape in shapes], batch=2, repeats=1)
    assert 0 < costs.passes_ms(shapes) < 60_000
    assert costs.decoder_ms > 0
    for surface in costs.surfaces.values():
        assert surface.rows[-1] == bundle.manifest.denoiser.canvas
        assert len(set(surface.rows)) == len(surface.rows)
        assert len(set(surface.columns)) == len(surface.columns)
    runner.close()


def jobs(clock: list[float], took: Sequence[float]) -> dict[str, Callable[[], float]]:
    def job(seconds: float) -> Callable[[], float]:
        def run() -> float:
            clock[0] += seconds
            return clock[0]

        return run

    return {str(index): job(seconds) for index, seconds in enumerate(took)}


def test_repeats_are_interleaved_and_the_first_turn_does_not_count() -> None:
    clock = [0.0]
    found = interleaved(jobs(clock, [1, 2]), repeats=4, seconds=1e9, clock=lambda: clock[0])
    assert found == {"0": [4, 7, 10, 13], "1": [6, 9, 12, 15]}


@pytest.mark.parametrize(("seconds", "repeats"), [(0.0, 3), (12.5, 4), (15.1, 5)])
def test_repeats_end_when_the_time_is_up_but_not_before_three(seconds: float, repeats: int) -> None:
    clock = [0.0]
    found = interleaved(jobs(clock, [3]), repeats=5, seconds=seconds, clock=lambda: clock[0])
    assert len(found["0"]) == repeats


def test_noise_is_what_slow_repeats_take_more_than_the_fastest() -> None:
    assert noise_of([[5.0, 5.0, 5.0]]) == 0
    steady, wild = [10.0] * 11, [10.0] * 9 + [15.0] * 2
    assert noise_of([wild]) == pytest.approx(0.5)
    assert noise_of([steady, wild, wild]) == pytest.approx(0.5)
    assert noise_of([steady, steady, wild]) == 0
    assert noise_of([]) == 0


@pytest.mark.parametrize(("shortest", "turns"), [(0.0, 3), (5.0, 4), (1000.0, 30)])
def test_what_is_over_in_an_instant_is_repeated_more(shortest: float, turns: int) -> None:
    now = 0.0

    def job() -> float:
        nonlocal now
        now += 1
        return now

    limits = {"repeats": 3, "seconds": 1000, "shortest": shortest}
    found = interleaved({"job": job}, **limits, clock=lambda: now)  # type: ignore[arg-type]
    assert found["job"] == [2.0 + turn for turn in range(turns)]  # the first turn does not count
