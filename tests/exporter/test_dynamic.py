"""int8 for CPUs: exact where integers are, row by row, and chosen when a bundle is loaded."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

import mdexport
import mdruntime
import mdzoo
from mdexport import dynamic
from mdexport.dynamic import quantise_rows, write_cpu_int8
from mdexport.trace import MODULE
from mdruntime.bundle import open_bundle
from mdruntime.cli import main
from mdruntime.runner import Runner
from mdruntime.session import INT8 as CPU_INT8
from mdruntime.verify import verify

Array = NDArray[Any]
Capture = pytest.CaptureFixture[str]


def built(folder: Path, **options: Any) -> Path:
    digits = mdzoo.load(mdzoo.CATALOGUE["digits"], mdzoo.Sources())
    options = {"encoder": False, "int8": True, **options}
    for _ in mdexport.build(digits, folder, mdexport.Options(**options)):
        pass
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("dynamic") / "digits")


def product(weight: Array, path: str = "blocks.0.mlp") -> ir.Model:
    """Return a graph that multiplies its input x (batch, rows, in) with a weight (in, out)."""
    tape = ir.tape.Tape()
    x = ir.val("x", ir.DataType.FLOAT, ["batch", "rows", weight.shape[0]])
    w = tape.initializer(ir.tensor(weight), name="w")
    y = tape.op("MatMul", [x, w])
    y.name, y.dtype = "y", ir.DataType.FLOAT
    y.shape = ir.Shape(["batch", "rows", weight.shape[1]])
    node = y.producer()
    assert node is not None
    node.name, node.metadata_props[MODULE] = "product", path
    graph = ir.Graph([x], [y], nodes=tape.nodes, initializers=tape.initializers, name="g")
    graph.opset_imports[""] = 23
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, x: Array) -> Array:
    model.opset_imports["com.microsoft"] = 1
    serial = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(serial, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return np.asarray(y)


def expected(x: Array, weight: Array) -> Array:
    """Return what row by row int8 computes, in integers of any size."""
    scale = np.abs(weight).max(axis=0) / np.float32(63)
    whole = np.clip(np.rint(weight / scale), -63, 63).astype(np.int64)
    step = np.maximum(np.abs(x).max(axis=-1, keepdims=True) * np.float32(1 / 127), 2.0**-100)
    rows = np.clip(np.rint(x / step.astype(np.float32)), -128, 127).astype(np.int64)
    return np.asarray((rows @ whole) * scale.astype(np.float64) * step)


def test_products_are_those_of_integers() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((48, 20)).astype(np.float32)
    x = (rng.standard_normal((3, 5, 48)) * [[[0.01], [1], [100], [1], [1]]]).astype(np.float32)
    x[0, 3] = 0  # a row of zeros has no range
    model = product(weight)
    (initializer,) = quantise_rows(model.graph)
    assert initializer.const_value is not None
    assert np.abs(initializer.const_value.numpy()).max() == 63
    found, wanted = run(model, x), expected(x, weight)
    assert not found[0, 3].any()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * float(np.abs(wanted).max()))
    exact = x.astype(np.float64) @ weight.astype(np.float64)
    error = np.sqrt(((found - exact) ** 2).mean(axis=-1) / (exact**2 + 1e-30).mean(axis=-1))
    assert error.max() < 0.03  # of small rows too, beside rows a thousand times larger


@pytest.mark.parametrize("rows", [1, 8, 257])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums_do_not_saturate(rows: int, sign: int) -> None:
    weight = np.full((512, 16), sign * 0.5, np.float32)
    x = np.full((1, rows, 512), 3.0, np.float32)
    model = product(weight)
    quantise_rows(model.graph)
    np.testing.assert_allclose(run(model, x), sign * 0.5 * 3.0 * 512, rtol=1e-5)


def test_what_stands_outside_the_blocks_stays_as_it_is() -> None:
    model = product(np.eye(4, dtype=np.float32), path="head.map")
    assert quantise_rows(model.graph) == []
    assert [node.op_type for node in model.graph] == ["MatMul"]


def test_a_model_without_numbered_blocks_is_told_so(tmp_path: Path) -> None:
    ir.save(product(np.eye(4, dtype=np.float32), path="map"), tmp_path / "a.onnx")
    with pytest.raises(mdruntime.VerificationError, match=r"numbered list.*without --int8"):
        write_cpu_int8(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


def test_a_bundle_has_it_beside_its_own_precision(folder: Path) -> None:
    manifest = open_bundle(folder).manifest
    assert manifest.graphs["denoiser"].spellings[CPU_INT8] == "denoiser.int8.onnx"
    assert "tensorrt-int8" not in manifest.graphs["denoiser"].spellings
    record = manifest.verification.spellings[CPU_INT8]
    assert record.measured["close_agreement"] == 1
    assert 0 < record.measured["mean_log_prob"] < 0.01
    whole, small = (folder / f"denoiser{end}" for end in (".weights", ".int8.weights"))
    assert 3 < whole.stat().st_size / small.stat().st_size < 5
    assert verify(open_bundle(folder), spelling=CPU_INT8)


def test_a_sample_is_the_same_in_any_batch(folder: Path) -> None:
    options: dict[str, Any] = {"seed": 3, "order": "moment", "rounds": 4, "substeps": 3}
    with mdruntime.load(folder, precision="int8", threads=1) as pipeline:
        together = pipeline.generate([3, 5, 7, 9], guidance=1.0, **options)
        for index, label in enumerate((3, 5, 7, 9)):
            (alone,) = pipeline.generate([label], guidance=1.0, first_index=index, **options)
            assert np.array_equal(alone, together[index])


def test_what_does_not_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic, "WEIGHT_LEVELS", 1)
    with pytest.raises(mdruntime.VerificationError, match=r"int8 does not hold.*without --int8"):
        built(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_precision_is_chosen_when_a_bundle_is_loaded(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    bundle = open_bundle(folder)
    for asked, found in (("", "fp32"), ("fp32", "fp32"), ("int8", "int8")):
        with contextlib.closing(Runner(bundle, precision=asked)) as runner:
            assert runner.precision == runner.clone().precision == found
    assert main(["verify", str(folder), "--precision", "int8"]) == 0
    assert "mean_log_prob" in capsys.readouterr().out
    png = str(tmp_path / "x.png")
    assert main(["generate", str(folder), "-l", "3", "--precision", "int8", "-o", png]) == 0
    bench = ["bench", str(folder), "--precision", "int8", "--presets", "fast", "--repeats", "1"]
    capsys.readouterr()
    assert main([*bench, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["precision"] == "int8"
    assert main(["info", str(folder)]) == 0
    assert "precision  fp32, int8\n" in capsys.readouterr().out


def test_a_precision_that_is_not_there_is_refused(folder: Path, capsys: Capture) -> None:
    with pytest.raises(mdruntime.SamplingError, match=r"one of fp32, int8 here, got 'fp16'"):
        mdruntime.load(folder, precision="fp16")
    with pytest.raises(mdruntime.ProviderError, match=r"not for 'cuda'; choose --provider cpu$"):
        mdruntime.load(folder, "cuda", precision="int8")
    assert main(["verify", str(folder), "--provider", "tensorrt", "--precision", "int8"]) == 4
    assert "build engines with: mdruntime build --int8" in capsys.readouterr().err
    bundle = open_bundle(folder, check=False)
    graphs = dict(bundle.manifest.graphs)
    graphs["denoiser"] = replace(graphs["denoiser"], spellings={})
    without = replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))
    with pytest.raises(mdruntime.SamplingError, match=r"fp32 here, got 'int8'; .* --int8$"):
        Runner(without, precision="int8")


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_rows_after_a_gelu_need_no_minimum(approximate: str) -> None:
    """Its values are never below -0.171: whatever is less than that bound cannot be lost."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((48, 20)).astype(np.float32)
    model = product(weight)
    (node,) = model.graph
    x = model.graph.inputs[0]
    gelu = ir.node("Gelu", [x], {"approximate": approximate})
    gelu.outputs[0].name, gelu.outputs[0].dtype = "gelu", ir.DataType.FLOAT
    model.graph.insert_before(node, gelu)
    node.replace_input_with(0, gelu.outputs[0])
    assert len(quantise_rows(model.graph)) == 1
    assert "ReduceMin" not in {node.op_type for node in model.graph}
    rows = rng.standard_normal((2, 5, 48)).astype(np.float32)
    rows[0, 0] = -np.linspace(0.1, 3, 48)  # nothing but the hollow of the curve
    rows[0, 1] *= 100
    exact = torch.nn.functional.gelu(torch.from_numpy(rows), approximate=approximate).numpy()
    found, wanted = run(model, rows), exact.astype(np.float64) @ weight
    error = np.sqrt(((found - wanted) ** 2).mean(-1) / (wanted**2).mean(-1))
    assert error.max() < 0.03
    dense = torch.nn.functional.gelu(torch.linspace(-3, 0, 100_001), approximate=approximate)
    assert -float(dense.min()) < dynamic._GELU_DEPTH
