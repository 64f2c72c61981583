"""What this package ships: weights of models trained for it, and their quality tables."""

import json
from importlib.resources import as_file, files
from pathlib import Path

from mdruntime.records import from_json
from mdruntime.study import Study

__all__ = ["packaged", "shipped_study"]


def packaged(name: str) -> Path:
    """Return a file of the package's weights."""
    with as_file(files("mdzoo") / "weights" / name) as path:
        return path  # the package is never zipped: it would not be a real file otherwise


def shipped_study(name: str) -> Study | None:
    """Return the quality table of a shipped model, if it has one.

    ``mdexport study`` measured it; ``examples/paper/run.sh`` has the commands.
    """
    path = packaged(f"{name}.study.json")
    if not path.is_file():
        return None
    return from_json(Study, json.loads(path.read_text(encoding="utf-8")), path.name)
