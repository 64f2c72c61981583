"""Draw the pictures of the README: sheets of samples, and orders side by side.

Command   python examples/draw_pictures.py --glyphs GLYPHS
Time      half a minute on 2 CPU cores; GLYPHS is a bundle
Result    examples/pictures: glyphs.png (seed 0, nothing left out) and orders.gif; those of the
          digits are what quickstart.sh draws
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

import mdruntime
from mdruntime import Pipeline
from mdruntime.images import enlarge, save_animation, save_image, sheet

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
WORD = "Masked"
ORDERS: dict[str, dict[str, Any]] = {  # caption: options of the sampler
    "halton: positions spread out": {"order": "halton"},
    "moment: positions the model is sure of": {"order": "moment"},
    "hybrid: spread out first, then sure of": {"order": "hybrid", "exploration": (1.0, 0.0)},
}
ROUNDS = 12
SEED = 3
CAPTION = 16  # pixels

Picture = NDArray[np.uint8]  # (height, width, 3)


def unmasked(pipeline: Pipeline, options: dict[str, Any]) -> Iterator[Picture]:
    """Yield the word after every pass, as one picture."""
    labels = [CHARACTERS.index(character) for character in WORD]
    sampler = {"preset": "published", "rounds": ROUNDS, "guidance": 1.0, **options}
    for step in pipeline.steps(labels=labels, seed=SEED, **sampler):
        yield np.concatenate(list(pipeline.preview(step.tokens)), axis=1)


def captioned(caption: str, picture: Picture) -> Picture:
    """Return a picture under a line of text."""
    line = Image.new("RGB", (picture.shape[1], CAPTION), "white")
    ImageDraw.Draw(line).text((2, 2), caption, fill="black")
    return np.concatenate([np.asarray(line), picture])


def orders(pipeline: Pipeline, path: Path) -> None:
    """Write an animation of the orders, one below the other, pass by pass."""
    runs = [
        [captioned(caption, enlarge(picture, 2)) for picture in unmasked(pipeline, options)]
        for caption, options in ORDERS.items()
    ]
    save_animation(path, [np.concatenate(frames) for frames in zip(*runs, strict=True)], 350)


def main() -> None:
    """Draw what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--glyphs", type=Path, required=True, help="bundle of the glyphs")
    parser.add_argument("--output", type=Path, default=Path("examples/pictures"), help="folder")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    with mdruntime.load(given.glyphs, tuned=False) as pipeline:
        images = pipeline.generate([*range(62)] * 2, preset="best", seed=0)
        save_image(given.output / "glyphs.png", sheet(images, 31), {"seed": 0})
        orders(pipeline, given.output / "orders.gif")


if __name__ == "__main__":
    main()
