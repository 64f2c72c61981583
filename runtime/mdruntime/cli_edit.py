"""``mdruntime edit``: inpaint, outpaint or vary an image."""

import argparse
import contextlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdruntime.bundle import open_bundle
from mdruntime.cli_generate import facts_of, say_random
from mdruntime.denoiser import HEADS
from mdruntime.errors import SamplingError
from mdruntime.images import check_target, enlarge, fitted, read_image, save_image, sheet
from mdruntime.manifest import ImageSpec
from mdruntime.options import add_sampling_flags, labels, sampling_changes
from mdruntime.pipeline import Images, Pipeline
from mdruntime.runner import Runner

__all__ = ["add_flags", "run"]


def _numbers(count: int, what: str) -> Any:
    """Return a parser of so many whole numbers with commas between."""

    def read(text: str) -> tuple[int, ...]:
        try:
            found = tuple(int(part) for part in text.split(","))
        except ValueError:
            found = ()
        if len(found) != count:
            raise argparse.ArgumentTypeError(f"must be {what} in pixels, got {text!r}")
        return found

    return read


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add("-i", "--image", type=Path, required=True, metavar="FILE", help="image to edit")
    box, place = _numbers(4, "left,top,width,height"), _numbers(2, "left,top")
    what = parser.add_argument_group("what to draw anew (one of these)")
    only = what.add_mutually_exclusive_group(required=True)
    only.add_argument("--mask", type=Path, metavar="FILE", help="all that is not black in FILE")
    only.add_argument("--box", type=box, metavar="L,T,W,H", help="a rectangle of pixels")
    only.add_argument("--place", type=place, metavar="L,T", help="all around the image, laid there")
    only.add_argument("--strength", type=float, metavar="S", help="a random share of the tokens")
    add("-l", "--labels", type=labels, metavar="L", help="class, or one for each result")
    add("-p", "--prompt", action="append", metavar="TEXT", help="what the result shows")
    add("--negative-prompt", default="", metavar="TEXT", help="what it should not show")
    add("--fit", action="store_true", help="resize and crop the image to the model's size")
    add("--keep-pixels", action="store_true", help="put the given pixels back afterwards")
    add("-n", "--count", type=int, default=1, metavar="N", help="results")
    add("--seed", type=int, default=0, metavar="S", help="seed of all randomness")
    add("--first-index", type=int, default=0, metavar="I", help="index of result 1")
    add("--head", default="graph", help=f"sampler head: {', '.join(HEADS)}")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="image to write")
    add("--scale", type=int, default=0, metavar="N", help="enlarge every pixel")
    add("-q", "--quiet", action="store_true", help="print nothing but errors")
    add_sampling_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    check_target(options.output)
    if not 1 <= options.count <= 4096:
        raise SamplingError(f"count must be between 1 and 4096, got {options.count}")
    image = read_image(options.image)
    bundle = open_bundle(options.bundle)
    if bundle.manifest.image is None:
        raise SamplingError("this bundle makes text; fill gaps with: mdruntime generate --infill")
    if "encoder" not in bundle.manifest.graphs:
        raise SamplingError("this bundle has no encoder, so that it cannot read images")
    runner = Runner(bundle, options.provider, threads=options.threads, head=options.head)
    with contextlib.closing(runner):
        began = time.perf_counter()
        images = _edited(Pipeline(runner), image, options)
        seconds = round(time.perf_counter() - began, 3)
        facts = {**facts_of(runner, options), "images": len(images), "edit_s": seconds}
    save_image(options.output, sheet(enlarge(images, options.scale)), facts)
    if options.json:
        print(json.dumps(facts))
    elif not options.quiet:
        print(f"wrote {options.output}: {len(images)} image(s) in {seconds:.2f} s")
        say_random(facts)
    return 0


def _edited(pipeline: Pipeline, image: NDArray[np.uint8], options: argparse.Namespace) -> Images:
    request = {
        "labels": _for_each(options.labels, "labels", options.count),
        "prompts": _for_each(options.prompt, "prompts", options.count),
        "negative_prompt": options.negative_prompt,
        "seed": options.seed,
        "first_index": options.first_index,
        "preset": options.preset,
        **sampling_changes(options),
    }
    size = pipeline.image
    image = fitted(image, size.height, size.width) if options.fit else image
    images = np.repeat(image[None], options.count, axis=0)
    if options.strength is not None:
        return pipeline.vary(images, options.strength, **request)
    request["keep_pixels"] = options.keep_pixels
    if options.place is not None:
        left, top = options.place
        return pipeline.outpaint(images, top, left, **request)
    return pipeline.inpaint(images, _mask(size, options), **request)


def _for_each(given: list[Any] | None, name: str, count: int) -> list[Any] | None:
    if given is None or len(given) == count:
        return given
    if len(given) > 1:
        raise SamplingError(f"{name} must be one, or {count} as --count says, got {len(given)}")
    return given * count


def _mask(size: ImageSpec, options: argparse.Namespace) -> NDArray[np.bool_]:
    if options.mask is not None:
        return np.asarray(read_image(options.mask).any(axis=-1))
    left, top, width, height = options.box
    mask = np.zeros((size.height, size.width), bool)
    if min(left, top) < 0 or left + width > size.width or top + height > size.height:
        raise SamplingError(
            f"the box must lie within {size.width} x {size.height} pixels, got "
            f"{width} x {height} at {left},{top}"
        )
    mask[top : top + height, left : left + width] = True
    if not mask.any():
        raise SamplingError(f"the box must hold a pixel, got {width} x {height}")
    return mask
