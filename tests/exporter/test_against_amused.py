"""``mdexport verify --against`` for aMUSEd: recordings of diffusers and of transformers."""

import importlib.util
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mdexport.cli import _run
from mdzoo.synthetic import toks

Array = NDArray[Any]


def _amused() -> ModuleType:
    """Import the family's own tests, which write published folders."""
    path = Path(__file__).parents[1] / "models" / "test_amused.py"
    spec = importlib.util.spec_from_file_location("against_amused", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


AMUSED = _amused()
RESAMPLED = {"downsample": True, "upsample": True}
SIZES = {
    "reference": AMUSED.TRANSFORMER,
    "reference, resampled": AMUSED.TRANSFORMER | RESAMPLED,
    "odd": AMUSED.ODD,
    "sizes of diffusers": {
        name: size for name, size in AMUSED.TRANSFORMER.items() if name != "sample_size"
    },
}
GOLDEN = dict(zip(("reference", "reference, resampled"), AMUSED.GOLDEN, strict=True))


Record = Callable[[str], tuple[Path, dict[str, Array]]]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Return a function from a name of ``SIZES`` to a published folder and its recording."""
    done: dict[str, tuple[Path, dict[str, Array]]] = {}

    def once(name: str) -> tuple[Path, dict[str, Array]]:
        if name not in done:
            folder = tmp_path_factory.mktemp("amused") / "model"
            done[name] = folder, _record(folder, SIZES[name])
        return done[name]

    return once


def _record(folder: Path, sizes: Mapping[str, Any]) -> dict[str, Array]:
    """Write a model of golden weights, and return what diffusers says of it."""
    diffusers = pytest.importorskip("diffusers")
    AMUSED.write_folder(folder, sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = diffusers.UVit2DModel.from_pretrained(folder / "transformer").eval()
    random, side = np.random.RandomState, min(sizes.get("sample_size", 4), 6)
    arrays: dict[str, Array] = {
        "tokens": toks(side**2, 32, 39).reshape(1, side, side).numpy(),
        "encoder_hidden_states": random(1).standard_normal((1, 7, 48)).astype(np.float32),
        "pooled_text_emb": random(2).standard_normal((1, 32)).astype(np.float32),
        "micro_conds": np.array([[256, 256, 0, 0, 6]], np.float32),
    }
    with torch.no_grad():
        arrays["logits"] = model(*map(torch.from_numpy, arrays.values())).numpy()
    return arrays


def ask(checkpoint: Path, arrays: Mapping[str, Any], *settings: str, name: str = "256") -> int:
    """Return the exit code of the command."""
    recording = checkpoint.parent / "recorded.npz"
    np.savez(recording, allow_pickle=False, **arrays)
    command = ["verify", "--model", f"amused-{name}", "--checkpoint", str(checkpoint)]
    for setting in settings:
        command += ["--set", setting]
    return _run([*command, "--against", str(recording)])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("where", ["", "transformer"])
def test_the_transformer_computes_what_diffusers_computes(
    sizes: str, where: str, record: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, arrays = record(sizes)
    if sizes in GOLDEN:
        _, mean, std, total, values = GOLDEN[sizes]
        logits = arrays["logits"]
        assert (logits.mean(), logits.std()) == pytest.approx((mean, std), abs=1e-5)
        assert np.abs(logits).sum() == pytest.approx(total, rel=1e-5)
        np.testing.assert_allclose(logits.ravel()[AMUSED.INDICES], values, atol=1e-5)
    assert ask(folder / where, arrays) == 0, capsys.readouterr().err
    wrong = arrays["logits"].copy()
    wrong[0, 31, -1, -1] += 2e-4
    assert ask(folder / where, {**arrays, "logits": wrong}) == 3
    assert f"token (0, {arrays['tokens'].size - 1}, 31)" in capsys.readouterr().out


def test_a_file_without_its_config_needs_what_shapes_cannot_tell(
    tmp_path: Path, record: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, arrays = record("reference")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    alone = Path(shutil.copy(file, tmp_path / "alone.safetensors"))
    assert ask(alone, arrays) == 1
    assert "--set block_heads=N" in capsys.readouterr().err
    assert ask(alone, arrays, "heads=4", "block_heads=2") == 0, capsys.readouterr().err


Form = Callable[[Mapping[str, Array]], Mapping[str, Any]]
FORMS: list[Form] = [
    lambda a: {"tokens": a["tokens"].reshape(1, 16)},
    lambda a: {"logits": np.moveaxis(a["logits"], 1, -1).reshape(1, 16, 32)},
    lambda a: {"logits": a["logits"].reshape(1, 32, 16)},
    lambda a: {name: array.astype(np.float64) for name, array in a.items() if name != "tokens"},
    lambda a: {"micro_conds": a["micro_conds"].astype(np.int64)},
]


@pytest.mark.parametrize("form", FORMS)
def test_recordings_have_the_shapes_of_diffusers_or_of_other_models(
    form: Form, record: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, arrays = record("reference")
    assert ask(folder, {**arrays, **form(arrays)}) == 0, capsys.readouterr().err


@pytest.mark.parametrize("patches", [False, True])
def test_prompts_pass_through_the_text_encoder(
    patches: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = AMUSED.TRANSFORMER | (RESAMPLED if patches else {})
    AMUSED.write_folder(tmp_path / "model", sizes)
    run = AMUSED.original(tmp_path / "model")
    tokens = toks(16, 32, 39).reshape(1, 4, 4).repeat(2, 1, 1)
    side = 4.0 * 4  # 4 pixels on the side of a token
    with torch.no_grad():
        logits = run(tokens, AMUSED.PROMPTS, torch.tensor([[side, side, 0, 0, 6]])).numpy()
    arrays = {"tokens": tokens.numpy(), "labels": AMUSED.PROMPTS.numpy(), "logits": logits}
    assert ask(tmp_path / "model", arrays, name="512") == 0, capsys.readouterr().err
    assert ask(tmp_path / "model", {**arrays, "labels": arrays["labels"][::-1]}) == 3
    for labels in (np.array([1, 2]), np.full((2, 10), 49), np.full((1, 9), 49)):
        assert ask(tmp_path / "model", {**arrays, "labels": labels}) == 2
        assert "or the ids of prompts as labels [2, 9]" in capsys.readouterr().err
    assert ask(tmp_path / "model", {**arrays, "labels": np.full((2, 9), 50)}) == 2
    assert "the ids of prompts must be 0 to 49" in capsys.readouterr().err
    del arrays["labels"]
    assert ask(tmp_path / "model", arrays) == 2
    assert "must hold encoder_hidden_states, pooled_text_emb, micro_conds" in (
        capsys.readouterr().err
    )


MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"encoder_hidden_states": np.zeros((1, 7, 32))}, "must have the shape [1, n, 48], got"),
    ({"encoder_hidden_states": np.zeros((1, 48))}, "must have the shape [1, n, 48], got"),
    ({"pooled_text_emb": np.zeros((1, 48))}, "must have the shape [1, 32], got (1, 48)"),
    ({"pooled_text_emb": np.zeros((2, 32))}, "must have the shape [1, 32], got (2, 32)"),
    ({"micro_conds": np.zeros((1, 6))}, "must have the shape [1, 5], got (1, 6)"),
    ({"micro_conds": np.full((1, 5), np.nan)}, "micro_conds must hold finite numbers"),
    ({"tokens": np.full((1, 4, 4), 32)}, "tokens must be ids 0 to 31, or 39 or -1"),
    ({"logits": np.zeros((1, 33, 4, 4))}, "over 32 or 40 ids"),
]


@pytest.mark.parametrize(("changes", "text"), MISFITS)
def test_a_recording_that_does_not_fit_is_refused_with_what_was_expected(
    changes: dict[str, Any], text: str, record: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, arrays = record("reference")
    assert ask(folder, {**arrays, **changes}) == 2
    assert text in capsys.readouterr().err
