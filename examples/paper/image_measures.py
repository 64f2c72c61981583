"""Are images right, varied and new? Measures of sets of images, in the features of a classifier.

Sources: Fréchet distance, Heusel et al. 2017 (arXiv 1706.08500), in other features than theirs;
precision, Kynkäänniemi et al. 2019 (arXiv 1904.06991); coverage, Naeem et al. 2020
(arXiv 2002.09797).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from classifier import Classifier, seen

__all__ = ["ImageJudge", "Labelled", "frechet", "grey", "nearest", "precision_and_coverage"]

NEIGHBOURS = 5  # whose distance makes the ball around a real image
COPY = 1.0  # grey levels; what is nearer to a training image is a copy of it


@dataclass(frozen=True, slots=True)
class Labelled:
    """Images and their classes."""

    images: Tensor  # uint8 (count, side, side)
    labels: Tensor  # int64 (count,)


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


def nearest(images: Tensor, labels: Tensor, others: Labelled) -> Tensor:
    """Return each image's distance to the nearest other one of its class.

    Args:
        images: uint8 (count, side, side).
        labels: int64 (count,), each one's class.
        others: some of every class that occurs.

    Returns:
        float32 (count,), root mean squares of differences of pixels in grey levels.
    """
    distance = torch.empty(len(images))
    for label in torch.unique(labels):
        own, theirs = images[labels == label], others.images[others.labels == label]
        # The shortcut by a product loses what is small: it would find no copy.
        between = torch.cdist(
            own.flatten(1).float(),
            theirs.flatten(1).float(),
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        distance[labels == label] = between.amin(dim=1) / images.shape[-1]
    return distance


def grey(pixels: NDArray[np.uint8], side: int) -> Tensor:
    """Map pixels uint8 (count, height, width, 3) to uint8 (count, side, side)."""
    images = torch.from_numpy(pixels.mean(axis=-1))
    return functional.adaptive_avg_pool2d(images, side).round().to(torch.uint8)


class ImageJudge:
    """Scores images against real ones; satisfies ``mdexport.study.Judge``."""

    measure = "frechet"

    def __init__(self, model: Classifier, reference: Tensor, trained: Labelled) -> None:
        """Take what to compare with.

        Args:
            model: trained on neither of the others.
            reference: real images uint8 (count, side, side).
            trained: what the generating model was trained on.
        """
        self.model, self.trained = model, trained
        features, _ = seen(model, reference)
        # Balls shrink with the number of points: as many real ones are taken as there are others.
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
        self._real = features[order]

    def score(
        self, samples: NDArray[np.uint8], labels: Sequence[int] | None = None
    ) -> Mapping[str, float]:
        """Score images.

        Args:
            samples: uint8 (count, height, width, 3); as many as there will be in any other set to
                compare with, since the distance grows as they become few.
            labels: the classes they were asked for.

        Returns:
            ``frechet``: the Fréchet distance to the reference in the features; ``accuracy``: share
            of images that the classifier takes for what they should be; ``precision``: share that
            look like real ones; ``coverage``: share of real ones that have a similar image;
            ``novelty``: median distance to the nearest training image of the class, in grey
            levels; ``copies``: how many are nearer than one grey level.

        Raises:
            ValueError: the samples are no images, or have no labels.
        """
        if not isinstance(samples, np.ndarray) or samples.ndim != 4:
            raise ValueError("this judge scores images: its samples must be of an image model")
        if labels is None or len(labels) != len(samples):
            found = "none" if labels is None else str(len(labels))
            raise ValueError(f"{len(samples)} images must come with a label each, got {found}")
        return self.compare(Labelled(grey(samples, self.model.side), torch.tensor(labels)))

    def compare(self, samples: Labelled) -> dict[str, float]:
        """Score images that are grey and of the classifier's size; see ``score``."""
        features, classes = seen(self.model, samples.images)
        precision, coverage = precision_and_coverage(self._real[: len(features)], features)
        distance = nearest(samples.images, samples.labels, self.trained)
        return {
            "frechet": frechet(self._real.double().numpy(), features.double().numpy()),
            "accuracy": float((classes == samples.labels).double().mean()),
            "precision": precision,
            "coverage": coverage,
            "novelty": float(distance.median()),
            "copies": float((distance < COPY).sum()),
        }
