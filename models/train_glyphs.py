"""Train the ``glyphs`` model: letters and digits, class by class, through a tokenizer of ours.

Command   OMP_WAIT_POLICY=passive python models/train_glyphs.py
Time      about 45 minutes on 2 CPU cores; stops and resumes (--work holds the checkpoints)
Result    models/mdzoo/weights/glyphs.safetensors and glyphs-tokenizer.safetensors, in float16

Stage 1 trains the tokenizer (models/train_glyph_tokenizer.py), stage 2 a MaskGIT on its tokens.
The data are those of models/glyphs.py; the fonts must be installed. What comes out depends on the
machine's speed, since the clock ends both stages.
"""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import train_glyph_tokenizer as tokenizer
import training
from glyphs import CHARACTERS, dataset
from mdzoo import vqgan
from mdzoo.maskgit import MaskGIT, MaskGITConfig, initialise, to_published
from mdzoo.vqgan import VQGAN, VQGANConfig
from training import Every, Run

WEIGHTS = Path(__file__).parent / "mdzoo" / "weights"
LABEL_DROPOUT = 0.1  # share of samples that train the unconditional model of guidance
BATCH = 64
PEAK_RATE = 1e-3
WEIGHT_DECAY = 0.05
AVERAGING = 0.998
INTERVAL = 180  # seconds between checkpoints
TEST_IMAGES = 500  # held-out images that reports are made of


@dataclass(frozen=True, slots=True)
class Setting:
    """Sizes of the data and of the models."""

    side: int  # pixels
    variants: int  # images of a character of a training font
    tokenizer: VQGANConfig
    denoiser: MaskGITConfig
    dropout: float = 0.0


def _setting(side: int, variants: int, channels: int, width: int, depth: int) -> Setting:
    vq = VQGANConfig(
        widths=(channels, channels, 2 * channels),
        stem=channels,
        blocks=1,
        latent=2 * channels,
        embedding=8,
        codebook=256,
    )
    denoiser = MaskGITConfig(
        grid=side // vq.factor,
        codebook=vq.codebook,
        classes=len(CHARACTERS),
        width=width,
        depth=depth,
        heads=width // 32,
        hidden=4 * width,
    )
    return Setting(side, variants, vq, denoiser, dropout=0.1 if variants > 8 else 0.0)


SETTINGS: Mapping[str, Setting] = {
    "cpu": _setting(32, 8, channels=32, width=160, depth=6),
    "gpu": _setting(64, 32, channels=64, width=256, depth=8),
}


@dataclass(frozen=True, slots=True)
class Split:
    """Tokens int64 (count, length) and labels int64 (count,), on one device."""

    tokens: Tensor
    labels: Tensor


def hide(tokens: Tensor, mask: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hide a random share of each image's tokens; the share follows MaskGIT's cosine.

    Args:
        tokens: int64 (batch, length).
        mask: the token to put in place of the hidden ones.
        generator: on the device of the tokens.

    Returns:
        The masked tokens and where they are hidden, both (batch, length).
    """
    shape, device = tokens.shape, tokens.device
    ratio = torch.cos(torch.rand(shape[0], 1, generator=generator, device=device) * math.pi / 2)
    count = (ratio * shape[1]).ceil().clamp(min=1)
    return training.hide(tokens, count, mask, generator)


def loss_of(model: MaskGIT, some: Split, generator: torch.Generator) -> Tensor:
    """Return the mean cross-entropy over hidden tokens, in nats."""
    codebook = model.config.codebook
    masked, hidden = hide(some.tokens, codebook, generator)
    logits = model(masked, some.labels)[..., :codebook]
    return F.cross_entropy(logits[hidden].float(), some.tokens[hidden])


@torch.no_grad()
def held_out_loss(model: MaskGIT, test: Split) -> float:
    """Return the loss over one fixed masking of each held-out image."""
    generator = torch.Generator(test.tokens.device).manual_seed(1)
    parts = zip(torch.split(test.tokens, 500), torch.split(test.labels, 500), strict=True)
    losses = [float(loss_of(model, Split(*part), generator)) for part in parts]
    return sum(losses) / len(losses)


def batch_of(run: Run[MaskGIT], data: Split) -> Split:
    """Draw a batch, some of whose labels are dropped."""
    chosen = run.draw(len(data.labels), BATCH)
    dropped = torch.rand(BATCH, generator=run.generator, device=run.device) < LABEL_DROPOUT
    return Split(data.tokens[chosen], data.labels[chosen].masked_fill(dropped, -1))


def train(
    setting: Setting, data: Split, test: Split, *, minutes: float, seed: int, checkpoint: Path
) -> MaskGIT:
    """Train and return the averaged denoiser.

    Args:
        setting: its sizes.
        data: to train on.
        test: of held-out fonts.
        minutes: of wall time.
        seed: of weights, batches and maskings.
        checkpoint: file that is written every few minutes, and that a rerun resumes.
    """
    torch.manual_seed(seed)
    model = MaskGIT(setting.denoiser, dropout=setting.dropout)
    initialise(model)
    run = Run(
        model.to(data.tokens.device),
        minutes=minutes,
        rate=PEAK_RATE,
        decay=WEIGHT_DECAY,
        averaging=AVERAGING,
        seed=seed,
    )
    run.resume(checkpoint)
    due, device = Every(INTERVAL), data.tokens.device.type
    while run.progress < 1:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(model, batch_of(run, data), run.generator)
        run.update(loss)
        if due() or run.progress == 1:
            loss_there = held_out_loss(run.average, test)
            print(
                f"denoiser {run.step}  {run.seconds:.0f} s  train {loss:.4f}  "
                f"held-out {loss_there:.4f}",
                flush=True,
            )
            run.save(checkpoint)
    return run.average


def stages(setting: Setting, options: argparse.Namespace, device: torch.device) -> None:
    """Run both stages and write their weights."""
    images, labels, test_images, test_labels = (
        torch.from_numpy(part).to(device)
        for use, variants in (("train", setting.variants), ("held-out", 1))
        for part in dataset(
            use, side=setting.side, variants=variants, seed=options.seed, partial=options.partial
        )
    )
    some = _some(len(test_images), TEST_IMAGES)
    test_images, test_labels = test_images[some], test_labels[some]
    print(f"{len(images)} images, {len(test_images)} of held-out fonts, {device}", flush=True)
    codec = tokenizer.train(
        setting.tokenizer,
        images,
        test_images,
        minutes=options.minutes_tokenizer,
        seed=options.seed,
        checkpoint=options.work / "tokenizer.pt",
    )
    path = options.output / "glyphs-tokenizer.safetensors"
    training.write(path, codec.state_dict(), seed=str(options.seed))
    codec = shipped(path).to(device)
    data, test = (
        Split(tokenizer.encode(codec, seen).to(device), of)
        for seen, of in ((images, labels), (test_images, test_labels))
    )
    denoiser = train(
        setting,
        data,
        test,
        minutes=options.minutes_denoiser,
        seed=options.seed,
        checkpoint=options.work / "denoiser.pt",
    )
    path = options.output / "glyphs.safetensors"
    training.write(path, to_published(denoiser.state_dict()), seed=str(options.seed))


def _some(count: int, wanted: int) -> Tensor:
    """Choose some of ``count`` images, always the same ones."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:wanted]


def shipped(path: Path) -> VQGAN:
    """Return the tokenizer of a file: stage 2 trains on what float16 has left of it."""
    return vqgan.load(load_file(path), source=path.name)


def main() -> None:
    """Train with the settings of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--setting", choices=SETTINGS, default="cpu")
    parser.add_argument("--minutes-tokenizer", type=float, default=10)
    parser.add_argument("--minutes-denoiser", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--partial", action="store_true", help="do with the fonts that are here")
    parser.add_argument("--work", type=Path, default=Path("glyphs-training"))
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="folder of the weights")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stages(SETTINGS[options.setting], options, device)


if __name__ == "__main__":
    main()
