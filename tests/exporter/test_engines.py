"""``mdexport build`` goes on with engines where TensorRT and a GPU are, or says why not."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mdexport.cli import _build_engines, cli
from tests import standin

Capture = pytest.CaptureFixture[str]


def test_without_tensorrt_one_line_says_so(
    digits_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not _build_engines(digits_bundle, int8=False, as_json=False)
    assert capsys.readouterr().out == (
        "no engines: TensorRT is not installed here; 'mdruntime build' makes them on the device\n"
    )
    assert not _build_engines(digits_bundle, int8=False, as_json=True)
    assert json.loads(capsys.readouterr().out) == {
        "engines": None,
        "reason": "TensorRT is not installed here",
    }


def test_without_a_gpu_it_is_no_failure(
    digits_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for name, value in standin.environment(devices=0).items():
        monkeypatch.setenv(name, value)
    assert not _build_engines(digits_bundle, int8=False, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("no engines: cudaGetDeviceCount failed with ")
    assert not (digits_bundle / "engines").exists()


def test_where_there_are_both_engines_are_built(
    altered: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    trap = tmp_path / "trap"
    trap.mkdir()
    (trap / "torch.py").write_text("raise SystemExit('torch was imported in the builder')\n")
    for name, value in standin.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{trap}{os.pathsep}{os.environ['PYTHONPATH']}")
    folder = altered()
    assert _build_engines(folder, int8=False, as_json=False)
    assert capsys.readouterr().out.splitlines()[-1].startswith("verified on this device: engines/")
    assert len(list((folder / "engines").glob("*/denoiser.plan"))) == 1


def test_engines_can_be_left_out() -> None:
    flags = {flag for option in cli.commands["build"].params for flag in option.opts}
    assert "--no-engines" in flags
