"""The published samplers in numbers: counts, temperatures and guidance of every round.

Each formula below is transcribed from the authors' code; ``i`` is the round, from 0, of ``n``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import acos, cos, floor, pi

import numpy as np
import pytest

from mdruntime.sampling import Sampling
from mdruntime.schedule import ANCESTRAL, hidden_counts
from mdruntime.turn import Clock, Turn
from mdzoo import presets

Formula = Callable[[int, int], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What the authors' sampler computes in round i of n."""

    tokens: int  # that can be hidden
    rounds: int
    hidden: Sequence[int]  # after each round, of Appendix B's lists or by the authors' rule
    noise: Formula  # factor of the Gumbel noise
    softmax: Formula = lambda i, n: 1.0  # what divides the logits
    guidance: Formula = lambda i, n: 0.0  # w in (1 + w) c - w u
    law: str = "plain"


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split()]


def left_after(revealed: str) -> list[int]:
    counts = numbers(revealed)
    return [sum(counts[index + 1 :]) for index in range(len(counts))]


def google(i: int, n: int) -> float:
    return 1 - (i + 1) / n


def valeoai(i: int, n: int) -> float:
    return 1 - i / (n - 1)


def power_cosine(i: int, n: int, power: float) -> float:
    return (1 - cos(pi * (i / n) ** power)) / 2


def titok_softmax(i: int, n: int) -> float:
    return 0.5 + 0.8 * (1 - (i + 1) / n)


def arccos_hidden(tokens: int, rounds: int) -> list[int]:
    """TiTok and MaskBit: floor of the share, at least one, and one fewer than before."""
    left = [tokens]
    for i in range(rounds - 1):
        share = acos((i + 1) / rounds) / (pi / 2)
        left.append(max(1, min(left[-1] - 1, floor(tokens * share))))
    return [*left[1:], 0]


COSINE_16 = numbers("254 251 244 236 225 212 197 181 162 142 120 97 74 49 25 0")
COSINE_20 = numbers("255 252 248 243 236 228 218 207 194 181 166 150 133 116 97 79 59 40 20 0")
COSINE_12 = numbers("253 247 236 221 203 181 155 128 97 66 33 0")
COSINE_12_1024 = numbers("1015 989 946 886 812 724 623 512 391 265 133 0")
V1_15 = "1 26 38 46 54 61 67 73 79 84 89 94 99 104 109"

CASES: dict[str, tuple[Sampling, Published]] = {
    "maskgit256": (
        presets.maskgit(8, 3.0, 4.5)["published"],
        Published(
            tokens=256,
            rounds=8,
            hidden=left_after("1 18 26 32 38 43 48 50"),
            noise=lambda i, n: 4.5 * valeoai(i, n),
            guidance=lambda i, n: 3.0 * i / (n - 1),
        ),
    ),
    "maskgit512": (
        presets.maskgit(15, 2.8, 7.0)["published"],
        Published(
            tokens=1024,
            rounds=15,
            hidden=left_after(V1_15),
            noise=lambda i, n: 7.0 * valeoai(i, n),
            guidance=lambda i, n: 2.8 * i / (n - 1),
        ),
    ),
    "maskgit-jax-256": (
        presets.maskgit_jax(256)["published"],
        Published(tokens=256, rounds=16, hidden=COSINE_16, noise=lambda i, n: 4.5 * google(i, n)),
    ),
    "mage": (
        presets.mage()["published"],
        Published(tokens=256, rounds=20, hidden=COSINE_20, noise=lambda i, n: 6.0 * google(i, n)),
    ),
    **{
        f"amused-{side}": (
            presets.amused()["published"],
            Published(
                tokens=tokens,
                rounds=12,
                hidden=hidden,
                noise=lambda i, n: np.linspace(2, 0, n)[i],
                guidance=lambda i, n: 10.0 - 1,  # u + 10 (c - u)
            ),
        )
        for side, tokens, hidden in ((256, 256, COSINE_12), (512, 1024, COSINE_12_1024))
    },
    "titok-l32": (
        presets.titok("titok-l32")["published"],
        Published(
            tokens=32,
            rounds=8,
            hidden=numbers("29 26 24 21 18 14 10 0"),
            noise=lambda i, n: 9.5 * google(i, n),
            softmax=titok_softmax,
            guidance=lambda i, n: 4.5 * i / n,  # the ratio of the round before
            law="annealed",
        ),
    ),
    "titok-b64": (
        presets.titok("titok-b64")["published"],
        Published(
            tokens=64,
            rounds=8,
            hidden=numbers("58 53 48 42 36 29 20 0"),
            noise=lambda i, n: 11.0 * google(i, n),
            softmax=titok_softmax,
            guidance=lambda i, n: 3.0 * i / n,
            law="annealed",
        ),
    ),
    "titok-s128": (
        presets.titok("titok-s128")["published"],
        Published(
            tokens=128,
            rounds=64,
            hidden=arccos_hidden(128, 64),
            noise=lambda i, n: 2.8 * google(i, n),
            softmax=titok_softmax,
            guidance=lambda i, n: (6.9 - 1) * power_cosine(i, n, 3.0),
            law="annealed",
        ),
    ),
    **{
        f"maskbit-{bits}": (
            presets.maskbit(bits)[name],
            Published(
                tokens=512,
                rounds=rounds,
                hidden=arccos_hidden(512, rounds),
                noise=lambda i, n, noise=noise: noise * google(i, n),  # type: ignore[misc]
                guidance=lambda i, n, g=g, power=power: (  # type: ignore[misc]
                    g * power_cosine(i, n, power)
                ),
            ),
        )
        for bits, name, rounds, g, noise, power in (
            (10, "published", 64, 6.4, 10.5, 2.5),
            (12, "published", 64, 7.1, 8.2, 3.0),
            (14, "published", 64, 7.1, 7.8, 3.0),
            (14, "published-128", 128, 7.1, 9.0, 3.0),
            (14, "published-256", 256, 5.8, 10.3, 3.0),
            (16, "published", 64, 6.5, 7.5, 2.5),
            (18, "published", 64, 5.7, 8.5, 2.5),
        )
    },
}


def turns(sampling: Sampling, tokens: int) -> list[Turn]:
    """The numbers of all rounds on a canvas of which nothing is known."""
    schedule = hidden_counts(sampling.schedule, sampling.rounds, tokens)
    clock = Clock(sampling, np.array([tokens]), [schedule])
    left = [tokens, *schedule[:-1].tolist()]
    return [clock.turn(np.array([0]), np.array([count])) for count in left]


@pytest.mark.parametrize("name", CASES)
def test_as_many_tokens_are_hidden_after_each_round_as_published(name: str) -> None:
    sampling, published = CASES[name]
    assert sampling.rounds == published.rounds
    found = hidden_counts(sampling.schedule, sampling.rounds, published.tokens)
    assert found.tolist() == list(published.hidden)


@pytest.mark.parametrize("name", CASES)
def test_every_round_has_the_published_temperatures_and_guidance(name: str) -> None:
    sampling, published = CASES[name]
    assert sampling.law == published.law
    assert sampling.substeps == sampling.refresh_interval == 1
    n = published.rounds
    for i, turn in enumerate(turns(sampling, published.tokens)):
        assert turn.alpha[0] == pytest.approx(published.noise(i, n), abs=1e-9)
        assert turn.controls.temperature[0] == pytest.approx(published.softmax(i, n), rel=1e-6)
        assert turn.controls.guidance[0] == pytest.approx(published.guidance(i, n), abs=1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("titok")])
def test_titok_divides_the_logits_of_its_tokens_by_the_noise_factor(name: str) -> None:
    sampling, published = CASES[name]
    *before, last = turns(sampling, published.tokens)
    for i, turn in enumerate(before):
        noise = published.noise(i, published.rounds)
        assert turn.controls.token_beta[0] == pytest.approx(1 / noise, rel=1e-6)
    assert last.controls.token_beta[0] >= 1e6  # argmax


def test_titok_s128_has_the_golden_guidance_scales() -> None:
    found = turns(presets.titok("titok-s128")["published"], 128)
    scales = [1 + found[i].controls.guidance[0] for i in (0, 1, 8, 16, 32, 48, 63)]
    assert scales == pytest.approx([1.0, 1.0, 1.0001, 1.0036, 1.2246, 3.2332, 6.8691], abs=5e-5)


@pytest.mark.parametrize(
    ("name", "tokens", "revealed", "guidance"),
    [
        ("halton-tiny-256", 256, "5 10 15 20 25 30 35 41 46 51", 1.5),
        ("halton-small-256", 256, "5 10 15 20 25 30 35 41 46 51", 1.0),
        ("halton-base-256", 256, "5 10 15 20 25 30 35 41 46 51", 0.7),
        ("halton-small-384", 576, "11 22 34 45 57 69 80 92 104 116", 1.0),
        ("halton-base-384", 576, "11 22 34 45 57 69 80 92 104 116", 0.7),
        ("halton-large-384", 576, "11 22 34 45 57 69 80 92 104 116", 0.5),
    ],
)
def test_halton_reveals_the_published_counts_at_a_constant_guidance(
    name: str, tokens: int, revealed: str, guidance: float
) -> None:
    sampling = presets.halton(name)["published"]
    left = hidden_counts(sampling.schedule, sampling.rounds, tokens)
    assert (tokens - left)[:10].tolist() == numbers(revealed)
    assert sampling.known
    for turn in turns(sampling, tokens):
        assert turn.controls.guidance[0] == np.float32(guidance)
        assert turn.controls.temperature[0] == turn.controls.token_beta[0] == 1


@pytest.mark.parametrize(
    ("sampling", "rounds"),
    [
        (presets.mdlm()["published"], 1000),
        (presets.mdlm()["balanced"], 128),
        (presets.sdtt()["published"], 256),
        (presets.smdm()["published"], 512),
    ],
)
def test_text_models_sample_ancestrally_in_the_published_number_of_rounds(
    sampling: Sampling, rounds: int
) -> None:
    assert (sampling.schedule, sampling.order, sampling.law) == (ANCESTRAL, "vanilla", "plain")
    assert (sampling.rounds, sampling.temperature) == (rounds, 1.0)
