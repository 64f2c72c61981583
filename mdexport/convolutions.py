"""int8 for CPUs: the convolutions of image decoders.

Weights per output channel, inputs and outputs per tensor, by the ranges that they had while images
were decoded: quantised pairs around every convolution, which ONNX Runtime fuses into convolutions
of bytes. Norms, activations and residual sums between them stay in float32. Weights have 7 bits,
for the reason that ``dynamic`` gives. Scales are fixed: an image does not depend on its batch.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mdexport.dynamic import DOMAIN, WEIGHT_LEVELS, quantise_rows
from mdexport.quantise import drop_unused, export_weights, quantised, tensor_of
from mdexport.replay import replay
from mdexport.tapes import constant, place

__all__ = ["convolutions", "quantise_convolutions", "ranges_of", "write_cpu_int8_images"]

Ranges = Mapping[str, tuple[float, float]]
"""Least and largest number by name of a value."""

_BYTES = 255
_LEAST = 2.0**-100  # step of a value that is always zero


def write_cpu_int8_images(
    source: Path, target: Path, tokens: Callable[[], NDArray[np.int32]]
) -> int:
    """Write an image decoder with its convolutions in int8, and the products of its blocks.

    Args:
        source: the decoder in float32, spelled for ONNX Runtime.
        target: the graph to write; its weights in int8 go into a file of their own beside it.
        tokens: returns (images, length), to be decoded for the ranges of values; it is asked only
            if there are convolutions.

    Returns:
        How many convolutions and products these are; with none, nothing is written.
    """
    model = ir.load(source)
    ranges = ranges_of(source, tokens()) if convolutions(model.graph) else {}
    weights = [*quantise_convolutions(model.graph, ranges), *quantise_rows(model.graph)]
    if weights:
        model.opset_imports[DOMAIN] = 1
        export_weights(weights, target.with_suffix(".weights"))
        ir.save(model, target)
    return len(weights)


def convolutions(graph: ir.Graph) -> list[ir.Node]:
    """Return the convolutions of a graph whose weights are known."""
    return [node for node in graph if node.op_type == "Conv" and _known(node.inputs[1:])]


def _known(values: Sequence[ir.Value | None]) -> bool:
    return all(value is not None and value.is_initializer() for value in values)


def ranges_of(source: Path, tokens: NDArray[np.int32]) -> dict[str, tuple[float, float]]:
    """Return the ranges of what goes into convolutions and comes out, while images are decoded."""
    model = ir.load(source)
    values = list(
        dict.fromkeys(value for node in convolutions(model.graph) for value in _ends(node))
    )
    taps = []
    for number, value in enumerate(values):
        for operator in ("ReduceMin", "ReduceMax"):
            node = ir.node(operator, [value], {"keepdims": 0})
            node.outputs[0].name, node.outputs[0].dtype = f"{operator}.{number}", ir.DataType.FLOAT
            node.outputs[0].shape = ir.Shape([])
            model.graph.append(node)
            model.graph.outputs.append(node.outputs[0])
            taps.append(str(node.outputs[0].name))
    passes = [{str(model.graph.inputs[0].name): image[None]} for image in tokens]
    found = list(replay(model, source.with_name("taps.onnx"), passes, taps))
    return {
        str(value.name): (
            min(float(one[f"ReduceMin.{number}"]) for one in found),
            max(float(one[f"ReduceMax.{number}"]) for one in found),
        )
        for number, value in enumerate(values)
    }


def _ends(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    images = node.inputs[0]
    assert images is not None
    return images, node.outputs[0]


def quantise_convolutions(graph: ir.Graph, ranges: Ranges) -> list[ir.Value]:
    """Put the convolutions of a graph into int8, in place.

    Args:
        graph: in float32.
        ranges: of the inputs and outputs of its convolutions; see ``ranges_of``.

    Returns:
        The initializers that hold weights in int8.
    """
    weights, ready, known = list[ir.Value](), dict[ir.Value, ir.Value](), dict(ranges)
    for node in convolutions(graph):
        images, result = _ends(node)
        tape = ir.tape.Tape()
        if images not in ready:
            ready[images] = _there_and_back(tape, images, known)
        step, _ = _byte(*known[str(images.name)])
        weights.append(_in_int8(tape, node, step))
        place(graph, node, tape)
        node.replace_input_with(0, ready[images])
        bytes_ = _put_after(graph, node, result, known)
        ready[bytes_], known[str(bytes_.name)] = bytes_, known[str(result.name)]
    drop_unused(graph)
    return weights


def _in_int8(tape: ir.tape.Tape, node: ir.Node, step: np.float32) -> ir.Value:
    """Give a convolution its weights, and its bias, from int8; return the weights' initializer.

    ONNX Runtime wants a bias in steps of what it is added to: those of inputs times weights.
    """
    weight, *bias = (tensor_of(value).numpy() for value in node.inputs[1:] if value is not None)
    columns = weight.reshape(len(weight), -1).T
    whole, scales = quantised(columns, ir.DataType.FLOAT, levels=WEIGHT_LEVELS)
    name = str(node.name)
    ordered = np.ascontiguousarray(whole.T.reshape(weight.shape))
    steps = constant(tape, f"{name}.weight.int8", ordered)
    scale = constant(tape, f"{name}.weight.scale", scales)
    zeros = constant(tape, f"{name}.weight.zero", np.zeros_like(whole[0]))
    node.replace_input_with(1, tape.op("DequantizeLinear", [steps, scale, zeros], {"axis": 0}))
    for values in bias:
        wide = (scales * step).astype(np.float32)
        sums = constant(tape, f"{name}.bias.int32", np.rint(values / wide).astype(np.int32))
        inputs = [sums, constant(tape, f"{name}.bias.scale", wide)]
        node.replace_input_with(2, tape.op("DequantizeLinear", inputs, {"axis": 0}))
    return steps


def _put_after(graph: ir.Graph, node: ir.Node, result: ir.Value, ranges: Ranges) -> ir.Value:
    """Let all that reads a result read it after it was bytes; return that."""
    tape, users = ir.tape.Tape(), result.uses()
    bytes_ = _there_and_back(tape, result, ranges)
    place(graph, node, tape, after=True)
    for user, place_ in users:
        user.replace_input_with(place_, bytes_)
    return bytes_


def _there_and_back(tape: ir.tape.Tape, value: ir.Value, ranges: Ranges) -> ir.Value:
    """Return a value after it was bytes."""
    step, zero = _byte(*ranges[str(value.name)])
    scale = constant(tape, f"{value.name}.step", step)
    middle = constant(tape, f"{value.name}.middle", zero)
    bytes_ = tape.op("QuantizeLinear", [value, scale, middle])
    bytes_.dtype, bytes_.shape = ir.DataType.UINT8, value.shape
    back = tape.op("DequantizeLinear", [bytes_, scale, middle])
    back.name, back.dtype, back.shape = f"{value.name}.back", ir.DataType.FLOAT, value.shape
    return back


def _byte(least: float, largest: float) -> tuple[np.float32, np.uint8]:
    """Return the step of a range in bytes, and the byte that stands for zero exactly."""
    low, high = min(least, 0.0), max(largest, 0.0)
    step = max((high - low) / _BYTES, _LEAST)
    return np.float32(step), np.uint8(round(-low / step))
