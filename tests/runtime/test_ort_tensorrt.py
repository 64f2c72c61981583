"""ONNX Runtime's TensorRT provider: shapes, cache folders, and the library that must match.

Nothing here runs TensorRT: what is checked is what ONNX Runtime would be told, and when it is not
asked at all.
"""

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mdruntime import ort, ort_libraries, ort_tensorrt
from mdruntime.bundle import Bundle
from mdruntime.errors import ProviderError
from mdruntime.libraries import find, needed, version_of
from mdruntime.ort_libraries import load_required, required_libraries
from mdruntime.ort_tensorrt import cache_folder, shapes, tensorrt_options
from mdruntime.trt.profiles import Profile

PROFILES = (
    Profile("8 rows", {"tokens": ((1, 8), (2, 8), (2, 8)), "guidance": ((1,), (1,), (1,))}),
    Profile("65 rows", {"tokens": ((1, 65), (2, 65), (4, 65)), "guidance": ((1,), (1,), (2,))}),
)


class FakeCuda:
    """A device that answers, and nothing else."""

    runtime_version = (12, 6)

    def __init__(self, name: str = "Orin") -> None:
        self._name = name

    def name(self) -> str:
        return self._name

    def compute_capability(self) -> tuple[int, int]:
        return 8, 7

    def memory(self) -> tuple[int, int]:
        return 6 << 30, 8 << 30


def test_one_profile_spans_all_shapes() -> None:
    found = shapes(PROFILES)
    assert found == {
        "trt_profile_min_shapes": "tokens:1x8,guidance:1",
        "trt_profile_opt_shapes": "tokens:2x65,guidance:1",
        "trt_profile_max_shapes": "tokens:4x65,guidance:2",
    }


def made_up(folder: Path, digest: str = "d", precision: str = "fp16") -> Bundle:
    manifest: Any = SimpleNamespace(digest=digest, precision=precision)
    return Bundle(folder, manifest)


def test_engines_of_other_devices_libraries_bundles_and_shapes_have_folders_of_their_own(
    tmp_path: Path,
) -> None:
    orin: Any = FakeCuda()
    thor: Any = FakeCuda("Thor")
    newer: Any = FakeCuda()
    newer.runtime_version = (13, 0)
    bundle = made_up(tmp_path)
    folders = [
        cache_folder(bundle, orin, "libnvinfer.so.10.3.0", PROFILES),
        cache_folder(bundle, thor, "libnvinfer.so.10.3.0", PROFILES),
        cache_folder(bundle, newer, "libnvinfer.so.10.3.0", PROFILES),
        cache_folder(bundle, orin, "libnvinfer.so.10.16.1", PROFILES),
        cache_folder(made_up(tmp_path, "e"), orin, "libnvinfer.so.10.3.0", PROFILES),
        cache_folder(bundle, orin, "libnvinfer.so.10.3.0", PROFILES[:1]),
    ]
    assert len(set(folders)) == len(folders)
    assert all(folder.parent == tmp_path / "engines" for folder in folders)
    assert cache_folder(bundle, orin, "libnvinfer.so.10.3.0", PROFILES) == folders[0]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_onnx_runtime_is_told_precision_shapes_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr(ort_tensorrt, "load_required", lambda: "libnvinfer.so.10.3.0")
    monkeypatch.setattr(ort_tensorrt, "open_cuda", FakeCuda)
    monkeypatch.setattr(ort_tensorrt, "profiles", lambda *_: PROFILES)
    options = tensorrt_options(made_up(tmp_path, precision=precision), "denoiser")
    assert options["trt_fp16_enable"] == str(int(precision == "fp16"))
    assert options["trt_bf16_enable"] == str(int(precision == "bf16"))
    assert options["trt_max_workspace_size"] == str(3 << 30)
    assert options["trt_engine_cache_prefix"] == "denoiser"
    assert Path(options["trt_engine_cache_path"]).is_dir()
    assert options["trt_profile_max_shapes"] == "tokens:4x65,guidance:2"
    assert all(isinstance(value, str) for value in options.values())


def test_the_bundles_own_profiles_are_spanned(digits_bundle: Path) -> None:
    from mdruntime.bundle import open_bundle
    from mdruntime.trt.profiles import profiles

    manifest = open_bundle(digits_bundle, check=False).manifest
    found = shapes(profiles(manifest, "denoiser"))
    names = {tensor.name for tensor in manifest.graphs["denoiser"].inputs}
    canvas, smallest = manifest.denoiser.canvas, manifest.buckets[0]
    texts = {kind: dict(p.split(":") for p in text.split(",")) for kind, text in found.items()}
    assert all(set(each) == names for each in texts.values())
    assert texts["trt_profile_min_shapes"]["tokens"] == f"1x{smallest}"
    assert texts["trt_profile_max_shapes"]["tokens"] == f"2x{canvas}"
    assert texts["trt_profile_max_shapes"]["columns"] == f"2x{canvas}"


def test_the_tensorrt_spelling_runs_and_more_samples_than_planned_are_refused(
    digits_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    from mdruntime.bundle import open_bundle
    from mdruntime.errors import SamplingError

    asked: list[Any] = []

    def opened(path: Path, spec: Any, provider: str, **options: Any) -> Any:
        asked.append((path.name, options))
        session = real(path, spec, "cpu", threads=1, copy=moved, samples=options["samples"])
        session.provider = provider
        return session

    def moved(target: int, source: int, nbytes: int) -> None:
        ctypes.memmove(target, source, nbytes)

    real = ort.OrtSession
    monkeypatch.setattr(ort, "OrtSession", opened)
    monkeypatch.setattr(ort_tensorrt, "tensorrt_options", lambda *_: {"trt_fp16_enable": "0"})
    monkeypatch.setattr(ort_tensorrt, "device_copy", lambda: moved)
    session = ort.open_ort(open_bundle(digits_bundle, check=False), "denoiser", "ort-tensorrt")
    assert asked[0][0] == "denoiser.tensorrt.onnx"
    assert asked[0][1]["options"] == {"trt_fp16_enable": "0"}
    ids = np.zeros((2, 3), np.int32)
    with pytest.raises(SamplingError, match="1 sample at a time, got 2"):
        session.run({"tokens": ids, "conditional": ids[:, 0]}, [])


def library(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(b"not a library")
    return path


def test_a_tensorrt_of_another_version_is_refused_with_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_libraries, "required_libraries", lambda _: ["libnvinfer.so.10"])
    there = library(tmp_path / "usr/lib/aarch64-linux-gnu", "libnvinfer.so.11.4.0")
    with pytest.raises(ProviderError) as caught:
        load_required(tmp_path)
    text = str(caught.value)
    assert "needs libnvinfer.so.10, which cannot be loaded" in text
    assert f"found: {there}" in text
    assert "'tensorrt==10.*'" in text
    assert "--provider tensorrt" in text


def test_a_tensorrt_that_is_absent_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_libraries, "required_libraries", lambda _: ["libnvinfer.so.10"])
    with pytest.raises(ProviderError, match="found: none"):
        load_required(tmp_path)


def test_a_library_of_the_right_version_is_loaded_from_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_libraries, "required_libraries", lambda _: ["libnvinfer.so.10"])
    for name in ("libnvinfer.so.100", "libnvinfer.so.10.3.0", "libnvinfer.so.8.5.2"):
        library(tmp_path / "usr/lib/aarch64-linux-gnu", name)
    loaded: list[str] = []
    monkeypatch.setattr(ort_libraries, "_refused", lambda path: loaded.append(path) or "")  # type: ignore[func-returns-value]
    found = load_required(tmp_path)
    assert found == str(tmp_path / "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0")
    assert loaded[0] == found


def test_a_package_without_the_provider_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match="has no TensorRT provider; install onnxruntime-gpu"):
        required_libraries(tmp_path)
    library(tmp_path, "libonnxruntime_providers_tensorrt.so")
    with pytest.raises(ProviderError, match="no 64-bit little-endian ELF file"):
        required_libraries(tmp_path)


def extension() -> Path:
    import _ctypes

    return Path(_ctypes.__file__)


def test_needed_libraries_are_those_that_the_loader_maps() -> None:
    ctypes.CDLL(str(extension()))
    mapped = Path("/proc/self/maps").read_text()
    found = needed(extension())
    assert "libc.so.6" in found
    assert all(f"/{name}" in mapped for name in found)


@pytest.mark.parametrize("cut", [3, 40, 200, 2000])
def test_damaged_libraries_are_errors(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "libx.so"
    path.write_bytes(extension().read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"libx\.so is"):
        needed(path)


def linked(folder: Path, name: str, *links: str) -> Path:
    path = library(folder, name)
    for link in links:
        (folder / link).symlink_to(path.name)
    return path


def test_libraries_are_found_once_under_their_fullest_name(tmp_path: Path) -> None:
    system = tmp_path / "usr/lib/aarch64-linux-gnu"
    first = linked(system, "libnvinfer.so.10.3.0", "libnvinfer.so.10", "libnvinfer.so")
    second = linked(tmp_path / "usr/local/tensorrt-8/lib", "libnvinfer.so.8.5.2")
    linked(system, "libnvinfer_plugin.so.10.3.0")
    assert find("libnvinfer", tmp_path) == [first, second]
    assert version_of(first) == (10, 3, 0)
    assert version_of(Path("libnvinfer.so")) == ()
    assert find("libcudart", tmp_path) == []


def test_the_search_path_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = library(tmp_path / "mine", "libmade_up_name.so.3")
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{there.parent}")
    assert find("libmade_up_name") == [there]
