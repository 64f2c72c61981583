"""Operators in another precision than their graph: small graphs, with NumPy as the oracle."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mdexport.precision import fit, float32_operators
from mdexport.ranges import keep_in_float32, measure, too_large
from mdexport.retype import retype, rounded, widen
from mdruntime.errors import VerificationError

HALF, FLOAT, BRAIN = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.BFLOAT16
PAIR = [("past", "present")]


def graph(kind: int, gain: float = 300.0) -> onnx.ModelProto:
    """A cache, a product whose size ``gain`` decides, and an average that makes it small again."""
    rng = np.random.default_rng(0)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weights = {
        "weight": rng.normal(size=(4, 4)).astype(np.float32).astype(dtype),
        "gain": np.array(gain, np.float32).astype(dtype),
        "back": np.array(1 / gain, np.float32).astype(dtype),
        "axis": np.array([1], np.int64),
    }
    nodes = [
        helper.make_node("Shape", ["past"], ["size"], name="size"),  # leads into no cache
        helper.make_node("Reshape", ["tokens", "size"], ["ready"], name="ready"),
        helper.make_node("MatMul", ["ready", "weight"], ["product"], name="product"),
        helper.make_node("Mul", ["product", "gain"], ["large"], name="large"),
        helper.make_node("Mul", ["large", "gain"], ["larger"], name="larger"),
        helper.make_node("ScatterND", ["past", "where", "product"], ["present"], name="scatter"),
        helper.make_node("Mul", ["larger", "back"], ["smaller"], name="smaller"),
        helper.make_node("Mul", ["smaller", "back"], ["small"], name="small"),
        helper.make_node("ReduceSum", ["present", "axis"], ["kept"], name="sum"),
        helper.make_node("Add", ["small", "kept"], ["both"], name="both"),
        helper.make_node("Cast", ["both"], ["y"], name="out", to=TensorProto.FLOAT),
    ]
    made = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info("tokens", kind, ["rows", 4]),
            helper.make_tensor_value_info("where", TensorProto.INT64, ["n", 1]),
            helper.make_tensor_value_info("past", kind, ["rows", 4]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 4]),
            helper.make_tensor_value_info("present", kind, ["rows", 4]),
        ],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def loaded(kind: int, gain: float = 300.0) -> ir.Model:
    return ir.from_proto(graph(kind, gain))


FEEDS: dict[str, NDArray[Any]] = {
    "tokens": np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32),
    "where": np.arange(3)[:, None],
    "past": np.zeros((3, 4), np.float32),
}


def run(model: ir.Model) -> dict[str, NDArray[Any]]:
    raw = ir.to_proto(model)
    onnx.checker.check_model(raw, full_check=True)
    session = onnxruntime.InferenceSession(raw.SerializeToString())
    types = {one.name: one.type for one in session.get_inputs()}
    half = {name: array.astype(np.float16) for name, array in FEEDS.items()}
    feeds = {
        name: half[name] if types[name] == "tensor(float16)" else FEEDS[name] for name in FEEDS
    }
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def expected() -> NDArray[np.float32]:
    weight = numpy_helper.to_array(graph(TensorProto.FLOAT).graph.initializer[0])
    product = FEEDS["tokens"] @ weight
    return product + product.sum(1, keepdims=True)


def type_of(model: ir.Model, name: str) -> ir.DataType | None:
    values = (*model.graph.inputs, *(value for node in model.graph for value in node.outputs))
    return next(value.dtype for value in values if value.name == name)


def test_some_operators_in_float32_keep_the_types_of_the_borders() -> None:
    model = loaded(TensorProto.FLOAT16)
    nodes = [node for node in model.graph if node.name in ("large", "larger", "smaller", "small")]
    retype(model.graph, nodes, HALF)
    for name in ("large", "larger", "smaller", "small"):
        assert type_of(model, name) == FLOAT
    for name in ("tokens", "past", "product", "present", "kept"):
        assert type_of(model, name) == HALF
    rounded(model.graph, HALF)
    np.testing.assert_allclose(run(model)["y"], expected(), atol=0.02)
    model = loaded(TensorProto.FLOAT16)
    rounded(model.graph, HALF)
    assert not np.isfinite(run(model)["y"]).all()  # what it mends


def test_an_output_of_the_graph_keeps_its_name_and_type_unless_told_otherwise() -> None:
    for borders, kind in (((), HALF), (("past", "present"), FLOAT)):
        model = loaded(TensorProto.FLOAT16, gain=1.0)
        nodes = [node for node in model.graph if node.name == "scatter"]
        retype(model.graph, nodes, HALF, borders=borders)
        assert type_of(model, "past") == kind
        assert [(value.name, value.dtype) for value in model.graph.outputs][1] == ("present", kind)
        np.testing.assert_allclose(run(model)["y"], expected(), atol=0.02)


def test_a_whole_graph_in_float32_has_no_other_type_left() -> None:
    model = loaded(TensorProto.FLOAT16)
    widen(model.graph, HALF)
    computed = [value for node in model.graph for value in node.outputs]
    assert all(value.dtype != HALF for value in (*model.graph.inputs, *computed))
    np.testing.assert_allclose(run(model)["y"], expected(), atol=0.01)


def bfloat16(array: NDArray[Any]) -> NDArray[np.float32]:
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def test_a_rounded_graph_computes_what_bfloat16_arithmetic_does() -> None:
    model = loaded(TensorProto.BFLOAT16, gain=1000.0)
    ranges = {"present": 3.0}
    assert fit(model.graph, BRAIN, ranges, PAIR) == ()
    rounded(model.graph, BRAIN)
    found = run(model)
    weight = bfloat16(numpy_helper.to_array(graph(TensorProto.FLOAT).graph.initializer[0]))
    gain, back = bfloat16(np.array([1000.0, 1 / 1000], np.float32))
    product = bfloat16(bfloat16(FEEDS["tokens"]) @ weight)
    small = product
    for factor in (gain, gain, back, back):
        small = bfloat16(small * factor)
    both = bfloat16(small + bfloat16(product.sum(1, keepdims=True)))
    np.testing.assert_array_equal(found["y"], both)
    assert np.abs(both - expected()).max() > 1e-3  # there is something to round
    assert found["present"].dtype == np.float16
    np.testing.assert_array_equal(found["present"].astype(np.float32), product)


def test_bfloat16_stays_inside_and_caches_scatter_in_float16() -> None:
    model = loaded(TensorProto.BFLOAT16)
    fit(model.graph, BRAIN, {"present": 3.0}, PAIR)
    borders = {
        str(value.name): value.dtype for value in (*model.graph.inputs, *model.graph.outputs)
    }
    assert borders["tokens"] == borders["y"] == FLOAT
    assert borders["past"] == borders["present"] == HALF
    (scatter,) = [node for node in model.graph if node.op_type == "ScatterND"]
    assert scatter.inputs[0] is model.graph.inputs[2]  # in place: nothing is cast on the way
    assert scatter.outputs[0] is model.graph.outputs[1]
    assert {type_of(model, name) for name in ("product", "larger", "kept")} == {BRAIN}


def test_a_cache_that_float16_cannot_hold_becomes_float32() -> None:
    model = loaded(TensorProto.BFLOAT16)
    (island,) = fit(model.graph, BRAIN, {"present": 3e5}, PAIR)
    assert (island.name, island.largest) == ("present", 3e5)
    assert type_of(model, "past") == type_of(model, "present") == FLOAT


def test_an_operator_without_bfloat16_computes_in_float32() -> None:
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Sin", ["x"], ["turned"]),
        helper.make_node("Abs", ["turned"], ["y"]),
    ]
    borders = [info("x", TensorProto.BFLOAT16, [3])], [info("y", TensorProto.BFLOAT16, [3])]
    made = helper.make_graph(nodes, "small", *borders)
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    fit(model.graph, BRAIN, {}, [])
    assert type_of(model, "turned") == FLOAT  # opset 20, TensorRT's, has no Sin of bfloat16
    assert "Sin" in float32_operators(model)
    assert "Abs" not in float32_operators(model)


def saved(tmp_path: Path, gain: float, kind: int = TensorProto.FLOAT16) -> Path:
    path = tmp_path / "small.onnx"
    ir.save(loaded(kind, gain), path, external_data="small.weights", size_threshold_bytes=16)
    return path


def test_ranges_are_those_of_float32_whatever_the_graph_can_hold(tmp_path: Path) -> None:
    path = saved(tmp_path, 300.0)
    ranges = measure(path, HALF, [FEEDS], PAIR)
    weight = numpy_helper.to_array(graph(TensorProto.FLOAT16).graph.initializer[0])
    largest = float(np.abs(FEEDS["tokens"] @ weight.astype(np.float32)).max())
    assert ranges["product"] == ranges["present"] == np.float32(largest)
    np.testing.assert_allclose(ranges["larger"], 9e4 * largest, rtol=1e-3)
    assert ranges["larger"] > 65504
    assert "past" not in ranges  # bound to the memory of its output
    assert too_large(ranges) == {"larger"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["small.onnx", "small.weights"]


def test_ranges_are_the_largest_of_all_passes(tmp_path: Path) -> None:
    path, tenfold = saved(tmp_path, 1.0), {**FEEDS, "tokens": 10 * FEEDS["tokens"]}
    once, twice = (measure(path, HALF, [FEEDS, more, FEEDS], PAIR) for more in (FEEDS, tenfold))
    np.testing.assert_allclose(twice["product"], 10 * once["product"], rtol=1e-5)


def test_what_is_not_finite_in_float32_is_refused_by_name(tmp_path: Path) -> None:
    for value in (np.nan, np.inf):
        spoiled = {
            **FEEDS,
            "tokens": np.where(np.eye(3, 4) > 0, np.float32(value), FEEDS["tokens"]),
        }
        with pytest.raises(VerificationError, match=r"tokens of small returns (nan|inf)"):
            measure(saved(tmp_path, 1.0), HALF, [FEEDS, spoiled], PAIR)


def test_islands_follow_the_values_that_are_too_large(tmp_path: Path) -> None:
    path = saved(tmp_path, 300.0)
    model, ranges = ir.load(path), measure(path, HALF, [FEEDS], PAIR)
    ir.external_data.load_to_model(model)
    islands = keep_in_float32(model.graph, ranges, PAIR)
    assert [island.name for island in islands] == ["larger"]
    assert islands[0].largest == ranges["larger"]
    assert type_of(model, "larger") == FLOAT
    assert type_of(model, "product") == type_of(model, "past") == HALF
    rounded(model.graph, HALF)
    np.testing.assert_allclose(run(model)["y"], expected(), atol=0.02)


def test_a_cache_that_is_too_large_is_float32_on_both_sides() -> None:
    model = loaded(TensorProto.FLOAT16, gain=1.0)
    islands = keep_in_float32(model.graph, {"product": 1.0, "present": 2e4}, PAIR)
    assert [island.name for island in islands] == ["present"]
    assert type_of(model, "past") == type_of(model, "present") == FLOAT
    np.testing.assert_allclose(run(model)["y"], expected(), atol=0.02)


def test_what_other_graphs_expect_decides_over_a_graphs_outputs() -> None:
    for wanted, kind in (((), HALF), (("present",), FLOAT)):
        model = loaded(TensorProto.FLOAT16, gain=1.0)
        keep_in_float32(model.graph, {"present": 1e6}, borders=wanted)
        assert model.graph.outputs[1].dtype == kind
