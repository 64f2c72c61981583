"""What the manifest says of a bundle."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import mdruntime
from mdexport.model import Model
from mdruntime.bundle import MANIFEST, file_spec
from mdruntime.manifest import FORMAT, GraphSpec, Manifest, VerificationRecord

__all__ = ["describe"]

_SMALLEST_BUCKET = 8


def describe(
    model: Model,
    folder: Path,
    precision: str,
    graphs: Mapping[str, GraphSpec],
    verification: VerificationRecord,
) -> Manifest:
    """Return the manifest of the files in a folder.

    Args:
        model: what was exported.
        folder: of the bundle; every file in it is named with its hash.
        precision: of the graphs.
        graphs: by name.
        verification: what was measured, or nothing yet.
    """
    spec = model.denoiser.spec
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return Manifest(
        format=FORMAT,
        name=model.name,
        family=model.family,
        task=model.task,
        precision=precision,
        weights=model.weights,
        denoiser=spec,
        image=model.image,
        text=model.text,
        prompt=model.prompt,
        graphs=dict(graphs),
        buckets=_buckets(spec.canvas),
        presets=dict(model.presets),
        files={p.relative_to(folder).as_posix(): file_spec(p) for p in files},
        verification=verification,
        toolchain=_toolchain(),
        study=model.study,
    )


def _buckets(canvas: int) -> tuple[int, ...]:
    """Return rows per pass for which a static engine is worth building: powers of two, and all."""
    sizes = []
    size = _SMALLEST_BUCKET
    while size < canvas:
        sizes.append(size)
        size *= 2
    return (*sizes, canvas)


def _toolchain() -> dict[str, str]:
    packages = ("torch", "onnx", "onnxscript", "onnx-ir", "numpy")
    return {
        "mdexport": mdruntime.__version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }
