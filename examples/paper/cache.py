"""Arrays that take minutes to make are made once and kept in the user's cache folder."""

import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Arrays", "folder", "kept"]

Arrays = Mapping[str, NDArray[Any]]


def folder() -> Path:
    """Return where things are kept: ``MDEXPORT_CACHE``, or ``mdexport`` in the user's cache."""
    given = os.environ.get("MDEXPORT_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mdexport"


def kept(path: Path, key: str, make: Callable[[], Arrays], what: str) -> Arrays:
    """Return the arrays of a file, or make them and write it.

    Args:
        path: of the file, in the format of ``numpy.savez``.
        key: of what the arrays are made of; those of another key are made anew.
        make: returns the arrays.
        what: is being made, and how long it takes: goes to the standard error.
    """
    found = _read(path)
    if found.get("key") == key:
        return found
    print(f"{what}; kept in {path}", file=sys.stderr, flush=True)
    arrays = {**make(), "key": np.array(key)}
    try:
        _write(path, arrays)
    except OSError as error:
        print(
            f"cannot keep it, it will be made again the next time: {error}; set MDEXPORT_CACHE to "
            "a folder that can be written",
            file=sys.stderr,
        )
    return arrays


def _read(path: Path) -> Arrays:
    try:
        with path.open("rb") as file, np.load(file) as found:
            return dict(found)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return {}  # absent, cut off, or something else


def _write(path: Path, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    contents: dict[str, Any] = dict(arrays)
    try:
        with partial.open("wb") as file:  # given a name, savez would append a suffix to it
            np.savez_compressed(file, **contents)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
