"""What the original code computed, as whoever ran it has it: recordings of tokens and logits.

Whoever records has the shapes of the original at hand: images as grids, logits as a convolution
returns them, rows and columns that are never drawn. ``read_recording`` takes a file as it is;
``arranged`` brings it into the one shape that ports have, or says what does not fit.
"""

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdruntime.errors import SamplingError
from mdruntime.manifest import DenoiserSpec

__all__ = ["DIRECT", "TOLERANCE", "Recording", "arranged", "read_recording"]

TOLERANCE = 1e-4  # largest absolute difference of a logit, where the recording names none

DIRECT = ("encoder_hidden_states", "pooled_text_emb", "micro_conds")
"""What a recording of a text-to-image model may hold in the place of ``labels``: the inputs of its
transformer, under their names in diffusers."""

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Recording:
    """Inputs and outputs of the original code: as a file has them, or ``arranged``."""

    tokens: NDArray[np.int64]  # (batch, length); in a file also as a grid, or with context rows
    labels: NDArray[np.int64] | None  # (batch,), -1 for a dropped class; or prompts (batch, n)
    logits: NDArray[np.floating]  # (batch, length, columns); in a file also (batch, columns, ...)
    tolerance: float = TOLERANCE
    direct: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)  # see ``DIRECT``
    numbers: Mapping[str, int] = field(default_factory=dict)  # single ones, such as heads
    unread: tuple[str, ...] = ()  # names of other arrays

    @property
    def columns(self) -> int:
        """How many ids the logits are about."""
        shape, rows = self.logits.shape, math.prod(self.tokens.shape[1:])
        last = math.prod(shape[1:-1]) in (rows, rows + 1) or math.prod(shape[2:]) != rows
        return shape[-1 if last else 1]


def read_recording(path: Path) -> Recording:
    """Read a recording from an npz file.

    It holds ``tokens`` (or ``input_ids``) and ``logits``, ``labels`` where the model has classes
    or reads prompts, and optionally ``tolerance`` and sizes that a checkpoint cannot tell.

    Raises:
        SamplingError: the file cannot be read, lacks an array, or holds other kinds of numbers.
    """
    found = _arrays(path)
    if "tokens" not in found and "input_ids" in found:
        found["tokens"] = found.pop("input_ids")
    missing = sorted({"tokens", "logits"} - set(found))
    if missing:
        raise SamplingError(f"{path.name} lacks {', '.join(missing)}; found {list(found)}")
    tokens, logits = _whole(found.pop("tokens"), "tokens"), found.pop("logits")
    if tokens.ndim == 1:
        tokens, logits = tokens[None], logits[None] if logits.ndim == 2 else logits
    shaped = tokens.ndim > 1 and logits.ndim > 2 and tokens.size and logits.size
    if not shaped or not np.issubdtype(logits.dtype, np.floating):
        raise SamplingError(
            f"{path.name} must hold tokens [batch, length] and, as floating numbers, one logit or "
            f"more [batch, length, codebook], got shapes {tokens.shape} and {logits.shape}, type "
            f"{logits.dtype}"
        )
    labels = _whole(found.pop("labels"), "labels") if "labels" in found else None
    tolerance, direct = _tolerance(found.pop("tolerance", TOLERANCE)), _direct(path, found)
    numbers = {
        name: int(array)
        for name, array in found.items()
        if array.ndim == 0 and np.issubdtype(array.dtype, np.integer)
    }
    unread = tuple(name for name in found if name not in numbers and name not in direct)
    return Recording(tokens, labels, logits, tolerance, direct, numbers, unread)


def _arrays(path: Path) -> dict[str, Array]:
    try:
        with path.open("rb") as stream:
            if stream.read(2) != b"PK":
                raise ValueError("it is no archive, as numpy.savez writes it")
        with np.load(path) as arrays:
            return {name: np.asarray(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise SamplingError(f"{path.name} must be an .npz file of arrays: {error}") from None


def _whole(array: Array, name: str) -> NDArray[np.int64]:
    kind = array.dtype.kind
    if kind not in "iuf" or (kind == "f" and not (np.mod(array, 1) == 0).all()):
        raise SamplingError(f"{name} must be whole numbers, got the type {array.dtype}")
    return np.clip(array, -(1 << 31), 1 << 31).astype(np.int64)


def _tolerance(given: Any) -> float:
    array = np.asarray(given)
    value = float(array.item()) if array.size == 1 and array.dtype.kind in "iuf" else math.nan
    if not 0 <= value < math.inf:
        raise SamplingError(f"tolerance must be one number, not negative, got {array.tolist()}")
    return value


def _direct(path: Path, found: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
    absent = [name for name in DIRECT if name not in found]
    if len(absent) == len(DIRECT):
        return {}
    if absent:
        raise SamplingError(f"{path.name} must hold all of {', '.join(DIRECT)}; it lacks {absent}")
    for name in DIRECT:
        if found[name].dtype.kind not in "iuf" or not np.isfinite(found[name]).all():
            raise SamplingError(f"{name} must hold finite numbers, got {found[name].dtype}")
    return {name: found[name].astype(np.float32) for name in DIRECT}


def arranged(
    recording: Recording, spec: DenoiserSpec, prompts: tuple[int, int] | None = None
) -> Recording:
    """Return a recording with tokens (batch, length), labels, and logits (batch, length, columns).

    Args:
        recording: as a file has it: tokens in a line or in their grid, those of a row on an axis of
            their own; -1 for the mask token; context rows with them, or with the logits.
        spec: of the model.
        prompts: ids that prompts have and how many at most, where a model reads them.

    Raises:
        SamplingError: the recording is of another canvas, codebook or condition.
    """
    tokens, read = _tokens(recording.tokens, spec)
    length = tokens.shape[1]
    fits = 0 < length <= spec.length if spec.flexible else length == spec.length
    logits = _logits(recording.logits, length, spec) if fits else None
    if logits is None or len(logits) != len(tokens):
        some = "up to " if spec.flexible else ""
        raise SamplingError(
            f"a recording must hold tokens [batch, length], labels [batch] and logits [batch, "
            f"length, codebook], of {some}{spec.length} tokens (grid {spec.grid}) here; got tokens "
            f"{recording.tokens.shape} and logits {recording.logits.shape}"
        )
    wrong = (tokens != spec.mask_token) & ((tokens < 0) | (tokens >= spec.codebook))
    if wrong.any():
        raise SamplingError(
            f"tokens must be ids 0 to {spec.codebook - 1}, or {spec.mask_token} or -1 where "
            f"hidden, got {int(tokens[wrong][0])}"
        )
    given = recording.labels if read is None else _agreed(recording.labels, read)
    if spec.classes and not recording.direct:
        labels = _classes(given, len(tokens), spec)
    elif prompts is not None and not recording.direct:
        labels = _prompts(given, len(tokens), prompts)
    else:
        labels = np.full(len(tokens), -1)
    return replace(recording, tokens=tokens, labels=labels, logits=logits)


def _forms(length: int, spec: DenoiserSpec) -> list[tuple[int, ...]]:
    """Return the shapes that the tokens of a sample may have, all in the same order."""
    forms: list[tuple[int, ...]] = [(length,)]
    if length == spec.length:
        forms += [spec.grid, *([(1, length)] if len(spec.grid) == 1 else [])]
    return [*forms, *(group for form in forms for group in _grouped(form, spec))]


def _grouped(form: tuple[int, ...], spec: DenoiserSpec) -> list[tuple[int, ...]]:
    """Return a shape with the tokens of a row on an axis of their own, where rows are in order."""
    if spec.slots == 1 or spec.patch[0] > 1:  # larger patches span lines of the grid
        return []
    return [(*form[:-1], form[-1] // spec.slots, spec.slots)]


def _tokens(
    given: NDArray[np.int64], spec: DenoiserSpec
) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """Return tokens (batch, length), and the ids of a context row that stands with them."""
    length, more = math.prod(given.shape[1:]), len(spec.context)
    read = None
    if more and spec.slots == 1 and given.shape[1:] == (spec.length + more,):
        read = given[:, 0 if spec.first else -1]
        given, length = given[:, spec.first : spec.first + spec.length], spec.length
        read = _labels_of(read, spec)
    if given.shape[1:] not in _forms(length, spec):
        raise SamplingError(
            f"a recording must hold tokens [batch, {'length' if spec.flexible else spec.length}], "
            f"or such as the grid {spec.grid}, got {given.shape}"
        )
    tokens = given.reshape(len(given), -1)
    return np.where(tokens == -1, spec.mask_token, tokens), read


def _labels_of(ids: NDArray[np.int64], spec: DenoiserSpec) -> NDArray[np.int64]:
    row = spec.context[0]
    if spec.classes and row.offset > 0:
        dropped = spec.unconditional & (ids == row.dropped)
        return np.where(dropped, -1, np.where(ids < row.offset, spec.classes, ids - row.offset))
    if (ids != row.dropped).any():
        raise SamplingError(
            f"the row beside the {spec.length} tokens must hold {row.dropped}, got {ids.tolist()}"
        )
    return np.full(len(ids), -1)


def _agreed(labels: NDArray[np.int64] | None, read: NDArray[np.int64]) -> NDArray[np.int64]:
    if labels is not None and not np.array_equal(labels.ravel(), read):
        raise SamplingError(
            f"labels must be those of the row beside the tokens, {read.tolist()}, "
            f"got {labels.tolist()}"
        )
    return read


def _logits(given: Array, length: int, spec: DenoiserSpec) -> Array | None:
    """Return logits as (batch, length, columns); nothing where they are of another shape."""
    canvas = length + len(spec.context) * spec.slots
    forms = _forms(length, spec)
    lines = [*forms, (canvas,), *_grouped((canvas,), spec)]
    batch, *rest = given.shape
    shape, columns = tuple(rest[:-1]), rest[-1]
    joint = [form[:-1] for line in ((length,), (canvas,)) for form in _grouped(line, spec)]
    if shape in lines:
        flat = given.reshape(batch, -1, columns)
    elif tuple(rest[1:]) in forms:
        flat = np.moveaxis(given, 1, -1).reshape(batch, -1, rest[0])
    elif shape in joint and columns == spec.slots * spec.codebook:
        flat = given.reshape(batch, -1, spec.codebook)  # as a linear map returns groups
    else:
        return None
    start = spec.first * spec.slots if flat.shape[1] > length else 0
    return flat[:, start : start + length]


def _classes(labels: NDArray[np.int64] | None, batch: int, spec: DenoiserSpec) -> NDArray[np.int64]:
    least = -1 if spec.unconditional else 0
    meaning = " (-1: dropped)" if spec.unconditional else ""
    span = f"{least} to {spec.classes - 1}{meaning}"
    if labels is None:
        raise SamplingError(f"the recording lacks labels: it must hold one of {span} per sample")
    flat = labels.ravel()
    if labels.shape not in ((batch,), (batch, 1)) and not (batch == 1 and labels.ndim == 0):
        raise SamplingError(f"labels must have the shape [{batch}], got {labels.shape}")
    if flat.min() < least or flat.max() >= spec.classes:
        raise SamplingError(f"labels must be {span}, got {flat.tolist()}")
    return flat


def _prompts(
    labels: NDArray[np.int64] | None, batch: int, prompts: tuple[int, int]
) -> NDArray[np.int64]:
    vocabulary, most = prompts
    shape = () if labels is None else labels.shape
    if labels is None or labels.ndim != 2 or shape[0] != batch or not 0 < shape[1] <= most:
        raise SamplingError(
            f"a recording must hold {', '.join(DIRECT)}, or the ids of prompts as labels "
            f"[{batch}, {most}], got labels {list(shape)}"
        )
    if labels.min() < 0 or labels.max() >= vocabulary:
        raise SamplingError(f"the ids of prompts must be 0 to {vocabulary - 1}")
    return labels
