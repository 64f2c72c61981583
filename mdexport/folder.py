"""The folder of a build: made beside its final name, and given that name once it is complete."""

import errno
import os
import shutil
from pathlib import Path

__all__ = ["prepare", "publish", "require_space"]

_SPARE = 16 << 20  # bytes for graphs, test vectors and the report


def prepare(folder: Path, *, force: bool) -> Path:
    """Create and return the folder to write into.

    Args:
        folder: the final name.
        force: an existing folder will be replaced.

    Raises:
        FileExistsError: the folder exists, or another build is at work.
    """
    if folder.exists() and not force:
        raise FileExistsError(f"{str(folder)!r} exists; choose another --output, or pass --force")
    if _holds_the_user(folder):
        raise FileExistsError(
            f"{str(folder)!r} holds the working or the home folder and is never replaced; "
            "choose another --output"
        )
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists() and not force:
        raise FileExistsError(
            f"{str(partial)!r} exists: another build is running, or was killed; "
            "delete the folder, or pass --force"
        )
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _holds_the_user(folder: Path) -> bool:
    places = (Path.cwd(), Path(os.environ.get("HOME", "/")))
    return any(place.resolve().is_relative_to(folder.resolve()) for place in places)


def require_space(partial: Path, weights: int) -> None:
    """Refuse early what cannot fit, before minutes are spent on it.

    Args:
        partial: the folder to write into.
        weights: bytes of the model's weights.
    """
    needed = int(1.1 * weights) + _SPARE
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"the bundle needs about {needed >> 20} MiB, {free >> 20} MiB are free"
        )


def publish(partial: Path, folder: Path) -> None:
    """Give the finished folder its name; a predecessor disappears only then."""
    old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException:  # an interrupt, too, must not leave the predecessor under another name
        if old.exists():
            old.rename(folder)
        raise
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)
