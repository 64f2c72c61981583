"""What all classes of the stand-in for TensorRT share: strictness, logging, missing names."""

import operator
from collections.abc import Iterable, Iterator
from typing import Any

from tests.standin.device import Device
from tests.standin.library import StandInLibrary
from tests.standin.options import Options
from tests.standin.trt_enums import SEVERITY, make

__all__ = ["Api", "Dims", "Field", "ILogger", "IProgressMonitor", "Logger", "State", "integer"]

Severity = make("Severity", SEVERITY)


class State:
    """What a module of the stand-in belongs to: a level, a device, and the module itself."""

    def __init__(self, library: StandInLibrary, options: Options) -> None:
        self.library = library
        self.options = options
        self.module: Any = None

    @property
    def device(self) -> Device:
        """The device, whose memory and streams are used."""
        return self.library.device

    def new(self, name: str, *arguments: Any) -> Any:
        """Make an object that the module's users cannot make themselves."""
        cls = getattr(self.module, name)
        made = object.__new__(cls)
        object.__setattr__(made, "_state", self)
        made._begin(*arguments)
        return made

    def expect(self, value: Any, enumeration: str) -> Any:
        """Return a member of an enumeration of the module, or refuse what is none."""
        if not isinstance(value, getattr(self.module, enumeration)):
            raise TypeError(f"incompatible function arguments: {value!r} is no {enumeration}")
        return value


class Api:
    """A class of the bindings: no attribute can be set that it does not have."""

    _state: State

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        object.__setattr__(self, name, value)


class Field:
    """A property that keeps its value, of one type.

    Args:
        default: value to begin with; a string names a member of the enumeration.
        kind: a type, or the name of an enumeration.
    """

    def __init__(self, default: Any, kind: type | str) -> None:
        self._default = default
        self._kind = kind

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Api | None, owner: type) -> Any:
        if instance is None:
            return self
        if self._name in instance.__dict__:
            return instance.__dict__[self._name]
        if isinstance(self._kind, str) and self._default is not None:
            return getattr(getattr(instance._state.module, self._kind), self._default)
        return self._default

    def __set__(self, instance: Api, value: Any) -> None:
        if isinstance(self._kind, str):
            instance._state.expect(value, self._kind)
        elif self._kind is int:
            value = integer(value)
        elif not isinstance(value, self._kind):
            raise TypeError(f"{self._name} takes {self._kind.__name__}, got {value!r}")
        instance.__dict__[self._name] = value


class Absent:
    """A name that this API level does not have."""

    def __get__(self, instance: object, owner: type) -> Any:
        raise AttributeError("this API level of TensorRT lacks the name")

    def __set__(self, instance: object, value: Any) -> None:
        raise AttributeError("this API level of TensorRT lacks the name")


class Dims:
    """Dimensions of a tensor; -1 is one that is not known yet."""

    def __init__(self, shape: Iterable[int] = ()) -> None:
        self._sizes = tuple(integer(size) for size in shape)

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[int]:
        return iter(self._sizes)

    def __getitem__(self, index: Any) -> Any:
        return self._sizes[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dims | tuple | list) and tuple(other) == self._sizes

    def __hash__(self) -> int:
        return hash(self._sizes)

    def __repr__(self) -> str:
        return repr(self._sizes)


class IHostMemory(bytearray):
    """Memory of the library that Python can read as a buffer."""

    @property
    def nbytes(self) -> int:
        """How many bytes."""
        return len(self)


class ILogger:
    """Base of loggers; a subclass must call ``__init__`` and define ``log``."""

    Severity = Severity
    INTERNAL_ERROR = Severity.INTERNAL_ERROR
    ERROR = Severity.ERROR
    WARNING = Severity.WARNING
    INFO = Severity.INFO
    VERBOSE = Severity.VERBOSE

    def __init__(self) -> None:
        self._begun = True

    def log(self, severity: Any, msg: str) -> None:
        """Take a message."""
        raise NotImplementedError('Tried to call pure virtual function "ILogger::log"')


class Logger(ILogger):
    """A logger that keeps what it is told, in place of printing it."""

    def __init__(self, min_severity: Any = Severity.WARNING) -> None:
        super().__init__()
        self.min_severity = min_severity
        self._kept: list[tuple[str, str]] = []

    def log(self, severity: Any, msg: str) -> None:
        """Keep a message."""
        if int(severity) <= int(self.min_severity):
            self._kept.append((severity.name, msg))


class IProgressMonitor:
    """Base of progress monitors; a subclass must call ``__init__``."""

    def __init__(self) -> None:
        self._begun = True

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """Hear that a phase begins."""
        raise NotImplementedError('"IProgressMonitor::phase_start" is pure virtual')

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Hear that a step is done, and say whether to go on."""
        raise NotImplementedError('"IProgressMonitor::step_complete" is pure virtual')

    def phase_finish(self, phase_name: str) -> None:
        """Hear that a phase is over."""
        raise NotImplementedError('"IProgressMonitor::phase_finish" is pure virtual')


def begun(given: Any, base: type) -> Any:
    """Return an object of a subclass whose ``__init__`` called the base's, or refuse it."""
    if not isinstance(given, base):
        raise TypeError(f"incompatible function arguments: {given!r} is no {base.__name__}")
    if not getattr(given, "_begun", False):
        raise TypeError(f"{base.__name__}.__init__() must be called when overriding __init__")
    return given


def integer(value: Any) -> int:
    """Return an int, from nothing but one."""
    return operator.index(value)
