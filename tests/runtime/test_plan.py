import math
from collections.abc import Sequence
from itertools import chain, product

import numpy as np
import pytest

from mdruntime.plan import Plan, make_plan, pass_rows, split
from mdruntime.schedule import ANCESTRAL, SCHEDULES, hidden_counts

ROUNDS = (1, 2, 3, 5, 8, 16)
FIXED = [name for name in SCHEDULES if name != ANCESTRAL]
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


def planned(schedule: str, rounds: int, hidden: int, **options: int) -> Plan:
    return make_plan(hidden, hidden_counts(schedule, rounds, hidden), **options)


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


@pytest.mark.parametrize("schedule", FIXED)
def test_plans_reveal_what_the_schedule_says(schedule: str) -> None:
    for rounds, substeps, hidden in product((1, 4, 9), (1, 2, 5), (1, 3, 40, 64)):
        plan = planned(schedule, rounds, hidden, substeps=substeps)
        left = hidden - np.cumsum([sum(parts) for parts in plan])
        assert left.tolist() == hidden_counts(schedule, rounds, hidden).tolist()
        assert all(len(parts) == min(substeps, sum(parts)) for parts in plan)


@pytest.mark.parametrize("interval", [1, 2, 3, 8, 100])
def test_rounds_that_share_a_full_pass_keep_their_parts(interval: int) -> None:
    plain = planned("cosine", 8, 64, substeps=2)
    shared = planned("cosine", 8, 64, substeps=2, refresh_interval=interval)
    assert list(chain(*shared)) == list(chain(*plain))
    assert len(shared) == math.ceil(8 / interval)
    assert [len(parts) for parts in shared[:-1]] == [2 * interval] * (len(shared) - 1)


def test_plans_of_the_three_kinds_look_as_documented() -> None:
    kinds = [
        planned("v1-arccos", 8, 256)[1:3],
        planned("v1-arccos", 8, 256, substeps=3)[1:3],
        planned("v1-arccos", 8, 256, refresh_interval=2)[1:2],
    ]
    assert kinds == [[[18], [26]], [[6, 6, 6], [8, 9, 9]], [[26, 32]]]


def test_a_canvas_without_hidden_tokens_has_no_plan() -> None:
    assert planned("cosine", 8, 0, substeps=3) == []


def test_partial_passes_recompute_the_chosen_or_the_recent_rows() -> None:
    plan = [[3, 2, 2], [4], [5, 1]]
    assert pass_rows(plan, "chosen", 100) == [100, 7, 7, 100, 100, 6]
    assert pass_rows(plan, "recent", 100) == [100, 5, 4, 100, 100, 6]


@pytest.mark.parametrize("schedule", FIXED)
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_recomputing_the_chosen_rows_costs_parts_minus_one_full_passes(
    schedule: str, parts: int
) -> None:
    # parts * T effective steps for T + parts - 1 full passes, whatever T is.
    for rounds in ROUNDS:
        counts = [sum(part) for part in planned(schedule, rounds, 1024)]
        cost = full_pass_equivalents(counts, parts, "chosen")
        assert rounds < cost <= rounds + parts - 1 + 1e-12
        if min(counts) >= parts:
            assert cost == pytest.approx(rounds + parts - 1)


@pytest.mark.parametrize("schedule", FIXED)
@pytest.mark.parametrize("parts", [2, 3, 7, 1024])
def test_recomputing_the_recent_rows_costs_one_to_two_full_passes(
    schedule: str, parts: int
) -> None:
    for rounds in ROUNDS:
        counts = [sum(part) for part in planned(schedule, rounds, 1024)]
        cost = full_pass_equivalents(counts, parts, "recent")
        lone = counts.count(1) / 1024  # a round of one position has no partial pass
        assert rounds + 1 - lone <= cost <= rounds + 2
        assert cost <= full_pass_equivalents(counts, parts, "chosen") + 1e-12


@pytest.mark.parametrize(("key", "share"), KNOWN_ORDER_SHARES.items())
def test_known_orders_need_few_rows(key: tuple[str, int, int], share: float) -> None:
    schedule, rounds, length = key
    (counts,) = planned(schedule, rounds, length, refresh_interval=rounds)
    _, *partial = pass_rows([counts], "recent", length)
    assert (counts[0] + sum(partial)) / (rounds * length) == pytest.approx(share, abs=1e-3)
