"""A sampler under a magnifying glass: the conditionals that each of its passes saw."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mdruntime import Canvas, Sampling, open_bundle, unmask
from mdruntime.conditions import Conditions
from mdruntime.denoiser import Denoiser, conditioner
from mdruntime.randomness import Randomness
from mdruntime.sampler import Pass, Result, Step, Tokens
from mdruntime.session import open_session

__all__ = ["Seen", "trajectory"]

LogP = NDArray[np.float64]  # (active, k, codebook), log-probabilities


@dataclass(frozen=True, slots=True)
class Seen:
    """A pass: what it was asked, and what the denoiser made of it."""

    step: Step  # the state after it
    request: Pass
    log_p: LogP  # conditionals at the positions ``request.wanted``, guidance included
    true_log_p: LogP  # the same by a full pass over the same canvas: nothing in it is stale


@dataclass
class _Recorder:
    """A denoiser that keeps the logits of its last pass, and the canvas that this pass saw."""

    denoiser: Denoiser
    canvas: Tokens
    passes: list[tuple[Pass, Result]] = field(default_factory=list)

    def __call__(self, request: Pass) -> Result:
        if request.positions is None:
            self.canvas[request.samples] = request.tokens
        else:
            self.canvas[request.samples[:, None], request.positions] = request.tokens
        asked = replace(request, logits=True)
        result = self.denoiser(asked)
        self.passes = [(asked, result)]
        return result


def trajectory(
    folder: Path, sampling: Sampling, samples: int, *, seed: int = 0, threads: int = 0
) -> Iterator[Seen]:
    """Run a sampler on a batch and yield what every pass saw.

    Args:
        folder: bundle of a model of classes or of texts.
        sampling: the options.
        samples: of the batch; sample i has class i modulo the number of classes.
        seed: of the samples.
        threads: of the CPU; 0 takes all.
    """
    bundle = open_bundle(folder)
    spec, graphs = bundle.manifest.denoiser, bundle.manifest.graphs
    labels = np.arange(samples) % spec.classes if spec.classes else np.full(samples, -1)
    condition = None
    if "condition" in graphs:
        condition = conditioner(open_session(bundle, "condition", "cpu"), graphs["condition"])
    session = open_session(bundle, "denoiser", "cpu", threads=threads)
    fresh, recorder = (
        Denoiser(own, spec, Conditions(labels), condition=condition)
        for own in (session.clone(), session)
    )
    tokens = np.full((samples, spec.length), spec.mask_token, np.int32)
    record = _Recorder(recorder, tokens.copy())
    canvas = Canvas(spec.length, spec.grid, spec.mask_token)
    for step in unmask(record, tokens, canvas, sampling, Randomness(seed, range(samples))):
        ((request, result),) = record.passes
        truth = result
        if request.positions is not None:
            whole = record.canvas[request.samples]
            truth = fresh(replace(request, positions=None, tokens=whole))
        yield Seen(step, request, _log_p(request, result), _log_p(request, truth))


def _log_p(request: Pass, result: Result) -> LogP:
    assert result.logits is not None  # the recorder asks for them
    scaled = result.logits.astype(np.float64) / request.controls.temperature[:, None, None]
    shifted = scaled - scaled.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
