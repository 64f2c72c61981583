"""How far answers are from the reference's, and that NaN and infinity never pass."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mdruntime.bundle import open_bundle
from mdruntime.head import Controls, Draws, draw
from mdruntime.measures import CLOSE, compare, faults_of
from mdruntime.session import Feeds, FunctionSession, Session, open_session
from mdruntime.verify import CONDITIONED, Replay, Verification, verify

Arrays = dict[str, NDArray[Any]]

CODEBOOK, LENGTH, BATCH = 50, 8, 2


def recorded(seed: int) -> Arrays:
    """A pass as the reference leaves it, with the logits of all of its tokens."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(BATCH, LENGTH, CODEBOOK)).astype(np.float32)
    ones = np.ones(BATCH, np.float32)
    uniforms = random.random((BATCH, LENGTH), np.float32)
    drawn = draw(logits, Controls(0 * ones, ones, 2 * ones, ones), uniforms)
    return {
        **drawn._asdict(),
        "logits": logits,
        "shown": np.arange(LENGTH),
        "uniforms": uniforms,
        "temperature": ones,
        "beta": 2 * ones,
        "token_beta": ones,
        "canvas": np.int64(LENGTH),
    }


def answers(one: Mapping[str, NDArray[Any]]) -> Arrays:
    return {name: one[name].copy() for name in (*Draws._fields, "logits")}


def test_the_references_own_answers_differ_by_nothing() -> None:
    passes = [recorded(seed) for seed in range(3)]
    found = compare((one, answers(one)) for one in passes)
    agreements = {"token_agreement", "close_agreement"}
    assert found.keys() == {"score", "token_shift", "log_prob", "mean_log_prob", *agreements}
    assert all(found[name] == 1 for name in agreements)
    assert found["token_shift"] < 1e-6
    assert all(found[name] == 0 for name in ("score", "log_prob", "mean_log_prob"))


def test_each_measure_sees_what_it_is_for() -> None:
    one = recorded(0)
    moved = answers(one)
    moved["log_moment"] += 0.5
    assert compare([(one, moved)])["score"] == pytest.approx(0.25)  # divided by beta
    moved = answers(one)
    moved["log_prob"][0, 0] += 0.4
    found = compare([(one, moved)])
    assert found["score"] == pytest.approx(0.4)
    assert found["mean_log_prob"] == pytest.approx(0.4 / (BATCH * LENGTH), rel=1e-4)
    moved = answers(one)
    moved["logits"][0, 0, 0] += 1
    assert compare([(one, moved)])["log_prob"] > 0.5
    del moved["logits"]
    assert "log_prob" not in compare([(one, moved)])


def test_a_draw_over_an_edge_is_close_and_another_token_is_not() -> None:
    one = recorded(1)
    p = np.exp(one["logits"].astype(np.float64))
    above = np.cumsum(p / p.sum(-1, keepdims=True), axis=-1)
    token = int(one["sampled"][0, 0])
    one["uniforms"][0, 0] = above[0, 0, token] - CLOSE / 4
    moved = answers(one)
    moved["sampled"][0, 0] = token + 1
    found = compare([(one, moved)])
    assert found["token_agreement"] == pytest.approx(1 - 1 / (BATCH * LENGTH))
    assert found["close_agreement"] == 1
    assert found["token_shift"] == pytest.approx(CLOSE / 4, rel=1e-2)
    moved["sampled"][0, 0] = (token + CODEBOOK // 2) % CODEBOOK
    assert compare([(one, moved)])["close_agreement"] == pytest.approx(1 - 1 / (BATCH * LENGTH))


def test_no_measure_hides_a_nan() -> None:
    one = recorded(2)
    for name in ("log_moment", "entropy", "top", "margin", "log_prob"):
        moved = answers(one)
        moved[name][1, 3] = np.nan
        assert np.isnan(compare([(one, moved)])["score"]), name


def test_a_fault_names_its_output_and_how_much_of_it() -> None:
    outputs: Arrays = {
        "sampled": np.zeros((2, 4), np.int32),
        "entropy": np.array([[0, np.nan], [np.inf, 1]], np.float32),
        "top": np.array([1, -np.inf, np.inf], np.float16),
        "margin": np.ones(3, np.float32),
    }
    assert list(faults_of("pass 7", outputs)) == [
        "pass 7: entropy holds NaN (2 of 4 values are not finite)",
        "pass 7: top holds an infinity (2 of 3 values are not finite)",
    ]


def replayed(spoil: Callable[[int, Arrays], None], condition: Any = None) -> list[str]:
    """Replay three passes through a session that spoils its answers; return the faults."""
    passes = [{**recorded(seed), "tokens": np.zeros((2, 3), np.int32)} for seed in range(3)]
    count = iter(range(len(passes)))

    def run(feeds: Feeds) -> Arrays:
        number = next(count)
        found = answers(passes[number])
        spoil(number, found)
        return found

    names = ["tokens"]
    if condition is not None:
        names.append(CONDITIONED)
        for one in passes:
            one[CONDITIONED] = np.zeros(2, np.int32)
    replay = Replay(FunctionSession(run), condition, names)
    assert len(list(replay.over(passes, [*Draws._fields, "logits"]))) == 3
    return replay.faults


def test_every_fetched_output_of_every_pass_is_checked() -> None:
    assert replayed(lambda number, found: None) == []
    for pass_number in range(3):
        for name in ("log_moment", "log_prob", "entropy", "top", "margin", "logits"):
            for bad, kind in ((np.nan, "NaN"), (-np.inf, "an infinity")):

                def spoil(number: int, found: Arrays) -> None:
                    if number == pass_number:  # noqa: B023 - called within the loop
                        found[name].flat[0] = bad  # noqa: B023

                (fault,) = replayed(spoil)
                assert fault.startswith(f"pass {pass_number}: {name} holds {kind} (1 of ")


def test_what_the_condition_graph_returns_is_checked_too() -> None:
    def condition(inputs: NDArray[np.int32]) -> Arrays:
        return {"text": np.full((2, 4), np.nan, np.float32)}

    faults = replayed(lambda number, found: None, condition)
    assert faults[0] == "pass 0, condition: text holds NaN (8 of 8 values are not finite)"


def test_faults_fail_a_verification_that_has_no_limits() -> None:
    assert Verification({}, {}, 1)
    faults = tuple(f"pass {number}: entropy holds NaN" for number in range(5))
    result = Verification({"score": 0.0}, {"score": 1.0}, 5, faults)
    assert not result
    assert result.failures == [*faults[:3], "and 2 more outputs that are not finite"]


def test_a_verification_says_which_pass_and_which_output(
    digits_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(digits_bundle)

    class Spoiled:
        """The graph's session, but for one number of the third pass."""

        def __init__(self, inner: Session) -> None:
            self.inner, self.provider, self.passes = inner, inner.provider, 0

        def start(self, canvas: int) -> None:
            self.inner.start(canvas)

        def run(self, feeds: Feeds, fetch: Any) -> Arrays:
            found = {name: array.copy() for name, array in self.inner.run(feeds, fetch).items()}
            if self.passes == 2:
                found["entropy"][0, 0] = np.inf
            self.passes += 1
            return found

        def close(self) -> None:
            self.inner.close()

    def opened(bundle: Any, graph: str, *given: Any, **options: Any) -> Any:
        inner = open_session(bundle, graph, *given, **options)
        return Spoiled(inner) if graph == "denoiser" else inner

    assert verify(bundle)
    monkeypatch.setattr(sys.modules["mdruntime.verify"], "open_session", opened)
    result = verify(bundle)
    assert not result
    assert result.failures[0].startswith("pass 2: entropy holds an infinity (1 of ")
