"""The TensorRT that ONNX Runtime's own provider was built for, which no other version replaces."""

import ctypes
import importlib.util
from pathlib import Path

from mdruntime.errors import ProviderError
from mdruntime.libraries import find, needed

__all__ = ["load_required", "required_libraries"]

_PROVIDER = "libonnxruntime_providers_tensorrt.so"
_OTHER_WAY = "or choose --provider tensorrt, which does without ONNX Runtime"


def required_libraries(folder: Path | None = None) -> list[str]:
    """Return the names of NVIDIA's TensorRT libraries that ONNX Runtime's provider is linked with.

    Args:
        folder: of the provider's library; where ONNX Runtime is installed if not given.

    Raises:
        ProviderError: the provider is not part of the installed package.
    """
    path = (_package() if folder is None else folder) / _PROVIDER
    if not path.is_file():
        raise ProviderError(
            "the installed ONNX Runtime has no TensorRT provider; install onnxruntime-gpu, "
            f"{_OTHER_WAY}"
        )
    try:
        names = [name for name in needed(path) if name.startswith("libnv")]
    except ValueError as error:
        raise ProviderError(f"{error}; install onnxruntime-gpu again, {_OTHER_WAY}") from None
    return sorted(names)


def _package() -> Path:
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or not spec.submodule_search_locations:
        raise ProviderError("ONNX Runtime is not installed: python -m pip install onnxruntime-gpu")
    return Path(spec.submodule_search_locations[0]) / "capi"


def load_required(root: Path = Path("/"), folder: Path | None = None) -> str:
    """Load the TensorRT libraries that ONNX Runtime's provider wants, and return what was loaded.

    Once they are loaded, the provider finds them, wherever they lie.

    Args:
        root: folder taken for the root of the file system.
        folder: see ``required_libraries``.

    Raises:
        ProviderError: there are none of that version.
    """
    return ", ".join(_load(name, root) for name in required_libraries(folder))


def _load(name: str, root: Path) -> str:
    stem, _, major = name.partition(".so.")
    found = find(stem, root)
    paths = [str(path) for path in found if f"{path.name}.".startswith(f"{name}.")]
    reasons = {path: _refused(path) for path in (*paths, name)}
    for path, reason in reasons.items():
        if not reason:
            return path
    others = ", ".join(map(str, found)) or "none"
    raise ProviderError(
        f"ONNX Runtime's TensorRT provider needs {name}, which cannot be loaded ({reasons[name]}; "
        f"found: {others}); install TensorRT {major} (python -m pip install "
        f"'tensorrt=={major}.*'), {_OTHER_WAY}"
    )


def _refused(path: str) -> str:
    """Load a library; return why it cannot be loaded, "" where it can."""
    try:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return str(error)
    return ""
