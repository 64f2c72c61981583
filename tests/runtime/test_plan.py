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
from mdruntime.plan import make_plan, pass_rows, split
from mdruntime.randomness import Randomness
from mdruntime.sampler import Canvas, Denoise, Pass, Result, Step, Tokens, unmask
from mdruntime.sampling import Sampling
from mdruntime.schedule import SCHEDULES, hidden_counts

CANVAS = Canvas(length=16, grid=(4, 4), mask_token=8)
REFRESH = ("chosen", "recent")
ROUNDS = (1, 2, 3, 5, 8, 16)
OUT_OF_RANGE: list[tuple[str, Any, str]] = [
    ("rounds", 2.5, "a whole number, got 2.5"),
    ("alpha", "4", "a number, got '4'"),
    ("exploitation_order", "hybrid", "one of moment, .*, got 'hybrid'"),
    ("exploration_order", "moment", "one of temperature, .*, got 'moment'"),
    ("rounds", 0, "between 1 and 4096, got 0"),
    ("rounds", 4097, "between 1 and 4096, got 4097"),
    ("rounds", math.nan, "a whole number, got nan"),
    ("substeps", 0, "between 1 and 4096, got 0"),
    ("substeps", 5000, "between 1 and 4096, got 5000"),
    ("refresh_interval", 0, "between 1 and 4096, got 0"),
    ("refresh_interval", 4097, "between 1 and 4096, got 4097"),
    ("alpha", -0.1, "between 0 and 1000, got -0.1"),
    ("alpha", math.inf, "between 0 and 1000, got inf"),
    ("entropy_bound", -1, r"between 0 and 1e\+06, got -1"),
    ("entropy_bound", 1e7, r"between 0 and 1e\+06, got 1e\+07"),
    ("temperature", 0, "between 0.01 and 100, got 0"),
    ("temperature", 101, "between 0.01 and 100, got 101"),
    ("guidance", -1, "between 0 and 100, got -1"),
    ("guidance", 100.5, "between 0 and 100, got 100.5"),
    ("guidance_power", -3, "between 0 and 100, got -3"),
    ("guidance_power", 1000, "between 0 and 100, got 1000"),
    ("exploration", (-0.1, 1), "between 0 and 1, got -0.1:1"),
    ("exploration", (0, math.nan), "between 0 and 1, got 0:nan"),
    ("guidance_interval", (0, 1.5), "between 0 and 1, got 0:1.5"),
    ("schedule", "sine", "one of cosine, .*v1-root, got 'sine'"),
    ("guidance_schedule", "rising", "one of constant, linear, power-cosine, got 'rising'"),
    ("refresh", "all", "one of chosen, recent, got 'all'"),
    ("tokens", "best", "one of order, plain, tempered, got 'best'"),
    ("order", "best", "one of moment, .*, hybrid, got 'best'"),
]
# Rows of a known order as a share of recomputing everything, Halton-MaskGIT and others.
KNOWN_ORDER_SHARES = {
    ("v1-arccos", 8, 256): 0.226,
    ("v1-arccos", 32, 256): 0.061,
    ("v1-arccos", 15, 1024): 0.126,
    ("cosine", 16, 256): 0.119,
    ("cosine", 20, 256): 0.096,
    ("halton", 32, 256): 0.057,
    ("halton", 32, 576): 0.058,
    ("arccos", 8, 32): 0.211,
    ("arccos", 64, 128): 0.030,
    ("cosine", 12, 256): 0.156,
    ("arccos", 64, 512): 0.030,
}


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


def full_pass_equivalents(counts: Sequence[int], parts: int, refresh: str) -> float:
    plan = [split(count, parts) for count in counts]
    return sum(pass_rows(plan, refresh, sum(counts))) / sum(counts)


def test_parts_sum_up_and_are_even_and_never_empty() -> None:
    for count, parts in product(range(1, 60), range(1, 60)):
        sizes = split(count, parts)
        assert sum(sizes) == count
        assert len(sizes) == min(parts, count)
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_plans_reveal_what_the_schedule_says(schedule: str) -> None:
    for rounds, substeps, hidden in product((1, 4, 9), (1, 2, 5), (1, 3, 40, 64)):
        plan = make_plan(schedule, rounds, hidden, substeps=substeps)
        left = hidden - np.cumsum([sum(parts) for parts in plan])
        assert left.tolist() == hidden_counts(schedule, rounds, hidden).tolist()
        assert all(len(parts) == min(substeps, sum(parts)) for parts in plan)


@pytest.mark.parametrize("interval", [1, 2, 3, 8, 100])
def test_rounds_that_share_a_full_pass_keep_their_parts(interval: int) -> None:
    plain = make_plan("cosine", 8, 64, substeps=2)
    shared = make_plan("cosine", 8, 64, substeps=2, refresh_interval=interval)
    assert list(chain(*shared)) == list(chain(*plain))
    assert len(shared) == math.ceil(8 / interval)
    assert [len(parts) for parts in shared[:-1]] == [2 * interval] * (len(shared) - 1)


def test_plans_of_the_three_kinds_look_as_documented() -> None:
    kinds = [
        make_plan("v1-arccos", 8, 256)[1:3],
        make_plan("v1-arccos", 8, 256, substeps=3)[1:3],
        make_plan("v1-arccos", 8, 256, refresh_interval=2)[1:2],
    ]
    assert kinds == [[[18], [26]], [[6, 6, 6], [8, 9, 9]], [[26, 32]]]


def test_a_canvas_without_hidden_tokens_has_no_plan() -> None:
    assert make_plan("cosine", 8, 0, substeps=3) == []


def test_partial_passes_recompute_the_chosen_or_the_recent_rows() -> None:
    plan = [[3, 2, 2], [4], [5, 1]]
    assert pass_rows(plan, "chosen", 100) == [100, 7, 7, 100, 100, 6]
    assert pass_rows(plan, "recent", 100) == [100, 5, 4, 100, 100, 6]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_recomputing_the_chosen_rows_costs_parts_minus_one_full_passes(
    schedule: str, parts: int
) -> None:
    # parts * T effective steps for T + parts - 1 full passes, whatever T is.
    for rounds in ROUNDS:
        counts = [sum(part) for part in make_plan(schedule, rounds, 1024)]
        cost = full_pass_equivalents(counts, parts, "chosen")
        assert rounds < cost <= rounds + parts - 1 + 1e-12
        if min(counts) >= parts:
            assert cost == pytest.approx(rounds + parts - 1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("parts", [2, 3, 7, 1024])
def test_recomputing_the_recent_rows_costs_one_to_two_full_passes(
    schedule: str, parts: int
) -> None:
    for rounds in ROUNDS:
        counts = [sum(part) for part in make_plan(schedule, rounds, 1024)]
        cost = full_pass_equivalents(counts, parts, "recent")
        lone = counts.count(1) / 1024  # a round of one position has no partial pass
        assert rounds + 1 - lone <= cost <= rounds + 2
        assert cost <= full_pass_equivalents(counts, parts, "chosen") + 1e-12


@pytest.mark.parametrize(("key", "share"), KNOWN_ORDER_SHARES.items())
def test_known_orders_need_few_rows(key: tuple[str, int, int], share: float) -> None:
    schedule, rounds, length = key
    (counts,) = make_plan(schedule, rounds, length, refresh_interval=rounds)
    _, *partial = pass_rows([counts], "recent", length)
    assert (counts[0] + sum(partial)) / (rounds * length) == pytest.approx(share, abs=1e-3)


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
        plan = make_plan(schedule, rounds, hidden, substeps=substeps, refresh_interval=interval)
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


@pytest.mark.parametrize("order", [name for name in ORDERS if name != "maskgit"])
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
            entropies.append(result.draws.entropy[0].astype(np.float64))
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


@pytest.mark.parametrize(("field", "value", "expected"), OUT_OF_RANGE)
def test_options_out_of_range_are_refused_by_name(field: str, value: Any, expected: str) -> None:
    with pytest.raises(SamplingError, match=f"^{field} must be {expected}$"):
        Sampling(**{field: value})


def test_the_guidance_interval_must_rise() -> None:
    with pytest.raises(SamplingError, match=r"guidance_interval must rise, got 0\.8:0\.2"):
        Sampling(guidance_interval=(0.8, 0.2))


@pytest.mark.parametrize(
    "options",
    [
        {"order": "maskgit", "substeps": 2},
        {"order": "maskgit", "refresh_interval": 2},
        {"order": "maskgit", "entropy_bound": 1.0},
        {"order": HYBRID, "exploitation_order": "maskgit"},
    ],
)
def test_maskgit_is_refused_where_positions_must_come_before_tokens(
    options: dict[str, Any],
) -> None:
    with pytest.raises(SamplingError, match="use 'maskgit-exact'"):
        Sampling(**options)


def test_a_hybrid_explores_by_an_order_that_is_known() -> None:
    with pytest.raises(SamplingError, match=r"exploration_order must be .*, got 'entropy'"):
        Sampling(order=HYBRID, exploration_order="entropy")


@pytest.mark.parametrize("tokens", ["plain", "tempered"])
def test_the_exact_order_has_a_token_law_of_its_own(tokens: str) -> None:
    with pytest.raises(SamplingError, match="token law of its own"):
        Sampling(order="maskgit-exact", tokens=tokens)


def test_options_can_be_changed_by_name() -> None:
    assert Sampling().but(rounds=4, order="halton") == Sampling(rounds=4, order="halton")
    with pytest.raises(SamplingError, match="no sampling option 'steps'; there are rounds, "):
        Sampling().but(steps=4)
    with pytest.raises(SamplingError, match="rounds must be"):
        Sampling().but(rounds=0)


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
