"""Are the generated digits right, and are they new?

Command   python examples/measure_digits.py quickstart/digits
Time      about a minute on 2 CPU cores
Result    the table in README.md, section "Digits"

A support-vector classifier is trained on the training images and scored on the held-out ones,
then on generated images with the labels they were asked for. Novelty is the Euclidean distance of
an image to its nearest training image, in grey levels (0 to 16), beside that of held-out images.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.svm import SVC

import mdruntime

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
from train_digits import split


@dataclass(frozen=True, slots=True)
class Quality:
    """What was measured; accuracies are shares, distances are medians in grey levels."""

    images: int
    held_out_accuracy: float
    generated_accuracy: float
    held_out_distance: float
    generated_distance: float
    copies: int  # generated images that are equal to a training image

    @property
    def novelty(self) -> float:
        """Generated nearest-neighbour distance as a share of the held-out images' own."""
        return self.generated_distance / self.held_out_distance


def nearest(images: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return each image's (count, 64) distance to the nearest of ``others``."""
    squares = (images**2).sum(1)[:, None] + (others**2).sum(1)[None] - 2 * images @ others.T
    return np.sqrt(squares.min(axis=1))


def measure(bundle: Path, images: int, seed: int, **options: Any) -> Quality:
    """Generate ``images`` digits, all classes alike, and measure them.

    Args:
        bundle: of the digits model.
        images: how many; a multiple of ten.
        seed: of the generation.
        options: of the sampler; the default preset otherwise.
    """
    train, train_labels, test, test_labels = split()
    classifier = SVC(gamma=0.001, C=10).fit(train, train_labels)
    labels = [label for label in range(10) for _ in range(images // 10)]
    with mdruntime.load(bundle) as pipeline:
        pixels = pipeline.generate(labels, seed=seed, batch_size=50, **options)
    levels = np.rint(pixels[..., 0].reshape(len(labels), -1) * (16 / 255)).astype(np.int64)
    distance = nearest(levels, train)
    return Quality(
        images=len(labels),
        held_out_accuracy=float(classifier.score(test, test_labels)),
        generated_accuracy=float(classifier.score(levels, labels)),
        held_out_distance=float(np.median(nearest(test, train))),
        generated_distance=float(np.median(distance)),
        copies=int((distance == 0).sum()),
    )


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", default="default")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON")
    given = parser.parse_args()
    quality = measure(given.bundle, given.images, given.seed, preset=given.preset, **given.options)
    for name, value in asdict(quality).items():
        print(f"{name:20} {value:.4g}")
    print(f"{'novelty':20} {quality.novelty:.3f}")


if __name__ == "__main__":
    main()
