"""Train the shipped ``digits`` denoiser: class-conditional 8x8 images of 17 grey levels.

Command   python models/train_digits.py
Time      about 29 minutes on 2 CPU cores; stops and resumes (--work holds the checkpoint)
Result    models/mdzoo/weights/digits.safetensors (2.4 MB), losses in models/README.md

Data: scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits" test set, 1,797
images. Every fifth image of each class is held out, never trained on.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from mdzoo.maskgit import MaskGIT, MaskGITConfig, initialise, to_published

CONFIG = MaskGITConfig(grid=8, codebook=17, classes=10, width=96, depth=5, heads=4, hidden=384)
DROPOUT = 0.2
LABEL_DROPOUT = 0.1  # share of samples that train the unconditional model of guidance
BATCH = 128
PEAK_RATE = 1.5e-3
WEIGHT_DECAY = 0.1
AVERAGING = 0.998  # decay of the exponential moving average that is shipped
INTERVAL = 500  # steps between checkpoints


def split() -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return training and held-out images (count, 64) with grey levels 0 to 16, and their labels.

    The order is: training images, training labels, held-out images, held-out labels.
    """
    data = load_digits()
    images, labels = data.data.astype(np.int64), data.target.astype(np.int64)
    rank = np.empty_like(labels)  # how many images of the same class came before
    for label in range(10):
        rank[labels == label] = np.arange((labels == label).sum())
    held_out = rank % 5 == 4
    return images[~held_out], labels[~held_out], images[held_out], labels[held_out]


def hide(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hide a random share of each image's tokens; the share follows MaskGIT's cosine.

    Returns:
        The masked tokens and where they are hidden, both (batch, length).
    """
    batch, length = images.shape
    ratio = torch.cos(torch.rand(batch, 1, generator=generator) * math.pi / 2)
    count = (ratio * length).ceil().clamp(min=1)
    rank = torch.rand(batch, length, generator=generator).argsort(1).argsort(1)
    hidden = rank < count
    return images.masked_fill(hidden, CONFIG.codebook), hidden


def loss_of(model: MaskGIT, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return the mean cross-entropy over hidden tokens, in nats."""
    tokens, hidden = hide(images, generator)
    logits = model(tokens, labels)[..., : CONFIG.codebook]
    return F.cross_entropy(logits[hidden], images[hidden])


@torch.no_grad()
def held_out_loss(model: MaskGIT, images: Tensor, labels: Tensor) -> float:
    """Return the loss on held-out images, averaged over eight fixed maskings."""
    model.eval()
    generator = torch.Generator().manual_seed(1)
    losses = [float(loss_of(model, images, labels, generator)) for _ in range(8)]
    model.train()
    return sum(losses) / len(losses)


def rate(step: int, steps: int) -> float:
    """Return the learning rate: linear warm-up over 200 steps, then a cosine to zero."""
    warm = min(1.0, (step + 1) / 200)
    return PEAK_RATE * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


class Run:
    """The state of a training run: everything a checkpoint has to hold."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = MaskGIT(CONFIG, dropout=DROPOUT)
        initialise(self.model)
        self.average = MaskGIT(CONFIG)
        self.average.load_state_dict(self.model.state_dict())
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
        )
        self.generator = torch.Generator().manual_seed(0)
        self.step = 0

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        parts = {name: getattr(self, name).state_dict() for name in _PARTS}
        randomness = {"generator": self.generator.get_state(), "dropout": torch.get_rng_state()}
        torch.save({**parts, **randomness, "step": self.step}, path)

    def resume(self, path: Path) -> None:
        """Go on where a checkpoint was written."""
        saved = torch.load(path, weights_only=True)
        for name in _PARTS:
            getattr(self, name).load_state_dict(saved[name])
        self.generator.set_state(saved["generator"])
        torch.set_rng_state(saved["dropout"])
        self.step = saved["step"]

    def advance(self, images: Tensor, labels: Tensor, steps: int) -> float:
        """Take one optimiser step of ``steps``; return the training loss in nats."""
        chosen = torch.randint(len(images), (BATCH,), generator=self.generator)
        dropped = torch.rand(BATCH, generator=self.generator) < LABEL_DROPOUT
        for group in self.optimiser.param_groups:
            group["lr"] = rate(self.step, steps)
        some = labels[chosen].masked_fill(dropped, -1)
        loss = loss_of(self.model, images[chosen], some, self.generator)
        self.optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        with torch.no_grad():
            for slow, fast in zip(self.average.parameters(), self.model.parameters(), strict=True):
                slow.lerp_(fast, 1 - AVERAGING)
        self.step += 1
        return loss.item()


_PARTS = ("model", "average", "optimiser")


def train(steps: int, work: Path, stop: int | None = None) -> MaskGIT:
    """Train and return the averaged model.

    Args:
        steps: of the whole schedule.
        work: folder of the checkpoint that a rerun resumes.
        stop: pause after so many steps.
    """
    images, labels, test_images, test_labels = (torch.from_numpy(part) for part in split())
    run, checkpoint = Run(), work / "digits.pt"
    if checkpoint.exists():
        run.resume(checkpoint)
    began = time.perf_counter()
    while run.step < (steps if stop is None else stop):
        loss = run.advance(images, labels, steps)
        if run.step % INTERVAL == 0:
            test = held_out_loss(run.average, test_images, test_labels)
            seconds = time.perf_counter() - began
            print(
                f"step {run.step}  train {loss:.4f}  held-out {test:.4f}  {seconds:.0f} s",
                flush=True,
            )
            run.save(checkpoint)
    return run.average.eval()


def main() -> None:
    """Train with the published settings and write the weights."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--work", type=Path, default=Path("digits-training"))
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "mdzoo/weights/digits.safetensors"
    )
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    model = train(options.steps, options.work)
    state = {key: value.contiguous() for key, value in to_published(model.state_dict()).items()}
    save_file(state, options.output, metadata={"model": "digits", "seed": "0"})
    print(f"wrote {options.output} ({options.output.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
