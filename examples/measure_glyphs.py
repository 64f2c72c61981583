"""Are the generated letters and digits right, varied and new?

Command   python examples/measure_glyphs.py BUNDLE --classifier glyph-classifier.pt
Time      three minutes on 2 CPU cores, two of them for the classifier (kept in the file)
Result    a table of numbers; BUNDLE is of the glyphs model

A small convolutional classifier is trained on images of the training fonts, drawn with another
seed than the model's, and scored on the held-out fonts, then on generated images with the labels
they were asked for. Its features (the layer before the last) serve for the other measures, whose
reference are images of the training fonts. Every number of the generated images stands beside that
of the held-out fonts, which are real but in styles that the model never saw.

Sources: Fréchet distance, Heusel et al. 2017 (arXiv 1706.08500); precision, Kynkäänniemi et al.
2019 (arXiv 1904.06991); coverage, Naeem et al. 2020 (arXiv 2002.09797).
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import mdruntime

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
from glyphs import CHARACTERS, dataset

SIDE = 32  # pixels that the classifier sees; larger images are shrunk
FEATURES = 128
BATCH = 128
NEIGHBOURS = 5  # whose distance makes the ball around a real image
TRAINED_ON = {"variants": 8, "seed": 0}  # what train_glyphs.py draws
CLASSIFIER_SEED, REFERENCE_SEED = 1, 2  # other images of the same fonts


class Classifier(nn.Module):
    """Tells the 62 characters apart."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 64, FEATURES)
        self.layers = nn.Sequential()
        for before, width in pairwise(widths):
            self.layers.append(nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False))
            self.layers.append(nn.BatchNorm2d(width))
            self.layers.append(nn.ReLU())
        self.middle = nn.Linear(FEATURES * (SIDE // 8) ** 2, FEATURES)
        self.head = nn.Linear(FEATURES, len(CHARACTERS))

    def features(self, images: Tensor) -> Tensor:
        """Map uint8 (batch, SIDE, SIDE) to float32 (batch, FEATURES)."""
        ink = 1 - images[:, None].float() / 255
        return functional.relu(self.middle(self.layers(ink).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (batch, SIDE, SIDE) to logits (batch, classes)."""
        return self.head(functional.dropout(self.features(images), 0.2, self.training))


def trained(epochs: int, *, variants: int = 8, partial: bool = False) -> Classifier:
    """Train a classifier on the training fonts.

    Args:
        epochs: passes over the images.
        variants: images of a character of a font.
        partial: do with the fonts that are here.
    """
    images, labels = _drawn("train", variants, CLASSIFIER_SEED, partial=partial)
    torch.manual_seed(CLASSIFIER_SEED)
    model = Classifier().train()
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    steps = max(1, epochs * len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,))
        loss = functional.cross_entropy(model(images[chosen]), labels[chosen], label_smoothing=0.05)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
    return model.eval()


def _drawn(use: str, variants: int, seed: int, *, partial: bool) -> tuple[Tensor, Tensor]:
    images, labels = dataset(use, side=SIDE, variants=variants, seed=seed, partial=partial)
    return torch.from_numpy(images), torch.from_numpy(labels)


@torch.no_grad()
def seen(model: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features (count, FEATURES) and classes (count,) of images."""
    features = torch.cat([model.features(some) for some in torch.split(images, 1000)])
    return features, model.head(features).argmax(dim=1)


def frechet(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return the Fréchet distance of the normal distributions fitted to features (count, n)."""
    covariances = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    # The trace of a root is the sum of the roots of the eigenvalues, which are not negative.
    eigenvalues = np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(min=0)
    spread = np.trace(covariances[0] + covariances[1]) - 2 * np.sqrt(eigenvalues).sum()
    return float(((one.mean(axis=0) - other.mean(axis=0)) ** 2).sum() + spread)


def precision_and_coverage(real: Tensor, generated: Tensor) -> tuple[float, float]:
    """Compare features (count, n) by balls that hold the nearest neighbours of the real ones.

    Returns:
        The share of generated points inside of any ball, and of balls with any of them inside.
    """
    # A point is its own nearest neighbour.
    radius = torch.cdist(real, real).kthvalue(NEIGHBOURS + 1, dim=1).values
    inside = torch.cdist(generated, real) <= radius
    return float(inside.any(dim=1).float().mean()), float(inside.any(dim=0).float().mean())


def nearest(images: Tensor, labels: Tensor, others: Tensor, other_labels: Tensor) -> Tensor:
    """Return each image's distance to the nearest other one of its class.

    Returns:
        float32 (count,), root mean squares of differences of pixels in grey levels.
    """
    distance = torch.empty(len(images))
    for label in torch.unique(labels):
        own, theirs = images[labels == label], others[other_labels == label]
        between = torch.cdist(own.flatten(1).float(), theirs.flatten(1).float())
        distance[labels == label] = between.amin(dim=1) / SIDE
    return distance


@dataclass(frozen=True, slots=True)
class Scores:
    """What was measured of a set of images; accuracies are shares, distances grey levels."""

    images: int
    accuracy: float
    frechet: float
    precision: float
    coverage: float
    distance: float  # median over images, to the nearest image that the model was trained on
    copies: int  # images nearer than 1 grey level


class Judge:
    """Scores images against the training fonts."""

    def __init__(self, model: Classifier, *, partial: bool = False) -> None:
        """Take a trained classifier; ``partial`` does with the fonts that are here."""
        self.model = model
        reference, _ = _drawn("train", 1, REFERENCE_SEED, partial=partial)
        self._real, _ = seen(model, reference)
        self._trained = _drawn("train", **TRAINED_ON, partial=partial)

    def scores(self, images: Tensor, labels: Tensor) -> Scores:
        """Score images uint8 (count, SIDE, SIDE), some of every class, by the labels (count,)."""
        features, classes = seen(self.model, images)
        # Balls shrink with the number of points: as many real ones as there are others.
        order = torch.randperm(len(self._real), generator=torch.Generator().manual_seed(0))
        precision, coverage = precision_and_coverage(self._real[order[: len(images)]], features)
        distance = nearest(images, labels, *self._trained)
        return Scores(
            images=len(images),
            accuracy=float((classes == labels).double().mean()),
            frechet=frechet(self._real.double().numpy(), features.double().numpy()),
            precision=precision,
            coverage=coverage,
            distance=float(distance.median()),
            copies=int((distance < 1).sum()),
        )


def grey(pixels: NDArray[np.uint8]) -> Tensor:
    """Map generated pixels uint8 (count, side, side, 3) to uint8 (count, SIDE, SIDE)."""
    images = torch.from_numpy(pixels.mean(axis=-1))
    return functional.adaptive_avg_pool2d(images, SIDE).round().to(torch.uint8)


def generate(bundle: Path, each: int, seed: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Generate ``each`` images of every character.

    Returns:
        The images uint8 (count, SIDE, SIDE), and the labels (count,) they were asked for.
    """
    labels = [label for label in range(len(CHARACTERS)) for _ in range(each)]
    with mdruntime.load(bundle) as pipeline:
        pixels = pipeline.generate(labels, seed=seed, batch_size=62, **options)
    return grey(pixels), torch.tensor(labels)


def classifier(path: Path | None, epochs: int, *, partial: bool = False) -> Classifier:
    """Return the classifier of a file, or train one and keep it there."""
    if path is not None and path.exists():
        model = Classifier()
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    model = trained(epochs, partial=partial)
    if path is not None:
        torch.save(model.state_dict(), path)
    return model


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, nargs="?", help="leave out to score real images only")
    parser.add_argument("--each", type=int, default=40, help="images of every character")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", default="default")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--epochs", type=int, default=2, help="of the classifier")
    parser.add_argument("--classifier", type=Path, help="file that keeps it")
    given = parser.parse_args()
    judge = Judge(classifier(given.classifier, given.epochs))
    columns = {"held-out": judge.scores(*_drawn("held-out", 1, REFERENCE_SEED, partial=False))}
    if given.bundle is not None:
        images, labels = generate(
            given.bundle, given.each, given.seed, preset=given.preset, **given.options
        )
        columns["generated"] = judge.scores(images, labels)
    print(" " * 12 + "".join(f"{name:>12}" for name in columns))
    for field in asdict(columns["held-out"]):
        values = (f"{getattr(scores, field):12.4g}" for scores in columns.values())
        print(f"{field:12}" + "".join(values))


if __name__ == "__main__":
    main()
