"""Are the generated letters and digits right, varied and new?

Command   python examples/measure_glyphs.py BUNDLE --classifier glyph-classifier.npz
Time      four minutes on a CPU core, three of them for the classifier (kept in the file)
Result    a table of numbers; BUNDLE is of the glyphs model

A small convolutional classifier is trained on images of the training fonts, drawn with another
seed than the model's, and scored on the held-out fonts, then on generated images with the labels
they were asked for. Its features serve for the other measures, whose reference are images of the
training fonts (paper/image_measures.py). Every number of the generated images stands beside that
of the held-out fonts, which are real but in styles that the model never saw. The Fréchet distance
grows as images become few: compare only columns of about the same number.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mdruntime

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
sys.path.insert(0, str(Path(__file__).parent / "paper"))
from glyphs import CHARACTERS, FontError
from image_measures import ImageJudge
from judges import glyphs, held_out_glyphs


def generated(
    judge: ImageJudge, bundle: Path, each: int, seed: int, **options: Any
) -> Mapping[str, float]:
    """Generate ``each`` images of every character, and score them."""
    labels = [label for label in range(len(CHARACTERS)) for _ in range(each)]
    with mdruntime.load(bundle) as pipeline:
        pixels = pipeline.generate(labels, seed=seed, batch_size=62, **options)
    return {"images": len(labels), **judge.score(pixels, labels)}


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, nargs="?", help="leave out to score real images only")
    parser.add_argument("--each", type=int, default=35, help="images of every character")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", default="default")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON")
    parser.add_argument(
        "--classifier", type=Path, help="file that keeps it; otherwise one in the user's cache"
    )
    given = parser.parse_args()
    try:
        judge, real = glyphs(given.classifier), held_out_glyphs()
    except FontError as error:
        raise SystemExit(f"measure_glyphs: {error}") from None
    columns = {"held-out": {"images": len(real.images), **judge.compare(real)}}
    if given.bundle is not None:
        columns["generated"] = dict(
            generated(
                judge, given.bundle, given.each, given.seed, preset=given.preset, **given.options
            )
        )
    print(" " * 12 + "".join(f"{name:>12}" for name in columns))
    for field in columns["held-out"]:
        print(f"{field:12}" + "".join(f"{scores[field]:12.4g}" for scores in columns.values()))


if __name__ == "__main__":
    main()
