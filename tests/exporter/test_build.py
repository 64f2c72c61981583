"""What the exporter promises: one graph, verified, whole or absent."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

import mdexport
import mdruntime
import mdzoo
from mdexport import graphs, spelling
from mdexport import head as torch_head
from mdexport.precision import LIMITS
from mdexport.reference import record
from mdruntime.bundle import open_bundle
from mdruntime.head import Controls, Draws, draw, guided
from mdruntime.session import open_session
from mdruntime.study import chosen
from mdruntime.verify import verify
from mdzoo.maskgit import MaskGIT, MaskGITConfig
from mdzoo.palette import Palette

TINY = MaskGITConfig(grid=4, codebook=6, classes=3, width=16, depth=2, heads=2, hidden=24)


def tiny_model(seed: int = 0) -> mdzoo.Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = MaskGIT(TINY).eval()
        torch.nn.init.normal_(denoiser.tokens.weight, std=0.3)
        torch.nn.init.normal_(denoiser.positions, std=0.3)
    digits = mdzoo.load(mdzoo.CATALOGUE["digits"], mdzoo.Sources(random_seed=0))
    return replace(digits, name="tiny", denoiser=denoiser, decoder=Palette(4, 6), encoder=None)


def run_build(model: mdexport.Model, folder: Path, **options: object) -> None:
    for _ in mdexport.build(model, folder, mdexport.Options(**options)):  # type: ignore[arg-type]
        pass


@pytest.fixture(scope="module")
def half_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half") / "tiny-fp16"
    run_build(tiny_model(), folder, precision="fp16", logits=True)
    return folder


def controls(batch: int, seed: int) -> Controls:
    random = np.random.default_rng(seed)

    def between(low: float, high: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        return random.uniform(low, high, batch).astype(np.float32)

    return Controls(between(0, 4), between(0.5, 2), between(1, 6), between(1, 6))


@pytest.mark.parametrize("codebook", [2, 17, 1024])
def test_the_traced_head_is_the_runtimes_head(codebook: int) -> None:
    random = np.random.default_rng(codebook)
    rows = (4 * random.standard_normal((6, 40, codebook))).astype(np.float32)
    given = controls(3, codebook)
    uniforms = random.random((3, 40), np.float32)
    mixed = guided(rows[:3], rows[3:], given.guidance)
    expected = draw(mixed, given, uniforms)
    logits = torch_head.guided(
        torch.from_numpy(rows),
        torch.arange(3),
        torch.arange(3, 6),
        torch.from_numpy(given.guidance),
    )
    np.testing.assert_allclose(logits.numpy(), mixed, atol=1e-5)
    tensors = {name: torch.from_numpy(value) for name, value in given._asdict().items()}
    found = torch_head.draw(logits, tensors, torch.from_numpy(uniforms))
    for name in Draws._fields[1:]:
        np.testing.assert_allclose(found[name], getattr(expected, name), atol=3e-4, err_msg=name)
    assert (found["sampled"].numpy() == expected.sampled).mean() > 0.99


def test_the_exported_head_is_the_runtimes_head(digits_bundle: Path) -> None:
    graph, numpy = (mdruntime.load(digits_bundle, head=head) for head in ("graph", "numpy"))
    labels = list(range(10))
    for step, other in zip(graph.steps(labels, seed=3), numpy.steps(labels, seed=3), strict=True):
        np.testing.assert_array_equal(step.tokens, other.tokens)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7, 1.0])
def test_logits_are_those_of_the_pytorch_model(digits_bundle: Path, ratio: float) -> None:
    model = mdzoo.load(mdzoo.CATALOGUE["digits"], mdzoo.Sources()).denoiser
    spec = model.spec
    random = np.random.default_rng(int(10 * ratio))
    tokens = random.integers(0, spec.codebook, (4, spec.length))
    tokens[random.random(tokens.shape) < ratio] = spec.mask_token
    labels = np.array([0, 9, -1, 4])
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens), torch.from_numpy(labels))
    row = spec.context[0]
    ids = np.where(labels < 0, row.dropped, row.offset + labels)
    feeds = {
        "tokens": np.concatenate([tokens, ids[:, None]], 1).astype(np.int32),
        "positions": np.tile(np.arange(spec.canvas, dtype=np.int32), (4, 1)),
        "columns": np.tile(np.arange(spec.length, dtype=np.int32), (4, 1)),
        "conditional": np.arange(4, dtype=np.int32),
        "unconditional": np.arange(4, dtype=np.int32),
        **{name: np.ones(4, np.float32) for name in Controls._fields},
        "uniforms": np.zeros((4, spec.length), np.float32),
    }
    session = open_session(open_bundle(digits_bundle), "denoiser", "cpu")
    session.start(spec.canvas)
    found = session.run(feeds, ["logits"])["logits"]
    np.testing.assert_allclose(found, expected[..., : spec.codebook], atol=1e-4)


def test_the_bundle_says_what_it_is(digits_bundle: Path) -> None:
    manifest = open_bundle(digits_bundle).manifest
    model = mdzoo.CATALOGUE["digits"]
    assert manifest.denoiser.length == 64
    assert manifest.presets["published"] == model.presets["published"]
    assert manifest.study is not None  # the shipped one, which the other presets follow
    best = chosen(manifest.study.rows)["best"]
    assert manifest.presets["best"] == best.sampling
    assert manifest.graphs["denoiser"].float32_operators == ()
    assert manifest.buckets == (8, 16, 32, 64, 65)
    limits, measured = manifest.verification.limits, manifest.verification.measured
    assert limits == LIMITS["fp32"]
    assert measured.keys() == {*limits, "token_agreement", "close_agreement", "mean_log_prob"}
    assert measured["log_prob"] < 5e-5
    report = (digits_bundle / "report.md").read_text()
    assert f"{measured['log_prob']:.6g}" in report


def test_half_precision_is_in_the_graph_with_islands(half_bundle: Path) -> None:
    bundle = open_bundle(half_bundle)
    graph = bundle.manifest.graphs["denoiser"]
    islands = set(graph.float32_operators)
    assert {"LayerNormalization", "LogSoftmax", "CumSum", "Attention (softmax)"} <= islands
    caches = [tensor for tensor in graph.inputs if tensor.name.startswith("past.")]
    assert len(caches) == 4
    assert {tensor.dtype for tensor in caches} == {"float16"}
    model = ir.load(half_bundle / graph.file)
    norms = [node for node in model.graph if node.op_type == "LayerNormalization"]
    assert norms
    assert {node.outputs[0].dtype for node in norms} == {ir.DataType.FLOAT}
    products = [node.outputs[0].dtype for node in model.graph if node.op_type == "MatMul"]
    assert products.count(ir.DataType.FLOAT16) >= 4 * TINY.depth
    assert verify(bundle)


@pytest.mark.parametrize("which", ["digits_bundle", "half_bundle"])
def test_the_tensorrt_spelling_has_no_young_operators(
    which: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(which)
    bundle = open_bundle(folder)
    path = bundle.path("denoiser", "tensorrt")
    onnx.checker.check_model(str(path))
    model = onnx.load(path, load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [
        ("", spelling.TENSORRT_OPSET)
    ]
    operators = {node.op_type for node in model.graph.node}
    assert not operators & {"Attention", "RMSNormalization", "RotaryEmbedding"}
    assert "Softmax" in operators
    files = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert files == {"denoiser.weights"}
    outputs = [value.name for value in model.graph.output]
    assert ("logits" in outputs) == (which == "half_bundle")  # built with logits=True
    assert verify(bundle, spelling="tensorrt")


def test_graphs_hold_no_trace_of_the_machine_that_made_them(half_bundle: Path) -> None:
    source = str(Path(mdexport.__file__).parent).encode()
    for path in half_bundle.rglob("*"):
        if path.is_file():
            assert source not in path.read_bytes(), path.name


def _shifted(self: MaskGIT, *inputs: Any) -> tuple[Tensor, list[Tensor]]:
    logits, refreshed = MaskGIT.step(self, *inputs)
    return logits + 0.01 * torch.arange(logits.shape[-1]), refreshed


def test_a_wrong_cached_pass_is_found_before_anything_is_traced(tmp_path: Path) -> None:
    model = tiny_model()
    model.denoiser.step = _shifted.__get__(model.denoiser)  # type: ignore[method-assign]
    with pytest.raises(mdruntime.VerificationError, match=r"step\(\) differs from its forward\(\)"):
        run_build(model, tmp_path / "wrong")
    assert not list(tmp_path.iterdir())


def _nudged(graph: ir.Model) -> None:
    """Change one weight of an exported graph by a little."""
    name, value = next(
        (name, value)
        for name, value in graph.graph.initializers.items()
        if value.const_value is not None and value.const_value.size == TINY.width * TINY.hidden
    )
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array[0, 0] += 0.2
    value.const_value = ir.tensor(array, name=name)


@pytest.mark.parametrize(
    ("victim", "where"), [("keep_softmax_in_float32", ""), ("lower", "TensorRT spelling: ")]
)
def test_a_graph_that_computes_something_else_is_never_published(
    victim: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = spelling if hasattr(spelling, victim) else graphs
    genuine: Callable[[ir.Model], None] = getattr(module, victim)

    def sabotaged(graph: ir.Model) -> None:
        genuine(graph)
        if graph.graph.outputs[0].name == "sampled":
            _nudged(graph)

    monkeypatch.setattr(module, victim, sabotaged)
    with pytest.raises(mdruntime.VerificationError, match=f"verification failed: {where}"):
        run_build(tiny_model(), tmp_path / "wrong")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept_until_its_successor_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "precious").write_text("kept")
    with pytest.raises(FileExistsError, match="pass --force"):
        run_build(tiny_model(), folder)
    model = tiny_model()
    broken = copy.copy(model.denoiser)
    broken.step = _shifted.__get__(broken)  # type: ignore[method-assign]
    with pytest.raises(mdruntime.VerificationError):
        run_build(replace(model, denoiser=broken), folder, force=True)
    assert (folder / "precious").read_text() == "kept"
    run_build(model, folder, force=True)
    assert not (folder / "precious").exists()
    assert open_bundle(folder).manifest.name == "tiny"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_recorded_passes_cover_full_and_partial_guided_and_plain() -> None:
    model = tiny_model().denoiser
    passes, tokens = record(model)
    rows = [one["tokens"].shape for one in passes]
    assert tokens.max() < TINY.codebook
    assert {shape[1] == model.spec.canvas for shape in rows} == {True, False}
    assert {shape[0] for shape in rows} == {2, 4}
    ratios = {float((one["tokens"] == TINY.codebook).mean().round(1)) for one in passes}
    assert len(ratios) >= 4
