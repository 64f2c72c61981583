"""The file that ``mdruntime tune`` leaves beside a bundle: the sampler chosen for this device.

It stands in the bundle's parent folder, so that the bundle stays as it was built, and is
``<name of the bundle's folder>.tuned.json``. It belongs to one build of the bundle and carries
the SHA-256 of itself without its last field, as manifests do.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdruntime.bundle import Bundle
from mdruntime.errors import BundleError
from mdruntime.machine import Machine, device_name
from mdruntime.records import from_json, to_json
from mdruntime.sampling import Sampling

__all__ = ["TUNED_FORMAT", "Tuned", "check_place", "read_tuned", "save_tuned", "tuned_path"]

TUNED_FORMAT = 2


@dataclass(frozen=True, slots=True)
class Tuned:
    """A sampler, what it was chosen for, and what is known of it."""

    format: int
    bundle: str  # digest of its manifest
    name: str  # row of the bundle's study
    sampling: Sampling
    predicted_ms: float  # of a sample, decoder included
    quality: float  # of the study; smaller is better
    measure: str  # what the quality is
    batch: int  # samples that run together
    machine: Machine
    precision: str  # of the denoiser
    digest: str = ""

    @property
    def made_for(self) -> str:
        """What the choice was made for, in words."""
        threads = f"{self.machine.threads} thread{'s' if self.machine.threads != 1 else ''}"
        where = f"{self.machine.provider}, {self.precision}, {threads}, {self.machine.device}"
        return f"batch {self.batch} on {where}"

    @property
    def summary(self) -> str:
        """One line with all that was chosen and foreseen."""
        return (
            f"{self.name}, {self.predicted_ms:.4g} ms predicted, {self.measure} "
            f"{self.quality:.4g}; for {self.made_for}, {self.machine.date}"
        )

    def strange(self, provider: str, threads: int, precision: str) -> bool:
        """Return whether it was made for another device, provider, precision, or other threads."""
        made, here = self.machine, (device_name(provider), provider, threads, precision)
        return here != (made.device, made.provider, made.threads, self.precision)


def tuned_path(folder: Path) -> Path:
    """Return where the file of a bundle stands."""
    whole = folder.resolve()
    return whole.with_name(f"{whole.name}.tuned.json")


def check_place(folder: Path) -> None:
    """Refuse a bundle whose file could not be written.

    Raises:
        PermissionError: the parent folder cannot be written to.
    """
    parent = tuned_path(folder).parent
    if not os.access(parent, os.W_OK):
        raise PermissionError(
            f"the folder {str(parent)!r}, where the choice would be kept, cannot be written to; "
            "copy the bundle elsewhere, or pass --dry-run and use the options it prints"
        )


def save_tuned(tuned: Tuned, folder: Path) -> Path:
    """Write the file of a bundle, replacing an older one, and return where it stands."""
    path = tuned_path(folder)
    check_place(folder)
    part = path.with_name(f".{path.name}.partial")
    try:
        part.write_bytes(_dump(tuned))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def read_tuned(bundle: Bundle) -> Tuned | None:
    """Return what was chosen for a bundle, or None if nothing was.

    Raises:
        BundleError: the file is damaged, of another format, or another build's.
    """
    path = tuned_path(bundle.folder)
    if not path.exists():
        return None
    try:
        tuned = _parse(path.read_bytes())
        if tuned.bundle != bundle.manifest.digest:
            raise BundleError("was made for another build of this bundle")
    except BundleError as error:
        raise BundleError(
            f"{str(path)!r} {error}; run 'mdruntime tune' again, delete the file, or pass "
            "--no-tuned (tuned=False) to go without it"
        ) from None
    return tuned


def _parse(raw: bytes) -> Tuned:
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"is damaged ({error})") from None
    if not isinstance(data, dict) or not isinstance(data.get("format"), int):
        raise BundleError("is damaged (it has no format number)")
    if data["format"] != TUNED_FORMAT:
        raise BundleError(f"has format {data['format']}, this mdruntime reads {TUNED_FORMAT}")
    if not _is_whole(data, raw):
        raise BundleError("is damaged or was altered (its digest differs)")
    try:
        return from_json(Tuned, data, "it")
    except BundleError as error:
        raise BundleError(f"cannot be used ({str(error).split(';')[0]})") from None


def _is_whole(data: dict[str, Any], raw: bytes) -> bool:
    try:
        rest = {key: value for key, value in data.items() if key != "digest"}
        return data.get("digest") == _sha256(rest) and _encode(data) == raw
    except ValueError:  # NaN, infinity or half a character, none of which is ever written
        return False


def _dump(tuned: Tuned) -> bytes:
    data = to_json(from_json(Tuned, to_json(tuned), "it"))  # whole numbers become floats where due
    data.pop("digest")
    return _encode({**data, "digest": _sha256(data)})


def _sha256(data: dict[str, Any]) -> str:
    return hashlib.sha256(_encode(data)).hexdigest()


def _encode(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
