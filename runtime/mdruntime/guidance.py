"""Classifier-free guidance: the weight of every round.

Everywhere w means ``(1 + w) conditional - w unconditional``. Published formulas in this form:
valeoai w itself (constant, or ramped from 0 over the rounds in v1.0); aMUSEd's scale g is
w = g - 1; TiTok's power-cosine scale is ``guidance_weights("power-cosine", ...)``.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["GUIDANCE_SCHEDULES", "guidance_weights", "weight_from_scale"]

GUIDANCE_SCHEDULES = ("constant", "linear", "linear-open", "power-cosine")


def weight_from_scale(scale: float) -> float:
    """Return w for guidance written as ``u + scale * (c - u)`` (aMUSEd and most others)."""
    return scale - 1


def guidance_weights(
    schedule: str,
    weight: float,
    turn: NDArray[np.int64],
    turns: NDArray[np.int64],
    *,
    power: float = 3.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> NDArray[np.float32]:
    """Return the guidance weight of each sample's current round, float32 (batch,).

    Args:
        schedule: ``constant``; ``linear``, from 0 in the first round to ``weight`` in the last
            (valeoai MaskGIT v1.0); ``linear-open``, from 0 in steps of ``weight / turns``, which
            stops one step below it (TiTok L-32, B-64); or ``power-cosine`` (TiTok S-128 with
            scale g = 1 + weight, MaskBit).
        weight: w, the largest weight.
        turn: the round each sample is in, (batch,), from 0.
        turns: the rounds of its trajectory, (batch,).
        power: exponent of ``power-cosine``.
        interval: rounds outside this part of the trajectory (0 first, 1 last) run without
            guidance, and so at half the rows (Kynkäänniemi et al. 2024).
    """
    part = np.where(turns > 1, turn / np.maximum(turns - 1, 1), 1.0)
    share = {
        "constant": np.ones(len(turn)),
        "linear": part,
        "linear-open": turn / turns,
        "power-cosine": (1 - np.cos(np.pi * (turn / turns) ** power)) / 2,
    }[schedule]
    inside = (part >= interval[0]) & (part <= interval[1])
    return np.where(inside, weight * share, 0).astype(np.float32)
