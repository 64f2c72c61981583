"""From a folder to a pipeline."""

from pathlib import Path
from typing import Any

from mdruntime.bundle import open_bundle
from mdruntime.errors import BundleError
from mdruntime.first import FIRST_PASS_MB
from mdruntime.pipeline import Pipeline
from mdruntime.runner import Runner
from mdruntime.text import TextPipeline
from mdruntime.tuned import read_tuned

__all__ = ["load", "load_text"]


def load(  # noqa: PLR0913 - what a device may ask for, all of it optional
    folder: str | Path,
    provider: str = "cpu",
    *,
    threads: int = 0,
    check: bool = True,
    head: str = "graph",
    tuned: bool = True,
    reduce_memory: bool = False,
    precision: str = "",
    first_pass_mb: float = FIRST_PASS_MB,
) -> Pipeline:
    """Open a bundle of an image model and return its pipeline; see ``load_text`` for text.

    Args:
        folder: a bundle made by ``mdexport build``.
        provider: execution provider, one of ``cpu``, ``cuda``, ``tensorrt`` and ``ort-tensorrt``;
            no other is used in its place.
        threads: CPU threads; 0 takes as many as the process may use.
        check: compare the files' SHA-256 sums first (about a second per gigabyte).
        head: draw tokens in the ``graph``, or in ``numpy`` (the reference) from its logits.
        tuned: let the sampler that ``mdruntime tune`` chose for this device be the default, where
            it did.
        reduce_memory: keep one large graph in memory at a time. Decoder and encoder are loaded when
            they run. The denoiser makes room for them, and is loaded again for the next images
            (0.6 s for 700 MB of weights); not so between the steps of ``steps``, and not on
            provider ``tensorrt``.
        precision: one that the bundle was exported in, such as ``int8``; its own if empty.
        first_pass_mb: megabytes to keep answers of first passes in, which are the same for every
            seed, so that the same condition asked for again takes a pass less (provider ``cpu``);
            0 keeps none.

    Raises:
        BundleError: the bundle or the file of ``mdruntime tune`` is incomplete, altered, of another
            format, or the bundle is no image model's.
        SamplingError: the bundle has no such precision, or an unknown head.
        ProviderError: the provider is not available on this machine.
        EngineError: TensorRT has no engines for this bundle and machine: see ``mdruntime build``.
    """
    bundle = open_bundle(folder, check=check)
    if bundle.manifest.image is None:
        raise BundleError(f"{str(folder)!r} makes text, not images; use mdruntime.load_text")
    choice = read_tuned(bundle) if tuned else None
    options: dict[str, Any] = {
        "threads": threads,
        "head": head,
        "reduce_memory": reduce_memory,
        "precision": precision,
        "first_pass_mb": first_pass_mb,
    }
    return Pipeline(Runner(bundle, provider, tuned=choice, **options))


def load_text(  # noqa: PLR0913 - what a device may ask for, all of it optional
    folder: str | Path,
    provider: str = "cpu",
    *,
    threads: int = 0,
    check: bool = True,
    head: str = "graph",
    tuned: bool = True,
    reduce_memory: bool = False,
    precision: str = "",
    first_pass_mb: float = FIRST_PASS_MB,
) -> TextPipeline:
    """Open a bundle of a text model and return its pipeline; the arguments are those of ``load``.

    Raises:
        BundleError: the bundle or the file of ``mdruntime tune`` is incomplete, altered, of another
            format, or the bundle is no text model's.
        SamplingError: the bundle has no such precision, or an unknown head.
        ProviderError: the provider or the tokenizer's package is not available.
        EngineError: TensorRT has no engines for this bundle and machine: see ``mdruntime build``.
    """
    bundle = open_bundle(folder, check=check)
    if bundle.manifest.text is None:
        raise BundleError(f"{str(folder)!r} makes images, not text; use mdruntime.load")
    choice = read_tuned(bundle) if tuned else None
    options: dict[str, Any] = {
        "threads": threads,
        "head": head,
        "reduce_memory": reduce_memory,
        "precision": precision,
        "first_pass_mb": first_pass_mb,
    }
    return TextPipeline(Runner(bundle, provider, tuned=choice, **options))
