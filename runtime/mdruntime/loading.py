"""From a folder to a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from mdruntime.bundle import open_bundle
from mdruntime.errors import BundleError
from mdruntime.pipeline import Pipeline
from mdruntime.runner import Runner
from mdruntime.text import TextPipeline
from mdruntime.tuned import read_tuned

if TYPE_CHECKING:
    from typing_extensions import Unpack  # which typing has since Python 3.11 only

__all__ = ["load", "load_text"]


class Options(TypedDict, total=False):
    """How a bundle runs on this device."""

    threads: int
    """Of the CPU; 0 takes as many as the process may use."""
    head: str
    """Draw tokens in the ``graph``, or in ``numpy`` (the reference) from its logits."""
    reduce_memory: bool
    """Keep decoder and encoder in memory only while they run."""
    precision: str
    """One that the bundle was exported in, such as ``int8``; its own if empty."""


def load(
    folder: str | Path,
    provider: str = "cpu",
    *,
    check: bool = True,
    tuned: bool = True,
    **options: Unpack[Options],
) -> Pipeline:
    """Open a bundle of an image model and return its pipeline; see ``load_text`` for text.

    Args:
        folder: a bundle made by ``mdexport build``.
        provider: execution provider, one of ``cpu``, ``cuda``, ``tensorrt`` and ``ort-tensorrt``;
            no other is used in its place.
        check: compare the files' SHA-256 sums first (about a second per gigabyte).
        tuned: let the sampler that ``mdruntime tune`` chose for this device be the default, where
            it did.
        options: ``threads`` of the CPU (0: as many as the process may use), ``head`` (``graph``, or
            ``numpy``, the reference), ``reduce_memory`` (decoder and encoder are in memory only
            while they run) and ``precision`` (``int8`` where the bundle has it; its own if empty).

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
    return Pipeline(Runner(bundle, provider, tuned=choice, **options))


def load_text(
    folder: str | Path,
    provider: str = "cpu",
    *,
    check: bool = True,
    tuned: bool = True,
    **options: Unpack[Options],
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
    return TextPipeline(Runner(bundle, provider, tuned=choice, **options))
