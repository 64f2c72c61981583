"""Which samplers are measured, for all scripts in one place.

Equal samplings share their runs, so the scripts' grids overlap on purpose: ``grid_of`` lists what
they measure together. Every comparison changes one thing: rounds, alpha, order or plan.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mdruntime.manifest import Manifest
from mdruntime.order import HYBRID
from mdruntime.sampling import Sampling
from mdruntime.schedule import ANCESTRAL

__all__ = [
    "FALLING",
    "IMAGES",
    "TEXTS",
    "Scale",
    "cached",
    "grid_of",
    "hybrids",
    "known",
    "label",
    "orders",
    "rounds",
    "scale_of",
    "tuning",
]

Samplings = list[Sampling]

TEMPERED = ("maskgit", "maskgit-exact", "moment", "u-moment", "temperature", HYBRID)
"""Orders that alpha has something to do with."""

FALLING = (1.0, 0.0)
"""The hybrid that explores first and exploits last."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Numbers that suit a kind of model."""

    schedule: str
    alphas: tuple[float, float, float]  # choice temperatures: low, usual, high
    few: int  # rounds
    middle: int
    many: int
    extremes: tuple[int, ...]  # rounds of MaskGIT's curve beyond these
    bounds: tuple[float, ...]  # entropy bounds, in nats
    guidances: tuple[float, ...]  # weights to choose from
    samples: int  # of a seed
    batch: int  # samples that run together

    @property
    def base(self) -> Sampling:
        """What all samplers share."""
        return Sampling(schedule=self.schedule, alpha=self.alphas[1])


IMAGES = Scale(
    schedule="cosine",
    alphas=(1.5, 4.5, 12.0),
    few=4,
    middle=8,
    many=16,
    extremes=(1, 2, 32),
    bounds=(4.0, 8.0),
    guidances=(0.0, 1.0),
    samples=620,
    batch=62,
)
TEXTS = Scale(
    schedule="linear",
    alphas=(1.0, 2.0, 4.5),
    few=8,
    middle=16,
    many=32,
    extremes=(4, 64),
    bounds=(8.0, 16.0),
    guidances=(0.0,),
    samples=64,
    batch=16,
)


def scale_of(manifest: Manifest) -> Scale:
    """Return the numbers that suit a model."""
    return TEXTS if manifest.image is None else IMAGES


def tuning(scale: Scale) -> Samplings:
    """Return MaskGIT under each guidance: the baseline decides which one all samplers get.

    Guidance doubles the rows of a pass, so that it has half of the rounds.
    """
    if len(scale.guidances) == 1:
        return []
    base = scale.base.but(order="maskgit", rounds=scale.middle)
    return [
        base.but(guidance=guidance, rounds=scale.middle // 2 if guidance else scale.middle)
        for guidance in scale.guidances
    ]


def rounds(scale: Scale, base: Sampling) -> Samplings:
    """Return MaskGIT against rounds and alpha, and what should behave like it."""
    low, usual, high = scale.alphas
    few, middle, many = scale.few, scale.middle, scale.many
    grid = {
        ("maskgit", usual): sorted((few, middle, many, *scale.extremes)),
        ("maskgit", low): [few, middle, many],
        ("maskgit", high): [middle, many],
        ("moment", usual): [few // 2, few, middle, many],
        ("moment", low): [middle],
        ("moment", high): [middle],
        ("temperature", usual): [middle, many],
        ("temperature", low): [middle],
        ("vanilla", usual): [middle, many],
    }
    return [
        base.but(order=order, alpha=alpha, rounds=turns)
        for (order, alpha), all_turns in grid.items()
        for turns in all_turns
    ]


def orders(scale: Scale, base: Sampling) -> Samplings:
    """Return the orders against rounds."""
    few, middle, many = scale.few, scale.middle, scale.many
    grid = {
        **dict.fromkeys(("maskgit", "moment", "halton"), (few, middle, many)),
        **dict.fromkeys(("temperature", "vanilla"), (middle, many)),
        **dict.fromkeys(("u-moment", "maskgit-exact"), (middle,)),
        **dict.fromkeys(("top-probability", "margin", "entropy"), (middle,)),
    }
    plain = [base.but(order=order, rounds=n) for order, turns in grid.items() for n in turns]
    bounded = [base.but(order="entropy", entropy_bound=bound) for bound in scale.bounds]
    mixed = [base.but(order=HYBRID, exploration=FALLING, rounds=turns) for turns in (few, middle)]
    return plain + mixed + bounded + _ancestral(scale, base)


def _ancestral(scale: Scale, base: Sampling) -> Samplings:
    """Return the samplers that text models are published with."""
    if scale.schedule != "linear":
        return []
    vanilla = base.but(order="vanilla", schedule=ANCESTRAL)
    return [vanilla.but(rounds=turns) for turns in (scale.middle, scale.many)]


def cached(scale: Scale, base: Sampling) -> Samplings:
    """Return the moment sampler under partial caching, by parts of a round."""
    few, moment = scale.few, base.but(order="moment")
    plans = [(few, 2), (scale.middle, 2), (few, 4), (few // 2, 8)]
    chosen = [moment.but(rounds=turns, substeps=parts) for turns, parts in plans]
    # With two parts both rules recompute the same rows.
    recent = [plan.but(refresh="recent") for plan in chosen if plan.substeps > 2]
    return chosen + recent


def known(scale: Scale, base: Sampling) -> Samplings:
    """Return orders that are known beforehand, by rounds that share a full pass."""
    spread = base.but(order="halton", rounds=scale.many, refresh="recent")
    plans = [spread.but(refresh_interval=shared) for shared in (2, 4, 8)]
    plans += [plan.but(tokens="tempered") for plan in plans]
    plans += [plan.but(rounds=max(scale.extremes)) for plan in plans[-2:]]
    ancestral = [plan.but(refresh="recent") for plan in _ancestral(scale, base)[-1:]]
    return plans + [plan.but(refresh_interval=shared) for plan in ancestral for shared in (2, 4)]


def hybrids(scale: Scale, base: Sampling) -> Samplings:
    """Return the hybrid order by share of exploration, rounds and parts of a round."""
    shares = [(0.25, 0.25), (0.5, 0.5), (0.75, 0.75), (1.0, 1.0), FALLING, (0.75, 0.25)]
    mixed = base.but(order=HYBRID)
    few = [mixed.but(rounds=scale.few, exploration=share) for share in shares]
    many = [mixed.but(rounds=scale.middle, exploration=share) for share in shares[3:5]]
    parts = [mixed.but(rounds=scale.few, exploration=share, substeps=2) for share in shares[3:5]]
    return [*few, *many, *parts]


_GRIDS: tuple[Callable[[Scale, Sampling], Samplings], ...] = (
    rounds,
    orders,
    cached,
    known,
    hybrids,
)


def grid_of(scale: Scale, base: Sampling) -> Samplings:
    """Return all distinct samplings of all scripts."""
    return list(dict.fromkeys(plan for grid in _GRIDS for plan in grid(scale, base)))


def label(sampling: Sampling) -> str:
    """Return a short name: order, alpha a, rounds r, parts c, interval f, guidance w."""
    return " ".join(_parts(sampling))


def _parts(sampling: Sampling) -> Iterable[str]:
    yield sampling.order
    if sampling.order == HYBRID:
        first, last = sampling.exploration
        yield f"{first:g}" if first == last else f"{first:g}:{last:g}"
    if sampling.order in TEMPERED or sampling.tokens == "tempered":
        yield f"a{sampling.alpha:g}"
    bound = sampling.entropy_bound
    yield f"bound {bound:g}" if bound else f"r{sampling.rounds}"
    if sampling.tokens != "order":
        yield sampling.tokens
    yield from _plan(sampling)
    if sampling.schedule == ANCESTRAL:
        yield ANCESTRAL
    if sampling.guidance:
        yield f"w{sampling.guidance:g}"


def _plan(sampling: Sampling) -> Iterable[str]:
    parts, shared = sampling.substeps, sampling.refresh_interval
    yield from (f"{letter}{n}" for letter, n in (("c", parts), ("f", shared)) if n > 1)
    if parts > 2 or shared > 1:
        yield sampling.refresh
