"""A small convolutional classifier of grey images: its features are what sets are compared in."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Classifier", "fit", "seen"]

BATCH = 128
RATE = 4e-3  # learning rate at its peak
WEIGHT_DECAY = 0.01
SMOOTHING = 0.05  # of the labels
DROPOUT = 0.2  # of the features


class Classifier(nn.Module):
    """Convolutions that halve the side, a hidden layer of features, and the classes."""

    def __init__(self, side: int, classes: int, widths: tuple[int, ...], paper: int = 255) -> None:
        """Take sizes.

        Args:
            side: pixels of an image, a multiple of two to the number of convolutions.
            classes: to be told apart.
            widths: channels after every convolution; the last one is also the number of features.
            paper: grey level where nothing is drawn.
        """
        super().__init__()
        self.side, self.paper, features = side, paper, widths[-1]
        self.layers = nn.Sequential()
        for before, width in pairwise((1, *widths)):
            self.layers.append(nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False))
            self.layers.append(nn.BatchNorm2d(width))
            self.layers.append(nn.ReLU())
        self.middle = nn.Linear(features * (side // 2 ** len(widths)) ** 2, features)
        self.head = nn.Linear(features, classes)

    def features(self, images: Tensor) -> Tensor:
        """Map uint8 (batch, side, side) to float32 (batch, features)."""
        ink = (self.paper - images[:, None].float()).abs() / 255
        return functional.relu(self.middle(self.layers(ink).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (batch, side, side) to logits (batch, classes)."""
        return self.head(functional.dropout(self.features(images), DROPOUT, self.training))


def fit(model: Classifier, images: Tensor, labels: Tensor, epochs: int, seed: int) -> Classifier:
    """Train a classifier and return it.

    Args:
        model: with any weights; they are drawn anew.
        images: uint8 (count, side, side).
        labels: int64 (count,).
        epochs: passes over the images.
        seed: of weights, batches and dropout.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                layer.reset_parameters()
        return _trained(model.train(), images, labels, epochs).eval()


def _trained(model: Classifier, images: Tensor, labels: Tensor, epochs: int) -> Classifier:
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    steps = max(1, epochs * len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,))
        logits = model(images[chosen])
        loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=SMOOTHING)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
    return model


@torch.no_grad()
def seen(model: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features float32 (count, features) and classes int64 (count,) of images."""
    features = torch.cat([model.features(some) for some in torch.split(images, 1000)])
    return features, model.head(features).argmax(dim=1)
