"""Optimisation profiles: for which shapes the engines of a bundle are built.

A denoiser gets one for each row bucket of the manifest and range of batches; the last bucket is the
full pass. Passes of fewer rows are padded up to their bucket, so that a profile has one number of
rows wherever it can, which is what kernels are tuned for.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mdruntime.denoiser import CONDITION, VISIBLE
from mdruntime.errors import BundleError
from mdruntime.manifest import GraphSpec, Manifest, TensorSpec

__all__ = ["ALONE", "BatchRange", "Profile", "Shape", "Span", "profiles"]

Shape = tuple[int, ...]
Span = tuple[int, int, int]
"""Smallest, usual and largest size of an axis."""

_BY_SAMPLE = ("conditional", "unconditional", "guidance", "temperature", "beta", "token_beta")


@dataclass(frozen=True, slots=True)
class BatchRange:
    """Numbers of samples that share a profile."""

    low: int
    high: int


ALONE = (BatchRange(1, 1),)


@dataclass(frozen=True, slots=True)
class Profile:
    """Smallest, usual and largest shape of every input."""

    name: str
    shapes: dict[str, tuple[Shape, Shape, Shape]]


def profiles(
    manifest: Manifest, graph: str, ranges: Sequence[BatchRange] = ALONE
) -> tuple[Profile, ...]:
    """Return what an engine of a graph is built for; the same in every process.

    Args:
        manifest: of the bundle.
        graph: name of the graph.
        ranges: of samples that run together; decoders and encoders run one by one in any case.

    Raises:
        BundleError: an input has an axis of free size whose meaning is not known.
    """
    spec = manifest.graphs[graph]
    if spec.caches:
        return tuple(
            _denoiser(manifest, spec, bucket, each)
            for each in ranges
            for bucket in manifest.buckets
        )
    if graph != "condition":
        return (Profile("one", _shapes(spec.inputs, {t.name: [(1, 1, 1)] for t in spec.inputs})),)
    return tuple(_condition(spec, each) for each in ranges)


def _condition(spec: GraphSpec, batch: BatchRange) -> Profile:
    """Return a profile of a condition graph, which sees every condition of a batch once.

    What is absent under guidance is one of these conditions, and each sample may have its own.
    """
    rows = {tensor.name: [(batch.low, batch.high + 1, 2 * batch.high)] for tensor in spec.inputs}
    return Profile(_words(batch), _shapes(spec.inputs, rows))


def _denoiser(manifest: Manifest, spec: GraphSpec, bucket: int, batch: BatchRange) -> Profile:
    denoiser = manifest.denoiser
    twice = 2 if _guidable(manifest) else 1
    samples: Span = (batch.low, batch.high, batch.high)
    rows: Span = (batch.low, twice * batch.high, twice * batch.high)
    wide: Span = (bucket, bucket, bucket)
    if denoiser.flexible and bucket == denoiser.canvas:  # full passes of any canvas
        wide = (1, bucket, bucket)
    some: Span = (1, bucket, bucket)
    canvas: Span = (1, denoiser.canvas, denoiser.canvas)
    caches = {name for name, _ in spec.caches}
    axes = {
        "tokens": [rows, _times(wide, denoiser.slots)],
        "positions": [rows, wide],
        "columns": [rows, some],
        VISIBLE: [rows, (1, (bucket + 1) // 2, bucket)],
        "uniforms": [samples, _times(some, denoiser.slots)],
        **{name: [samples] for name in _BY_SAMPLE},
        **{name: [rows, canvas] for name in caches},
        **{t.name: [rows] for t in spec.inputs if t.name.startswith(CONDITION)},
    }
    return Profile(f"{bucket} rows, {_words(batch)}", _shapes(spec.inputs, axes))


def _guidable(manifest: Manifest) -> bool:
    """Return whether a sample may take two sequences: with its condition and without it."""
    spec = manifest.denoiser
    conditional = spec.classes > 0 or manifest.prompt is not None or manifest.text is not None
    return spec.unconditional and conditional


def _words(batch: BatchRange) -> str:
    return f"batch {batch.low}" if batch.low == batch.high else f"batch {batch.low} to {batch.high}"


def _times(span: Span, factor: int) -> Span:
    return span[0] * factor, span[1] * factor, span[2] * factor


def _shapes(
    tensors: Iterable[TensorSpec], axes: Mapping[str, Sequence[Span]]
) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Return shapes of inputs, given the sizes of each one's free axes in their order.

    The texts that name free axes are the exporter's and mean nothing here.
    """
    return {tensor.name: _shape(tensor, axes.get(tensor.name, ())) for tensor in tensors}


def _shape(tensor: TensorSpec, spans: Sequence[Span]) -> tuple[Shape, Shape, Shape]:
    left = list(spans)
    found: list[Span] = []
    for size in tensor.shape:
        if isinstance(size, int):
            found.append((size, size, size))
        elif left:
            found.append(left.pop(0))
        else:
            raise BundleError(
                f"the input {tensor.name!r} has the shape {tensor.shape}, and nothing is known of "
                f"its axis {size!r}; this bundle is of another mdexport: export it again"
            )
    low, usual, high = zip(*found, strict=True)
    return low, usual, high
