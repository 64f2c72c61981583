"""From a model to a verified bundle.

Everything is written to ``<folder>.partial``, verified there, and renamed: a folder with the final
name is complete and verified, whatever happens in between.
"""

import shutil
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdexport.convolutions import write_cpu_int8_images
from mdexport.describe import describe
from mdexport.dynamic import write_cpu_int8
from mdexport.folder import prepare, publish, require_space
from mdexport.graphs import Writer
from mdexport.int8 import INT8, int8_for, write_int8
from mdexport.model import Model
from mdexport.precision import LOW, cast, dtype_of, of_images
from mdexport.reference import canvases, conditioned, record, trajectories, write_images
from mdexport.replay import Arrays, conditioned_passes
from mdexport.report import summary, write_report
from mdexport.spelling import TENSORRT_OPSET
from mdexport.trace import (
    OPSET,
    cache_names,
    trace_condition,
    trace_decoder,
    trace_denoiser,
    trace_encoder,
    trace_head,
)
from mdexport.verification import verified, wanted
from mdruntime.bundle import MANIFEST, file_spec, open_bundle
from mdruntime.denoiser import CONDITION
from mdruntime.first import HEAD
from mdruntime.manifest import GraphSpec, VerificationRecord, dump
from mdruntime.session import INT8 as CPU_INT8
from mdruntime.verify import (
    CONDITIONED,
    DECODER_VECTORS,
    DENOISER_VECTORS,
    ENCODER_VECTORS,
    write_passes,
)

__all__ = ["Options", "Progress", "build"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a model is exported."""

    precision: str = "fp32"
    int8: bool = False
    """Add a spelling of the denoiser with the products of its blocks in int8: for CPUs where the
    precision is float32, with the image decoder in int8 too; for TensorRT otherwise."""
    logits: bool = False
    """Let the TensorRT spelling return logits too; ONNX Runtime computes them only when asked."""
    encoder: bool = True
    """Export the image encoder too, where the model has one: editing needs it."""
    force: bool = False
    """Replace an existing folder, once its successor is verified."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A step that begins, or one that is done."""

    step: int
    steps: int
    name: str
    detail: str = ""
    seconds: float | None = None  # None while it has only begun


class _Work:
    """A build in progress: what one step leaves for the next."""

    def __init__(self, model: Model, folder: Path, options: Options) -> None:
        self.model = model
        self.folder = folder
        self.options = options
        self.writer = Writer(folder, model.name, logits=options.logits)
        self.graphs: dict[str, GraphSpec] = {}
        self.passes: list[dict[str, NDArray[Any]]] = []
        self.tokens = np.zeros((0, 0), np.int32)

    @property
    def _encodes(self) -> bool:
        return self.options.encoder and self.model.encoder is not None

    def reference(self) -> str:
        """Record the PyTorch model's answers along whole trajectories."""
        model = self.model
        (self.folder / "verify").mkdir()
        self.passes, self.tokens = record(model.denoiser, model.prompt)
        write_passes(self.folder / DENOISER_VECTORS, self.passes)
        for name, content in model.files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if model.decoder is not None:
            encoder = model.encoder if self._encodes else None
            write_images(self.folder, self.tokens, model.decoder, encoder)
        return f"{len(self.passes)} passes of the PyTorch model, 2 samples"

    def _conditioned(self) -> Iterator[Arrays]:
        return conditioned_passes(self.model.denoiser, self.passes)

    def denoiser(self) -> str:
        """Trace the denoiser and write its spellings around one weight file."""
        precision = self.options.precision
        graph = trace_denoiser(cast(self.model.denoiser, precision), self.model.prompt)
        caches = cache_names(self.model.denoiser)
        self.graphs["denoiser"] = self.writer.write(
            "denoiser", graph, precision, self._conditioned, caches=caches
        )
        self.graphs[HEAD] = self.writer.write_head(trace_head(self.model.denoiser.spec.codebook))
        return self._told("denoiser")

    def int8(self) -> str:
        """Write the denoiser in int8, for the processors that the precision is for."""
        if int8_for(self.options.precision) == INT8:
            return self._tensorrt_int8()
        return self._cpu_int8()

    def _cpu_int8(self) -> str:
        spec, file = self.graphs["denoiser"], f"denoiser.{CPU_INT8}.onnx"
        count = write_cpu_int8(self.folder / spec.file, self.folder / file)
        self._add_spelling(CPU_INT8, file)
        return f"{count} products for CPUs, {_size(self.folder, f'denoiser.{CPU_INT8}')}"

    def _tensorrt_int8(self) -> str:
        """Write the denoiser in int8 for TensorRT, calibrated on trajectories of their own."""
        model, spec = self.model, self.graphs["denoiser"]
        recorded = trajectories(model.denoiser, model.prompt)
        way = write_int8(
            self.folder,
            spec,
            LOW.get(self.options.precision),
            lambda: conditioned_passes(model.denoiser, recorded),
            self._conditioned,
        )
        self._add_spelling(INT8, f"denoiser.{INT8}.onnx")
        size = _size(self.folder, f"denoiser.{INT8}")
        return f"calibrated on {len(recorded)} passes by {way}, {size}"

    def _add_spelling(self, name: str, file: str, graph: str = "denoiser") -> None:
        spec = self.graphs[graph]
        self.graphs[graph] = replace(spec, spellings={**spec.spellings, name: file})

    def condition(self) -> str:
        """Trace what the denoiser computes once for a trajectory."""
        precision = self.options.precision
        graph = trace_condition(cast(self.model.denoiser, precision), self.model.prompt)
        name = str(graph.graph.inputs[0].name)
        inputs = {one[CONDITIONED].tobytes(): {name: one[CONDITIONED]} for one in self.passes}
        wanted = [
            tensor.name.removeprefix(CONDITION)
            for tensor in self.graphs["denoiser"].inputs
            if tensor.name.startswith(CONDITION) and tensor.dtype == "float32"
        ]
        self.graphs["condition"] = self.writer.write(
            "condition", graph, precision, inputs.values, float32=wanted
        )
        return self._told("condition")

    def decoder(self) -> str:
        """Trace the decoder."""
        assert self.model.decoder is not None
        precision = of_images(self.options.precision)
        graph = trace_decoder(cast(self.model.decoder, precision), self.model.denoiser.spec.length)
        self.graphs["decoder"] = self.writer.write(
            "decoder", graph, precision, lambda: [_arrays(self.folder / DECODER_VECTORS)]
        )
        told = self._told("decoder")
        if self.options.int8 and int8_for(self.options.precision) == CPU_INT8:
            count = self._cpu_int8_images()
            told += f", {count} products in int8" if count else ""
        return told

    def _cpu_int8_images(self) -> int:
        """Write the decoder in int8 for CPUs, calibrated on other images than the verified ones."""
        spec, file = self.graphs["decoder"], f"decoder.{CPU_INT8}.onnx"
        count = write_cpu_int8_images(
            self.folder / spec.file,
            self.folder / file,
            lambda: canvases(self.model.denoiser, self.model.prompt),
        )
        if count:
            self._add_spelling(CPU_INT8, file, "decoder")
        return count

    def encoder(self) -> str:
        """Trace the encoder."""
        assert self.model.encoder is not None
        assert self.model.image is not None
        precision = of_images(self.options.precision)
        graph = trace_encoder(cast(self.model.encoder, precision), self.model.image)
        self.graphs["encoder"] = self.writer.write(
            "encoder", graph, precision, lambda: [_arrays(self.folder / ENCODER_VECTORS)]
        )
        return self._told("encoder")

    def _told(self, name: str) -> str:
        text = f"opset {OPSET} and {TENSORRT_OPSET}, {_size(self.folder, name)}"
        islands = len(self.graphs[name].float32_islands)
        return text + (f", {islands} modules stay in float32 for their range" if islands else "")

    def steps(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """Yield the steps of the build by name."""
        yield "reference", self.reference
        yield "denoiser", self.denoiser
        if self.options.int8:
            yield "int8", self.int8
        if conditioned(self.model.denoiser, self.model.prompt):
            yield "condition", self.condition
        if self.model.decoder is not None:
            yield "decoder", self.decoder
        if self._encodes:
            yield "encoder", self.encoder
        yield "verify", self.verified

    def verified(self) -> str:
        """Replay the reference in ONNX Runtime, in all spellings."""
        origin = self.model.weights.origin
        self._write_manifest(wanted(self.options.precision, int8=self.options.int8, origin=origin))
        found = verified(open_bundle(self.folder, check=False))
        self._write_manifest(found)
        return summary(found.measured)

    def _write_manifest(self, verification: VerificationRecord) -> None:
        model, folder = self.model, self.folder
        manifest = describe(model, folder, self.options.precision, self.graphs, verification)
        if verification.measured:
            write_report(folder, manifest)
            report = file_spec(folder / "report.md")
            manifest = replace(manifest, files={**manifest.files, "report.md": report})
        (folder / MANIFEST).write_bytes(dump(manifest))


def build(model: Model, folder: Path, options: Options) -> Generator[Progress]:
    """Export a model and verify the result, yielding before and after each step.

    Args:
        model: what to export.
        folder: the bundle to write.
        options: precision and the like.

    Raises:
        FileExistsError: the folder exists.
        VerificationError: the graphs do not compute what the model computes.
        OSError: the disk is full or read-only.
    """
    partial = prepare(folder, force=options.force)
    try:
        require_space(partial, _bytes(model, options))
        work = _Work(model, partial, options)
        steps = list(work.steps())
        for number, (name, step) in enumerate(steps, start=1):
            yield Progress(number, len(steps), name)
            began = time.perf_counter()
            detail = step()
            yield Progress(number, len(steps), name, detail, time.perf_counter() - began)
        publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _bytes(model: Model, options: Options) -> int:
    """Return the size of a model's weights, in all precisions that are asked for."""
    images = [part for part in (model.decoder, model.encoder) if part is not None]
    others = sum(tensor.numel() for part in images for tensor in part.parameters())
    single = dtype_of(options.precision).itemsize
    return (model.weights.parameters + others) * single + options.int8 * model.weights.parameters


def _size(folder: Path, stem: str) -> str:
    total = sum(path.stat().st_size for path in folder.glob(f"{stem}*"))
    return f"{total / 1e6:.1f} MB"


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}
