"""``mdruntime build`` in processes of its own, which meet the stand-ins for TensorRT and CUDA."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mdruntime import cli, cli_build
from mdruntime.cli import main
from mdruntime.errors import MdruntimeError, ProviderError
from mdruntime.trt import launch as launching
from mdruntime.trt.identity import BuildOptions
from mdruntime.trt.launch import launch
from mdruntime.trt.steps import Progress
from mdruntime.trt.store import ENGINES
from tests import standin

Capture = pytest.CaptureFixture[str]
TRAP = "raise SystemExit('torch was imported where it must not be')\n"


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Return a function that says what stand-ins child processes meet; torch is a trap there."""

    def say(**options: object) -> None:
        trap = tmp_path / "trap"
        trap.mkdir(exist_ok=True)
        (trap / "torch.py").write_text(TRAP)
        for name, value in standin.environment(**options).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PYTHONPATH", f"{trap}{os.pathsep}{os.environ['PYTHONPATH']}")

    return say


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Return a function that makes a child's ``import tensorrt`` run some text."""

    def say(text: str) -> None:
        (tmp_path / "module").mkdir(exist_ok=True)
        (tmp_path / "module" / "tensorrt.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "module"))

    return say


def test_a_bundle_is_built_without_torch_and_refused_by_another_machine(
    altered: Callable[[], Path],
    children: Callable[..., None],
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    children()
    folder = altered()
    assert main(["build", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("digits, fp32: ")
    assert [line.split()[1] for line in lines if line.startswith("[") and " s  " in line] == [
        "device",
        "denoiser",
        "decoder",
        "encoder",
        "verify",
    ]
    assert all(len(line) <= 80 for line in lines[1:-1])  # the last one has a path
    assert re.fullmatch(r"verified on this device: engines/trt10\S+ \(\d\.\d MB\)", lines[-3])
    assert lines[-2:] == ["Next:", f"  mdruntime bench {folder} --provider tensorrt"]
    # Once more there is nothing to do, and --json says where it is.
    assert main(["build", str(folder), "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["step"] for answer in answers[:-1]] == ["device", "engines"]
    assert Path(answers[-1]["engines"]).is_dir()
    assert answers[-1]["identity"]["gpu"] == "Stand-in Orin, 8 GiB"
    # It runs here, and what differs elsewhere is said with the command that mends it.
    machine = standin.install(monkeypatch)
    assert main(["verify", str(folder), "--provider", "tensorrt"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "verified"
    machine.check()
    standin.install(monkeypatch, version="10.7.0", runtime=(12, 4))
    assert main(["verify", str(folder), "--provider", "tensorrt"]) == 5
    err = capsys.readouterr().err
    assert "tensorrt is 10.7.0 here and was 10.3.0 there; cuda is 12.4 here and was 12.6" in err
    assert f"for this machine with: mdruntime build {folder} (" in err
    assert err.count("\n") == 1


def test_a_failed_build_is_one_line_and_its_exit_code(
    altered: Callable[[], Path], children: Callable[..., None], capsys: Capture
) -> None:
    folder = altered()
    children(unimplemented=True)
    assert main(["build", str(folder)]) == 6
    err = capsys.readouterr().err
    assert err.startswith("mdruntime: out of memory: building the plan of 'denoiser' ran out of ")
    assert err.count("\n") == 1
    log = (folder / ENGINES / "failed.log").read_text()
    assert "ERROR: [defaultAllocator.cpp] Error Code 1: Cuda Runtime (out of memory)" in log
    children(memory=300 << 20)
    assert main(["build", str(folder)]) == 6
    assert "--batch-size" not in capsys.readouterr().err
    assert [path.name for path in (folder / ENGINES).iterdir()] == ["failed.log"]


def test_ctrl_c_ends_the_builder_and_leaves_nothing(
    altered: Callable[[], Path], children: Callable[..., None]
) -> None:
    folder = altered()
    children(build_seconds=120)
    # What runs in a shell's background ignores interrupts, and so would all that it starts.
    command = [
        "env",
        "--default-signal=INT",
        sys.executable,
        "-m",
        "mdruntime",
        "build",
        str(folder),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "device" not in process.stdout.readline():
        pass
    deadline = time.monotonic() + 60
    while not (builders := list(_children_of(process.pid))) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (130, "mdruntime: interrupted\n")
    assert time.monotonic() - began < 100
    assert builders
    assert not any(Path(f"/proc/{pid}").exists() for pid in builders)
    assert not (folder / ENGINES).exists()


def _children_of(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def test_without_tensorrt_the_cure_is_said(
    altered: Callable[[], Path], tensorrt: Callable[[str], None], capsys: Capture
) -> None:
    tensorrt("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    folder = altered()
    assert main(["build", str(folder)]) == 4
    err = capsys.readouterr().err
    assert "TensorRT cannot be loaded (libnvinfer.so.10" in err
    assert "install it with: " in err
    assert not (folder / ENGINES).exists()


def test_an_exporter_goes_on_without_engines_and_says_why(
    digits_bundle: Path, monkeypatch: pytest.MonkeyPatch, tensorrt: Callable[[str], None]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = cli_build.build_here(digits_bundle, BuildOptions(), as_json=False)
    assert found == "TensorRT is not installed here"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    tensorrt("raise ImportError('no libnvinfer')")
    found = cli_build.build_here(digits_bundle, BuildOptions(), as_json=True)
    assert found.startswith("TensorRT cannot be loaded (no libnvinfer); ")
    assert not (digits_bundle / ENGINES).exists()


def test_a_builder_that_dies_is_explained(tensorrt: Callable[[str], None], tmp_path: Path) -> None:
    request, log = {"task": "probe", "data": {}}, tmp_path / "log"
    for text, error, words in (
        ("import os; os.kill(os.getpid(), 9)", MemoryError, "the system killed the process"),
        ("import os; os.abort()", MdruntimeError, "ended with signal 6"),
        ("raise SystemExit(7)", MdruntimeError, "ended with exit code 7"),
        ("import ctypes.no_such", ProviderError, "cannot be loaded|is missing"),
        ("x = 1 / 0", MdruntimeError, "exit code 1: ZeroDivisionError: division by zero"),
    ):
        tensorrt(text)
        with pytest.raises(error, match=words):
            list(launch(request, log))


def test_what_a_library_prints_goes_to_the_log(
    tensorrt: Callable[[str], None], tmp_path: Path
) -> None:
    tensorrt("import os; os.write(1, b'{a line of a library\\n'); raise ImportError('x')")
    with pytest.raises(ProviderError):
        list(launch({"task": "probe", "data": {}}, tmp_path / "log"))
    assert (tmp_path / "log").read_text() == "{a line of a library\n"


def test_a_task_that_does_not_give_up_is_ended(
    tensorrt: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(launching, "_TICK_S", 0.05)
    tensorrt(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(os.getpid(), file=sys.stderr, flush=True)\n"
        "time.sleep(300)\n"
    )
    log = tmp_path / "log"
    events = launch({"task": "probe", "data": {}}, log)
    while not (log.exists() and log.read_text().endswith("\n")):
        assert next(events) == {}  # a tick
    events.close()
    assert not Path(f"/proc/{log.read_text().strip()}").exists()


def test_lines_are_of_80_columns_and_far_between(capsys: Capture) -> None:
    lines = cli_build._Lines(verbose=True)
    phase = "a phase of the builder whose name is much longer than any line of a terminal may be"
    lines(Progress(2, 5, "denoiser", "6 min last time"))
    for second in range(1, 9):  # no time passes meanwhile, so that nothing is worth a line
        lines(Progress(2, 5, "denoiser", phase, float(second), second / 10, 100.0))
    lines.said -= 11
    lines(Progress(2, 5, "denoiser", phase, 130.0, 0.46, 150.0))
    detail = "12.3 MB; " + ", ".join(f"{number} layers" for number in range(20))
    lines(Progress(2, 5, "denoiser", detail, 412.0, 1.0, 0.0, done=True))
    lines.close()
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "[2/5] denoiser     6 min last time"
    assert out[1].startswith("[2/5] denoiser      46%, 2 min, about 2 min left, a phase of the")
    assert out[2].startswith("[2/5] denoiser       412.0 s  12.3 MB; 0 layers, 1 layers,")
    assert all(len(line) <= 80 for line in out)
    assert all(line.startswith(" " * 30) for line in out[3:])


def test_a_terminal_sees_one_line_that_changes(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    lines = cli_build._Lines()
    lines(Progress(1, 5, "device"))
    lines(Progress(1, 5, "device", "a phase", 3.0, 0.5, 3.0))
    lines.close()
    assert capsys.readouterr().out == (
        "[1/5] device\r\033[K[1/5] device        50%, 3 s, about 3 s left\n"
    )


def test_numbers_out_of_range_are_usage_errors(digits_bundle: Path, capsys: Capture) -> None:
    for flags in (["--max-batch", "0"], ["--optimisation-level", "9"], ["--workspace", "-1"]):
        assert cli.main(["build", str(digits_bundle), *flags]) == 2
        assert f"{flags[0][2:].replace('-', '_')} must be between" in capsys.readouterr().err
