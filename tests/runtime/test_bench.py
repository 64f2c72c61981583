"""``mdruntime bench``: times that are known, found again, and what is said about them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdruntime.bench import NOISY, bench
from mdruntime.bundle import Bundle, open_bundle
from mdruntime.ceiling import Ceiling
from mdruntime.cli import main
from mdruntime.errors import SamplingError
from mdruntime.generation import time_batches, time_samplings
from mdruntime.head import Draws
from mdruntime.probe import pipeline_of, request_of
from mdruntime.runner import Runner
from mdruntime.sampling import Sampling
from mdruntime.session import Feeds, Outputs

Capture = pytest.CaptureFixture[str]
Fake = Callable[..., tuple[Runner, Any]]
CEILING = Ceiling(gigaflops=100.0, gigabytes=10.0, threads=1)


@pytest.fixture(scope="module")
def bundle(digits_bundle: Path) -> Bundle:
    return open_bundle(digits_bundle, check=False)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither measure the machine, which takes seconds, nor let others disturb the tests."""
    monkeypatch.setattr("mdruntime.cli_bench.measure_ceiling", lambda _: CEILING)
    monkeypatch.setattr("mdruntime.bench.read_ticks", lambda: (0, 0))
    monkeypatch.setattr("mdruntime.bench.read_waits", dict)


def test_a_sample_takes_its_passes_and_its_decoding(bundle: Bundle, fake_device: Fake) -> None:
    runner, device = fake_device(bundle, column_ms=0.0)
    samplings = {name: Sampling(rounds=int(name)) for name in ("2", "5")}
    for batch in (1, 3):
        times = time_samplings(runner, samplings, batch=batch, repeats=4, clock=device.clock)
        for name, repeats in times.items():
            full = device.start_ms / batch + 65 * device.row_ms
            assert len(repeats) >= 4
            assert repeats == pytest.approx([int(name) * full + device.decoder_ms] * len(repeats))


def test_samplers_that_are_the_same_run_once(bundle: Bundle, fake_device: Fake) -> None:
    runner, device = fake_device(bundle)
    same = Sampling(rounds=3)
    times = time_samplings(
        runner, {"a": same, "b": same.but(rounds=2), "c": same}, repeats=2, clock=device.clock
    )
    assert len(device.ran) == (len(times["a"]) + 1) * (3 + 2)
    assert times["a"] == times["c"] != times["b"]


def test_passes_are_listed_by_rows_with_and_without_guidance(
    bundle: Bundle, fake_device: Fake
) -> None:
    runner, device = fake_device(bundle)
    found = bench(runner, ["published", "fast"], batch=2, repeats=3, clock=device.clock)
    rows = {rows for rows in bundle.manifest.buckets if rows < 0.8 * 64} | {1, 65}
    assert {(each.rows, each.guided) for each in found.passes} == {
        (size, guided) for size in rows for guided in (False, True)
    }
    for each in found.passes:
        columns = max(2, min(each.rows, 64))  # never one alone
        sequences = 4 if each.guided else 2
        ms = device.start_ms + device.row_ms * sequences * each.rows
        assert each.ms == pytest.approx(ms + device.column_ms * 2 * columns)
    assert list(found.presets) == ["published", "fast"]
    for spread in found.presets.values():
        assert spread.repeats == 3
        assert spread.minimum_ms == pytest.approx(spread.median_ms)
        assert spread.p90_ms == pytest.approx(spread.median_ms)
    assert not found.noisy
    with pytest.raises(SamplingError, match="preset must be one of"):
        bench(runner, ["quick"], clock=device.clock)


def test_a_disturbed_machine_is_noticed(
    bundle: Bundle, fake_device: Fake, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    runner, device = fake_device(bundle)
    turns = iter(range(10**6))

    def disturbed() -> float:
        device.now += 0.2 * (next(turns) % 4 == 0)
        return float(device.now)

    found = bench(runner, ["fast"], repeats=10, clock=disturbed)
    assert found.noise > NOISY
    assert found.noisy
    monkeypatch.setattr("mdruntime.cli_bench.bench", lambda *_, **__: found)
    assert main(["bench", str(bundle.folder)]) == 0
    assert f"noisy: slow repeats took {found.noise:.0%} more" in capsys.readouterr().out


def test_the_first_sample_is_that_of_the_default_preset(bundle: Bundle, fake_device: Fake) -> None:
    runner, device = fake_device(bundle)
    found = bench(runner, ["published"], batch=3, repeats=1, load_ms=250, clock=device.clock)
    rounds = runner.sampling("default", {}).rounds
    first, second = device.ran[0], device.ran[rounds]
    assert (first[1], second[1]) == (65, 65)  # a full pass each: the sample's, and the next one's
    sample_ms = sum(
        device.start_ms + device.row_ms * sequences * rows + device.column_ms * columns
        for sequences, rows, columns in device.ran[:rounds]
    )
    assert first[0] <= 2  # one sample, however many run together later
    assert found.first_ms == pytest.approx(250 + sample_ms + device.decoder_ms)


def test_batches_are_timed_whole(bundle: Bundle, fake_device: Fake) -> None:
    runner, device = fake_device(bundle, column_ms=0.0)
    found = time_batches(runner, Sampling(rounds=3), [1, 4], repeats=3, clock=device.clock)
    assert [each.batch for each in found] == [1, 4]
    for each in found:
        ms = (
            3 * (device.start_ms + each.batch * 65 * device.row_ms) + each.batch * device.decoder_ms
        )
        assert each.ms == pytest.approx(ms)
        assert each.per_second == pytest.approx(1000 * each.batch / ms)
        assert each.repeats >= 3


def test_batches_are_of_the_first_preset(bundle: Bundle, fake_device: Fake) -> None:
    runner, device = fake_device(bundle)
    for names, first in ((["fast", "best"], "fast"), ([], "default")):
        found = bench(runner, names, repeats=1, batches=[1, 2], clock=device.clock)
        assert [each.batch for each in found.batches] == [1, 2]
        assert found.batches[0].ms == pytest.approx(found.presets[first].median_ms)
    assert bench(runner, ["fast"], repeats=1, clock=device.clock).batches == ()


def test_bytes_that_cross_are_those_of_feeds_and_draws(bundle: Bundle, fake_device: Fake) -> None:
    runner, device = fake_device(bundle)
    found = bench(runner, ["fast"], batch=2, repeats=2, clock=device.clock).presets["fast"].copied
    assert found is not None
    assert found.passes == runner.sampling("fast", {}).rounds
    counted = runner.counted()
    request: dict[str, Any] = {**request_of(bundle.manifest, 2), "preset": "fast"}
    pipeline_of(runner).generate(**request, batch_size=2)
    up = down = 0
    for shape in counted.shapes:
        cells = shape.samples * shape.columns
        # Tokens, positions and columns; six numbers of each sample; uniforms. All of four bytes.
        up += shape.sequences * (2 * shape.rows + shape.columns) + 6 * shape.samples + cells
        down += len(Draws._fields) * cells
    assert (found.to_passes, found.from_passes) == (4 * up, 4 * down)
    assert found.others == 2 * (64 * 4 + 8 * 8 * 3)  # ids to the decoder, pixels from it
    assert found.caches == 0


def test_caches_that_cross_are_noticed(bundle: Bundle, fake_device: Fake) -> None:
    before, after = bundle.manifest.graphs["denoiser"].caches[0]
    runner, device = fake_device(bundle)
    run = device.run

    def leaking(feeds: Feeds, fetch: Sequence[str]) -> Outputs:
        found: Outputs = run(feeds, fetch)
        return {**found, after: np.zeros(100, np.float32)} if "positions" in feeds else found

    device.run = leaking
    found = bench(runner, ["fast"], repeats=1, clock=device.clock).presets["fast"].copied
    assert found is not None
    assert before != after
    assert found.caches == found.passes * 400


def test_stolen_time_counts_as_noise(
    bundle: Bundle, fake_device: Fake, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    runner, device = fake_device(bundle)
    for stolen, noisy in ((40, False), (60, True)):
        ticks = iter([(5, 100), (5 + stolen, 1100)])
        monkeypatch.setattr("mdruntime.bench.read_ticks", lambda ticks=ticks: next(ticks))
        found = bench(runner, ["fast"], repeats=2, clock=device.clock)
        assert found.steal == pytest.approx(stolen / 1000)
        assert (found.noise <= NOISY, found.noisy) == (True, noisy)
    monkeypatch.setattr("mdruntime.cli_bench.bench", lambda *_, **__: found)
    assert main(["bench", str(bundle.folder), "--no-roofline"]) == 0
    out = capsys.readouterr().out
    assert "6.0% stolen by the host" in out
    assert "noisy: the host gave 6% of the cores' time to others (over 5%)" in out
    assert "slow repeats" not in out


def test_text_is_measured_on_canvases_of_the_models_length(
    small_bundle: Callable[[str], Path], fake_device: Fake
) -> None:
    runner, device = fake_device(open_bundle(small_bundle("mdlm"), check=False))
    found = bench(runner, repeats=1, clock=device.clock)
    assert set(found.presets) == set(runner.manifest.presets)
    assert {each.guided for each in found.passes} == {False}
    assert found.decoder_ms == 0
    assert all(
        each.copied is not None and not each.copied.others for each in found.presets.values()
    )
    assert all(spread.median_ms > 0 for spread in found.presets.values())


def test_the_command_prints_a_table_and_json(digits_bundle: Path, capsys: Capture) -> None:
    common = ["bench", str(digits_bundle), "--repeats", "1", "--threads", "1"]
    assert main([*common, "--operators", "--batches", "1, 3,1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert max(map(len, lines[1:])) <= 80  # the first one names the weights
    for start in (
        "  device ",
        "  provider   cpu, 1 thread",
        "  versions   onnxruntime",
        "  noise ",
        "full, 65",
        "1  ",
        "3  ",
        "of peak: NumPy's float32 products at 100 GFLOP/s; ",
        "operators, 65 rows ",
        "MatMul ",
        "between operators ",
        "products are ",
        "operators, 16 rows ",
    ):
        assert any(line.startswith(start) for line in lines), start
    for preset in ("default", "published", "fast", "balanced", "best"):
        assert sum(line.startswith(f"{preset} ") for line in lines) == 2
        assert any(line.startswith(f"{preset} ") and line.endswith(" 0") for line in lines)
    assert any(", first image after " in line for line in lines)
    assert main([*common, "--presets", "fast, best", "--batch-size", "2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts["presets"]) == ["fast", "best"]
    assert facts["batch"] == 2
    assert 0 < facts["load_ms"] < facts["first_ms"]
    assert facts["roofline"]["ceiling"] == {"gigaflops": 100.0, "gigabytes": 10.0, "threads": 1}
    assert facts["roofline"]["passes"][0]["rows"] == 65
    assert facts["roofline"]["operators"] == facts["batches"] == []
    assert facts["machine"]["threads"] == 1
    assert {"onnxruntime", "numpy", "python"} <= set(facts["machine"]["versions"])
    assert 0 < facts["presets"]["fast"]["minimum_ms"] <= facts["presets"]["fast"]["median_ms"]


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        ("--presets quick", 2, "preset must be one of default"),
        ("--repeats 0", 2, "repeats must be between 1 and 4096, got 0"),
        ("--batch-size 0", 2, "batch_size must be between 1 and 4096, got 0"),
        ("--threads 100000", 2, "threads must be between"),
        ("--batches 1,x", 2, "--batches takes numbers between 1 and 4096, got 'x'; write them"),
        ("--batches 0", 2, "got '0'; write them with commas between them, such as --batches 1,2,4"),
        ("--batches 1,,2", 2, "got ''"),
        ("--batches 4097", 2, "got '4097'"),
        ("--operators --provider cuda", 4, "--operators is for provider 'cpu', got 'cuda'; leave"),
        ("--provider abacus", 4, "provider must be one of"),
    ],
)
def test_bad_requests_get_one_line(
    digits_bundle: Path, capsys: Capture, flags: str, code: int, text: str
) -> None:
    assert main(["bench", str(digits_bundle), *flags.split()]) == code
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert text in err


def test_the_machine_is_left_out_where_that_is_asked_for(
    digits_bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> Ceiling:
        raise AssertionError("the machine was measured")

    monkeypatch.setattr("mdruntime.cli_bench.measure_ceiling", never)
    common = ["bench", str(digits_bundle), "--repeats", "1", "--presets", "fast"]
    assert main([*common, "--no-roofline", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["roofline"] is None
    assert main([*common, "--no-roofline", "--operators"]) == 2
    assert "leave out one of the two" in capsys.readouterr().err
