"""Test vectors: what the PyTorch model answers along whole trajectories.

The sampler is the runtime's own, driven by a session that runs PyTorch in float32 and records
every pass. So the vectors hold just what a device will see: full and partial passes, guided, with
caches that the passes before left behind.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdexport.denoiser import Denoiser, DenoiserGraph
from mdexport.head import OUTPUTS
from mdruntime.denoiser import Denoiser as Runner
from mdruntime.errors import VerificationError
from mdruntime.head import Controls
from mdruntime.manifest import DenoiserSpec
from mdruntime.randomness import Purpose, Randomness
from mdruntime.sampler import Canvas, Pass, unmask
from mdruntime.sampling import Sampling
from mdruntime.session import Feeds, Outputs
from mdruntime.verify import FEEDS

__all__ = ["FORWARD_TOLERANCE", "TorchSession", "record"]

MASK_RATIOS = (1.0, 0.75, 0.5, 0.25, 0.0)
FORWARD_TOLERANCE = 1e-4  # cached pass against the model's own forward, in logits
_COLUMNS = 4  # of every pass whose logits are kept
_SEED = 20250510


class TorchSession:
    """The denoiser graph in PyTorch, float32: satisfies ``mdruntime.Session``."""

    provider = "torch"

    def __init__(self, denoiser: Denoiser, spec: DenoiserSpec) -> None:
        """Take a denoiser in float32."""
        self._graph = DenoiserGraph(denoiser).eval()
        self._spec = spec
        self._caches: list[Tensor] = []
        self.passes: list[dict[str, NDArray[Any]]] = []

    @torch.no_grad()
    def run(self, feeds: Feeds, fetch: Sequence[str]) -> Outputs:
        """Run a pass and record it."""
        spec, rows = self._spec, len(feeds["tokens"])
        if feeds["tokens"].shape[1] == spec.canvas:
            shape = (rows, spec.heads, spec.canvas, spec.head_size)
            self._caches = [torch.zeros(shape) for _ in range(2 * spec.layers)]
        inputs = [torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in FEEDS]
        outputs = self._graph(*inputs, self._caches)
        draws, self._caches = outputs[: len(OUTPUTS)], list(outputs[len(OUTPUTS) : -1])
        found = {name: value.numpy() for name, value in zip(OUTPUTS, draws, strict=True)}
        logits = outputs[-1].numpy()
        columns = np.unique(np.linspace(0, logits.shape[1] - 1, _COLUMNS).astype(np.int64))
        kept = {"columns": columns, "logits": logits[:, columns]}
        self.passes.append({**{name: feeds[name] for name in FEEDS}, **found, **kept})
        return {name: {**found, "logits": logits}[name] for name in fetch}

    def clone(self) -> "TorchSession":
        """Return a session on the same weights."""
        return TorchSession(self._graph.denoiser, self._spec)

    def close(self) -> None:
        """Drop the caches."""
        self._caches = []


def record(
    denoiser: Denoiser, spec: DenoiserSpec
) -> tuple[list[dict[str, NDArray[Any]]], NDArray[np.int32]]:
    """Record a guided trajectory with partial caching, and passes at fixed mask ratios.

    Args:
        denoiser: satisfies ``mdexport.Denoiser``, in float32.
        spec: its canvas.

    Returns:
        The recorded passes, and the trajectory's tokens int32 (batch, length).

    Raises:
        VerificationError: the cached pass is not the model's own forward pass.
    """
    session = TorchSession(denoiser, spec)
    labels = [0, spec.classes - 1] if spec.classes else [-1, -1]
    runner = Runner(session, spec, labels)
    tokens = _trajectory(runner, spec)
    for number, ratio in enumerate(MASK_RATIOS):
        canvas = _hide(tokens, spec, ratio, number)
        for request in _full_and_partial(canvas, spec, number):
            runner(request)
        _check_forward(denoiser, spec, session, canvas, labels)
    return session.passes, tokens


def _trajectory(runner: Runner, spec: DenoiserSpec) -> NDArray[np.int32]:
    sampling = Sampling(
        rounds=min(4, spec.length),
        order="hybrid",
        exploration=(1.0, 0.0),
        substeps=2,
        refresh="recent",
        guidance=1.0 if spec.classes else 0.0,
        guidance_interval=(0.0, 0.5),
    )
    canvas = Canvas(spec.length, spec.grid, spec.mask_token)
    tokens = np.full((2, spec.length), spec.mask_token, np.int32)
    for step in unmask(runner, tokens, canvas, sampling, Randomness(_SEED, range(2))):
        tokens = step.tokens
    return tokens


def _hide(
    tokens: NDArray[np.int32], spec: DenoiserSpec, ratio: float, number: int
) -> NDArray[np.int32]:
    bits = Randomness(_SEED, range(len(tokens))).bits(Purpose.PERMUTATION, number, spec.length)
    rank = bits.argsort(axis=1).argsort(axis=1)
    return np.where(rank < round(ratio * spec.length), np.int32(spec.mask_token), tokens)


def _full_and_partial(canvas: NDArray[np.int32], spec: DenoiserSpec, number: int) -> Iterator[Pass]:
    """Yield a full pass without guidance, then a partial pass over an eighth of the canvas."""
    batch = len(canvas)
    source = Randomness(_SEED + 1 + number, range(batch))
    uniforms = source.uniforms(Purpose.TOKEN, 0, spec.length)
    ones = np.ones(batch, np.float32)
    controls = Controls(0 * ones, ones, 1.25 * ones, 1.25 * ones)
    samples = np.arange(batch)
    yield Pass(samples, None, canvas, controls, uniforms, False)
    bits = source.bits(Purpose.PERMUTATION, 0, spec.length)
    positions = bits.argsort(axis=1)[:, : max(1, spec.length // 8)]
    rows = np.take_along_axis(canvas, positions, axis=1)
    numbers = np.take_along_axis(uniforms, positions, axis=1)
    yield Pass(samples, positions, rows, controls, numbers, False)


@torch.no_grad()
def _check_forward(
    denoiser: Denoiser,
    spec: DenoiserSpec,
    session: TorchSession,
    canvas: NDArray[np.int32],
    labels: list[int],
) -> None:
    """Compare the last full pass with the model's own forward pass, which knows no cache."""
    plain = denoiser(torch.from_numpy(canvas).long(), torch.tensor(labels))
    cached = session.passes[-2]
    columns = cached["columns"]
    inside = (columns >= spec.first) & (columns < spec.first + spec.length)
    expected = plain[:, columns[inside] - spec.first, : spec.codebook].numpy()
    worst = float(np.abs(cached["logits"][:, inside] - expected).max())
    if not worst <= FORWARD_TOLERANCE:
        raise VerificationError(
            f"the denoiser's step() differs from its forward() by {worst:.3g} in the logits "
            f"(at most {FORWARD_TOLERANCE:g}); its K/V cache code is wrong"
        )
