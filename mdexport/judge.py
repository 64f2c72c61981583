"""Judges: what says how good samples are."""

import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast, runtime_checkable

from mdruntime.errors import SamplingError

__all__ = ["Judge", "load_judge", "scores_of"]


@runtime_checkable
class Judge(Protocol):
    """What turns samples into numbers."""

    measure: str
    """Key of the score that is the quality. Smaller is better."""

    def score(self, samples: Any, labels: Sequence[int] | None) -> Mapping[str, float]:
        """Return scores by name, ``measure`` among them.

        Args:
            samples: uint8 (count, height, width, 3) of image models, or a list of texts.
            labels: class of each sample, of class-conditional models.
        """


def load_judge(spec: str) -> Judge:
    """Return the judge that a Python file offers.

    The file's own folder is searched last for what it imports.

    Args:
        spec: ``path/to/file.py:name``; the name is a callable that takes nothing.

    Raises:
        SamplingError: no such file or name, or what it returns is no judge.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise SamplingError(f"a judge must be given as FILE.py:NAME, got {spec!r}")
    module = _import(Path(place))
    make = getattr(module, name, None)
    if not callable(make):
        offers = ", ".join(key for key, item in vars(module).items() if _is_own(module, item))
        raise SamplingError(f"{place} has no function {name!r}; it has {offers or 'none'}")
    judge = _called(f"the judge {spec!r}", make)
    if not isinstance(judge, Judge) or not isinstance(judge.measure, str):
        raise SamplingError(
            f"{spec!r} must return a judge with a text 'measure' and a method 'score', "
            f"got {type(judge).__name__}"
        )
    return judge


def _import(path: Path) -> ModuleType:
    if not path.is_file():
        raise SamplingError(f"the judge's file {str(path)!r} does not exist; pass FILE.py:NAME")
    spec = importlib.util.spec_from_file_location(f"_judge_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise SamplingError(f"the judge's file must be Python, got {str(path)!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # last: a judge's neighbours must not hide other packages
    _called(f"the judge's file {str(path)!r}", partial(spec.loader.exec_module, module))
    return module


def _is_own(module: ModuleType, item: Any) -> bool:
    public = not getattr(item, "__name__", "_").startswith("_")
    return public and getattr(item, "__module__", "") == module.__name__


def scores_of(judge: Judge, samples: Any, labels: Sequence[int] | None) -> dict[str, float]:
    """Return a judge's scores, once they are known to be finite numbers.

    Raises:
        SamplingError: the judge failed, left its measure out, or returned something else.
    """
    found = _called("the judge", lambda: judge.score(samples, labels))
    if not isinstance(found, Mapping) or judge.measure not in found:
        names = ", ".join(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
        raise SamplingError(
            f"the judge must return its measure {judge.measure!r} among its scores, got {names}"
        )
    return {str(name): _number(name, value) for name, value in found.items()}


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise SamplingError(f"the judge must return finite numbers, got {name} {value!r}")
    return number


def _called(what: str, function: Callable[[], Any]) -> Any:
    """Call a user's function, and say whose fault it is where that fails."""
    try:
        return cast(Any, function())
    except Exception as error:
        raise SamplingError(
            f"{what} raised {type(error).__name__}: {error}; mend it and run the command again "
            "(MDEXPORT_TRACEBACK=1 shows where)"
        ) from error
