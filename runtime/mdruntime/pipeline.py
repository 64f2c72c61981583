"""The image pipeline: what most users meet. Labels, prompts or known tokens in, images out."""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mdruntime import edit
from mdruntime.bundle import Bundle
from mdruntime.conditions import Conditions, tokens_of
from mdruntime.edit import Images
from mdruntime.errors import SamplingError
from mdruntime.manifest import ImageSpec, Manifest
from mdruntime.passes import Counted
from mdruntime.prompt import conditions_of, conditions_of_canvases
from mdruntime.runner import Runner, randomness
from mdruntime.sampler import Step, Tokens
from mdruntime.sampling import Sampling

__all__ = ["Images", "Pipeline"]

_HIDDEN_COLOUR = (72, 104, 168)


class Pipeline:
    """A bundle ready to make images. Use one per thread: ``clone()`` shares the weights."""

    def __init__(self, runner: Runner) -> None:
        """Take an opened bundle of an image model; see ``mdruntime.load``."""
        self._runner = runner

    @property
    def bundle(self) -> Bundle:
        """The folder and its manifest."""
        return self._runner.bundle

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self._runner.manifest

    @property
    def provider(self) -> str:
        """The execution provider in use."""
        return self._runner.provider

    @property
    def image(self) -> ImageSpec:
        """Size of the images."""
        image = self.manifest.image
        assert image is not None  # load() has seen to it
        return image

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
        self._runner.close()

    def counted(self) -> Counted:
        """Return what remembers the sizes of the denoiser's passes from now on."""
        return self._runner.counted()

    def clone(self) -> "Pipeline":
        """Return a pipeline for another thread: the same weights, caches of its own."""
        return Pipeline(self._runner.clone())

    def sampling(self, preset: str = "default", **options: Any) -> Sampling:
        """Return a preset of the bundle, with some options changed.

        Raises:
            SamplingError: an unknown preset or option, or a value out of range.
        """
        return self._runner.sampling(preset, options)

    def generate(
        self,
        labels: Sequence[int] | None = None,
        *,
        prompts: Sequence[str] | None = None,
        negative_prompt: str = "",
        count: int = 1,
        batch_size: int = 16,
        **options: Any,
    ) -> Images:
        """Generate images.

        A sample's image depends on the seed, its index and the options only: whether it is drawn
        alone or in a batch of 64 does not matter.

        Args:
            labels: class of each image; None generates ``count`` images without a class.
            prompts: text of each image, for text-to-image models.
            negative_prompt: what guidance leads away from, for text-to-image models.
            count: number of images where there are neither labels nor prompts.
            batch_size: largest number of samples that run together.
            options: ``seed`` and ``first_index`` of the first sample (0 to 2**64 - 1),
                ``preset``, and fields of ``Sampling`` that differ from the preset's.

        Returns:
            uint8 (batch, height, width, 3).

        Raises:
            SamplingError: a label, a prompt or an option is out of range.
        """
        conditions = conditions_of(self.bundle, labels, prompts, negative_prompt, count)
        canvas = self._runner.blank(len(conditions.labels))
        return self._complete(canvas, conditions, batch_size, options)

    def complete(
        self,
        tokens: ArrayLike,
        labels: Sequence[int] | None = None,
        *,
        prompts: Sequence[str] | None = None,
        negative_prompt: str = "",
        batch_size: int = 16,
        **options: Any,
    ) -> Images:
        """Generate the hidden part of canvases whose other tokens are known.

        Args:
            tokens: int (batch, length) or (batch, height, width) in tokens; the mask token
                (``manifest.denoiser.mask_token``) where hidden. Known tokens do not change.
            labels: class of each image, or None.
            prompts: as in ``generate``; so is the rest.
            negative_prompt: what guidance leads away from.
            batch_size: largest number of samples that run together.
            options: ``seed``, ``first_index``, ``preset``, and fields of ``Sampling``.

        Returns:
            uint8 (batch, height, width, 3).
        """
        canvas = tokens_of(self.manifest.denoiser, tokens)
        conditions = conditions_of_canvases(
            self.bundle, labels, prompts, negative_prompt, len(canvas)
        )
        return self._complete(canvas, conditions, batch_size, options)

    def inpaint(
        self,
        images: ArrayLike,
        masks: ArrayLike,
        labels: Sequence[int] | None = None,
        *,
        keep_pixels: bool = False,
        **options: Any,
    ) -> Images:
        """Draw regions of images anew; with another label or prompt, as something else.

        Args:
            images: uint8 (batch, height, width, 3) or one image, of the model's size.
            masks: (batch, height, width) or one for all, not zero where to be drawn anew. Every
                token that a masked pixel touches is; the encoder does not see masked pixels.
            labels: class of each image, or None.
            keep_pixels: put the given pixels back where the mask is zero. Without it the whole
                image comes from the decoder: no seams, but small differences everywhere.
            options: those of ``complete``.

        Raises:
            SamplingError: sizes differ, or tokens of this model have no place in the image.
        """
        given = edit.images_of(self.image, images)
        chosen = edit.masks_of(given, masks)
        hidden = edit.hidden_tokens(self.manifest.denoiser, self.image, chosen)
        seen = np.where(chosen[..., None], np.uint8(edit.UNKNOWN), given)
        drawn = self.complete(self._hide(seen, hidden), labels, **options)
        return np.where(chosen[..., None], drawn, given) if keep_pixels else drawn

    def outpaint(
        self,
        images: ArrayLike,
        top: int,
        left: int,
        labels: Sequence[int] | None = None,
        **options: Any,
    ) -> Images:
        """Continue images beyond their borders.

        Args:
            images: uint8 (batch, h, w, 3) or one image, of any size.
            top: row of the result at which they begin; may be negative.
            left: column of the result at which they begin; may be negative.
            labels: class of each image, or None.
            options: those of ``inpaint``.
        """
        canvas, masks = edit.placed(self.image, images, top, left)
        return self.inpaint(canvas, masks, labels, **options)

    def vary(
        self,
        images: ArrayLike,
        strength: float,
        labels: Sequence[int] | None = None,
        **options: Any,
    ) -> Images:
        """Make variations of images: hide a random share of their tokens and draw it anew.

        Args:
            images: uint8 (batch, height, width, 3) or one image, of the model's size.
            strength: share of the tokens, above 0 and at most 1.
            labels: class of each image, or None.
            options: those of ``complete``.
        """
        given = edit.images_of(self.image, images)
        seed, first = options.get("seed", 0), options.get("first_index", 0)
        length = self.manifest.denoiser.length
        hidden = edit.hidden_share(strength, randomness(seed, first, len(given)), length)
        return self.complete(self._hide(given, hidden), labels, **options)

    def encode(self, images: ArrayLike) -> Tokens:
        """Return the tokens int32 (batch, length) of images of the model's size.

        Raises:
            SamplingError: images of another size, or a bundle without an encoder.
        """
        if "encoder" not in self.manifest.graphs:
            raise SamplingError("this bundle has no encoder, so that it cannot read images")
        given = edit.images_of(self.image, images)
        return self._runner.one_by_one("encoder", "images", list(given))

    def _hide(self, images: Images, hidden: NDArray[np.bool_]) -> Tokens:
        return np.where(hidden, np.int32(self.manifest.denoiser.mask_token), self.encode(images))

    def steps(
        self,
        labels: Sequence[int] | None = None,
        *,
        prompts: Sequence[str] | None = None,
        negative_prompt: str = "",
        count: int = 1,
        tokens: ArrayLike | None = None,
        **options: Any,
    ) -> Iterator[Step]:
        """Generate like ``generate`` or ``complete``, yielding the canvas after every pass.

        Ends with all tokens revealed; ``decode(step.tokens)`` makes images of them, and
        ``preview(step.tokens)`` of a canvas that still has hidden ones. A pipeline runs one
        generation at a time: beginning another one ends this one, unless that one is a clone's.

        Args:
            labels: class of each image, or None.
            prompts: text of each image, or None.
            negative_prompt: what guidance leads away from.
            count: number of images where ``labels``, ``prompts`` and ``tokens`` are None.
            tokens: known tokens as in ``complete``, or None.
            options: ``seed``, ``first_index``, ``preset``, and fields of ``Sampling``.
        """
        if tokens is None:
            conditions = conditions_of(self.bundle, labels, prompts, negative_prompt, count)
            canvas = self._runner.blank(len(conditions.labels))
        else:
            canvas = tokens_of(self.manifest.denoiser, tokens)
            conditions = conditions_of_canvases(
                self.bundle, labels, prompts, negative_prompt, len(canvas)
            )
        sampling, source = self._runner.request(len(canvas), options)
        return self._runner.unmask(canvas, conditions, sampling, source)

    def _complete(
        self, canvas: Tokens, conditions: Conditions, batch_size: int, options: dict[str, Any]
    ) -> Images:
        # All canvases before all images: the decoder is loaded once where memory is short.
        parts = self._runner.finish(canvas, conditions, batch_size, options)
        return self.decode(np.concatenate(list(parts)))

    def decode(self, tokens: Tokens) -> Images:
        """Return the images uint8 (batch, height, width, 3) of tokens int (batch, length)."""
        ids = tokens_of(self.manifest.denoiser, tokens)
        if (ids == self.manifest.denoiser.mask_token).any():
            raise SamplingError("tokens must not be hidden to be decoded; use preview instead")
        return self._runner.one_by_one("decoder", "tokens", list(ids))

    def preview(self, tokens: Tokens) -> Images:
        """Return images of unfinished canvases: hidden tokens are blue, where they have a place."""
        spec, image = self.manifest.denoiser, self.image
        ids = tokens_of(spec, tokens)
        hidden = ids == spec.mask_token
        images = self.decode(np.where(hidden, np.int32(0), ids)).copy()
        if image.factor:
            images[edit.pixels_of(spec, image, hidden)] = _HIDDEN_COLOUR
        return images
