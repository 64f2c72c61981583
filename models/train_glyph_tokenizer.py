"""Stage 1 of ``train_glyphs.py``: images of characters to tokens and back.

A small VQGAN without its adversary (Esser et al. 2021, arXiv 2012.09841): it is trained on pixels
and their differences. Its codebook follows the latents as running means (van den Oord et al. 2017,
arXiv 1711.00937, appendix A.1); entries that nothing uses are moved to badly served latents.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mdzoo.vqgan import VQGAN, VQGANConfig
from training import Every, Run

BATCH = 32
PEAK_RATE = 1e-3
WEIGHT_DECAY = 1e-4
AVERAGING = 0.995
COMMITMENT = 0.25  # weight of the pull of latents to their entries
EDGES = 1.0  # weight of the differences of neighbouring pixels
MEMORY = 0.98  # decay of the running means of the codebook
UNUSED = 0.1  # an entry with fewer latents in a batch, in the mean, is moved
INTERVAL = 120  # seconds between checkpoints


class Means:
    """The running means of the latents of each entry, of which the codebook consists."""

    def __init__(self, table: Tensor) -> None:
        """Take the codebook (entries, embedding), which is written to in place."""
        self._table = table
        self.counts = torch.zeros(len(table), device=table.device)
        self.sums = torch.zeros_like(table)

    @torch.no_grad()
    def update(self, latents: Tensor, tokens: Tensor, generator: torch.Generator) -> None:
        """Move the codebook.

        Args:
            latents: float (count, embedding).
            tokens: int64 (count,), their nearest entries.
            generator: draws where unused entries go.
        """
        chosen = F.one_hot(tokens, len(self._table)).to(latents.dtype)
        self.counts.lerp_(chosen.sum(dim=0), 1 - MEMORY)
        self.sums.lerp_(chosen.T @ latents, 1 - MEMORY)
        unused = self.counts < UNUSED
        # A latent attracts entries in proportion to its squared error, as in k-means++: most
        # latents are of blank paper and need no second entry.
        error = (latents - self._table[tokens]).square().sum(dim=1) + 1e-9
        target = torch.multinomial(error, len(unused), replacement=True, generator=generator)
        self.counts.masked_fill_(unused, 1.0)
        self.sums.copy_(torch.where(unused[:, None], latents[target], self.sums))
        self._table.copy_(self.sums / self.counts[:, None])

    def of(self, run: Run[VQGAN]) -> None:
        """Begin anew with the entries of a run that was resumed."""
        self.counts.fill_(1.0)
        self.sums.copy_(table(run.model))


def table(model: VQGAN) -> Tensor:
    """Return the codebook (entries, embedding)."""
    return model.get_parameter("quantize.embedding.weight")


def pixels(images: Tensor) -> Tensor:
    """Map uint8 (batch, side, side) to float32 (batch, 3, side, side) in [-1, 1]."""
    return (images.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def difference(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean absolute difference of pixels, and of their steps right and down."""
    error = one - other
    steps = [error.diff(dim=axis).abs().mean() for axis in (2, 3)]
    return error.abs().mean() + EDGES * (steps[0] + steps[1]) / 2


def loss_of(run: Run[VQGAN], means: Means, images: Tensor) -> Tensor:
    """Return the loss of a batch, and let the codebook follow it.

    Args:
        run: of the tokenizer.
        means: of its codebook.
        images: uint8 (batch, side, side).
    """
    model, wanted = run.model, pixels(images)
    latents = model.latents(wanted)
    tokens = model.quantize.nearest(latents.detach()).flatten()
    points = latents.permute(0, 2, 3, 1).flatten(0, 2).float()
    means.update(points.detach(), tokens, run.generator)
    entries = table(model)[tokens].detach()
    # The gradient passes the codebook as if it were not there.
    passed = (points + (entries - points).detach()).reshape(
        len(images), latents.shape[2], latents.shape[3], -1
    )
    drawn = model.decoder(model.post_quant_conv(passed.permute(0, 3, 1, 2).to(latents.dtype)))
    return difference(drawn.float(), wanted) + COMMITMENT * F.mse_loss(points, entries)


@torch.no_grad()
def encode(model: VQGAN, images: Tensor) -> Tensor:
    """Map uint8 (count, side, side) to int64 tokens (count, length), on the CPU."""
    device = next(model.parameters()).device
    return torch.cat(
        [model.encode(pixels(some.to(device))).cpu() for some in torch.split(images, 256)],
    )


@torch.no_grad()
def report(model: VQGAN, images: Tensor) -> str:
    """Say how images uint8 (count, side, side) come back, and how many entries they use."""
    tokens = encode(model, images).to(next(model.parameters()).device)
    error = 0.0
    for some, wanted in zip(torch.split(tokens, 256), torch.split(images, 256), strict=True):
        back = model.decode(some).clamp(-1, 1)
        error += float((back - pixels(wanted.to(back.device))).abs().mean()) * len(some)
    share = tokens.flatten().bincount(minlength=model.codebook).double() / tokens.numel()
    entropy = float(-torch.xlogy(share, share).sum())
    used = int((share > 0).sum())
    return (
        f"held-out error {error / len(images) * 127.5:.2f} grey levels  "
        f"{used} entries, {entropy:.2f} nats a token"
    )


def train(
    config: VQGANConfig,
    images: Tensor,
    held_out: Tensor,
    *,
    minutes: float,
    seed: int,
    checkpoint: Path,
) -> VQGAN:
    """Train and return the averaged tokenizer.

    Args:
        config: its sizes.
        images: uint8 (count, side, side), on the device to train on.
        held_out: of the same kind, for reports.
        minutes: of wall time.
        seed: of weights and batches.
        checkpoint: file that is written every few minutes, and that a rerun resumes.
    """
    torch.manual_seed(seed)
    model = VQGAN(config).to(images.device)
    table(model).requires_grad_(False)
    run = Run(
        model,
        minutes=minutes,
        rate=PEAK_RATE,
        decay=WEIGHT_DECAY,
        averaging=AVERAGING,
        seed=seed,
    )
    run.resume(checkpoint)
    means, due = Means(table(model)), Every(INTERVAL)
    if run.step:
        means.of(run)
    while run.progress < 1:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            loss = loss_of(run, means, images[run.draw(len(images), BATCH)])
        run.update(loss)
        if due() or run.progress == 1:
            told = report(run.average, held_out)
            print(f"tokenizer {run.step}  {run.seconds:.0f} s  loss {loss:.4f}  {told}", flush=True)
            run.save(checkpoint)
    return run.average
