"""The script on growing costs: exponents that are known, and a run in a hurry."""

import re
import runpy
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mdexport
import mdruntime
import mdzoo
from mdruntime.costs import Kind
from mdruntime.passes import PassShape
from mdruntime.probe import Probe
from mdruntime.runner import Runner

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "scaling"))
import scaling
from arithmetic import arithmetic_of
from experiments import SHORT, Experiment, Line
from fit import Expected, fitted
from scaling_page import PAGE, write
from turns import in_turns

FAMILIES = runpy.run_path(str(Path(__file__).parent / "families.py"))
FAMILIES["SMALL"]["mdlm"][1]["length"] = 64
WRITER = FAMILIES["small_entry"]("mdlm")
HURRY = replace(
    SHORT,
    text="writer",
    lengths=(16, 32, 64),
    batches=(1, 2),
    rows=(1, 64),
    rounds=(4, 8),
    repeats=1,
    shortest=0,
)
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, digits_bundle: Path) -> Path:
    """A folder with bundles of the digits and of a small text model."""
    folder = tmp_path_factory.mktemp("scaling")
    (folder / "digits").symlink_to(digits_bundle)
    model = mdzoo.load(WRITER, mdzoo.Sources(random_seed=0))
    for _ in mdexport.build(model, folder / "writer", mdexport.Options()):
        pass
    return folder


@pytest.fixture
def run(bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that runs the script in a hurry and returns its page."""
    monkeypatch.setitem(mdzoo.CATALOGUE, "writer", WRITER)

    def start(*more: str) -> Path:
        options = ["--short", "--bundles", str(bundles), "--results", str(tmp_path), *more]
        assert scaling.main([*options, "--threads", "1"], HURRY) == 0
        return tmp_path / PAGE

    return start


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 0.3, 1.0, 2.0])
def test_known_exponents_are_recovered(exponent: float) -> None:
    sizes = [256, 384, 512, 768, 1024]
    exact = fitted(sizes, [3.0 * size**exponent for size in sizes])
    assert (exact.exponent, exact.last) == pytest.approx((exponent, exponent), abs=1e-9)
    assert exact.off < 1e-9
    rng = np.random.default_rng(0)
    noisy = fitted(sizes, [3.0 * size**exponent * rng.uniform(0.95, 1.05) for size in sizes])
    assert noisy.exponent == pytest.approx(exponent, abs=0.1)
    assert 0 < noisy.off < 0.1


def test_a_sum_of_powers_is_steepest_at_its_end() -> None:
    sizes = [256, 512, 1024]
    found = fitted(sizes, [size + size**2 / 1000 for size in sizes])
    assert 1 < found.exponent < found.last < 2


def test_an_exponent_is_judged_by_where_it_should_lie() -> None:
    expected = Expected(0.9, 1.1, "")
    assert expected.verdict(fitted([1, 2], [1, 2])) == "held"
    assert expected.verdict(fitted([1, 2], [1, 4])) == "failed"
    assert expected.verdict(replace(fitted([1, 2], [1, 2]), exponent=float("nan"))) == "failed"


def test_operations_are_those_that_torch_counts() -> None:
    counted = arithmetic_of(WRITER.config)
    denoiser: Any = FAMILIES["small_model"]("mdlm").denoiser
    # Attention in one operator would not be counted on a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        denoiser(torch.zeros((2, 64), dtype=torch.int64), torch.full((2,), -1))
    # The published head has a column for the mask token as well.
    extra = 2 * 2 * 64 * counted.width
    assert counted.flops(PassShape(2, 2, 64, 64, 64)) + extra == counter.get_total_flops()


def test_a_job_that_takes_long_runs_once_and_a_short_one_goes_on() -> None:
    ran = list[str]()

    def job(name: str, ms: float) -> Callable[[], float]:
        def once() -> float:
            ran.append(name)
            return ms + (len(ran) == 1)

        return once

    jobs = {"usual": job("usual", 600), "long": job("long", 5000), "short": job("short", 90)}
    told = list[str]()
    found = in_turns(jobs, repeats=2, shortest=0.4, longest=4, tell=told.append)
    assert ran == ["usual", "long", "short", *["usual", "short"] * 2, "short", "short"]
    assert found == {"usual": [600] * 2, "long": [5000], "short": [90] * 4}
    assert "long: 5000.0 ms" in told


def test_known_times_have_their_exponents_in_the_page(tmp_path: Path) -> None:
    sizes = (1, 4, 16)
    line = Line(
        "half steps",
        Expected(0.4, 0.6, "it is a root"),
        sizes,
        tuple((size**0.5, 3 * size**0.5, 2 * size**0.5) for size in sizes),
        tuple(map(float, sizes)),
    )
    said = list(write(tmp_path, "context", [Experiment("walk", "steps", "walker", (line,))]))
    page = (tmp_path / PAGE).read_text()
    row = "| steps | half steps | 1 to 16 | 0.50 | 0.50 | 0% | 1.00 | 0.4 to 0.6 | held |"
    assert row in page
    assert "| 16 | 8 (3, 3.00) |" in page
    assert "- steps, half steps: it is a root." in page
    assert said[0].endswith("0.50  expected 0.4 to 0.6: held")
    assert max(map(len, said[:-1])) <= 80


def test_a_probe_makes_passes_over_the_canvas_that_was_asked_for(bundles: Path) -> None:
    runner = Runner(mdruntime.open_bundle(bundles / "writer"), "cpu", threads=1)
    counted = runner.counted()
    for length in (0, 16, 128):
        probe = Probe(runner, Kind(1, False, False), (), lambda: 0.0, length=length)
        probe.ms(0, 3)
        probe.ms(4, 2)
    runner.close()
    assert [(shape.rows, shape.columns, shape.canvas) for shape in counted.shapes] == [
        *((64, 3, 64), (4, 2, 64)),
        *((16, 3, 16), (4, 2, 16)),
        *((128, 3, 128), (4, 2, 128)),
    ]


def test_a_run_in_a_hurry_writes_page_and_charts(run: Callable[..., Path], capsys: Capture) -> None:
    path = run()
    page = path.read_text()
    assert "examples/scaling/scaling.py --short" in page
    assert "1 thread(s), onnxruntime" in page
    assert "nothing here is a result" in page
    assert "`small-mdlm`, random weights of seed 0, fp32." in page
    head = "what grows | what is timed | sizes | exponent | at the end | off the line | arithmetic"
    assert f"| {head} | expected | verdict |" in page
    rows = re.findall(
        r"^\|.* \| (\S+) \| (\S+) \| (\S+)% \| (\S+) \| .* (held|failed) \|$", page, re.M
    )
    assert len(rows) == 9
    assert np.isfinite(np.array([row[:4] for row in rows], float)).all()
    times = re.findall(r" ([\d.e+-]+) \(\d+", page.partition("## ")[2])
    assert len(times) == 3 * 3 + 2 * 2 + 2 + 2 * 3
    assert min(map(float, times)) > 0
    for name in scaling.EXPERIMENTS:
        assert page.count(f"(scaling-{name}.svg)") == 1
        ET.parse(path.parent / f"scaling-{name}.svg")
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"wrote {path}"
    assert "length: turn 1 of 1: 9 of 9 measured again" in said
    assert max(map(len, said[:-1])) <= 80


def test_full_passes_are_counted_in_proportion_to_rounds_and_shared_ones_less(
    run: Callable[..., Path],
) -> None:
    page = run("--only", "rounds").read_text()
    counted = re.findall(r" \| (\S+) \| \S+ to \S+ \| \w+ \|$", page, re.M)
    full, shared, fixed = map(float, counted)
    assert full == pytest.approx(1, abs=0.1)
    assert shared < 0.6
    assert fixed < 0.6
    assert "scaling-length.svg" not in page


def test_what_cannot_be_run_is_said(tmp_path: Path, capfd: Capture) -> None:
    plan = replace(HURRY, images="no-such-model")
    options = ["--only", "rows", "--bundles", str(tmp_path), "--results", str(tmp_path)]
    assert scaling.main(options, plan) != 0
    assert "no bundle of 'no-such-model'" in capfd.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        scaling.main(["--threads", "-1"])
