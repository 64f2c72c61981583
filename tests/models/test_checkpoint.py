"""Checkpoints: what is read, what is refused, and that nothing in a file is ever executed."""

import argparse
import builtins
import collections
import datetime
import hashlib
import importlib
import os
import pickle
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mdzoo import checkpoint, unpickle
from mdzoo.checkpoint import CheckpointError

ZIP: dict[str, Any] = {}
ZIP4 = {"pickle_protocol": 4}
LEGACY = {"_use_new_zipfile_serialization": False}
LEGACY4 = {**LEGACY, **ZIP4}
FORMATS = pytest.mark.parametrize(
    "form", [ZIP, ZIP4, LEGACY, LEGACY4], ids=["zip", "zip4", "legacy", "legacy4"]
)


class Call:
    """Pickles as a call of a function; callable only because ``pickle`` asks whether it is."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return self.function, self.arguments

    def __call__(self) -> None:
        raise NotImplementedError


class Foreign:
    """Of a package that does not exist: see ``foreign``."""

    def __init__(self) -> None:
        self.value = [1, 2]


class ForeignDict(dict[str, object]):
    pass


class ForeignList(list[object]):
    pass


def foreign_function(*arguments: object) -> object:
    return arguments


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A package whose classes can be pickled during the test; reading never imports it."""
    module = ModuleType("strange_trainer")
    for thing in (Foreign, ForeignDict, ForeignList, foreign_function):
        monkeypatch.setattr(thing, "__module__", module.__name__)
        setattr(module, thing.__name__, thing)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.pth"


def weights() -> dict[str, Tensor]:
    shared = torch.arange(12, dtype=torch.float32)
    return {
        "a.weight": shared.reshape(3, 4),
        "b.weight": shared.reshape(3, 4).T,
        "part": shared[4:7],
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "brain": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "parameter": nn.Parameter(torch.ones(2)),
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor.detach(), rtol=0, atol=0)


@FORMATS
def test_reads_bare_tensors(path: Path, form: dict[str, Any]) -> None:
    torch.save(weights(), path, **form)
    assert_same(checkpoint.read(path), weights())


@FORMATS
@pytest.mark.usefixtures("foreign")
@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
def test_reads_tensors_beside_foreign_objects(path: Path, form: dict[str, Any]) -> None:
    kept = ForeignDict(base=Foreign(), steps={1, 2}, when=datetime.datetime(2020, 1, 1))
    tree = {
        "state_dict": collections.OrderedDict(weights()),
        "callbacks": {Foreign: {"best": torch.tensor(0.5)}},
        "hyper_parameters": kept,
        "list": ForeignList([Foreign(), b"bytes", bytearray(b"more")]),
        "args": argparse.Namespace(folder=Path("here"), name="x"),
        "counts": collections.defaultdict(list, a=[1]),
        "more": SimpleNamespace(called=Call(foreign_function, Path("there"))),
    }
    torch.save(tree, path, **form)
    with pytest.raises(pickle.UnpicklingError):  # so that the second reader is what is tested
        torch.load(path, weights_only=True)
    assert_same(checkpoint.read(path), weights())


@FORMATS
@pytest.mark.usefixtures("foreign")
def test_reads_the_state_of_a_module_with_its_metadata(path: Path, form: dict[str, Any]) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    torch.save({"model": module.state_dict(), "trainer": Foreign()}, path, **form)
    assert_same(checkpoint.read(path), module.state_dict())


@pytest.mark.usefixtures("foreign")
def test_shared_storages_are_read_once(path: Path) -> None:
    torch.save({"state_dict": weights(), "trainer": Foreign()}, path)
    state = checkpoint.read(path)
    assert state["a.weight"].data_ptr() == state["b.weight"].data_ptr()


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_reads_safetensors_whatever_the_suffix(tmp_path: Path, name: str) -> None:
    state = {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.float16)}
    save_file(state, tmp_path / name)
    assert_same(checkpoint.read(tmp_path / name), state)


@pytest.mark.parametrize("wrapper", checkpoint.WRAPPERS)
def test_wrappers_are_taken_off(path: Path, wrapper: str) -> None:
    torch.save({wrapper: weights(), "iter": 3, "optimizer_state_dict": {"state": {}}}, path)
    assert_same(checkpoint.read(path), weights())


def test_nested_wrappers_are_taken_off(path: Path) -> None:
    torch.save({"model": {"state_dict": {"params": weights()}}, "epoch": 1}, path)
    assert_same(checkpoint.read(path), weights())


def test_a_tensor_named_as_a_wrapper_is_a_tensor(path: Path) -> None:
    state = {"model": torch.ones(1), "params": torch.ones(2)}
    torch.save(state, path)
    assert_same(checkpoint.read(path), state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "module.module."])
def test_prefixes_of_all_tensors_are_taken_off(path: Path, prefix: str) -> None:
    state = {f"{prefix}{key}": tensor for key, tensor in weights().items()}
    torch.save({"state_dict": state, "loss.x": 1}, path)
    assert_same(checkpoint.read(path), weights())


def test_a_prefix_of_some_tensors_is_part_of_their_names(path: Path) -> None:
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(state, path)
    assert list(checkpoint.read(path)) == ["module.a", "b"]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_known_extras_are_left_out_and_do_not_keep_a_prefix(path: Path, prefix: str) -> None:
    extras = (
        "loss.discriminator.main.0.weight",
        "text.embeddings.position_ids",
        "quantize.codebook_used",
        "layers.0.attention.rotary_emb.inv_freq",
        "bits_to_indices",
    )
    state = {f"{prefix}{key}": torch.ones(1) for key in extras}
    state |= {"module.a": torch.ones(1), "module.loss_scale": torch.ones(1)}
    torch.save(state, path)
    assert list(checkpoint.read(path)) == ["a", "loss_scale"]


def test_sha256_is_that_of_the_bytes(path: Path) -> None:
    path.write_bytes(b"weights" * 1000)
    assert checkpoint.sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def damaged(writer: Callable[[Path], object], keep: float) -> Callable[[Path], None]:
    """Return a writer of the first part of what another one writes."""

    def write(path: Path) -> None:
        writer(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])

    return write


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


def saved(tree: object, **form: Any) -> Callable[[Path], object]:
    return lambda path: torch.save(tree, path, **form)


def archive(**members: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as target:
            for name, content in members.items():
                target.writestr(f"archive/{name.replace('_', '.')}", content)

    return write


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
STATE = {"a": torch.zeros(1000)}
UNFIT: list[tuple[str, Callable[[Path], object], str]] = [
    ("missing", lambda path: None, "does not exist; correct the path or download"),
    ("folder", lambda path: path.mkdir(), "must be a file, found a folder with nothing; name one"),
    ("empty", lambda path: path.touch(), "found an empty file; download it"),
    ("pointer", text(POINTER), "found a Git LFS pointer in place of the file; run `git lfs pull`"),
    ("page", text("\n<!DOCTYPE html><html>"), "found a web page, .*; download the file itself"),
    ("old page", text("<HTML><body>401</body>"), "found a web page, .*; download the file itself"),
    ("xml", text("<?xml version='1.0'?><Error>"), "found an XML document, .*; download the file"),
    ("words", text("weights"), r"found a damaged or foreign one \(.*; download it again"),
    ("zeros", lambda path: path.write_bytes(bytes(4096)), "damaged or foreign one .*; download"),
    ("cut zip", damaged(saved(STATE), 0.5), r"damaged or foreign one \(.* zip file\); download"),
    ("cut legacy", damaged(saved(STATE, **LEGACY), 0.5), "damaged or foreign one .*; download it"),
    ("cut head", damaged(saved(STATE, **LEGACY), 0.02), "damaged or foreign one .*; download it"),
    (
        "cut safetensors",
        damaged(lambda path: save_file(STATE, path), 0.5),
        r"damaged or foreign one \(SafetensorError: .*; download it again",
    ),
    ("other zip", archive(readme_md=b"hello"), "a zip archive without data.pkl"),
    ("plain pickle", lambda path: path.write_bytes(pickle.dumps(3)), "without the header of torch"),
    ("script", archive(data_pkl=b"", constants_pkl=b""), "refused: it is a TorchScript archive"),
    ("no weights", saved({"epoch": 3, "step": 4}), "found none beside epoch, step; is it a check"),
    ("hostile names", saved({"\n\x1b[2J": 1}), r"found none beside '\\n\\x1b\[2J'; is it a check"),
    ("nothing", saved({}), "found none beside nothing; is it a checkpoint"),
    ("list", saved([torch.ones(1)]), "must hold tensors by name, found a list; have its state_d"),
]


@pytest.mark.parametrize(
    ("write", "message"), [case[1:] for case in UNFIT], ids=[case[0] for case in UNFIT]
)
def test_files_of_other_kinds_are_told_apart(
    path: Path, write: Callable[[Path], object], message: str
) -> None:
    write(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_tells_what_is_in_it(tmp_path: Path) -> None:
    for name in ("model.yaml", "events.log"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"a folder with events\.log, model\.yaml; name one"):
        checkpoint.read(tmp_path)


def test_files_that_may_not_be_read_are_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path.touch()
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        checkpoint.read(path)


@pytest.mark.usefixtures("foreign")
def test_a_pickled_module_is_told(path: Path) -> None:
    torch.save(Foreign(), path)
    with pytest.raises(CheckpointError, match="found a Foreign; have its state_dict"):
        checkpoint.read(path)


@pytest.mark.usefixtures("foreign")
def test_big_endian_numbers_are_not_misread(path: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": Foreign()}, tmp_path / "little.pth")
    with zipfile.ZipFile(tmp_path / "little.pth") as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            order = name.endswith("byteorder")
            target.writestr(name, b"big" if order else source.read(name))
    with pytest.raises(CheckpointError, match="numbers in big-endian byte order"):
        checkpoint.read(path)


def test_a_tensor_cannot_reach_beyond_its_storage() -> None:
    with pytest.raises(RuntimeError, match="out of bounds for storage"):
        unpickle.SUBSTITUTES["torch._utils._rebuild_tensor_v2"](torch.ones(4), 2, (4,), (1,))


TOUCH = "__import__('pathlib').Path({!r}).touch()"
ATTACKS: dict[str, tuple[Callable[[str], object], str]] = {
    "system": (lambda marker: Call(os.system, f"touch {marker}"), "posix.system"),
    "exec": (lambda marker: Call(exec, TOUCH.format(marker)), "builtins.exec"),
    "eval": (lambda marker: Call(eval, TOUCH.format(marker)), "builtins.eval"),
    "open": (lambda marker: Call(open, marker, "w"), "(io|_io|builtins).open"),
    "popen": (lambda marker: Call(subprocess.call, ["touch", marker]), "subprocess.call"),
    "output": (
        lambda marker: Call(subprocess.getoutput, f"touch {marker}"),
        "subprocess.getoutput",
    ),
    "import": (
        lambda marker: Call(
            Call(getattr, Call(builtins.__import__, "os"), "system"), f"touch {marker}"
        ),
        "builtins.(getattr|__import__)",
    ),
    "chain": (
        lambda marker: Call(
            Call(getattr, Call(importlib.import_module, "pathlib"), "os.system"), marker
        ),
        "builtins.getattr",
    ),
    "runpy": (lambda marker: Call(runpy.run_path, f"{marker}.py"), "runpy.run_path"),
}
ATTACK = pytest.mark.parametrize(("attack", "named"), list(ATTACKS.values()), ids=list(ATTACKS))


def assert_refused(path: Path, named: str) -> None:
    """Read ``path``, whose program would write the file ``ran`` beside it."""
    with pytest.raises(CheckpointError, match=f"is refused: it asks for '{named}' to be called"):
        checkpoint.read(path)
    assert not (path.parent / "ran").exists()


@FORMATS
@ATTACK
def test_programs_are_refused_and_not_run(
    path: Path, form: dict[str, Any], attack: Callable[[str], object], named: str
) -> None:
    program = attack(str(path.parent / "ran"))
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": program}, path, **form)
    assert_refused(path, named)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@ATTACK
def test_programs_without_a_header_are_refused_and_not_run(
    path: Path, protocol: int, attack: Callable[[str], object], named: str
) -> None:
    path.write_bytes(pickle.dumps(attack(str(path.parent / "ran")), protocol))
    assert_refused(path, named)


RAW: Sequence[tuple[bytes, str]] = [
    (b"cos\nsystem\n(S'touch MARKER'\ntR.", "os.system"),
    (b"cnt\nsystem\n(S'touch MARKER'\ntR.", "nt.system"),
    (b"c__builtin__\nexecfile\n(S'MARKER'\ntR.", "builtins.execfile"),
    (b"(S'touch MARKER'\nios\nsystem\n.", "os.system"),
    (b"(cos\nsystem\nS'touch MARKER'\no.", "os.system"),
    (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch MARKER\x85R.", "os.system"),
    (b"\x80\x04\x8c\x08builtins\x8c\x0eeval.__class__\x93.", "builtins.eval.__class__"),
    (b"csys\nmodules\n.", "sys.modules"),
    (b"coperator\nmethodcaller\n.", "operator.methodcaller"),
    (b"\x80\x04\x8c\x02os\x8c\x04a\n\x1bb\x93.", r"os.a\\n\\x1bb"),
    (b"cimportlib.util\nfind_spec\n.", "importlib.util.find_spec"),
]


@pytest.mark.parametrize("wrapped", [False, True], ids=["raw", "zip"])
@pytest.mark.parametrize(("program", "named"), RAW)
def test_hand_written_programs_are_refused(
    path: Path, program: bytes, named: str, wrapped: bool
) -> None:
    program = program.replace(b"MARKER", str(path.parent / "ran").encode())
    if wrapped:
        archive(data_pkl=program)(path)
    else:
        path.write_bytes(program)
    assert_refused(path, named)


def test_the_attacks_are_real(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for name in ("system", "exec", "eval", "popen", "import"):
        pickle.loads(pickle.dumps(ATTACKS[name][0](str(marker))))
        assert marker.exists()
        marker.unlink()


@FORMATS
def test_functions_of_other_packages_are_not_called(path: Path, form: dict[str, Any]) -> None:
    marker = path.parent / "ran"
    torch.save({"a": torch.ones(2), "b": Call(torch.save, [1], str(marker))}, path, **form)
    assert list(checkpoint.read(path)) == ["a"]
    assert not marker.exists()


@pytest.mark.usefixtures("foreign")
def test_foreign_packages_are_not_imported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(2), "b": Foreign()}, path)
    (path.parent / "strange_trainer.py").write_text("raise SystemExit('imported')")
    monkeypatch.delitem(sys.modules, "strange_trainer")
    monkeypatch.syspath_prepend(path.parent)
    assert list(checkpoint.read(path)) == ["a"]
    assert "strange_trainer" not in sys.modules


@pytest.mark.parametrize(
    ("target", "reads"),
    [
        (b"ctorch._utils\n_rebuild_tensor_v2\n", True),
        (b"ctorch._utils\n_rebuild_parameter\n", True),
        (b"ccollections\nOrderedDict\n", False),
        (b"ctorch\nFloatStorage\n", False),
        (b"cstrange_trainer\nForeign\n", False),
    ],
)
def test_substitutes_cannot_be_altered(path: Path, target: bytes, reads: bool) -> None:
    build = b"}(X\x08\x00\x00\x00__call__K\x01X\x0b\x00\x00\x00__setitem__K\x01u"
    archive(data_pkl=b"\x80\x02" + target + b"N" + build + b"\x86b.")(path)
    before = {name: dir(thing) for name, thing in unpickle.SUBSTITUTES.items()}
    message = "must hold tensors by name" if reads else "TypeError.*__setstate__"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(path)
    assert {name: dir(thing) for name, thing in unpickle.SUBSTITUTES.items()} == before
    with pytest.raises(AttributeError):
        unpickle.SUBSTITUTES["torch._utils._rebuild_tensor_v2"].extra = 1


def test_a_tree_that_contains_itself_has_an_end(path: Path) -> None:
    tree: dict[str, object] = {"a": torch.ones(2)}
    tree["model"] = tree
    torch.save(tree, path)
    assert list(checkpoint.read(path)) == ["a"]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)


def fitting() -> dict[str, Tensor]:
    state = Tiny().state_dict()
    return {key: torch.ones_like(tensor) for key, tensor in state.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_of_any_precision_become_float32(dtype: torch.dtype) -> None:
    state = {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for key, tensor in fitting().items()
    }
    module = Tiny()
    checkpoint.fit(module, state, source="x.pth")
    assert_same(dict(module.state_dict()), fitting())


def test_misfits_are_named() -> None:
    state = fitting()
    del state["first.bias"], state["norm.weight"]
    state["first.weight"] = torch.ones(3, 2, 1)
    state["norm.num_batches_tracked"] = torch.tensor(1.0)
    state |= {f"head.{i}": torch.ones(1) for i in range(6)}
    module = Tiny()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.fit(module, state, source="x.pth")
    assert str(caught.value) == (
        "x.pth does not fit Tiny: 2 missing (first.bias, norm.weight); "
        "6 unexpected (head.0, head.1, head.2, head.3 and 2 more); "
        "2 of another shape or type (first.weight: expected float (3, 2), found float (3, 2, 1), "
        "norm.num_batches_tracked: expected int64 (), found float ()). "
        "Is it of another architecture or size?"
    )
    assert_same(dict(module.state_dict()), before)


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (torch.ones(3, 2).to_sparse(), "torch.sparse_coo on cpu"),
        (torch.ones(3, 2, device="meta"), "torch.strided on meta"),
        (torch.ones(3, 2, dtype=torch.int8), r"int8 \(3, 2\)"),
    ],
)
def test_tensors_of_other_kinds_do_not_fit(tensor: Tensor, found: str) -> None:
    with pytest.raises(CheckpointError, match=rf"first.weight: expected .*, found {found}\)"):
        checkpoint.fit(Tiny(), {**fitting(), "first.weight": tensor}, source="x.pth")


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float32, float("nan")), (torch.float16, float("-inf")), (torch.float64, 1e300)],
)
def test_weights_that_are_not_finite_are_named(dtype: torch.dtype, value: float) -> None:
    state = fitting()
    state["first.bias"] = torch.tensor([1.0, value, 1.0], dtype=dtype)
    with pytest.raises(CheckpointError, match=r"NaN or infinity in 1 tensors \(first\.bias\)"):
        checkpoint.fit(Tiny(), state, source="x.pth")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"b": torch.ones(1)}, r"must hold 'a', found 1 other tensors \(b\); is it of another"),
        ({"a": torch.ones(3)}, r"'a' must have 2 dimensions, none of them 0, got shape \(3,\)"),
        ({"a": torch.ones(3, 0)}, r"'a' must have 2 dimensions.* got shape \(3, 0\)"),
    ],
)
def test_shapes_are_asked_for_by_name(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoint.shape_of(state, "a", 2)
    assert checkpoint.shape_of({"a": torch.ones(3, 4)}, "a", 2) == (3, 4)
