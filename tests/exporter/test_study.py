"""Studies: what is measured, kept, resumed, and written into a bundle."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import mdruntime
from mdexport.cli import _run
from mdexport.cli_study import table
from mdexport.study import Progress, Store, load_judge, measure, sign
from mdexport.study_plans import default_plans, read_plans
from mdexport.study_store import interval
from mdruntime.bundle import MANIFEST
from mdruntime.errors import BundleError, SamplingError
from mdruntime.head import Draws
from mdruntime.manifest import (
    FORMAT,
    DenoiserSpec,
    Manifest,
    TextSpec,
    VerificationRecord,
    WeightsSpec,
    dump,
    parse,
)
from mdruntime.passes import cost, foreseen
from mdruntime.sampling import Sampling
from mdruntime.session import Feeds, FunctionSession, Outputs
from mdruntime.study import Study, StudyRow
from mdruntime.verify import verify

Capture = pytest.CaptureFixture[str]

LENGTH = 16
VANILLA = Sampling(rounds=4, schedule="linear", order="vanilla")
SHARED = VANILLA.but(refresh="recent", refresh_interval=2)
PLANS = {"vanilla": VANILLA, "shared": SHARED}


@dataclass
class Letters:
    """Judges texts by how often they say ``e``, and remembers them."""

    measure: str = "share"
    seen: list[list[str]] = field(default_factory=list)

    def score(self, samples: list[str], labels: Sequence[int] | None) -> Mapping[str, float]:
        assert labels is None
        self.seen.append(samples)
        text = "".join(samples)
        return {"share": text.count("e") / len(text), "letters": len(set(text))}


def letters_of_uniforms(feeds: Feeds) -> Outputs:
    """A text denoiser that draws lower-case letters, whatever it sees."""
    uniforms = np.array(feeds["uniforms"][: len(feeds["conditional"])])
    outputs: Outputs = dict.fromkeys(Draws._fields, uniforms)
    outputs["sampled"] = (97 + (26 * uniforms).astype(np.int32)).astype(np.int32)
    return outputs


@pytest.fixture
def text_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of a text model of bytes that is a manifest and a function."""
    spec = DenoiserSpec(
        length=LENGTH,
        canvas=LENGTH,
        first=0,
        grid=(LENGTH,),
        patch=(1,),
        codebook=256,
        mask_token=256,
        classes=0,
        layers=1,
        context=(),
    )
    manifest = Manifest(
        format=FORMAT,
        name="letters",
        family="letters",
        task="text",
        precision="fp32",
        weights=WeightsSpec("checkpoint", -1, {"letters.safetensors": "0" * 64}, 1, "none"),
        denoiser=spec,
        image=None,
        text=TextSpec("bytes"),
        prompt=None,
        graphs={},
        buckets=(),
        presets={"default": VANILLA, "published": VANILLA.but(schedule="ancestral", rounds=16)},
        files={},
        verification=VerificationRecord("none", {}, {"log_prob": 0.0}),
        toolchain={},
        study=None,
    )
    folder = tmp_path / "letters"
    folder.mkdir()
    (folder / MANIFEST).write_bytes(dump(manifest))
    session = FunctionSession(letters_of_uniforms)
    monkeypatch.setattr("mdruntime.session.open_session", lambda *_, **__: session)
    return folder


@pytest.fixture
def writer(text_bundle: Path) -> mdruntime.TextPipeline:
    return mdruntime.load_text(text_bundle)


def stored(writer: mdruntime.TextPipeline, path: Path | None = None, **changes: Any) -> Store:
    manifest = replace(writer.manifest, **changes)
    return Store(path, manifest, "share", 6)


def ran(
    writer: mdruntime.TextPipeline,
    judge: Any,
    store: Store,
    plans: Mapping[str, Sampling] = PLANS,
    seeds: Sequence[int] = (0, 1),
) -> list[Progress]:
    steps = measure(writer, judge, plans, store, samples=6, seeds=seeds, batch_size=4)
    return [step for step in steps if step.seconds is not None]


def test_the_interval_is_students() -> None:
    for count in range(2, 200):
        values = np.random.default_rng(count).normal(3, 2, count)
        low, high = interval(values)
        assert low + high == pytest.approx(2 * values.mean())
        expected = stats.t.ppf(0.975, count - 1) * stats.sem(values)
        assert (high - low) / 2 == pytest.approx(expected, rel=1e-4)
    assert interval([2.5]) == (2.5, 2.5)


def test_all_plans_run_with_one_seed_before_the_next(writer: mdruntime.TextPipeline) -> None:
    steps = list(measure(writer, Letters(), PLANS, stored(writer), samples=6, seeds=(3, 5)))
    order = [("vanilla", 3), ("shared", 3), ("vanilla", 5), ("shared", 5)]
    assert [(step.name, step.seed) for step in steps[::2]] == order
    assert [(step.name, step.seed) for step in steps[1::2]] == order
    assert [step.run for step in steps[1::2]] == [1, 2, 3, 4]
    assert all(step.runs == 4 for step in steps)
    assert all(step.quality is None and step.seconds is None for step in steps[::2])


def test_rows_hold_what_the_judge_said_of_what_the_pipeline_made(
    writer: mdruntime.TextPipeline,
) -> None:
    judge, store = Letters(), stored(writer)
    steps = ran(writer, judge, store)
    assert judge.seen[2] == writer.generate(
        count=6, seed=1, rounds=4, schedule="linear", order="vanilla"
    )
    study = store.study(PLANS)
    assert (study.measure, study.weights) == ("share", {"letters.safetensors": "0" * 64})
    row = study.rows[0]
    found = ["".join(texts).count("e") / (6 * LENGTH) for texts in judge.seen[::2]]
    assert found[0] != found[1]
    assert row.quality == pytest.approx(np.mean(found))
    assert [step.quality for step in steps[::2]] == found
    assert (row.low + row.high) / 2 == pytest.approx(row.quality)
    assert row.high - row.quality == pytest.approx(12.7062 * abs(found[0] - found[1]) / 2)
    assert set(row.scores) == {"letters"}
    assert (row.samples, row.seeds, row.sampling) == (12, 2, VANILLA)


def test_passes_and_cost_are_those_of_a_sample(writer: mdruntime.TextPipeline) -> None:
    store = stored(writer)
    ran(writer, Letters(), store)
    vanilla, shared = store.study(PLANS).rows
    assert (vanilla.passes, vanilla.cost) == (4, 4)
    assert shared.passes == 4
    assert shared.cost == pytest.approx(cost(foreseen(writer.manifest, SHARED), 1))
    assert 2 < shared.cost < 4


def test_a_study_is_resumed_and_runs_are_shared_by_what_they_are(
    writer: mdruntime.TextPipeline, tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "runs.json"
    first = measure(writer, Letters(), PLANS, stored(writer, path), samples=6)
    for _, step in zip(range(3), first, strict=False):
        assert step.run < 3
    assert [run["name"] for run in json.loads(path.read_text())["runs"]] == ["vanilla"]
    names = {"mine": VANILLA, "twin": VANILLA.but(alpha=VANILLA.alpha), "shared": SHARED}
    store = stored(writer, path)
    steps = ran(writer, Letters(), store, names, (0,))
    assert [(step.name, step.seed) for step in steps] == [("shared", 0)]
    assert ran(writer, Letters(), store, names, (0,)) == []
    again = stored(writer, path)
    assert again.study(names) == store.study(names)
    assert [row.name for row in again.study(names).rows] == list(names)
    assert [row.name for row in again.study().rows] == ["vanilla", "shared"]
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["runs.json"]


def test_whole_numbers_find_their_runs_again(
    writer: mdruntime.TextPipeline, tmp_path: Path
) -> None:
    plans = {"whole": VANILLA.but(alpha=9, exploration=(1, 0))}
    ran(writer, Letters(), stored(writer, tmp_path / "runs.json"), plans)
    assert ran(writer, Letters(), stored(writer, tmp_path / "runs.json"), plans) == []


def test_two_studies_may_write_one_file(writer: mdruntime.TextPipeline, tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    one, other = stored(writer, path), stored(writer, path)
    ran(writer, Letters(), one, {"vanilla": VANILLA}, (0,))
    ran(writer, Letters(), other, {"vanilla": VANILLA, "shared": SHARED}, (1,))
    rows = stored(writer, path).study(PLANS).rows
    assert [row.seeds for row in rows] == [2, 1]


def test_a_plan_that_was_not_measured_is_named(writer: mdruntime.TextPipeline) -> None:
    with pytest.raises(SamplingError, match="'vanilla' was not measured yet"):
        stored(writer).study(PLANS)


def test_a_store_of_something_else_is_refused(
    writer: mdruntime.TextPipeline, tmp_path: Path
) -> None:
    path = tmp_path / "runs.json"
    ran(writer, Letters(), stored(writer, path))
    before = path.read_bytes()
    weights = replace(writer.manifest.weights, files={"letters.safetensors": "1" * 64})
    with pytest.raises(SamplingError, match=r"weights .*000\) and not .*111\); pass another"):
        stored(writer, path, weights=weights)
    with pytest.raises(SamplingError, match="measure 'share' and not 'other'"):
        Store(path, writer.manifest, "other", 6)
    with pytest.raises(SamplingError, match="samples 6 and not 7; pass another --store"):
        Store(path, writer.manifest, "share", 7)
    steps = measure(writer, Letters(), PLANS, stored(writer, path), samples=7)
    with pytest.raises(SamplingError, match="samples 6 and not 7"):
        next(steps)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "is no store"),
        ("[]", "must be an object"),
        ('{"format": 1}', "lacks 'measure'"),
        ('{"format": 2, "weights": {}, "measure": "share", "samples": 6, "runs": []}', "format 2"),
    ],
)
def test_a_file_that_is_no_store_is_refused_and_kept(
    writer: mdruntime.TextPipeline, tmp_path: Path, content: str, text: str
) -> None:
    path = tmp_path / "runs.json"
    path.write_text(content)
    with pytest.raises(SamplingError, match=text) as caught:
        stored(writer, path)
    assert "delete it" in str(caught.value)
    assert path.read_text() == content


@dataclass
class Faulty:
    """Judges well once, and then as it is told."""

    answer: Any
    measure: str = "share"
    calls: int = 0

    def score(self, samples: Any, labels: Any) -> Any:
        self.calls += 1
        if self.calls == 1:
            return {"share": 1.0}
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (ZeroDivisionError("no letters"), "the judge raised ZeroDivisionError: no letters"),
        ({"share": float("nan")}, "finite numbers, got share nan"),
        ({"share": 1.0, "other": float("inf")}, "finite numbers, got other inf"),
        ({"share": "much"}, "finite numbers, got share 'much'"),
        ({"other": 1.0}, "its measure 'share' among its scores, got other"),
        (3.0, "its measure 'share' among its scores, got float"),
    ],
)
def test_a_judge_that_fails_is_told_apart_and_costs_no_earlier_result(
    writer: mdruntime.TextPipeline, tmp_path: Path, answer: Any, text: str
) -> None:
    path = tmp_path / "runs.json"
    with pytest.raises(SamplingError, match=text):
        ran(writer, Faulty(answer), stored(writer, path))
    (row,) = stored(writer, path).study().rows
    assert (row.name, row.seeds, row.quality) == ("vanilla", 1, 1.0)


def test_too_many_rounds_are_refused_before_anything_runs(writer: mdruntime.TextPipeline) -> None:
    judge = Letters()
    with pytest.raises(SamplingError, match="plan 'long': rounds must be at most 16"):
        ran(writer, judge, stored(writer), {**PLANS, "long": VANILLA.but(rounds=17)})
    assert judge.seen == []


JUDGE = """
import neighbour

class _Vowels:
    measure = "share"

    def score(self, samples, labels):
        text = "".join(samples)
        neighbour.told()
        return {"share": sum(map(text.count, "aeiou")) / len(text)}

class Deaf:
    measure = "share"

def vowels():
    return _Vowels()

def angry():
    raise OSError("no data here")

number = 3
"""


@pytest.fixture
def judges(tmp_path: Path) -> Path:
    """A file with judges, and a module beside it that the judges import."""
    folder = tmp_path / "judges"
    folder.mkdir()
    (folder / "neighbour.py").write_text("def told():\n    return None\n")
    (folder / "judges.py").write_text(JUDGE)
    return folder / "judges.py"


def test_a_judge_comes_from_a_file(judges: Path) -> None:
    judge = load_judge(f"{judges}:vowels")
    assert judge.measure == "share"
    assert judge.score(["ab", "cd"], None) == {"share": 0.25}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("", "must be given as FILE.py:NAME"),
        (":vowel", "has no function 'vowel'; it has Deaf, vowels, angry"),
        (":number", "has no function 'number'"),
        (":angry", "raised OSError: no data here"),
        (":Deaf", "a text 'measure' and a method 'score', got Deaf"),
    ],
)
def test_what_is_no_judge_is_refused(judges: Path, name: str, text: str) -> None:
    with pytest.raises(SamplingError, match=text):
        load_judge(f"{judges}{name}")


def test_a_judges_file_must_be_there_and_be_python(tmp_path: Path) -> None:
    with pytest.raises(SamplingError, match="does not exist"):
        load_judge(f"{tmp_path}/none.py:judge")
    (tmp_path / "broken.py").write_text("def judge(:\n")
    with pytest.raises(SamplingError, match="raised SyntaxError"):
        load_judge(f"{tmp_path}/broken.py:judge")
    (tmp_path / "notes.txt").write_text("a judge")
    with pytest.raises(SamplingError, match="must be Python"):
        load_judge(f"{tmp_path}/notes.txt:judge")


def test_plans_change_a_preset(writer: mdruntime.TextPipeline, tmp_path: Path) -> None:
    path, manifest = tmp_path / "plans.json", writer.manifest
    plans = {
        "a": {"rounds": 8},
        "b": {"preset": "published", "order": "hybrid", "exploration": [1, 0.5]},
    }
    path.write_text(json.dumps(plans))
    published = manifest.presets["published"]
    assert read_plans(path, manifest) == {
        "a": VANILLA.but(rounds=8),
        "b": published.but(order="hybrid", exploration=(1.0, 0.5)),
    }


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "cannot be read"),
        ("{}", "must hold plans by name"),
        ('{"a": 3}', "plan 'a' must be options and values, got 3"),
        ('{"a": {}, "a": {}}', "'a' is there twice"),
        ('{"a": {"preset": "none"}}', "plan 'a': preset must be one of default, published"),
        ('{"a": {"preset": []}}', "preset must be one of"),
        ('{"a": {"round": 3}}', "plan 'a': no sampling option 'round'"),
        ('{"a": {"rounds": 0}}', "plan 'a': rounds must be between 1 and 4096, got 0"),
        ('{"a": {"exploration": 1}}', "exploration must be two numbers in a list, got 1"),
        ('{"a": {"exploration": ["a", "b"]}}', "must be two numbers in a list"),
        ('{"a": {"exploration": [1]}}', "exploration must be two numbers"),
    ],
)
def test_bad_plans_are_refused_by_name(
    writer: mdruntime.TextPipeline, tmp_path: Path, content: str, text: str
) -> None:
    path = tmp_path / "plans.json"
    path.write_text(content)
    with pytest.raises(SamplingError, match=text):
        read_plans(path, writer.manifest)


def test_the_grid_treats_samplers_alike_and_can_be_run(
    digits_bundle: Path, text_bundle: Path
) -> None:
    for folder in (digits_bundle, text_bundle):
        manifest = mdruntime.open_bundle(folder).manifest
        plans = default_plans(manifest)
        assert len(set(plans.values())) == len(plans)
        published = manifest.presets["published"]
        assert published in plans.values()
        tried: dict[str, set[tuple[int, float]]] = {"maskgit": set(), "moment": set()}
        for plan in plans.values():
            assert foreseen(manifest, plan)
            assert (plan.guidance, plan.temperature) == (published.guidance, published.temperature)
            if plan.order in tried and plan.substeps == 1:
                tried[plan.order].add((plan.rounds, plan.alpha))
        assert tried["maskgit"] == tried["moment"]
        alphas = {alpha for _, alpha in tried["maskgit"]}
        assert alphas == {published.alpha / 2, published.alpha, 2 * published.alpha}


def test_the_command_writes_the_table_and_the_presets_it_decides(
    text_bundle: Path, judges: Path, tmp_path: Path, capsys: Capture
) -> None:
    before = mdruntime.open_bundle(text_bundle).manifest
    command = ["study", str(text_bundle), "--judge", f"{judges}:vowels", "--samples", "5"]
    assert _run([*command, "--seeds", "2"]) == 0
    after = mdruntime.open_bundle(text_bundle).manifest
    assert after.study is not None
    assert {row.name: row.sampling for row in after.study.rows} == default_plans(before)
    expected = mdruntime.study.chosen(after.study.rows)
    assert after.presets == {
        "default": expected["balanced"].sampling,
        "published": before.presets["published"],
        **{name: row.sampling for name, row in expected.items()},
    }
    assert replace(after, study=None, presets=before.presets, digest=before.digest) == before
    store = Store(tmp_path / "letters.runs.json", after, "share", 5)
    assert store.study(default_plans(before)) == after.study
    out = capsys.readouterr().out
    assert f"preset balanced (default) {expected['balanced'].name}\n" in out
    assert "RANDOM" not in out
    assert sorted(path.name for path in text_bundle.iterdir()) == [MANIFEST]


def test_presets_are_kept_where_asked_and_json_says_all(
    text_bundle: Path, judges: Path, tmp_path: Path, capsys: Capture
) -> None:
    before = mdruntime.open_bundle(text_bundle).manifest
    (tmp_path / "plans.json").write_text('{"four": {}, "eight": {"rounds": 8}}')
    command = ["study", str(text_bundle), "--judge", f"{judges}:vowels", "--samples", "5"]
    command += ["--plans", str(tmp_path / "plans.json"), "--store", str(tmp_path / "s.json")]
    assert _run([*command, "--seeds", "1", "--json", "--keep-presets"]) == 0
    *runs, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert [(run["name"], run["run"], run["runs"]) for run in runs] == [
        ("four", 1, 2),
        ("eight", 2, 2),
    ]
    after = mdruntime.open_bundle(text_bundle).manifest
    assert after.presets == before.presets
    assert after.study is not None
    assert [row["name"] for row in last["study"]["rows"]] == ["four", "eight"]
    assert [row["quality"] for row in last["study"]["rows"]] == [run["quality"] for run in runs]
    assert [row.name for row in after.study.rows] == ["four", "eight"]
    assert last["presets"] == {}


def test_an_interrupt_leaves_the_bundle_as_it_was_and_the_results_whole(
    text_bundle: Path,
    judges: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    before = (text_bundle / MANIFEST).read_bytes()
    calls: list[int] = []

    def told() -> None:
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt

    load_judge(f"{judges}:vowels")  # so that its neighbour can be imported
    monkeypatch.setattr("neighbour.told", told)
    command = ["study", str(text_bundle), "--judge", f"{judges}:vowels", "--samples", "5"]
    assert _run(command) == 130
    assert "letters.runs.json; the same command goes on" in capsys.readouterr().err
    assert (text_bundle / MANIFEST).read_bytes() == before
    path = tmp_path / "letters.runs.json"
    assert len(json.loads(path.read_text())["runs"]) == 2
    assert not list(tmp_path.rglob("*.partial"))
    assert _run([*command, "--seeds", "1"]) == 0
    plans = default_plans(parse(before))
    assert len(calls) == 3 + len(plans) - 2


def test_a_judge_that_fails_ends_the_command_in_one_line(
    text_bundle: Path, judges: Path, capsys: Capture
) -> None:
    before = (text_bundle / MANIFEST).read_bytes()
    assert _run(["study", str(text_bundle), "--judge", f"{judges}:angry"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mdexport: the judge ")
    assert len(err.splitlines()) == 1
    assert (text_bundle / MANIFEST).read_bytes() == before


def test_a_bundle_that_was_written_anew_is_not_signed(writer: mdruntime.TextPipeline) -> None:
    bundle, study = writer.bundle, Study("share", {}, (row("a", 1, 1),))
    signed = sign(bundle, study, presets=False)
    assert signed.study == study
    with pytest.raises(BundleError, match="changed during the study"):
        sign(bundle, study)
    assert mdruntime.open_bundle(bundle.folder).manifest == signed


def row(name: str, quality: float, cost: float, seeds: int = 3) -> StudyRow:
    half = 0.0 if seeds == 1 else 0.125
    return StudyRow(
        name, VANILLA, quality, quality - half, quality + half, {}, cost, cost, 9 * seeds, seeds
    )


def test_the_table_marks_the_front_and_fits_a_terminal() -> None:
    rows = row("x" * 90, 1.5, 1), row("dear", 2.0, 4), row("good", 123456.789, 0.5, 1)
    lines = table(Study("a measure with a long name", {}, rows)).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line[:3] for line in lines[1:4]] == ["* g", "* x", "  d"]
    assert lines[1].endswith("one seed")
    assert lines[2].split()[-3:] == ["1.5", "±", "0.12"]


DIGITS_JUDGE = """
import numpy as np

class Means:
    measure = "distance"

    def score(self, samples, labels):
        assert samples.shape == (12, 8, 8, 3)
        assert list(labels) == [*range(10), 0, 1]
        ink = samples[np.array(labels) == 1].mean()  # ones have little
        return {"distance": float(ink), "spread": samples.std()}
"""


def test_a_real_bundle_is_studied_signed_and_still_verified(
    altered: Callable[[], Path], tmp_path: Path
) -> None:
    folder = altered()
    (tmp_path / "digits_judge.py").write_text(DIGITS_JUDGE)
    plans = {"four": {"preset": "published", "rounds": 4}, "two": {"rounds": 2, "substeps": 2}}
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    command = ["study", str(folder), "--judge", f"{tmp_path}/digits_judge.py:Means"]
    command += ["--plans", str(tmp_path / "plans.json"), "--samples", "12", "--seeds", "2"]
    assert _run([*command, "--batch-size", "5", "--threads", "1"]) == 0
    bundle = mdruntime.open_bundle(folder)
    study = bundle.manifest.study
    assert study is not None
    four, two = study.rows
    assert four.passes == 4
    assert four.cost == pytest.approx(8)  # two sequences under guidance
    assert two.cost == pytest.approx(cost(foreseen(bundle.manifest, two.sampling), 1))
    assert study.weights == dict(bundle.manifest.weights.files)
    assert verify(bundle)
    with mdruntime.load(folder) as pipeline:
        labels = [index % 10 for index in range(12)]
        inks = [
            pipeline.generate(labels, preset="published", rounds=4, seed=seed)[[1, 11]].mean()
            for seed in (0, 1)
        ]
    assert four.quality == pytest.approx(np.mean(inks))
