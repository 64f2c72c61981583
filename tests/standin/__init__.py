"""Stand-ins for NVIDIA's CUDA runtime library and for TensorRT. They are not the real ones.

No GPU and no TensorRT library can be had where this project is developed. These modules play them:
device memory, streams, captures and graphs are checked byte by byte (``cudart``), and engines run
their ONNX graph in ONNX Runtime on the CPU (``trt_module``). They refuse what the real ones refuse,
and raise ``MisuseError`` where the real ones would go wrong in silence:

- Work on a stream waits until somebody synchronises. A buffer that is read or overwritten too early
  has the wrong content.
- An address is never used twice. Fresh and freed memory is full of 0xFF: NaN as a float.
- A graph replays the addresses that it was captured with. NVIDIA's developer guide says that a
  context must not be changed after a graph was captured from it: every graph needs a context of its
  own, and the contexts may share their memory.
- Optimisation profiles may be shared by contexts: so it is since TensorRT 10.0.

A test asks for both with ``install``, and a child process gets them through ``environment``.
"""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import mdruntime.cudart
from tests.standin.cudart import StandInCudart
from tests.standin.device import Counters, Device
from tests.standin.memory import MisuseError
from tests.standin.options import VARIABLE, Options

if TYPE_CHECKING:  # a child process has no need of it
    import pytest

__all__ = ["MisuseError", "Options", "StandIn", "environment", "install", "installed"]


class StandIn:
    """Both stand-ins on one device.

    Attributes:
        options: what they play.
        library: the stand-in for libcudart.
        trt: the stand-in for the module ``tensorrt``.
    """

    def __init__(self, options: Options) -> None:
        from tests.standin.trt_module import make_module  # needs onnx and onnxruntime

        self.options = options
        self.library = StandInCudart(options)
        self.trt: ModuleType = make_module(self.library, options)

    @property
    def device(self) -> Device:
        """The device: its memory, streams and handles."""
        return self.library.device

    @property
    def counters(self) -> Counters:
        """What was done with the device so far."""
        return self.device.counters

    def libraries(self) -> Iterator[Any]:
        """Yield the stand-in, as ``mdruntime.cudart.libraries`` yields real ones."""
        yield self.library

    def check(self) -> None:
        """Refuse what went wrong in silence: misuse that was caught on its way, and leaks."""
        assert not self.library.misuse, f"misuse of the device: {self.library.misuse}"
        if self.device.leaks():  # then only: with torch in the process this takes a while
            gc.collect()
        leaks = self.device.leaks()
        assert not leaks, f"not given back to the device: {leaks}"


def install(monkeypatch: "pytest.MonkeyPatch", **options: Any) -> StandIn:
    """Put both stand-ins in place for a test; call ``check`` of what is returned at its end."""
    made = StandIn(Options(**options))
    monkeypatch.setattr(mdruntime.cudart, "libraries", made.libraries)
    monkeypatch.setitem(sys.modules, "tensorrt", made.trt)
    return made


def installed(options: Options) -> StandIn:
    """Put both stand-ins in place in this process, for good: what a child process does."""
    made = StandIn(options)
    mdruntime.cudart.libraries = made.libraries
    sys.modules["tensorrt"] = made.trt
    return made


def environment(**options: Any) -> dict[str, str]:
    """Return the environment of a child process of Python that meets the stand-ins."""
    root = Path(__file__).parents[2]
    folders = [Path(__file__).parent / "child", root, root / "runtime"]
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([*map(str, folders), *([before] if before else [])])
    return {**os.environ, "PYTHONPATH": path, VARIABLE: Options(**options).to_json()}
