"""How a stand-in library is called: types declared, arguments converted, error codes returned."""

import ctypes
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tests.standin.device import Device
from tests.standin.errors import CodeError, Cuda
from tests.standin.memory import MisuseError
from tests.standin.options import Options

__all__ = ["StandInLibrary"]

_NO_ERROR_CODE = {"cudaGetErrorName", "cudaGetErrorString", "cudaGetLastError"}
_WITHOUT_DRIVER = {"cudaRuntimeGetVersion", "cudaDriverGetVersion"}


class _Function:
    """A function as ctypes shows it: arguments are converted by the declared types."""

    def __init__(self, call: Callable[[list[Any]], Any], name: str) -> None:
        self.argtypes: Sequence[Any] | None = None
        self.restype: Any = None
        self._call = call
        self._name = name

    def __call__(self, *given: Any) -> Any:
        if self.argtypes is None or self.restype is None:
            raise MisuseError(f"{self._name} is called before its types are declared")
        if len(given) != len(self.argtypes):
            raise ctypes.ArgumentError(f"{self._name} takes {len(self.argtypes)} arguments")
        return self._call([_converted(*pair) for pair in zip(self.argtypes, given, strict=True)])


def _converted(argtype: Any, given: Any) -> Any:
    """Return what a C function would see of an argument."""
    if hasattr(argtype, "_type_") and isinstance(argtype._type_, type):  # a pointer to something
        argtype.from_param(given)
        return given._obj if hasattr(given, "_obj") else given.contents
    value = given if isinstance(given, argtype) else argtype(given)
    return value.value or 0


class StandInLibrary:
    """Looks functions up by name, as ctypes does, and keeps what they did wrong.

    Attributes:
        device: what it drives.
        misuse: what a program did that a real device would not have told it, in words.
    """

    def __init__(self, options: Options | None = None) -> None:
        self.device = Device(options or Options())
        self.misuse: list[str] = []
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._calls: Counter[str] = Counter()
        self._last = 0
        self._failures = {(name, nth): code for name, nth, code in self.device.options.failures}
        self._functions: dict[str, _Function] = {}

    def __getattr__(self, name: str) -> _Function:
        if not name.startswith("cuda"):
            raise AttributeError(name)
        snake = re.sub("[A-Z]", lambda letter: f"_{letter[0].lower()}", name.removeprefix("cuda"))
        body = getattr(type(self), snake, None)
        if body is None:
            raise AttributeError(f"{type(self).__name__} has no {name}")

        def call(values: list[Any]) -> Any:
            return self._call(name, body, values)

        return self.__dict__["_functions"].setdefault(name, _Function(call, name))

    def fail(self, name: str, code: int) -> None:
        """Let the next call of a function answer with an error code."""
        self._failures[name, self._calls[name] + 1] = code

    def guarded(self, work: Callable[[], Any]) -> Any:
        """Do work on the device, one thread at a time, and remember its misuse."""
        with self._lock:
            try:
                return work()
            except MisuseError as misuse:
                self.misuse.append(str(misuse))
                raise

    def _call(self, name: str, body: Callable[..., Any], values: list[Any]) -> Any:
        if name in _NO_ERROR_CODE:
            return body(self, *values)
        try:
            self.guarded(lambda: self._answer(name, body, values))
        except CodeError as failed:
            self._last = failed.code
            return failed.code
        return 0

    def _answer(self, name: str, body: Callable[..., Any], values: list[Any]) -> None:
        self._calls[name] += 1
        if os.getpid() != self._process:
            raise CodeError(Cuda.INITIALIZATION_ERROR)
        code = self._failures.pop((name, self._calls[name]), 0)
        if code:
            raise CodeError(code)
        options = self.device.options
        if name not in _WITHOUT_DRIVER:
            if options.driver < options.runtime and options.driver[0] < options.runtime[0]:
                raise CodeError(Cuda.INSUFFICIENT_DRIVER)
            if not options.devices:
                raise CodeError(Cuda.NO_DEVICE)
        body(self, *values)

    def forget(self) -> int:
        """Return the last error code, and forget it."""
        last, self._last = self._last, 0
        return last
