"""TensorRT's Python module, versions 10.3 (JetPack 6.2) to 11: the only place that imports it."""

import importlib
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

from mdruntime.errors import ProviderError

__all__ = ["errors_of", "failure", "import_tensorrt", "logger", "version"]

_OLDEST, _TOO_NEW = (10, 3), (12,)
_CURE = (
    "install it with: python -m pip install 'tensorrt>=10.3,<12' (Jetson: sudo apt install "
    "python3-libnvinfer, and make the virtual environment with --system-site-packages)"
)
_MEMORY = re.compile(r"out ?of ?memory|bad_alloc|failed to allocate|MemoryAllocation", re.I)


def import_tensorrt() -> ModuleType:
    """Import TensorRT.

    Raises:
        ProviderError: it is not installed, lacks its libraries, or is of an unknown version.
    """
    try:
        trt = importlib.import_module("tensorrt")
    except ModuleNotFoundError as error:
        raise ProviderError(f"TensorRT's Python module is missing ({error}); {_CURE}") from None
    except ImportError as error:  # the module is there, and its libraries are not
        raise ProviderError(f"TensorRT cannot be loaded ({error}); {_CURE}") from None
    found = version(trt)
    if not _OLDEST <= found < _TOO_NEW:
        text = getattr(trt, "__version__", "of no version")
        raise ProviderError(f"TensorRT 10.3 to 11 is needed, and {text} was found; {_CURE}")
    return trt


def version(trt: ModuleType) -> tuple[int, ...]:
    """Return TensorRT's version, such as (10, 3, 0); () where the module does not tell."""
    return tuple(map(int, re.findall(r"\d+", str(getattr(trt, "__version__", "")))))


def logger(trt: ModuleType, tell: Callable[[str], None] | None = None) -> Any:
    """Return a logger of TensorRT's that keeps ``lines``, pairs of severity and text.

    Severities are the names of ``ILogger.Severity``; what is ``VERBOSE`` is dropped.

    Args:
        trt: TensorRT's module, whose class has to be inherited from.
        tell: is called with each line as text.
    """
    base: Any = trt.ILogger

    class Lines(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)  # the bindings ask for it, and not by super()
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity == base.Severity.VERBOSE:
                return
            self.lines.append((severity.name, msg))
            if tell is not None:
                tell(f"{severity.name}: {msg}")

    return Lines()


def errors_of(log: Any) -> list[str]:
    """Return the texts of a logger's errors."""
    return [text for severity, text in log.lines if severity.endswith("ERROR")]


def failure(log: Any, what: str, kind: type[Exception] = ProviderError) -> Exception:
    """Return what to raise where TensorRT reports a failure by its log alone; empty the log.

    Args:
        log: the logger.
        what: what failed, as the beginning of a sentence.
        kind: of exception where memory is not the reason.
    """
    errors = errors_of(log)
    log.lines.clear()  # or the next failure would be explained by what was long ago
    reason = " ".join((errors or ["TensorRT gave no reason"])[-1].split())
    if any(_MEMORY.search(text) for text in errors):
        return MemoryError(f"{what} for want of memory: {reason}")
    return kind(f"{what}: {reason}")
