"""Editing in terms of arrays: which tokens of a picture are hidden, to be drawn anew."""

import operator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mdruntime.errors import SamplingError
from mdruntime.manifest import DenoiserSpec, ImageSpec
from mdruntime.randomness import Purpose, Randomness

__all__ = [
    "UNKNOWN",
    "Images",
    "Masks",
    "hidden_share",
    "hidden_tokens",
    "images_of",
    "masks_of",
    "pixels_of",
    "placed",
]

Images = NDArray[np.uint8]  # (batch, height, width, 3)
Masks = NDArray[np.bool_]  # (batch, height, width), true where to be drawn anew

UNKNOWN = 128
"""Grey level of pixels that the encoder must not see."""


def images_of(image: ImageSpec, images: ArrayLike) -> Images:
    """Return a user's pictures as a batch, once they are known to be of the model's size."""
    given = _array("images", images)
    if given.shape[-3:-1] != (image.height, image.width):
        raise SamplingError(
            f"images must be {image.height} x {image.width} pixels, uint8 (batch, {image.height}, "
            f"{image.width}, 3), got shape {given.shape}; resize or crop them"
        )
    return _pictures(given)


def _pictures(given: NDArray[Any]) -> Images:
    """Return pictures of any size as a batch, once they are known to be pictures."""
    batch = given[None] if given.ndim == 3 else given
    if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[3] != 3 or not batch.size:
        raise SamplingError(
            f"images must be uint8 (batch, height, width, 3), got {given.dtype} {given.shape}"
        )
    return batch


def _array(name: str, values: ArrayLike) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except ValueError:  # a list of arrays that do not fit together
        raise SamplingError(f"{name} must all have one size; pass them one by one") from None


def masks_of(images: Images, masks: ArrayLike) -> Masks:
    """Return a user's masks as one for each picture, once they are known to be of its size."""
    given = _array("masks", masks)
    single = given.shape in (images.shape[1:3], (1, *images.shape[1:3]))
    if not single and given.shape != images.shape[:3]:
        raise SamplingError(
            f"masks must have the size of the images, {images.shape[1]} x {images.shape[2]} pixels "
            f"({len(images)} of them, or one for all), got shape {given.shape}"
        )
    return np.broadcast_to(given != 0, images.shape[:3])


def hidden_tokens(spec: DenoiserSpec, image: ImageSpec, masks: Masks) -> NDArray[np.bool_]:
    """Return which tokens overlap a mask, bool (batch, length).

    A token is hidden if any of its pixels is, as the author of MAGE advises for inpainting.
    """
    if not image.factor:
        raise SamplingError(
            "a token of this model belongs to no place of the image, so that no region can be "
            "drawn anew; make variations instead (vary, or --strength)"
        )
    height, width = image.height // image.factor, image.width // image.factor
    cells = masks.reshape(len(masks), height, image.factor, width, image.factor).any(axis=(2, 4))
    # Where several tokens share a cell, all of them are hidden.
    shares = (spec.grid[0] // height, spec.grid[1] // width)
    return cells.repeat(shares[0], axis=1).repeat(shares[1], axis=2).reshape(len(masks), -1)


def pixels_of(spec: DenoiserSpec, image: ImageSpec, hidden: NDArray[np.bool_]) -> Masks:
    """Return the pixels that show tokens, each its part of the cell where several share one.

    Args:
        spec: grid of the tokens.
        image: size of the images; its tokens have a place.
        hidden: bool (batch, length).
    """
    tile = (image.height // spec.grid[0], image.width // spec.grid[1])
    return hidden.reshape(-1, *spec.grid).repeat(tile[0], axis=1).repeat(tile[1], axis=2)


def hidden_share(strength: float, source: Randomness, length: int) -> NDArray[np.bool_]:
    """Return a random share of the tokens of every sample, bool (batch, length).

    Args:
        strength: the share, above 0 and at most 1; at least one token is chosen.
        source: randomness of the samples.
        length: tokens of a canvas.
    """
    if not isinstance(strength, int | float | np.floating) or not 0 < strength <= 1:
        raise SamplingError(f"strength must be above 0 and at most 1, got {strength!r}")
    rank = source.bits(Purpose.EDIT, 0, length).argsort(axis=1).argsort(axis=1)
    return rank < max(1, round(strength * length))


def placed(image: ImageSpec, images: ArrayLike, top: int, left: int) -> tuple[Images, Masks]:
    """Return pictures laid on the model's canvas, and masks of what they do not cover.

    Args:
        image: size of the canvas.
        images: uint8 (batch, h, w, 3) or (h, w, 3), of any size.
        top: row of the canvas at which the pictures begin; may be negative.
        left: column at which they begin; may be negative.

    Raises:
        SamplingError: they cover nothing of the canvas, or all of it.
    """
    given, top, left = _pictures(_array("images", images)), _offset(top), _offset(left)
    rows = slice(max(top, 0), min(top + given.shape[1], image.height))
    columns = slice(max(left, 0), min(left + given.shape[2], image.width))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        raise SamplingError(
            f"the image must overlap the canvas of {image.height} x {image.width} pixels, got "
            f"{given.shape[1]} x {given.shape[2]} at row {top}, column {left}"
        )
    canvas = np.full((len(given), image.height, image.width, 3), UNKNOWN, np.uint8)
    masks = np.ones(canvas.shape[:3], bool)
    part = given[:, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    canvas[:, rows, columns], masks[:, rows, columns] = part, False
    if not masks.any():
        raise SamplingError(
            f"the image must leave some of the canvas of {image.height} x {image.width} pixels "
            f"free, got {given.shape[1]} x {given.shape[2]} at row {top}, column {left}; shrink it"
        )
    return canvas, masks


def _offset(value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise SamplingError(f"top and left must be whole numbers, got {value!r}") from None
