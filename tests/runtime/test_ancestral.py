"""Ancestral sampling against MDLM's own update rule, and against exact joints.

In the rule a hidden token is revealed from time t to time s with probability (t - s) / t, and gets
a value from the denoiser's conditional; times run from 1 to 1e-5.
"""

from collections.abc import Callable
from itertools import pairwise, product

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from mdruntime.randomness import Purpose, Randomness
from mdruntime.sampler import Canvas, Denoise, Pass, Result, Tokens, unmask
from mdruntime.sampling import Sampling
from mdruntime.schedule import ANCESTRAL, draw_schedules

SAMPLES = 20_000
FALSE_ALARM = 1e-6
ROUNDS, LENGTH, CODEBOOK = 5, 3, 2
P = np.array([[0.8, 0.2], [0.5, 0.5], [0.1, 0.9]])  # of each position, whatever the others are
SAMPLING = Sampling(schedule=ANCESTRAL, order="vanilla", rounds=ROUNDS)

Lookup = Callable[[NDArray[np.float32], int], Denoise]
Bulk = Callable[[int, int], Randomness]
Float64 = NDArray[np.float64]


def transcribed(reveal: Callable[[float, float], float], seed: int = 1) -> NDArray[np.int64]:
    """Return the round (ROUNDS: the final argmax) and the token of every position, as one number.

    ``reveal`` is the probability of revealing a token between two times.
    """
    rng = np.random.default_rng(seed)
    shape = (SAMPLES, LENGTH)
    turn, token = np.full(shape, ROUNDS), np.tile(P.argmax(axis=1), (SAMPLES, 1))
    for i, (t, s) in enumerate(pairwise(np.linspace(1, 1e-5, ROUNDS + 1))):
        now = (turn == ROUNDS) & (rng.random(shape) < reveal(t, s))
        turn[now] = i
        token[now] = (rng.random(shape) < P[:, 1])[now]
    return np.asarray(turn * CODEBOOK + token)


def ours(lookup: Lookup, bulk: Bulk) -> NDArray[np.int64]:
    """Return the same of the runtime, whose rounds without a reveal are left out.

    Which rounds those are is in the random numbers: each token's own uniform says its round.
    """
    denoise = lookup(np.log(P)[None].astype(np.float32), SAMPLES)
    source = bulk(4, SAMPLES)
    uniforms = source.uniforms(Purpose.SCHEDULE, 0, LENGTH)
    drawn = np.sort((uniforms * ROUNDS).astype(np.int64), axis=1)
    kept = [np.unique(row) for row in drawn]
    blank = np.full((SAMPLES, LENGTH), CODEBOOK, np.int32)
    turn = np.zeros(blank.shape, np.int64)
    tokens = blank
    for index, step in enumerate(
        unmask(denoise, blank, Canvas(LENGTH, (LENGTH,), CODEBOOK), SAMPLING, source)
    ):
        for sample, place in np.argwhere(step.revealed).tolist():
            turn[sample, place] = kept[sample][index]
        tokens = step.tokens
    return np.asarray(turn * CODEBOOK + tokens)


def p_value(one: NDArray[np.int64], other: NDArray[np.int64]) -> float:
    """Chi-square of two samples of the joint outcome of all positions."""
    base = ((ROUNDS + 1) * CODEBOOK) ** np.arange(LENGTH)
    size = int(base[-1]) * (ROUNDS + 1) * CODEBOOK
    table = np.stack([np.bincount(x @ base, minlength=size) for x in (one, other)])
    rare = table.sum(axis=0) < 10
    table = np.column_stack([table[:, ~rare], table[:, rare].sum(axis=1)])
    return float(stats.chi2_contingency(table[:, table.sum(axis=0) > 0]).pvalue)


@pytest.fixture(scope="module")
def found(lookup: Lookup, bulk: Bulk) -> NDArray[np.int64]:
    return ours(lookup, bulk)


def test_rounds_and_tokens_have_the_law_of_the_update_rule(found: NDArray[np.int64]) -> None:
    assert p_value(found, transcribed(lambda t, s: (t - s) / t)) > FALSE_ALARM


@pytest.mark.parametrize(
    "wrong",
    [
        lambda t, s: t - s,  # the same chance in all rounds, and a rest for the final argmax
        lambda t, s: 1.15 * (t - s) / t,
        lambda t, s: (t - s) / t if t < 1 else 1.25 * (t - s),  # the first round alone
    ],
    ids=["constant", "15 % more", "25 % more in the first"],
)
def test_another_probability_of_being_revealed_would_be_noticed(
    wrong: Callable[[float, float], float], found: NDArray[np.int64]
) -> None:
    assert p_value(found, transcribed(wrong)) < FALSE_ALARM


def test_fixed_counts_would_be_noticed(found: NDArray[np.int64]) -> None:
    # Three tokens over three rounds, one each: right on average, but not independent.
    rng = np.random.default_rng(2)
    turns = rng.permuted(np.tile([0, 2, 4], (SAMPLES, 1)), axis=1)
    tokens = rng.random(turns.shape) < P[:, 1]
    assert p_value(found, turns * CODEBOOK + tokens) < FALSE_ALARM


def test_the_round_of_every_token_is_uniform_and_independent_of_the_others(bulk: Bulk) -> None:
    hidden = np.full(SAMPLES, 4)
    schedules = draw_schedules(ANCESTRAL, 3, hidden, bulk(5, SAMPLES))
    # Counts of a multinomial law without its zeros: the partition of 4 tokens over 3 rounds.
    seen: dict[tuple[int, ...], int] = {}
    for schedule in schedules:
        counts = tuple((-np.diff(schedule, prepend=4)).tolist())
        seen[counts] = seen.get(counts, 0) + 1
    expected: dict[tuple[int, ...], float] = {}
    for turns in product(range(3), repeat=4):
        counts = tuple(np.unique(turns, return_counts=True)[1].tolist())
        expected[counts] = expected.get(counts, 0) + SAMPLES / 3**4
    assert set(seen) == set(expected)
    pairs = [(seen[counts], expected[counts]) for counts in expected]
    assert stats.chisquare(*zip(*pairs, strict=True)).pvalue > FALSE_ALARM


@pytest.mark.parametrize(("rounds", "hidden"), [(1000, 40), (8, 40), (1, 40), (64, 1), (5, 0)])
def test_there_are_as_many_passes_as_rounds_that_reveal_something(
    lookup: Lookup, rounds: int, hidden: int
) -> None:
    table = np.zeros((1, 40, 3), np.float32)
    start = np.where(np.arange(40) < hidden, 3, 1).astype(np.int32)[None]
    source = Randomness(9, [7])
    uniforms = source.uniforms(Purpose.SCHEDULE, 0, max(1, hidden))[0, :hidden]
    distinct = len(np.unique((uniforms.astype(np.float64) * rounds).astype(np.int64)))
    calls: list[Pass] = []
    answer = lookup(table, 1)

    def counted(request: Pass) -> Result:
        calls.append(request)
        return answer(request)

    sampling = SAMPLING.but(rounds=rounds)
    steps = list(unmask(counted, start, Canvas(40, (40,), 3), sampling, source))
    assert len(calls) == len(steps) == distinct <= min(rounds, hidden)
    assert all(step.revealed.any() for step in steps)


def test_many_rounds_sample_the_joint_of_an_exact_denoiser(lookup: Lookup, bulk: Bulk) -> None:
    # Of 4096 rounds the three tokens share one with probability 0.0007, which cannot be seen.
    joint = np.random.default_rng(0).dirichlet(np.full(8, 0.4)).reshape(2, 2, 2) * 0.9 + 0.1 / 8
    table = np.zeros((27, 3, 2), np.float32)
    for canvas in product(range(3), repeat=3):
        seen = joint[tuple(slice(x, x + 1) if x < 2 else slice(None) for x in canvas)]
        for place in range(3):
            others = tuple(other for other in range(3) if other != place)
            if canvas[place] == 2:
                row = sum(token * 3**index for index, token in enumerate(canvas))
                table[row, place] = np.log(seen.sum(axis=others) / seen.sum())
    drawn = {}
    for rounds in (4096, 1):
        blank = np.full((SAMPLES, 3), 2, np.int32)
        tokens: Tokens = blank
        for step in unmask(
            lookup(table, SAMPLES),
            blank,
            Canvas(3, (3,), 2),
            SAMPLING.but(rounds=rounds),
            bulk(6, SAMPLES),
        ):
            tokens = step.tokens
        drawn[rounds] = np.bincount(tokens @ [4, 2, 1], minlength=8)
    expected = joint.ravel() * SAMPLES
    assert stats.chisquare(drawn[4096], expected).pvalue > FALSE_ALARM
    assert stats.chisquare(drawn[1], expected).pvalue < FALSE_ALARM


def test_samples_of_a_batch_draw_schedules_of_their_own(lookup: Lookup) -> None:
    table = np.random.default_rng(3).normal(size=(7, 12, 4)).astype(np.float32)
    canvas, sampling = Canvas(12, (12,), 4), SAMPLING.but(rounds=6, refresh_interval=2)
    blank = np.full((5, 12), 4, np.int32)
    (*_, together) = unmask(lookup(table, 5), blank, canvas, sampling, Randomness(8, range(5)))
    for index in range(5):
        (*_, alone) = unmask(lookup(table, 1), blank[:1], canvas, sampling, Randomness(8, [index]))
        assert np.array_equal(together.tokens[index], alone.tokens[0])


def test_more_rounds_than_tokens_are_allowed(lookup: Lookup) -> None:
    table = np.zeros((1, 3, 2), np.float32)
    blank = np.full((1, 3), 2, np.int32)
    sampling = SAMPLING.but(rounds=1000)
    (*_, last) = unmask(lookup(table, 1), blank, Canvas(3, (3,), 2), sampling, Randomness(1, [0]))
    assert last.hidden == 0
