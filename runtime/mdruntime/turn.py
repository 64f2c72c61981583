"""Where each sample stands in its trajectory, and the numbers of a pass that follow from it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mdruntime.guidance import guidance_weights
from mdruntime.head import Controls
from mdruntime.plan import Plan, Round
from mdruntime.sampling import Sampling

__all__ = ["BETA_CAP", "Turn", "planned_turn", "timed_turn"]

BETA_CAP = 100.0
"""Largest exponent of p. 1 + 1/alpha grows without limit as alpha falls to 0; at 100 a token of
half the best one's probability is drawn with probability 1e-30 already."""

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Turn:
    """One round of the active samples; arrays are (active,)."""

    parts: list[Round]  # positions that each pass reveals; empty lists under an entropy bound
    alpha: NDArray[np.float64]  # choice temperature
    exploration: NDArray[np.float64]  # share of exploring positions of the hybrid order
    controls: Controls


def planned_turn(sampling: Sampling, plans: list[Plan], index: int) -> Turn:
    """Return round ``index`` of samples that follow plans."""
    turns = np.array([len(plan) for plan in plans])
    turn = np.full(len(plans), index)
    return _turn(sampling, [plan[index] for plan in plans], turn, turns, turn == turns - 1)


def timed_turn(sampling: Sampling, left: Counts, start: Counts) -> Turn:
    """Return the round of samples whose entropies decide how many positions they reveal.

    The number of rounds is not known then: the share of tokens revealed tells the time, on a
    clock of ``sampling.rounds``.

    Args:
        sampling: the options.
        left: tokens still hidden, (active,).
        start: tokens hidden at the start, (active,).
    """
    turns = np.full(len(left), sampling.rounds)
    turn = np.minimum(((1 - left / start) * turns).astype(np.int64), turns - 1)
    return _turn(sampling, [[] for _ in left], turn, turns, np.zeros(len(left), bool))


def _turn(
    sampling: Sampling,
    parts: list[Round],
    turn: Counts,
    turns: Counts,
    last: NDArray[np.bool_],
) -> Turn:
    annealed = 1 - (turn + 1) / turns if sampling.annealing else np.ones(len(turn))
    alpha = sampling.alpha * annealed
    first, final = sampling.exploration
    guidance = guidance_weights(
        sampling.guidance_schedule,
        sampling.guidance,
        turn,
        turns,
        power=sampling.guidance_power,
        interval=sampling.guidance_interval,
    )
    return Turn(
        parts=parts,
        alpha=alpha,
        exploration=first + (final - first) * turn / np.maximum(turns - 1, 1),
        controls=_controls(sampling, alpha, last, guidance),
    )


def _controls(
    sampling: Sampling,
    alpha: NDArray[np.float64],
    last: NDArray[np.bool_],
    guidance: NDArray[np.float32],
) -> Controls:
    """Return the head's controls.

    Where all that is left is revealed, or alpha is 0, tokens come from plain p as in MaskGIT's
    last round: 1 + 1/alpha is not formed there. Nor do moments matter where all is revealed.
    """
    positive = alpha > 0
    beta = np.where(positive, 1 + 1 / np.where(positive, alpha, 1), BETA_CAP)
    beta = np.where(last, 1, np.minimum(beta, BETA_CAP)).astype(np.float32)
    tempered = positive & ~last & sampling.tempered
    return Controls(
        guidance=guidance,
        temperature=np.full(len(alpha), sampling.temperature, np.float32),
        beta=beta,
        token_beta=np.where(tempered, beta, np.float32(1)),
    )
