"""Comparing a port with logits that the original code recorded."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mdexport.denoiser import Denoiser
from mdruntime.errors import SamplingError

__all__ = ["TOLERANCE", "Comparison", "Recording", "compare", "read_recording"]

TOLERANCE = 1e-4  # largest absolute difference of a logit, where the recording names none
_BATCH = 8


@dataclass(frozen=True, slots=True)
class Recording:
    """Inputs and outputs of the original code."""

    tokens: NDArray[np.int64]  # (batch, length)
    labels: NDArray[np.int64]  # (batch,), -1 for a dropped or absent class
    logits: NDArray[np.floating]  # (batch, length, codebook), with or without the mask's column
    tolerance: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a port is from the original; true when within the tolerance."""

    largest: float  # absolute difference of a logit
    where: tuple[int, ...]  # (sample, position, token) of it
    tolerance: float
    count: int

    def __bool__(self) -> bool:
        """Return whether the port computes what the original computes; NaN never does."""
        return self.largest <= self.tolerance


def read_recording(path: Path) -> Recording:
    """Read ``tokens``, ``labels``, ``logits`` and optionally ``tolerance`` from an npz file.

    Raises:
        SamplingError: the file cannot be read, lacks an array, or their shapes do not fit.
    """
    try:
        with np.load(path) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError) as error:
        raise SamplingError(f"{path.name} must be an .npz file of arrays: {error}") from None
    missing = {"tokens", "labels", "logits"} - set(found)
    if missing:
        raise SamplingError(f"{path.name} lacks {', '.join(sorted(missing))}; found {list(found)}")
    tokens, labels, logits = found["tokens"], found["labels"], found["logits"]
    if tokens.ndim != 2 or labels.shape != tokens.shape[:1] or logits.shape[:-1] != tokens.shape:
        raise SamplingError(
            f"{path.name} must hold tokens [batch, length], labels [batch] and logits "
            f"[batch, length, codebook], got {tokens.shape}, {labels.shape} and {logits.shape}"
        )
    tolerance = float(found.get("tolerance", np.float64(TOLERANCE)))
    return Recording(tokens.astype(np.int64), labels.astype(np.int64), logits, tolerance)


def compare(denoiser: Denoiser, recording: Recording) -> Comparison:
    """Run the port on the recorded inputs and compare logits.

    Args:
        denoiser: in float32.
        recording: of the original.

    Raises:
        SamplingError: the recording belongs to a canvas or codebook of another size.
    """
    spec = denoiser.spec
    _check(recording, spec.length, spec.codebook, spec.mask_token, spec.classes)
    worst, where = -1.0, (0, 0, 0)
    for start in range(0, len(recording.tokens), _BATCH):
        part = slice(start, start + _BATCH)
        with torch.no_grad():
            found = denoiser(
                torch.from_numpy(recording.tokens[part]), torch.from_numpy(recording.labels[part])
            ).numpy()
        expected = recording.logits[part]
        difference = np.abs(found[..., : expected.shape[-1]] - expected)
        # NaN counts as the largest difference of all.
        difference = np.where(np.isnan(difference), np.inf, difference)
        if difference.max() > worst:
            index = np.unravel_index(int(difference.argmax()), difference.shape)
            worst = float(difference.max())
            where = (start + int(index[0]), int(index[1]), int(index[2]))
    return Comparison(worst, where, recording.tolerance, recording.logits.size)


def _check(recording: Recording, length: int, codebook: int, mask: int, classes: int) -> None:
    columns = recording.logits.shape[-1]
    if recording.tokens.shape[1] != length or columns not in (codebook, codebook + 1):
        raise SamplingError(
            f"the model has {length} tokens and logits over {codebook} codes (or one more, the "
            f"mask), the recording {recording.tokens.shape[1]} tokens and {columns} logits"
        )
    ids = recording.tokens
    if ids.size == 0 or ids.min() < 0 or (ids[ids != mask] >= codebook).any():
        raise SamplingError(f"tokens must be ids 0 to {codebook - 1}, or {mask} where hidden")
    if recording.labels.min() < -1 or recording.labels.max() >= max(classes, 0):
        raise SamplingError(f"labels must be -1 to {classes - 1}, got {recording.labels.tolist()}")
