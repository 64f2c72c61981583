"""A graph loaded by ONNX Runtime on the provider asked for, and on no other."""

import contextlib
import io
import itertools
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakValueDictionary

from mdruntime.errors import BundleError, ProviderError
from mdruntime.ort_cuda import cuda_options, is_board, placed_elsewhere

__all__ = ["Opened", "explained", "first_line", "numbered", "open_graph", "share"]

CPU, CUDA, TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))
_NAMES = {"cpu": (CPU,), "cuda": (CUDA,), "ort-tensorrt": (TENSORRT, CUDA)}
_PACKAGES = {"cpu": "onnxruntime", "cuda": "onnxruntime-gpu", "ort-tensorrt": "onnxruntime-gpu"}
_SLOWER = "BiasGeluFusion"
_ERRORS = 3  # ONNX Runtime's log level: its warnings are about its own optimiser
_NO_CAPTURE = "graph capture"  # in what ONNX Runtime says of a graph that cannot be captured


@dataclass  # without slots, for it is referred to weakly
class Opened:
    """A loaded graph, shared by a session, its clones, and others of the same bundle."""

    session: Any  # of ONNX Runtime
    runtime: ModuleType
    graphs: bool  # whether passes may become CUDA graphs
    notes: list[str]
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    # A graph of one thread must not be captured while another thread runs the same session.
    lock: threading.Lock = field(default_factory=threading.Lock)


_SHARED: WeakValueDictionary[Hashable, Opened] = WeakValueDictionary()
_SHARING = threading.Lock()


def open_graph(
    runtime: ModuleType,
    path: Path,
    provider: str,
    *,
    threads: int,
    graphs: bool,
    options: Mapping[str, str],
    profile: Path | None = None,
) -> Opened:
    """Load an ONNX file.

    Args:
        runtime: ONNX Runtime.
        path: of the file.
        provider: ``cpu``, ``cuda`` or ``ort-tensorrt``.
        threads: of the CPU.
        graphs: let passes become CUDA graphs where ONNX Runtime can.
        options: of its TensorRT provider.
        profile: folder that ONNX Runtime writes its profile into.

    Raises:
        ProviderError: the provider is not available here.
        BundleError: the file cannot be loaded.
    """
    names = _offered(runtime, provider)
    board = is_board()
    settings = _settings(runtime, threads, board=board, gpu=provider != "cpu")
    if profile is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(profile / "profile")
    notes: list[str] = []

    def load(*, captured: bool) -> Opened:
        given = {CUDA: cuda_options(graphs=captured, board=board), TENSORRT: dict(options)}
        asked = [(name, given.get(name, {})) for name in names]
        # Without enable_fallback=0 another provider would take over, with a line on the screen.
        session = runtime.InferenceSession(str(path), settings, asked, enable_fallback=0)
        _require(session, provider, names)
        return Opened(session, runtime, captured, notes)

    opened = _loaded(load, path, graphs=graphs, notes=notes)
    elsewhere = "" if provider == "cpu" else placed_elsewhere(opened.session, names[:1])
    notes += [f"{path.name}: {elsewhere}"] if elsewhere else []
    return opened


def share(key: Hashable, load: Callable[[], Opened]) -> Opened:
    """Return the loaded graph of a key, while anybody in this process holds it; else load it.

    Two pipelines over one bundle then have its weights in memory once.
    """
    key = (os.getpid(), key)  # threads of a loaded graph do not survive a fork
    found = _SHARED.get(key)
    if found is None:
        opened = load()
        with _SHARING:  # another thread may have been faster
            found = _SHARED.setdefault(key, opened)
    return found


def _loaded(load: Callable[..., Opened], path: Path, *, graphs: bool, notes: list[str]) -> Opened:
    try:
        return load(captured=graphs)
    except ProviderError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        if not (graphs and _NO_CAPTURE in str(error)):
            raise explained(f"ONNX Runtime cannot load {path.name}", error) from None
        notes.append(f"{path.name} runs without CUDA graphs: {first_line(error)}")
    return _loaded(load, path, graphs=False, notes=notes)


def _offered(runtime: ModuleType, provider: str) -> tuple[str, ...]:
    """Return ONNX Runtime's names of a provider and of those that it needs."""
    names = _NAMES[provider]
    found = runtime.get_available_providers()
    if names[0] not in found:
        raise ProviderError(
            f"provider {provider!r} was asked for, but ONNX Runtime {runtime.__version__} offers "
            f"only {', '.join(found)}; install {_PACKAGES[provider]}, or choose --provider cpu"
        )
    if provider != "cpu" and hasattr(runtime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # libraries of pip's nvidia packages
            runtime.preload_dlls()
    return names


def _settings(runtime: ModuleType, threads: int, *, board: bool, gpu: bool) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _ERRORS
    # Threads that wait for work by spinning would take the cores of the next graph's threads.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # A pattern is a second block of memory beside the arena's, for each shape, and saves no time.
    options.enable_mem_pattern = gpu
    if gpu:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        # Weights outside the arena, which would round their sum up and keep what loading took.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        options.enable_cpu_mem_arena = not board
    else:
        # A bias added inside of GELU takes longer than one added before: 1.5 % of a full pass.
        options.add_session_config_entry("optimization.disable_specified_optimizers", _SLOWER)
    return options


def _require(session: Any, provider: str, names: Sequence[str]) -> None:
    """Refuse a session in which another provider took over.

    A provider whose libraries are missing is replaced by the CPU's without an exception.
    """
    used = session.get_providers()
    missing = [name for name in names if name not in used]
    if missing:
        raise ProviderError(
            f"provider {provider!r} was asked for, but ONNX Runtime fell back to {used[0]} (its "
            "log above says why, mostly a missing CUDA library); see 'mdruntime doctor', or "
            "choose --provider cpu"
        )


def first_line(error: Exception) -> str:
    """Return what an exception says, without the details."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def explained(what: str, error: Exception) -> Exception:
    """Return what to raise in place of an exception of ONNX Runtime."""
    text = first_line(error)
    memory = ("allocate memory", "bad_alloc", "bad allocation", "out of memory", "CUDA failure 2:")
    if any(word in str(error) for word in memory):
        return MemoryError(text)
    return BundleError(f"{what}: {text}")


def numbered(opened: Opened, number: int) -> Any:
    """Return options of a run that is, or becomes, the CUDA graph of that number."""
    options = opened.runtime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    return options
