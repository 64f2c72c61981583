"""``mdexport bench``: PyTorch under the runtime's samplers computes the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mdruntime
import mdzoo
from mdexport.bench import AGAIN, ORIGINAL, gigaflop, race, times_as_fast, weight_shapes
from mdexport.cli import _run
from mdexport.rivals import TorchBackend, original_image
from mdruntime.bundle import Bundle, open_bundle
from mdruntime.pipeline import Pipeline
from mdruntime.runner import Runner
from mdruntime.sampling import Sampling

Capture = pytest.CaptureFixture[str]
PUBLISHED = Sampling(order="maskgit", rounds=5, guidance=1.5, guidance_schedule="linear")


@pytest.fixture(scope="module")
def model() -> Any:
    return mdzoo.load(mdzoo.CATALOGUE["digits"], mdzoo.Sources())


@pytest.fixture(scope="module")
def bundle(digits_bundle: Path) -> Bundle:
    return open_bundle(digits_bundle, check=False)


@pytest.mark.parametrize("order", ["moment", "halton"])
def test_pytorch_draws_what_the_runtime_draws(bundle: Bundle, model: Any, order: str) -> None:
    options: dict[str, Any] = {"seed": 5, "order": order, "rounds": 4, "substeps": 2}
    backend = TorchBackend(model)
    with (
        Pipeline(Runner.over(bundle, backend)) as torch_pipeline,
        mdruntime.load(bundle.folder) as pipeline,
    ):
        found = torch_pipeline.generate([1, 4, 7], guidance=1.0, **options)
        assert np.array_equal(found, pipeline.generate([1, 4, 7], guidance=1.0, **options))
    assert backend.notes == []
    assert backend.clone().session("denoiser").clone().provider == "torch"


class Counting:
    """A denoiser that remembers what it was asked."""

    def __init__(self, denoiser: Any) -> None:
        self.spec, self._denoiser = denoiser.spec, denoiser
        self.hidden: list[list[int]] = []

    def __call__(self, tokens: torch.Tensor, labels: torch.Tensor) -> Any:
        assert labels.tolist() in ([6, -1], [6])
        self.hidden.append((tokens == self.spec.mask_token).sum(dim=1).tolist())
        return self._denoiser(tokens, labels)


class Counted:
    """A model whose denoiser counts."""

    def __init__(self, model: Any) -> None:
        self.denoiser, self.decoder = Counting(model.denoiser), model.decoder


def test_the_original_way_runs_whole_canvases_with_and_without_the_class(model: Any) -> None:
    counted: Any = Counted(model)
    image = original_image(counted, 6, PUBLISHED, 0)
    assert image.shape == (8, 8, 3)
    assert image.dtype == np.uint8
    # Cosine over 64 tokens in 5 rounds: floor(64 cos(pi/2 i/5)).
    assert counted.denoiser.hidden == [[left, left] for left in (64, 60, 51, 37, 19)]
    assert np.array_equal(image, original_image(counted, 6, PUBLISHED, 0))
    assert not np.array_equal(image, original_image(counted, 6, PUBLISHED, 1))
    counted.denoiser.hidden.clear()
    original_image(counted, 6, PUBLISHED.but(guidance=0.0), 0)
    assert [len(rows) for rows in counted.denoiser.hidden] == [1] * 5


def test_the_original_way_draws_digits(model: Any) -> None:
    def middle(digit: int) -> float:
        images = [original_image(model, digit, PUBLISHED, seed) for seed in range(6)]
        return float(np.mean(images, axis=(0, 3))[3:5, 3:5].mean())

    hollow, filled = middle(0), middle(1)  # a zero is hollow, a one is not
    assert hollow < 60 < 120 < filled


def test_arithmetic_is_counted_as_pytorch_counts_it(bundle: Bundle, model: Any) -> None:
    spec = model.denoiser.spec
    tokens = torch.zeros(1, spec.length, dtype=torch.int32)
    # It counts attention only where that is spelled out.
    attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), attention:
        model.denoiser(tokens, torch.zeros(1, dtype=torch.int32))
    shapes = weight_shapes(bundle.path("denoiser"))
    found = gigaflop(shapes, bundle.manifest.graphs["denoiser"], spec, spec.canvas)
    assert found == pytest.approx(counter.get_total_flops() / 1e9, rel=0.05)
    part = gigaflop(shapes, bundle.manifest.graphs["denoiser"], spec, 8)
    assert part == pytest.approx(found * 8 / spec.canvas)


def test_all_contestants_run_the_same_passes(bundle: Bundle, model: Any) -> None:
    runners = {"ours": Runner(bundle), "torch": Runner.over(bundle, TorchBackend(model))}
    presets = {"published": ["ours", "torch", ORIGINAL], "fast": ["ours"]}
    keeping = {"ours": Runner(bundle, first_pass_mb=8)}
    found = race(
        runners, model, rows=[8], presets=presets, keeping=keeping, repeats=1, image_repeats=2
    )
    assert set(found.passes) == {(guided, rows) for guided in (False, True) for rows in (65, 8)}
    assert all(set(times) == {"ours", "torch"} for times in found.passes.values())
    again = {f"{name}{AGAIN}": ["ours"] for name in presets}
    assert {name: list(times) for name, times in found.images.items()} == presets | again
    assert keeping["ours"].first_passes.hits >= 2  # in every turn that counts
    assert not any(runner.first_passes.hits for runner in runners.values())
    assert set(found.products) == set(found.gigaflop) == {65, 8}
    repeats = [some for times in found.passes.values() for some in times.values()]
    assert all(min(some) > 0 for some in repeats)
    assert len({len(some) for some in repeats}) == 1  # turn by turn


def test_ratios_are_those_of_one_turn() -> None:
    machine = np.array([1.0, 1.5, 1.5, 1.0, 1.5])  # how slow it was in each turn
    assert times_as_fast((4 * machine).tolist(), (10 * machine).tolist()) == pytest.approx(2.5)
    assert times_as_fast([2.0, 2.0, 9.0], [6.0, 6.0, 6.0]) == pytest.approx(3)


def test_the_table_fits_a_terminal_and_machines_get_all(bundle: Bundle, capsys: Capture) -> None:
    command = ["bench", str(bundle.folder), "--repeats", "1", "--images", "1", "--rows", "8"]
    assert _run(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines[1:])
    assert any(line.startswith("partial, 8 rows, guided") for line in lines)
    assert any(line.startswith("preset published") for line in lines)
    assert _run([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["samples"]["published"][ORIGINAL]["median"] > 0
    assert facts["machine"]["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("rows", ["0", "8,x", "-1"])
def test_bad_rows_are_refused(bundle: Bundle, rows: str, capsys: Capture) -> None:
    assert _run(["bench", str(bundle.folder), "--rows", rows]) == 2
    assert f"--rows must be numbers from 1 to 64 such as 8,64, got {rows!r}" in (
        capsys.readouterr().err
    )
