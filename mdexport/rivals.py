"""What a user could run in place of the runtime: PyTorch, on the same weights and the same passes.

``TorchBackend`` puts a model in PyTorch under the runtime's own samplers. ``original_image`` is the
way of the published repositories: whole canvases, conditional and unconditional, through the model
in every round; logits come back, and the sampler works on them in PyTorch.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mdexport.model import Model
from mdexport.torch_session import TorchPasses
from mdruntime.guidance import guidance_weights
from mdruntime.sampling import Sampling
from mdruntime.schedule import hidden_counts
from mdruntime.session import Feeds, FunctionSession, Session

__all__ = ["TorchBackend", "original_image"]


class TorchBackend:
    """A model in PyTorch, float32: satisfies ``session.Backend``."""

    provider = "torch"

    def __init__(self, model: Model, *, compiled: bool = False) -> None:
        """Take a model, and compile its passes where that is wanted."""
        self.model, self._compiled = model, compiled
        self._sessions: dict[str, Session] = {}

    def session(self, graph: str) -> Session:
        """Return the session of a graph."""
        if graph not in self._sessions:
            self._sessions[graph] = self._opened(graph)
        return self._sessions[graph]

    def _opened(self, graph: str) -> Session:
        model = self.model
        if graph == "denoiser":
            return TorchPasses(model.denoiser, compiled=self._compiled)
        if graph == "condition":
            return FunctionSession(lambda feeds: _numpy(model.denoiser.condition, feeds))
        module = getattr(model, graph)
        output = {"decoder": "images", "encoder": "tokens"}[graph]
        return FunctionSession(lambda feeds: {output: _numpy(module, feeds)})

    def release(self, graph: str) -> None:
        """Do nothing: PyTorch's weights stay in memory."""

    @property
    def notes(self) -> list[str]:
        """Nothing is to be said."""
        return []

    def clone(self) -> "TorchBackend":
        """Return a backend with caches of its own."""
        return TorchBackend(self.model, compiled=self._compiled)

    def close(self) -> None:
        """Drop the caches."""
        self._sessions.clear()


@torch.inference_mode()
def _numpy(function: Any, feeds: Feeds) -> Any:
    """Return what a function of one tensor returns, as arrays."""
    (array,) = feeds.values()
    found = function(torch.from_numpy(np.ascontiguousarray(array)))
    if isinstance(found, dict):
        return {name: value.numpy() for name, value in found.items()}
    return found.numpy()


@torch.inference_mode()
def original_image(model: Model, label: int, sampling: Sampling, seed: int) -> NDArray[np.uint8]:
    """Draw one image as the published repositories do: MaskGIT's sampler in PyTorch, float32.

    Every round runs the whole canvas with and without the class, draws a token at every hidden
    position, and keeps those with the largest log p + alpha * (1 - progress) * Gumbel (Chang et
    al. 2022, as in valeoai's MaskGIT-pytorch).

    Args:
        model: of images with classes.
        label: the class.
        sampling: rounds, schedule, guidance and alpha.
        seed: of the random numbers.

    Returns:
        uint8 (height, width, 3).
    """
    spec, generator = model.denoiser.spec, torch.Generator().manual_seed(seed)
    tokens = torch.full((1, spec.length), spec.mask_token, dtype=torch.int32)
    hidden = hidden_counts(sampling.schedule, sampling.rounds, spec.length)
    rounds = len(hidden)
    labels = torch.tensor([label, -1], dtype=torch.int32)
    both = labels if sampling.guidance else labels[:1]
    for number, count in enumerate(-np.diff(hidden, prepend=spec.length)):
        turn = np.array([number])
        schedule = sampling.guidance_schedule
        (weight,) = guidance_weights(schedule, sampling.guidance, turn, np.array([rounds]))
        logits = model.denoiser(tokens.expand(len(both), -1), both)[..., : spec.codebook]
        if len(both) > 1:
            logits = (1 + float(weight)) * logits[:1] - float(weight) * logits[1:]
        probabilities = logits.softmax(-1)
        drawn = torch.multinomial(probabilities[0], 1, generator=generator).T
        chosen = probabilities.gather(-1, drawn[..., None])[..., 0].log()
        uniform = torch.rand(chosen.shape, generator=generator).clamp(1e-20, 1 - 1e-7)
        cooling = 1 - (number + 1) / rounds
        confidence = chosen - sampling.alpha * cooling * torch.log(-torch.log(uniform))
        confidence[tokens != spec.mask_token] = -math.inf
        places = confidence.topk(int(count), dim=-1).indices
        tokens = tokens.scatter(1, places, drawn.gather(1, places).int())
    assert model.decoder is not None
    return np.asarray(model.decoder(tokens)[0].numpy())
