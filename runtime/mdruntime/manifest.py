"""``manifest.json``: everything the runtime has to know about a bundle.

The file is canonical JSON (two spaces of indentation, keys in the order of the records, one final
newline) and carries the SHA-256 of itself without its last field, so that any altered byte shows.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from mdruntime.errors import BundleError
from mdruntime.records import from_json, to_json
from mdruntime.sampling import Sampling
from mdruntime.study import Study

__all__ = [
    "FORMAT",
    "ContextRow",
    "DenoiserSpec",
    "FileSpec",
    "GraphSpec",
    "ImageSpec",
    "Island",
    "Manifest",
    "PromptSpec",
    "SpellingRecord",
    "TensorSpec",
    "TextSpec",
    "VerificationRecord",
    "WeightsSpec",
    "dump",
    "parse",
]

FORMAT = 4


@dataclass(frozen=True, slots=True)
class ContextRow:
    """A row of the canvas that holds something else than tokens: a class label, a register.

    Its id is ``offset + label``; ``dropped`` without a label, in the unconditional rows of
    guidance, and wherever the row has nothing to do with labels (``offset`` is -1 then).
    """

    position: int
    offset: int
    dropped: int


@dataclass(frozen=True, slots=True)
class DenoiserSpec:
    """The canvas of a denoiser.

    A *row* of the canvas is what the transformer sees as one position. It holds one token, or a
    ``patch`` of the grid's tokens, side by side.
    """

    length: int  # tokens; the most of them where the canvas is flexible
    canvas: int  # rows: those of tokens, and context rows
    first: int  # row of the first token; the others follow it
    grid: tuple[int, ...]  # (height, width) in tokens, or (length,)
    patch: tuple[int, ...]  # tokens of a row along the axes of the grid; mostly (1, 1) or (1,)
    codebook: int  # ids 0 to codebook - 1 can be drawn
    mask_token: int
    classes: int  # 0: no class labels
    layers: int
    context: tuple[ContextRow, ...]
    unconditional: bool = True  # whether a sample may go without its label or prompt
    flexible: bool = False  # whether canvases may be shorter (text)
    visible: bool = False  # whether passes need to know which rows are not hidden (``visible``)
    refresh_context: bool = False  # whether every pass recomputes the context rows too

    @property
    def slots(self) -> int:
        """Tokens that share a row."""
        return math.prod(self.patch)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of a graph; a text in the shape names an axis of free size."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Island:
    """A part of a graph of lower precision that stays in float32: its values are large."""

    name: str  # a module's path, or an inner value where no module stands for it
    largest: float  # magnitude in float32 along the recorded trajectories


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """An ONNX graph, in one or more spellings of the same computation."""

    file: str
    opset: int
    spellings: dict[str, str]  # backend to file, where a backend needs another spelling
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    caches: tuple[tuple[str, str], ...]  # (input, output): bind both to one buffer
    float32_operators: tuple[str, ...]  # that stay in float32 in a graph of lower precision
    float32_islands: tuple[Island, ...] = ()  # what stays so for its range, not for its kind


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """What the decoder returns."""

    height: int
    width: int
    factor: int  # pixels on a side of the square that a token describes; 0: it has no place


@dataclass(frozen=True, slots=True)
class TextSpec:
    """How text becomes tokens of the canvas, and back."""

    tokenizer: str  # file of the bundle in the format of the tokenizers package, or "bytes"
    begin: int = -1  # token that begins a text; -1: none
    end: int = -1  # token that ends a text; -1: none


@dataclass(frozen=True, slots=True)
class PromptSpec:
    """How a prompt becomes the input of the condition graph."""

    tokenizer: str  # file of the bundle in the format of the tokenizers package
    vocabulary: int  # number of ids
    length: int  # tokens of a prompt, padding included
    begin: int
    end: int
    pad: int


@dataclass(frozen=True, slots=True)
class WeightsSpec:
    """Where the weights come from."""

    origin: str  # "trained", "checkpoint" or "random"
    seed: int  # of random weights; -1 otherwise
    files: dict[str, str]  # name of a checkpoint file to its SHA-256
    parameters: int  # of the denoiser
    licence: str

    @property
    def summary(self) -> str:
        """One line that never lets random weights pass for trained ones."""
        if self.origin == "random":
            return f"RANDOM WEIGHTS (seed {self.seed}): for testing, the output is noise"
        return f"weights from {', '.join(self.files) or 'training'} ({self.licence})"


@dataclass(frozen=True, slots=True)
class FileSpec:
    """Identity of a file of the bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class SpellingRecord:
    """What was measured of the denoiser as it is spelled for a backend, and how."""

    checked: str  # what was run, and where
    limits: dict[str, float]
    measured: dict[str, float]


@dataclass(frozen=True, slots=True)
class VerificationRecord:
    """What was measured when the bundle was built, and what was allowed."""

    reference: str
    limits: dict[str, float]
    measured: dict[str, float]
    spellings: dict[str, SpellingRecord] = field(default_factory=dict)  # by name, as a graph's

    def limits_of(self, spelling: str) -> dict[str, float]:
        """Return the limits of a spelling; those of the bundle where it has none of its own."""
        record = self.spellings.get(spelling)
        return dict(self.limits if record is None else record.limits)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole of ``manifest.json``."""

    format: int
    name: str
    family: str
    task: str
    precision: str
    weights: WeightsSpec
    denoiser: DenoiserSpec
    image: ImageSpec | None
    text: TextSpec | None
    prompt: PromptSpec | None
    graphs: dict[str, GraphSpec]
    buckets: tuple[int, ...]  # rows per pass for which static engines are built
    presets: dict[str, Sampling]
    files: dict[str, FileSpec]
    verification: VerificationRecord
    toolchain: dict[str, str]
    study: Study | None  # quality under different samplers, where it was measured
    digest: str = field(default="")

    def __post_init__(self) -> None:
        """Refuse paths that could leave the bundle."""
        tokenizers = [spec.tokenizer for spec in (self.text, self.prompt) if spec is not None]
        for path in [*self.files, *self._graph_files(), *tokenizers]:
            _check_path(path)
        for path in self._graph_files():
            if path not in self.files:
                raise BundleError(f"manifest names the graph {path!r} but not its hash")
        if "default" not in self.presets:
            raise BundleError("manifest.presets lacks 'default'")

    @property
    def engines(self) -> list[str]:
        """Names of the graphs that TensorRT is to run: those that are spelled for it."""
        return [name for name, graph in self.graphs.items() if "tensorrt" in graph.spellings]

    def _graph_files(self) -> list[str]:
        return [
            path
            for graph in self.graphs.values()
            for path in (graph.file, *graph.spellings.values())
        ]


def _check_path(path: str) -> None:
    parts = PurePosixPath(path)
    strange = "\\" in path or "\0" in path or not parts.parts
    if parts.is_absolute() or ".." in parts.parts or strange:
        raise BundleError(f"manifest path {path!r} leaves the bundle; do not trust this bundle")


def _digest(data: dict[str, Any]) -> str:
    rest = {key: value for key, value in data.items() if key != "digest"}
    return hashlib.sha256(_encode(rest)).hexdigest()


def _encode(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def dump(manifest: Manifest) -> bytes:
    """Return the file's bytes, with the digest filled in.

    Raises:
        BundleError: what would be written could not be read back.
    """
    manifest = from_json(Manifest, to_json(manifest))  # whole numbers become floats where due
    return _encode(to_json(replace(manifest, digest=_digest(to_json(manifest)))))


def parse(raw: bytes) -> Manifest:
    """Return the manifest in ``raw``.

    Raises:
        BundleError: not JSON, another format, altered, or not what the records say.
    """
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"manifest.json is not JSON ({error}); export the bundle again") from None
    if not isinstance(data, dict) or not isinstance(data.get("format"), int):
        raise BundleError("manifest.json has no format number; is this a bundle of mdexport?")
    if data["format"] != FORMAT:
        raise BundleError(
            f"the bundle has format {data['format']}, this mdruntime reads format {FORMAT}; "
            "install the mdruntime that belongs to the exporter, or export the bundle again"
        )
    if not _is_whole(data, raw):
        raise BundleError("manifest.json was altered (its digest differs); export the bundle again")
    manifest = from_json(Manifest, data)
    if dump(manifest) != raw:
        raise BundleError("manifest.json is not in canonical form; export the bundle again")
    return manifest


def _is_whole(data: dict[str, Any], raw: bytes) -> bool:
    try:
        return data.get("digest") == _digest(data) and _encode(data) == raw
    except ValueError:  # NaN, infinity or half a character, none of which is ever written
        return False
