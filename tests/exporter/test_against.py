"""``mdexport verify --against``: published files of every family, recordings of their originals."""

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from mdexport.cli import _run

Array = NDArray[Any]
Arrays = Mapping[str, Any]


def _beside(name: str) -> ModuleType:
    """Import the module beside this file, which is no package's."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


PUBLISHED = _beside("published")


@cache
def case(name: str) -> tuple[Any, Arrays]:
    """Return a model of some sizes, and the recording of its original in the plainest form."""
    made = PUBLISHED.CASES[name]()
    return made, made.arrays()


def save(path: Path, made: Any, form: str = "") -> Path:
    """Write the checkpoint as the authors do, or in another form that is met."""
    state = {made.prefix + name: tensor for name, tensor in made.state.items()}
    if made.model.startswith("maskgit-jax"):
        return Path(PUBLISHED.JAX.save(path, made.state))
    if form == "sharded":
        return _sharded(path, state)
    if form == "hub":
        folder = path / "models--someone--something" / "snapshots" / "0123abc"
        folder.mkdir(parents=True)
        save_file(state, folder / "model.safetensors")
        return path / "models--someone--something"
    if form == "lightning":
        worse = {name: tensor + 1 for name, tensor in state.items()}
        averages = {"shadow_params": list(state.values()), "decay": 0.999}
        torch.save({"state_dict": worse, "ema": averages, "global_step": 7}, path)
    elif form == "half":
        save_file({name: tensor.half() for name, tensor in state.items()}, path)
    else:
        extras = {f"{made.prefix}loss.weight": torch.ones(2), **state}
        torch.save({"iter": 1, "model_state_dict": extras, "optimizer_state_dict": {}}, path)
    return path


def _sharded(path: Path, state: Mapping[str, Tensor]) -> Path:
    path.mkdir()
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(state)}
    for file in set(names.values()):
        save_file({name: state[name] for name in names if names[name] == file}, path / file)
    index = json.dumps({"metadata": {}, "weight_map": names})
    (path / "model.safetensors.index.json").write_text(index)
    return path


def ask(
    folder: Path, made: Any, arrays: Arrays, form: str = "", told: tuple[str, ...] | None = None
) -> int:
    """Return the exit code of the command."""
    checkpoint = folder / "weights"
    if not checkpoint.exists():
        checkpoint = save(checkpoint, made, form)
    np.savez(folder / "recorded.npz", allow_pickle=False, **arrays)
    settings = [f"{name}={number}" for name, number in made.settings.items()]
    command = ["verify", "--model", made.model, "--checkpoint", str(checkpoint)]
    command += ["--against", str(folder / "recorded.npz")]
    for setting in settings if told is None else told:
        command += ["--set", setting]
    return _run(command)


@pytest.mark.parametrize("name", PUBLISHED.GOLDEN)
def test_the_originals_give_the_published_reference_values(name: str) -> None:
    logits = case(name)[1]["logits"]
    assert len(logits) == len(PUBLISHED.GOLDEN[name])
    for found, (mean, std, total, values) in zip(logits, PUBLISHED.GOLDEN[name], strict=True):
        assert found.mean() == pytest.approx(mean, abs=1e-5)
        assert found.std() == pytest.approx(std, abs=1e-5)
        assert np.abs(found).sum() == pytest.approx(total, rel=1e-5)
        places = [part * (found.size - 1) // 5 for part in (0, 1, 2, 3, 5)]
        np.testing.assert_allclose(found.ravel()[places], values, atol=1e-5)


@pytest.mark.parametrize("name", PUBLISHED.CASES)
def test_every_port_computes_what_its_original_computes(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, arrays = case(name)
    assert ask(tmp_path, made, arrays) == 0, capsys.readouterr().err
    assert f"of {arrays['logits'].size} logits" in capsys.readouterr().out
    wrong = arrays["logits"].copy()
    wrong[-1, -1, -1] += 2e-4
    assert ask(tmp_path, made, {**arrays, "logits": wrong}) == 3


@pytest.mark.parametrize("form", ["sharded", "hub", "lightning", "half"])
@pytest.mark.parametrize("name", ["mdlm odd", "halton odd", "titok"])
def test_checkpoints_come_in_many_forms(name: str, form: str, tmp_path: Path) -> None:
    made, arrays = case(name)
    tolerance = {"tolerance": np.float32(0.02)} if form == "half" else {}
    assert ask(tmp_path, made, {**arrays, **tolerance}, form) == 0


def _rows(arrays: Arrays, first: bool) -> Array:
    """Return the logits with those of a context row, which are not compared."""
    row = np.full_like(arrays["logits"][:, :1], 9.0)
    return np.concatenate([row, arrays["logits"]] if first else [arrays["logits"], row], 1)


def _with(tokens: Array, ids: Any, first: bool) -> Array:
    row = np.broadcast_to(np.asarray(ids), len(tokens))[:, None]
    return np.concatenate([row, tokens] if first else [tokens, row], 1)


def _wider(logits: Array, columns: int) -> Array:
    return np.pad(logits, ((0, 0), (0, 0), (0, columns)), constant_values=5.0)


Form = Callable[[Arrays], Arrays]
FORMS: list[tuple[str, str, Form]] = [
    ("maskgit", "a grid", lambda a: {"tokens": a["tokens"].reshape(2, 4, 4)}),
    ("maskgit", "no column of the mask", lambda a: {"logits": a["logits"][..., :-1]}),
    ("maskgit", "float16", lambda a: {"logits": a["logits"].astype(np.float16)}),
    ("maskgit", "float64", lambda a: {"logits": a["logits"].astype(np.float64)}),
    ("maskgit", "int32", lambda a: {"tokens": a["tokens"].astype(np.int32)}),
    ("maskgit", "float tokens", lambda a: {"tokens": a["tokens"].astype(np.float32)}),
    ("maskgit", "codes second", lambda a: {"logits": np.moveaxis(a["logits"], 2, 1)}),
    ("maskgit", "a column of labels", lambda a: {"labels": a["labels"][:, None]}),
    ("maskgit", "-1 where hidden", lambda a: {
        "tokens": np.where(a["tokens"] > 31, -1, a["tokens"])}),
    ("maskgit", "the class row", lambda a: {"logits": _rows(a, first=False)}),
    ("maskgit", "the class among tokens", lambda a: {
        "tokens": _with(a["tokens"], [36, 43], first=False), "labels": None}),
    ("halton", "the register", lambda a: {"logits": _rows(a, first=False)}),
    ("halton", "a grid of logits", lambda a: {"logits": a["logits"].reshape(2, 4, 4, -1)}),
    ("jax", "the mask's own id", lambda a: {"tokens": np.where(a["tokens"] < 0, 42, a["tokens"])}),
    ("jax", "the class row", lambda a: {"logits": _rows(a, first=True)}),
    ("jax odd", "the class among tokens", lambda a: {
        "tokens": _with(a["tokens"], [7, 8], first=True), "labels": None}),
    ("mage", "all columns", lambda a: {"logits": _wider(a["logits"], 1001)}),
    ("mage", "the fake class", lambda a: {
        "tokens": _with(a["tokens"], 1100, first=True), "logits": _rows(a, first=True)}),
    ("mage", "labels of nothing", lambda a: {"labels": np.array([-1])}),
    ("titok", "a line of the tokenizer", lambda a: {"tokens": a["tokens"][:, None]}),
    ("uvit", "the class row", lambda a: {"logits": _rows(a, first=True)}),
    ("maskbit", "groups side by side", lambda a: {
        "tokens": a["tokens"].reshape(2, -1), "logits": a["logits"].reshape(2, 32, 8)}),
    ("maskbit", "groups in a grid", lambda a: {"tokens": a["tokens"].reshape(2, 4, 4, 2)}),
    ("maskbit", "one linear map", lambda a: {"logits": a["logits"].reshape(2, 16, 16)}),
    ("maskbit", "the class row", lambda a: {"logits": _rows(a, first=False)}),
    ("mdlm", "its noise level", lambda a: {"sigma": np.zeros(1)}),
    ("mdlm", "one sample", lambda a: {"tokens": a["tokens"][0], "logits": a["logits"][0]}),
    ("mdlm", "other names", lambda a: {"tokens": None, "input_ids": a["tokens"]}),
    ("llada", "sizes in the recording", lambda a: {"mask": np.int64(39)}),
]  # fmt: skip


def changed(arrays: Arrays, changes: Arrays) -> Arrays:
    return {name: array for name, array in {**arrays, **changes}.items() if array is not None}


@pytest.mark.parametrize(("name", "what", "form"), FORMS, ids=lambda value: str(value)[:24])
def test_recordings_have_the_shapes_of_the_originals(
    name: str, what: str, form: Form, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, arrays = case(name)
    assert ask(tmp_path, made, changed(arrays, form(arrays))) == 0, capsys.readouterr().err
    changes = changed(arrays, form(arrays))
    assert " 0 logits" not in capsys.readouterr().out
    shift = {**changes, "logits": changes["logits"] + changes["logits"].dtype.type(0.01)}
    assert ask(tmp_path, made, shift) == 3


MISFITS: list[tuple[str, Form, str]] = [
    ("maskgit", lambda a: {"labels": None}, "lacks labels"),
    ("maskgit", lambda a: {"labels": np.array([3, 10])}, "labels must be -1 to 9 (-1: dropped)"),
    ("maskgit", lambda a: {"labels": np.array([3])}, "labels must have the shape [2], got (1,)"),
    ("maskgit", lambda a: {"labels": np.array([3, 0.5])}, "labels must be whole numbers"),
    ("maskgit", lambda a: {"tokens": a["tokens"].reshape(2, 2, 8)}, "the grid (4, 4), got (2, 2,"),
    ("maskgit", lambda a: {"tokens": a["tokens"][:, 1:]}, "must hold tokens [batch, length]"),
    ("maskgit", lambda a: {"tokens": a["tokens"] + 0.5}, "tokens must be whole numbers"),
    ("maskgit", lambda a: {"tokens": a["tokens"][:1]}, "must hold tokens [batch, length]"),
    ("maskgit", lambda a: {"logits": a["logits"][:1]}, "must hold tokens [batch, length]"),
    ("maskgit", lambda a: {"logits": a["logits"][:, 1:]}, "must hold tokens [batch, length]"),
    ("maskgit", lambda a: {"logits": a["logits"][:0]}, "one logit or more"),
    ("maskgit", lambda a: {"logits": a["logits"][..., :0]}, "one logit or more"),
    ("maskgit", lambda a: {"logits": a["logits"][0]}, "one logit or more"),
    ("maskgit", lambda a: {"logits": np.int64(a["logits"])}, "floating numbers, one"),
    ("maskgit", lambda a: {"logits": None}, "lacks logits"),
    ("maskgit", lambda a: {"tolerance": np.inf}, "tolerance must be one number, not negative"),
    ("maskgit", lambda a: {"tolerance": np.nan}, "tolerance must be one number, not negative"),
    ("maskgit", lambda a: {"tolerance": np.array([1.0, 2.0])}, "tolerance must be one number"),
    ("maskgit", lambda a: {"tokens": _with(a["tokens"], [36, 43], first=False)
        , "labels": np.array([4, -1])}, "labels must be those of the row beside the tokens"),
    ("maskgit", lambda a: {"micro_conds": np.zeros((2, 5))}, "must hold all of encoder_hidden_"),
    ("halton", lambda a: {"logits": a["logits"][..., :31]}, "over 32 or 33 ids"),
    ("halton", lambda a: {"logits": _wider(a["logits"], 1)}, "over 32 or 33 ids"),
    ("jax", lambda a: {"labels": np.array([0, -1])}, "labels must be 0 to 9, got"),
    ("jax", lambda a: {"tokens": np.where(a["tokens"] < 0, 33, a["tokens"])}, "42 or -1 where"),
    ("mage", lambda a: {"tokens": _with(a["tokens"], 1099, first=True)}, "must hold 1100"),
    ("maskbit", lambda a: {"tokens": np.moveaxis(a["tokens"], 2, 1)}, "must hold tokens"),
    ("maskbit", lambda a: {"tokens": a["tokens"] * 8}, "tokens must be ids 0 to 7, or 8"),
    ("smdm", lambda a: {"tokens": a["tokens"] + 1}, "tokens must be ids 0 to 39, or 40"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "form", "text"), MISFITS)
def test_a_recording_that_does_not_fit_is_refused_with_what_was_expected(
    name: str, form: Form, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, arrays = case(name)
    assert ask(tmp_path, made, changed(arrays, form(arrays))) == 2
    err = capsys.readouterr().err
    assert text in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_never_passes(value: float, tmp_path: Path) -> None:
    made, arrays = case("maskgit")
    logits = arrays["logits"].copy()
    logits[0, 2, 32] = value
    assert ask(tmp_path, made, {**arrays, "logits": logits, "tolerance": 1e30}) == 3


def test_a_failure_says_what_was_assumed_and_what_was_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, arrays = case("maskgit")
    drop = {"drop_label": np.array([True, False])}
    assert ask(tmp_path, made, {**arrays, **drop}, told=("heads=8",)) == 3
    assert "not told by shapes: codebook=32, heads=8; not read: drop_label" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("name", "setting"),
    [("halton", "heads"), ("mage odd", "decoder_heads"), ("uvit", "heads"), ("maskbit", "heads"),
     ("mdlm", "heads"), ("smdm", "heads")],
)  # fmt: skip
def test_what_neither_file_tells_is_asked_for_by_name(
    name: str, setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, arrays = case(name)
    others = tuple(f"{key}={n}" for key, n in made.settings.items() if key != setting)
    assert ask(tmp_path, made, arrays, told=others) == 1
    assert f"--set {setting}=N" in capsys.readouterr().err
    numbers = {key: np.int64(n) for key, n in made.settings.items()}
    assert ask(tmp_path, made, {**arrays, **numbers}, told=()) == 0


@pytest.mark.parametrize(
    ("name", "config"),
    [("mdlm", {"n_heads": 4, "model_length": 64}), ("llada", {"n_heads": 4, "mask_token_id": 39}),
     ("titok", {"model": {"generator": {"num_attention_heads": 4}}})],
)  # fmt: skip
def test_sizes_stand_in_the_config_beside_the_weights(
    name: str, config: Arrays, tmp_path: Path
) -> None:
    made, arrays = case(name)
    folder = save(tmp_path / "weights", made, "sharded")
    (folder / "config.json").write_text(json.dumps(config))
    assert ask(tmp_path, made, arrays, told=()) == 0
    assert ask(tmp_path, made, arrays, told=("heads=2",)) == 3


def test_an_unknown_setting_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, arrays = case("halton")
    assert ask(tmp_path, made, arrays, told=("heads=4", "depth=2")) == 1
    assert "--set must name one of heads, got 'depth'" in capsys.readouterr().err
