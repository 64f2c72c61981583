"""Graphs against TensorRT's published operators: what stands in the list passes, all else not."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mdexport import operators
from mdexport.lowering import lower
from mdexport.operators import misfits, require_listed
from mdruntime.errors import VerificationError

FLOAT, HALF, BYTE = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8
LIST = json.loads(Path(operators.__file__).with_name("tensorrt_operators.json").read_bytes())
BEFORE_ONNX_1_0 = {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}


def value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def written(
    folder: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    *,
    opset: int = 20,
    domains: Sequence[str] = (),
    known: Sequence[onnx.ValueInfoProto] = (),
    **initializers: NDArray[Any],
) -> Path:
    weights = [numpy_helper.from_array(array, name) for name, array in initializers.items()]
    graph = helper.make_graph(nodes, "planted", inputs, outputs, weights, value_info=known)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    path = folder / "planted.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def one(
    folder: Path, operator: str, kind: int = FLOAT, out: int | None = None, **attributes: Any
) -> Path:
    """A graph of one operator of one input."""
    domain = attributes.pop("domain", "")
    node = helper.make_node(operator, ["x"], ["y"], domain=domain, **attributes)
    out = kind if out is None else out
    domains = [domain] if domain else []
    return written(
        folder, [node], [value("x", kind, 2, 3)], [value("y", out, "a", "b")], domains=domains
    )


def reduced(folder: Path, *, constant: bool) -> Path:
    node = helper.make_node("ReduceSum", ["x", "axes"], ["y"])
    x, y = value("x", FLOAT, 2, 3), value("y", FLOAT, "a", "b")
    if constant:
        return written(folder, [node], [x], [y], axes=np.array([1], np.int64))
    return written(folder, [node], [x, value("axes", TensorProto.INT64, 1)], [y])


def scattered(folder: Path, reduction: str) -> Path:
    node = helper.make_node("ScatterND", ["x", "where", "new"], ["y"], reduction=reduction)
    inputs = [value("x", FLOAT, 4), value("where", TensorProto.INT64, 1, 1), value("new", FLOAT, 1)]
    return written(folder, [node], inputs, [value("y", FLOAT, 4)])


def normalised(folder: Path, outputs: Sequence[str]) -> Path:
    node = helper.make_node("LayerNormalization", ["x", "x"], outputs)
    return written(
        folder, [node], [value("x", FLOAT, 3)], [value(outputs[0], FLOAT, "a")], opset=17
    )


def inside(folder: Path) -> Path:
    """An unlisted operator in a branch."""

    def branch(operator: str) -> onnx.GraphProto:
        return helper.make_graph(
            [helper.make_node(operator, ["x"], ["z"])], operator, [], [value("z", FLOAT, 2)]
        )

    node = helper.make_node(
        "If", ["c"], ["y"], then_branch=branch("Det"), else_branch=branch("Abs")
    )
    inputs = [value("c", TensorProto.BOOL), value("x", FLOAT, 2)]
    return written(folder, [node], inputs, [value("y", FLOAT, "a")])


def bytes_moved(folder: Path) -> Path:
    nodes = [
        helper.make_node("Transpose", ["x"], ["moved"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["moved"], ["y"], to=FLOAT),
    ]
    return written(
        folder, nodes, [value("x", BYTE, "n", 2, 3, 4)], [value("y", FLOAT, "n", 4, 2, 3)]
    )


def local(folder: Path) -> Path:
    path = one(folder, "Own", domain="mine")
    model = onnx.load(path)
    body = [helper.make_node("Abs", ["x"], ["y"])]
    imports = [helper.make_opsetid("", 20)]
    model.functions.append(helper.make_function("mine", "Own", ["x"], ["y"], body, imports))
    onnx.save(model, path)
    return path


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "operator": (lambda f: one(f, "Bernoulli"), "operator Bernoulli"),
    "later operator": (lambda f: one(f, "Swish"), "Swish (since TensorRT 11.0 only)"),
    "domain": (lambda f: one(f, "FastGelu", domain="com.microsoft"), "com.microsoft.FastGelu"),
    "type": (lambda f: one(f, "Exp", TensorProto.DOUBLE), "operator Exp of DOUBLE"),
    "type of output": (lambda f: one(f, "Cast", FLOAT, TensorProto.INT8, to=3), "Cast of INT8"),
    "operator in a branch": (inside, "operator Det"),
    "axes": (lambda f: reduced(f, constant=False), "ReduceSum whose input 1 is no constant"),
    "reduction": (lambda f: scattered(f, "add"), "ScatterND with reduction add"),
    "outputs": (lambda f: normalised(f, ["y", "mean"]), "LayerNormalization with more than 1"),
    "bytes inside": (bytes_moved, "Transpose with UINT8 inside the graph"),
    "function": (local, "model-local function Own"),
}
LISTED: dict[str, Callable[[Path], Path]] = {
    "operator": lambda f: one(f, "Exp"),
    "half": lambda f: one(f, "Erf", HALF),
    "bytes at the border": lambda f: one(f, "Cast", FLOAT, BYTE, to=BYTE),
    "axes": lambda f: reduced(f, constant=True),
    "no reduction": lambda f: scattered(f, "none"),
    "one output": lambda f: normalised(f, ["y"]),
}


@pytest.mark.parametrize("planted", REFUSED)
def test_what_is_not_listed_is_refused_by_name(tmp_path: Path, planted: str) -> None:
    make, text = REFUSED[planted]
    path = make(tmp_path)
    with pytest.raises(VerificationError) as caught:
        require_listed(path)
    assert text in str(caught.value)
    assert "planted.onnx" in str(caught.value)
    assert "TensorRT 10.3" in str(caught.value)


@pytest.mark.parametrize("planted", LISTED)
def test_what_is_listed_passes(tmp_path: Path, planted: str) -> None:
    path = LISTED[planted](tmp_path)
    require_listed(path)
    assert misfits(path) == []


@pytest.mark.parametrize(("opset", "listed"), [(8, False), (9, True), (20, True), (23, False)])
def test_opsets_have_a_range(tmp_path: Path, opset: int, listed: bool) -> None:
    x, y = value("x", FLOAT, 2), value("y", FLOAT, 2)
    path = written(tmp_path, [helper.make_node("Exp", ["x"], ["y"])], [x], [y], opset=opset)
    assert misfits(path) == ([] if listed else [f"opset {opset} (listed: 9 to 20)"])


def test_a_value_of_unknown_type_is_no_pass(tmp_path: Path) -> None:
    path = one(tmp_path, "Exp")
    model = onnx.load(path)
    model.graph.node.add().CopyFrom(helper.make_node("Own", ["x"], ["z"], domain="mine"))
    model.graph.node.add().CopyFrom(helper.make_node("Exp", ["z"], ["v"]))
    model.opset_import.add().CopyFrom(helper.make_opsetid("mine", 1))
    onnx.save(model, path)
    assert misfits(path) == ["operator Exp of an unknown type (z)", "operator mine.Own"]


def test_the_list_names_its_sources_and_onnxs_operators() -> None:
    assert "operators.md" in LIST["source"]
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    named = {*LIST["operators"], *LIST["later"], *LIST["constant_inputs"], *LIST["attributes"]}
    assert named - known <= BEFORE_ONNX_1_0
    assert set(LIST["constant_inputs"]) | set(LIST["outputs"]) <= set(LIST["operators"])
    assert not set(LIST["later"]) & set(LIST["operators"])
    for operator, attributes in LIST["attributes"].items():
        assert set(attributes) <= set(onnx.defs.get_schema(operator, 20, "").attributes)


def test_a_bundles_spelling_for_tensorrt_passes_and_the_other_one_does_not(
    digits_bundle: Path,
) -> None:
    require_listed(digits_bundle / "denoiser.tensorrt.onnx")
    with pytest.raises(VerificationError, match="operator Attention"):
        require_listed(digits_bundle / "denoiser.onnx")


def image_graph(folder: Path) -> Path:
    """What image graphs are made of that needs another spelling, traced as opset 23."""
    nodes = [
        helper.make_node("Transpose", ["images"], ["moved"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["moved"], ["numbers"], to=FLOAT),
        helper.make_node(
            "GroupNormalization",
            ["numbers", "scale", "bias"],
            ["n"],
            name="groups",
            num_groups=2,
            epsilon=1e-3,
        ),
        helper.make_node("Reshape", ["n", "heads"], ["q"]),
        helper.make_node("Attention", ["q", "q", "q"], ["mixed"], name="attention"),
        helper.make_node("Less", ["mixed", "zero"], ["negative"]),
        helper.make_node("Equal", ["negative", "true"], ["same"]),
        helper.make_node("Where", ["same", "zero", "mixed"], ["out"]),
    ]
    draws = np.random.default_rng(0)
    return written(
        folder,
        nodes,
        [value("images", BYTE, "n", 4, 4, 6)],
        [value("out", FLOAT, "n", 2, 12, 4)],
        opset=23,
        known=[value("n", FLOAT, "n", 6, 4, 4), value("q", FLOAT, "n", 2, 12, 4)],
        scale=draws.normal(1, 0.3, 6).astype(np.float32),
        bias=draws.normal(0, 0.3, 6).astype(np.float32),
        heads=np.array([0, 2, 12, 4], np.int64),
        zero=np.zeros((), np.float32),
        true=np.array(True),
    )


def test_lowered_graphs_are_listed_and_compute_the_same_numbers(tmp_path: Path) -> None:
    path, spelled = image_graph(tmp_path), tmp_path / "spelled.onnx"
    found = misfits(path)
    assert any("Attention" in each for each in found)
    assert any("operator Equal of BOOL" in each for each in found)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.load(path)))
    lower(model)
    ir.save(model, spelled)
    assert misfits(spelled) == []
    onnx.checker.check_model(onnx.load(spelled), full_check=True)
    images = np.random.default_rng(1).integers(0, 256, (3, 4, 4, 6)).astype(np.uint8)
    expected, result = (
        onnxruntime.InferenceSession(each, providers=["CPUExecutionProvider"]).run(
            None, {"images": images}
        )[0]
        for each in (path, spelled)
    )
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(result, expected, atol=2e-6)


def test_bytes_that_are_computed_with_have_no_other_spelling(tmp_path: Path) -> None:
    nodes = [helper.make_node("Max", ["x", "x"], ["y"])]
    path = written(tmp_path, nodes, [value("x", BYTE, 2)], [value("y", BYTE, 2)], opset=23)
    with pytest.raises(ValueError, match="Max of bytes"):
        lower(ir.load(path))
