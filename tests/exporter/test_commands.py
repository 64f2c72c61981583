"""The command line of the workstation: bad input, interrupts, and checking a port."""

import errno
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mdzoo
from mdexport.cli import _run
from mdzoo.maskgit import MaskGIT, MaskGITConfig, to_published
from mdzoo.synthetic import golden_weights, toks

SMALL = MaskGITConfig(grid=4, codebook=32, classes=10, width=64, depth=2, heads=4, hidden=128)

Check = Callable[..., str]


@pytest.fixture
def fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Check:
    """Return a function that runs a command which must fail with one line and leave no folder."""
    monkeypatch.chdir(tmp_path)

    def run(code: int, *arguments: str) -> str:
        before = sorted(path.name for path in tmp_path.iterdir())
        assert _run(arguments) == code
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return err

    return run


def save(path: Path, state: Mapping[str, Tensor], prefix: str = "") -> Path:
    named = {prefix + key: tensor for key, tensor in state.items()}
    torch.save({"iter": 1, "model_state_dict": named, "optimizer_state_dict": {}}, path)
    return path


def small_state() -> dict[str, Tensor]:
    state = to_published(MaskGIT(SMALL).state_dict())
    golden_weights(cast(nn.Module, SimpleNamespace(named_parameters=state.items)))
    return state


def record(path: Path, checkpoint: Path, columns: int = 33, **changes: Any) -> Path:
    """Write what the original code would have recorded."""
    settings = {"heads": 4, "codebook": 32}
    sources = mdzoo.Sources(checkpoint=checkpoint, settings=settings)
    model = mdzoo.load_denoiser(mdzoo.CATALOGUE["maskgit256"], sources)
    tokens, labels = toks(16, 32, 32).repeat(3, 1), torch.tensor([3, -1, 9])
    with torch.no_grad():
        logits = model(tokens, labels).numpy()[..., :columns]
    arrays = {"tokens": tokens.numpy(), "labels": labels.numpy(), "logits": logits, **changes}
    np.savez(path, allow_pickle=False, **{n: a for n, a in arrays.items() if a is not None})
    return path


def test_an_unknown_model_is_met_with_the_nearest_name(fails: Check) -> None:
    assert "did you mean 'maskgit256'" in fails(2, "build", "--model", "maskgit265")


def test_missing_files_are_named_with_where_they_are_published(fails: Check) -> None:
    err = fails(2, "build", "--model", "maskgit256")
    assert "MaskGIT_ImageNet_256.pth" in err
    assert "VQGAN/last.ckpt" in err
    assert "--random-weights 0" in err


def test_an_existing_folder_is_not_touched(fails: Check, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "exists" in fails(2, "build", "--model", "digits", "-o", "out")
    (tmp_path / "other.partial").mkdir()
    assert "another build is running" in fails(2, "build", "--model", "digits", "-o", "other")


class _Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def damaged(path: Path, kind: str) -> None:
    if kind == "absent":
        return
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"model_state_dict": _Command()}))
        return
    state = small_state()
    if kind == "architecture":
        state = {"conv1.weight": torch.zeros(2, 2)}
    if kind == "shape":
        state["pos_emb"] = torch.zeros(1, 18, 64)
    save(path, state)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-5000])


DAMAGE = [
    ("absent", "does not exist"),
    ("pickle", "posix.system"),
    ("architecture", "'tok_emb.weight'"),
    ("shape", "got 18 positions"),
    ("truncated", "damaged or foreign"),
]


@pytest.mark.parametrize("tokenizer", ["--tokenizer", "--vqgan"])
@pytest.mark.parametrize(("kind", "text"), DAMAGE)
def test_a_bad_checkpoint_is_refused_by_name(
    fails: Check, tmp_path: Path, kind: str, text: str, tokenizer: str
) -> None:
    damaged(tmp_path / "weights.pth", kind)
    files = ["--checkpoint", "weights.pth", tokenizer, "weights.pth"]
    sizes = ["--set", "heads=4", "--set", "classes=10"]
    err = fails(1, "build", "--model", "maskgit256", *files, *sizes)
    assert text in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("setting", ["heads", "heads=four", "=4"])
def test_malformed_settings_are_refused(fails: Check, setting: str) -> None:
    err = fails(2, "build", "--model", "digits", "--set", setting)
    assert "must have the form name=number" in err


def test_a_full_disk_is_told_before_the_work(fails: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=1 << 30, used=1 << 30, free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    err = fails(6, "build", "--model", "digits", "-o", "out")
    assert "1 MiB are free" in err


def test_a_disk_that_fills_up_leaves_nothing(fails: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys.modules["mdexport.build"], "write_passes", full)
    assert "No space left" in fails(6, "build", "--model", "digits", "-o", "out")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_cleans_up(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "mdexport", "build", "--model", "digits", "-o", "out"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        until = time.monotonic() + 60
        while not (tmp_path / "out.partial").exists() and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "mdexport: interrupted"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("columns", [32, 33])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    "settings", [["--set", "heads=4"], ["--set", "heads=4", "--set", "classes=10"]]
)
def test_a_right_port_passes(
    tmp_path: Path, columns: int, prefix: str, settings: list[str]
) -> None:
    checkpoint = save(tmp_path / "w.pth", small_state(), prefix)
    recording = record(tmp_path / "r.npz", checkpoint, columns)
    files = ["--checkpoint", str(checkpoint), "--against", str(recording)]
    assert _run(["verify", "--model", "maskgit256", *files, *settings]) == 0


def test_a_wrong_port_fails_unless_the_tolerance_allows_it(
    fails: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save(tmp_path / "w.pth", small_state())
    recording = record(tmp_path / "r.npz", checkpoint)
    logits = dict(np.load(recording))["logits"]
    logits[1, 2, 3] += 0.01
    arguments = ["verify", "--model", "maskgit256", "--checkpoint", "w.pth", "--set", "heads=4"]
    record(recording, checkpoint, logits=logits)
    assert "does not compute" in fails(3, *arguments, "--against", "r.npz")
    record(recording, checkpoint, logits=logits, tolerance=np.float64(0.02))
    assert _run([*arguments, "--against", str(recording)]) == 0
    assert "(1, 2, 3)" in capsys.readouterr().out
    logits[0, 0, 0] = np.nan
    record(recording, checkpoint, logits=logits, tolerance=np.float64(0.02))
    fails(3, *arguments, "--against", "r.npz")


MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"labels": np.array([3, 10, 0])}, "labels must be -1 to 9"),
    ({"labels": None}, "lacks labels"),
    ({"tokens": np.zeros((3, 4, 5), np.int64)}, "must hold tokens"),
    ({"tokens": np.zeros((3, 15), np.int64)}, "must hold tokens"),
]


@pytest.mark.parametrize(("changes", "text"), MISFITS)
def test_a_recording_that_does_not_fit_is_refused(
    fails: Check, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    checkpoint = save(tmp_path / "w.pth", small_state())
    record(tmp_path / "r.npz", checkpoint, **changes)
    files = ["--checkpoint", "w.pth", "--against", "r.npz", "--set", "heads=4"]
    assert text in fails(2, "verify", "--model", "maskgit256", *files)


def test_list_and_doctor_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["list"]) == 0
    short = capsys.readouterr().out
    assert re.search(r"^maskgit256 +174\.2 M  MaskGIT of valeoai", short, re.MULTILINE)
    assert _run(["list", "maskgit256"]) == 0
    assert "174.2 M parameters: fp32 697 MB" in capsys.readouterr().out
    assert _run(["list", "--long"]) == 0
    assert capsys.readouterr().out.count(" M parameters: fp32 ") == len(short.splitlines()) - 1
    assert _run(["doctor"]) == 0
    assert "onnxruntime" in capsys.readouterr().out
