"""The pipeline and the command line of the device, on the trained digits."""

import contextlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mdruntime
from mdruntime.cli import main
from mdruntime.plan import make_plan, pass_rows
from mdruntime.runner import Runner
from mdruntime.sampling import Sampling
from mdruntime.schedule import hidden_counts
from mdruntime.session import Feeds, Outputs, Session, Wrapper, open_session

SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"order": "moment", "refresh": "recent", "substeps": 3},
    {"order": "maskgit", "substeps": 1},
    {"order": "maskgit-exact", "guidance_interval": (0.0, 0.5)},
    {"order": "entropy", "entropy_bound": 3.0},
    {"order": "halton", "refresh_interval": 4, "substeps": 1, "guidance": 0.0},
]


class Counting(Wrapper):
    """A session that counts what it is asked for."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.shapes: list[tuple[int, ...]] = []

    def run(self, feeds: Feeds, fetch: Sequence[str]) -> Outputs:
        self.shapes.append(feeds["tokens"].shape)
        return super().run(feeds, fetch)

    def clone(self) -> "Counting":
        return Counting(self.inner.clone())


def with_denoiser(
    monkeypatch: pytest.MonkeyPatch, bundle: mdruntime.Bundle, session: Session, head: str = "graph"
) -> mdruntime.Pipeline:
    """A pipeline whose denoiser is another session, and whose decoder is the bundle's."""

    def opened(bundle: mdruntime.Bundle, graph: str, *options: Any, **more: Any) -> Session:
        return session if graph == "denoiser" else open_session(bundle, graph, *options, **more)

    monkeypatch.setattr("mdruntime.session.open_session", opened)
    return mdruntime.Pipeline(Runner(bundle, head=head))


@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
@pytest.mark.parametrize("head", ["graph", "numpy"])
def test_eight_together_are_eight_alone(
    digits_bundle: Path, head: str, options: dict[str, Any]
) -> None:
    with mdruntime.load(digits_bundle, head=head) as pipeline:
        labels = [3, 1, 4, 1, 5, 9, 2, 6]
        together = pipeline.generate(labels, seed=7, **options)
        alone = [
            pipeline.generate([label], seed=7, first_index=index, **options)
            for index, label in enumerate(labels)
        ]
        chunked = pipeline.generate(labels, seed=7, batch_size=3, **options)
    np.testing.assert_array_equal(together, np.concatenate(alone))
    np.testing.assert_array_equal(together, chunked)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("refresh", ["chosen", "recent"])
def test_passes_are_those_of_the_plan(
    monkeypatch: pytest.MonkeyPatch, digits_bundle: Path, refresh: str, guidance: float
) -> None:
    bundle = mdruntime.open_bundle(digits_bundle)
    denoiser = Counting(open_session(bundle, "denoiser", "cpu"))
    pipeline = with_denoiser(monkeypatch, bundle, denoiser)
    options: dict[str, Any] = {"rounds": 5, "substeps": 3, "refresh": refresh, "order": "moment"}
    pipeline.generate([1, 2], schedule="arccos", guidance=guidance, **options)
    plan = make_plan(64, hidden_counts("arccos", 5, 64), substeps=3)
    rows = 4 if guidance else 2
    assert denoiser.shapes == [(rows, m) for m in pass_rows(plan, refresh, 65)]


def test_another_order_begins_without_the_presets_partial_caching(digits_bundle: Path) -> None:
    bundle = mdruntime.open_bundle(digits_bundle, check=False)
    cached = Sampling(order="halton", rounds=16, refresh="recent", refresh_interval=8, alpha=2.0)
    manifest = replace(bundle.manifest, presets={"default": cached})
    with contextlib.closing(Runner(replace(bundle, manifest=manifest))) as runner:
        assert runner.sampling("default", {"rounds": 8}) == cached.but(rounds=8)
        assert runner.sampling("default", {"order": "halton"}) == cached
        plain = Sampling(order="maskgit", rounds=16, alpha=2.0)
        assert runner.sampling("default", {"order": "maskgit"}) == plain
        mixed = runner.sampling("default", {"order": "moment", "substeps": 2})
        assert mixed == Sampling(order="moment", rounds=16, substeps=2, alpha=2.0)


def test_known_tokens_are_kept_and_shorten_the_trajectory(digits_bundle: Path) -> None:
    with mdruntime.load(digits_bundle) as pipeline:
        spec = pipeline.manifest.denoiser
        canvas = np.full((3, spec.length), spec.mask_token)
        canvas[0, :32], canvas[1, :62], canvas[2] = 5, 9, 16
        steps = list(pipeline.steps([0, 1, 2], tokens=canvas, seed=1))
        known = canvas != spec.mask_token
        assert (steps[-1].tokens[known] == canvas[known]).all()
        assert (steps[-1].tokens < spec.codebook).all()
        for index in (0, 1):
            one = pipeline.complete(canvas[index : index + 1], [index], seed=1, first_index=index)
            np.testing.assert_array_equal(one, pipeline.decode(steps[-1].tokens[[index]]))
        assert list(pipeline.steps([2], tokens=canvas[2:])) == []
        assert (pipeline.complete(canvas[2:].reshape(1, 8, 8), [2]) == 255).all()


def test_steps_can_be_abandoned_and_previewed(digits_bundle: Path) -> None:
    with mdruntime.load(digits_bundle) as pipeline:
        expected = pipeline.generate([8], seed=2)
        step = next(iter(pipeline.steps([8], seed=2)))
        preview = pipeline.preview(step.tokens)
        assert preview.shape == (1, 8, 8, 3)
        hidden = (step.tokens == pipeline.manifest.denoiser.mask_token).reshape(1, 8, 8)
        assert hidden.sum() == step.hidden
        assert ((preview[..., 2] != preview[..., 0]) == hidden).all()
        np.testing.assert_array_equal(pipeline.generate([8], seed=2), expected)


def test_clones_work_in_threads(digits_bundle: Path) -> None:
    with mdruntime.load(digits_bundle) as pipeline:
        expected = [pipeline.generate([label] * 2, seed=label) for label in range(4)]
        found: dict[int, Any] = {}

        def draw(label: int, twin: mdruntime.Pipeline) -> None:
            found[label] = twin.generate([label] * 2, seed=label)

        threads = [
            threading.Thread(target=draw, args=(label, pipeline.clone())) for label in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for label in range(4):
        np.testing.assert_array_equal(found[label], expected[label])


def test_a_partial_pass_over_all_rows_is_a_full_pass(digits_bundle: Path) -> None:
    bundle = mdruntime.open_bundle(digits_bundle)
    session, spec = open_session(bundle, "denoiser", "cpu"), bundle.manifest.denoiser
    random = np.random.default_rng(0)
    feeds: dict[str, Any] = {
        "tokens": random.integers(0, 18, (2, spec.canvas)).astype(np.int32),
        "positions": np.tile(np.arange(spec.canvas, dtype=np.int32), (2, 1)),
        "conditional": np.arange(2, dtype=np.int32),
        "unconditional": np.arange(2, dtype=np.int32),
        "columns": np.tile(np.arange(spec.canvas, dtype=np.int32), (2, 1)),
        **{name: np.ones(2, np.float32) for name in ("guidance", "temperature")},
        **{name: np.full(2, 1.3, np.float32) for name in ("beta", "token_beta")},
        "uniforms": random.random((2, spec.canvas), np.float32),
    }
    fetch = ["logits", "sampled", "log_moment"]
    session.start(spec.canvas)
    full = session.run(feeds, fetch)
    order = random.permutation(spec.canvas)
    mixed = {n: feeds[n][:, order] for n in ("tokens", "positions", "uniforms")}
    partial = session.run({**feeds, **mixed}, fetch)
    np.testing.assert_allclose(partial["logits"], full["logits"][:, order], atol=1e-4)
    np.testing.assert_array_equal(partial["sampled"], full["sampled"][:, order])


def test_nan_logits_are_refused(monkeypatch: pytest.MonkeyPatch, digits_bundle: Path) -> None:
    bundle = mdruntime.open_bundle(digits_bundle)

    def broken(feeds: Feeds) -> dict[str, Any]:
        return {"logits": np.full((*feeds["uniforms"].shape, 17), np.nan, np.float32)}

    session = mdruntime.FunctionSession(broken)
    pipeline = with_denoiser(monkeypatch, bundle, session, head="numpy")
    with pytest.raises(mdruntime.VerificationError, match="NaN or infinite logits in round 1"):
        pipeline.generate([0])


BAD: list[tuple[list[str], int, str]] = [
    (["--labels", "10"], 2, "labels must be between 0 and 9, got 10"),
    (["--labels", "x"], 2, "got 'x'"),
    (["--rounds", "0"], 2, "rounds must be between 1 and 4096, got 0"),
    (["--rounds", "65"], 2, "rounds must be at most 64"),
    (["--substeps", "0"], 2, "substeps must be between"),
    (["--substeps", "2", "--order", "maskgit"], 2, "use 'maskgit-exact'"),
    (["--guidance", "-1"], 2, "guidance must be between 0 and 100, got -1"),
    (["--guidance", "nan"], 2, "guidance must be between 0 and 100, got nan"),
    (["--exploration", "1.5"], 2, "exploration must be between 0 and 1"),
    (["--order", "foo"], 2, "order must be one of"),
    (["--schedule", "foo"], 2, "schedule must be one of"),
    (["--preset", "foo"], 2, "preset must be one of default"),
    (["--seed", "-1"], 2, "seed must be"),
    (["--threads", "100000"], 2, "threads must be between"),
    (["--count", "0"], 2, "count"),
    (["--provider", "cuda"], 4, "provider 'cuda' was asked for"),
    (["--provider", "abacus"], 4, "provider must be one of cpu, cuda"),
    (["--nonsense"], 2, "unrecognized arguments: --nonsense"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), BAD, ids=lambda value: str(value)[:40])
def test_bad_requests_get_one_line_and_leave_nothing(
    digits_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    text: str,
) -> None:
    target = tmp_path / "x.png"
    command = ["generate", str(digits_bundle), "-o", str(target), *arguments]
    try:
        found: Any = main(command)
    except SystemExit as stop:  # argparse exits by itself
        found = stop.code
    out, err = capsys.readouterr()
    assert found == code
    assert out == ""
    assert len(err.splitlines()) == 1
    assert text in err
    assert not list(tmp_path.iterdir())


def test_an_altered_byte_stops_generation(
    altered: Callable[[], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = altered()
    weights = bytearray((folder / "denoiser.weights").read_bytes())
    weights[12345] ^= 1
    (folder / "denoiser.weights").write_bytes(weights)
    assert main(["generate", str(folder), "-l", "1", "-o", str(tmp_path / "x.png")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "denoiser.weights does not match manifest.json" in line
    assert not (tmp_path / "x.png").exists()


def test_a_sheet_carries_its_recipe(
    digits_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, moving = tmp_path / "x.png", tmp_path / "x.gif"
    common = ["generate", str(digits_bundle), "--labels", "0-2", "--count", "4", "--json"]
    assert main([*common, "-o", str(target), "--animate", str(moving), "--rounds", "4"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    facts = json.loads(out)
    assert facts["images"] == 12
    with Image.open(target) as image:
        assert image.size == (4 * 66 + 2, 3 * 66 + 2)
        assert json.loads(image.info["mdruntime"])["sampling"]["rounds"] == 4
        first = np.asarray(image).copy()
    with Image.open(moving) as frames:
        assert frames.n_frames == facts["passes"]  # type: ignore[attr-defined]
    assert main([*common, "-o", str(target), "--rounds", "4"]) == 0
    with Image.open(target) as image:
        np.testing.assert_array_equal(np.asarray(image), first)


def test_verify_info_and_doctor_say_what_they_found(
    digits_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(digits_bundle)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "verified"
    assert main(["info", str(digits_bundle)]) == 0
    out = capsys.readouterr().out
    assert "digits, fp32: weights from digits.safetensors" in out
    assert "all hashes correct" in out
    assert main(["doctor"]) == 0
    assert "onnxruntime" in capsys.readouterr().out


def test_a_machine_without_onnxruntime_is_told_what_to_install(
    digits_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["verify", str(digits_bundle)]) == 4
    assert "python -m pip install onnxruntime" in capsys.readouterr().err
    assert main(["doctor"]) == 4
