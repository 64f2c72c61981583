"""Engines are published only if they are right, on the stand-ins for TensorRT and CUDA.

Tasks run in this process here, one after the other; ``test_cli_build.py`` runs them in processes of
their own, as users do.
"""

import json
import runpy
import shutil
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mdruntime.bundle import MANIFEST, Bundle, file_spec, open_bundle
from mdruntime.cuda import open_cuda
from mdruntime.errors import BundleError, SamplingError, VerificationError
from mdruntime.manifest import SpellingRecord, dump
from mdruntime.trt import api, child, store, trial
from mdruntime.trt.build import build
from mdruntime.trt.builder import PlanRequest, build_plan
from mdruntime.trt.identity import INT8, BuildOptions, current
from mdruntime.trt.launch import Event, error_of
from mdruntime.trt.steps import Progress
from mdruntime.trt.store import ENGINES, FAILED, LOG, Engines
from mdruntime.verify import read_passes
from tests import standin
from tests.standin.trt_plan import Plan

GRAPHS = ["denoiser", "decoder"]
FILES = ["build.log", *sorted(f"{graph}.plan" for graph in GRAPHS), "engine.json", "timing.cache"]
MIB = 1 << 20


INT8_SCORE = 0.1  # limit of the int8 spelling below; what it has is about a tenth of it


@pytest.fixture(scope="module")
def half_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small MaskGIT of random weights in fp16, with attention, convolutions, and int8 beside."""
    import mdexport

    families = Path(__file__).parents[1] / "exporter" / "families.py"
    model = runpy.run_path(str(families))["small_model"]("maskgit")
    folder = tmp_path_factory.mktemp("half") / "maskgit"
    for _ in mdexport.build(model, folder, mdexport.Options(precision="fp16", encoder=False)):
        pass
    quantise(open_bundle(folder, check=False))
    return folder


@pytest.fixture(scope="module")
def half_built(half_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with engines."""
    folder = shutil.copytree(half_bundle, tmp_path_factory.mktemp("built") / "maskgit")
    with pytest.MonkeyPatch.context() as patch:
        Bench(machine_of(patch)).build(open_bundle(folder, check=False))
    return Path(folder)


@pytest.fixture
def bundle(half_bundle: Path, tmp_path: Path) -> Bundle:
    return open_bundle(shutil.copytree(half_bundle, tmp_path / "maskgit"), check=False)


@pytest.fixture
def built(half_built: Path, tmp_path: Path) -> Bundle:
    return open_bundle(shutil.copytree(half_built, tmp_path / "maskgit"), check=False)


def quantise(bundle: Bundle) -> None:
    """Add a spelling whose products read activations in int8, and its limits."""
    model = onnx.load(bundle.path("denoiser", "tensorrt"), load_external_data=False)
    known = {tensor.name for tensor in model.graph.initializer}
    nodes = list[onnx.NodeProto]()
    for number, node in enumerate(model.graph.node):
        if node.op_type == "MatMul" and node.input[1] in known and number < 60:
            name, scale, zero = node.input[0], f"scale{number}", f"zero{number}"
            model.graph.initializer.append(
                numpy_helper.from_array(np.array(0.02, np.float16), scale)
            )
            model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), zero))
            nodes += [
                helper.make_node("QuantizeLinear", [name, scale, zero], [f"q{number}"]),
                helper.make_node("DequantizeLinear", [f"q{number}", scale, zero], [f"d{number}"]),
            ]
            node.input[0] = f"d{number}"
        nodes.append(node)
    assert len(nodes) > len(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    path = bundle.folder / f"denoiser.{INT8}.onnx"
    onnx.save(model, path)
    manifest, denoiser = bundle.manifest, bundle.manifest.graphs["denoiser"]
    spelled = replace(denoiser, spellings={**denoiser.spellings, INT8: path.name})
    record = SpellingRecord("a test", {"score": INT8_SCORE, "token_shift": 1.0}, {})
    spellings = {**manifest.verification.spellings, INT8: record}
    changed = replace(
        manifest,
        graphs={**manifest.graphs, "denoiser": spelled},
        files={**manifest.files, path.name: file_spec(path)},
        verification=replace(manifest.verification, spellings=spellings),
    )
    (bundle.folder / MANIFEST).write_bytes(dump(changed))


@dataclass
class Bench:
    """A machine made of stand-ins, and what was done on it."""

    machine: standin.StandIn
    tasks: list[str] = field(default_factory=list)

    def launch(self, request: Event, log: Path) -> Generator[Event, None, None]:
        """Run a task in this process; what crosses is JSON, as between processes."""
        self.tasks.append(request["task"])
        events: list[Event] = []
        with log.open("a", encoding="utf-8") as file:
            whole = json.loads(json.dumps(request))
            child.perform(whole, events.append, lambda: False, lambda x: print(x, file=file))
        self.machine.check()
        for event in json.loads(json.dumps(events)):
            if event["event"] == "failed":
                raise error_of(event)
            yield event

    def build(self, bundle: Bundle, **options: Any) -> tuple[Engines, list[Progress]]:
        force, workspace = options.pop("force", False), options.pop("workspace", 0)
        choices, said = BuildOptions(**options), list[Progress]()
        more: dict[str, Any] = {"launch": self.launch, "clock": lambda: 0.0}
        steps = build(bundle, choices, force=force, workspace=workspace, **more)
        while True:
            try:
                said.append(next(steps))
            except StopIteration as end:
                return end.value, said


def machine_of(patch: pytest.MonkeyPatch, **options: Any) -> standin.StandIn:
    """Install stand-ins, and let their clock tell what passes take."""
    machine = standin.install(patch, **options)
    streams = machine.device.streams
    patch.setattr(trial, "_REPEATS", 1)  # of timing: this clock makes no noise
    patch.setattr(trial, "perf_counter", lambda: sum(s.now for s in streams.values()) / 1000)
    return machine


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    """Return a function from what the stand-ins play to a machine."""
    return lambda **options: Bench(machine_of(monkeypatch, **options))


def in_use(bundle: Bundle) -> Engines:
    """Return what a pipeline finds."""
    return store.find(bundle, current(bundle, open_cuda(), api.import_tensorrt()))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def done(said: list[Progress]) -> list[str]:
    return [progress.name for progress in said if progress.done]


def log_of(engines: Engines) -> str:
    return (engines.folder / LOG).read_text()


@pytest.mark.parametrize("level", ["10.3", "11.4"])
def test_engines_are_built_verified_and_published(
    level: str, bundle: Bundle, bench: Callable[..., Bench]
) -> None:
    here = bench(api=level)
    engines, said = here.build(bundle)
    record = engines.record
    assert here.tasks == ["probe", "build", "build", "verify"]
    assert done(said) == ["device", *GRAPHS, "verify"]
    assert [(p.step, p.steps) for p in said if p.done] == [(n, 4) for n in range(1, 5)]
    assert names(bundle.folder / ENGINES) == [record.identity.key]
    assert names(engines.folder) == FILES
    assert set(record.plans) == set(GRAPHS)
    plan = record.plans["denoiser"]
    assert plan.bytes == (engines.folder / "denoiser.plan").stat().st_size
    assert plan.layers["fp16"] > 10
    assert [profile.name for profile in plan.profiles] == [
        f"{rows} rows, batch 1" for rows in bundle.manifest.buckets
    ]
    assert record.limits.items() >= {"score": 0.1, "psnr_db": 35.0}.items()
    assert record.measured["score"] <= 0.1
    assert record.measured["psnr_db"] >= 35
    assert record.timings["trajectory_ms"] > 0
    assert not record.fusion_barrier
    assert "score" in log_of(engines)
    assert in_use(bundle) == engines
    open_bundle(bundle.folder)  # whose own files are as they were


def test_what_is_there_is_not_built_again_unless_it_is_asked_for(
    built: Bundle, bench: Callable[..., Bench]
) -> None:
    here, first = bench(build_seconds=0.05), next(store.records(built))[1]
    again, said = here.build(built)
    assert here.tasks == ["probe"]
    assert done(said) == ["device", "engines"]
    assert replace(again.record, chosen="") == replace(first, chosen="")
    assert again.record.chosen > first.chosen
    third, said = here.build(built, force=True)
    assert names(built.folder / ENGINES) == [first.identity.key]
    assert third.record.built > first.built
    # The timing cache of the first build was used, and its times were foretold.
    builds = [progress for progress in said if progress.name == "denoiser"]
    seconds = first.plans["denoiser"].seconds
    assert builds[0].detail == f"{store.minutes(seconds)} last time"
    middle = next(progress for progress in builds if 0 < progress.share < 1)
    assert middle.left_s == seconds  # no time passes on this clock
    assert "timing cache reused" in builds[-1].detail


def test_engines_of_another_identity_stay(built: Bundle, bench: Callable[..., Bench]) -> None:
    first = bench().build(built)[0]
    second, said = bench().build(built, max_batch=4)
    other, foreign = bench(version="10.7.0").build(built)
    kept = sorted(engines.folder.name for engines in (first, second, other))
    assert names(built.folder / ENGINES) == kept
    assert all(names(built.folder / ENGINES / name) == FILES for name in kept)
    # Batches have profiles of their own.
    assert len(second.record.plans["denoiser"].profiles) == 2 * len(built.manifest.buckets)
    # Timings of another version are of no use.
    assert "timing cache reused" in next(p.detail for p in said if p.name == "denoiser" and p.done)
    assert not any("reused" in progress.detail for progress in foreign)
    assert in_use(built).folder == other.folder
    bench()
    assert in_use(built).folder == second.folder


def test_a_barrier_against_fusion_cures_attention_that_was_fused_wrong(
    bundle: Bundle, bench: Callable[..., Bench]
) -> None:
    here = bench(fault=True)
    engines, said = here.build(bundle)
    record = engines.record
    assert done(said) == ["device", *GRAPHS, "verify", "denoiser, with barrier", "verify"]
    assert next(p.detail for p in said if p.name == "verify" and p.done).startswith("WRONG: ")
    assert record.fusion_barrier
    assert record.measured["score"] <= record.limits["score"]
    assert names(engines.folder) == FILES
    log = log_of(engines)
    assert "verification failed (score" in log
    assert "trying again with a barrier against fusion" in log
    # Queries and keys of both layers; the values are a cache, which is an output anyway.
    assert "the barrier around 4 tensors cured it" in log


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("stubborn", r"failed on this device: score .*; with a barrier against fusion: score "),
        ("nan", r"failed on this device: pass 0: .* holds NaN .*; nothing was published"),
        ("single", r"'denoiser' was not published: fp16 was asked for, but .* 16 in fp32"),
    ],
)
def test_engines_that_are_wrong_are_never_published(
    wrong: str, words: str, built: Bundle, bench: Callable[..., Bench]
) -> None:
    (folder, record), place = next(store.records(built)), built.folder / ENGINES
    with pytest.raises(VerificationError, match=words) as caught:
        bench(**{wrong: True}).build(built, force=True)
    assert caught.value.exit_code == 3
    assert names(place) == sorted([FAILED, folder.name])
    assert f"(the whole log: {place / FAILED})" in str(caught.value)
    assert "denoiser begins" in (place / FAILED).read_text()
    # The good ones of the same identity are as they were, and the log goes with the next success.
    assert store.same(built, record.identity) == Engines(folder, record)
    bench().build(built)
    assert names(place) == [folder.name]


def test_the_memory_that_hides_behind_a_missing_implementation_is_named(
    bundle: Bundle, bench: Callable[..., Bench]
) -> None:
    here = bench(unimplemented=True)
    with pytest.raises(MemoryError) as caught:
        here.build(bundle, workspace=100 * MIB)
    text = str(caught.value)
    assert "ran out of device memory while tactics were timed, with a workspace of 100 MiB" in text
    assert "Could not find any implementation for node {ForeignNode" in text
    assert "try a smaller --workspace" in text
    assert here.tasks == ["probe", "build"]
    assert names(bundle.folder / ENGINES) == [FAILED]


def test_what_does_not_fit_is_refused_before_anything_is_built(
    bundle: Bundle, bench: Callable[..., Bench]
) -> None:
    here = bench(memory=400 * MIB)
    with pytest.raises(MemoryError, match=r"about \d+ MiB of device memory, and 400 MiB are free"):
        here.build(bundle)
    with pytest.raises(MemoryError, match="try a smaller --workspace"):
        bench().build(bundle, workspace=8192 * MIB)
    assert here.tasks == ["probe"]
    assert not (bundle.folder / ENGINES).exists()


def test_a_full_disk_is_found_before_anything_is_built(
    bundle: Bundle, bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, usage = bench(), shutil.disk_usage(bundle.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=MIB))
    with pytest.raises(OSError, match=r"the engines need about \d+ MiB, 1 MiB are free"):
        here.build(bundle)
    assert here.tasks == ["probe"]
    assert not (bundle.folder / ENGINES).exists()


@pytest.mark.parametrize("step", [1, 2, 4])
def test_an_interrupted_build_leaves_nothing(
    step: int, bundle: Bundle, bench: Callable[..., Bench]
) -> None:
    steps = build(bundle, BuildOptions(), launch=bench().launch)
    for progress in steps:
        if progress.step == step:
            break
    steps.close()
    assert not (bundle.folder / ENGINES).exists()


def test_choices_reach_the_builder(bundle: Bundle, bench: Callable[..., Bench]) -> None:
    options: Any = {
        "version_compatible": True,
        "hardware_compatible": True,
        "optimisation_level": 1,
    }
    engines, _ = bench().build(bundle, **options)
    plan, _ = Plan.unpack((engines.folder / "decoder.plan").read_bytes())
    assert (plan.version_compatible, plan.hardware, plan.verbosity) == (
        True,
        "AMPERE_PLUS",
        "DETAILED",
    )
    assert replace(engines.record.options, **options) == engines.record.options


def test_an_old_gpu_makes_no_engines_for_others(
    bundle: Bundle, bench: Callable[..., Bench]
) -> None:
    here = bench(compute_capability=(7, 5))
    with pytest.raises(SamplingError, match=r"capability 8\.0 or newer, got 7\.5; leave it out"):
        here.build(bundle, hardware_compatible=True)
    assert here.tasks == ["probe"]


def test_a_graph_that_cannot_be_parsed_is_named(
    tmp_path: Path, bench: Callable[..., Bench]
) -> None:
    bench()
    node = helper.make_node("MultiHeadAttention", ["x"], ["y"], "mha", domain="com.microsoft")
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = helper.make_graph([node], "g", [value], [])
    onnx.save(helper.make_model(graph), tmp_path / "odd.onnx")
    request = PlanRequest(
        "denoiser",
        str(tmp_path / "odd.onnx"),
        str(tmp_path / "odd.plan"),
        str(tmp_path / "cache"),
        (),
        BuildOptions(),
        64 * MIB,
        fusion_barrier=False,
    )
    trt = api.import_tensorrt()
    with pytest.raises(BundleError, match=r"10\.3\.0 cannot parse odd\.onnx: MultiHeadAttention"):
        build_plan(trt, api.logger(trt), request, lambda *_: None, lambda: False)
    assert names(tmp_path) == ["odd.onnx"]


def test_every_profile_is_tried(bundle: Bundle) -> None:
    buckets, passes = bundle.manifest.buckets, read_passes(bundle)
    tried = list(trial.widened(passes, buckets))
    sizes = [one["positions"].shape[1] for one in tried]
    assert {next(b for b in buckets if b >= size) for size in sizes} == set(buckets)
    assert [one for one in tried if any(one is other for other in passes)] == passes


def test_a_sample_alone_has_its_own_sequences(bundle: Bundle) -> None:
    whole = read_passes(bundle)
    for sample in (0, 1):
        for one, both in zip(trial.alone(whole, sample), whole, strict=True):
            guided = both["unconditional"][0] != both["conditional"][0]
            rows = [sample, sample + 2] if guided else [sample]
            np.testing.assert_array_equal(one["tokens"], both["tokens"][rows])
            np.testing.assert_array_equal(one["sampled"], both["sampled"][[sample]])
            assert one["conditional"].tolist() == [0]
            assert one["unconditional"].tolist() == [1 if guided else 0]
            np.testing.assert_array_equal(one["shown"], both["shown"])


# int8: accepted where it is faster here and exact enough, and refused with numbers elsewhere


def test_int8_is_used_where_it_is_faster_and_exact_enough(
    bundle: Bundle, bench: Callable[..., Bench]
) -> None:
    here = bench(engine_ms=20, int8_ms=1)
    engines, said = here.build(bundle, int8=True)
    record = engines.record
    assert here.tasks == ["probe", *["build"] * 2, "verify", "build", "verify", "compare"]
    assert done(said)[-3:] == ["denoiser", "verify", "compare"]
    assert record.identity.precision == "int8"
    assert record.plans["denoiser"].layers["int8"] > 0
    assert 1e-3 < record.measured["score"] <= record.limits["score"] == INT8_SCORE
    assert record.limits["psnr_db"] == 35.0  # the decoder is the same
    passes = len(read_passes(bundle))
    assert record.timings == pytest.approx(
        {"trajectory_ms": passes, "fp16_trajectory_ms": 20 * passes}, rel=1e-3
    )
    assert len(names(bundle.folder / ENGINES)) == 2
    assert in_use(bundle).folder == engines.folder
    # Whoever asks for the higher precision gets it back without a build.
    here.tasks.clear()
    higher, _ = here.build(bundle)
    assert here.tasks == ["probe"]
    assert in_use(bundle).folder == higher.folder != engines.folder
    assert higher.record.identity.precision == "fp16"


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (
            {"engine_ms": 1, "int8_ms": 2},
            r"not faster here: int8 36\.\d+ ms a trajectory, fp16 18\.\d+ ms "
            r"\(repeats differ by 0%; token agreement 0\.\d{4}\)",
        ),
        ({"stubborn": True}, r"verification failed on this device: score 0\.\d+ \(at most 0\.1\)"),
    ],
)
def test_int8_is_refused_where_it_is_no_gain(
    device: dict[str, Any], words: str, built: Bundle, bench: Callable[..., Bench]
) -> None:
    here = bench(**device)
    with pytest.raises(VerificationError, match=words) as caught:
        here.build(built, int8=True)
    assert here.tasks[:2] == ["probe", "build"]  # the others are there
    assert str(caught.value).startswith("int8 was refused, the fp16 engines stay in use: ")
    found = in_use(built)
    assert found.record.identity.precision == "fp16"
    assert names(built.folder / ENGINES) == sorted([FAILED, found.folder.name])


def test_int8_needs_its_spelling(bundle: Bundle, bench: Callable[..., Bench]) -> None:
    manifest = bundle.manifest
    bare = replace(manifest.graphs["denoiser"], spellings={})
    without = replace(manifest, graphs={**manifest.graphs, "denoiser": bare})
    with pytest.raises(BundleError, match=r"exported without int8; export it again with: mdexport"):
        bench().build(Bundle(bundle.folder, without), int8=True)
    assert not (bundle.folder / ENGINES).exists()
