"""``mdruntime tune``: predictions that come true on devices whose cost is known, and the choice."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mdruntime.bundle import MANIFEST, Bundle, open_bundle
from mdruntime.cli import main
from mdruntime.duration import milliseconds
from mdruntime.errors import SamplingError
from mdruntime.generation import time_samplings
from mdruntime.manifest import Manifest, dump
from mdruntime.passes import PassShape, cost, foreseen
from mdruntime.runner import Runner
from mdruntime.sampling import Sampling
from mdruntime.study import Study, StudyRow, chosen
from mdruntime.tune import Forecast, Tuning, calibrated, pick, settled, tune

Capture = pytest.CaptureFixture[str]
Fake = Callable[..., tuple[Runner, Any]]

ROWS: dict[str, tuple[float, dict[str, Any]]] = {  # quality, options
    "moment-2": (40, {"rounds": 2}),
    "moment-8": (16, {"rounds": 8}),
    "moment-16": (10, {"rounds": 16}),
    "cached-8": (11, {"rounds": 8, "substeps": 4}),
    "exact-8": (17, {"rounds": 8, "order": "maskgit-exact", "substeps": 2}),
    "halton-8": (18, {"rounds": 8, "order": "halton"}),
    "guided-8": (9, {"rounds": 8, "guidance": 1.0}),
    "partly-8": (9.5, {"rounds": 8, "guidance": 1.0, "guidance_interval": (0.5, 1.0)}),
}


def studied(manifest: Manifest) -> Manifest:
    """Return a manifest with a study whose qualities are made up."""
    rows = []
    for name, (quality, options) in ROWS.items():
        sampling = Sampling(**options)
        shapes = foreseen(manifest, sampling)
        row = StudyRow(
            name=name,
            sampling=sampling,
            quality=quality,
            low=quality - 0.75,
            high=quality + 0.75,
            scores={},
            passes=len(shapes),
            cost=cost(shapes, 1),
            samples=30,
            seeds=3,
        )
        rows.append(row)
    return replace(manifest, study=Study("frechet", manifest.weights.files, tuple(rows)))


@pytest.fixture(scope="module")
def bundle(digits_bundle: Path) -> Bundle:
    found = open_bundle(digits_bundle, check=False)
    return Bundle(found.folder, studied(found.manifest))


def tuned(runner: Runner, device: Any, batch: int = 1) -> Tuning:
    return tune(runner, batch=batch, repeats=2, clock=device.clock)


@pytest.mark.parametrize("batch", [1, 4])
def test_predictions_come_true(bundle: Bundle, fake_device: Fake, batch: int) -> None:
    runner, device = fake_device(bundle)
    tuning = tuned(runner, device, batch)
    samplings = {e.row.name: e.row.sampling for e in tuning.estimates}
    times = time_samplings(runner, samplings, batch=batch, repeats=1, clock=device.clock)
    for estimate in tuning.estimates:
        assert estimate.ms == pytest.approx(times[estimate.row.name][0]), estimate.row.name
        assert estimate.foreseen
    assert [e.ms for e in tuning.estimates] == sorted(e.ms for e in tuning.estimates)


def test_the_front_has_no_row_that_another_one_beats(bundle: Bundle, fake_device: Fake) -> None:
    tuning = tuned(*fake_device(bundle))
    assert len(tuning.front) > 2
    for one in tuning.estimates:
        beaten = any(
            other.ms <= one.ms and other.row.quality < one.row.quality for other in tuning.estimates
        )
        assert beaten == (one.row.name not in tuning.front)


def test_the_device_decides_which_sampler_fits_a_budget(bundle: Bundle, fake_device: Fake) -> None:
    """Of nearly the same quality: 16 full passes, or 8 full ones and 24 partial ones."""
    by_rows = {"start_ms": 0.0, "row_ms": 0.1, "column_ms": 0.0, "decoder_ms": 0.0}
    by_passes = {**by_rows, "start_ms": 5.0, "row_ms": 0.001}
    choice = {}
    for name, times in (("rows", by_rows), ("passes", by_passes)):
        tuning = tuned(*fake_device(bundle, **times))
        ms = {e.row.name: e.ms for e in tuning.estimates}
        slower = max(ms["cached-8"], ms["moment-16"])
        assert pick(tuning, budget_ms=slower).row.name in ("moment-16", "guided-8", "partly-8")
        choice[name] = min(("cached-8", "moment-16"), key=ms.__getitem__)
    assert choice == {"rows": "cached-8", "passes": "moment-16"}


def test_a_budget_buys_the_best_quality_within_it(bundle: Bundle, fake_device: Fake) -> None:
    tuning = tuned(*fake_device(bundle))
    for estimate in tuning.estimates:
        for budget in (estimate.ms, 1.001 * estimate.ms):
            found = pick(tuning, budget_ms=budget)
            fitting = [e.row.quality for e in tuning.estimates if e.ms <= budget]
            assert found.ms <= budget
            assert found.row.quality == min(fitting)
    fastest = tuning.estimates[0]
    with pytest.raises(SamplingError) as caught:
        pick(tuning, budget_ms=0.5 * fastest.ms)
    assert f"the fastest, {fastest.row.name!r}, takes {fastest.ms:.1f} ms" in str(caught.value)
    enough = milliseconds(str(caught.value).split("pass --budget ")[1].split()[0])
    assert pick(tuning, budget_ms=enough).row.name == fastest.row.name


def test_the_choice_was_measured_and_not_only_foreseen(bundle: Bundle, fake_device: Fake) -> None:
    runner, device = fake_device(bundle)
    tuning = tuned(runner, device)
    foreseen_ms = {e.row.name: e.ms for e in tuning.estimates}
    device.row_ms *= 2  # slower than it was when the passes were measured
    budget = 1.01 * foreseen_ms["guided-8"]  # the best quality, which no longer fits
    within = partial(pick, budget_ms=budget)
    assert within(tuning).row.name == "guided-8"
    after, choice = settled(runner, tuning, within, repeats=1, clock=device.clock)
    assert choice.row.name != "guided-8"
    assert choice.measured
    assert choice.ms <= budget
    known = {e.row.name: e for e in after.estimates}
    assert known["guided-8"].measured
    assert known["guided-8"].ms > 1.2 * foreseen_ms["guided-8"]
    assert choice.row.name in after.front
    assert [e.ms for e in after.estimates] == sorted(e.ms for e in after.estimates)


def test_qualities_are_the_studys_choices_at_this_devices_times(
    bundle: Bundle, fake_device: Fake
) -> None:
    names = set()
    for times in ({}, {"start_ms": 50.0, "row_ms": 0.0}):
        tuning = tuned(*fake_device(bundle, **times))
        expected = chosen([e.row for e in tuning.estimates], tuning.ms)
        for quality, row in expected.items():
            assert pick(tuning, quality=quality).row == row
        names.add(expected["balanced"].name)
        assert expected["best"].name == "guided-8"
        assert tuning.ms(expected["fast"]) <= tuning.ms(expected["balanced"]) * 2 / 3
    assert names == {"partly-8", "guided-8"}  # the cheaper of the two, or both cost the same
    with pytest.raises(SamplingError, match="quality must be one of fast, balanced, best, got"):
        pick(tuning, quality="perfect")


def test_an_entropy_bound_costs_as_many_full_passes_as_the_study_counted(
    bundle: Bundle, fake_device: Fake
) -> None:
    assert bundle.manifest.study is not None
    plain = bundle.manifest.study.rows[1]
    bound = plain.sampling.but(order="entropy", entropy_bound=1.0)
    rows = [replace(plain, name=str(n), sampling=bound, passes=n) for n in (1.0, 4.5, 9.0)]
    study = replace(bundle.manifest.study, rows=tuple(rows))
    times = {"column_ms": 0.0, "decoder_ms": 0.0}
    runner, device = fake_device(
        replace(bundle, manifest=replace(bundle.manifest, study=study)), **times
    )
    tuning = tuned(runner, device)
    full = device.start_ms + 65 * device.row_ms
    assert [e.ms for e in tuning.estimates] == pytest.approx([full, 4.5 * full, 9 * full])
    assert not any(e.foreseen for e in tuning.estimates)


def test_whole_samples_correct_the_predictions() -> None:
    shape = PassShape(1, 1, 65, 64, 65)
    plans = {
        "few": Forecast((shape,) * 2, False, 0.0),
        "many": Forecast((shape,) * 16, False, 0.0),
        "bound": Forecast((shape,) * 4, False, 0.0, 1.25),
    }
    ms = {"few": 20.0, "many": 80.0, "bound": 50.0}
    longer = calibrated(ms, plans, {"few": 23.0, "many": 96.0})  # 1.1 times, and 0.5 a pass
    assert longer == pytest.approx({"few": 23.0, "many": 96.0, "bound": 57.5})
    stretched = calibrated(ms, plans, {"few": 18.0, "many": 72.0})
    assert stretched == pytest.approx({"few": 18, "many": 72, "bound": 45})
    shrunk = calibrated(ms, plans, {"few": 22.0, "many": 72.0})  # would take time from each pass
    assert shrunk["few"] / ms["few"] == pytest.approx(shrunk["many"] / ms["many"])
    assert calibrated(ms, plans, {"many": 72.0}) == pytest.approx(stretched)
    assert calibrated(ms, plans, {}) == ms


@pytest.mark.parametrize(
    ("text", "ms"),
    [("200ms", 200), ("1.5s", 1500), ("200", 200), (" 0.25 s", 250), ("1e3ms", 1000)],
)
def test_times_are_read_with_their_unit(text: str, ms: float) -> None:
    assert milliseconds(text) == pytest.approx(ms)


@pytest.mark.parametrize("text", ["", "ms", "fast", "0", "-5ms", "nan", "inf", "3m", "1e999s"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(SamplingError, match=r"a time must be a number such as 200ms or 1.5s, got"):
        milliseconds(text)


def test_a_bundle_without_a_study_is_refused(
    altered: Callable[[], Path], fake_device: Fake, capsys: Capture
) -> None:
    place = altered()
    manifest = replace(open_bundle(place, check=False).manifest, study=None)
    (place / MANIFEST).write_bytes(dump(manifest))
    runner, device = fake_device(open_bundle(place, check=False))
    with pytest.raises(SamplingError, match=r"no quality table to choose from.*mdexport study"):
        tune(runner, clock=device.clock)
    assert main(["tune", str(place), "--quality", "best"]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)


@pytest.fixture(scope="module")
def folder(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits with a study, on disk."""
    place = tmp_path_factory.mktemp("tune") / "digits"
    shutil.copytree(digits_bundle, place)
    manifest = studied(open_bundle(place, check=False).manifest)
    (place / MANIFEST).write_bytes(dump(manifest))
    return place


@pytest.fixture
def file(folder: Path) -> Path:
    path = folder.with_name("digits.tuned.json")
    path.unlink(missing_ok=True)
    return path


def ran(capsys: Capture, *arguments: object) -> tuple[Any, str, str]:
    """Run the command line and return its exit code, stdout and stderr."""
    try:
        code: Any = main(["tune", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_the_choice_is_printed_kept_and_used(folder: Path, file: Path, capsys: Capture) -> None:
    flags = (folder, "--quality", "best", "--repeats", 1, "--threads", 1)
    code, out, err = ran(capsys, *flags, "--check")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines[1:-1])) <= 80  # the first names the weights, the last a path
    assert "  provider   cpu, 1 thread" in lines
    (marked,) = [line for line in lines if line.startswith("* ") and "guided-8" in line]
    assert marked.split()[2] == "8/1"
    assert marked.endswith("8.25 to 9.75      16")
    (check,) = [line for line in lines if line.startswith("check: expected ")]
    expected, measured = (float(part.split(" ms")[0].split()[-1]) for part in check.split(",")[:2])
    assert ("beyond 15%" in check) == (abs(expected / measured - 1) > 0.15)
    assert lines[-1].startswith(f"wrote {file}")
    chosen = json.loads(file.read_text(encoding="utf-8"))
    assert (chosen["name"], chosen["batch"], chosen["machine"]["threads"]) == ("guided-8", 1, 1)
    target = file.with_name("x.png")
    assert main(["generate", str(folder), "-l", "1", "-o", str(target), "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("sampler 'guided-8', tuned for batch 1 on cpu, fp32, 1 thread, ")
    assert "8 passes" in out
    target.unlink()


def test_machines_get_all_rows(folder: Path, file: Path, capsys: Capture) -> None:
    flags = (folder, "--budget", "100s", "--batch-size", 2, "--repeats", 1, "--json")
    code, out, err = ran(capsys, *flags, "--dry-run")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["file"] is None
    assert facts["measured_ms"] is None
    assert not file.exists()
    assert {row["name"] for row in facts["rows"]} == set(ROWS)
    assert facts["chosen"]["name"] == "guided-8"
    assert facts["chosen"]["batch"] == 2
    assert all(row["ms"] > 0 for row in facts["rows"])
    code, out, err = ran(capsys, *flags, "--check")
    facts = json.loads(out)
    assert facts["file"] == str(file)
    assert facts["measured_ms"] > 0
    assert file.is_file()


BAD: list[tuple[str, int, str]] = [
    ("", 2, "one of the arguments --budget --quality is required"),
    ("--budget 1s --quality best", 2, "not allowed with argument"),
    ("--budget soon", 2, "a time must be a number such as 200ms or 1.5s, got 'soon'"),
    ("--budget 0.001ms --repeats 1", 2, "no sampler of the study fits 0.001 ms a sample here"),
    ("--quality good", 2, "quality must be one of fast, balanced, best, got 'good'"),
    ("--quality best --batch-size 0", 2, "batch_size must be between 1 and 4096, got 0"),
    ("--quality best --repeats 0", 2, "repeats must be between 1 and 4096, got 0"),
    ("--quality best --provider abacus", 4, "provider must be one of"),
]


@pytest.mark.parametrize(("flags", "code", "text"), BAD, ids=[flags for flags, _, _ in BAD])
def test_bad_requests_get_one_line_and_leave_nothing(
    folder: Path, file: Path, capsys: Capture, flags: str, code: int, text: str
) -> None:
    found, out, err = ran(capsys, folder, *flags.split())
    assert (found, out, len(err.splitlines())) == (code, "", 1)
    assert text in err
    assert not file.exists()


def test_what_must_fail_does_before_anything_is_measured(
    folder: Path, file: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdruntime.cli_tune.tune", lambda *_, **__: pytest.fail("measured"))
    assert ran(capsys, folder, "--quality", "good")[0] == 2
    monkeypatch.setattr("mdruntime.tuned.os.access", lambda *_: False)
    code, out, err = ran(capsys, folder, "--quality", "best")
    assert (code, out, len(err.splitlines())) == (6, "", 1)
    assert "cannot be written to" in err
