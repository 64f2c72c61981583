"""Choosing the positions of a round, before any of their tokens exist."""

import numpy as np
from numpy.typing import NDArray

from mdruntime.order import HYBRID, View, find_order, hybrid, ranking
from mdruntime.plan import Round, split
from mdruntime.sampling import Sampling
from mdruntime.turn import Turn

__all__ = ["Positions", "bounded_count", "choose"]

Positions = NDArray[np.int64]


def choose(
    sampling: Sampling, plans: list[Round], turn: Turn, view: View, hidden: NDArray[np.bool_]
) -> list[list[Positions]]:
    """Return, per active sample, the positions that each pass of the round reveals.

    Args:
        sampling: the options.
        plans: how many positions each pass reveals; ignored under an entropy bound.
        turn: the round's numbers.
        view: what the full pass returned.
        hidden: bool (active, length).
    """
    rankings = [ranking(find_order(name).score(view), hidden) for name in sampling.parents]
    chosen = []
    for sample, parts in enumerate(plans):
        ranked = [candidates[sample] for candidates in rankings]
        # Under an entropy bound the count is not known yet: rank all that is left.
        count = len(ranked[0]) if sampling.entropy_bound else sum(parts)
        positions = ranked[0]
        if sampling.order == HYBRID:
            explored = int(turn.exploration[sample] * count + 0.5)
            positions = hybrid(ranked[1], ranked[0], count, explored)
        if sampling.entropy_bound:
            entropies = view.draws.entropy[sample, positions]
            parts = split(bounded_count(entropies, sampling.entropy_bound), sampling.substeps)
        chosen.append(np.split(positions[: sum(parts)], np.cumsum(parts)[:-1]))
    return chosen


def bounded_count(entropies: NDArray[np.float32], bound: float) -> int:
    """Return how many positions may be revealed together (EB-Sampler, Ben-Hamu et al. 2025).

    The largest k with ``sum_{l<=k} H_l - max_{l<=k} H_l <= bound``, at least one.

    Args:
        entropies: H in nats, (hidden,), in the order in which positions would be revealed.
        bound: gamma, in nats.
    """
    wide = entropies.astype(np.float64)
    error = np.cumsum(wide) - np.maximum.accumulate(wide)
    return max(1, int(np.searchsorted(error, bound, side="right")))
