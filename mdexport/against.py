"""Comparing a port with logits that the original code recorded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdexport.denoiser import Denoiser
from mdexport.recording import DIRECT, TOLERANCE, Recording, arranged, read_recording
from mdruntime.errors import SamplingError
from mdruntime.manifest import DenoiserSpec

__all__ = ["TOLERANCE", "Comparison", "Recording", "compare", "read_recording"]

_BATCH = 8
_LOGITS = 1 << 26  # of one batch, where the vocabulary is large


class DirectDenoiser(Protocol):
    """A denoiser that can be asked without its text encoder."""

    @property
    def spec(self) -> DenoiserSpec:
        """Its canvas."""

    @property
    def widths(self) -> Mapping[str, int]:
        """Numbers on the last axis of each of ``DIRECT``."""

    def direct(self, tokens: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return logits (batch, length, codebook) of tokens (batch, length) and ``DIRECT``."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a port is from the original; true when within the tolerance."""

    largest: float  # absolute difference of a logit
    where: tuple[int, ...]  # (sample, position, token) of it
    tolerance: float
    count: int  # logits compared

    def __bool__(self) -> bool:
        """Return whether the port computes what the original computes; NaN never does."""
        return self.largest <= self.tolerance


def compare(
    denoiser: Denoiser | DirectDenoiser,
    recording: Recording,
    prompts: tuple[int, int] | None = None,
) -> Comparison:
    """Run the port on the recorded inputs and compare logits.

    Args:
        denoiser: in float32.
        recording: of the original, as a file has it.
        prompts: see ``arranged``.

    Raises:
        SamplingError: the recording belongs to a canvas or codebook of another size.
    """
    recording = arranged(recording, denoiser.spec, prompts)
    _check_direct(denoiser, recording)
    worst, where, count, logits = -1.0, (0, 0, 0), 0, recording.logits
    step = max(1, min(_BATCH, _LOGITS // logits[0].size))
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        difference = _difference(_run(denoiser, recording, part), logits[part], denoiser.spec)
        count += difference.size
        if difference.max() > worst:
            index = np.unravel_index(int(difference.argmax()), difference.shape)
            worst = float(difference.max())
            where = (start + int(index[0]), int(index[1]), int(index[2]))
    return Comparison(worst, where, recording.tolerance, count)


def _check_direct(denoiser: Any, recording: Recording) -> None:
    batch = len(recording.tokens)
    for name, array in recording.direct.items():
        axes = 3 if name == DIRECT[0] else 2
        width = denoiser.widths[name]
        if array.ndim != axes or (len(array), array.shape[-1]) != (batch, width) or not array.size:
            shape = f"[{batch}, n, {width}]" if axes > 2 else f"[{batch}, {width}]"
            raise SamplingError(f"{name} must have the shape {shape}, got {array.shape}")


@torch.no_grad()
def _run(denoiser: Any, recording: Recording, part: slice) -> NDArray[np.float32]:
    tokens = torch.from_numpy(recording.tokens[part])
    if not recording.direct:
        assert recording.labels is not None
        return denoiser(tokens, torch.from_numpy(recording.labels[part])).numpy()
    inputs = {name: torch.from_numpy(array[part]) for name, array in recording.direct.items()}
    return denoiser.direct(tokens, inputs).numpy()


def _difference(
    found: NDArray[np.float32], expected: NDArray[Any], spec: DenoiserSpec
) -> NDArray[np.float64]:
    """Return absolute differences (batch, length, columns), infinite where either is no number.

    Columns behind those of the port, of ids that are never drawn, are left out; so is what the
    recording lost when it was rounded to float16.
    """
    rows = max((row.dropped + 1 for row in spec.context if row.offset > 0), default=0)
    known = sorted({spec.codebook, found.shape[-1], spec.mask_token + 1, rows} - {0})
    known = [count for count in known if count >= spec.codebook]
    if expected.shape[-1] not in known:
        raise SamplingError(
            f"logits must be over {' or '.join(map(str, known))} ids (codes, or the mask token and "
            f"others too), got {expected.shape[-1]} columns"
        )
    columns = min(expected.shape[-1], found.shape[-1])
    wanted = expected[..., :columns]
    with np.errstate(invalid="ignore"):
        difference = np.abs(found[..., :columns].astype(np.float64) - wanted)
        if wanted.dtype.itemsize < np.dtype(np.float32).itemsize:
            difference = np.maximum(difference - np.spacing(np.abs(wanted)) / 2, 0)
    return np.where(np.isnan(difference), np.inf, difference)
