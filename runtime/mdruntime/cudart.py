"""NVIDIA's CUDA runtime library by ctypes: what is called, where it lies, what its errors mean."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from ctypes import POINTER, c_char_p, c_float, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from pathlib import Path
from typing import Any

from mdruntime.errors import ProviderError

__all__ = ["SIGNATURES", "TEXTS", "Calls", "CudaError", "libraries", "load_library", "missing"]

_OUT = POINTER(c_void_p)  # where a new handle or address is written
_INT = POINTER(c_int)

# Types that differ between CUDA 12 and 13 (cudaDeviceProp) are passed as plain memory.
SIGNATURES: Mapping[str, tuple[Any, ...]] = {
    "cudaDeviceGetAttribute": (_INT, c_int, c_int),
    "cudaDriverGetVersion": (_INT,),
    "cudaEventCreate": (_OUT,),
    "cudaEventDestroy": (c_void_p,),
    "cudaEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
    "cudaEventRecord": (c_void_p, c_void_p),
    "cudaEventSynchronize": (c_void_p,),
    "cudaFree": (c_void_p,),
    "cudaFreeHost": (c_void_p,),
    "cudaGetDeviceCount": (_INT,),
    "cudaGetDeviceProperties": (c_void_p, c_int),
    "cudaGetErrorName": (c_int,),
    "cudaGetErrorString": (c_int,),
    "cudaGetLastError": (),
    "cudaGraphDestroy": (c_void_p,),
    "cudaGraphExecDestroy": (c_void_p,),
    "cudaGraphInstantiateWithFlags": (_OUT, c_void_p, c_ulonglong),
    "cudaGraphLaunch": (c_void_p, c_void_p),
    "cudaHostAlloc": (_OUT, c_size_t, c_uint),
    "cudaMalloc": (_OUT, c_size_t),
    "cudaMemGetInfo": (POINTER(c_size_t), POINTER(c_size_t)),
    "cudaMemcpyAsync": (c_void_p, c_void_p, c_size_t, c_int, c_void_p),
    "cudaMemsetAsync": (c_void_p, c_int, c_size_t, c_void_p),
    "cudaRuntimeGetVersion": (_INT,),
    "cudaSetDevice": (c_int,),
    "cudaStreamBeginCapture": (c_void_p, c_int),
    "cudaStreamCreateWithFlags": (_OUT, c_uint),
    "cudaStreamDestroy": (c_void_p,),
    "cudaStreamEndCapture": (c_void_p, _OUT),
    "cudaStreamSynchronize": (c_void_p,),
}
"""Argument types of every function that is called; all return an error code but ``TEXTS``."""

TEXTS = ("cudaGetErrorName", "cudaGetErrorString")

OUT_OF_MEMORY, INSUFFICIENT_DRIVER, NO_DEVICE = 2, 35, 100
_GONE = "nothing more can run on the GPU in this process; start it again"
_CURES = {
    3: "a process made by fork cannot use CUDA; start it by spawn",
    34: "a stub of the driver was loaded: take CUDA's stubs folder out of LD_LIBRARY_PATH",
    INSUFFICIENT_DRIVER: "install an NVIDIA driver for this CUDA runtime or newer; in a container, "
    "start it with --gpus all (Jetson: --runtime nvidia)",
    NO_DEVICE: "look at CUDA_VISIBLE_DEVICES; in a container, start it with --gpus all (Jetson: "
    "--runtime nvidia)",
    46: "another process holds the GPU for itself (nvidia-smi shows which)",
    700: _GONE,
    716: _GONE,
    719: _GONE,
    803: "the driver was updated under the running system; restart the machine",
    804: "remove CUDA's compat folder from LD_LIBRARY_PATH, or update the driver",
}
_SONAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
_MAJORS = (12, 13)


class CudaError(ProviderError):
    """A call of the CUDA runtime failed.

    Attributes:
        code: of ``cudaError_t``.
        name: of the code, such as ``cudaErrorNoDevice``.
    """

    def __init__(self, text: str, code: int, name: str) -> None:
        """Take the whole text and what the library said."""
        super().__init__(text)
        self.code = code
        self.name = name


class Calls:
    """The functions of a loaded library, typed, their error codes turned into exceptions."""

    def __init__(self, library: Any) -> None:
        """Declare the argument types of every function.

        Raises:
            ProviderError: the library lacks a function, or is neither of CUDA 12 nor 13.
        """
        self._functions: dict[str, Callable[..., Any]] = {}
        for name, argtypes in SIGNATURES.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise ProviderError(
                    f"the CUDA runtime library found here lacks {name}; {_INSTALL}"
                ) from None
            function.argtypes = argtypes
            function.restype = c_char_p if name in TEXTS else c_int
            self._functions[name] = function
        version = self.version("cudaRuntimeGetVersion")
        if version[0] not in _MAJORS:
            raise ProviderError(
                f"the CUDA runtime library found here is of version {_dotted(version)}, and 12.x "
                f"or 13.x is needed; {_INSTALL}"
            )

    def __call__(self, name: str, *arguments: Any) -> None:
        """Call a function.

        Raises:
            MemoryError: the device or the host has not enough memory.
            CudaError: any other failure.
        """
        code = self._functions[name](*arguments)
        if code:
            raise self._error(name, code)

    def new(self, name: str, *arguments: Any) -> int:
        """Call a function that writes a handle or address to its first argument; return that."""
        out = c_void_p()
        self(name, ctypes.byref(out), *arguments)
        return out.value or 0

    def number(self, name: str, *arguments: Any) -> int:
        """Call a function that writes an int to its first argument, and return that."""
        out = c_int()
        self(name, ctypes.byref(out), *arguments)
        return out.value

    def version(self, name: str) -> tuple[int, int]:
        """Call a function that writes a version to its argument, and return major and minor."""
        number = self.number(name)
        return number // 1000, number % 1000 // 10

    def _error(self, name: str, code: int) -> Exception:
        # The library remembers the code, and TensorRT would find it after its own next kernel.
        self._functions["cudaGetLastError"]()
        label, text = (self._functions[get](code).decode() for get in TEXTS)
        if code == OUT_OF_MEMORY:
            return MemoryError(f"{name}: {text} ({label})")
        cure = f"; {_CURES[code]}" if code in _CURES else ""
        if code == INSUFFICIENT_DRIVER:
            cure = self._versions() + cure
        return CudaError(f"{name} failed with {label} ({code}): {text}{cure}", code, label)

    def _versions(self) -> str:
        runtime, driver = (self.version(f"cuda{side}GetVersion") for side in ("Runtime", "Driver"))
        found = (
            f"the driver serves CUDA {_dotted(driver)}" if any(driver) else "no driver is loaded"
        )
        return f" ({found}, the runtime library is of CUDA {_dotted(runtime)})"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


_INSTALL = (
    "install one, or say where it is in LD_LIBRARY_PATH or CUDA_HOME: python -m pip install "
    "nvidia-cuda-runtime (CUDA 13) or nvidia-cuda-runtime-cu12; on a Jetson: "
    "sudo apt install nvidia-jetpack"
)


def libraries() -> Iterator[Any]:
    """Yield every CUDA runtime library that can be loaded here, the newest of each place first.

    The loader's own path comes before ``CUDA_HOME``, ``/usr/local/cuda*`` and the packages
    beside this Python's.
    """
    loaded = set()
    for path in _candidates():
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        if library._handle not in loaded:
            loaded.add(library._handle)
            yield library


def load_library() -> Any:
    """Return the first CUDA runtime library that can be loaded here.

    Raises:
        ProviderError: there is none.
    """
    for library in libraries():
        return library
    raise missing()


def missing() -> ProviderError:
    """Return what to raise where no CUDA runtime library can be loaded."""
    names = ", ".join(_SONAMES)
    return ProviderError(f"no CUDA runtime library ({names}) can be loaded; {_INSTALL}")


def _candidates() -> Iterator[str]:
    yield from _SONAMES
    for soname in _SONAMES:
        for folder in _folders():
            if (folder / soname).exists():
                yield str(folder / soname)


def _folders() -> Iterator[Path]:
    named = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    homes = [Path(home) for home in named if home]
    for home in [*homes, *sorted(Path("/usr/local").glob("cuda*"), reverse=True)]:
        yield home / "lib64"
        yield from sorted(home.glob("targets/*/lib"))
    for entry in sys.path:
        yield from sorted(Path(entry or ".").glob("nvidia/*/lib"), reverse=True)
