"""The doctor, in front of made-up machines: what it finds, and the cure it names."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from mdruntime import doctor, doctor_gpu, jetson
from mdruntime.doctor import Finding, examine
from mdruntime.errors import ProviderError

ORIN = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0"
RELEASE = "# R{} (release), REVISION: {}, GCID: 1, BOARD: generic, EABI: aarch64, DATE: today\n"
MODES = """
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
< PM_CONFIG DEFAULT=0 >
"""
DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
SYSTEM = "usr/lib/aarch64-linux-gnu"

Machine = Callable[..., Path]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Return a function from files, packages and a GPU's answer to a root folder."""

    def build(
        files: dict[str, str],
        libraries: Iterable[str] = (),
        packages: dict[str, str] | None = None,
        gpu: Any = None,
    ) -> Path:
        for name, text in {**files, **dict.fromkeys(libraries, "")}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        there = packages or {}
        monkeypatch.setattr(doctor_gpu, "installed", lambda name: there.get(name, ""))
        monkeypatch.setattr(doctor_gpu, "open_cuda", lambda: answer(gpu))
        return tmp_path

    def answer(gpu: Any) -> Any:
        if gpu is None:
            raise ProviderError("no CUDA device answers: made up")
        return gpu

    return build


class FakeGpu:
    """A device that answers."""

    runtime_version = (12, 6)
    driver_version = (12, 6)

    def name(self) -> str:
        return "Orin"

    def compute_capability(self) -> tuple[int, int]:
        return 8, 7

    def memory(self) -> tuple[int, int]:
        return 3 << 30, 8 << 30


def orin(release: str = "36", revision: str = "4.3", mode: int = 2) -> dict[str, str]:
    return {
        "proc/device-tree/model": ORIN,
        "etc/nv_tegra_release": RELEASE.format(release, revision),
        "var/lib/nvpmodel/status": f"pmode:{mode:04d} ",
        "etc/nvpmodel.conf": MODES,
    }


HEALTHY = (
    f"{SYSTEM}/libnvinfer.so.10.3.0",
    "usr/local/cuda-12.6/targets/aarch64-linux/lib/libcudart.so.12.6.68",
)


def named(root: Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(root)}


def python_is(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    monkeypatch.setattr(sys, "version_info", (*numbers, 0, "final", 0))


def test_a_board_in_order_needs_no_cure(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    python_is(monkeypatch, 3, 10)
    found = named(machine(orin(), HEALTHY, {"tensorrt": "10.3.0"}, FakeGpu()))
    assert found["board"].value == ORIN.rstrip("\0")
    assert found["jetpack"].value == (
        "6.1 or 6.2 (L4T 36.4.3): CUDA 12.6, TensorRT 10.3, Python 3.10"
    )
    assert found["power mode"].value == "MAXN_SUPER"
    assert found["tensorrt module"].value == "10.3.0"
    assert found["tensorrt library"].value.endswith("libnvinfer.so.10.3.0")
    assert "compute capability 8.7, 3.0 GiB free of 8.0 GiB, CUDA 12.6" in found["gpu"].value
    names = ("board", "jetpack", "power mode", "gpu", "cuda libraries", "tensorrt module")
    assert not any(found[name].cure for name in names)
    assert not {"tensorrt versions", "python version", "driver"} & set(found)


@pytest.mark.parametrize(
    ("release", "revision", "row", "cured"),
    [
        ("32", "7.1", "4 (L4T 32.7.1)", True),
        ("35", "4.1", "5 (L4T 35.4.1)", True),
        ("36", "2.0", "6.0 preview (L4T 36.2.0)", True),
        ("36", "3.0", "6.0 (L4T 36.3.0)", True),
        ("36", "4.7", "6.1 or 6.2 (L4T 36.4.7)", False),
        ("36", "5.0", "6.1 or 6.2 (L4T 36.5.0)", False),
        ("38", "2.1", "7.0 (L4T 38.2.1)", False),
        ("38", "4.0", "7.1 (L4T 38.4.0)", False),
        ("39", "2", "7.2 (L4T 39.2)", False),
    ],
)
def test_every_release_has_its_row(
    machine: Machine, release: str, revision: str, row: str, cured: bool
) -> None:
    finding = named(machine(orin(release, revision)))["jetpack"]
    assert finding.value.startswith(f"{row}: CUDA ")
    assert bool(finding.cure) == cured


def test_releases_nobody_knows_are_said(machine: Machine) -> None:
    finding = named(machine({"proc/device-tree/model": ORIN}))["jetpack"]
    assert finding.value == "unknown (no L4T release file)"
    assert "JetPack 6.1 or newer" in finding.cure


def test_the_rows_are_in_the_order_of_releases() -> None:
    starts = [row.since for row in jetson._RELEASES]
    assert starts == sorted(set(starts))


def test_a_slow_power_mode_is_said_with_the_command(machine: Machine) -> None:
    finding = named(machine(orin(mode=0)))["power mode"]
    assert finding.value == "15W, not the fastest (MAXN_SUPER)"
    assert "sudo nvpmodel -m 2 && sudo jetson_clocks" in finding.cure


def test_an_environment_of_another_python_is_said(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    python_is(monkeypatch, 3, 12)
    found = named(machine(orin(), HEALTHY))
    assert found["python version"].value.startswith(
        "3.12, but JetPack's TensorRT module is for 3.10"
    )
    assert "--system-site-packages" in found["python version"].cure
    assert found["tensorrt module"].value == "none"
    assert "--system-site-packages" in found["tensorrt module"].cure


def test_two_tensorrts_are_listed_and_a_module_of_neither_is_said(machine: Machine) -> None:
    libraries = (*HEALTHY, "usr/local/tensorrt-8/lib/libnvinfer.so.8.6.1")
    root = machine(orin(), libraries, {"tensorrt": "10.16.1"})
    found = [finding for finding in examine(root) if finding.name == "tensorrt library"]
    assert [Path(each.value).name for each in found] == [
        "libnvinfer.so.10.3.0",
        "libnvinfer.so.8.6.1",
    ]
    assert [bool(each.cure) for each in found] == [False, True]
    versions = named(root)["tensorrt versions"]
    assert "the module is 10.16.1" in versions.value
    assert "uninstall" in versions.cure


@pytest.mark.parametrize(
    ("version", "text"),
    [("8.6.1", "older than TensorRT 10.3"), ("12.0.1", "newer than TensorRT 11")],
)
def test_modules_out_of_range_are_said(machine: Machine, version: str, text: str) -> None:
    finding = named(machine(orin(), (), {"tensorrt": version}))["tensorrt module"]
    assert finding.value == version
    assert text in finding.cure


def test_a_workstation_without_a_working_driver(machine: Machine) -> None:
    found = named(machine({}, [f"usr/lib/x86_64-linux-gnu/{Path(HEALTHY[0]).name}"]))
    assert found["driver"].value == "none"
    assert "install NVIDIA's driver" in found["driver"].cure
    assert found["cuda libraries"].cure
    assert found["gpu"].value == "does not answer"
    assert "made up" in found["gpu"].cure
    assert not {"board", "jetpack", "power mode"} & set(found)


def test_a_workstation_in_order(machine: Machine) -> None:
    found = named(machine({"proc/driver/nvidia/version": DRIVER}, gpu=FakeGpu()))
    assert found["driver"] == Finding("driver", "550.54.15")
    assert found["gpu"].cure == ""
    assert found["tensorrt library"].cure == "python -m pip install tensorrt"


def test_a_machine_without_a_gpu_gets_one_line(machine: Machine) -> None:
    root = machine({"proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0"})
    found = list(doctor_gpu.examine_gpu(root))
    assert found == [Finding("gpu", "no NVIDIA driver: the provider is cpu")]


def test_onnx_runtimes_provider_of_another_tensorrt_is_said(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        doctor_gpu, "required_libraries", lambda: ["libnvinfer.so.10", "libnvonnxparser.so.10"]
    )
    root = machine(orin(), [f"{SYSTEM}/libnvinfer.so.11.4.0"])
    finding = named(root)["ort-tensorrt"]
    assert "needs libnvinfer.so.10, which is not here" in finding.value
    assert "'tensorrt==10.*'" in finding.cure
    assert "ort-tensorrt" not in named(machine(orin(), HEALTHY))


def test_wheels_that_overwrite_each_other_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"onnxruntime": ["onnxruntime-gpu", "onnxruntime", "onnxruntime-gpu"]}
    monkeypatch.setattr(doctor, "packages_distributions", lambda: both)
    finding = named(Path("/"))["packages"]
    assert "onnxruntime and onnxruntime-gpu are both installed" in finding.value
    assert finding.cure.startswith("python -m pip uninstall -y onnxruntime onnxruntime-gpu")
    monkeypatch.setattr(doctor, "packages_distributions", lambda: {"onnxruntime": ["onnxruntime"]})
    assert "packages" not in named(Path("/"))


@pytest.mark.parametrize("package", ["pillow", "tokenizers", "huggingface_hub"])
def test_optional_packages_that_are_missing_are_mentioned(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setattr(doctor, "installed", lambda name: "" if name == package else "1.0")
    found = named(Path("/"))
    assert found[package].value.startswith("missing: needed for ")
    assert found[package].cure == f"python -m pip install {package}"
    assert not found[package].fatal
    others = {"pillow", "tokenizers", "huggingface_hub"} - {package}
    assert all(found[other] == Finding(other, "1.0") for other in others)


@pytest.mark.parametrize(
    ("numbers", "cure"), [((3, 10), "onnxruntime==1.23.*"), ((3, 12), "onnxruntime")]
)
def test_a_python_without_new_wheels_is_told_which_there_are(
    monkeypatch: pytest.MonkeyPatch, numbers: tuple[int, int], cure: str
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    python_is(monkeypatch, *numbers)
    finding = named(Path("/"))["onnxruntime"]
    assert finding.fatal
    assert cure in finding.cure


def test_a_board_with_tensorrt_alone_can_generate(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert not named(machine(orin(), HEALTHY, {"tensorrt": "10.3.0"}, FakeGpu()))[
        "onnxruntime"
    ].fatal
    assert named(machine(orin(), HEALTHY, {"tensorrt": "8.6.1"}, FakeGpu()))["onnxruntime"].fatal
    assert named(machine(orin(), HEALTHY))["onnxruntime"].fatal
