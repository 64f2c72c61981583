"""Train the shipped ``digits`` denoiser: class-conditional 8x8 images of 17 grey levels.

Command   python models/train_digits.py
Time      about 25 minutes on 2 CPU cores; stops and resumes (--work holds the checkpoint)
Result    models/mdzoo/weights/digits.safetensors (2.3 MB), losses in models/README.md

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

from mdzoo.maskgit import MaskGIT, MaskGITConfig, to_published

CONFIG = MaskGITConfig(grid=8, codebook=17, classes=10, width=96, depth=5, heads=4, hidden=384)
DROPOUT = 0.2
LABEL_DROPOUT = 0.1  # share of samples that train the unconditional model of guidance
BATCH = 128
PEAK_RATE = 1.5e-3
WEIGHT_DECAY = 0.1
AVERAGING = 0.998  # decay of the exponential moving average that is shipped


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


def initialise(model: MaskGIT) -> None:
    """Start from small embeddings, as BERT does; PyTorch's unit variance trains slowly."""
    torch.nn.init.normal_(model.tokens.weight, std=0.02)
    torch.nn.init.normal_(model.positions, std=0.02)


def rate(step: int, steps: int) -> float:
    """Return the learning rate: linear warm-up over 200 steps, then a cosine to zero."""
    warm = min(1.0, (step + 1) / 200)
    return PEAK_RATE * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(steps: int, work: Path) -> MaskGIT:
    """Train and return the averaged model; ``work`` holds the checkpoint that a rerun resumes."""
    torch.manual_seed(0)
    images, labels, test_images, test_labels = (torch.from_numpy(part) for part in split())
    model = MaskGIT(CONFIG, dropout=DROPOUT)
    initialise(model)
    average = MaskGIT(CONFIG)
    average.load_state_dict(model.state_dict())
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(0)
    checkpoint = work / "digits.pt"
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimiser.load_state_dict(saved["optimiser"])
        generator.set_state(saved["generator"])
        start = saved["step"]
    began = time.perf_counter()
    for step in range(start, steps):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < LABEL_DROPOUT
        for group in optimiser.param_groups:
            group["lr"] = rate(step, steps)
        loss = loss_of(model, images[chosen], labels[chosen].masked_fill(dropped, -1), generator)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1 - AVERAGING)
        if (step + 1) % 500 == 0:
            test = held_out_loss(average, test_images, test_labels)
            seconds = time.perf_counter() - began
            print(
                f"step {step + 1}  train {loss.item():.4f}  held-out {test:.4f}  {seconds:.0f} s",
                flush=True,
            )
            torch.save(
                {
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "generator": generator.get_state(),
                    "step": step + 1,
                },
                checkpoint,
            )
    return average.eval()


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
