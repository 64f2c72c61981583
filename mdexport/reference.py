"""Test vectors: what the PyTorch model answers along whole trajectories.

The sampler is the runtime's own, driven by a session that runs PyTorch in float32 and records
every pass. So the vectors hold just what a device will see: full and partial passes, guided, with
caches that the passes before left behind.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mdexport.denoiser import Denoiser
from mdexport.head import OUTPUTS
from mdexport.torch_session import TorchPasses
from mdruntime.conditions import Conditions
from mdruntime.denoiser import CONDITION, Condition
from mdruntime.denoiser import Denoiser as Runner
from mdruntime.errors import VerificationError
from mdruntime.head import Controls
from mdruntime.layout import Layout
from mdruntime.manifest import DenoiserSpec, PromptSpec
from mdruntime.randomness import Purpose, Randomness
from mdruntime.sampler import Canvas, Pass, unmask
from mdruntime.sampling import Sampling
from mdruntime.session import Feeds, Outputs
from mdruntime.verify import CONDITIONED, DECODER_VECTORS, ENCODER_VECTORS

__all__ = [
    "FORWARD_TOLERANCE",
    "TorchSession",
    "canvases",
    "conditioned",
    "record",
    "trajectories",
    "write_images",
]

MASK_RATIOS = (1.0, 0.75, 0.5, 0.25, 0.0)
FORWARD_TOLERANCE = 1e-4  # cached pass against the model's own forward, in logits
_COLUMNS = 4  # of every pass whose logits are kept
_LOGITS = 100_000  # of a sample's pass at most, for the sake of the file's size
_SEED = 20250510
_LONGEST = 128  # tokens of the recorded canvas where its length is free


class TorchSession(TorchPasses):
    """Passes in PyTorch that are recorded."""

    def __init__(self, denoiser: Denoiser, inputs: NDArray[np.int32] | None = None) -> None:
        """Take a denoiser in float32.

        Args:
            denoiser: to be run.
            inputs: of the condition graph, for the rows of every pass to come: those of
                conditional rows, then those of unconditional ones.
        """
        super().__init__(denoiser)
        self._inputs = inputs
        self.passes: list[dict[str, NDArray[Any]]] = []

    def run(self, feeds: Feeds, fetch: Sequence[str]) -> Outputs:
        """Run a pass and record it."""
        started = 0 if self._caches else self._canvas
        found = self._outputs(feeds)
        draws = {name: found[name] for name in OUTPUTS}
        self._record({**feeds, "canvas": np.int64(started)}, draws, found["logits"])
        return {name: found[name] for name in fetch}

    def _record(self, feeds: dict[str, Any], found: Outputs, logits: NDArray[Any]) -> None:
        columns = max(1, min(_COLUMNS, _LOGITS // logits.shape[-1]))
        shown = np.unique(np.linspace(0, logits.shape[1] - 1, columns).astype(np.int64))
        one = {name: array for name, array in feeds.items() if not name.startswith(CONDITION)}
        one |= {**found, "shown": shown, "logits": logits[:, shown]}
        if self._inputs is not None:
            one[CONDITIONED] = self._inputs[: len(feeds["tokens"])]
        self.passes.append(one)

    def clone(self) -> "TorchSession":
        """Return a session on the same weights."""
        return TorchSession(self._denoiser, self._inputs)


def write_images(
    folder: Path, tokens: NDArray[np.int32], decoder: nn.Module, encoder: nn.Module | None
) -> None:
    """Write images that the decoder makes of tokens, and tokens the encoder makes of images."""
    with torch.no_grad():
        images = decoder(torch.from_numpy(tokens))
        np.savez_compressed(folder / DECODER_VECTORS, tokens=tokens, images=images.numpy())
        if encoder is not None:
            found = encoder(images).numpy()
            np.savez_compressed(folder / ENCODER_VECTORS, images=images.numpy(), tokens=found)


def conditioned(denoiser: Denoiser, prompt: PromptSpec | None) -> bool:
    """Return whether a denoiser has a condition graph."""
    return _conditioner(denoiser, _conditions(denoiser.spec, prompt).inputs()) is not None


def _conditioner(denoiser: Denoiser, inputs: NDArray[np.int32]) -> Condition | None:
    """Return the denoiser's conditions as the runtime wants them, if it has any."""

    @torch.no_grad()
    def run(rows: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
        found = denoiser.condition(torch.from_numpy(rows))
        return {name: tensor.numpy() for name, tensor in found.items()}

    return run if run(inputs[:1]) else None


def _conditions(spec: DenoiserSpec, prompt: PromptSpec | None, seed: int = _SEED) -> Conditions:
    """Return two samples' conditions: the first and the last class, or made-up prompts."""
    random = np.random.default_rng(seed)
    ends = np.array([0, spec.classes - 1] if spec.classes else [-1, -1])
    labels = random.integers(0, spec.classes, 2) if spec.classes and seed != _SEED else ends
    if prompt is None:
        return Conditions(labels)
    words = random.integers(0, prompt.begin, (2, prompt.length), dtype=np.int32)
    words[:, 0], words[:, prompt.length // 2 :] = prompt.begin, prompt.pad
    words[:, prompt.length // 2] = prompt.end
    nothing = np.full((2, prompt.length), prompt.pad, np.int32)
    nothing[:, 0], nothing[:, 1] = prompt.begin, prompt.end
    return Conditions(labels, words, nothing)


def record(
    denoiser: Denoiser, prompt: PromptSpec | None = None
) -> tuple[list[dict[str, NDArray[Any]]], NDArray[np.int32]]:
    """Record a guided trajectory with partial caching, and passes at fixed mask ratios.

    Args:
        denoiser: satisfies ``mdexport.Denoiser``, in float32.
        prompt: what its condition graph reads, where that is text.

    Returns:
        The recorded passes, and the trajectory's tokens int32 (batch, length).

    Raises:
        VerificationError: the cached pass is not the model's own forward pass.
    """
    spec, conditions = denoiser.spec, _conditions(denoiser.spec, prompt)
    runner, session = _runner(denoiser, conditions)
    length = min(spec.length, _LONGEST) if spec.flexible else spec.length
    tokens = _trajectory(runner, spec, length)
    for number, ratio in enumerate(MASK_RATIOS):
        canvas = _hide(tokens, spec, ratio, number)
        for request in _full_and_partial(canvas, number):
            runner(request)
        _check_forward(denoiser, session, canvas, conditions)
    return session.passes, tokens


def trajectories(
    denoiser: Denoiser, prompt: PromptSpec | None = None, *, count: int = 4, rounds: int = 8
) -> list[dict[str, NDArray[Any]]]:
    """Record guided trajectories of other classes or prompts than ``record``, two samples each.

    Args:
        denoiser: satisfies ``mdexport.Denoiser``, in float32.
        prompt: what its condition graph reads, where that is text.
        count: of trajectories.
        rounds: of each, from an empty canvas to a full one.
    """
    spec, passes = denoiser.spec, list[dict[str, NDArray[Any]]]()
    length = min(spec.length, _LONGEST) if spec.flexible else spec.length
    for seed in range(_SEED + 1000, _SEED + 1000 + count):
        runner, session = _runner(denoiser, _conditions(spec, prompt, seed))
        _trajectory(runner, spec, length, rounds, seed)
        passes += session.passes
    return passes


def _runner(denoiser: Denoiser, conditions: Conditions) -> tuple[Runner, TorchSession]:
    """Return what runs the model, and the session that records its passes."""
    condition = _conditioner(denoiser, conditions.inputs())
    session = TorchSession(denoiser, None if condition is None else conditions.inputs())
    return Runner(session, denoiser.spec, conditions, condition=condition), session


def canvases(
    denoiser: Denoiser, prompt: PromptSpec | None = None, *, count: int = 2
) -> NDArray[np.int32]:
    """Return tokens (2 count, length) of other trajectories than those of ``record``.

    Args:
        denoiser: satisfies ``mdexport.Denoiser``, in float32.
        prompt: what its condition graph reads, where that is text.
        count: of trajectories, two samples each.
    """
    spec, found = denoiser.spec, []
    for seed in range(_SEED + 2000, _SEED + 2000 + count):
        runner, _ = _runner(denoiser, _conditions(spec, prompt, seed))
        found.append(_trajectory(runner, spec, spec.length, seed=seed))
    return np.concatenate(found)


def _trajectory(
    runner: Runner, spec: DenoiserSpec, length: int, rounds: int = 4, seed: int = _SEED
) -> NDArray[np.int32]:
    sampling = Sampling(
        rounds=min(rounds, length),
        order="hybrid",
        exploration=(1.0, 0.0),
        substeps=2,
        refresh="recent",
        guidance=1.0,
        guidance_interval=(0.0, 0.5),
    )
    grid = spec.grid if length == spec.length else (length,)
    canvas = Canvas(length, grid, spec.mask_token)
    tokens = np.full((2, length), spec.mask_token, np.int32)
    for step in unmask(runner, tokens, canvas, sampling, Randomness(seed, range(2))):
        tokens = step.tokens
    return tokens


def _hide(
    tokens: NDArray[np.int32], spec: DenoiserSpec, ratio: float, number: int
) -> NDArray[np.int32]:
    length = tokens.shape[1]
    bits = Randomness(_SEED, range(len(tokens))).bits(Purpose.PERMUTATION, number, length)
    rank = bits.argsort(axis=1).argsort(axis=1)
    return np.where(rank < round(ratio * length), np.int32(spec.mask_token), tokens)


def _full_and_partial(canvas: NDArray[np.int32], number: int) -> Iterator[Pass]:
    """Yield a full pass without guidance, then a partial pass over an eighth of the canvas."""
    batch, length = canvas.shape
    source = Randomness(_SEED + 1 + number, range(batch))
    uniforms = source.uniforms(Purpose.TOKEN, 0, length)
    ones = np.ones(batch, np.float32)
    controls = Controls(0 * ones, ones, 1.25 * ones, 1.25 * ones)
    samples, everywhere = np.arange(batch), np.tile(np.arange(length), (batch, 1))
    yield Pass(samples, None, canvas, everywhere, controls, uniforms, False)
    bits = source.bits(Purpose.PERMUTATION, 0, length)
    positions = bits.argsort(axis=1)[:, : max(2, length // 8)]
    wanted = positions[:, : (1 + positions.shape[1]) // 2]
    rows = np.take_along_axis(canvas, positions, axis=1)
    numbers = np.take_along_axis(uniforms, wanted, axis=1)
    yield Pass(samples, positions, rows, wanted, controls, numbers, False)


@torch.no_grad()
def _check_forward(
    denoiser: Denoiser,
    session: TorchSession,
    canvas: NDArray[np.int32],
    conditions: Conditions,
) -> None:
    """Compare the last full pass with the model's own forward pass, which knows no cache."""
    spec, inputs = denoiser.spec, conditions.inputs()[: len(canvas)]
    plain = denoiser(torch.from_numpy(canvas).long(), torch.from_numpy(inputs).long())
    cached = session.passes[-2]
    order = Layout(spec, canvas.shape[1]).tokens_of_row.ravel()
    expected = plain[:, order[cached["shown"]], : spec.codebook].numpy()
    worst = float(np.abs(cached["logits"] - expected).max())
    if not worst <= FORWARD_TOLERANCE:
        raise VerificationError(
            f"the denoiser's step() differs from its forward() by {worst:.3g} in the logits "
            f"(at most {FORWARD_TOLERANCE:g}); its K/V cache code is wrong"
        )
