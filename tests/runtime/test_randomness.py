import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from mdruntime.randomness import Purpose, Randomness

FALSE_ALARM = 1e-6
WORD = 1 << 64

# The stream of seed 7. It must never change: the same seed would give other images.
GOLDEN_BITS = {  # (sample index, purpose, turn): the first five numbers
    (0, Purpose.TOKEN, 0): (
        "df4034b829e9fba4 4b9d10cdf8e64087 6b8b857e506aac98 67c7c945b1ba6e52 15352da77ecee8e6"
    ),
    (0, Purpose.TOKEN, 1): (
        "1a52389b25876b0c 9673c1acf8bf8d93 fabda641f56f807e 859ac3f2f92a024e ebc19cd5b89f20f6"
    ),
    (0, Purpose.POSITION, 0): (
        "df9a705d89512db7 d8382cc966cdbd33 1c05f73f67992c97 a28b9edf4b5ded42 6e5f8636a25678f0"
    ),
    (3, Purpose.PERMUTATION, 1): (
        "7ee38d2b9286456d a3f996e31c51d42e 5ef30a55b0c250a4 8c077e88c9413055 448e61a7e0e9ab04"
    ),
    (2**63 + 1, Purpose.REDRAW, 5 << 16 | 2): (
        "da9d6835333bc1bf 8f5f8958a47e4785 c29393de426927f3 3751d8a21b99c1b0 726d1baa2b565244"
    ),
}
GOLDEN_UNIFORMS = [14630964, 4955408, 7048069, 6801353, 1389869]  # times 2**-24
GOLDEN_GUMBELS = [
    2.000230829954956,
    1.7785452204286385,
    -0.7939608232778658,
    0.7891733074944483,
    0.17279433871098115,
]


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox 4x64-10, after Salmon et al. 2011, section 3.3 and table 2."""
    words, (first, second) = list(counter), key
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * words[0], WORD)
        high1, low1 = divmod(0xCA5A826395121157 * words[2], WORD)
        words = [high1 ^ words[1] ^ first, low1, high0 ^ words[3] ^ second, low0]
        first = (first + 0x9E3779B97F4A7C15) % WORD
        second = (second + 0xBB67AE8584CAA73B) % WORD
    return words


def reference_bits(seed: int, index: int, purpose: int, turn: int, count: int) -> list[int]:
    blocks = (philox([block, purpose, turn, 0], [seed, index]) for block in itertools.count(1))
    return list(itertools.islice(itertools.chain.from_iterable(blocks), count))


class Constant(Randomness):
    """Every bit pattern is the seed's."""

    def bits(self, purpose: Purpose, turn: int, count: int) -> NDArray[np.uint64]:
        return np.full((len(self), count), self.seed, np.uint64)


def hexadecimal(words: Sequence[int]) -> str:
    return " ".join(f"{word:016x}" for word in words)


def test_the_reference_philox_passes_the_published_known_answers() -> None:
    # The lines "philox4x64 10" of kat_vectors in the Random123 distribution.
    zeros = "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"
    ones = "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"
    assert hexadecimal(philox([0] * 4, [0] * 2)) == zeros
    assert hexadecimal(philox([WORD - 1] * 4, [WORD - 1] * 2)) == ones


@pytest.mark.parametrize(("address", "golden"), GOLDEN_BITS.items())
def test_bits_never_change(address: tuple[int, Purpose, int], golden: str) -> None:
    index, purpose, turn = address
    assert hexadecimal(Randomness(7, [index]).bits(purpose, turn, 5)[0].tolist()) == golden


def test_uniforms_and_gumbels_never_change() -> None:
    randomness = Randomness(7, [0])
    uniforms = randomness.uniforms(Purpose.TOKEN, 0, 5)[0] * np.float32(2**24)
    assert uniforms.tolist() == GOLDEN_UNIFORMS
    assert randomness.gumbels(0, 5)[0] == pytest.approx(GOLDEN_GUMBELS, rel=1e-14)


@pytest.mark.parametrize("purpose", Purpose)
@pytest.mark.parametrize("seed", [0, 7, WORD - 1])
def test_bits_are_philox_4x64_10_of_their_address(seed: int, purpose: Purpose) -> None:
    address = [(0, 0), (5, 1), (WORD - 1, 4095 << 16 | 4095)]
    for index, turn in address:
        expected = reference_bits(seed, index, purpose, turn, 9)
        assert Randomness(seed, [index]).bits(purpose, turn, 9)[0].tolist() == expected


def test_eight_samples_together_have_the_numbers_of_eight_single_ones() -> None:
    together = Randomness(11, range(8))
    for purpose, turn in itertools.product(Purpose, (0, 1, 1 << 16)):
        single = [Randomness(11, [index]).bits(purpose, turn, 33)[0] for index in range(8)]
        assert np.array_equal(together.bits(purpose, turn, 33), single)


def test_taking_samples_keeps_their_numbers() -> None:
    whole, part = Randomness(11, range(8)), Randomness(11, range(8)).take([6, 1, 1])
    assert len(part) == 3
    assert np.array_equal(part.gumbels(4, 16), whole.gumbels(4, 16)[[6, 1, 1]])


def test_more_numbers_begin_with_the_same_ones() -> None:
    randomness = Randomness(3, [2])
    many = randomness.bits(Purpose.TOKEN, 1, 1024)
    assert np.array_equal(many[:, :77], randomness.bits(Purpose.TOKEN, 1, 77))


def test_seeds_samples_purposes_and_rounds_share_no_number() -> None:
    numbers = [
        Randomness(seed, [index]).bits(purpose, turn, 64)
        for seed, index, purpose, turn in itertools.product(
            (0, 1), (0, 1), Purpose, (0, 1, 1 << 16)
        )
    ]
    assert len(np.unique(numbers)) == np.size(numbers)


def test_purposes_and_rounds_are_independent_of_each_other() -> None:
    # Chi-square over 16 x 16 cells of pairs: with 65536 pairs a joint law whose total variation
    # from the product is 0.03 shows with probability > 0.999 at a false-alarm rate of 1e-6.
    randomness = Randomness(5, range(4))
    streams = [
        randomness.uniforms(purpose, turn, 1 << 14).ravel()
        for purpose, turn in itertools.product(Purpose, (0, 1))
    ]
    for one, other in itertools.combinations(streams, 2):
        cells = np.histogram2d(one, other, bins=16, range=[[0, 1], [0, 1]])[0]
        assert stats.chisquare(cells.ravel()).pvalue > FALSE_ALARM


def test_neighbouring_samples_are_independent() -> None:
    # As above, with 16380 pairs in 8 x 8 cells and a total variation of 0.05.
    randomness = Randomness(5, range(1 << 12))
    numbers = randomness.uniforms(Purpose.TOKEN, 0, 4)
    cells = np.histogram2d(numbers[:-1].ravel(), numbers[1:].ravel(), bins=8)[0]
    assert stats.chisquare(cells.ravel()).pvalue > FALSE_ALARM


def test_uniforms_are_multiples_of_two_to_the_minus_24_below_one() -> None:
    uniforms = Randomness(9, range(4)).uniforms(Purpose.TOKEN, 2, 1 << 14)
    scaled = uniforms.astype(np.float64) * 2**24
    assert uniforms.dtype == np.float32
    assert np.array_equal(scaled, np.floor(scaled))
    assert uniforms.min() >= 0
    assert uniforms.max() < 1


@pytest.mark.parametrize(("pattern", "uniform"), [(0, 0), (WORD - 1, 1 - 2**-24)])
def test_the_extreme_uniforms_are_zero_and_just_below_one(pattern: int, uniform: float) -> None:
    assert Constant(pattern, [0]).uniforms(Purpose.TOKEN, 0, 1).item() == uniform


def test_uniforms_are_uniform() -> None:
    # A distribution function that is off by 0.012 anywhere shows with probability > 0.999.
    uniforms = Randomness(9, range(4)).uniforms(Purpose.TOKEN, 3, 1 << 15)
    assert stats.kstest(uniforms.ravel(), "uniform").pvalue > FALSE_ALARM


def test_gumbels_follow_the_gumbel_law() -> None:
    gumbels = Randomness(9, range(4)).gumbels(3, 1 << 15)
    assert stats.kstest(gumbels.ravel(), "gumbel_r").pvalue > FALSE_ALARM


def test_gumbels_reach_beyond_what_a_float16_grid_can_give() -> None:
    # -log(-log(1 - 2**-11)) = 7.6: about one Gumbel in 2050 is larger.
    gumbels = Randomness(9, range(4)).gumbels(1, 1 << 17)
    beyond = int((gumbels > -np.log(-np.log(1 - 2**-11))).sum())
    assert stats.binomtest(beyond, gumbels.size, 2**-11).pvalue > FALSE_ALARM


def test_the_largest_gumbel_is_beyond_what_a_float32_grid_can_give() -> None:
    largest = Constant(WORD - 1, [0]).gumbels(0, 1).item()
    assert -np.log(-np.log(1 - 2**-24)) < 17 < 36 < largest < 37


def test_the_smallest_gumbel_is_finite() -> None:
    assert -4 < Constant(0, [0]).gumbels(0, 1).item() < -3.5
