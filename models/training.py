"""What the training scripts share: runs that a clock ends, and that stop and resume."""

import copy
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

WARM_UP = 100  # steps

Model = TypeVar("Model", bound=nn.Module)


class Run(Generic[Model]):
    """A model in training: everything that a checkpoint has to hold.

    Its learning rate warms up over ``WARM_UP`` steps and falls to zero along a cosine of the time
    spent, so a run of any length ends well; what it yields depends on the machine's speed.
    """

    def __init__(
        self,
        model: Model,
        *,
        minutes: float,
        rate: float,
        decay: float,
        averaging: float,
        seed: int,
    ) -> None:
        """Take a model on its device.

        Args:
            model: with random weights.
            minutes: of wall time, over all resumptions.
            rate: learning rate at its peak.
            decay: of the weights.
            averaging: decay of the exponential moving average of the weights, in the long run.
            seed: of ``generator``.
        """
        self.model = model
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.optimiser = torch.optim.AdamW(
            [tensor for tensor in model.parameters() if tensor.requires_grad],
            betas=(0.9, 0.98),
            weight_decay=decay,
        )
        self.device = next(model.parameters()).device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.seconds, self.step = 0.0, 0
        self._limit, self._rate, self._averaging = 60 * minutes, rate, averaging
        self._mark = time.perf_counter()

    @property
    def progress(self) -> float:
        """Share of the time that is spent; 1 ends the run."""
        return min(1.0, self.seconds / self._limit) if self._limit else 1.0

    def draw(self, count: int, batch: int) -> Tensor:
        """Return int64 (batch,) random numbers below ``count``."""
        return torch.randint(count, (batch,), generator=self.generator, device=self.device)

    def update(self, loss: Tensor) -> None:
        """Take a step of the optimiser, and account for the time since the last one."""
        warm = min(1.0, (self.step + 1) / WARM_UP)
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate * warm * 0.5 * (1 + math.cos(math.pi * self.progress))
        self.optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        self._follow()
        now = time.perf_counter()
        self.seconds, self._mark = self.seconds + now - self._mark, now

    @torch.no_grad()
    def _follow(self) -> None:
        # Early averages are short, lest they hold on to the random weights.
        decay = min(self._averaging, self.step / (self.step + 10))
        for slow, fast in zip(self.average.parameters(), self.model.parameters(), strict=True):
            # What no gradient moves, such as a codebook, is taken as it is.
            slow.lerp_(fast, 1 - decay if fast.requires_grad else 1.0)

    def save(self, path: Path) -> None:
        """Write a checkpoint; one that is cut off leaves the former in place."""
        parts = {name: getattr(self, name).state_dict() for name in _PARTS}
        counts = {"step": self.step, "seconds": self.seconds}
        partial = path.with_suffix(".partial")
        torch.save({**parts, **counts, "generator": self.generator.get_state()}, partial)
        partial.replace(path)

    def resume(self, path: Path) -> None:
        """Go on where a checkpoint was written, if there is one."""
        if path.exists():
            saved = torch.load(path, weights_only=True, map_location=self.device)
            for name in _PARTS:
                getattr(self, name).load_state_dict(saved[name])
            self.generator.set_state(saved["generator"].cpu())
            self.step, self.seconds = saved["step"], saved["seconds"]
        self._mark = time.perf_counter()


_PARTS = ("model", "average", "optimiser")


def hide(
    tokens: Tensor, count: Tensor, mask: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Hide ``count`` (batch, 1) random tokens of each sample.

    Args:
        tokens: int64 (batch, length).
        count: how many to hide, (batch, 1).
        mask: the token to put in place of the hidden ones.
        generator: on the device of the tokens.

    Returns:
        The masked tokens and where they are hidden, both (batch, length).
    """
    draws = torch.rand(tokens.shape, generator=generator, device=tokens.device)
    hidden = draws.argsort(1).argsort(1) < count
    return tokens.masked_fill(hidden, mask), hidden


def write(path: Path, state: Mapping[str, Tensor], **metadata: str) -> None:
    """Write float16 weights under their published names."""
    half = {key: tensor.half().cpu().contiguous() for key, tensor in state.items()}
    save_file(half, path, metadata={"model": path.stem, **metadata})
    sys.stdout.write(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)\n")
    sys.stdout.flush()


class Every:
    """Says once in so many seconds that it is time again."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last = time.perf_counter()

    def __call__(self) -> bool:
        """Whether the seconds are over; if so, they begin anew."""
        now = time.perf_counter()
        due = now - self._last >= self._seconds
        self._last = now if due else self._last
        return due
