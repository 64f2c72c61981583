"""The doctor on NVIDIA's parts: board, driver, CUDA, and every TensorRT that is installed.

Most engines that do not load, and most that compute nothing useful, come from two of something
where there should be one.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mdruntime import jetson
from mdruntime.cuda import Cuda, open_cuda
from mdruntime.errors import ProviderError
from mdruntime.findings import Finding, installed
from mdruntime.libraries import find, version_of
from mdruntime.ort_libraries import required_libraries

__all__ = ["examine_gpu"]

_DRIVER = "proc/driver/nvidia/version"
_MODULES = ("tensorrt", "tensorrt_cu13", "tensorrt_cu12", "tensorrt_cu13_bindings")
_OLDEST = (10, 3)
_NEWEST = 11


def examine_gpu(root: Path = Path("/")) -> Iterator[Finding]:
    """Yield findings about GPU, CUDA and TensorRT; nothing where there is no trace of either.

    Args:
        root: folder taken for the root of the file system.
    """
    board = jetson.board(root)
    if board is not None:
        yield from _board(board, root)
    driver = _driver(root)
    libraries = find("libnvinfer", root)
    if board is None and not driver and not libraries:
        yield Finding("gpu", "no NVIDIA driver: the provider is cpu")
        return
    if board is None:
        yield _said("driver", driver, "none", "install NVIDIA's driver, then restart")
    yield from _cuda(root)
    yield from _tensorrt(libraries, board)
    yield from _ort_tensorrt(libraries)


def _said(name: str, value: str, missing: str, cure: str) -> Finding:
    return Finding(name, value) if value else Finding(name, missing, cure)


def _board(board: jetson.Board, root: Path) -> Iterator[Finding]:
    yield Finding("board", board.model)
    row = board.jetpack
    if row is None:
        cure = "mdruntime needs JetPack 6.1 or newer for engines; --provider cpu works"
        yield Finding("jetpack", f"unknown ({board.linux_text})", cure)
        return
    brings = f"CUDA {row.cuda}, TensorRT {row.tensorrt}, Python {_dotted(row.python)}"
    yield Finding("jetpack", f"{row.name} ({board.linux_text}): {brings}", row.cure)
    if sys.version_info[:2] != row.python:
        yield Finding(
            "python version",
            f"{_dotted(sys.version_info[:2])}, but JetPack's TensorRT module is for "
            f"{_dotted(row.python)}",
            "make the environment with: /usr/bin/python3 -m venv --system-site-packages .venv",
        )
    yield _power(root)


def _power(root: Path) -> Finding:
    """Tell the power mode; measured times depend on it severalfold."""
    mode, modes = jetson.power_mode(root), jetson.power_modes(root)
    fastest = [number for number, name in modes.items() if name.startswith("MAXN")]
    if not mode:
        return Finding("power mode", "unknown", "sudo nvpmodel -q")
    if fastest and not mode.startswith("MAXN"):
        number = max(fastest, key=lambda one: len(modes[one]))  # MAXN_SUPER before MAXN
        cure = f"before you measure: sudo nvpmodel -m {number} && sudo jetson_clocks"
        return Finding("power mode", f"{mode}, not the fastest ({modes[number]})", cure)
    return Finding("power mode", mode)


def _driver(root: Path) -> str:
    try:
        lines = (root / _DRIVER).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    words = lines[0].split() if lines else []
    numbers = [word for word in words if word[0].isdigit() and "." in word]
    return numbers[0] if numbers else " ".join(words)


def _cuda(root: Path) -> Iterator[Finding]:
    libraries = find("libcudart", root)
    names = ", ".join(map(str, libraries)) or "none"
    cure = "python -m pip install nvidia-cuda-runtime-cu12 (12.x), or install the CUDA toolkit"
    yield Finding("cuda libraries", names, "" if libraries else cure)
    try:
        cuda = open_cuda()
    except ProviderError as error:
        yield Finding("gpu", "does not answer", str(error))
        return
    yield Finding("gpu", _described(cuda))


def _described(cuda: Cuda) -> str:
    free, total = cuda.memory()
    capability = _dotted(cuda.compute_capability())
    return (
        f"{cuda.name()}, compute capability {capability}, {free / 2**30:.1f} GiB free of "
        f"{total / 2**30:.1f} GiB, CUDA {_dotted(cuda.runtime_version)}, driver for CUDA "
        f"{_dotted(cuda.driver_version)}"
    )


def _tensorrt(libraries: Sequence[Path], board: jetson.Board | None) -> Iterator[Finding]:
    for path in libraries:
        yield Finding("tensorrt library", str(path), _age(version_of(path)))
    if not libraries:
        yield Finding("tensorrt library", "none", _how_to_install(board))
    module = next(filter(None, map(installed, _MODULES)), "")
    if not module:
        cure = "python -m pip install tensorrt"
        if libraries:
            cure = (
                "the system has one for its own Python: make the environment with: "
                "/usr/bin/python3 -m venv --system-site-packages .venv"
            )
        yield Finding("tensorrt module", "none", cure)
        return
    yield Finding("tensorrt module", module, _age(_numbers(module)))
    if libraries and not any(_same(version_of(path), _numbers(module)) for path in libraries):
        yield Finding(
            "tensorrt versions",
            f"the module is {module}, the libraries are of another version",
            "uninstall one of the two: python -m pip uninstall -y tensorrt, or apt remove "
            "libnvinfer10",
        )


def _ort_tensorrt(libraries: Sequence[Path]) -> Iterator[Finding]:
    """Tell whether ONNX Runtime's own TensorRT provider could find what it was built for."""
    try:
        wanted = next((n for n in required_libraries() if n.startswith("libnvinfer.so")), "")
    except ProviderError:
        return  # of a package without that provider
    names = [f"{path.name}." for path in libraries]
    if wanted and not any(name.startswith(f"{wanted}.") for name in names):
        yield Finding(
            "ort-tensorrt",
            f"ONNX Runtime's TensorRT provider needs {wanted}, which is not here",
            "--provider tensorrt does without it; or python -m pip install "
            f"'tensorrt=={wanted.rpartition('.')[2]}.*'",
        )


def _same(library: tuple[int, ...], module: tuple[int, ...]) -> bool:
    """Compare as many parts as a library's name tells, at most major and minor."""
    parts = min(len(library), 2)
    return library[:parts] == module[:parts]


def _age(numbers: tuple[int, ...]) -> str:
    """Return the cure for a version that mdruntime cannot use, "" for others."""
    if numbers and numbers[0] > _NEWEST:
        return f"newer than TensorRT {_NEWEST}, which this mdruntime knows: install an older one"
    if len(numbers) > 1 and numbers[:2] < _OLDEST:
        return f"older than TensorRT {_dotted(_OLDEST)}, which mdruntime needs: install a newer one"
    return ""


def _how_to_install(board: jetson.Board | None) -> str:
    if board is None:
        return "python -m pip install tensorrt"
    return "sudo apt install nvidia-jetpack"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _dotted(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))
