"""Where each sample stands in its trajectory, and the numbers of a pass that follow from it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mdruntime.guidance import guidance_weights
from mdruntime.head import Controls
from mdruntime.sampling import Sampling
from mdruntime.schedule import Schedule

__all__ = ["BETA_CAP", "GREEDY", "Clock", "Turn"]

BETA_CAP = 100.0
"""Largest exponent of p. 1 + 1/alpha grows without limit as alpha falls to 0; at 100 a token of
half the best one's probability is drawn with probability 1e-30 already."""

GREEDY = 1e6
"""Exponent of p at which only the likeliest token is drawn, up to the rounding of float32."""

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Turn:
    """One pass of the active samples; arrays are (active,)."""

    alpha: NDArray[np.float64]  # choice temperature
    exploration: NDArray[np.float64]  # share of exploring positions of the hybrid order
    controls: Controls


class Clock:
    """Tells the round of the schedule that each sample is in, from the tokens it still hides.

    Passes that share a full pass (substeps, refresh interval) so keep the numbers of the rounds
    they belong to. Under an entropy bound the number of rounds is not known: there the share of
    revealed tokens tells the time, on a clock of ``sampling.rounds``.
    """

    def __init__(self, sampling: Sampling, start: Counts, schedules: Sequence[Schedule]) -> None:
        """Take the tokens hidden at the start, (batch,), and the schedule of each sample."""
        self._sampling = sampling
        self._start = start
        self._schedules = schedules

    def turn(self, samples: Counts, left: Counts) -> Turn:
        """Return the numbers of a pass.

        Args:
            samples: indices into the batch, (active,).
            left: tokens they still hide, (active,).
        """
        sampling = self._sampling
        if sampling.entropy_bound:
            turns = np.full(len(left), sampling.rounds)
            done = 1 - left / self._start[samples]
            turn = np.minimum((done * turns).astype(np.int64), turns - 1)
            last = np.zeros(len(left), bool)
        else:
            schedules = [self._schedules[sample] for sample in samples]
            turns = np.array([len(schedule) for schedule in schedules])
            pairs = zip(schedules, left, strict=True)
            turn = np.array([(schedule >= hidden).sum() for schedule, hidden in pairs])
            last = turn == turns - 1
        return _turn(sampling, turn, turns, last)


def _turn(sampling: Sampling, turn: Counts, turns: Counts, last: NDArray[np.bool_]) -> Turn:
    part = turn / np.maximum(turns - 1, 1)
    alpha = sampling.alpha * _annealed(sampling.annealing, turn, turns)
    first, final = sampling.exploration
    guidance = guidance_weights(
        sampling.guidance_schedule,
        sampling.guidance,
        turn,
        turns,
        power=sampling.guidance_power,
        interval=sampling.guidance_interval,
    )
    temperature = sampling.temperature * (1 + (sampling.temperature_decay - 1) * part)
    beta, token_beta = _exponents(sampling, alpha, last)
    return Turn(
        alpha=alpha,
        exploration=first + (final - first) * part,
        controls=Controls(
            guidance=guidance,
            temperature=temperature.astype(np.float32),
            beta=beta.astype(np.float32),
            token_beta=token_beta.astype(np.float32),
        ),
    )


def _annealed(annealing: str, turn: Counts, turns: Counts) -> NDArray[np.float64]:
    """Return the share of alpha that holds in each sample's round."""
    if annealing == "none":
        return np.ones(len(turn))
    if annealing == "linear":
        return 1 - (turn + 1) / turns
    return np.where(turns > 1, 1 - turn / np.maximum(turns - 1, 1), 0.0)


def _exponents(
    sampling: Sampling, alpha: NDArray[np.float64], last: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the exponents of moments and of tokens.

    Where all that is left is revealed, or alpha is 0, tokens come from plain p as in MaskGIT's
    last round: 1 + 1/alpha is not formed there. (Under an entropy bound it is not known before the
    pass that all will be revealed; tokens stay tempered then if the order's are.) TiTok's tokens
    have the temperature alpha itself, and are the likeliest ones where alpha is 0.
    """
    positive = alpha > 0
    inverse = 1 / np.where(positive, alpha, 1)
    beta = np.minimum(np.where(positive, 1 + inverse, BETA_CAP), BETA_CAP)
    if sampling.law == "annealed":
        return beta, np.where(positive, np.minimum(inverse, GREEDY), GREEDY)
    tempered = positive & ~last & (sampling.law == "tempered")
    return beta, np.where(tempered, beta, 1.0)
