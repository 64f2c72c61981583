"""Unmasking schedules: how many tokens are still hidden after each round.

A schedule is an int64 array (rounds,), strictly falling to 0. Two rules of rounding are in use:
a *mask ratio* applied to the number of hidden tokens (Chang et al. 2022, section 3.3), and
valeoai's, which normalises the number of *revealed* tokens; the names of the latter begin with
``v1-``.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mdruntime.errors import SamplingError
from mdruntime.randomness import Purpose, Randomness

__all__ = ["ANCESTRAL", "SCHEDULES", "Schedule", "draw_schedules", "hidden_counts"]

Schedule = NDArray[np.int64]  # (rounds,); tokens still hidden after each round
_Curve = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def _arccos(ratio: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.arccos(ratio) / (np.pi / 2)


# Share of the tokens that is still masked when a share of the rounds is over.
_MASK_RATIO: dict[str, _Curve] = {
    "cosine": lambda done: np.cos(done * np.pi / 2),
    "arccos": _arccos,
    "linear": lambda done: 1 - done,
    "square": lambda done: 1 - done**2,
    "root": lambda done: 1 - np.sqrt(done),
}

# valeoai's weights of a round, as functions of the share of the rounds that is left.
_REVEAL_WEIGHT: dict[str, _Curve] = {
    "v1-cosine": lambda left: np.cos(left * np.pi / 2),
    "v1-arccos": _arccos,
    "v1-linear": lambda left: 1 - left,
    "v1-square": lambda left: 1 - left**2,
    "v1-root": lambda left: 1 - np.sqrt(left),
}

ANCESTRAL = "ancestral"
"""Not a fixed array: every token draws its round, all of them equally likely (Sahoo et al. 2024,
arXiv 2406.07524: from time t to s a hidden token is revealed with probability (t - s) / t)."""

SCHEDULES = (*_MASK_RATIO, "halton", *_REVEAL_WEIGHT, ANCESTRAL)


def draw_schedules(
    name: str, rounds: int, hidden: Schedule, randomness: Randomness
) -> list[Schedule]:
    """Return the schedule of every sample of a batch.

    Args:
        name: one of ``SCHEDULES``.
        rounds: as in ``hidden_counts``. Ancestral rounds that reveal nothing are left out: the
            canvas, and with it the denoiser's answer, would be the same.
        hidden: masked tokens of each sample at the start, (batch,).
        randomness: of the samples; used by ``ANCESTRAL`` alone.
    """
    if name != ANCESTRAL:
        return [hidden_counts(name, rounds, count) for count in hidden.tolist()]
    uniforms = randomness.uniforms(Purpose.SCHEDULE, 0, max(1, int(hidden.max(initial=0))))
    turns = np.minimum((uniforms.astype(np.float64) * rounds).astype(np.int64), rounds - 1)
    schedules = []
    for row, count in zip(turns, hidden.tolist(), strict=True):
        revealed = np.bincount(row[:count], minlength=rounds)
        schedules.append(count - np.cumsum(revealed[revealed > 0]))
    return schedules


def hidden_counts(name: str, rounds: int, hidden: int) -> Schedule:
    """Return the schedule ``name`` for a canvas with ``hidden`` masked tokens.

    Args:
        name: one of ``SCHEDULES``.
        rounds: how many rounds are wished for; fewer hidden tokens than that shorten it, since
            every round reveals at least one.
        hidden: masked tokens at the start; known tokens (inpainting) do not count.

    Raises:
        SamplingError: an unknown name, or fewer than one round.
    """
    if name not in SCHEDULES:
        raise SamplingError(f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}")
    if name == ANCESTRAL:
        raise SamplingError("an ancestral schedule is drawn, sample by sample: use draw_schedules")
    if rounds < 1:
        raise SamplingError(f"rounds must be at least 1, got {rounds}")
    rounds = min(rounds, hidden)
    if rounds == 0:
        return np.zeros(0, np.int64)
    if name in _REVEAL_WEIGHT:
        return hidden - np.cumsum(_normalised(_REVEAL_WEIGHT[name], rounds, hidden))
    if name == "halton":
        return _strictly_falling(hidden - _halton_revealed(rounds, hidden), hidden)
    done = np.arange(1, rounds + 1) / rounds
    return _strictly_falling(np.floor(hidden * _MASK_RATIO[name](done)).astype(np.int64), hidden)


def _strictly_falling(wished: Schedule, hidden: int) -> Schedule:
    """Let every round reveal at least one token, and the last one all that are left."""
    rounds = len(wished)
    result = np.empty(rounds, np.int64)
    before = hidden
    for index, wish in enumerate(wished):
        rounds_left = rounds - 1 - index
        before = result[index] = min(max(int(wish), rounds_left), before - 1)
    result[-1] = 0
    return result


def _normalised(weight: _Curve, rounds: int, hidden: int) -> Schedule:
    """Return valeoai's reveal counts (MaskGIT v1.0, ``adap_sche``).

    Counts that rounding makes zero become one. Unlike the original, which lets the last round
    pay for that even below one, rounds before it are shortened then.
    """
    if rounds == 1:
        return np.array([hidden])
    weights = weight(np.linspace(1, 0, rounds))
    counts = np.maximum(np.round(weights / weights.sum() * hidden).astype(np.int64), 1)
    counts[-1] += hidden - counts.sum()
    while counts[-1] < 1:
        longest = int(np.argmax(counts[:-1]))
        counts[longest] -= 1
        counts[-1] += 1
    return counts


def _halton_revealed(rounds: int, hidden: int) -> Schedule:
    """Return tokens revealed after each round (Besnier et al. 2025, the Halton sampler).

    In float32, as the original computes it: the floor of a float64 differs in places.
    """
    done = np.arange(1, rounds + 1, dtype=np.float32) / np.float32(rounds)
    share = np.float32(1) - np.arccos(done) / np.float32(np.pi / 2)
    return np.maximum((share * np.float32(hidden)).astype(np.int64), np.arange(1, rounds + 1))
