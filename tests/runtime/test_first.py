"""First passes that were run before are not run again, and nothing else changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mdruntime
from mdruntime.conditions import Conditions
from mdruntime.errors import SamplingError
from mdruntime.first import HEAD, Answer, FirstPass, FirstPasses
from mdruntime.prompt import conditions_of
from mdruntime.runner import Runner
from mdruntime.session import FunctionSession
from tests.runtime.test_generate import SAMPLINGS

KINDS: list[dict[str, Any]] = [
    *SAMPLINGS,
    {"order": "halton", "rounds": 8, "refresh_interval": 4, "refresh": "recent", "guidance": 1.0},
    {"order": "halton", "rounds": 32},  # one token in the first rounds
    {"order": "hybrid", "substeps": 2, "guidance": 2.0, "guidance_schedule": "linear"},
]


def pair(folder: Path, **options: Any) -> tuple[Runner, Runner]:
    """Return a runner that keeps no answers and one that does."""
    bundle = mdruntime.open_bundle(folder, check=False)
    return Runner(bundle, **options), Runner(bundle, first_pass_mb=8, **options)


def drawn(runner: Runner, count: int, labels: list[int] | None = None, **options: Any) -> Any:
    """Return tokens of so many samples, two at a time."""
    conditions = Conditions(np.full(count, -1))
    if runner.manifest.image is not None:
        conditions = conditions_of(runner.bundle, labels, None, "", count)
    return np.concatenate(list(runner.finish(runner.blank(count), conditions, 4, options)))


@pytest.mark.parametrize("sampling", KINDS)
def test_the_same_seeds_give_the_same_tokens(digits_bundle: Path, sampling: dict[str, Any]) -> None:
    both = pair(digits_bundle)
    counts = [runner.counted().shapes for runner in both]
    for seed, labels in enumerate(([3], [3], [3], [5, 3, 3], [5, 3, 8, 8, 1], [5], [8, 3])):
        plain, kept = (drawn(r, len(labels), labels, seed=seed, **sampling) for r in both)
        np.testing.assert_array_equal(kept, plain)
    full, partial = (
        [sum(shape.samples for shape in shapes if shape.full is whole) for shapes in counts]
        for whole in (True, False)
    )
    assert partial[1] == partial[0]
    assert full[1] == full[0] - both[1].first_passes.hits
    assert both[1].first_passes.hits == 0 + 0 + 1 + 2 + 2 + 1 + 2


@pytest.mark.parametrize("family", ["maskbit", "mage", "mdlm"])
def test_every_family_draws_the_same(small_bundle: Callable[[str], Path], family: str) -> None:
    """Tokens that share a row, hidden rows that are not computed, and text."""
    both = pair(small_bundle(family))
    labels = [1, 1] if both[0].manifest.denoiser.classes else None
    for order, interval in (("moment", 1), ("halton", 2)):
        options = {"order": order, "rounds": 4, "refresh_interval": interval}
        for seed in range(3):
            plain, kept = (drawn(runner, 2, labels, seed=seed, **options) for runner in both)
            np.testing.assert_array_equal(kept, plain)
    assert both[1].first_passes.hits == 2 * (1 + 2 + 2)


def test_logits_are_kept_for_the_numpy_head(digits_bundle: Path) -> None:
    both = pair(digits_bundle, head="numpy")
    for seed in range(3):
        plain, kept = (drawn(runner, 2, [1, 1], seed=seed) for runner in both)
        np.testing.assert_array_equal(kept, plain)
    assert both[1].first_passes.hits == 5


def test_an_edit_of_the_same_picture_is_the_same_request(digits_bundle: Path) -> None:
    both = pair(digits_bundle)
    canvas = drawn(both[0], 1, [4])
    canvas[:, 32:] = both[0].manifest.denoiser.mask_token
    for other in (False, False, False, True):
        canvas[:, 0] += other
        plain, kept = (
            next(iter(runner.finish(canvas, Conditions(np.array([4])), 1, {}))) for runner in both
        )
        np.testing.assert_array_equal(kept, plain)
    assert both[1].first_passes.hits == 1


def test_clones_share_what_is_kept(digits_bundle: Path) -> None:
    keeping = pair(digits_bundle)[1]
    for seed in range(2):
        drawn(keeping, 1, [1], seed=seed)
    twin = keeping.clone()
    drawn(twin, 1, [1], seed=2)
    assert twin.first_passes is keeping.first_passes
    assert keeping.first_passes.hits == 1


def test_a_bundle_without_the_heads_graph_runs_every_pass(
    digits_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping = pair(digits_bundle)[1]
    monkeypatch.delitem(keeping.manifest.graphs, HEAD)
    for seed in range(3):
        drawn(keeping, 1, [1], seed=seed)
    assert keeping.first_passes.hits == 0


def answer(kilobytes: int) -> Answer:
    return Answer(np.zeros((kilobytes, 250), np.float32), ())


def test_memory_stays_within_its_limit_and_what_is_used_stays() -> None:
    kept = FirstPasses(0.01)
    for key in (b"a", b"b", b"c"):
        kept.put(key, answer(3))
    assert kept.get(b"a") is not None
    kept.put(b"d", answer(3))  # the fourth does not fit: b was not asked for for longest
    assert [kept.get(key) is not None for key in (b"a", b"b", b"c", b"d")] == [
        True,
        False,
        True,
        True,
    ]
    kept.put(b"e", answer(11))  # never fits
    assert kept.get(b"e") is None
    assert kept.get(b"d") is not None


def test_only_what_is_asked_for_again_is_kept() -> None:
    ran: list[int] = []

    def denoiser(feeds: Any) -> dict[str, Any]:
        ran.append(len(feeds["tokens"]))
        return {
            "logits": feeds["tokens"][:, : feeds["columns"].shape[1], None] * np.ones(3, np.float32)
        }

    first = FirstPass(FirstPasses(1), FunctionSession(denoiser), None, partial=False)

    def ask(*tokens: int) -> list[float]:
        samples = len(tokens)
        ones = np.ones(samples, np.float32)
        feeds = {
            "tokens": np.tile(np.array(tokens, np.int32)[:, None], (1, 4)),
            "columns": np.tile(np.array([1, 3], np.int32), (samples, 1)),
            "conditional": np.arange(samples, dtype=np.int32),
            "unconditional": np.arange(samples, dtype=np.int32),
            **dict.fromkeys(("guidance", "temperature", "beta", "token_beta"), ones),
            "uniforms": np.zeros((samples, 2), np.float32),
        }
        everywhere = np.tile(np.arange(4, dtype=np.int32), (samples, 1))
        found = first.run(feeds, ["logits"], everywhere, 3)["logits"]
        return [float(value) for value in found[:, 0, 0]]

    for tokens, runs in (
        ((1,), 1),  # for the first time
        ((1,), 1),  # again: now it is kept
        ((1,), 0),
        ((2, 2, 1), 1),  # the two are one
        ((2,), 0),
        ((3, 4), 2),
        ((4, 5, 3, 2), 3),
        ((3, 4, 5), 1),
    ):
        ran.clear()
        assert ask(*tokens) == [float(token) for token in tokens]
        assert sum(ran) == runs, tokens


def test_caches_out_of_reach_keep_every_pass(
    digits_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping = pair(digits_bundle)[1]
    session = keeping.counted()
    monkeypatch.setattr(session, "views", lambda sequences: None)
    for seed in range(3):
        drawn(keeping, 1, [1], seed=seed, order="moment", rounds=3, substeps=2)
    assert len(session.shapes) == 3 * (3 + 3)
    for seed in range(3):  # without partial passes they are not needed
        drawn(keeping, 1, [1], seed=seed, order="moment", rounds=3, substeps=1)
    assert len(session.shapes) == 3 * (3 + 3) + 8


@pytest.mark.parametrize("megabytes", [-1, float("nan"), float("inf")])
def test_a_limit_must_be_a_number_of_megabytes(digits_bundle: Path, megabytes: float) -> None:
    with pytest.raises(SamplingError, match="first_pass_mb must be 0"):
        mdruntime.load(digits_bundle, check=False, first_pass_mb=megabytes)
