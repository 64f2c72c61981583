"""What trainers leave around weights: prefixes, running averages, the optimiser's state."""

import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mdzoo import checkpoint
from mdzoo.checkpoint import CheckpointError


class Callback:
    """Of a trainer's package, which is not installed where the file is read."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mdlm.ckpt"


def save(path: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch | None = None) -> None:
    """Save a checkpoint; with a patch, as Lightning does, with a foreign object in it."""
    if monkeypatch is not None:
        module = ModuleType("strange_trainer")
        vars(module)["Callback"] = Callback
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(Callback, "__module__", module.__name__)
        tree = {**tree, "callbacks": Callback()}
    torch.save(tree, path)


def prefixed(prefix: str, *names: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": torch.ones(1) for name in names}


@pytest.mark.parametrize("prefix", ["backbone.", "backbone.backbone.", "module.model._orig_mod."])
def test_prefixes_that_the_family_names_are_taken_off(path: Path, prefix: str) -> None:
    save_file(prefixed(prefix, "blocks.0.w", "vocab"), path)
    found = checkpoint.read(path, strip=("backbone.", "model."))
    assert list(found) == ["blocks.0.w", "vocab"]


@pytest.mark.parametrize(
    ("names", "strip"),
    [
        (["model.transformer.wte.weight", "model.transformer.ln_f.weight"], ()),
        (["model.transformer.wte.weight"], ("backbone.",)),
        (["model.a", "model.b", "lm_head.weight"], ("model.",)),
        (["model.a", "modelled.b"], ("model.",)),
        (["backbone.a", "backbone.b"], ("",)),
    ],
)
def test_names_that_begin_as_a_prefix_stay(path: Path, names: list[str], strip: Any) -> None:
    save_file({name: torch.ones(1) for name in names}, path)
    assert sorted(checkpoint.read(path, strip=strip)) == sorted(names)


class Tied(nn.Module):
    """Registers its head before its body, ties two weights and has a buffer of integers."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)
        self.body = nn.Linear(3, 3)
        self.table = nn.Embedding(4, 3)
        self.table.weight = self.head.weight
        self.register_buffer("steps", torch.tensor(7))
        for i, parameter in enumerate(self.parameters()):
            nn.init.constant_(parameter, value + i)


def lightning(module: Tied, averages: Tied) -> dict[str, Any]:
    """A checkpoint as MDLM's trainer saves it: averages as a list in the parameters' order."""
    state = {f"backbone.{key}": tensor for key, tensor in module.state_dict().items()}
    state["backbone.rotary_emb.inv_freq"] = torch.ones(2)
    shadow = [parameter.detach() for parameter in averages.parameters()]
    return {
        "state_dict": state,
        "ema": {"decay": 0.9999, "num_updates": 10, "shadow_params": shadow},
        "optimizer_states": [{"state": {}}],
    }


@pytest.mark.parametrize("foreign", [False, True], ids=["plain", "lightning"])
def test_averages_in_the_order_of_the_parameters_take_their_names(
    path: Path, monkeypatch: pytest.MonkeyPatch, foreign: bool
) -> None:
    module, averages = Tied(1.0), Tied(10.0)
    save(path, lightning(module, averages), monkeypatch if foreign else None)
    for ema, expected in ((False, module), (True, averages)):
        found = checkpoint.read(path, strip=("backbone.",), ema=ema)
        assert list(found) == list(expected.state_dict())
        fresh = Tied(0.0)
        checkpoint.fit(fresh, found, source="mdlm.ckpt")
        for key, tensor in expected.state_dict().items():
            torch.testing.assert_close(fresh.state_dict()[key], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda shadow: shadow[:-1], "found 3; read it without averages"),
        (lambda shadow: [*shadow[:3], None], "found others for body.bias; read it without"),
        (lambda shadow: shadow[::-1], "found others for head.weight, head.bias, body.weight, b"),
    ],
)
def test_averages_that_do_not_match_the_weights_are_told(
    path: Path, change: Any, found: str
) -> None:
    tree = lightning(Tied(1.0), Tied(10.0))
    tree["ema"]["shadow_params"] = change(tree["ema"]["shadow_params"])
    save(path, tree)
    assert len(checkpoint.read(path, strip=("backbone.",))) == 6
    with pytest.raises(CheckpointError, match=f"of its 4 weights in their order, {found}"):
        checkpoint.read(path, strip=("backbone.",), ema=True)


NAMED: list[tuple[str, Any]] = [
    ("ema", lambda state: state),
    ("model_ema", lambda state: {"state_dict": state, "decay": 0.9}),
    ("ema_state_dict", lambda state: {f"module.{key}": state[key] for key in state}),
]


@pytest.mark.parametrize(("key", "wrap"), NAMED, ids=[case[0] for case in NAMED])
def test_averages_by_name_take_the_place_of_the_weights_if_asked(
    path: Path, key: str, wrap: Any
) -> None:
    weights = {"a": torch.tensor([1.0]), "steps": torch.tensor([3])}
    save(path, {"model": weights, key: wrap({"a": torch.tensor([2.0])}), "epoch": 1})
    assert checkpoint.read(path) == weights
    assert checkpoint.read(path, ema=True) == {"a": torch.tensor([2.0]), "steps": weights["steps"]}


def test_a_file_with_averages_alone_is_read(path: Path) -> None:
    save(path, {"ema": {"a": torch.tensor([2.0])}, "steps": 3})
    assert checkpoint.read(path) == checkpoint.read(path, ema=True) == {"a": torch.tensor([2.0])}


def test_a_file_without_averages_gives_its_weights(path: Path) -> None:
    save(path, {"state_dict": {"a": torch.tensor([1.0])}, "ema": None})
    assert checkpoint.read(path, ema=True) == {"a": torch.tensor([1.0])}


def test_a_list_of_averages_without_weights_is_told(path: Path) -> None:
    save(path, {"ema": {"shadow_params": [torch.ones(1)]}})
    with pytest.raises(CheckpointError, match="must hold tensors by name, found none beside ema"):
        checkpoint.read(path, ema=True)


def resident_mib() -> float:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * 4096 / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells a process's memory")
@pytest.mark.parametrize("foreign", [False, True], ids=["plain", "lightning"])
def test_the_optimisers_state_costs_no_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch, foreign: bool
) -> None:
    tree = {
        "state_dict": {"a": torch.tensor([1.0, 2.0])},
        "optimizer_states": [torch.ones(1 << 24)],
    }
    save(path, tree, monkeypatch if foreign else None)
    before = resident_mib()
    found = checkpoint.read(path)
    assert found["a"].tolist() == [1.0, 2.0]
    assert resident_mib() - before < 32  # of the 64 MiB


@pytest.mark.parametrize("foreign", [False, True], ids=["plain", "lightning"])
def test_weights_read_are_a_copy_of_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, foreign: bool
) -> None:
    save(path, {"a": torch.tensor([1.0, 2.0])}, monkeypatch if foreign else None)
    checkpoint.read(path)["a"].zero_()
    assert checkpoint.read(path)["a"].tolist() == [1.0, 2.0]


def repacked(path: Path, compression: int, padding: str = "") -> None:
    """Write an archive anew; a member ``padding`` in front moves the weights."""
    with zipfile.ZipFile(path) as source:
        members = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", compression) as target:
        for name, content in members.items():
            target.writestr(name, content)
            if padding:
                target.writestr(f"{name}{padding}", b"")


def test_an_archive_that_may_unfold_to_any_size_is_not_opened(path: Path) -> None:
    torch.save({"a": torch.zeros(1 << 20)}, path)
    repacked(path, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 16
    with pytest.raises(CheckpointError, match=r"compressed members, which torch\.save does not"):
        checkpoint.read(path)


@pytest.mark.parametrize("foreign", [False, True], ids=["plain", "lightning"])
@pytest.mark.parametrize("padding", [".", ".xx", ".xyz"])
def test_weights_at_any_place_of_an_archive_are_read(
    path: Path, monkeypatch: pytest.MonkeyPatch, padding: str, foreign: bool
) -> None:
    weights = {key: torch.randn(5, generator=torch.Generator().manual_seed(1)) for key in "abc"}
    save(path, dict(weights), monkeypatch if foreign else None)
    repacked(path, zipfile.ZIP_STORED, padding)
    found = checkpoint.read(path)
    for key, tensor in weights.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)
