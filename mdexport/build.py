"""From a model to a verified bundle.

Everything is written to ``<folder>.partial``, verified there, and renamed: a folder with the final
name is complete and verified, whatever happens in between.
"""

import platform
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx_ir as ir

import mdruntime
from mdexport import spelling
from mdexport.folder import prepare, publish, require_space
from mdexport.model import Model
from mdexport.precision import LIMITS, cast, dtype_of, float32_operators
from mdexport.reference import conditioned, record, write_images
from mdexport.report import summary, write_report
from mdexport.trace import (
    OPSET,
    cache_names,
    tensor_specs,
    trace_condition,
    trace_decoder,
    trace_denoiser,
    trace_encoder,
)
from mdruntime.bundle import MANIFEST, file_spec, open_bundle
from mdruntime.errors import VerificationError
from mdruntime.manifest import FORMAT, GraphSpec, Manifest, VerificationRecord, dump
from mdruntime.verify import DENOISER_VECTORS, Verification, verify, write_passes

__all__ = ["Options", "Progress", "build"]

_SMALLEST_BUCKET = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a model is exported."""

    precision: str = "fp32"
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
        self.graphs: dict[str, GraphSpec] = {}
        self.tokens = np.zeros((0, 0), np.int32)
        self.result = Verification({}, {}, 0)

    @property
    def _encodes(self) -> bool:
        return self.options.encoder and self.model.encoder is not None

    def reference(self) -> str:
        """Record the PyTorch model's answers along whole trajectories."""
        model = self.model
        (self.folder / "verify").mkdir()
        passes, self.tokens = record(model.denoiser, model.prompt)
        write_passes(self.folder / DENOISER_VECTORS, passes)
        for name, content in model.files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if model.decoder is not None:
            encoder = model.encoder if self._encodes else None
            write_images(self.folder, self.tokens, model.decoder, encoder)
        return f"{len(passes)} passes of the PyTorch model, 2 samples"

    def denoiser(self) -> str:
        """Trace the denoiser and write both of its spellings around one weight file."""
        half = cast(self.model.denoiser, self.options.precision)
        graph = trace_denoiser(half, self.model.prompt)
        spelling.keep_softmax_in_float32(graph)
        path = self.folder / "denoiser.onnx"
        self.graphs["denoiser"] = replace(
            self._described(graph, path),
            spellings={"tensorrt": "denoiser.tensorrt.onnx"},
            caches=cache_names(self.model.denoiser),
        )
        _save(graph, path, "denoiser.weights")
        self._spell(path)
        return f"opset {OPSET} and {spelling.TENSORRT_OPSET}, {_size(self.folder, 'denoiser')}"

    def _spell(self, path: Path) -> None:
        graph = ir.load(path)  # its weights are references into the weight file
        spelling.spell_attention_out(graph)
        if not self.options.logits:
            spelling.drop_output(graph, "logits")
        ir.save(graph, self.folder / self.graphs["denoiser"].spellings["tensorrt"])

    def condition(self) -> str:
        """Trace what the denoiser computes once for a trajectory."""
        half = cast(self.model.denoiser, self.options.precision)
        return self._write("condition", trace_condition(half, self.model.prompt))

    def decoder(self) -> str:
        """Trace the decoder."""
        assert self.model.decoder is not None
        half = cast(self.model.decoder, self.options.precision)
        return self._write("decoder", trace_decoder(half, self.model.denoiser.spec.length))

    def encoder(self) -> str:
        """Trace the encoder."""
        assert self.model.encoder is not None
        assert self.model.image is not None
        half = cast(self.model.encoder, self.options.precision)
        return self._write("encoder", trace_encoder(half, self.model.image))

    def _write(self, name: str, graph: ir.Model) -> str:
        spelling.keep_softmax_in_float32(graph)
        path = self.folder / f"{name}.onnx"
        self.graphs[name] = self._described(graph, path)
        _save(graph, path, f"{name}.weights")
        return f"opset {OPSET}, {_size(self.folder, name)}"

    def steps(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """Yield the steps of the build by name."""
        yield "reference", self.reference
        yield "denoiser", self.denoiser
        if conditioned(self.model.denoiser, self.model.prompt):
            yield "condition", self.condition
        if self.model.decoder is not None:
            yield "decoder", self.decoder
        if self._encodes:
            yield "encoder", self.encoder
        yield "verify", self.verified

    def _described(self, graph: ir.Model, path: Path) -> GraphSpec:
        """Sign a graph and return what the manifest says of it."""
        graph.producer_name, graph.producer_version = "mdexport", mdruntime.__version__
        graph.metadata_props["mdexport.model"] = self.model.name
        graph.metadata_props["mdexport.precision"] = self.options.precision
        lower = self.options.precision != "fp32"
        return GraphSpec(
            file=path.name,
            opset=OPSET,
            spellings={},
            inputs=tensor_specs(graph.graph.inputs),
            outputs=tensor_specs(graph.graph.outputs),
            caches=(),
            float32_operators=float32_operators(graph) if lower else (),
        )

    def verified(self) -> str:
        """Replay the reference in ONNX Runtime, in both spellings."""
        self._write_manifest({})
        bundle = open_bundle(self.folder, check=False)
        self.result = verify(bundle)
        spelled = verify(bundle, spelling="tensorrt")
        failures = [*self.result.failures]
        failures += [f"TensorRT spelling: {failure}" for failure in spelled.failures]
        if failures:
            raise VerificationError(
                f"verification failed: {'; '.join(failures)}; nothing was written. "
                "The reference is the PyTorch model in float32"
            )
        measured = self.result.measured
        self._write_manifest(measured)
        return summary(measured)

    def _write_manifest(self, measured: dict[str, float]) -> None:
        manifest = self._manifest(measured)
        if measured:
            write_report(self.folder, manifest)
            report = file_spec(self.folder / "report.md")
            manifest = replace(manifest, files={**manifest.files, "report.md": report})
        (self.folder / MANIFEST).write_bytes(dump(manifest))

    def _manifest(self, measured: dict[str, float]) -> Manifest:
        model, spec = self.model, self.model.denoiser.spec
        files = sorted(p for p in self.folder.rglob("*") if p.is_file() and p.name != MANIFEST)
        return Manifest(
            format=FORMAT,
            name=model.name,
            family=model.family,
            task=model.task,
            precision=self.options.precision,
            weights=model.weights,
            denoiser=spec,
            image=model.image,
            text=model.text,
            prompt=model.prompt,
            graphs=self.graphs,
            buckets=_buckets(spec.canvas),
            presets=dict(model.presets),
            files={p.relative_to(self.folder).as_posix(): file_spec(p) for p in files},
            verification=VerificationRecord(
                reference="PyTorch float32, teacher forced",
                limits=_limits(self.options.precision, measured),
                measured=measured,
            ),
            toolchain=_toolchain(),
            study=model.study,
        )


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
        require_space(partial, _bytes(model, options.precision))
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


def _limits(precision: str, measured: Mapping[str, float]) -> dict[str, float]:
    """Return the limits of what was measured, or of all that could be."""
    limits = LIMITS[precision]
    return {name: limits[name] for name in limits if name in measured or not measured}


def _bytes(model: Model, precision: str) -> int:
    """Return the size of a model's weights in that precision."""
    images = [part for part in (model.decoder, model.encoder) if part is not None]
    others = sum(tensor.numel() for part in images for tensor in part.parameters())
    return (model.weights.parameters + others) * dtype_of(precision).itemsize


def _save(graph: ir.Model, path: Path, weights: str) -> None:
    """Write a graph and its weights; a graph that has no large ones gets no weight file."""
    ir.save(graph, path, external_data=weights)
    if (path.parent / weights).stat().st_size == 0:
        (path.parent / weights).unlink()


def _buckets(canvas: int) -> tuple[int, ...]:
    """Return rows per pass for which a static engine is worth building: powers of two, and all."""
    sizes = []
    size = _SMALLEST_BUCKET
    while size < canvas:
        sizes.append(size)
        size *= 2
    return (*sizes, canvas)


def _size(folder: Path, stem: str) -> str:
    total = sum(path.stat().st_size for path in folder.glob(f"{stem}*"))
    return f"{total / 1e6:.1f} MB"


def _toolchain() -> dict[str, str]:
    packages = ("torch", "onnx", "onnxscript", "onnx-ir", "numpy")
    return {
        "mdexport": mdruntime.__version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }
