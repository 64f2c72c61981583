"""The scripts on the paper's claims: their numbers against outside oracles, and their verdicts."""

import json
import re
import runpy
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

import mdexport
import mdruntime
from mdruntime import Sampling
from mdruntime.records import from_json
from mdruntime.study import Study, StudyRow, presets_of

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "paper"))
import caching
import grids
import headline
import hybrid
import lab
import one_round
import orders
import rounds
import ship
from page import Verdict, beats, coincide
from probe import trajectory
from race import Race, bound, variation
from staleness import divergence
from stopwatch import ratio_of_medians

SCRIPTS = {
    script.name: script
    for script in (
        *(one_round.SCRIPT, rounds.SCRIPT, orders.SCRIPT),
        *(caching.SCRIPT, hybrid.SCRIPT, headline.SCRIPT),
    )
}
WORDS = {"held", "held in part", "failed", "undecided", "not tested"}
JUDGE = """
import numpy as np

class Letters:
    measure = "distance"
    def score(self, samples, labels):
        if labels is None:
            return {"distance": abs(np.mean([len(text) for text in samples]) - 40), "entropy": 1.0}
        grey = np.asarray(samples, float).mean(axis=(1, 2, 3))
        return {"distance": float(abs(grey.mean() - 90)), "coverage": float(grey.std())}

letters = Letters
"""
Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]


def row(
    name: str, quality: float, cost: float = 8.0, half: float = 0.1, **options: Any
) -> StudyRow:
    """A row of three seeds whose interval is as wide on either side."""
    sampling = Sampling(**options)
    low, high = quality - half, quality + half
    return StudyRow(name, sampling, quality, low, high, {}, cost, cost, 60, 3)


def rows_of(*rows: StudyRow) -> dict[Sampling, StudyRow]:
    return {each.sampling: each for each in rows}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, digits_bundle: Path) -> Path:
    """A folder with a judge, and bundles of the digits and of a small text model."""
    folder = tmp_path_factory.mktemp("paper")
    (folder / "judge.py").write_text(JUDGE)
    (folder / "bundles").mkdir()
    (folder / "bundles" / "digits").symlink_to(digits_bundle)
    families = runpy.run_path(str(Path(__file__).parent / "families.py"))
    families["SMALL"]["mdlm"][1]["length"] = 64
    model = families["small_model"]("mdlm")
    for _ in mdexport.build(model, folder / "bundles" / "writer", mdexport.Options()):
        pass
    return folder


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a script in a hurry: few samples, and half the rounds."""
    images = replace(grids.IMAGES, few=2, middle=4, many=8, extremes=(1,), bounds=(30.0, 60.0))
    texts = replace(grids.TEXTS, few=2, middle=4, many=8, extremes=(1,), bounds=(60.0, 90.0))
    monkeypatch.setattr(grids, "IMAGES", images)
    monkeypatch.setattr(grids, "TEXTS", texts)

    def start(name: str, *more: str, model: str = "digits", samples: int = 6) -> int:
        options = ["--short", "--models", model, "--samples", str(samples), "--threads", "1"]
        options += ["--bundles", str(place / "bundles"), "--results", str(place / "results")]
        options += ["--judge", f"{place / 'judge.py'}:letters", *more]
        if name == "ship":
            return ship.main(options)
        return lab.main(SCRIPTS[name], "doc", options)

    return start


def test_all_samplers_have_names_of_their_own_and_there_are_few_of_them() -> None:
    for scale in (grids.IMAGES, grids.TEXTS):
        plans = list(dict.fromkeys([*grids.tuning(scale), *grids.grid_of(scale, scale.base)]))
        assert len({grids.label(plan) for plan in plans}) == len(plans) <= 60


def in_turn(weights: NDArray[np.float64], chosen: tuple[int, ...]) -> float:
    """Return the chance to draw these items first, without replacement, by their weights."""
    total = 0.0
    for order in permutations(chosen):
        left, chance = weights.sum(), 1.0
        for item in order:
            chance *= weights[item] / left
            left -= weights[item]
        total += chance
    return total


@pytest.mark.parametrize("alpha", [0.5, 4.5])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_race_has_the_laws_of_the_definition(alpha: float, count: int) -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(3), size=4)
    powers = p ** (1 + 1 / alpha)
    moments = powers.sum(axis=1)
    pairs = product(combinations(range(4), count), product(range(3), repeat=count))
    maskgit, moment, outcomes = [], [], list(pairs)
    for chosen, tokens in outcomes:
        law = (powers / moments[:, None])[chosen, tokens]
        moment.append(in_turn(moments, chosen) * law.prod())
        canvases = np.array(list(product(range(3), repeat=4)))
        canvases = canvases[(canvases[:, chosen] == tokens).all(axis=1)]
        drawn = p[np.arange(4), canvases]
        chances = [in_turn(each ** (1 / alpha), chosen) * each.prod() for each in drawn]
        maskgit.append(sum(chances))
    race = Race(p, alpha)
    positions, drawn_tokens = (np.array(part) for part in zip(*outcomes, strict=True))
    assert np.exp(race.log_moment(positions, drawn_tokens)) == pytest.approx(moment, abs=1e-9)
    assert np.exp(race.log_maskgit(positions, drawn_tokens)) == pytest.approx(maskgit, abs=1e-9)
    exact = float(np.abs(np.array(maskgit) - moment).sum() / 2)
    found = variation(p, alpha, count, 2000, np.random.default_rng(1))
    assert abs(found.value - exact) < 5 * found.error < exact


def test_the_race_draws_from_the_moment_samplers_law() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(3), size=4)
    race = Race(p, 1.0)
    positions, tokens = race.draw(1, 20000, np.random.default_rng(2))
    counts = np.bincount((3 * positions + tokens)[:, 0], minlength=12)
    law = (p**2 / (p**2).sum()).ravel()
    assert stats.chisquare(counts, law * counts.sum()).pvalue > 1e-4


def test_one_round_stays_within_the_bound_and_vanishes_like_one_over_n(
    run: Run, place: Path
) -> None:
    assert run("one_round") == 0
    page = (place / "results" / "one_round.md").read_text()
    found = re.findall(
        r"^\| (\d+) \| 1 \| 4\.5 \| 64 \| ([\de.-]+) ± .* \| ([\d.]+) \|$", page, re.M
    )
    assert [int(hidden) for hidden, _, _ in found] == [32, 64, 128]
    for hidden, value, limit in found:
        assert float(limit) == pytest.approx(bound(int(hidden), 1, 4.5, 64), rel=0.05)
        assert 0 < float(value) <= float(limit)
    hidden_counts = np.log([int(hidden) for hidden, _, _ in found])
    fitted = np.polyfit(hidden_counts, np.log([float(value) for _, value, _ in found]), 1)[0]
    assert fitted == pytest.approx(-1, abs=0.2)
    assert "Along the way of digits" in page


def test_a_bound_that_is_exceeded_is_reported() -> None:
    points = [one_round.point(one_round.SHORT, hidden=n, count=1) for n in (32, 64)]
    assert one_round.within(points).word == "held"
    worse = [replace(each, found=replace(each.found, value=0.9)) for each in points]
    assert one_round.within(worse).word == "failed"
    assert one_round.equivalence({"flat": worse}).word == "failed"


@pytest.mark.parametrize("name", ["rounds", "orders", "caching", "hybrid", "headline"])
@pytest.mark.parametrize("model", ["digits", "writer"])
def test_every_script_writes_a_page_with_a_verdict_on_every_claim(
    name: str, model: str, run: Run, place: Path
) -> None:
    assert run(name, model=model) == 0
    page = (place / "results" / f"{name}.md").read_text()
    script = SCRIPTS[name]
    assert page.startswith(f"# {script.title}\n\nThe claim: {script.claim}")
    words = re.findall(r"^- \*\*([a-z ]+)\*\*: ", page, re.M)
    assert len(words) >= 2
    assert set(words) <= WORDS
    assert "nothing here is a result" in page
    assert page.count(f"({name}-{model}.svg)") == 1
    ET.parse(place / "results" / f"{name}-{model}.svg")
    assert not list((place / "results").glob("*.partial"))
    numbers = re.findall(r"^\| [a-z][^|]* \| [\d.]+ \| ([\d.]+) \| [\d.]+ ± ", page, re.M)
    assert numbers
    assert min(map(float, numbers)) >= 1  # no sampler makes less than a full pass


def test_nothing_is_measured_twice(run: Run, place: Path, capsys: Capture) -> None:
    run("rounds")
    store = (place / "results" / "digits.json").read_bytes()
    capsys.readouterr()
    assert run("rounds") == 0
    assert "seed 0" not in capsys.readouterr().out
    assert (place / "results" / "digits.json").read_bytes() == store


def test_the_table_that_is_shipped_has_all_samplers_and_decides_the_presets(
    run: Run, place: Path, capsys: Capture
) -> None:
    assert run("ship") == 0
    path = place / "results" / "digits.study.json"
    study = from_json(Study, json.loads(path.read_text()), path.name)
    names = {grids.label(each.sampling): each.name for each in study.rows}
    assert all(label == name for label, name in names.items())
    assert {each.sampling.order for each in study.rows} >= {"maskgit", "moment", "hybrid", "halton"}
    assert set(study.weights) == {"digits.safetensors"}
    presets = presets_of(study)
    assert f"best: {grids.label(presets['best'])}" in capsys.readouterr().out
    assert run("ship", "--judge", "nowhere.py:judge") != 0


def test_what_belongs_to_other_options_is_refused(run: Run, capsys: Capture) -> None:
    run("hybrid")
    assert run("hybrid", samples=7) == 2
    assert "samples 6 and not 7" in capsys.readouterr().err
    assert run("hybrid", "--judge", "nowhere.py:judge") != 0
    assert "nowhere.py" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run("hybrid", "--seeds", "-1")


def test_guidance_is_the_one_that_suits_maskgit(run: Run, place: Path) -> None:
    run("rounds")
    own = lab.Lab(
        lab.options_of(
            "doc",
            [
                *("--short", "--samples", "6", "--bundles", str(place / "bundles")),
                *("--results", str(place / "results"), "--judge", f"{place / 'judge.py'}:letters"),
            ],
        )
    )
    tuned = own.run("digits", grids.tuning(grids.IMAGES))
    best = min(tuned.values(), key=lambda each: each.quality)
    assert own.base("digits").guidance == best.sampling.guidance


def test_a_verdict_needs_comparisons_that_can_be_told_from_noise() -> None:
    good, same, bad = row("good", 1.0), row("same", 1.05), row("bad", 2.0)
    assert beats("", [(good, bad)]).word == "held"
    assert beats("", [(bad, good)]).word == "failed"
    assert beats("", [(good, same)]).word == "undecided"
    assert beats("", [(good, bad), (bad, good)]).word == "held in part"
    assert beats("", [(good, bad), (good, same)]).word == "held in part"
    assert beats("", []).word == "not tested"
    assert coincide("", [(good, same)]).word == "held"
    assert coincide("", [(good, bad)]).word == "failed"
    # Half widths of 0.1 each make one of 0.14 for the difference.
    assert beats("", [(good, row("", 1.13))]).word == "undecided"
    assert beats("", [(good, row("", 1.15))]).word == "held"


def hybrid_rows(quality: float) -> dict[Sampling, StudyRow]:
    mixed: dict[str, Any] = {"order": "hybrid", "rounds": 4}
    return rows_of(
        row("moment", 1.0, order="moment", rounds=4),
        row("halton", 2.0, exploration=(1.0, 1.0), **mixed),
        row("half", quality, exploration=(0.5, 0.5), **mixed),
    )


@pytest.mark.parametrize(("quality", "word"), [(0.5, "held"), (1.5, "failed"), (1.1, "undecided")])
def test_a_hybrid_must_beat_its_better_parent(quality: float, word: str) -> None:
    assert hybrid.against_parents(hybrid_rows(quality)).word == word
    assert hybrid.best_against_parents(hybrid_rows(quality)).word == word


@pytest.mark.parametrize(("quality", "word"), [(0.5, "held"), (1.5, "failed"), (1.0, "undecided")])
def test_maskgit_must_move_as_temperature_does(quality: float, word: str) -> None:
    found = rows_of(
        row("vanilla", 1.0, order="vanilla"),
        row("temperature", 0.6, order="temperature"),
        row("maskgit", quality, order="maskgit"),
    )
    assert rounds.temperature(found).word == word


@pytest.mark.parametrize(("quality", "word"), [(1.2, "held"), (1.8, "failed"), (1.5, "undecided")])
def test_caching_is_compared_with_plain_sampling_of_its_cost(quality: float, word: str) -> None:
    # Quality falls from 2 to 1 as the cost doubles; in the middle of the logarithm it is 1.5.
    found = rows_of(
        row("few", 2.0, 4.0, order="moment", rounds=4),
        row("many", 1.0, 8.0, order="moment", rounds=8),
        row("cached", quality, 32**0.5, order="moment", rounds=4, substeps=2),
    )
    (same_steps,), (same_cost,) = caching.equal_steps(found), caching.equal_cost(found)
    assert same_steps[1].name == "many"
    assert same_cost[1].quality == pytest.approx(1.5)
    assert caching.verdicts(found)[1].word == word
    assert caching.at_cost(9.0, list(found.values())[:2]) is None


def test_the_headline_is_the_cheapest_sampler_that_is_as_good() -> None:
    maskgit = row("maskgit", 1.0, 16.0, order="maskgit")
    others = [
        row("worse", 1.5, 1.0),
        row("close", 0.95, 4.0),
        row("sure", 0.5, 8.0),
        row("dear", 0.4, 32.0),
    ]
    found = headline.match(maskgit, others)
    assert found.equal is others[1]
    assert found.strict is others[2]
    assert found.ratio.value == 4
    # Chance decides between 4 and 2: the close one's advantage is half its interval.
    assert (found.ratio.low, found.ratio.high) == (2, 4)
    assert headline.verdict("", found.ratio).word == "undecided"
    assert headline.verdict("", headline.Ratio(5, 4, 6)).word == "held"
    assert headline.verdict("", headline.Ratio(2, 1, 3)).word == "failed"
    none = headline.match(maskgit, others[:1])
    assert none.equal is none.strict is None
    assert none.ratio.value == 0
    assert headline.verdict("", None).word == "failed"


def test_the_bootstrap_knows_the_quantile_of_the_intervals() -> None:
    for seeds in (2, 3, 5, 20):
        assert headline._quantile(seeds) == pytest.approx(stats.t.ppf(0.975, seeds - 1), abs=1e-3)


def test_a_ratio_of_medians_has_an_interval_around_it() -> None:
    assert ratio_of_medians([6.0] * 5, [2.0] * 5) == (3, 3, 3)
    value, low, high = ratio_of_medians([6, 6, 7, 8, 5], [2, 2, 1, 3, 2])
    assert low < value == 3 < high


def test_divergence_is_that_of_scipy() -> None:
    p, q = np.random.default_rng(0).dirichlet(np.ones(8), size=(2, 3, 5))
    found = divergence(np.log(p), np.log(q))
    assert found == pytest.approx(stats.entropy(p, q, axis=-1))
    assert divergence(np.log(p), np.log(p)) == pytest.approx(np.zeros((3, 5)))


def test_looking_at_a_sampler_changes_nothing(digits_bundle: Path) -> None:
    sampling = Sampling(rounds=3, substeps=2, order="moment", guidance=1.0)
    seen = list(trajectory(digits_bundle, sampling, 4, threads=1))
    with mdruntime.load(digits_bundle, threads=1) as pipeline:
        options: dict[str, Any] = {
            "rounds": 3,
            "substeps": 2,
            "order": "moment",
            "guidance": 1.0,
            "seed": 0,
        }
        options |= {"exploration": (0.5, 0.5), "schedule": "cosine", "alpha": 4.5}
        assert pipeline.sampling(**{k: v for k, v in options.items() if k != "seed"}) == sampling
        steps = list(pipeline.steps([0, 1, 2, 3], **options))
    assert len(seen) == len(steps) == 6
    for mine, theirs in zip(seen, steps, strict=True):
        np.testing.assert_array_equal(mine.step.tokens, theirs.tokens)
        stale = divergence(mine.true_log_p, mine.log_p).mean()
        assert stale == 0 if mine.step.part == 0 else stale > 1e-6


def test_verdicts_say_how_many_comparisons_there_were() -> None:
    line = Verdict("birds fly", held=3, failed=1, tied=2, note="Penguins do not.").line
    assert line == (
        "- **held in part**: birds fly (3 of 6 comparisons bear it out, 2 cannot be told from "
        "noise, 1 contradict it). Penguins do not."
    )
