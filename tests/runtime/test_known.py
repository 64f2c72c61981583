"""Known orders: only what is revealed is drawn, and only what changed is recomputed."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from mdruntime.head import Draws, draw
from mdruntime.order import HYBRID, ORDERS
from mdruntime.randomness import Purpose, Randomness
from mdruntime.sampler import Canvas, Denoise, Pass, Result, Step, unmask
from mdruntime.sampling import Sampling

KNOWN = [name for name, order in ORDERS.items() if order.known]
LENGTH, CODEBOOK = 16, 8
# Rows of a known order as a share of recomputing everything; published schedules.
SHARES = {
    "v1 8/256": ("v1-arccos", 8, (16, 16), 0.226),
    "v1 32/256": ("v1-arccos", 32, (16, 16), 0.061),
    "v1 15/1024": ("v1-arccos", 15, (32, 32), 0.126),
    "google 16/256": ("cosine", 16, (16, 16), 0.119),
    "MAGE 20/256": ("cosine", 20, (16, 16), 0.096),
    "Halton 32/256": ("halton", 32, (16, 16), 0.057),
    "Halton 32/576": ("halton", 32, (24, 24), 0.058),
    "TiTok 8/32": ("arccos", 8, (32,), 0.211),
    "TiTok 64/128": ("arccos", 64, (128,), 0.030),
    "aMUSEd 12/256": ("cosine", 12, (16, 16), 0.156),
    "MaskBit 64/512": ("arccos", 64, (16, 32), 0.030),
    "LLaDA 128/128": ("linear", 128, (128,), 0.016),
}

Lookup = Callable[[NDArray[np.float32], int], Denoise]


def recorded(denoise: Denoise) -> tuple[Denoise, list[Pass]]:
    requests: list[Pass] = []

    def answer(request: Pass) -> Result:
        requests.append(request)
        return denoise(request)

    return answer, requests


def blank_answer(request: Pass) -> Result:
    zeros = np.zeros(request.wanted.shape, np.float32)
    return Result(Draws(zeros.astype(np.int32), *[zeros] * 6))


@pytest.mark.parametrize("order", ["halton", "random"])
@pytest.mark.parametrize("name", SHARES)
def test_known_orders_ask_for_as_few_rows_as_tabled(name: str, order: str) -> None:
    schedule, rounds, grid, share = SHARES[name]
    length = int(np.prod(grid))
    sampling = Sampling(
        schedule=schedule, rounds=rounds, order=order, refresh="recent", refresh_interval=rounds
    )
    denoise, requests = recorded(blank_answer)
    blank = np.full((1, length), 9, np.int32)
    list(unmask(denoise, blank, Canvas(length, grid, 9), sampling, Randomness(0, [0])))
    first, *partial = requests
    assert first.positions is None
    rows = [request.tokens.shape[1] for request in partial]
    assert all(request.positions is not None for request in partial)
    # The first pass has to fill the caches; the rows whose tokens are needed are the table's.
    found = (first.wanted.shape[1] + sum(rows)) / (rounds * length)
    assert found == pytest.approx(share, abs=1e-3)
    assert sum(request.wanted.shape[1] for request in requests) == length


def run(
    denoise: Denoise, sampling: Sampling, samples: Sequence[int], hidden: Sequence[int]
) -> list[Step]:
    start = np.where(np.arange(LENGTH) < np.array(hidden)[:, None], CODEBOOK, 3).astype(np.int32)
    canvas = Canvas(LENGTH, (4, 4), CODEBOOK)
    return list(unmask(denoise, start, canvas, sampling, Randomness(5, samples)))


PLANS = [
    {},
    {"substeps": 3},
    {"refresh_interval": 3, "refresh": "recent"},
    {"schedule": "ancestral", "rounds": 9, "refresh_interval": 2},
]
ALL_KNOWN = [
    *[{"order": name} for name in KNOWN],
    {"order": HYBRID, "exploitation_order": "halton-1d"},
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("order", ALL_KNOWN, ids=str)
def test_tokens_are_drawn_where_they_are_revealed_and_nowhere_else(
    toy: Callable[[int], Denoise], order: dict[str, str], plan: dict[str, str | int]
) -> None:
    sampling = Sampling(rounds=5, alpha=1.0).but(**order, **plan)
    assert sampling.known
    denoise, requests = recorded(toy(3))
    steps = run(denoise, sampling, range(3), [16, 7, 12])
    for step, request in zip(steps, requests, strict=True):
        for row, sample in enumerate(request.samples):
            revealed = set(np.flatnonzero(step.revealed[sample]))
            # A sample without a part repeats its last one, and nothing is revealed.
            assert not revealed or set(request.wanted[row].tolist()) == revealed


@pytest.mark.parametrize("order", ALL_KNOWN, ids=str)
def test_tokens_are_those_of_drawing_everywhere(lookup: Lookup, order: dict[str, str]) -> None:
    table = np.random.default_rng(0).normal(0, 2, (97, LENGTH, CODEBOOK)).astype(np.float32)
    sampling = Sampling(rounds=5, alpha=1.0).but(**order)
    denoise, requests = recorded(lookup(table, 2))
    source = Randomness(5, range(2))
    digits = np.array([(CODEBOOK + 1) ** place % 97 for place in range(LENGTH)])
    for index, step in enumerate(run(denoise, sampling, range(2), [16, 16])):
        request = requests[index]
        logits = table[request.tokens.astype(np.int64) @ digits % 97]
        uniforms = source.uniforms(Purpose.TOKEN, index << 16, LENGTH)
        everywhere = draw(logits, request.controls, uniforms).sampled
        assert np.array_equal(step.tokens[step.revealed], everywhere[step.revealed])
        assert step.revealed.any(axis=1).all()


@pytest.mark.parametrize("order", ["moment", "maskgit", "titok", "entropy"])
def test_other_orders_draw_at_every_hidden_position(
    toy: Callable[[int], Denoise], order: str
) -> None:
    denoise, requests = recorded(toy(2))
    steps = run(denoise, Sampling(order=order, rounds=4), range(2), [16, 16])
    before = np.ones((2, LENGTH), bool)
    for step, request in zip(steps, requests, strict=True):
        for row, hidden in zip(request.wanted, before, strict=True):
            assert row.tolist() == np.flatnonzero(hidden).tolist()
        before &= ~step.revealed
