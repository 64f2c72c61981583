"""The laws of the samplers, on models so small that every outcome can be enumerated.

Sample sizes: a chi-square test with 6,000 samples over 81 outcomes finds a total variation of
0.08, over 32 outcomes one of 0.07, with probability > 0.999 at a false-alarm rate of 1e-6 (the
first test holds this against the non-central law). Seeds are fixed: nothing here is flaky.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import combinations, pairwise, permutations, product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from mdruntime.head import draw
from mdruntime.order import HYBRID, View, find_order, ranking
from mdruntime.randomness import Purpose, Randomness
from mdruntime.sampler import Canvas, Denoise, Tokens, unmask
from mdruntime.sampling import Sampling
from mdruntime.schedule import hidden_counts
from mdruntime.turn import Clock

SAMPLES = 6000
FALSE_ALARM = 1e-6

Float64 = NDArray[np.float64]
Lookup = Callable[[NDArray[np.float32], int], Denoise]
Bulk = Callable[[int, int], Randomness]
Law = dict[tuple[int, ...], float]  # canvas, the codebook's size where hidden, to probability
Choices = Sequence[tuple[tuple[int, ...], float]]  # positions and how probably they are chosen


def random_joint(codebook: int, length: int) -> Float64:
    """A joint law far from independence, none of whose outcomes is rare."""
    cells = codebook**length
    rough = np.random.default_rng(cells).dirichlet(np.full(cells, 0.3))
    return (0.9 * rough + 0.1 / cells).reshape((codebook,) * length)


def digits(canvas: Sequence[int], codebook: int) -> int:
    """Return the number that the fake denoiser reads a canvas as."""
    return sum(token * (codebook + 1) ** place for place, token in enumerate(canvas))


def conditionals(joint: Float64) -> NDArray[np.float32]:
    """Return log p(x_i | visible) for every canvas, (canvases, length, codebook)."""
    codebook, length = joint.shape[0], joint.ndim
    table = np.zeros(((codebook + 1) ** length, length, codebook), np.float32)
    for canvas in product(range(codebook + 1), repeat=length):
        seen = joint[tuple(slice(x, x + 1) if x < codebook else slice(None) for x in canvas)]
        for place in (place for place, x in enumerate(canvas) if x == codebook):
            others = tuple(other for other in range(length) if other != place)
            table[digits(canvas, codebook), place] = np.log(seen.sum(axis=others) / seen.sum())
    return table


IMAGE = random_joint(3, 4)  # a grid of 2 x 2 tokens
LINE = random_joint(2, 5)
TABLES = {IMAGE.ndim: conditionals(IMAGE), LINE.ndim: conditionals(LINE)}


def outcomes(canvases: Tokens, codebook: int) -> NDArray[np.int64]:
    """Return how often each canvas occurs, by its digits."""
    length = canvases.shape[1]
    places = (codebook + 1) ** np.arange(length)
    return np.bincount(canvases @ places, minlength=(codebook + 1) ** length)


def dense(law: Law, codebook: int) -> Float64:
    """Return a law by the digits of its canvases."""
    (length,) = {len(canvas) for canvas in law}
    result = np.zeros((codebook + 1) ** length)
    for canvas, probability in law.items():
        result[digits(canvas, codebook)] += probability
    return result


def joint_law(joint: Float64) -> Float64:
    return dense(dict(np.ndenumerate(joint)), joint.shape[0])


def p_value(counts: NDArray[np.int64], law: Float64) -> float:
    """Chi-square of counts against a law; outcomes expected fewer than five times are merged."""
    assert law.sum() == pytest.approx(1)
    assert not counts[law == 0].any()
    expected = law / law.sum() * counts.sum()
    rare = expected < 5
    seen = np.append(counts[~rare], counts[rare].sum())
    wished = np.append(expected[~rare], expected[rare].sum())
    return float(stats.chisquare(seen[wished > 0], wished[wished > 0]).pvalue)


def sampled(
    denoise: Denoise, start: Tokens, codebook: int, sampling: Sampling, randomness: Randomness
) -> Iterator[Tokens]:
    length = start.shape[1]
    canvas = Canvas(length, (2, 2) if length == 4 else (length,), codebook)
    return (step.tokens for step in unmask(denoise, start, canvas, sampling, randomness))


Drawn = Callable[[int, Sampling], NDArray[np.int64]]


@pytest.fixture(scope="module")
def drawn(lookup: Lookup, bulk: Bulk) -> Drawn:
    """Return a function from a canvas's length and a sampler to the counts of its outcomes."""

    @cache
    def draw_all(length: int, sampling: Sampling) -> NDArray[np.int64]:
        table = TABLES[length]
        codebook = table.shape[-1]
        start = np.full((SAMPLES, length), codebook, np.int32)
        steps = sampled(lookup(table, SAMPLES), start, codebook, sampling, bulk(1, SAMPLES))
        (*_, canvases) = steps
        return outcomes(canvases, codebook)

    return draw_all


def in_turn(weights: Float64, count: int) -> Choices:
    """Plackett-Luce: positions drawn one after the other in proportion to their weights."""
    if count == len(weights):
        return [(tuple(range(count)), 1.0)]
    return [
        (order, float(np.prod(weights[list(order)] / (weights.sum() - before))))
        for order in permutations(range(len(weights)), count)
        for before in [np.cumsum([0, *weights[list(order[:-1])]])]
    ]


def maskgit_round(p: Float64, count: int, alpha: float) -> Law:
    """Sample, then choose, by enumeration; ``p`` is (hidden, codebook)."""
    hidden, codebook = p.shape
    law: Law = {}
    for tokens in product(range(codebook), repeat=hidden):
        chance = p[range(hidden), tokens]
        weights = chance ** (1 / alpha) if alpha else chance
        for chosen, share in in_turn(weights, count):
            canvas = tuple(x if i in chosen else codebook for i, x in enumerate(tokens))
            law[canvas] = law.get(canvas, 0) + share * chance.prod()
    return law


def choices(order: str, p: Float64, count: int, beta: float) -> Choices:
    """Return which positions an order chooses before there are tokens."""
    if order in ("moment", "u-moment"):
        return in_turn((p**beta).sum(axis=1), count)
    if order in ("vanilla", "temperature"):
        return in_turn(np.ones(len(p)), count)
    smallest_first = np.sort(p, axis=1)
    scores = {
        "top-probability": smallest_first[:, -1],
        "margin": smallest_first[:, -1] - smallest_first[:, -2],
        "entropy": (p * np.log(p)).sum(axis=1),
    }
    return [(tuple(np.argsort(-scores[order])[:count].tolist()), 1.0)]


def one_round(order: str, p: Float64, count: int, alpha: float) -> Law:
    """Return the law of the canvases after one round on conditionals ``p`` (hidden, codebook)."""
    if order.startswith("maskgit"):
        return maskgit_round(p, count, alpha)
    beta = 1 + 1 / alpha if alpha else 100.0
    tempered = order in ("moment", "temperature") and alpha and count < len(p)
    weights = p**beta if tempered else p
    weights = weights / weights.sum(axis=1, keepdims=True)
    law: Law = {}
    for chosen, share in choices(order, p, count, beta):
        for tokens in product(range(p.shape[1]), repeat=count):
            canvas = np.full(len(p), p.shape[1])
            canvas[list(chosen)] = tokens
            chance = share * float(weights[chosen, tokens].prod())
            law[tuple(canvas.tolist())] = law.get(tuple(canvas.tolist()), 0) + chance
    return law


def followed(law: Law, rule: Callable[[Float64], Law], table: Float64) -> Law:
    """Return the law one round later, where ``rule`` is the law of a round."""
    codebook = table.shape[-1]
    result: Law = {}
    for canvas, chance in law.items():
        places = [place for place, x in enumerate(canvas) if x == codebook]
        for tokens, share in rule(table[digits(canvas, codebook), places]).items():
            new = np.array(canvas)
            new[places] = tokens
            result[tuple(new.tolist())] = result.get(tuple(new.tolist()), 0) + chance * share
    return result


def trajectory(length: int, sampling: Sampling) -> Float64:
    """Return the exact law of a sampler's outcomes, followed over all canvases."""
    table = np.exp(TABLES[length].astype(np.float64))
    table /= table.sum(axis=-1, keepdims=True)
    left = [length, *hidden_counts(sampling.schedule, sampling.rounds, length).tolist()]
    law: Law = {(table.shape[-1],) * length: 1.0}
    for turn, (before, after) in enumerate(pairwise(left)):
        alpha = sampling.alpha * (
            1 - (turn + 1) / sampling.rounds if sampling.annealing == "linear" else 1
        )
        rule = partial(one_round, sampling.order, count=before - after, alpha=alpha)
        law = followed(law, rule, table)
    return dense(law, table.shape[-1])


@pytest.mark.parametrize(("cells", "variation"), [(81, 0.08), (32, 0.07)])
def test_the_sample_size_has_the_stated_power(cells: int, variation: float) -> None:
    # The chi-square divergence is at least four times the square of the total variation.
    threshold = stats.chi2.isf(FALSE_ALARM, cells - 1)
    assert stats.ncx2.sf(threshold, cells - 1, 4 * SAMPLES * variation**2) > 0.999


ONE_BY_ONE = {
    "u-moment": Sampling(order="u-moment"),
    "moment, plain tokens": Sampling(order="moment", tokens="plain"),
    "vanilla": Sampling(order="vanilla"),
    "entropy": Sampling(order="entropy"),
    "top-probability": Sampling(order="top-probability"),
    "margin": Sampling(order="margin"),
    "halton": Sampling(order="halton"),
    "halton-1d": Sampling(order="halton-1d"),
    "hybrid, plain tokens": Sampling(order=HYBRID, exploration=(1, 0), tokens="plain"),
    "tiny entropy bound": Sampling(order="entropy", entropy_bound=1e-9),
    "tiny entropy bound, u-moment": Sampling(order="u-moment", entropy_bound=1e-9),
}


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_one_position_a_round_with_plain_tokens_samples_the_joint(name: str, drawn: Drawn) -> None:
    # Hayakawa et al. 2025, proposition 3.
    sampling = ONE_BY_ONE[name].but(rounds=4, schedule="linear", alpha=1.0)
    assert p_value(drawn(4, sampling), joint_law(IMAGE)) > FALSE_ALARM


@pytest.mark.parametrize(
    "plan",
    [
        {"rounds": 1, "substeps": 5, "refresh": "chosen"},
        {"rounds": 1, "substeps": 5, "refresh": "recent"},
        {"rounds": 5, "refresh_interval": 5, "refresh": "recent", "order": "halton"},
        {"rounds": 3, "substeps": 2, "refresh_interval": 2, "refresh": "chosen"},
    ],
    ids=str,
)
def test_one_position_a_pass_samples_the_joint_where_nothing_is_stale(
    plan: dict[str, Any], drawn: Drawn
) -> None:
    sampling = Sampling(schedule="linear", order="u-moment", alpha=1.0).but(**plan)
    assert p_value(drawn(5, sampling), joint_law(LINE)) > FALSE_ALARM


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(order="moment", rounds=4, alpha=1.0),
        Sampling(order="maskgit", rounds=4, alpha=1.0),
        Sampling(order="maskgit-exact", rounds=4, alpha=1.0),
        Sampling(order="temperature", rounds=4, alpha=1.0),
        Sampling(order="vanilla", rounds=2, alpha=1.0, annealing="none"),
        Sampling(order="halton", rounds=1),
    ],
    ids=lambda sampling: f"{sampling.order}, {sampling.rounds} rounds",
)
def test_tempered_or_parallel_samplers_do_not_sample_the_joint(
    sampling: Sampling, drawn: Drawn
) -> None:
    found = p_value(drawn(4, sampling.but(schedule="linear")), joint_law(IMAGE))
    assert found < 1e-12


TEMPERED = ["maskgit", "maskgit-exact", "moment", "u-moment", "temperature"]


@pytest.mark.parametrize(
    ("order", "rounds", "annealing"),
    [
        *product(TEMPERED, [3], ["linear"]),
        *product([*TEMPERED, "vanilla", "entropy", "margin", "top-probability"], [2], ["none"]),
    ],
)
def test_whole_trajectories_have_the_law_of_the_definition(
    order: str, rounds: int, annealing: str, drawn: Drawn
) -> None:
    # Three rounds reveal 2, 1 and 1 positions at alpha 2/3, 1/3 and 0; two reveal 2 and 2.
    sampling = Sampling(
        order=order, rounds=rounds, alpha=1.0, annealing=annealing, schedule="linear"
    )
    assert p_value(drawn(4, sampling), trajectory(4, sampling)) > FALSE_ALARM


def test_the_error_of_parallel_rounds_is_their_lost_mutual_information() -> None:
    # KL(joint || sampler) = sum over rounds of sum_i H(x_i | revealed) - H(x_I | revealed).
    def entropy(law: Float64) -> float:
        return float(stats.entropy(law.ravel()))

    joint = joint_law(IMAGE)
    law = trajectory(4, Sampling(order="entropy", rounds=2, schedule="linear"))
    ((first, _),) = choices("entropy", np.exp(TABLES[4][-1].astype(np.float64)), 2, 1.0)
    parts = np.moveaxis(IMAGE, first, (0, 1))
    seen = parts.sum(axis=(2, 3))
    lost = entropy(seen.sum(axis=0)) + entropy(seen.sum(axis=1)) - entropy(seen)
    for tokens in product(range(3), repeat=2):
        rest = parts[tokens] / seen[tokens]
        now = entropy(rest.sum(axis=0)) + entropy(rest.sum(axis=1)) - entropy(rest)
        lost += float(seen[tokens]) * now
    assert stats.entropy(joint[joint > 0], law[joint > 0]) == pytest.approx(lost, rel=1e-4)


def test_known_tokens_condition_the_joint(lookup: Lookup, bulk: Bulk) -> None:
    start = np.tile(np.array([3, 1, 3, 2], np.int32), (SAMPLES, 1))
    sampling = Sampling(order="u-moment", rounds=4, alpha=1.0)
    (*_, canvases) = sampled(lookup(TABLES[4], SAMPLES), start, 3, sampling, bulk(2, SAMPLES))
    given = np.zeros_like(IMAGE)
    given[:, 1, :, 2] = IMAGE[:, 1, :, 2] / IMAGE[:, 1, :, 2].sum()
    assert p_value(outcomes(canvases, 3), joint_law(given)) > FALSE_ALARM


@pytest.mark.parametrize("alpha", [0.5, 4.5])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_choosing_first_can_have_maskgits_exact_law(
    alpha: float, count: int, lookup: Lookup, bulk: Bulk
) -> None:
    # Independent conditionals of 3 tokens at 3 positions, of which one round reveals 1, 2 or 3;
    # the outcome is which positions are revealed and their tokens.
    p = np.random.default_rng(8).dirichlet(np.ones(3), size=3)
    table = np.log(p)[None].astype(np.float32)
    start = np.full((SAMPLES, 3), 3, np.int32)
    sampling = Sampling(rounds=4 - count, schedule="linear", alpha=alpha, annealing="none")
    found = []
    for seed, order in enumerate(("maskgit", "maskgit-exact")):
        denoise, randomness = lookup(table, SAMPLES), bulk(seed, SAMPLES)
        steps = sampled(denoise, start, 3, sampling.but(order=order), randomness)
        found.append(outcomes(next(steps), 3))
        assert p_value(found[-1], dense(maskgit_round(p, count, alpha), 3)) > FALSE_ALARM
    common = sum(found) >= 10
    assert stats.chi2_contingency([counts[common] for counts in found]).pvalue > FALSE_ALARM


def test_the_exact_form_follows_a_softmax_temperature_that_falls(
    lookup: Lookup, bulk: Bulk
) -> None:
    # From 3 in the first round to 0.3 in the last, where three positions and four tokens are left.
    table = np.log(np.random.default_rng(8).dirichlet(np.ones(3), size=4))[None]
    sampling = Sampling(rounds=2, alpha=4.0, annealing="none", temperature=3, temperature_decay=0.1)
    found = []
    for seed, order in enumerate(("maskgit", "maskgit-exact")):
        denoise, start = lookup(table.astype(np.float32), SAMPLES), np.full((SAMPLES, 4), 3)
        steps = sampled(
            denoise, start.astype(np.int32), 3, sampling.but(order=order), bulk(seed, SAMPLES)
        )
        (*_, canvases) = steps
        found.append(outcomes(canvases, 3))
    common = sum(found) >= 10
    assert stats.chi2_contingency([counts[common] for counts in found]).pvalue > FALSE_ALARM


# One round of MaskGIT and one of the moment sampler, as exponential races: a position is chosen
# if its clock is among the first to ring. MaskGIT's clocks have the rates p_i(x_i)^(1/alpha) of
# tokens drawn before, the moment sampler's the moments. Given the tokens of the chosen positions
# one integral over time gives the probability, whatever the number of positions.

STEP = 0.125
CLOCK = np.exp(np.arange(-20, 20, STEP))
SIZES = (32, 64, 128, 256)


def race(rates: Float64, log_rest: Float64) -> Float64:
    """Return the probability that clocks of these rates all ring before the rest.

    ``rates`` is (outcomes, count); ``log_rest`` (outcomes, times), the log-probability that none
    of the others has rung.
    """
    waits = np.minimum(rates[..., None] * CLOCK, 600)
    log_rung = np.log(-np.expm1(-waits)).sum(axis=1)
    hazard = (rates[..., None] / np.expm1(waits)).sum(axis=1)
    return np.asarray((np.exp(log_rung + log_rest) * hazard * CLOCK).sum(axis=-1) * STEP)


def likelihoods(
    p: Float64, alpha: float, chosen: NDArray[np.int64], tokens: NDArray[np.int64]
) -> tuple[Float64, Float64]:
    """Return the probabilities of outcomes (outcomes, count) under MaskGIT and moment."""
    rates, powers = p ** (1 / alpha), p ** (1 + 1 / alpha)
    moments = powers.sum(axis=1)
    drawn_first = np.log((p[..., None] * np.exp(-rates[..., None] * CLOCK)).sum(axis=1) + 1e-300)
    chosen_first = -moments[:, None] * CLOCK

    def rest(log_survival: Float64) -> Float64:
        return np.asarray(log_survival.sum(axis=0) - log_survival[chosen].sum(axis=1))

    maskgit = race(rates[chosen, tokens], rest(drawn_first)) * p[chosen, tokens].prod(axis=1)
    moment = race(moments[chosen], rest(chosen_first))
    return maskgit, moment * (powers[chosen, tokens] / moments[chosen]).prod(axis=1)


def every_outcome(
    hidden: int, codebook: int, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    pairs = product(combinations(range(hidden), count), product(range(codebook), repeat=count))
    chosen, tokens = zip(*pairs, strict=True)
    return np.array(chosen), np.array(tokens)


def moment_outcomes(
    p: Float64, alpha: float, count: int, randomness: Randomness
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return positions and tokens (samples, count) of one round of the runtime's moment order."""
    many, hidden = len(randomness), len(p)
    logits = np.log(p)[None].astype(np.float32)
    clock = Clock(
        Sampling(alpha=alpha, annealing="none", rounds=2), np.array([hidden]), [np.array([1, 0])]
    )
    turn = clock.turn(np.array([0]), np.array([hidden]))
    draws = draw(logits, turn.controls, np.zeros((1, hidden), np.float32))
    view = View(
        draws=draws._replace(log_moment=np.broadcast_to(draws.log_moment, (many, hidden))),
        gumbels=randomness.gumbels(0, hidden),
        alpha=np.full(many, alpha),
        grid=(hidden,),
        randomness=randomness,
    )
    ranked = ranking(find_order("moment").score(view), np.ones((many, hidden), bool))
    chosen = np.stack(ranked)[:, :count]
    controls = turn.controls.take(np.zeros(many, np.int64))
    tokens = draw(logits[0][chosen], controls, randomness.uniforms(Purpose.TOKEN, 0, count))
    return chosen, tokens.sampled.astype(np.int64)


def random_conditionals(hidden: int, codebook: int = 64, concentration: float = 0.1) -> Float64:
    rng = np.random.default_rng(hidden * codebook)
    p = rng.dirichlet(np.full(codebook, concentration), size=hidden) + 1e-12
    return np.asarray(p / p.sum(axis=1, keepdims=True))


def variation_of_one(p: Float64, alpha: float) -> float:
    """Return the exact total variation between the samplers that reveal one position."""
    maskgit, moment = likelihoods(p, alpha, *every_outcome(len(p), p.shape[1], 1))
    assert maskgit.sum() == pytest.approx(1, abs=1e-4)
    return float(np.abs(maskgit - moment).sum() / 2)


def variation(p: Float64, alpha: float, count: int, randomness: Randomness) -> float:
    """Estimate the total variation of a round from the runtime's moment sampler's outcomes."""
    maskgit, moment = likelihoods(p, alpha, *moment_outcomes(p, alpha, count, randomness))
    return float(np.maximum(1 - maskgit / moment, 0).mean())


def bound(p: Float64, alpha: float, count: int) -> float:
    hidden, codebook = p.shape
    return count * (count + 1) * float(codebook ** (1 / alpha)) / (2 * (hidden - count))


def slope(variations: Sequence[float]) -> float:
    return float(np.polyfit(np.log(SIZES), np.log(variations), 1)[0])


@pytest.mark.parametrize("alpha", [0.5, 4.5])
@pytest.mark.parametrize("count", [1, 2])
def test_the_race_gives_the_enumerated_law(alpha: float, count: int) -> None:
    p = random_conditionals(3, 3, 1.0)
    chosen, tokens = every_outcome(3, 3, count)
    laws = [maskgit_round(p, count, alpha), one_round("moment", p, count, alpha)]
    for found, law in zip(likelihoods(p, alpha, chosen, tokens), laws, strict=True):
        canvases = np.full((len(chosen), 3), 3)
        np.put_along_axis(canvases, chosen, tokens, axis=1)
        assert found == pytest.approx([law[tuple(row)] for row in canvases.tolist()], abs=1e-7)


@pytest.mark.parametrize("alpha", [1.0, 4.5])
def test_revealing_one_position_moment_approaches_maskgit_like_one_over_n(alpha: float) -> None:
    laws = [random_conditionals(size) for size in SIZES]
    variations = [variation_of_one(p, alpha) for p in laws]
    assert slope(variations) == pytest.approx(-1, abs=0.15)
    assert all(v <= bound(p, alpha, 1) for v, p in zip(variations, laws, strict=True))


def test_revealing_sixteen_positions_moment_approaches_maskgit_like_one_over_n(bulk: Bulk) -> None:
    laws = [random_conditionals(size) for size in SIZES]
    variations = [variation(p, 4.5, 16, bulk(3, 1000)) for p in laws]
    assert slope(variations) == pytest.approx(-1, abs=0.15)
    assert variations == pytest.approx([0.090, 0.044, 0.021, 0.010], rel=0.25)


def test_the_bound_on_the_difference_of_moment_and_maskgit_holds() -> None:
    rng = np.random.default_rng(9)
    for _ in range(150):
        hidden, codebook = int(rng.integers(2, 12)), int(rng.integers(2, 5))
        alpha, concentration = float(rng.uniform(0.3, 8)), float(rng.choice([0.1, 0.5, 2.0]))
        p = rng.dirichlet(np.full(codebook, concentration), size=hidden) + 1e-9
        p /= p.sum(axis=1, keepdims=True)
        for count in range(1, min(hidden, 3)):
            maskgit, moment = likelihoods(p, alpha, *every_outcome(hidden, codebook, count))
            assert np.abs(maskgit - moment).sum() / 2 <= bound(p, alpha, count) + 1e-6


def test_annealed_moment_and_maskgit_agree_early_and_differ_late(bulk: Bulk) -> None:
    # 256 tokens in 16 rounds, alpha falling linearly from 4.5; the last round is plain in both.
    left = [256, *hidden_counts("cosine", 16, 256).tolist()]
    apart = {
        turn: variation(
            random_conditionals(left[turn - 1]),
            4.5 * (1 - turn / 16),
            left[turn - 1] - left[turn],
            bulk(turn, 300),
        )
        for turn in (1, 4, 8, 10, 13, 14, 15)
    }
    assert max(apart[turn] for turn in (1, 4, 8, 10)) < 0.08
    assert min(apart[turn] for turn in (13, 14, 15)) > 0.15
    assert apart[15] > 0.95
