"""``mdruntime bench``: times that are known, found again, and what is said about them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mdruntime.bench import NOISY, bench
from mdruntime.bundle import Bundle, open_bundle
from mdruntime.cli import main
from mdruntime.errors import SamplingError
from mdruntime.generation import time_samplings
from mdruntime.runner import Runner
from mdruntime.sampling import Sampling

Capture = pytest.CaptureFixture[str]
Fake = Callable[..., tuple[Runner, Any]]


@pytest.fixture(scope="module")
def bundle(digits_bundle: Path) -> Bundle:
    return open_bundle(digits_bundle, check=False)


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
        columns = min(each.rows, 64)
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


def test_text_is_measured_on_canvases_of_the_models_length(
    small_bundle: Callable[[str], Path], fake_device: Fake
) -> None:
    runner, device = fake_device(open_bundle(small_bundle("mdlm"), check=False))
    found = bench(runner, repeats=1, clock=device.clock)
    assert set(found.presets) == set(runner.manifest.presets)
    assert {each.guided for each in found.passes} == {False}
    assert found.decoder_ms == 0
    assert all(spread.median_ms > 0 for spread in found.presets.values())


def test_the_command_prints_a_table_and_json(digits_bundle: Path, capsys: Capture) -> None:
    common = ["bench", str(digits_bundle), "--repeats", "1", "--threads", "1"]
    assert main(common) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert max(map(len, lines[1:])) <= 80  # the first one names the weights
    for start in (
        "  device ",
        "  provider   cpu, 1 thread",
        "  versions   onnxruntime",
        "full, 65",
    ):
        assert any(line.startswith(start) for line in lines), start
    for preset in ("default", "published", "fast", "balanced", "best"):
        assert any(line.startswith(f"{preset} ") for line in lines)
    assert main([*common, "--presets", "fast, best", "--batch-size", "2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts["presets"]) == ["fast", "best"]
    assert facts["batch"] == 2
    assert facts["load_ms"] > 0
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
