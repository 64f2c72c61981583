"""Comparing a port with logits that the original code recorded."""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdexport.denoiser import Denoiser
from mdruntime.errors import SamplingError
from mdruntime.manifest import DenoiserSpec

__all__ = ["TOLERANCE", "Comparison", "Recording", "compare", "read_recording"]

TOLERANCE = 1e-4  # largest absolute difference of a logit, where the recording names none
_BATCH = 8


DIRECT = ("encoder_hidden_states", "pooled_text_emb", "micro_conds")
"""What a recording of a text-to-image model may hold in the place of ``labels``: the inputs of its
transformer, under their names in diffusers."""


class DirectDenoiser(Protocol):
    """A denoiser that can be asked without its text encoder."""

    @property
    def spec(self) -> DenoiserSpec:
        """Its canvas."""

    def direct(self, tokens: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return logits (batch, length, codebook) of tokens (batch, length) and ``DIRECT``."""


@dataclass(frozen=True, slots=True)
class Recording:
    """Inputs and outputs of the original code."""

    tokens: NDArray[np.int64]  # (batch, length)
    labels: NDArray[np.int64]  # (batch,), -1 for a dropped or absent class; or prompts (batch, n)
    logits: NDArray[np.floating]  # (batch, length, codebook), with or without the mask's column
    tolerance: float
    direct: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)  # see ``DIRECT``


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
    """Read a recording from an npz file.

    It holds ``tokens`` and ``logits``, ``labels`` where the model has classes or reads prompts,
    and optionally ``tolerance``. Tokens of an image may form a grid, and those of a position
    (groups) stand last; logits may have the codebook's axis second, as convolutions return them.

    Raises:
        SamplingError: the file cannot be read, lacks an array, or their shapes do not fit.
    """
    try:
        with np.load(path) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise SamplingError(f"{path.name} must be an .npz file of arrays: {error}") from None
    missing = {"tokens", "logits"} - set(found)
    if missing:
        raise SamplingError(f"{path.name} lacks {', '.join(sorted(missing))}; found {list(found)}")
    tokens = np.asarray(found["tokens"])
    logits = _flat_logits(tokens.shape, np.asarray(found["logits"]))
    tokens = tokens.reshape(len(tokens), -1)
    labels = np.asarray(found.get("labels", np.full(len(tokens), -1)))
    if logits.shape[:-1] != tokens.shape or labels.shape[:1] != tokens.shape[:1]:
        raise SamplingError(
            f"{path.name} must hold tokens [batch, length], labels [batch] and logits [batch, "
            f"length, codebook], got {np.shape(found['tokens'])}, {labels.shape} and "
            f"{np.shape(found['logits'])}"
        )
    absent = set(DIRECT) - set(found)
    if 0 < len(absent) < len(DIRECT):
        raise SamplingError(f"{path.name} must hold all of {', '.join(DIRECT)}; it lacks {absent}")
    return Recording(
        tokens.astype(np.int64),
        labels.astype(np.int64),
        logits,
        float(found.get("tolerance", np.float64(TOLERANCE))),
        {name: found[name].astype(np.float32) for name in DIRECT if name in found},
    )


def _flat_logits(tokens: tuple[int, ...], logits: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return logits as (batch, length, codebook)."""
    if len(tokens) > 2 and logits.ndim == len(tokens) + 1 and logits.shape[2:] == tokens[1:]:
        logits = np.moveaxis(logits, 1, -1)
    return logits.reshape(len(logits), -1, logits.shape[-1])


def compare(denoiser: Denoiser | DirectDenoiser, recording: Recording) -> Comparison:
    """Run the port on the recorded inputs and compare logits.

    Args:
        denoiser: in float32.
        recording: of the original.

    Raises:
        SamplingError: the recording belongs to a canvas or codebook of another size.
    """
    _check(recording, denoiser.spec)
    worst, where = -1.0, (0, 0, 0)
    for start in range(0, len(recording.tokens), _BATCH):
        part = slice(start, start + _BATCH)
        found = _logits(denoiser, recording, part)
        expected = recording.logits[part]
        difference = np.abs(found[..., : expected.shape[-1]] - expected)
        # NaN counts as the largest difference of all.
        difference = np.where(np.isnan(difference), np.inf, difference)
        if difference.max() > worst:
            index = np.unravel_index(int(difference.argmax()), difference.shape)
            worst = float(difference.max())
            where = (start + int(index[0]), int(index[1]), int(index[2]))
    return Comparison(worst, where, recording.tolerance, recording.logits.size)


@torch.no_grad()
def _logits(denoiser: Any, recording: Recording, part: slice) -> NDArray[np.floating]:
    tokens = torch.from_numpy(recording.tokens[part])
    if not recording.direct:
        return denoiser(tokens, torch.from_numpy(recording.labels[part])).numpy()
    inputs = {name: torch.from_numpy(array[part]) for name, array in recording.direct.items()}
    return denoiser.direct(tokens, inputs).numpy()


def _check(recording: Recording, spec: DenoiserSpec) -> None:
    columns, length = recording.logits.shape[-1], recording.tokens.shape[1]
    fits = 0 < length <= spec.length if spec.flexible else length == spec.length
    if not fits or columns < spec.codebook:
        raise SamplingError(
            f"the model has {spec.length} tokens and logits over {spec.codebook} codes (or more: "
            f"the mask), the recording {length} tokens and {columns} logits"
        )
    ids = recording.tokens
    if ids.size == 0 or ids.min() < 0 or (ids[ids != spec.mask_token] >= columns).any():
        raise SamplingError(
            f"tokens must be ids 0 to {spec.codebook - 1}, or {spec.mask_token} where hidden"
        )
    labels = recording.labels
    if labels.ndim == 1 and (labels.min() < -1 or labels.max() >= max(spec.classes, 0)):
        raise SamplingError(f"labels must be -1 to {spec.classes - 1}, got {labels.tolist()}")
