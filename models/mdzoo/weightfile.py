"""One file of weights: which format it has and what is in it, or one clear error.

Three formats are told apart by their first bytes, whatever the suffix: safetensors, that of
``torch.save``, and flax's. Whatever a file holds besides tensors, none of it is executed.
"""

import hashlib
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mdzoo import flax_msgpack, unpickle

__all__ = ["CheckpointError", "existing", "inspect", "listed", "load", "recognises", "sha256"]

HEADER_BYTES = 100_000_000
"""The longest header that safetensors allows."""

FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer in place of the file; run `git lfs pull`",
    b"<!doctype": "a web page, saved in place of the file; download the file itself",
    b"<html": "a web page, saved in place of the file; download the file itself",
    b"<?xml": "an XML document, saved in place of the file; download the file itself",
}
"""How files begin that are often met in a checkpoint's place."""


class CheckpointError(ValueError):
    """The checkpoint is missing, damaged, refused, or of another architecture."""


def existing(path: Path) -> Path:
    """Return the path as it is spelled on disk, where its last part may differ in case.

    Raises:
        CheckpointError: there is no such file or folder.
    """
    if path.exists():
        return path
    try:
        beside = list(path.parent.iterdir()) if path.parent.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    alike = [
        entry
        for entry in beside
        if entry.name.casefold() == path.name.casefold() and entry.exists()
    ]
    if len(alike) != 1:
        raise _absent(path)
    return alike[0]


def _absent(path: Path) -> CheckpointError:
    what = "is a link to nothing" if path.is_symlink() else "does not exist"
    return CheckpointError(f"{path} {what}; correct the path or download the checkpoint")


def inspect(path: Path) -> bytes:
    """Return the first bytes of a file that may be a checkpoint or belong to one.

    Raises:
        CheckpointError: it is missing, empty, or plainly something else.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(512)
    except FileNotFoundError as error:
        raise _absent(path) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not start:
        raise CheckpointError(f"{path} must be a checkpoint, found an empty file; download it")
    for beginning, found in FOREIGN.items():
        if start.lstrip().lower().startswith(beginning):
            raise CheckpointError(f"{path} must be a checkpoint, found {found}")
    return start


def load(path: Path) -> Any:
    """Return what a file holds: for flax its weights by path, otherwise what was saved.

    Large tensors of safetensors and of the current ``torch.save`` stay on disk until they are
    used: the optimiser's state beside the weights costs no memory.

    Raises:
        CheckpointError: the file is missing, damaged, or a program.
    """
    start = inspect(path)
    try:
        if _is_safetensors(start):
            return load_file(path)
        if flax_msgpack.recognises(start):
            return flax_msgpack.load(path)
        return _torch_load(path, start)
    except unpickle.Refused as error:
        raise CheckpointError(f"{path} is refused: {error}") from error
    except Exception as error:  # a damaged file may raise anything
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(
            f"{path} must be a file of torch.save, safetensors or flax, "
            f"found a damaged or foreign one ({reason}); download it again"
        ) from error


def recognises(start: bytes) -> bool:
    """Say whether a file that begins so can be one of weights."""
    pickled = start[:1] == b"\x80" and 2 <= ord(start[1:2] or b"\0") <= 5  # its protocol
    return (
        pickled
        or start.startswith(b"PK")
        or _is_safetensors(start)
        or flax_msgpack.recognises(start)
    )


def _is_safetensors(start: bytes) -> bool:
    """Say whether a length of 8 bytes and a header in JSON follow."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= HEADER_BYTES


def _torch_load(path: Path, start: bytes) -> Any:
    archive = start.startswith(b"PK")
    if archive:
        _refuse_compressed(path)
    with warnings.catch_warnings():  # about formats that the second reader knows
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
        except Exception:  # whatever it was: the second reader knows more, and says it better
            return unpickle.load(path)


def _refuse_compressed(path: Path) -> None:
    """Stop at an archive whose members may unfold to any size; PyTorch would misread them too."""
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("compressed members, which torch.save does not write")


def listed(names: Sequence[str], limit: int = 4) -> str:
    """Return the first few names as a part of a sentence."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    shown = [name if name.isprintable() else repr(name) for name in names[:limit]]
    return ", ".join(shown) + rest or "nothing"


def sha256(path: Path) -> str:
    """Return the SHA-256 digest of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
