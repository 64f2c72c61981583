"""Published checkpoints: files to tensors by name, and tensors into modules, or one clear error.

Two formats are read, safetensors and that of ``torch.save``. Whatever a file holds besides
tensors, none of it is executed: see ``mdzoo.unpickle``.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mdzoo import unpickle

__all__ = ["CheckpointError", "fit", "read", "sha256", "shape_of"]

WRAPPERS = ("model_state_dict", "state_dict", "model", "params")
"""Keys under which trainers put the weights, beside the state of the optimiser and the like."""

PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""

EXTRAS = (
    "loss.*",
    "*.position_ids",
    "quantize.codebook_used",
    "*rotary_emb.inv_freq",
    "*bits_to_indices",
)
"""Tensors of training, and buffers that follow from the architecture: no part of a model here."""

FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer in place of the file; run `git lfs pull`",
    b"<!doctype": "a web page, saved in place of the file; download the file itself",
    b"<html": "a web page, saved in place of the file; download the file itself",
    b"<?xml": "an XML document, saved in place of the file; download the file itself",
}
"""How files begin that are often met in a checkpoint's place."""


class CheckpointError(ValueError):
    """The checkpoint is missing, damaged, refused, or of another architecture."""


def read(path: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint under their published names.

    Wrappers and prefixes that trainers add are taken off, known extras left out.

    Args:
        path: a file of safetensors or ``torch.save``, whatever its suffix.

    Raises:
        CheckpointError: there is no such file, or it is damaged, refused, or holds no weights.
    """
    tree = _load(path, _inspect(path))
    if not isinstance(tree, Mapping):
        raise CheckpointError(
            f"{path} must hold tensors by name, found a {type(tree).__name__}; "
            "have its state_dict() saved instead"
        )
    weights = _plain(_tensors(_unwrap(tree)))
    if not weights:
        raise CheckpointError(
            f"{path} must hold tensors by name, found none beside "
            f"{_names([str(key) for key in tree])}; is it a checkpoint?"
        )
    return weights


def _inspect(path: Path) -> bytes:
    """Return the first bytes of a file that may be a checkpoint."""
    start = _start(path)
    if not start:
        raise CheckpointError(f"{path} must be a checkpoint, found an empty file; download it")
    for beginning, found in FOREIGN.items():
        if start.lstrip().lower().startswith(beginning):
            raise CheckpointError(f"{path} must be a checkpoint, found {found}")
    return start


def _start(path: Path) -> bytes:
    try:
        if path.is_dir():
            inside = _names(sorted(entry.name for entry in path.iterdir()))
            raise CheckpointError(f"{path} must be a file, found a folder with {inside}; name one")
        with path.open("rb") as stream:
            return stream.read(512)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist; correct the path or download the checkpoint"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _load(path: Path, start: bytes) -> Any:
    try:
        # A header in JSON after its length of 8 bytes: so begins safetensors, whatever the suffix.
        return load_file(path) if start[8:9] == b"{" else _torch_load(path)
    except unpickle.Refused as error:
        raise CheckpointError(f"{path} is refused: {error}") from error
    except Exception as error:  # a damaged file may raise anything
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(
            f"{path} must be a file of torch.save or safetensors, found a damaged or foreign one "
            f"({reason}); download it again"
        ) from error


def _torch_load(path: Path) -> Any:
    with warnings.catch_warnings():  # about formats that the second reader knows
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # whatever it was: the second reader knows more, and says it better
            return unpickle.load(path)


def _unwrap(tree: Mapping[Any, Any]) -> Mapping[Any, Any]:
    for _ in WRAPPERS:  # one inside the other, but not without end
        inner = [tree[key] for key in WRAPPERS if isinstance(tree.get(key), Mapping)]
        tree = inner[0] if inner else tree
    return tree


def _tensors(tree: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {
        key: value.detach()
        for key, value in tree.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }


def _plain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {
        key: tensor
        for key, tensor in weights.items()
        if not any(fnmatchcase(key, pattern) for pattern in EXTRAS)
    }
    for prefix in PREFIXES:
        if weights and all(key.startswith(prefix) for key in weights):
            return _plain({key.removeprefix(prefix): weights[key] for key in weights})
    return weights


def shape_of(state: Mapping[str, Tensor], key: str, dimensions: int) -> tuple[int, ...]:
    """Return the shape of a tensor that a published state dict must hold.

    Raises:
        CheckpointError: the tensor is missing, empty, or has another number of dimensions.
    """
    if key not in state:
        raise CheckpointError(
            f"the checkpoint must hold {key!r}, found {len(state)} other tensors "
            f"({_names(list(state))}); is it of another architecture?"
        )
    shape = tuple(state[key].shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(
            f"{key!r} must have {dimensions} dimensions, none of them 0, got shape {shape}"
        )
    return shape


def fit(module: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Copy all of ``state`` into all of ``module``, in float32.

    Args:
        module: receives the weights.
        state: tensors under the names of ``module.state_dict()``.
        source: where they come from, for messages.

    Raises:
        CheckpointError: a name is missing or unexpected, a shape or kind of number differs, or a
            weight is not finite. The module is as it was.
    """
    misfit = _misfit(module.state_dict(), state)
    if misfit:
        raise CheckpointError(
            f"{source} does not fit {type(module).__name__}: {misfit}. "
            "Is it of another architecture or size?"
        )
    module.load_state_dict(_finite(state, source))


def _misfit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    kinds = {key: (_kind(expected[key]), _kind(state[key])) for key in expected if key in state}
    problems = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "of another shape or type": [
            f"{key}: expected {wanted}, found {found}"
            for key, (wanted, found) in kinds.items()
            if wanted != found
        ],
    }
    return "; ".join(
        f"{len(keys)} {what} ({_names(keys)})" for what, keys in problems.items() if keys
    )


def _kind(tensor: Tensor) -> str:
    if tensor.layout != torch.strided or tensor.is_meta:
        return f"{tensor.layout} on {tensor.device}"
    kind = "float" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {tuple(tensor.shape)}"


def _finite(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    ready = {
        key: tensor.float() if tensor.is_floating_point() else tensor
        for key, tensor in state.items()
    }
    broken = [key for key, tensor in ready.items() if not tensor.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{source} must hold finite weights, found NaN or infinity in {len(broken)} tensors "
            f"({_names(broken)}); download it again"
        )
    return ready


def _names(names: Sequence[str], limit: int = 4) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    shown = [name if name.isprintable() else repr(name) for name in names[:limit]]
    return ", ".join(shown) + rest or "nothing"


def sha256(path: Path) -> str:
    """Return the SHA-256 digest of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
