"""The CUDA layer, on a stand-in for libcudart: see tests/standin. No GPU was used here."""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdruntime import cudart
from mdruntime.cuda import SIGNATURES, Cuda, CudaError, load_library, open_cuda
from mdruntime.errors import ProviderError
from tests.standin.cudart import StandInCudart
from tests.standin.options import Options


@pytest.fixture
def library() -> Iterator[StandInCudart]:
    """A stand-in of which nothing may be left, and which nothing may misuse."""
    made = StandInCudart(Options(name="Stand-in Orin", compute_capability=(8, 7), memory=1 << 20))
    yield made
    assert made.misuse == []
    assert made.device.leaks() == []


@pytest.fixture
def cuda(library: StandInCudart) -> Cuda:
    return Cuda(library)


def _found(monkeypatch: pytest.MonkeyPatch, *options: Options) -> list[StandInCudart]:
    found = [StandInCudart(one) for one in options]
    monkeypatch.setattr(cudart, "libraries", lambda: iter(found))
    return found


def test_the_device_says_what_it_is(cuda: Cuda) -> None:
    assert cuda.runtime_version == (12, 6)
    assert cuda.driver_version == (12, 6)
    assert cuda.devices() == 1
    assert cuda.name() == "Stand-in Orin"
    assert cuda.compute_capability() == (8, 7)
    assert cuda.memory() == (1 << 20, 1 << 20)
    cuda.use(0)
    with pytest.raises(CudaError, match="cudaSetDevice failed with cudaErrorInvalidDevice") as info:
        cuda.use(1)
    assert (info.value.code, info.value.name) == (101, "cudaErrorInvalidDevice")


def test_memory_is_counted_and_may_be_freed_twice(cuda: Cuda) -> None:
    with cuda.allocate(1000) as buffer:
        assert buffer.nbytes == 1000
        assert buffer.address % 256 == 0
        assert cuda.memory() == ((1 << 20) - 1000, 1 << 20)
        buffer.free()
    assert cuda.memory() == (1 << 20, 1 << 20)
    with pytest.raises(ProviderError, match="this DeviceBuffer is closed"):
        _ = buffer.address


def test_what_does_not_fit_is_a_memory_error_with_sizes(cuda: Cuda) -> None:
    with pytest.raises(
        MemoryError, match=r"2\.0 MiB of device memory were asked for, and 1\.0 of 1\.0 MiB are"
    ):
        cuda.allocate(2 << 20)


def test_copies_happen_in_the_streams_turn(cuda: Cuda, library: StandInCudart) -> None:
    source, target = cuda.pinned((2, 3), np.float16), cuda.pinned((6,), np.float16)
    assert source.array.tolist() == [[0, 0, 0], [0, 0, 0]]
    with cuda.allocate(12) as one, cuda.allocate(12) as two, cuda.stream() as stream:
        source.array[...] = np.arange(6).reshape(2, 3)
        cuda.upload(one.address, source.address, 12, stream)
        cuda.copy(two.address, one.address, 12, stream)
        cuda.zero(two.address, 4, stream)
        cuda.download(target.address, two.address, 12, stream)
        assert not target.array.any(), "nothing is done before somebody waits"
        stream.synchronize()
        assert target.array.tolist() == [0, 0, 2, 3, 4, 5]
    assert source.address != target.address
    source.free()
    target.free()
    counters = library.device.counters
    assert (counters.uploaded, counters.downloaded, counters.copied) == (12, 12, 12)
    with pytest.raises(ProviderError, match="this PinnedArray is closed"):
        _ = target.array


def test_arrays_without_elements_and_scalars_have_memory_too(cuda: Cuda) -> None:
    empty, scalar = cuda.pinned((0, 4), np.int32), cuda.pinned((), np.float32)
    assert (empty.nbytes, empty.array.shape) == (0, (0, 4))
    assert (scalar.nbytes, scalar.array.shape) == (4, ())
    with cuda.allocate(0) as buffer, cuda.stream() as stream:
        cuda.upload(buffer.address, empty.address, 0, stream)
        stream.synchronize()
    empty.free()
    scalar.free()


def test_a_graph_repeats_what_was_captured(cuda: Cuda, library: StandInCudart) -> None:
    source, target = cuda.pinned((4,), np.int32), cuda.pinned((4,), np.int32)
    with cuda.allocate(16) as buffer, cuda.stream() as stream:
        with cuda.capture(stream) as captured:
            cuda.upload(buffer.address, source.address, 16, stream)
            cuda.download(target.address, buffer.address, 16, stream)
            with pytest.raises(ProviderError, match="nothing was captured yet"):
                _ = captured.graph
        stream.synchronize()
        assert not target.array.any(), "capturing runs nothing"
        for value in (3, 7):
            source.array[...] = value
            captured.graph.launch(stream)
            stream.synchronize()
            assert target.array.tolist() == [value] * 4
        captured.graph.close()
        captured.graph.close()
        with pytest.raises(ProviderError, match="this Graph is closed"):
            captured.graph.launch(stream)
    source.free()
    target.free()
    assert library.device.counters.launches == 2


@pytest.mark.parametrize("what", ["allocate", "synchronise"])
def test_what_cannot_be_captured_is_told_and_the_stream_goes_on(what: str, cuda: Cuda) -> None:
    with cuda.stream() as stream, cuda.allocate(4) as buffer:
        with (
            pytest.raises(CudaError, match="cudaErrorStreamCaptureUnsupported") as info,
            cuda.capture(stream),
        ):
            cuda.allocate(4) if what == "allocate" else stream.synchronize()
        assert info.value.code == 900
        cuda.zero(buffer.address, 4, stream)
        stream.synchronize()


def test_an_exception_ends_the_capture(cuda: Cuda, library: StandInCudart) -> None:
    with cuda.stream() as stream, cuda.allocate(4) as buffer:
        with pytest.raises(ValueError, match="four"), cuda.capture(stream):
            cuda.zero(buffer.address, int("four"), stream)
        assert library.device.counters.captures == 1
        assert library.device.graphs == {}
        stream.synchronize()


def test_a_graph_that_cannot_be_made_ready_leaves_nothing(
    cuda: Cuda, library: StandInCudart
) -> None:
    library.fail("cudaGraphInstantiateWithFlags", 2)
    with cuda.stream() as stream, cuda.allocate(4) as buffer:
        with pytest.raises(MemoryError, match="cudaGraphInstantiate"), cuda.capture(stream):
            cuda.zero(buffer.address, 4, stream)
        assert library.device.graphs == {}
        assert library.device.runnable == {}


def test_events_tell_the_time_between_them(cuda: Cuda) -> None:
    with cuda.stream() as stream, cuda.allocate(1 << 19) as buffer, cuda.event() as start:
        start.record(stream)
        cuda.zero(buffer.address, 1 << 19, stream)
        with cuda.event() as end:
            end.record(stream)
            assert end.milliseconds_since(start) == pytest.approx((1 << 19) / 1e7)


def test_the_library_forgets_an_error_that_was_raised(cuda: Cuda, library: StandInCudart) -> None:
    with pytest.raises(CudaError):
        cuda.use(5)
    assert library.cudaGetLastError() == 0


def test_a_driver_that_is_too_old_is_named_with_both_versions() -> None:
    old = Cuda(StandInCudart(Options(runtime=(13, 0), driver=(12, 6))))
    with pytest.raises(
        CudaError, match=r"the driver serves CUDA 12\.6, the runtime library is of CUDA 13\.0"
    ):
        old.devices()
    none = Cuda(StandInCudart(Options(driver=(0, 0))))
    with pytest.raises(CudaError, match=r"no driver is loaded.*install an NVIDIA driver"):
        none.devices()


def test_an_older_library_is_taken_where_the_driver_is_too_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _found(monkeypatch, Options(runtime=(13, 0), driver=(12, 6)), Options(driver=(12, 6)))
    assert open_cuda().runtime_version == (12, 6)


def test_the_first_librarys_reason_is_told_where_none_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _found(monkeypatch, Options(devices=0), Options(driver=(0, 0)))
    with pytest.raises(CudaError, match=r"cudaErrorNoDevice.*CUDA_VISIBLE_DEVICES") as info:
        open_cuda()
    assert info.value.exit_code == 4


def test_a_machine_without_the_library_is_told_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(path: str) -> Any:
        raise OSError(path)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    for opened in (load_library, open_cuda):
        with pytest.raises(ProviderError, match=r"no CUDA runtime library .*pip install"):
            opened()


def test_a_library_of_another_version_is_refused() -> None:
    with pytest.raises(ProviderError, match=r"of version 11\.8, and 12\.x or 13\.x is needed"):
        Cuda(StandInCudart(Options(runtime=(11, 8), driver=(12, 6))))


def test_a_library_without_a_function_is_refused() -> None:
    class Lacking(StandInCudart):
        def __getattr__(self, name: str) -> Any:
            if name == "cudaGraphLaunch":
                raise AttributeError(name)
            return super().__getattr__(name)

    with pytest.raises(ProviderError, match="lacks cudaGraphLaunch"):
        Cuda(Lacking())


@pytest.mark.parametrize(
    "place",
    ["home/lib64", "home/targets/aarch64-linux/lib", "site/nvidia/cu13/lib"],
)
def test_libraries_are_found_where_they_are_installed(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / place).mkdir(parents=True)
    wanted = tmp_path / place / "libcudart.so.13"
    wanted.touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    opened: list[str] = []

    def open_only_the_wanted(path: str) -> Any:
        opened.append(path)
        if path != str(wanted):
            raise OSError(path)
        return type("Library", (), {"_handle": 1})()

    monkeypatch.setattr(ctypes, "CDLL", open_only_the_wanted)
    assert load_library() is not None
    assert opened[:3] == ["libcudart.so.13", "libcudart.so.12", "libcudart.so"]
    assert opened[-1] == str(wanted)


def test_the_stand_in_offers_every_function_and_asks_for_types_first() -> None:
    library = StandInCudart()
    for name in SIGNATURES:
        assert callable(getattr(library, name)), name
    with pytest.raises(AssertionError, match="called before its types are declared"):
        library.cudaFree(0)
    cuda = Cuda(library)
    with pytest.raises((TypeError, ctypes.ArgumentError)):
        library.cudaMalloc(ctypes.byref(ctypes.c_int()), 4)
    with pytest.raises((TypeError, ctypes.ArgumentError)):
        library.cudaFree("address")
    assert cuda.devices() == 1
