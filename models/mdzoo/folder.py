"""Folders of checkpoints: which file holds the weights, its shards, and the settings beside it.

Layouts: those that diffusers and transformers save, the cache of huggingface_hub with its links,
and any folder with one file of weights. Sources: repositories huggingface/huggingface_hub
(``constants.py``, ``file_download.py``), huggingface/transformers and huggingface/diffusers
(``utils/constants.py``) for the names.
"""

import json
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from mdzoo.weightfile import CheckpointError, existing, inspect, listed, recognises

__all__ = ["choose", "read_json", "root", "shards", "shards_among", "weight_file"]

FORMATS = ("safetensors", "bin", "pt", "pth", "ckpt", "msgpack")
"""Suffixes of weights, the preferred first where one model is there in several."""

VARIANTS = ("fp16", "bf16")

TWINS = {
    "model": "transformers",
    "pytorch_model": "transformers",
    "flax_model": "transformers",
    "diffusion_pytorch_model": "diffusers",
    "diffusion_flax_model": "diffusers",
}
"""Names that a library gives to the same weights in several formats."""

TRAINING = ("optimizer*", "scheduler*", "scaler*", "training_args*", "rng_state*", "random_states*")
"""What trainers leave beside the weights in files with the same suffixes."""

DEPTH = 4
"""Folders inside one another to be searched: a hub's cache, a snapshot, a model, its part."""

JSON_BYTES = 64 << 20
"""The largest JSON that is read; an index of the largest models has a few MiB."""

_FORMAT = "|".join(FORMATS)
_VARIANT = f"(?:\\.({'|'.join(VARIANTS)}))?"  # each version of the libraries puts it elsewhere
_NAME = re.compile(
    rf"(?P<stem>.+?){_VARIANT}(?:-\d+-of-(?P<total>\d+))?{_VARIANT}"
    rf"\.(?P<format>{_FORMAT})(?P<index>\.index{_VARIANT}\.json)?",
    re.ASCII,
)


class Weights(NamedTuple):
    """What the name of a file of weights tells."""

    name: str
    stem: str
    variant: str
    format: str
    is_shard: bool
    is_index: bool

    @property
    def model(self) -> str:
        """The same for all files that may stand for one another."""
        return TWINS.get(self.stem, f"{self.stem}.{self.format}")

    @property
    def rank(self) -> tuple[bool, int, bool, str]:
        """Lower for what is preferred: full precision, then the format, then one whole file."""
        return bool(self.variant), FORMATS.index(self.format), self.is_index, self.variant


def _parse(name: str) -> Weights | None:
    found = _NAME.fullmatch(name)
    if not found or any(fnmatchcase(name, pattern) for pattern in TRAINING):
        return None
    variant = next((part for part in found.groups() if part in VARIANTS), "")
    shard = int(found["total"] or 1) > 1
    return Weights(name, found["stem"], variant, found["format"], shard, bool(found["index"]))


def choose(names: Sequence[str], where: str) -> str | None:
    """Return which of the names of a folder is its weights, or the index of their shards.

    Args:
        names: of the files in the folder.
        where: the folder, for messages.

    Returns:
        The name; ``None`` where none is that of weights.

    Raises:
        CheckpointError: several could be meant, or there are shards without their index.
    """
    found = [weights for name in sorted(names) if (weights := _parse(name))]
    whole = [weights for weights in found if not weights.is_shard]
    if found and not whole:
        raise CheckpointError(
            f"{where} must hold the index of its shards ({listed([each.name for each in found])}), "
            f"found none; download {found[0].stem}.{found[0].format}.index.json too"
        )
    best = [
        min((each for each in whole if each.model == model), key=lambda each: each.rank).name
        for model in dict.fromkeys(each.model for each in whole)
    ]
    if len(best) > 1:
        raise CheckpointError(
            f"{where} must hold one file of weights, found {listed(best)}; name one of them"
        )
    return best[0] if best else None


def shards_among(names: Sequence[str], index: str) -> list[str]:
    """Return the names of a folder's files that can be shards of an index."""
    meant = _parse(index)
    return [
        name
        for name in names
        if meant
        and (shard := _parse(name))
        and shard.is_shard
        and (shard.stem, shard.variant, shard.format) == (meant.stem, meant.variant, meant.format)
    ]


def weight_file(path: Path) -> Path:
    """Return the file of weights that a path means, or the index (``.json``) of its shards.

    A file means itself. A folder means what is in it, or in the one folder inside it that holds
    weights; a folder of a hub's cache means its only snapshot, or that which ``refs/main`` names.
    A name may differ from the file's in case.

    Raises:
        CheckpointError: there is no such file, no weights in the folder, or several.
    """
    path = existing(path)
    for _ in range(DEPTH):
        if not path.is_dir():
            return path
        path = root(path)
        path = path / (choose(_files(path), str(path)) or _unnamed(path) or _inner(path))
    raise CheckpointError(f"{path} must hold weights, found folders in folders; name the file")


def root(path: Path) -> Path:
    """Return the snapshot of a folder of a hub's cache, and any other folder as it is.

    Raises:
        CheckpointError: there is no such folder, or there are several snapshots.
    """
    path = existing(path)
    snapshots = path / "snapshots"
    if not snapshots.is_dir():
        return path
    names = _folders(snapshots)
    main = path / "refs" / "main"
    if len(names) > 1 and main.is_file():
        revision = _text(main).strip()
        names = [name for name in names if name == revision] or names
    if len(names) != 1:
        raise CheckpointError(
            f"{path} must hold one snapshot, or refs/main that names one, "
            f"found {listed(names)}; name one of them"
        )
    return snapshots / names[0]


def _inner(path: Path) -> str:
    """Return the only folder inside another one that holds weights."""
    found = [name for name in _folders(path) if _holds_weights(path / name)]
    if not found:
        inside = listed(sorted(entry.name for entry in _entries(path)))
        raise CheckpointError(
            f"{path} has no weights inside, so it must be a file, "
            f"found a folder with {inside}; name one"
        )
    if len(found) > 1:
        raise CheckpointError(
            f"{path} must hold one model, found weights in {listed(found)}; name one of them"
        )
    return found[0]


def _holds_weights(path: Path) -> bool:
    return (path / "snapshots").is_dir() or any(_parse(name) for name in _files(path))


def _unnamed(path: Path) -> str | None:
    """Return the only file that has the content of weights, though not their suffix."""
    found = [name for name in _files(path) if _looks_like_weights(path / name)]
    if len(found) > 1:
        raise CheckpointError(
            f"{path} must hold one file of weights, found {listed(found)}; name one of them"
        )
    return found[0] if found else None


def _looks_like_weights(path: Path) -> bool:
    try:
        return recognises(inspect(path))
    except CheckpointError:
        return False


def _files(path: Path) -> list[str]:
    return sorted(entry.name for entry in _entries(path) if not entry.is_dir())


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in _entries(path) if entry.is_dir())


def _entries(path: Path) -> list[Path]:
    try:
        return [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def shards(index: Path) -> dict[Path, list[str]]:
    """Return the files that an index names, with the tensors that each must hold.

    Raises:
        CheckpointError: the index is damaged, names files elsewhere, or a file is missing.
    """
    named = _json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise CheckpointError(
            f"{index} must hold weight_map, the file of each tensor, found "
            f"{type(named).__name__}; is it the index of a checkpoint?"
        )
    found: dict[Path, list[str]] = {}
    for tensor, name in named.items():
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+", name) or name in (".", ".."):
            raise CheckpointError(
                f"{index} must name files beside it, found {str(name)[:80]!r} for "
                f"{tensor[:80]!r}; download it from where it was published"
            )
        found.setdefault(index.parent / name, []).append(tensor)
    absent = sorted(path.name for path in found if not path.is_file())
    if absent:
        raise CheckpointError(f"{index} needs {listed(absent)} beside it; download what is missing")
    return found


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Return the settings that were saved with a model.

    Args:
        path: the folder of the model, also of a hub's cache; or a file in it; or the JSON itself.
        name: of the file in that folder, such as ``config.json`` or ``vqvae/config.json``.

    Raises:
        CheckpointError: there is no such file, or it does not hold a JSON object.
    """
    path = existing(path)
    if path.is_dir():
        return _json(existing(root(path) / name))
    if path.suffix.lower() == ".json" and not _parse(path.name):
        return _json(path)
    return _json(existing(path.parent / name))


def _json(path: Path) -> dict[str, Any]:
    inspect(path)
    text = _text(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError(
            f"{path} must be a file of JSON, found a damaged or foreign one ({reason}); "
            "download it again"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path} must hold settings by name, found a {type(found).__name__}; download it again"
        )
    return found


def _text(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            content = stream.read(JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > JSON_BYTES:
        raise CheckpointError(
            f"{path} must have at most {JSON_BYTES >> 20} MiB, found more; is it a file of JSON?"
        )
    return content.decode("utf-8", errors="replace")
