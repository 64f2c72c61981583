"""Sessions of ONNX Runtime, the only module that imports it."""

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mdruntime.errors import BundleError, ProviderError, SamplingError
from mdruntime.manifest import GraphSpec, TensorSpec
from mdruntime.session import Feeds, Outputs

__all__ = ["OrtSession", "available_threads", "import_onnxruntime"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_PACKAGES = {"cpu": "onnxruntime", "cuda": "onnxruntime-gpu"}
_ERRORS = 3  # ONNX Runtime's log level: its warnings are about its own optimiser


def import_onnxruntime() -> ModuleType:
    """Import ONNX Runtime.

    Raises:
        ProviderError: it is not installed, or two of its packages overwrote each other.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ProviderError(
            f"ONNX Runtime cannot be imported ({error}); "
            "install it with: python -m pip install onnxruntime"
        ) from None
    if not hasattr(onnxruntime, "InferenceSession"):
        raise ProviderError(
            "ONNX Runtime is installed but broken, as happens when onnxruntime and onnxruntime-gpu "
            "overwrite each other; mend it with: python -m pip uninstall -y onnxruntime "
            "onnxruntime-gpu && python -m pip install onnxruntime"
        )
    return onnxruntime


def available_threads() -> int:
    """Return how many CPU threads this process may use: its affinity and cgroup's quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def _open(path: Path, provider: str, threads: int) -> Any:
    cores = os.cpu_count() or 1
    if not 0 <= threads <= cores:  # more would only wait for each other, and spin meanwhile
        raise SamplingError(
            f"threads must be between 0 (as many as may be used) and {cores}, got {threads}"
        )
    runtime = import_onnxruntime()
    name = _PROVIDERS[provider]
    found = runtime.get_available_providers()
    if name not in found:
        raise ProviderError(
            f"provider {provider!r} was asked for, but ONNX Runtime {runtime.__version__} offers "
            f"only {', '.join(found)}; install {_PACKAGES[provider]}, or choose --provider cpu"
        )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or available_threads()
    options.log_severity_level = _ERRORS
    try:
        session = runtime.InferenceSession(str(path), options, providers=[name])
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise _explained(f"ONNX Runtime cannot load {path.name}", error) from None
    used = session.get_providers()
    # A provider whose libraries are missing is replaced by the CPU's without an exception.
    if used[0] != name:
        raise ProviderError(
            f"provider {provider!r} was asked for, but ONNX Runtime fell back to {used[0]} (its "
            "log above says why, mostly a missing CUDA library); see 'mdruntime doctor', or "
            "choose --provider cpu"
        )
    return session


def _explained(what: str, error: Exception) -> Exception:
    """Return what to raise in place of an exception of ONNX Runtime."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    if any(word in str(error) for word in ("allocate memory", "bad_alloc", "bad allocation")):
        return MemoryError(text)
    return BundleError(f"{what}: {text}")


class OrtSession:
    """A graph in ONNX Runtime, its caches resident on the device.

    Each cache output is bound to the buffer of its input, so that the graph scatters in place
    (measured: bit-equal to the copying run, and 5 to 60 ms a pass faster on a CPU).
    """

    def __init__(self, path: Path, spec: GraphSpec, provider: str, *, threads: int = 0) -> None:
        """Load the graph at ``path`` on ``provider``."""
        self.provider = provider
        self._spec = spec
        self._session = _open(path, provider, threads)
        self._device = "cuda" if provider == "cuda" else "cpu"
        self._caches: dict[str, Any] = {}
        self._capacity = 0
        self._canvas = 0

    def start(self, canvas: int) -> None:
        """Make the next passes go over canvases of this many rows."""
        if canvas != self._canvas:
            self._canvas, self._capacity = canvas, 0

    def clone(self) -> "OrtSession":
        """Return a session on the same weights with caches of its own."""
        twin = object.__new__(OrtSession)
        twin.provider, twin._spec, twin._session = self.provider, self._spec, self._session
        twin._device, twin._caches, twin._capacity, twin._canvas = self._device, {}, 0, 0
        return twin

    def close(self) -> None:
        """Drop the session and its caches."""
        self._session = None
        self._caches = {}

    def run(self, feeds: Feeds, fetch: Sequence[str]) -> Outputs:
        """Run the graph and return the outputs in ``fetch``, in host memory."""
        if self._session is None:
            raise BundleError("the pipeline is closed; load the bundle again")
        binding = self._session.io_binding()
        arrays = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        for name, array in arrays.items():  # kept alive here: a binding does not own its memory
            binding.bind_cpu_input(name, array)
        for name in fetch:
            binding.bind_output(name, "cpu")
        if self._spec.caches:
            self._bind_caches(binding, feeds["tokens"].shape[0])
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise _explained("ONNX Runtime failed", error) from error
        results = binding.get_outputs()
        return {name: results[i].numpy() for i, name in enumerate(fetch)}

    def _bind_caches(self, binding: Any, rows: int) -> None:
        """Bind the first ``rows`` sequences of every cache as input and as output."""
        if rows > self._capacity:
            self._allocate(rows)
        shapes = {tensor.name: tensor for tensor in self._spec.inputs}
        for before, after in self._spec.caches:
            tensor, buffer = shapes[before], self._caches[before]
            where = (self._device, 0, np.dtype(tensor.dtype).type, self._shape(tensor, rows))
            binding.bind_input(before, *where, buffer.data_ptr())
            binding.bind_output(after, *where, buffer.data_ptr())

    def _shape(self, tensor: TensorSpec, rows: int) -> list[int]:
        """Return the shape of a cache; the only free axis besides the rows is the canvas."""
        inner = [size if isinstance(size, int) else self._canvas for size in tensor.shape[1:]]
        return [rows, *inner]

    def _allocate(self, rows: int) -> None:
        runtime = import_onnxruntime()
        tensors = {tensor.name: tensor for tensor in self._spec.inputs}
        self._caches = {}  # the old ones go before the new ones come
        self._caches = {
            name: runtime.OrtValue.ortvalue_from_shape_and_type(
                self._shape(tensors[name], rows),
                np.dtype(tensors[name].dtype).type,
                self._device,
                0,
            )
            for name, _ in self._spec.caches
        }
        self._capacity = rows
