"""Published checkpoints: files to tensors by name, and tensors into modules, or one clear error.

A checkpoint is a file (see ``mdzoo.weightfile``), the index of its shards, or a folder that
holds one of these (see ``mdzoo.folder``). ``mdzoo.hub`` fetches what is not on this machine.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mdzoo import folder, weightfile
from mdzoo.weightfile import CheckpointError, listed, sha256

__all__ = ["CheckpointError", "fit", "hashes", "read", "sha256", "shape_of"]

WRAPPERS = ("model_state_dict", "state_dict", "model", "params")
"""Keys under which trainers put the weights, beside the state of the optimiser and the like."""

AVERAGES = ("ema", "model_ema", "ema_state_dict")
"""Keys under which trainers put running averages (EMA) of the weights."""

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


def read(path: Path, *, strip: Sequence[str] = (), ema: bool = False) -> dict[str, Tensor]:
    """Return the weights of a checkpoint under their published names.

    Wrappers and prefixes that trainers add are taken off, known extras left out. The weights of
    flax have the names of their paths in its tree, such as ``Embed_0/embedding``.

    Args:
        path: a file of safetensors, ``torch.save`` or flax, whatever its suffix; the index of
            shards; or a folder with one of these.
        strip: prefixes that the family may shed beside ``PREFIXES``, such as ``backbone.``; one
            goes, as often as it is there, only where all names begin with it.
        ema: put averages in the place of the weights where the file holds any, by name or as
            the list ``shadow_params`` in the order of the parameters. A file with averages by
            name and no weights is read as these either way.

    Raises:
        CheckpointError: there is no such file, or it is damaged, refused, or holds no weights.
    """
    path = folder.weight_file(path)
    tree = _merge(path) if path.suffix == ".json" else _mapping(path)
    weights = _plain(_tensors(_unwrap(tree)), strip)
    if ema or not weights:
        weights |= _averages(tree, weights, strip, path)
    if not weights:
        raise CheckpointError(
            f"{path} must hold tensors by name, found none beside "
            f"{listed([str(key) for key in tree])}; is it a checkpoint?"
        )
    return weights


def hashes(path: Path) -> dict[str, str]:
    """Return the SHA-256 digests, in hexadecimal, of the files that ``read`` takes weights from.

    Args:
        path: as for ``read``.

    Returns:
        Digests by the name of the file, without its folder.
    """
    path = folder.weight_file(path)
    files = sorted(folder.shards(path)) if path.suffix == ".json" else [path]
    return {file.name: sha256(file) for file in files}


def _mapping(path: Path) -> Mapping[Any, Any]:
    tree = weightfile.load(path)
    if not isinstance(tree, Mapping):
        raise CheckpointError(
            f"{path} must hold tensors by name, found a {type(tree).__name__}; "
            "have its state_dict() saved instead"
        )
    return tree


def _merge(index: Path) -> dict[str, Tensor]:
    """Return the tensors of all shards of an index."""
    merged: dict[str, Tensor] = {}
    for shard, names in folder.shards(index).items():
        found = _tensors(_unwrap(_mapping(shard)))
        twice = sorted(merged.keys() & found.keys())
        absent = [name for name in names if name not in found]
        if twice or absent:
            what = f"{listed(twice)} in two shards" if twice else f"no {listed(absent)}"
            raise CheckpointError(
                f"{shard} must hold the tensors that {index.name} names, each once, "
                f"found {what}; download both again"
            )
        merged |= found
    return merged


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


def _plain(weights: dict[str, Tensor], strip: Sequence[str]) -> dict[str, Tensor]:
    weights = {
        key: tensor
        for key, tensor in weights.items()
        if not any(fnmatchcase(key, pattern) for pattern in EXTRAS)
    }
    for prefix in (*PREFIXES, *strip):
        if prefix and weights and all(key.startswith(prefix) for key in weights):
            return _plain({key.removeprefix(prefix): weights[key] for key in weights}, strip)
    return weights


def _averages(
    tree: Mapping[Any, Any], weights: dict[str, Tensor], strip: Sequence[str], path: Path
) -> dict[str, Tensor]:
    """Return the averages of a file by the names of the weights; nothing where it has none."""
    for key in AVERAGES:
        found = tree.get(key)
        if not isinstance(found, Mapping):
            continue
        shadow = found.get("shadow_params")
        if isinstance(shadow, (list, tuple)) and weights:
            return _in_order(shadow, weights, path)
        if named := _plain(_tensors(_unwrap(found)), strip):
            return named
    return {}


def _in_order(
    shadow: Sequence[Any], weights: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """Return averages by name: they come in the order of the parameters, tied ones once.

    Source: repository fadel/pytorch_ema, ``torch_ema/ema.py``, as kuleshov-group/mdlm has it in
    ``models/ema.py``.
    """
    owners: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
            owners.setdefault((place,), []).append(name)
    pairs = zip((names[0] for names in owners.values()), shadow, strict=False)
    misfits = [name for name, average in pairs if not _alike(weights[name], average)]
    if misfits or len(shadow) != len(owners):
        what = f"others for {listed(misfits)}" if len(shadow) == len(owners) else len(shadow)
        raise CheckpointError(
            f"{path} must hold averages of its {len(owners)} weights in their order, "
            f"found {what}; read it without averages"
        )
    return {
        name: average.detach()
        for names, average in zip(owners.values(), shadow, strict=True)
        for name in names
    }


def _alike(weight: Tensor, average: Any) -> bool:
    return (
        isinstance(average, Tensor)
        and average.is_floating_point()
        and average.shape == weight.shape
    )


def shape_of(state: Mapping[str, Tensor], key: str, dimensions: int) -> tuple[int, ...]:
    """Return the shape of a tensor that a published state dict must hold.

    Raises:
        CheckpointError: the tensor is missing, empty, or has another number of dimensions.
    """
    if key not in state:
        raise CheckpointError(
            f"the checkpoint must hold {key!r}, found {len(state)} other tensors "
            f"({listed(list(state))}); is it of another architecture?"
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
        f"{len(keys)} {what} ({listed(keys)})" for what, keys in problems.items() if keys
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
            f"({listed(broken)}); download it again"
        )
    return ready
