import re
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from mdruntime.errors import SamplingError
from mdruntime.guidance import GUIDANCE_SCHEDULES, guidance_weights, weight_from_scale
from mdruntime.halton import halton_grid, halton_line
from mdruntime.head import draw
from mdruntime.randomness import Randomness
from mdruntime.sampler import Canvas, Pass, Result, unmask
from mdruntime.sampling import Sampling
from mdruntime.schedule import ANCESTRAL, SCHEDULES, hidden_counts
from mdruntime.turn import BETA_CAP, Clock, Turn

# Printed by the published samplers: valeoai MaskGIT v1.0 (``adap_sche``), valeoai Halton-MaskGIT,
# google-research/maskgit, MAGE, aMUSEd, TiTok and MaskBit.
REVEALED = {
    ("v1-arccos", 8, 256): "1 18 26 32 38 43 48 50",
    ("v1-arccos", 12, 256): "1 9 13 17 19 22 24 26 28 30 32 35",
    ("v1-arccos", 16, 256): "1 6 9 10 12 14 15 16 18 19 20 21 22 23 25 25",
    ("v1-arccos", 15, 1024): "1 26 38 46 54 61 67 73 79 84 89 94 99 104 109",
    ("v1-arccos", 32, 256): (
        "1 2 3 4 4 5 5 6 6 6 7 7 7 8 8 8 9 9 9 9 10 10 10 11 11 11 11 12 12 12 12 11"
    ),
    ("v1-root", 8, 256): "1 7 14 22 30 41 55 86",
    ("v1-linear", 8, 256): "1 9 18 27 37 46 55 63",
    ("v1-square", 8, 256): "1 13 24 34 41 46 49 48",
    ("v1-cosine", 8, 256): "1 12 22 32 41 47 51 50",
}
CUMULATED = {
    ("halton", 32, 256): (
        "5 10 15 20 25 30 35 41 46 51 57 62 68 73 79 85 91 97 103 110 116 123 130 138 146 154 163 "
        "173 184 198 215 256"
    ),
    ("halton", 32, 576): (
        "11 22 34 45 57 69 80 92 104 116 128 140 153 166 178 191 205 219 233 247 262 277 294 310 "
        "328 347 368 390 415 445 484 576"
    ),
    ("halton", 8, 256): "20 41 62 85 110 138 173 256",
}
# The published cosine lists end in 1, which they ignore: the last round reveals all. Ours end in 0.
MASKED = {
    ("cosine", 8, 256): "251 236 212 181 142 97 49 0",
    ("cosine", 12, 256): "253 247 236 221 203 181 155 128 97 66 33 0",
    ("cosine", 16, 256): "254 251 244 236 225 212 197 181 162 142 120 97 74 49 25 0",
    ("cosine", 20, 256): (
        "255 252 248 243 236 228 218 207 194 181 166 150 133 116 97 79 59 40 20 0"
    ),
    ("cosine", 12, 1024): "1015 989 946 886 812 724 623 512 391 265 133 0",
    ("arccos", 8, 32): "29 26 24 21 18 14 10 0",
    ("arccos", 8, 64): "58 53 48 42 36 29 20 0",
}
MASKED_ENDS = {
    ("arccos", 64, 128): ("126 125 124 122", "28 25 20 14 0"),
    ("arccos", 64, 512): ("506 501 496 491", "100 81 57 0"),
}
HALTON = {  # size: first cells, last cells, CRC-32 of the order as little-endian int32
    16: (
        "(8,5)(4,10)(12,1)(2,7)(10,12)(6,3)(14,8)(1,14)(9,0)(5,5)(13,11)(3,2)",
        "(1,9)(13,6)(11,6)",
        4008065389,
    ),
    24: (
        "(12,8)(6,16)(18,2)(3,10)(15,18)(9,5)(21,13)(1,21)(13,0)(7,8)(19,16)(4,3)",
        "(16,20)(2,11)(14,19)",
        1268073686,
    ),
    32: ("(16,10)(8,21)(24,3)(4,14)(20,24)(12,7)", "(25,27)(5,9)", 1381490986),
}
MASK_RATIOS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "cosine": lambda done: np.cos(np.pi * done / 2),
    "arccos": lambda done: 2 * np.arccos(done) / np.pi,
    "linear": lambda done: 1 - done,
    "square": lambda done: 1 - done**2,
    "root": lambda done: 1 - done**0.5,
}
FIXED = [name for name in SCHEDULES if name != ANCESTRAL]
EVERY_LENGTH = range(1, 120)


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split()]


@pytest.mark.parametrize(("key", "golden"), REVEALED.items())
def test_reveal_counts_are_those_of_valeoai_v1(key: tuple[str, int, int], golden: str) -> None:
    left = hidden_counts(*key)
    assert (-np.diff(left, prepend=key[2])).tolist() == numbers(golden)


@pytest.mark.parametrize(("key", "golden"), CUMULATED.items())
def test_cumulated_counts_are_those_of_the_halton_sampler(
    key: tuple[str, int, int], golden: str
) -> None:
    assert (key[2] - hidden_counts(*key)).tolist() == numbers(golden)


@pytest.mark.parametrize(("key", "golden"), MASKED.items())
def test_masked_counts_are_the_published_ones(key: tuple[str, int, int], golden: str) -> None:
    assert hidden_counts(*key).tolist() == numbers(golden)


@pytest.mark.parametrize(("key", "golden"), MASKED_ENDS.items())
def test_long_schedules_start_and_end_as_published(
    key: tuple[str, int, int], golden: tuple[str, str]
) -> None:
    first, last = map(numbers, golden)
    left = hidden_counts(*key).tolist()
    assert left[: len(first)] == first
    assert left[-len(last) :] == last


@pytest.mark.parametrize("size", HALTON)
def test_halton_order_is_the_published_one(size: int) -> None:
    first, last, checksum = HALTON[size]
    order = halton_grid(size, size)
    cells = "".join(f"({cell // size},{cell % size})" for cell in order)
    assert cells.startswith(first)
    assert cells.endswith(last)
    assert zlib.crc32(order.astype("<i4").tobytes()) == checksum


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (5, 1), (3, 8), (64, 48), (100, 1)])
def test_halton_order_lists_every_cell_once(height: int, width: int) -> None:
    assert sorted(halton_grid(height, width)) == list(range(height * width))


@pytest.mark.parametrize("length", [1, 2, 13, 1024, 12_345])
def test_line_order_lists_every_position_once(length: int) -> None:
    assert sorted(halton_line(length)) == list(range(length))


def test_line_order_of_a_power_of_two_is_bit_reversal_from_one() -> None:
    reversal = [int(f"{index:04b}"[::-1], 2) for index in range(16)]
    assert halton_line(16).tolist() == [*reversal[1:], 0]


@pytest.mark.parametrize("name", FIXED)
def test_schedules_fall_strictly_to_zero(name: str) -> None:
    for hidden in EVERY_LENGTH:
        for rounds in range(1, hidden + 1):
            left = hidden_counts(name, rounds, hidden)
            assert len(left) == rounds
            assert left[-1] == 0
            assert np.all(np.diff(left, prepend=hidden) < 0), (rounds, hidden)


@pytest.mark.parametrize("name", FIXED)
def test_schedules_are_no_longer_than_there_are_hidden_tokens(name: str) -> None:
    for hidden in EVERY_LENGTH:
        shortened = hidden_counts(name, hidden + 5, hidden)
        assert shortened.tolist() == list(range(hidden))[::-1]


@pytest.mark.parametrize("name", FIXED)
def test_a_canvas_without_hidden_tokens_has_no_rounds(name: str) -> None:
    assert hidden_counts(name, 8, 0).shape == (0,)


@pytest.mark.parametrize("name", MASK_RATIOS)
def test_mask_ratios_leave_the_floor_of_their_share(name: str) -> None:
    # floor(N * ratio(r / T)) as in Google's code, where N is large enough for every round.
    wished = np.floor(4096 * MASK_RATIOS[name](np.arange(1, 13) / 12))
    assert hidden_counts(name, 12, 4096)[:-1].tolist() == wished[:-1].tolist()


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(SamplingError, match=r"schedule must be one of cosine, .*, got 'sine'"):
        hidden_counts("sine", 8, 256)


@pytest.mark.parametrize("rounds", [0, -3])
def test_less_than_one_round_is_refused(rounds: int) -> None:
    with pytest.raises(SamplingError, match=re.escape(f"at least 1, got {rounds}")):
        hidden_counts("cosine", rounds, 256)


def turn_of(sampling: Sampling, rounds: int, index: int) -> Turn:
    """Return round ``index`` of a trajectory that reveals one token a round."""
    clock = Clock(sampling, np.array([rounds]), [np.arange(rounds)[::-1]])
    return clock.turn(np.array([0]), np.array([rounds - index]))


def test_choice_temperature_falls_linearly_to_zero() -> None:
    alphas = [turn_of(Sampling(alpha=4.0), 8, index).alpha[0] for index in range(8)]
    assert alphas == pytest.approx([3.5, 3, 2.5, 2, 1.5, 1, 0.5, 0])


def test_without_annealing_the_choice_temperature_stays() -> None:
    sampling = Sampling(alpha=4.0, annealing="none")
    assert {turn_of(sampling, 8, index).alpha[0] for index in range(8)} == {4.0}


@pytest.mark.parametrize(("alpha", "tau"), [(1.0, 0.5), (4.5, 0.818), (6.0, 0.857), (1000.0, 1.0)])
def test_tokens_have_the_implicit_temperature(alpha: float, tau: float) -> None:
    turn = turn_of(Sampling(alpha=alpha, annealing="none"), 2, 0)
    assert 1 / turn.controls.token_beta[0] == pytest.approx(tau, abs=1e-3)
    assert turn.controls.token_beta[0] == turn.controls.beta[0]


def test_the_last_round_draws_from_the_plain_denoiser() -> None:
    sampling = Sampling(alpha=1.0, annealing="none")
    betas = [turn_of(sampling, 3, index).controls.token_beta[0] for index in range(3)]
    assert betas == [2, 2, 1]


@pytest.mark.parametrize(("alpha", "token_beta"), [(0.0, 1.0), (1e-3, BETA_CAP), (1.0, 2.0)])
def test_exponents_are_capped_and_tokens_at_zero_temperature_plain(
    alpha: float, token_beta: float
) -> None:
    turn = turn_of(Sampling(alpha=alpha, annealing="none"), 2, 0)
    assert turn.controls.token_beta[0] == token_beta
    assert turn.controls.beta[0] == min(BETA_CAP, 1 + 1 / alpha if alpha else np.inf)


def test_samples_with_fewer_rounds_anneal_on_their_own_clock() -> None:
    schedules = [np.array([1, 0]), np.array([3, 2, 1, 0])]
    clock = Clock(Sampling(alpha=1.0), np.array([2, 4]), schedules)
    turn = clock.turn(np.array([0, 1]), np.array([1, 3]))
    assert turn.alpha.tolist() == [0, 0.5]


def test_passes_that_share_a_full_pass_keep_the_numbers_of_their_own_rounds() -> None:
    betas: list[float] = []

    def denoise(request: Pass) -> Result:
        betas.append(float(request.controls.token_beta[0]))
        logits = np.zeros((*request.wanted.shape, 3), np.float32)
        return Result(draw(logits, request.controls, request.uniforms))

    blank, canvas = np.full((1, 4), 3, np.int32), Canvas(4, (4,), 3)
    sampling = Sampling(order="temperature", rounds=4, schedule="linear", alpha=2.0)
    expected = [1 + 1 / 1.5, 1 + 1 / 1.0, 1 + 1 / 0.5, 1.0]
    for interval in (1, 2, 4):
        betas.clear()
        list(
            unmask(
                denoise, blank, canvas, sampling.but(refresh_interval=interval), Randomness(0, [0])
            )
        )
        assert betas == pytest.approx(expected)


def test_under_an_entropy_bound_the_revealed_share_tells_the_time() -> None:
    sampling = Sampling(alpha=4.0, rounds=4, entropy_bound=1.0)
    clock = Clock(sampling, np.full(5, 16), [np.zeros(0, np.int64)] * 5)
    turn = clock.turn(np.arange(5), np.array([16, 13, 12, 8, 1]))
    assert turn.alpha.tolist() == [3, 3, 2, 1, 0]


def test_power_cosine_guidance_is_that_of_titok() -> None:
    at = np.array([0, 1, 8, 16, 32, 48, 63])
    weights = guidance_weights("power-cosine", weight_from_scale(6.9), at, np.full(7, 64))
    golden = [1.0, 1.0, 1.0001, 1.0036, 1.2246, 3.2332, 6.8691]
    assert 1 + weights == pytest.approx(golden, abs=5e-5)


def test_linear_guidance_rises_from_zero_in_the_first_round_to_w_in_the_last() -> None:
    weights = guidance_weights("linear", 3.0, np.arange(7), np.full(7, 7))
    assert weights == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5, 3])


@pytest.mark.parametrize("schedule", GUIDANCE_SCHEDULES)
def test_rounds_outside_the_guidance_interval_have_no_guidance(schedule: str) -> None:
    turn, turns = np.arange(9), np.full(9, 9)
    always = guidance_weights(schedule, 2.0, turn, turns)
    inside = guidance_weights(schedule, 2.0, turn, turns, interval=(0.25, 0.75))
    assert inside.tolist() == [0, 0, *always[2:7], 0, 0]


@pytest.mark.parametrize("schedule", GUIDANCE_SCHEDULES)
def test_a_single_round_is_both_first_and_last(schedule: str) -> None:
    weight = guidance_weights(schedule, 2.0, np.array([0]), np.array([1]))
    rises_later = schedule in ("power-cosine", "linear-open")  # TiTok: 0 in the first
    assert weight.tolist() == ([0] if rises_later else [2])
