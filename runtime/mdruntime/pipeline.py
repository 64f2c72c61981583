"""The pipeline: what most users meet. Labels or known tokens in, images out."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mdruntime.bundle import Bundle, open_bundle
from mdruntime.denoiser import HEADS, Denoiser, labels_of, tokens_of, whole
from mdruntime.errors import SamplingError
from mdruntime.manifest import Manifest
from mdruntime.randomness import Randomness
from mdruntime.sampler import Canvas, Step, Tokens, unmask
from mdruntime.sampling import Sampling
from mdruntime.session import Session, open_session

__all__ = ["Images", "Pipeline", "load"]

Images = NDArray[np.uint8]  # (batch, height, width, 3)

_HIDDEN_COLOUR = (72, 104, 168)


def load(
    folder: str | Path,
    provider: str = "cpu",
    *,
    threads: int = 0,
    check: bool = True,
    head: str = "graph",
) -> "Pipeline":
    """Open a bundle and return its pipeline.

    Args:
        folder: a bundle made by ``mdexport build``.
        provider: execution provider, ``cpu`` or ``cuda``; no other is used in its place.
        threads: CPU threads; 0 takes as many as the process may use.
        check: compare the files' SHA-256 sums first (about a second per gigabyte).
        head: draw tokens in the ``graph``, or in ``numpy`` (the reference) from its logits.

    Raises:
        BundleError: the bundle is incomplete, altered, or of another format.
        ProviderError: the provider is not available on this machine.
    """
    bundle = open_bundle(folder, check=check)
    if head not in HEADS:
        raise SamplingError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
    denoiser = open_session(bundle, "denoiser", provider, threads=threads)
    decoder = open_session(bundle, "decoder", provider, threads=threads)
    return Pipeline(bundle, denoiser, decoder, head=head)


class Pipeline:
    """A bundle ready to generate images. Use one per thread: ``clone()`` shares the weights."""

    def __init__(
        self, bundle: Bundle, denoiser: Session, decoder: Session, *, head: str = "graph"
    ) -> None:
        """Take an opened bundle and sessions of its two graphs; see ``load``."""
        self.bundle = bundle
        self._denoiser = denoiser
        self._decoder = decoder
        self._head = head
        self._runs = 0  # begun so far

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.bundle.manifest

    @property
    def provider(self) -> str:
        """The execution provider in use."""
        return self._denoiser.provider

    def __enter__(self) -> "Pipeline":
        """Return the pipeline; leaving the context closes it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the pipeline."""
        self.close()

    def close(self) -> None:
        """Release the sessions' memory."""
        self._denoiser.close()
        self._decoder.close()

    def clone(self) -> "Pipeline":
        """Return a pipeline for another thread: the same weights, caches of its own."""
        return Pipeline(self.bundle, self._denoiser.clone(), self._decoder.clone(), head=self._head)

    def sampling(self, preset: str = "default", **options: Any) -> Sampling:
        """Return a preset of the bundle, with some options changed.

        Raises:
            SamplingError: an unknown preset or option, or a value out of range.
        """
        presets = self.manifest.presets
        if preset not in presets:
            raise SamplingError(f"preset must be one of {', '.join(presets)}, got {preset!r}")
        return presets[preset].but(**options)

    def generate(
        self,
        labels: Sequence[int] | None = None,
        *,
        count: int = 1,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 16,
        preset: str = "default",
        **options: Any,
    ) -> Images:
        """Generate images.

        A sample's image depends on the seed, its index and the options only: whether it is drawn
        alone or in a batch of 64 does not matter.

        Args:
            labels: class of each image; None generates ``count`` images without a class.
            count: number of images where ``labels`` is None.
            seed: seed of all randomness, 0 to 2**64 - 1.
            first_index: index of the first sample; the others follow it.
            batch_size: largest number of samples that run together.
            preset: name of a set of options in the bundle.
            options: fields of ``Sampling`` that differ from the preset's.

        Returns:
            uint8 (batch, height, width, 3).

        Raises:
            SamplingError: a label or an option is out of range.
        """
        chosen = labels_of(self.manifest.denoiser, labels, count)
        sampling = self.sampling(preset, **options)
        source = _randomness(seed, first_index, len(chosen))
        images, size = [], whole("batch_size", batch_size, 1)
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            some = source.take(range(start, start + len(part)))
            images.append(self.decode(self._run(self._blank(len(part)), part, sampling, some)))
        return np.concatenate(images)

    def inpaint(
        self,
        tokens: ArrayLike,
        labels: Sequence[int] | None = None,
        *,
        seed: int = 0,
        first_index: int = 0,
        preset: str = "default",
        **options: Any,
    ) -> Images:
        """Generate the hidden part of canvases whose other tokens are known.

        Args:
            tokens: int (batch, length) or (batch, height, width) in tokens; the mask token
                (``manifest.denoiser.mask_token``) where hidden. Known tokens do not change.
            labels: class of each image, or None.
            seed: as in ``generate``; so are ``first_index``, ``preset`` and ``options``.
            first_index: index of the first sample.
            preset: name of a set of options in the bundle.
            options: fields of ``Sampling`` that differ from the preset's.

        Returns:
            uint8 (batch, height, width, 3).
        """
        canvas = tokens_of(self.manifest.denoiser, tokens)
        chosen = self._labels(labels, canvas)
        source = _randomness(seed, first_index, len(chosen))
        return self.decode(self._run(canvas, chosen, self.sampling(preset, **options), source))

    def steps(
        self,
        labels: Sequence[int] | None = None,
        *,
        count: int = 1,
        tokens: ArrayLike | None = None,
        seed: int = 0,
        first_index: int = 0,
        preset: str = "default",
        **options: Any,
    ) -> Iterator[Step]:
        """Generate like ``generate`` or ``inpaint``, yielding the canvas after every pass.

        Ends with all tokens revealed; ``decode(step.tokens)`` makes images of them, and
        ``preview(step.tokens)`` of a canvas that still has hidden ones. A pipeline runs one
        generation at a time: beginning another one ends this one, unless that one is a clone's.

        Args:
            labels: class of each image, or None.
            count: number of images where both ``labels`` and ``tokens`` are None.
            tokens: known tokens as in ``inpaint``, or None.
            seed: as in ``generate``.
            first_index: index of the first sample.
            preset: name of a set of options in the bundle.
            options: fields of ``Sampling`` that differ from the preset's.
        """
        spec = self.manifest.denoiser
        if tokens is None:
            chosen = labels_of(spec, labels, count)
            canvas = self._blank(len(chosen))
        else:
            canvas = tokens_of(spec, tokens)
            chosen = self._labels(labels, canvas)
        source = _randomness(seed, first_index, len(chosen))
        return self._unmask(canvas, chosen, self.sampling(preset, **options), source)

    def decode(self, tokens: Tokens) -> Images:
        """Return the images uint8 (batch, height, width, 3) of tokens int (batch, length).

        One image at a time: decoders are bound by arithmetic, and their activations are large.
        """
        ids = tokens_of(self.manifest.denoiser, tokens)
        if (ids == self.manifest.denoiser.mask_token).any():
            raise SamplingError("tokens must not be hidden to be decoded; use preview instead")
        images = [self._decoder.run({"tokens": row[None]}, ["images"])["images"] for row in ids]
        return np.concatenate(images)

    def preview(self, tokens: Tokens) -> Images:
        """Return images of unfinished canvases: hidden tokens are blue."""
        spec, image = self.manifest.denoiser, self.manifest.image
        ids = tokens_of(spec, tokens)
        hidden = ids == spec.mask_token
        images = self.decode(np.where(hidden, np.int32(0), ids)).copy()
        cells = hidden.reshape(-1, *spec.grid)
        cell = (image.height // spec.grid[0], image.width // spec.grid[1])
        images[cells.repeat(cell[0], axis=1).repeat(cell[1], axis=2)] = _HIDDEN_COLOUR
        return images

    def _run(
        self, tokens: Tokens, labels: list[int], sampling: Sampling, source: Randomness
    ) -> Tokens:
        for step in self._unmask(tokens, labels, sampling, source):
            tokens = step.tokens
        return tokens

    def _unmask(
        self, tokens: Tokens, labels: list[int], sampling: Sampling, source: Randomness
    ) -> Iterator[Step]:
        spec = self.manifest.denoiser
        denoiser = Denoiser(self._denoiser, spec, labels, head=self._head)
        canvas = Canvas(spec.length, spec.grid, spec.mask_token)
        return self._alone(unmask(denoiser, tokens, canvas, sampling, source))

    def _alone(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Pass steps on until another run begins: its keys and values are in the caches then."""
        self._runs += 1
        run = self._runs
        for step in steps:
            yield step
            if step.hidden and run != self._runs:
                raise SamplingError(
                    "another generation began on this pipeline before this one was finished; "
                    "finish one first, or run the other on a clone()"
                )

    def _blank(self, batch: int) -> Tokens:
        spec = self.manifest.denoiser
        return np.full((batch, spec.length), spec.mask_token, np.int32)

    def _labels(self, labels: Sequence[int] | None, canvas: Tokens) -> list[int]:
        chosen = labels_of(self.manifest.denoiser, labels, len(canvas))
        if len(chosen) != len(canvas):
            raise SamplingError(f"labels must be {len(canvas)}, one per canvas, got {len(chosen)}")
        return chosen


def _randomness(seed: int, first_index: int, batch: int) -> Randomness:
    first = whole("first_index", first_index)
    whole("the index of the last sample", first + batch - 1)
    return Randomness(whole("seed", seed), range(first, first + batch))
