"""Rounds of the published samplers against a transcription of the authors' own rules.

A denoiser that answers every canvas alike is sampled in four rounds of eight tokens, by the
runtime and by the rule; the outcome of a round is which positions it reveals, and whether the
tokens at the first and last of these are among the likeliest half. Chi-square of two samples: that
noise of a scale 15 % off, or the other annealing, would be found is part of the tests.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from scipy.special import log_softmax, softmax

from mdruntime.halton import halton_grid
from mdruntime.head import Draws, draw, guided
from mdruntime.randomness import Randomness
from mdruntime.sampler import Canvas, Pass, Result, Tokens, unmask
from mdruntime.sampling import Sampling
from mdruntime.schedule import hidden_counts
from mdzoo import presets

SAMPLES = 40_000
FALSE_ALARM = 1e-6
ROUNDS, LENGTH, CODEBOOK = 4, 8, 256
MASK = CODEBOOK

Float64 = NDArray[np.float64]
Bulk = Callable[[int, int], Randomness]


def tables() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Conditional and unconditional logits, from positions that are sure to ones that are not.

    Logits have a level of their own at each position: TiTok's sampler looks at it.
    """
    rng = np.random.default_rng(11)
    spread = np.linspace(0.2, 5, LENGTH)[:, None]
    conditional = spread * rng.normal(size=(LENGTH, CODEBOOK)) + 2 * rng.normal(size=(LENGTH, 1))
    unconditional = conditional + 0.1 * spread * rng.normal(size=(LENGTH, CODEBOOK))
    return conditional.astype(np.float32), unconditional.astype(np.float32)


CONDITIONAL, UNCONDITIONAL = tables()
LIKELY = np.median(CONDITIONAL, axis=1, keepdims=True) <= CONDITIONAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """An authors' sampler, as far as it differs from the others'."""

    hidden: Callable[[int], int]  # tokens hidden after round i, before it is kept within bounds
    noise: Callable[[int], float]
    logits: Callable[[int], Float64] = lambda i: CONDITIONAL.astype(np.float64)
    by_logit: bool = False  # TiTok: confidence is a logit, and tokens are drawn with the noise


def guidance(weight: float) -> Float64:
    """valeoai's form."""
    return (1 + weight) * CONDITIONAL.astype(np.float64) - weight * UNCONDITIONAL


def strengthened(weight: float) -> Float64:
    """TiTok's and MaskBit's form."""
    return CONDITIONAL + weight * (CONDITIONAL.astype(np.float64) - UNCONDITIONAL)


def scaled(scale: float) -> Float64:
    """aMUSEd's form, and that of TiTok S-128."""
    return UNCONDITIONAL + scale * (CONDITIONAL.astype(np.float64) - UNCONDITIONAL)


def cosine(i: int) -> int:
    return int(LENGTH * np.cos((i + 1) / ROUNDS * np.pi / 2))


def arccos(i: int) -> int:
    return int(LENGTH * np.arccos((i + 1) / ROUNDS) / (np.pi / 2))


def adap_sche(i: int) -> int:
    """The count of valeoai's v1.0, from its weights of the rounds."""
    weights = np.arccos(np.linspace(1, 0, ROUNDS)) / (np.pi / 2)
    counts = np.round(weights / weights.sum() * LENGTH)
    counts[counts == 0] = 1
    counts[-1] += LENGTH - counts.sum()
    return LENGTH - int(counts[: i + 1].sum())


def fall(i: int) -> float:
    return 1 - (i + 1) / ROUNDS


def power_cosine(i: int, power: float) -> float:
    return float(1 - np.cos(np.pi * (i / ROUNDS) ** power)) / 2


def titok_softmax(i: int) -> float:
    return 0.5 + 0.8 * fall(i)


RULES = {
    "valeoai v1": Rule(
        hidden=adap_sche,
        noise=lambda i: 4.5 * (1 - i / (ROUNDS - 1)),
        logits=lambda i: guidance(3 * i / (ROUNDS - 1)),
    ),
    "google": Rule(hidden=cosine, noise=lambda i: 4.5 * fall(i)),
    "MAGE": Rule(hidden=cosine, noise=lambda i: 6.0 * fall(i)),
    "aMUSEd": Rule(
        hidden=cosine,
        noise=lambda i: float(np.linspace(2, 0, ROUNDS)[i]),
        logits=lambda i: scaled(10.0),
    ),
    "TiTok L-32": Rule(
        hidden=arccos,
        noise=lambda i: 9.5 * fall(i),
        logits=lambda i: strengthened(4.5 * i / ROUNDS) / titok_softmax(i),
        by_logit=True,
    ),
    "TiTok S-128": Rule(
        hidden=arccos,
        noise=lambda i: 2.8 * fall(i),
        logits=lambda i: scaled(5.9 * power_cosine(i, 3) + 1) / titok_softmax(i),
        by_logit=True,
    ),
    "MaskBit": Rule(
        hidden=arccos,
        noise=lambda i: 7.8 * fall(i),
        logits=lambda i: strengthened(7.1 * power_cosine(i, 3)),
    ),
}


def titok(name: str) -> Sampling:
    first = 0.5 + 0.8 * (1 - 1 / ROUNDS)  # of a trajectory of so few rounds
    changes = {"temperature": first, "temperature_decay": 0.5 / first}
    return presets.titok(name)["published"].but(**changes)


OURS = {
    "valeoai v1": presets.maskgit(8, 3.0, 4.5)["published"],
    "google": presets.maskgit_jax(256)["published"],
    "MAGE": presets.mage()["published"],
    "aMUSEd": presets.amused()["published"],
    "TiTok L-32": titok("titok-l32"),
    "TiTok S-128": titok("titok-s128"),
    "MaskBit": presets.maskbit(14)["published"],
}


def transcribed(rule: Rule, last: int, seed: int) -> tuple[Tokens, Tokens]:
    """Return the canvases before and after round ``last`` by the authors' rule."""
    rng = np.random.default_rng(seed)
    canvas = np.full((SAMPLES, LENGTH), MASK, np.int32)
    before = canvas
    for i in range(last + 1):
        before, known = canvas, canvas != MASK
        logits, noise = rule.logits(i), rule.noise(i)
        p = softmax(logits / (noise if rule.by_logit else 1.0), axis=-1)
        drawn = np.stack([rng.choice(CODEBOOK, SAMPLES, p=row) for row in p], axis=1)
        drawn = np.where(known, canvas, drawn)
        scores = logits if rule.by_logit else log_softmax(logits, axis=-1)
        confidence = np.where(known, np.inf, scores[np.arange(LENGTH), drawn % CODEBOOK])
        confidence = confidence + noise * rng.gumbel(size=confidence.shape)
        masked = int((~known[0]).sum())
        cut = np.sort(confidence, axis=1)[:, max(1, min(masked - 1, rule.hidden(i))), None]
        canvas = np.where(confidence < cut, MASK, drawn).astype(np.int32)
    return before, canvas


class Table:
    """The denoiser of the tables: all samples of a pass are in the same round."""

    def __call__(self, request: Pass) -> Result:
        first = request.controls.take(np.zeros(1, np.int64))
        logits = guided(CONDITIONAL[None], UNCONDITIONAL[None], first.guidance)
        one = draw(logits, first, np.zeros((1, LENGTH), np.float32))
        weights = np.exp(first.token_beta * log_softmax(logits[0] / first.temperature, axis=-1))
        log_p = log_softmax(logits[0] / first.temperature, axis=-1)
        sampled = np.empty(request.wanted.shape, np.int32)
        for place in range(LENGTH):
            cdf = np.cumsum(weights[place], dtype=np.float32)
            here = request.wanted == place
            found = np.searchsorted(cdf, request.uniforms[here] * cdf[-1], side="right")
            sampled[here] = np.minimum(found, CODEBOOK - 1)
        rest = {name: getattr(one, name)[0][request.wanted] for name in Draws._fields}
        rest |= {"sampled": sampled, "log_prob": log_p[request.wanted, sampled]}
        return Result(Draws(**rest))


def outcomes(before: Tokens, after: Tokens) -> NDArray[np.int64]:
    """Return the outcome of a round, one number a sample."""
    revealed = (before == MASK) & (after != MASK)
    result = revealed @ (1 << np.arange(LENGTH))
    for first in (np.argmax(revealed, axis=1), LENGTH - 1 - np.argmax(revealed[:, ::-1], axis=1)):
        token = np.take_along_axis(after, first[:, None], axis=1)[:, 0]
        result = 2 * result + LIKELY[first, token]
    return np.asarray(result)


def p_value(one: NDArray[np.int64], other: NDArray[np.int64]) -> float:
    """Chi-square of two samples; outcomes seen fewer than ten times in all are merged."""
    size = int(max(one.max(), other.max())) + 1
    table = np.stack([np.bincount(x, minlength=size) for x in (one, other)])
    rare = table.sum(axis=0) < 10
    table = np.column_stack([table[:, ~rare], table[:, rare].sum(axis=1)])
    return float(stats.chi2_contingency(table[:, table.sum(axis=0) > 0]).pvalue)


Sampled = Callable[[str, int], NDArray[np.int64]]


@pytest.fixture(scope="module")
def sampled(bulk: Bulk) -> Sampled:
    """Return a function from a sampler and a round to the runtime's outcomes."""

    @cache
    def sample(name: str) -> list[Tokens]:
        blank = np.full((SAMPLES, LENGTH), MASK, np.int32)
        canvas, sampling = Canvas(LENGTH, (LENGTH,), MASK), OURS[name].but(rounds=ROUNDS)
        steps = unmask(Table(), blank, canvas, sampling, bulk(21, SAMPLES))
        return [blank, *(next(steps).tokens for _ in range(3))]

    return lambda name, index: outcomes(*sample(name)[index : index + 2])


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("name", RULES)
def test_rounds_have_the_law_of_the_authors_rule(name: str, index: int, sampled: Sampled) -> None:
    expected = outcomes(*transcribed(RULES[name], index, seed=5))
    assert p_value(sampled(name, index), expected) > FALSE_ALARM


@pytest.mark.parametrize("factor", [0.85, 1.15])
@pytest.mark.parametrize("name", RULES)
def test_noise_of_another_scale_would_be_noticed(
    name: str, factor: float, sampled: Sampled
) -> None:
    rule = RULES[name]
    wrong = replace(rule, noise=lambda i: factor * rule.noise(i))
    assert p_value(sampled(name, 0), outcomes(*transcribed(wrong, 0, seed=5))) < FALSE_ALARM


@pytest.mark.parametrize("name", RULES)
def test_the_other_annealing_would_be_noticed(name: str, sampled: Sampled) -> None:
    rule, alpha = RULES[name], OURS[name].alpha
    full = OURS[name].annealing == "linear-full"
    other = fall if full else (lambda i: 1 - i / (ROUNDS - 1))
    wrong = replace(rule, noise=lambda i: alpha * other(i))
    assert p_value(sampled(name, 0), outcomes(*transcribed(wrong, 0, seed=5))) < FALSE_ALARM


@pytest.mark.parametrize("name", ["TiTok L-32", "TiTok S-128"])
def test_titok_is_not_maskgit_on_other_logits(name: str, sampled: Sampled) -> None:
    wrong = replace(RULES[name], by_logit=False)
    assert p_value(sampled(name, 0), outcomes(*transcribed(wrong, 0, seed=5))) < FALSE_ALARM


def test_halton_reveals_a_window_of_the_rolled_order_with_plain_guided_tokens(bulk: Bulk) -> None:
    many, side = 4000, 4
    sampling = presets.halton("halton-base-256")["published"].but(rounds=6)
    wide = guidance(0.7).repeat(2, axis=0)  # a grid of sixteen; positions share logits by twos
    table = wide.astype(np.float32)

    def denoise(request: Pass) -> Result:
        assert np.all(request.controls.guidance == np.float32(0.7))
        logits = table[request.wanted]
        return Result(draw(logits, request.controls, request.uniforms))

    blank = np.full((many, side * side), MASK, np.int32)
    canvas = Canvas(side * side, (side, side), MASK)
    steps = list(unmask(denoise, blank, canvas, sampling, bulk(3, many)))
    left = [side * side, *hidden_counts("halton", 6, side * side).tolist()]
    rounds = np.repeat(range(6), [more - less for more, less in pairwise(left)])
    found = np.stack([step.revealed for step in steps]).argmax(axis=0)[:, halton_grid(side, side)]
    begins = (found == 0) & (np.roll(found, 1, axis=1) != 0)
    starts = np.argmax(begins, axis=1)
    assert set(starts) == set(range(side * side))
    for row, start in zip(found, starts, strict=True):
        assert np.array_equal(np.roll(row, -start), rounds)
    tokens = steps[-1].tokens
    for place in range(side * side):
        counts = np.bincount(tokens[:, place], minlength=CODEBOOK)
        expected = many * softmax(wide[place])
        rare = expected < 5
        seen = np.append(counts[~rare], counts[rare].sum())
        wished = np.append(expected[~rare], expected[rare].sum())
        assert stats.chisquare(seen[wished > 0], wished[wished > 0]).pvalue > FALSE_ALARM
