"""One round of MaskGIT and of the moment sampler, as races of exponential clocks.

A position is revealed if its clock is among the first to ring. MaskGIT's clocks have the rates
p_i(x_i)^(1/alpha) of tokens that were drawn before; the moment sampler's have the moments m_i,
and tokens are drawn afterwards (Hayakawa et al. 2025, section 3). Given the positions that are
revealed and their tokens, the probability of a round is one integral over time under either law.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Estimate", "Race", "bound", "variation"]

Float64 = NDArray[np.float64]
Positions = NDArray[np.int64]  # (outcomes, k)
Tokens = NDArray[np.int64]  # (outcomes, k)

STEP = 0.125  # of the logarithm of time; the trapezoidal rule is exact to 1e-8 there
EARLY = 1e-10  # chance that any clock has rung at the first time of the grid
RARE = 1e-6  # tokens below this probability decide nothing at the last time of the grid
CHUNK = 250  # outcomes that are integrated at once


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    error: float


class Race:
    """Both laws of a round over independent conditionals."""

    def __init__(self, p: Float64, alpha: float) -> None:
        """Prepare the integrals.

        Args:
            p: conditionals of the hidden positions, (hidden, codebook), none of them zero.
            alpha: choice temperature, above 0.
        """
        self._log_p = np.log(p)
        self._inverse = 1 / alpha
        powers = (1 + self._inverse) * self._log_p
        largest = powers.max(axis=1, keepdims=True)
        self.log_moments = (largest + np.log(np.exp(powers - largest).sum(1, keepdims=True)))[:, 0]
        self._tokens = np.exp(powers - self.log_moments[:, None])
        moments = np.exp(self.log_moments)
        first = np.log(EARLY / moments.sum())
        last = np.log(60) - self._inverse * np.log(RARE)
        self._time = np.exp(np.arange(first, last, STEP))
        self._quiet_moment = -moments[:, None] * self._time
        self._quiet_maskgit = np.log(np.stack(list(map(self._waiting, p))) + 1e-300)

    def _waiting(self, p: Float64) -> Float64:
        """Return the chance that the clock of one position has not rung, (times,)."""
        return np.asarray(p @ np.exp(-(p**self._inverse)[:, None] * self._time))

    def draw(self, count: int, outcomes: int, rng: np.random.Generator) -> tuple[Positions, Tokens]:
        """Draw rounds of the moment sampler.

        Args:
            count: positions that a round reveals.
            outcomes: how many rounds.
            rng: the source of randomness.

        Returns:
            Positions and their tokens, int64 (outcomes, count) each.
        """
        hidden, codebook = self._log_p.shape
        scores = self.log_moments + rng.gumbel(size=(outcomes, hidden))
        positions = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        cumulated = np.cumsum(self._tokens, axis=1)[positions]
        uniforms = rng.random((outcomes, count, 1)) * cumulated[..., -1:]
        tokens = np.minimum((cumulated <= uniforms).sum(axis=2), codebook - 1)
        return positions, tokens

    def log_moment(self, positions: Positions, tokens: Tokens) -> Float64:
        """Return the log-probability of rounds under the moment sampler, (outcomes,)."""
        rates = np.exp(self.log_moments)[positions]
        drawn = np.log(self._tokens[positions, tokens]).sum(axis=1)
        return self._race(rates, positions, self._quiet_moment) + drawn

    def log_maskgit(self, positions: Positions, tokens: Tokens) -> Float64:
        """Return the log-probability of rounds under MaskGIT, (outcomes,)."""
        log_p = self._log_p[positions, tokens]
        rates = np.exp(self._inverse * log_p)
        return self._race(rates, positions, self._quiet_maskgit) + log_p.sum(axis=1)

    def _race(self, rates: Float64, positions: Positions, quiet: Float64) -> Float64:
        """Return the log-probability that the clocks of ``positions`` ring before all others.

        Args:
            rates: of these clocks, (outcomes, k).
            positions: (outcomes, k).
            quiet: log-probability that a clock has not rung, (hidden, times).
        """
        everyone = quiet.sum(axis=0)
        chunks = range(0, len(rates), CHUNK)
        parts = [slice(start, start + CHUNK) for start in chunks]
        return np.concatenate(
            [self._integral(rates[p], everyone - quiet[positions[p]].sum(axis=1)) for p in parts]
        )

    def _integral(self, rates: Float64, log_rest: Float64) -> Float64:
        waits = np.minimum(rates[..., None] * self._time, 600)
        log_rung = np.log(-np.expm1(-waits)).sum(axis=1)
        hazard = (rates[..., None] / np.expm1(waits)).sum(axis=1)
        log_density = log_rung + log_rest + np.log(hazard * self._time)
        largest = log_density.max(axis=1, keepdims=True)
        area = np.exp(log_density - largest).sum(axis=1) * STEP
        return np.asarray(largest[:, 0] + np.log(area))


def variation(
    p: Float64, alpha: float, count: int, outcomes: int, rng: np.random.Generator
) -> Estimate:
    """Estimate the total variation between the laws of a round of MaskGIT and of moment.

    It is the mean over the moment sampler's rounds of how far MaskGIT's probability falls short
    of their own, as a share.

    Args:
        p: conditionals, (hidden, codebook).
        alpha: choice temperature, above 0.
        count: positions that the round reveals, fewer than ``hidden``.
        outcomes: rounds that are drawn.
        rng: the source of randomness.
    """
    race = Race(p, alpha)
    drawn = race.draw(count, outcomes, rng)
    short = np.maximum(-np.expm1(race.log_maskgit(*drawn) - race.log_moment(*drawn)), 0)
    return Estimate(float(short.mean()), float(short.std(ddof=1) / np.sqrt(outcomes)))


def bound(hidden: int, count: int, alpha: float, codebook: int) -> float:
    """Return the bound k(k + 1) S^(1/alpha) / (2 (n - k)) on the total variation of a round.

    It is larger than 1, and says nothing, where many of the hidden positions are revealed.
    """
    return float(count * (count + 1) * codebook ** (1 / alpha) / (2 * (hidden - count)))
