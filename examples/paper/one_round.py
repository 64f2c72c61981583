"""Is a round of the moment sampler a round of MaskGIT?

Command   python examples/paper/one_round.py
Time      a minute on a CPU core, and about as long for each model
Result    results/one_round.md

Hayakawa et al. 2025, section 3: as long as few of many hidden positions are revealed, the moment
sampler, which chooses positions before their tokens, has the law of MaskGIT. Here the total
variation between the laws of one round (positions and tokens) is computed on random conditionals,
then on those that a model sees along its way. Probabilities of rounds are integrals, exact up to
rounding; the mean over rounds is estimated from rounds of the moment sampler.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chart import Curve, chart
from lab import Lab, Script, main
from mdruntime import Sampling
from page import Section, Verdict, table
from probe import Seen, trajectory
from race import Estimate, bound, variation

CONCENTRATION = 0.1  # of the Dirichlet law of random conditionals: few tokens are likely
TINY = 1e-12  # smallest probability of a token
USUAL = {"hidden": 256, "count": 16, "alpha": 4.5, "codebook": 64}
SWEEPS: dict[str, tuple[float, ...]] = {
    "hidden": (32, 64, 128, 256, 512, 1024),
    "count": (1, 2, 4, 8, 16, 32),
    "alpha": (0.5, 1, 2, 4.5, 9, 18),
    "codebook": (4, 16, 64, 256, 1024),
}
SIGNS = {"hidden": "n", "count": "k", "alpha": "alpha", "codebook": "S"}
OTHERS = ({"count": 1}, {"count": 4}, {"alpha": 1.0})  # for more curves against n
CLOSE = 0.05  # a total variation that few samples would show
SLOPE = 0.15  # by which an exponent may miss what the theory says


@dataclass(frozen=True, slots=True)
class Point:
    """A kind of round, and the total variation between the two laws, over random conditionals."""

    hidden: int
    count: int
    alpha: float
    codebook: int
    found: Estimate

    @property
    def limit(self) -> float:
        """The bound on it."""
        return bound(self.hidden, self.count, self.alpha, self.codebook)


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is computed."""

    tables: int  # of random conditionals per point
    outcomes: int  # rounds per table
    sweeps: dict[str, tuple[float, ...]]


FULL = Effort(3, 2000, SWEEPS)
SHORT = Effort(2, 200, {name: values[:3] for name, values in SWEEPS.items()})


def random_conditionals(
    hidden: int, codebook: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return random conditionals float64 (hidden, codebook)."""
    p = rng.dirichlet(np.full(codebook, CONCENTRATION), size=hidden) + TINY
    return np.asarray(p / p.sum(axis=1, keepdims=True))


def point(effort: Effort, **changes: float) -> Point:
    """Measure one kind of round; the same kind gives the same numbers."""
    kind = {**USUAL, **changes}
    hidden, count, codebook = (int(kind[name]) for name in ("hidden", "count", "codebook"))
    rng = np.random.default_rng([hidden, count, codebook, int(1000 * kind["alpha"])])
    found = [
        variation(
            random_conditionals(hidden, codebook, rng), kind["alpha"], count, effort.outcomes, rng
        )
        for _ in range(effort.tables)
    ]
    return Point(hidden, count, kind["alpha"], codebook, mean(found))


def mean(found: Sequence[Estimate]) -> Estimate:
    """Return the mean of independent estimates; its error has their spread in it, too."""
    values = np.array([estimate.value for estimate in found])
    inner = np.array([estimate.error for estimate in found])
    outer = float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0
    return Estimate(
        float(values.mean()), float(np.sqrt(max(outer, (inner**2).sum() / len(values) ** 2)))
    )


def slope(name: str, points: Sequence[Point]) -> float:
    """Return the exponent of a power law fitted to total variations against one number."""
    x = [float(getattr(each, name)) for each in points]
    return float(np.polyfit(np.log(x), np.log([each.found.value for each in points]), 1)[0])


def within(points: Sequence[Point]) -> Verdict:
    """Judge whether the bound holds wherever it says something."""
    telling = [each for each in points if each.limit < 1]
    kept = [each.found.value - 3 * each.found.error <= each.limit for each in telling]
    largest = max((each.found.value / each.limit for each in telling), default=0.0)
    return Verdict(
        "the total variation of a round is at most k(k+1) S^(1/alpha) / (2(n-k))",
        sum(kept),
        len(kept) - sum(kept),
        note=f"Only kinds of rounds whose bound is below 1 count; the largest share of it that is "
        f"reached is {largest:.2f}. The bound of {len(points) - len(telling)} others says nothing.",
    )


def equivalence(curves: dict[str, list[Point]]) -> Verdict:
    """Judge whether the difference vanishes like 1/n."""
    slopes = {name: slope("hidden", points) for name, points in curves.items()}
    held = [abs(value + 1) <= SLOPE for value in slopes.values()]
    listed = ", ".join(f"{value:.2f} ({name})" for name, value in slopes.items())
    return Verdict(
        f"it vanishes like 1/n when k stays (exponent within {SLOPE} of -1)",
        sum(held),
        len(held) - sum(held),
        note=f"Exponents: {listed}.",
    )


def growth(points: Sequence[Point]) -> Verdict:
    """Judge whether the difference grows with k no faster than the bound."""
    value = slope("count", points)
    return Verdict(
        "it grows with k no faster than k^2",
        int(value <= 2),
        int(value > 2),
        note=f"Exponent: {value:.2f}. Leading order says 1.5.",
    )


def general(lab: Lab) -> Section:
    """Measure random conditionals."""
    effort = SHORT if lab.short else FULL
    sweeps = {
        name: [point(effort, **{name: value}) for value in values]
        for name, values in effort.sweeps.items()
    }
    curves = {_named(USUAL): sweeps["hidden"]}
    for other in OTHERS:
        values = effort.sweeps["hidden"]
        curves[_named({**USUAL, **other})] = [point(effort, hidden=n, **other) for n in values]
    _draw(lab, curves)
    extra = [each for points in list(curves.values())[1:] for each in points]
    every = [each for points in sweeps.values() for each in points] + extra
    rest = ", ".join(f"{SIGNS[name]} = {value:g}" for name, value in USUAL.items())
    body = [
        f"Conditionals are Dirichlet of concentration {CONCENTRATION}; what a table does not vary "
        f"is {rest}. TV is the mean over {effort.tables} tables of conditionals with "
        f"{effort.outcomes} rounds each, ± one standard error.",
        "![total variation against hidden positions](one_round.svg)",
        *(_table(name, points) for name, points in sweeps.items()),
        "The other curves against n:",
        _points(extra),
    ]
    verdicts = (within(every), equivalence(curves), growth(sweeps["count"]))
    return Section("Random conditionals", verdicts, "\n\n".join(body))


def _named(kind: dict[str, float]) -> str:
    return f"k = {kind['count']:g}, alpha = {kind['alpha']:g}"


def _draw(lab: Lab, curves: dict[str, list[Point]]) -> None:
    drawn = []
    for name, points in curves.items():
        y = [each.found.value for each in points]
        error = [1.96 * each.found.error for each in points]
        low = [max(value - half, value / 2) for value, half in zip(y, error, strict=True)]
        high = [value + half for value, half in zip(y, error, strict=True)]
        drawn.append(Curve(name, [each.hidden for each in points], y, low, high))
    chart(
        lab.results / "one_round.svg",
        drawn,
        x="hidden positions n",
        y="total variation of one round",
        logx=True,
        logy=True,
    )


def _table(name: str, points: Sequence[Point]) -> str:
    rows = ((f"{getattr(each, name):g}", _tv(each.found), _limit(each.limit)) for each in points)
    fitted = f"Fitted exponent of {SIGNS[name]}: {slope(name, points):.2f}."
    return table((SIGNS[name], "TV", "bound"), rows) + f"\n\n{fitted}"


def _points(points: Sequence[Point]) -> str:
    header = (*SIGNS.values(), "TV", "bound")
    return table(
        header,
        (
            (*(f"{getattr(each, name):g}" for name in SIGNS), _tv(each.found), _limit(each.limit))
            for each in points
        ),
    )


def _tv(found: Estimate) -> str:
    return f"{found.value:.2g} ± {found.error:.1g}"


def _limit(value: float) -> str:
    return f"{value:.2g}" if value < 1 else "(above 1)"


def rounds_of(lab: Lab, model: str, sampling: Sampling) -> Iterator[tuple[int, Point]]:
    """Yield the total variation of every round of a moment sampler, on what the model sees.

    Rounds that reveal all that is left are plain in both samplers and left out.
    """
    samples, outcomes = (2, 200) if lab.short else (8, 1000)
    rng = np.random.default_rng(0)
    seen = trajectory(lab.bundle(model), sampling, samples, threads=lab.threads)
    for each in seen:
        hidden, count = each.log_p.shape[1], int(each.step.revealed.sum()) // samples
        if count == hidden:
            continue
        yield each.step.round, _of_round(each, sampling, count, outcomes, rng)


def _of_round(
    seen: Seen, sampling: Sampling, count: int, outcomes: int, rng: np.random.Generator
) -> Point:
    alpha = sampling.alpha * (1 - (seen.step.round + 1) / sampling.rounds)
    p = np.maximum(np.exp(seen.log_p), TINY)
    p /= p.sum(axis=-1, keepdims=True)
    found = [variation(one, alpha, count, outcomes, rng) for one in p]
    return Point(p.shape[1], count, alpha, p.shape[2], mean(found))


def findings(lab: Lab, model: str) -> Section:
    """Measure the rounds of a model."""
    scale = lab.scale(model)
    runs = [
        scale.base.but(order="moment", rounds=rounds, guidance=scale.guidances[-1])
        for rounds in (scale.few, scale.many)
    ]
    body, points = [], []
    for sampling in runs:
        found = list(rounds_of(lab, model, sampling))
        points += [each for _, each in found]
        rows = (
            (
                *(str(number) for number in (n + 1, each.hidden, each.count)),
                *(f"{each.alpha:.2f}", _tv(each.found), _limit(each.limit)),
            )
            for n, each in found
        )
        body += [
            f"{sampling.rounds} rounds, {sampling.schedule} schedule, alpha {sampling.alpha:g} "
            "falling to 0; the last round is plain in both samplers:",
            table(("round", "n", "k", "alpha", "TV", "bound"), rows),
        ]
    early = [each for each in points if 4 * each.count <= each.hidden]
    claims = {
        f"in rounds that reveal at most a quarter of what is hidden, TV is at most {CLOSE}": early,
        f"in all rounds of a trajectory, TV is at most {CLOSE}": points,
    }
    verdicts = (within(points), *(_close(claim, some) for claim, some in claims.items()))
    return Section(f"Along the way of {model}", verdicts, "\n\n".join(body))


def _close(claim: str, points: Sequence[Point]) -> Verdict:
    close = [each.found.value <= CLOSE for each in points]
    return Verdict(claim, sum(close), len(close) - sum(close))


SCRIPT = Script(
    name="one_round",
    title="Is a round of the moment sampler a round of MaskGIT?",
    claim="MaskGIT's round and the moment sampler's have the same law in the limit of many hidden "
    "positions n, of which k are revealed (Hayakawa et al. 2025, section 3).",
    findings=findings,
    general=general,
)

if __name__ == "__main__":
    sys.exit(main(SCRIPT, __doc__))
