"""Two benchmarks side by side."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mdruntime.bench import Bench, Copied, PassTime, Spread
from mdruntime.ceiling import Ceiling
from mdruntime.cli import main
from mdruntime.cli_compare import read_bench
from mdruntime.generation import BatchTime
from mdruntime.machine import Machine
from mdruntime.records import to_json
from mdruntime.roofline import Operator, PassProfile, PassWork, Roofline

Capture = pytest.CaptureFixture[str]


def made(scale: float = 1.0, **changes: Any) -> Bench:
    machine = Machine("Abacus", "cpu", 2, {"onnxruntime": "1.32.0"}, "2026-11-24")
    spread = Spread(80 * scale, 70 * scale, 90 * scale, 7, 60 * scale, 10 * scale, 10 * scale)
    found = Bench(
        model="digits",
        precision="fp32",
        weights="trained",
        machine=machine,
        batch=1,
        load_ms=100,
        passes=(PassTime(65, False, 8 * scale), PassTime(1, True, 2 * scale)),
        condition_ms=0,
        decoder_ms=3,
        presets={"fast": spread},
        peak_mb=100,
        noise=0.1,
    )
    return replace(found, **changes)


def kept(path: Path, bench: Bench) -> str:
    path.write_text(json.dumps({**to_json(bench), "noisy": bench.noisy}), encoding="utf-8")
    return str(path)


def test_ratios_are_of_what_both_have(tmp_path: Path, capsys: Capture) -> None:
    files = [kept(tmp_path / "a.json", made()), kept(tmp_path / "b.json", made(0.5))]
    assert main(["bench", "--compare", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {line[:32].strip(): line[32:].split() for line in lines}
    assert cells["pass, 65 rows"] == ["8.00", "4.00", "2.00"]
    assert cells["pass, 1 row, guided"] == ["2.00", "1.00", "2.00"]
    assert cells["preset fast"] == ["80.00", "40.00", "2.00"]
    assert cells["condition"] == ["0.00", "0.00", "-"]
    assert cells["load"][-1] == "1.00"
    assert max(map(len, lines)) <= 80


def test_what_else_differs_is_said(tmp_path: Path, capsys: Capture) -> None:
    other = made(precision="int8", batch=4, noise=0.5)
    files = [kept(tmp_path / "a.json", made()), kept(tmp_path / "b.json", other)]
    assert main(["bench", "--compare", *files]) == 0
    out = capsys.readouterr().out
    assert "precision  fp32  ->  int8\n" in out
    assert "batch      1  ->  4\n" in out
    assert "device" not in out
    assert out.splitlines()[-1].startswith("noisy: ")


def test_files_of_before_and_after_new_measurements_can_be_compared(
    tmp_path: Path, capsys: Capture
) -> None:
    new = made(0.5, first_ms=400, steal=0.2, batches=(BatchTime(1, 40, 7), BatchTime(4, 120, 7)))
    data = to_json(made())
    for name in ("first_ms", "steal", "batches", "roofline"):
        del data[name]
    del data["presets"]["fast"]["copied"]
    old = tmp_path / "old.json"
    old.write_text(json.dumps(data), encoding="utf-8")
    files = [kept(tmp_path / "new.json", new), str(old)]
    assert main(["bench", "--compare", *reversed(files)]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {line[:32].strip(): line[32:].split() for line in lines}
    assert cells["preset fast"] == ["80.00", "40.00", "2.00"]
    assert "first sample" not in cells
    assert not any(name.startswith("batch of") for name in cells)
    assert lines[-1].startswith("noisy: ")
    assert main(["bench", "--compare", files[0], files[0]]) == 0
    out = capsys.readouterr().out
    cells = {line[:32].strip(): line[32:].split() for line in out.splitlines()}
    assert cells["first sample"] == ["400.00", "400.00", "1.00"]
    assert cells["batch of 4"] == ["120.00", "120.00", "1.00"]


def test_rooflines_and_operators_survive_the_file(tmp_path: Path) -> None:
    operators = (PassProfile(65, 2.0, (Operator("MatMul", 3, 1.5, 0.1, True),)),)
    found = Roofline(Ceiling(100, 10, 2), (PassWork(65, 0.1, 2.5, ("Conv",)),), operators)
    copied = Copied(8, 1000, 500, 640, 0)
    spread = replace(made().presets["fast"], copied=copied)
    bench = made(roofline=found, presets={"fast": spread})
    assert read_bench(Path(kept(tmp_path / "a.json", bench))) == bench


def test_what_is_no_benchmark_is_refused(tmp_path: Path, capsys: Capture) -> None:
    good, bad = kept(tmp_path / "a.json", made()), tmp_path / "b.json"
    for text in ("", "[]", "{}", '{"model": 1}'):
        bad.write_text(text, encoding="utf-8")
        assert main(["bench", "--compare", good, str(bad)]) == 1
        err = capsys.readouterr().err
        assert f"{str(bad)!r} is no benchmark (" in err
        assert err.endswith("make one with: mdruntime bench BUNDLE --json > b.json\n")
    assert main(["bench", "--compare", good, str(tmp_path / "c.json")]) == 1
    assert main(["bench"]) == 2
    assert main(["bench", str(tmp_path), "--compare", good, good]) == 2
    assert "either a bundle, or --compare" in capsys.readouterr().err
