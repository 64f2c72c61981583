import math
from typing import Any

import pytest

from mdruntime.errors import SamplingError
from mdruntime.order import HYBRID
from mdruntime.sampling import Sampling

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
    ("temperature_decay", 0, "between 0.01 and 100, got 0"),
    ("annealing", True, "one of linear, linear-full, none, got True"),
    ("guidance", -1, "between 0 and 100, got -1"),
    ("guidance", 100.5, "between 0 and 100, got 100.5"),
    ("guidance_power", -3, "between 0 and 100, got -3"),
    ("guidance_power", 1000, "between 0 and 100, got 1000"),
    ("exploration", (-0.1, 1), "between 0 and 1, got -0.1:1"),
    ("exploration", (0, math.nan), "between 0 and 1, got 0:nan"),
    ("guidance_interval", (0, 1.5), "between 0 and 1, got 0:1.5"),
    ("schedule", "sine", "one of cosine, .*v1-root, ancestral, got 'sine'"),
    ("guidance_schedule", "rising", "one of constant, linear, .*, got 'rising'"),
    ("refresh", "all", "one of chosen, recent, got 'all'"),
    ("tokens", "best", "one of order, plain, tempered, got 'best'"),
    ("order", "best", "one of moment, .*, hybrid, got 'best'"),
]


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
        {"order": "titok", "substeps": 2},
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
