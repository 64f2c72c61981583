"""Engines belong to one machine, bundle and set of choices; all else is refused unread."""

import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mdruntime.bundle import Bundle, file_spec, open_bundle
from mdruntime.cuda import Cuda
from mdruntime.errors import EngineError, SamplingError
from mdruntime.trt import store
from mdruntime.trt.identity import BuildOptions, EngineIdentity, current
from mdruntime.trt.profiles import profiles
from mdruntime.trt.store import EngineRecord, PlanRecord, find, write_record

GIB = 1 << 30
Make = Callable[..., tuple[Path, EngineRecord]]


class Device:
    """As much of a GPU as an identity asks for."""

    runtime_version = (12, 6)

    def name(self) -> str:
        return "Orin"

    def compute_capability(self) -> tuple[int, int]:
        return 8, 7

    def memory(self) -> tuple[int, int]:
        return 5 * GIB, 15 * GIB + GIB // 3


def identity(bundle: Bundle, options: BuildOptions | None = None) -> EngineIdentity:
    trt = cast(Any, SimpleNamespace(__version__="10.3.0"))
    return current(bundle, cast(Cuda, Device()), trt, options)


@pytest.fixture
def bundle(digits_bundle: Path, tmp_path: Path) -> Bundle:
    return open_bundle(shutil.copytree(digits_bundle, tmp_path / "my digits"), check=False)


@pytest.fixture
def make(bundle: Bundle) -> Make:
    """Return a function that writes engines, with changes to their identity."""

    def write(options: BuildOptions | None = None, **changes: Any) -> tuple[Path, EngineRecord]:
        options = options or BuildOptions()
        made = replace(identity(bundle, options), **changes)
        folder = bundle.folder / store.ENGINES / made.key
        folder.mkdir(parents=True)
        (folder / "denoiser.plan").write_bytes(b"plan")
        spec = file_spec(folder / "denoiser.plan")
        shapes = profiles(bundle.manifest, "denoiser", options.ranges)
        plan = PlanRecord(spec.sha256, spec.bytes, shapes, 200.0, {"fp32": 3})
        time = store.now()
        record = EngineRecord(
            store.RECORD_FORMAT,
            made,
            options,
            {"denoiser": plan},
            fusion_barrier=False,
            measured={"score": 1e-5},
            limits={"score": 1e-3},
            timings={},
            seconds=372.0,
            built=time,
            chosen=time,
        )
        write_record(folder, record)
        return folder, record

    return write


def test_engines_of_this_machine_are_found_whatever_they_were_built_for(
    bundle: Bundle, make: Make
) -> None:
    options = BuildOptions(max_batch=8, optimisation_level=2)
    folder, record = make(options)
    found = find(bundle, identity(bundle))
    assert found == store.Engines(folder, record)
    assert found.plan("denoiser") == folder / "denoiser.plan"
    assert found.profiles("denoiser") == profiles(bundle.manifest, "denoiser", options.ranges)
    with pytest.raises(EngineError, match="no plan of 'decoder', only of denoiser"):
        found.plan("decoder")


OTHER: dict[str, Any] = {
    "tensorrt": "10.7.0",
    "compute_capability": "8.6",
    "gpu": "Orin, 31 GiB",
    "cuda": "12.8",
    "os": "Linux riscv",
    "bundle": "0" * 64,
    "graphs": "1" * 64,
    "profiles": "2" * 64,
    "precision": "fp16",
    "version_compatible": True,
    "hardware_compatible": True,
    "optimisation_level": 5,
}


def test_every_field_of_an_identity_has_another_value_to_be_tried() -> None:
    assert [field.name for field in fields(EngineIdentity)] == list(OTHER)


@pytest.mark.parametrize("name", OTHER)
def test_each_field_by_itself_refuses_engines_with_the_exact_command(
    name: str, bundle: Bundle, make: Make
) -> None:
    folder, record = make(**{name: OTHER[name]})
    with pytest.raises(EngineError) as caught:
        find(bundle, identity(bundle))
    text, here = str(caught.value), getattr(identity(bundle), name)
    assert caught.value.exit_code == 5
    assert f"engines/{folder.name} " in text
    short = [
        f"{value[:12]}..." if name in ("bundle", "graphs", "profiles") else str(value)
        for value in (here, OTHER[name])
    ]
    assert f"something else: {name} is {short[0]} here and was {short[1]} there; build" in text
    command = f"mdruntime build '{bundle.folder}'"
    assert text.endswith(f"build them for this machine with: {command} (6 min last time)")
    assert folder.is_dir()  # it stays: another machine may share the folder
    assert record.identity.key == folder.name != identity(bundle).key


def test_the_command_repeats_all_choices(bundle: Bundle, make: Make) -> None:
    options = BuildOptions(
        max_batch=8, version_compatible=True, hardware_compatible=True, optimisation_level=1
    )
    make(options, cuda="11.8")
    with pytest.raises(EngineError) as caught:
        find(bundle, identity(bundle))
    assert (
        f"mdruntime build '{bundle.folder}' --max-batch 8 --version-compatible "
        "--hardware-compatible --optimisation-level 1 (6 min last time)" in str(caught.value)
    )
    assert BuildOptions(int8=True).flags == ["--int8"]


def test_of_several_foreign_engines_the_nearest_is_explained(bundle: Bundle, make: Make) -> None:
    make(cuda="11.8", tensorrt="10.4.0", gpu="Thor, 120 GiB")
    make(cuda="13.0")
    with pytest.raises(EngineError, match=r"cuda is 12.6 here and was 13.0 there \(and 1 more"):
        find(bundle, identity(bundle))


def test_without_engines_the_command_is_said(bundle: Bundle) -> None:
    with pytest.raises(EngineError) as caught:
        find(bundle, identity(bundle))
    assert str(caught.value).endswith(f"with: mdruntime build '{bundle.folder}'")


@pytest.mark.parametrize(
    ("built", "here", "fits"),
    [
        ("10.3.0", "10.3.0", True),
        ("10.3.0", "10.16.1.11", True),  # a newer version of the same major one
        ("10.3.0", "11.4.0.106", True),  # from 10 to 11 too, says the support matrix of 11.4
        ("10.16.1", "10.3.0", False),  # never an older one
        ("11.0.0", "10.16.1", False),
    ],
)
def test_version_compatible_engines_run_in_newer_versions_only(
    built: str, here: str, fits: bool, bundle: Bundle
) -> None:
    for flag in (False, True):
        made = identity(bundle, BuildOptions(version_compatible=flag))
        made = replace(made, tensorrt=built)
        differences = made.differences(replace(made, tensorrt=here))
        assert (not differences) == (fits if flag else built == here)
        assert made.differences(replace(made, cuda="13.0")) == [("cuda", "12.6", "13.0")]
        assert made.differences(replace(made, gpu="Thor, 120 GiB"))


@pytest.mark.parametrize(
    ("built", "here", "fits"),
    [("8.6", "8.9", True), ("9.0", "8.0", True), ("8.7", "12.0", True), ("8.6", "7.5", False)],
)
def test_hardware_compatible_engines_run_on_ampere_and_newer(
    built: str, here: str, fits: bool, bundle: Bundle
) -> None:
    for flag in (False, True):
        made = identity(bundle, BuildOptions(hardware_compatible=flag))
        made = replace(made, compute_capability=built, gpu="A")
        found = made.differences(replace(made, compute_capability=here, gpu="B"))
        assert [name for name, *_ in found] == (
            [] if flag and fits else ["compute_capability", "gpu"]
        )
        assert made.differences(replace(made, tensorrt="10.4.0"))


def test_the_engines_last_asked_for_are_used(bundle: Bundle, make: Make) -> None:
    first, _ = make()
    second, _ = make(BuildOptions(max_batch=4))
    assert find(bundle, identity(bundle)).folder == second
    store.choose(store.read_engines(first))
    assert find(bundle, identity(bundle)).folder == first
    assert second.is_dir()


def test_memory_is_part_of_a_gpu(bundle: Bundle) -> None:
    assert identity(bundle).gpu == "Orin, 15 GiB"


def test_a_key_names_version_device_and_precision_and_depends_on_everything(
    bundle: Bundle,
) -> None:
    here = identity(bundle)
    assert here.key.startswith("trt10.3.0-sm87-fp32-")
    keys = {replace(here, **{name: value}).key for name, value in OTHER.items()}
    assert len(keys | {here.key}) == len(OTHER) + 1


def test_damaged_engines_are_not_used(bundle: Bundle, make: Make) -> None:
    folder, _ = make()
    (folder / "denoiser.plan").write_bytes(b"PLAN")
    cure = f"build again with: mdruntime build '{bundle.folder}'"
    with pytest.raises(EngineError, match="SHA-256 differs") as caught:
        find(bundle, identity(bundle))
    assert str(caught.value).endswith(cure)
    assert store.same(bundle, identity(bundle)) is None
    (folder / "denoiser.plan").unlink()
    with pytest.raises(EngineError, match=r"denoiser\.plan is missing") as caught:
        find(bundle, identity(bundle))
    assert str(caught.value).endswith(cure)
    for text in ("{", "[]", '{"format": 1}'):
        (folder / "engine.json").write_text(text)
        assert list(store.records(bundle)) == []
        with pytest.raises(EngineError, match="holds no engines"):
            find(bundle, identity(bundle))


def test_an_unfinished_folder_is_no_engine(bundle: Bundle, make: Make) -> None:
    folder, _ = make()
    folder.rename(f"{folder}.77{store.PARTIAL}")
    with pytest.raises(EngineError, match="holds no engines"):
        find(bundle, identity(bundle))


def test_what_killed_builds_left_is_swept_and_what_others_are_at_is_not(tmp_path: Path) -> None:
    import os

    dead = 2**22 + 1  # above the largest process id
    kept, gone = f"key.{os.getpid()}.partial", [f"key.{dead}.partial", f"{dead}.partial.log"]
    for name in (kept, gone[0], "key"):
        (tmp_path / name).mkdir()
    (tmp_path / gone[1]).touch()
    store.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", kept]


def test_publishing_replaces_a_predecessor_in_one_step(tmp_path: Path) -> None:
    for name in ("new", "key"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    store.publish(tmp_path / "new", tmp_path / "key")
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    assert (tmp_path / "key" / "file").read_text() == "new"


def test_choices_out_of_range_are_refused() -> None:
    make: Any = BuildOptions
    for name, value in (("max_batch", 0), ("max_batch", 5000), ("optimisation_level", 6)):
        with pytest.raises(SamplingError, match=f"{name} must be between .* got {value}"):
            make(**{name: value})
