"""Orders: which hidden positions are revealed first.

An order scores every position of the canvas from what a pass returned; the positions of largest
score come first. *Exploitation* orders rank by what the denoiser is sure of, *exploration* orders
spread over the canvas, and the *hybrid* (Hayakawa et al. 2025, section 4.2) takes its first
positions from one of the latter and the others from one of the former.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mdruntime.errors import SamplingError
from mdruntime.halton import halton_grid, halton_line
from mdruntime.head import Draws
from mdruntime.randomness import Purpose, Randomness

__all__ = ["HYBRID", "ORDERS", "Order", "View", "find_order", "hybrid", "ranking"]

Scores = NDArray[np.floating]  # (batch, length); the largest is revealed first
HYBRID = "hybrid"


@dataclass(frozen=True, slots=True)
class View:
    """What an order may look at. Arrays are (batch, length) unless said otherwise."""

    draws: Draws
    gumbels: NDArray[np.float64]  # Gumbel(0, 1) noise of this round
    alpha: NDArray[np.float64]  # (batch,), the choice temperature of this round
    grid: tuple[int, ...]  # (height, width) of the canvas, or (length,)
    randomness: Randomness


@dataclass(frozen=True, slots=True)
class Order:
    """A way to rank positions, and the law of the tokens that belongs to it."""

    summary: str
    score: Callable[[View], Scores]
    law: str = "plain"  # of the tokens: from p, "tempered" p^beta, or "annealed" p^(1/alpha)
    known: bool = False  # the ranking does not depend on the denoiser
    draws_first: bool = False  # tokens are drawn before positions are chosen: no partial caching


def moment(view: View) -> Scores:
    """Gumbel-top-k on the moments (Hayakawa et al. 2025, the moment sampler); noise scale 1."""
    return view.draws.log_moment + view.gumbels


def maskgit(view: View) -> Scores:
    """Confidence of the drawn token plus ``alpha`` times Gumbel noise (Chang et al. 2022)."""
    return view.draws.log_prob + view.alpha[:, None] * view.gumbels


def titok(view: View) -> Scores:
    """Logit of the drawn token plus ``alpha`` times Gumbel noise (Yu et al. 2024, TiTok).

    Unlike MaskGIT's confidence a logit is not normalised: positions compete by their scale too.
    """
    logits = view.draws.log_prob + view.draws.log_normaliser
    return logits + view.alpha[:, None] * view.gumbels


def top_probability(view: View) -> Scores:
    """Largest probability of any token."""
    return view.draws.top


def margin(view: View) -> Scores:
    """Difference between the two largest probabilities (Kim et al. 2025)."""
    return view.draws.margin


def entropy(view: View) -> Scores:
    """Lowest entropy first."""
    return -view.draws.entropy


def halton(view: View) -> Scores:
    """Halton order of the grid, rolled by a random offset per sample (Besnier et al. 2025)."""
    if len(view.grid) == 1:
        return halton_1d(view)
    height, width = view.grid
    return _rolled(halton_grid(height, width), view.randomness)


def halton_1d(view: View) -> Scores:
    """Base-2 van der Corput order of the positions read as a line, rolled per sample."""
    return _rolled(halton_line(int(np.prod(view.grid))), view.randomness)


def _rolled(order: NDArray[np.int64], randomness: Randomness) -> Scores:
    length = len(order)
    offsets = randomness.bits(Purpose.PERMUTATION, 0, 1)[:, 0] % np.uint64(length)
    rank = np.empty(length, np.int64)
    rank[order] = np.arange(length)
    return -((rank[None] - offsets.astype(np.int64)[:, None]) % length).astype(np.float64)


def random(view: View) -> Scores:
    """Draw a uniformly random permutation per sample, before the first pass."""
    length = int(np.prod(view.grid))
    return view.randomness.bits(Purpose.PERMUTATION, 1, length).astype(np.float64)


ORDERS = {
    "moment": Order("moment sampler: like MaskGIT, but positions first", moment, law="tempered"),
    "u-moment": Order("positions of the moment sampler, unbiased tokens", moment),
    "maskgit": Order("sample-then-choose, the original", maskgit, draws_first=True),
    "maskgit-exact": Order("MaskGIT's law, positions first", maskgit),
    "titok": Order("TiTok's: logits for confidence", titok, law="annealed", draws_first=True),
    "temperature": Order("random positions, tempered tokens", random, law="tempered", known=True),
    "vanilla": Order("random positions, plain tokens", random, known=True),
    "random": Order("another name of vanilla", random, known=True),
    "top-probability": Order("largest probability first", top_probability),
    "margin": Order("largest gap between the two best tokens first", margin),
    "entropy": Order("lowest entropy first", entropy),
    "halton": Order("spread over the image", halton, known=True),
    "halton-1d": Order("spread over a line", halton_1d, known=True),
}


def find_order(name: str) -> Order:
    """Return an order by name.

    Raises:
        SamplingError: there is none of this name.
    """
    if name not in ORDERS:
        raise SamplingError(f"order must be one of {', '.join(ORDERS)}, got {name!r}")
    return ORDERS[name]


def ranking(scores: Scores, hidden: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """Return, for every sample, its hidden positions from first to last.

    Args:
        scores: (batch, length).
        hidden: bool (batch, length).
    """
    order = np.argsort(-scores, axis=-1, kind="stable")
    return [row[mask[row]] for row, mask in zip(order, hidden, strict=True)]


def hybrid(
    exploration: NDArray[np.int64], exploitation: NDArray[np.int64], count: int, explored: int
) -> NDArray[np.int64]:
    """Return ``count`` positions: the first ``explored`` of one ranking, then of the other.

    The exploring positions come first, hence are revealed first under partial caching.

    Args:
        exploration: a ranking, int64 (hidden,).
        exploitation: another ranking of the same positions.
        count: how many positions in all.
        explored: how many of them come from ``exploration``.
    """
    first = exploration[:explored]
    rest = exploitation[~np.isin(exploitation, first)]
    return np.concatenate([first, rest])[:count]
