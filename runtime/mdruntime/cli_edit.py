"""``mdruntime edit``: inpaint, outpaint or vary an image."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdruntime.bundle import open_bundle
from mdruntime.cli_generate import facts_of, say_random
from mdruntime.cli_tuned import closed, open_runner, say_tuned
from mdruntime.denoiser import HEADS
from mdruntime.errors import SamplingError
from mdruntime.images import check_target, enlarge, fitted, read_image, save_image, sheet
from mdruntime.manifest import ImageSpec
from mdruntime.options import add_sampling_flags, labels, sampling_changes
from mdruntime.pipeline import Images, Pipeline

__all__ = ["add_flags", "run"]

_MOST = 4096  # results on one sheet

_Image = NDArray[np.uint8]  # (height, width, 3)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add("-i", "--image", type=Path, required=True, metavar="FILE", help="image to edit")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="image to write")
    what = parser.add_argument_group("what to draw anew (one of these, in pixels of the model)")
    only = what.add_mutually_exclusive_group(required=True)
    only.add_argument("--mask", type=Path, metavar="FILE", help="all that is not black in FILE")
    rectangle, corner = ("LEFT", "TOP", "WIDTH", "HEIGHT"), ("LEFT", "TOP")
    only.add_argument("--box", type=int, nargs=4, metavar=rectangle, help="a rectangle")
    only.add_argument("--place", type=int, nargs=2, metavar=corner, help="all around the image")
    only.add_argument("--strength", type=float, metavar="S", help="that share of the tokens")
    add("-l", "--labels", type=labels, metavar="L", help="class, or one for each result")
    add("-p", "--prompt", action="append", metavar="TEXT", help="what the result shows")
    add("--negative-prompt", default="", metavar="TEXT", help="what it should not show")
    add("--fit", action="store_true", help="resize and crop image and mask to the model's size")
    add("--keep-pixels", action="store_true", help="put the given pixels back afterwards")
    add("-n", "--count", type=int, default=1, metavar="N", help="results")
    add("--seed", type=int, default=0, metavar="S", help="seed of all randomness")
    add("--first-index", type=int, default=0, metavar="I", help="index of result 1")
    add("--batch-size", type=int, default=16, metavar="N", help="results at a time")
    add("--head", default="graph", help=f"sampler head: {', '.join(HEADS)}")
    add("--scale", type=int, default=0, metavar="N", help="enlarge every pixel")
    add("-q", "--quiet", action="store_true", help="print nothing but errors")
    add_sampling_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    _check(options)
    image, mask = _read(options)
    bundle = open_bundle(options.bundle)
    if bundle.manifest.image is None:
        raise SamplingError("this bundle makes text; fill gaps with: mdruntime generate --infill")
    if "encoder" not in bundle.manifest.graphs:
        raise SamplingError("this bundle has no encoder, so that it cannot read images")
    runner = open_runner(bundle, options)
    with closed(runner):
        say_tuned(runner, options)
        began = time.perf_counter()
        images = _edited(Pipeline(runner), image, mask, options)
        seconds = round(time.perf_counter() - began, 3)
        facts = {**facts_of(runner, options), **_edit(options)}
    facts |= {"images": len(images), "edit_s": seconds}
    save_image(options.output, sheet(enlarge(images, options.scale)), facts)
    if options.json:
        print(json.dumps(facts))
    elif not options.quiet:
        print(f"wrote {options.output}: {len(images)} image(s) in {seconds:.2f} s")
        say_random(facts)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse what could only fail after the work is done."""
    check_target(options.output)
    for name, low, high in (("count", 1, _MOST), ("batch_size", 1, _MOST), ("scale", 0, 256)):
        value = getattr(options, name)
        if not low <= value <= high:
            raise SamplingError(f"{name} must be between {low} and {high}, got {value}")
    if options.keep_pixels and options.strength is not None:
        raise SamplingError("--keep-pixels needs a region to be drawn anew; --strength has none")


def _edit(options: argparse.Namespace) -> dict[str, Any]:
    """Return what was done to which image, for files and machines."""
    names = ("image", "mask", "box", "place", "strength", "fit", "keep_pixels")
    given = {name: getattr(options, name) for name in names}
    return {name: str(v) if isinstance(v, Path) else v for name, v in given.items()}


def _read(options: argparse.Namespace) -> tuple[_Image, _Image | None]:
    """Return the image, and the picture of the mask if there is one: both of one size."""
    image = read_image(options.image)
    if options.mask is None:
        return image, None
    mask = read_image(options.mask)
    if mask.shape != image.shape:
        raise SamplingError(
            f"the mask must have the size of the image, {image.shape[1]} x {image.shape[0]} "
            f"pixels, got {mask.shape[1]} x {mask.shape[0]}"
        )
    if not mask.any():
        raise SamplingError(
            f"the mask {str(options.mask)!r} is all black, so that nothing would be drawn anew; "
            "paint that white"
        )
    return image, mask


def _edited(
    pipeline: Pipeline, image: _Image, mask: _Image | None, options: argparse.Namespace
) -> Images:
    request = {
        "labels": _for_each(options.labels, "labels", options.count),
        "prompts": _for_each(options.prompt, "prompts", options.count),
        "negative_prompt": options.negative_prompt,
        "seed": options.seed,
        "first_index": options.first_index,
        "batch_size": options.batch_size,
        "preset": options.preset,
        **sampling_changes(options),
    }
    size = pipeline.image
    image = _sized(image, size, options)
    images = np.repeat(image[None], options.count, axis=0)
    if options.strength is not None:
        return pipeline.vary(images, options.strength, **request)
    request["keep_pixels"] = options.keep_pixels
    if options.place is not None:
        left, top = options.place
        return pipeline.outpaint(images, top, left, **request)
    chosen = _boxed(size, options.box) if mask is None else _sized(mask, size, options).any(axis=-1)
    return pipeline.inpaint(images, chosen, **request)


def _sized(image: _Image, size: ImageSpec, options: argparse.Namespace) -> _Image:
    """Return an image of the model's size; one that is placed may have any."""
    if options.fit:
        return fitted(image, size.height, size.width)
    if options.place is None and image.shape[:2] != (size.height, size.width):
        raise SamplingError(
            f"the image must be {size.width} x {size.height} pixels, got {image.shape[1]} x "
            f"{image.shape[0]}; --fit resizes and crops it"
        )
    return image


def _for_each(given: list[Any] | None, name: str, count: int) -> list[Any] | None:
    if given is None or len(given) == count:
        return given
    if len(given) > 1:
        raise SamplingError(f"{name} must be one, or {count} as --count says, got {len(given)}")
    return given * count


def _boxed(size: ImageSpec, box: tuple[int, int, int, int]) -> NDArray[np.bool_]:
    left, top, width, height = box
    inside = min(left, top) >= 0 and left + width <= size.width and top + height <= size.height
    if not inside or min(width, height) < 1:
        raise SamplingError(
            f"the box must lie within {size.width} x {size.height} pixels and hold one at least, "
            f"got {width} x {height} at {left}, {top}"
        )
    mask = np.zeros((size.height, size.width), bool)
    mask[top : top + height, left : left + width] = True
    return mask
