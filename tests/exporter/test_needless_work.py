"""What graphs are spared: expansions that change nothing, and the long way round a group norm."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from mdexport.expansions import drop_expansions
from mdexport.groups import GROUPS, as_instances, in_steps

Array = NDArray[Any]


def run(model: ir.Model, feeds: dict[str, Array]) -> Array:
    serial = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(serial, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, feeds)
    return np.asarray(found)


def model_of(tape: ir.tape.Tape, inputs: list[ir.Value], output: ir.Value, opset: int) -> ir.Model:
    initializers = tape.initializers
    graph = ir.Graph(inputs, [output], nodes=tape.nodes, initializers=initializers, name="g")
    graph.opset_imports[""] = opset
    return ir.Model(graph, ir_version=10)


def group_norm(scale: Array, bias: Array, groups: int, side: Any = 6) -> ir.Model:
    tape, channels = ir.tape.Tape(), len(scale)
    x = ir.val("x", ir.DataType.FLOAT, ["batch", channels, side, 4])
    inputs = [x, *(tape.initializer(ir.tensor(v), name=n) for n, v in (("s", scale), ("b", bias)))]
    y = tape.op(GROUPS, inputs, {"num_groups": groups, "epsilon": 1e-6})
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, x.shape
    y.producer().name = "norm"  # type: ignore[union-attr]
    return model_of(tape, [x], y, 23)


@pytest.mark.parametrize("way", ["steps", "instances"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mean", [0.0, 50.0])
def test_group_norms_are_pytorchs(way: str, batch: int, mean: float) -> None:
    rng = np.random.default_rng(0)
    scale, bias = rng.standard_normal((2, 12)).astype(np.float32)
    model = group_norm(scale, bias, 3)
    if way == "steps":
        in_steps(model)
    else:
        (node,) = model.graph
        as_instances(model.graph, node)
        model.opset_imports[""] = 20
    assert GROUPS not in {node.op_type for node in model.graph}
    x = (mean + rng.standard_normal((batch, 12, 6, 4))).astype(np.float32)
    wide, weight, shift = (torch.from_numpy(v.astype(np.float64)) for v in (x, scale, bias))
    exact = torch.nn.functional.group_norm(wide, 3, weight, shift, 1e-6)
    np.testing.assert_allclose(run(model, {"x": x}), exact.numpy(), atol=3e-5)


def test_large_means_do_not_cancel() -> None:
    """The difference of mean squares, which ONNX Runtime takes, keeps no digit of this variance."""
    model = group_norm(np.ones(4, np.float32), np.zeros(4, np.float32), 2)
    own = ir.to_proto(model).SerializeToString()
    x = (5000 + np.random.default_rng(1).standard_normal((1, 4, 6, 4))).astype(np.float32)
    exact = torch.nn.functional.group_norm(
        torch.from_numpy(x.astype(np.float64)), 2, eps=1e-6
    ).numpy()
    session = onnxruntime.InferenceSession(own, providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"x": x})
    in_steps(model)
    ours = run(model, {"x": x})
    assert np.abs(ours - exact).max() < 2e-3
    assert np.abs(np.asarray(theirs) - exact).max() > 100 * np.abs(ours - exact).max()


def test_images_of_free_size_are_refused() -> None:
    ones = np.ones(4, np.float32)
    with pytest.raises(ValueError, match="free size: norm"):
        in_steps(group_norm(ones, ones, 2, side="height"))


def update(new: list[Any]) -> ir.Model:
    """Return a graph that updates a cache (rows, 3, canvas, 2), as PyTorch exports it."""
    tape, whole, number = ir.tape.Tape(), ir.DataType.INT64, ir.DataType.FLOAT
    cache = ir.val("cache", number, ["rows", 3, "canvas", 2])
    places = [
        ir.val("row", whole, ["rows", 1, 1]),
        ir.val("head", whole, [1, 3, 1]),
        ir.val("position", whole, ["rows", 1, "m"]),
    ]
    values, size = ir.val("new", number, new), ir.val("size", whole, [3])
    last = tape.initializer(ir.tensor(np.array([-1])), name="last")
    inner = tape.initializer(ir.tensor(np.array([2])), name="inner")
    indices = [tape.op("Unsqueeze", [tape.op("Expand", [place, size]), last]) for place in places]
    shape = tape.op("Concat", [size, inner], {"axis": 0})
    updates = tape.op("Expand", [values, shape])
    joined = tape.op("Concat", indices, {"axis": -1})
    after = tape.op("ScatterND", [cache, joined, updates])
    after.name, after.dtype, after.shape = "after", number, cache.shape
    return model_of(tape, [cache, *places, values, size], after, 23)


def feeds_of(m: int, new: tuple[int, ...]) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        "cache": rng.standard_normal((2, 3, 7, 2)).astype(np.float32),
        "row": np.arange(2)[:, None, None],
        "head": np.arange(3)[None, :, None],
        "position": rng.permuted(np.tile(np.arange(7), (2, 1)), axis=1)[:, None, :m],
        "new": rng.standard_normal(new).astype(np.float32),
        "size": np.array([2, 3, m]),
    }


def test_an_update_of_its_own_size_is_not_expanded() -> None:
    model, feeds = update(["rows", 3, "m", 2]), feeds_of(4, (2, 3, 4, 2))
    before = run(model, feeds)
    assert drop_expansions(model) == 1
    expands = [node for node in model.graph if node.op_type == "Expand"]
    assert len(expands) == 3  # of the places
    np.testing.assert_array_equal(run(model, feeds), before)


@pytest.mark.parametrize("new", [["rows", 1, "m", 2], ["rows", 3, 1, 2], ["rows", 3, "other", 2]])
def test_an_update_that_may_be_smaller_still_is(new: list[Any]) -> None:
    model = update(new)
    assert drop_expansions(model) == 0
    sizes = {"rows": 2, "m": 4, "other": 1}
    feeds = feeds_of(4, tuple(sizes.get(size, size) for size in new))
    changed = run(model, feeds) != feeds["cache"]
    assert changed.sum() == 2 * 3 * 4 * 2


def test_no_cache_of_a_bundle_is_updated_through_an_expansion(digits_bundle: Path) -> None:
    for name in ("denoiser.onnx", "denoiser.tensorrt.onnx"):
        scatters = [
            node for node in ir.load(digits_bundle / name).graph if node.op_type == "ScatterND"
        ]
        assert scatters
        for node in scatters:
            updates = node.inputs[2]
            assert updates is not None
            producer = updates.producer()
            assert producer is None or producer.op_type != "Expand"
