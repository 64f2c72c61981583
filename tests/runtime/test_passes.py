"""What the sampler asks of a denoiser, pass by pass, and what it does with the answers."""

import math
import re
from collections.abc import Callable, Sequence
from itertools import chain, pairwise, product
from typing import Any

import numpy as np
import pytest

from mdruntime.choice import bounded_count
from mdruntime.errors import SamplingError, VerificationError
from mdruntime.head import draw
from mdruntime.order import HYBRID, ORDERS
from mdruntime.plan import make_plan, pass_rows
from mdruntime.randomness import Randomness
from mdruntime.sampler import Canvas, Denoise, Pass, Result, Step, Tokens, unmask
from mdruntime.sampling import Sampling
from mdruntime.schedule import hidden_counts

CANVAS = Canvas(length=16, grid=(4, 4), mask_token=8)
REFRESH = ("chosen", "recent")
DRAWS_FIRST = [name for name, order in ORDERS.items() if order.draws_first]


def masked(*hidden: int) -> Tokens:
    """A canvas per count, its last ``hidden`` positions masked, other tokens known."""
    tokens = np.arange(CANVAS.length, dtype=np.int32) % CANVAS.mask_token
    columns = np.arange(CANVAS.length)
    still = columns >= CANVAS.length - np.array(hidden)[:, None]
    return np.where(still, CANVAS.mask_token, tokens).astype(np.int32)


def unmasked(
    denoise: Denoise, tokens: Tokens, sampling: Sampling, indices: Sequence[int] = range(8)
) -> list[Step]:
    randomness = Randomness(1, indices[: len(tokens)])
    return list(unmask(denoise, tokens, CANVAS, sampling, randomness))


def recorded(denoise: Denoise) -> tuple[Denoise, list[Pass]]:
    """A denoiser that keeps the requests it has answered."""
    requests: list[Pass] = []

    def answer(request: Pass) -> Result:
        requests.append(request)
        return denoise(request)

    return answer, requests


def rows(request: Pass) -> int:
    return request.tokens.shape[1]


@pytest.mark.parametrize("refresh", REFRESH)
@pytest.mark.parametrize(("substeps", "interval"), [(1, 1), (3, 1), (1, 4), (2, 3), (16, 16)])
def test_passes_are_as_many_and_as_large_as_planned(
    toy: Callable[[int], Denoise], refresh: str, substeps: int, interval: int
) -> None:
    for hidden, rounds, schedule in product((1, 7, 16), (1, 3, 8), ("cosine", "v1-arccos")):
        sampling = Sampling(
            rounds=rounds,
            schedule=schedule,
            substeps=substeps,
            refresh=refresh,
            refresh_interval=interval,
        )
        denoise, requests = recorded(toy(1))
        steps = unmasked(denoise, masked(hidden), sampling)
        left = hidden_counts(schedule, rounds, hidden)
        plan = make_plan(hidden, left, substeps=substeps, refresh_interval=interval)
        assert list(map(rows, requests)) == pass_rows(plan, refresh, CANVAS.length)
        assert [int(step.revealed.sum()) for step in steps] == list(chain(*plan))
        assert [step.passes for step in steps] == list(range(1, len(requests) + 1))
        assert [(step.round, step.part) for step in steps] == [
            (index, part) for index, parts in enumerate(plan) for part in range(len(parts))
        ]


@pytest.mark.parametrize("refresh", REFRESH)
def test_partial_passes_see_what_was_revealed_and_what_is_next(
    toy: Callable[[int], Denoise], refresh: str
) -> None:
    sampling = Sampling(rounds=2, schedule="linear", substeps=3, refresh=refresh)
    denoise, requests = recorded(toy(3))
    steps = unmasked(denoise, masked(16, 16, 16), sampling)
    for before, step, request in zip(steps, steps[1:], requests[1:], strict=False):
        for row in range(3 if request.positions is not None else 0):
            assert request.positions is not None
            seen = set(request.positions[row])
            recent = set(np.flatnonzero(before.revealed[row] | step.revealed[row]))
            assert seen == recent if refresh == "recent" else seen >= recent
        known = before.tokens
        if request.positions is not None:
            known = np.take_along_axis(known, request.positions, axis=1)
        assert np.array_equal(request.tokens, known)


def test_samples_with_fewer_rows_repeat_one_in_partial_passes(
    toy: Callable[[int], Denoise],
) -> None:
    denoise, requests = recorded(toy(3))
    unmasked(denoise, masked(16, 5, 2), Sampling(rounds=1, substeps=4, refresh="recent"))
    assert [rows(request) for request in requests] == [16, 8, 8, 8]
    positions = [request.positions for request in requests[1:] if request.positions is not None]
    assert [[len(set(row)) for row in block] for block in positions] == [
        [8, 2, 2],
        [8, 2, 1],
        [8, 3, 1],
    ]


@pytest.mark.parametrize("order", [name for name in ORDERS if name not in DRAWS_FIRST])
def test_samples_that_finish_leave_the_batch_at_the_next_full_pass(
    toy: Callable[[int], Denoise], order: str
) -> None:
    denoise, requests = recorded(toy(4))
    unmasked(denoise, masked(1, 16, 0, 3), Sampling(order=order, rounds=6, substeps=2))
    samples = [request.samples.tolist() for request in requests if request.positions is None]
    assert samples == [[0, 1, 3], [1, 3], [1, 3], [1], [1], [1]]
    for before, request in pairwise(requests):
        if request.positions is not None:
            assert np.array_equal(request.samples, before.samples)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(substeps=3, refresh="recent")])
@pytest.mark.parametrize("order", ["moment", "maskgit-exact", "halton", "entropy", HYBRID])
@pytest.mark.parametrize("bound", [0.0, 3.0])
def test_a_sample_does_not_depend_on_others_having_fewer_hidden_tokens(
    toy: Callable[[int], Denoise], sampling: Sampling, order: str, bound: float
) -> None:
    sampling = sampling.but(order=order, entropy_bound=bound)
    counts = (16, 3, 0, 9, 1, 12)
    together = unmasked(toy(6), masked(*counts), sampling)[-1].tokens
    for index, hidden in enumerate(counts):
        steps = unmasked(toy(1), masked(hidden), sampling, [index])
        expected = steps[-1].tokens if steps else masked(hidden)
        assert np.array_equal(together[index], expected[0])


@pytest.mark.parametrize("order", [*ORDERS, HYBRID])
def test_known_tokens_are_never_changed(toy: Callable[[int], Denoise], order: str) -> None:
    start = masked(16, 7, 3, 1)
    before = start.copy()
    known = start != CANVAS.mask_token
    revealed = known.copy()
    for step in unmasked(toy(4), start, Sampling(order=order)):
        assert np.array_equal(step.tokens[known], before[known])
        assert not np.any(step.revealed & revealed)
        revealed |= step.revealed
        assert np.array_equal(step.tokens != CANVAS.mask_token, revealed)
        assert step.hidden == (~revealed).sum()
    assert revealed.all()
    assert np.array_equal(start, before)


def test_a_canvas_without_hidden_tokens_takes_no_pass(toy: Callable[[int], Denoise]) -> None:
    assert unmasked(toy(2), masked(0, 0), Sampling()) == []


def test_entropy_bounds_reveal_as_many_positions_as_they_allow() -> None:
    rng = np.random.default_rng(7)
    for bound in (1e-9, 0.1, 0.5, 2.0, 100.0):
        for size in range(1, 30):
            entropies = rng.gamma(0.5, size=size).astype(np.float32)
            allowed = [
                k
                for k in range(1, size + 1)
                if math.fsum(entropies[:k]) - float(max(entropies[:k])) <= bound
            ]
            assert bounded_count(entropies, bound) == max(allowed, default=1)


@pytest.mark.parametrize("order", ["entropy", "moment", "halton", HYBRID])
@pytest.mark.parametrize("substeps", [1, 2])
def test_rounds_keep_to_the_entropy_bound_and_are_maximal(
    toy: Callable[[int], Denoise], order: str, substeps: int
) -> None:
    bound = 2.5
    sampling = Sampling(order=order, entropy_bound=bound, substeps=substeps)
    denoise = toy(1)
    entropies: list[np.ndarray[Any, Any]] = []

    def measured(request: Pass) -> Result:
        result = denoise(request)
        if request.positions is None:
            entropies.append(np.zeros(16))
            entropies[-1][request.wanted[0]] = result.draws.entropy[0]
        return result

    rounds: dict[int, np.ndarray[Any, Any]] = {}
    for step in unmasked(measured, masked(16), sampling):
        rounds[step.round] = rounds.get(step.round, np.zeros(16, bool)) | step.revealed[0]
    hidden = np.ones(16, bool)
    for found, entropy in zip(rounds.values(), entropies, strict=True):
        taken = entropy[found]
        assert len(taken) == 1 or taken.sum() - taken.max() <= bound
        hidden &= ~found
        if order == "entropy" and hidden.any():
            assert taken.max() <= entropy[hidden].min()
            assert taken.sum() > bound  # what one position more would have cost
    assert len(rounds) > 2


def test_more_rounds_than_tokens_are_refused(toy: Callable[[int], Denoise]) -> None:
    with pytest.raises(SamplingError, match=re.escape("at most 16 (the tokens of the canvas)")):
        unmasked(toy(1), masked(16), Sampling(rounds=17))


@pytest.mark.parametrize(
    "bad", [(math.nan, 0.0), (math.inf, 0.0), (-math.inf, -math.inf)], ids=["nan", "inf", "-inf"]
)
@pytest.mark.parametrize(("at", "round_"), [(1, 1), (3, 1), (5, 2)])
def test_logits_that_are_not_finite_raise(
    toy: Callable[[int], Denoise], bad: tuple[float, float], at: int, round_: int
) -> None:
    # Passes 1, 3 and 5 of this plan are full, partial and full.
    denoise = toy(2)
    answered = 0

    def failing(request: Pass) -> Result:
        nonlocal answered
        answered += 1
        result = denoise(request)
        if answered < at or result.logits is None:
            return result
        logits = result.logits.copy()
        logits[-1, -1] = np.repeat(np.array(bad, np.float32), 4)
        with np.errstate(invalid="ignore"):
            return Result(draw(logits, request.controls, request.uniforms))

    sampling = Sampling(rounds=3, schedule="linear", substeps=4, order="halton")
    with pytest.raises(VerificationError, match=f"NaN or infinite logits in round {round_}"):
        unmasked(failing, masked(16, 16), sampling)


@pytest.mark.parametrize("field", ["log_moment", "entropy"])
def test_what_orders_rank_by_must_be_finite(toy: Callable[[int], Denoise], field: str) -> None:
    denoise = toy(1)

    def failing(request: Pass) -> Result:
        draws = denoise(request).draws
        spoiled: dict[str, Any] = {field: np.full_like(draws.entropy, np.nan)}
        return Result(draws._replace(**spoiled))

    with pytest.raises(VerificationError, match="NaN or infinite logits in round 1"):
        unmasked(failing, masked(16), Sampling())


def test_the_exact_order_without_logits_is_refused(toy: Callable[[int], Denoise]) -> None:
    denoise = toy(1)
    with pytest.raises(SamplingError, match="needs logits"):
        unmasked(
            lambda request: Result(denoise(request).draws),
            masked(16),
            Sampling(order="maskgit-exact"),
        )


@pytest.mark.parametrize("order", [*ORDERS, HYBRID])
def test_logits_are_asked_for_by_the_exact_order_only(
    toy: Callable[[int], Denoise], order: str
) -> None:
    denoise, requests = recorded(toy(1))
    unmasked(denoise, masked(16), Sampling(order=order))
    assert {request.logits for request in requests} == {order == "maskgit-exact"}
