"""Checkpoints named as on the hub, ``hub:owner/name``, fetched by huggingface_hub if need be.

Only what a model needs is fetched: one file of weights (or its shards) of each folder, and the
settings and tokenizer files beside them.
"""

import glob
import importlib
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mdzoo.folder import choose, shards_among
from mdzoo.weightfile import CheckpointError, existing, listed

__all__ = ["resolve"]

SETTINGS = (".json", ".txt", ".model", ".yaml", ".yml", ".jinja")
"""Suffixes of settings and of tokenizers."""

_WORD = r"\w[\w.-]*"
_NAME = re.compile(rf"hub:({_WORD}/{_WORD})(?:@([\w.+-]+))?(?:/(.+))?", re.ASCII)

REFUSALS = {
    "GatedRepoError": "is gated; accept its terms on its page and run `hf auth login`",
    "RepositoryNotFoundError": "does not exist or is private; correct the name",
    "RevisionNotFoundError": "has no such revision; correct what follows the @",
    "HFValidationError": "is no valid name; correct it",
}
"""What the hub answers, by the exceptions of huggingface_hub; derived ones come first."""


class _Wanted(NamedTuple):
    """A parsed name."""

    text: str
    repository: str
    revision: str | None  # none: the main branch
    inside: str  # a file or folder of the repository; empty: all of it

    def refuse(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.text} {reason}; the path of a file or folder works too")


def resolve(text: str | Path) -> Path:
    """Return the path of a checkpoint, after fetching it where it is named as on the hub.

    Args:
        text: a path, returned as it is; or ``hub:owner/name[@revision][/file]``, where ``file``
            may be a folder of the repository and may differ in case.

    Raises:
        CheckpointError: the name is malformed, there is no such repository, revision or file,
            the hub cannot be reached, or huggingface_hub is not installed.
    """
    if not str(text).startswith("hub:"):
        return Path(text)
    wanted = _parse(str(text))
    try:
        library = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise wanted.refuse("needs huggingface_hub: pip install huggingface_hub") from error
    return _locate(wanted, _fetch(wanted, library))


def _parse(text: str) -> _Wanted:
    found = _NAME.fullmatch(text)
    inside = PurePosixPath(found[3] or "") if found else PurePosixPath()
    if not found or ".." in inside.parts or inside.is_absolute():
        raise CheckpointError(
            f"a checkpoint on the hub must be named hub:owner/name[@revision][/file], got {text!r}"
        )
    return _Wanted(text, found[1], found[2], str(inside) if found[3] else "")


def _fetch(wanted: _Wanted, library: Any) -> Path:
    """Return the folder of a snapshot with all that is wanted in it."""
    place = {"repo_id": wanted.repository, "revision": wanted.revision}
    try:
        names = library.HfApi().list_repo_files(**place)
    except Exception as error:
        if refusal := _refusal(error):
            raise wanted.refuse(refusal) from error
        return _cached(wanted, library, place, error)
    patterns = [glob.escape(name) for name in _needed(wanted, names)]
    try:
        return Path(library.snapshot_download(**place, allow_patterns=patterns))
    except Exception as error:
        reason = _refusal(error) or f"was not fetched ({type(error).__name__}); try again"
        raise wanted.refuse(reason) from error


def _cached(wanted: _Wanted, library: Any, place: dict[str, Any], error: Exception) -> Path:
    """Return the folder of a snapshot fetched before."""
    try:
        return Path(library.snapshot_download(**place, local_files_only=True))
    except Exception:  # whatever is wrong with the cache, the hub would have put it right
        raise wanted.refuse(
            f"is not on this machine and the hub cannot be reached ({type(error).__name__}); "
            "connect this machine or copy the files"
        ) from error


def _refusal(error: Exception) -> str:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return next((said for name, said in REFUSALS.items() if name in kinds), "")


def _needed(wanted: _Wanted, names: Sequence[str]) -> list[str]:
    """Return the files of a repository that a model needs, without several of one kind."""
    like = wanted.inside.casefold()
    files = [name for name in names if name == wanted.inside] or [
        name for name in names if name.casefold() == like
    ]
    if files:
        folder = _folder(files[0])
        beside = [name for name in names if _folder(name) == folder]
        return files + _shards(beside, files[0]) + _settings(beside)
    under = [name for name in names if not like or name.casefold().startswith(f"{like}/")]
    if not under:
        raise wanted.refuse(f"is not there; found {listed(names)}")
    folders = list(dict.fromkeys(_folder(name) for name in sorted(under, key=_depth)))
    chosen = _weights(wanted, under, folders[0]) or [
        name for folder in folders[1:] for name in _weights(wanted, under, folder)
    ]
    return chosen + _settings(under)


def _weights(wanted: _Wanted, names: Sequence[str], folder: str) -> list[str]:
    """Return the file of weights of one folder, or the index with its shards."""
    inside = [name for name in names if _folder(name) == folder]
    where = str(PurePosixPath(wanted.repository) / folder)
    found = choose([PurePosixPath(name).name for name in inside], f"hub:{where}")
    if found is None:
        return []
    path = str(PurePosixPath(folder) / found)
    return [path, *_shards(inside, path)]


def _shards(names: Sequence[str], index: str) -> list[str]:
    """Return the names, with their folder, of the shards of an index."""
    plain = {PurePosixPath(name).name: name for name in names}
    if not index.endswith(".json"):
        return []
    return [plain[name] for name in shards_among(list(plain), PurePosixPath(index).name)]


def _settings(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.endswith(SETTINGS) and ".index." not in name]


def _folder(name: str) -> str:
    return str(PurePosixPath(name).parent)


def _depth(name: str) -> tuple[int, str]:
    return name.count("/"), name


def _locate(wanted: _Wanted, snapshot: Path) -> Path:
    """Return the wanted file or folder of a snapshot, each part in whatever case."""
    path = snapshot
    for part in PurePosixPath(wanted.inside).parts:
        try:
            path = existing(path / part)
        except CheckpointError as error:
            raise wanted.refuse("is not among the files on this machine") from error
    return path
