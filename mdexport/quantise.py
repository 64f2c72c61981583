"""int8 for TensorRT: QuantizeLinear and DequantizeLinear, explicit in the graph.

Both sides of the products in a model's blocks become int8: weights per output channel, once and
for all, activations per tensor, by bounds that were calibrated on trajectories. TensorRT fuses the
pairs into products of int8. Everything else keeps its precision: embeddings, norms, attention's
own products, softmax, head. All is symmetric (zero points are zero), as TensorRT wants it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mdexport.calibration import LEVELS
from mdexport.tapes import place
from mdexport.trace import MODULE

__all__ = [
    "NO_PRODUCTS",
    "Product",
    "drop_unused",
    "export_weights",
    "products",
    "quantise",
    "quantised",
    "tensor_of",
]

NO_PRODUCTS = (
    "int8 needs matrix products in modules that stand in a numbered list, such as "
    "blocks.0.mlp; the model has none, so build it without --int8"
)
_BLOCK = re.compile(r"(^|\.)\d+\.")  # a module inside a numbered one
_INT8_ZERO = ir.tensor(np.int8(0))


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product of an activation with a weight."""

    node: ir.Node

    @property
    def activation(self) -> ir.Value:
        """What varies."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def weight(self) -> ir.Value:
        """An initializer (in, out)."""
        value = self.node.inputs[1]
        assert value is not None
        return value


def products(graph: ir.Graph) -> list[Product]:
    """Return the products with weights inside the blocks of a model: modules with a number.

    What stands before, after and between the blocks is small and sensitive: measured on the shipped
    models, quantising the stem and the last map as well costs half as much accuracy again.
    """
    return [Product(node) for node in graph if _is_product(node)]


def _is_product(node: ir.Node) -> bool:
    if node.op_type != "MatMul" or not _BLOCK.search(node.metadata_props.get(MODULE, "")):
        return False
    weight = node.inputs[1]
    return weight is not None and weight.is_initializer() and len(weight.shape or ()) == 2


def quantised(
    weight: NDArray[Any], dtype: ir.DataType, *, levels: int = LEVELS
) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """Return a weight (in, out) in int8, and the scale of every column in the graph's type."""
    wide = weight.astype(np.float32)
    scale = _scale(np.abs(wide).max(axis=0, initial=0), dtype, levels)
    steps = np.rint(wide / scale.astype(np.float32))
    return np.clip(steps, -levels, levels).astype(np.int8), scale


def _scale(bounds: Any, dtype: ir.DataType, levels: int = LEVELS) -> NDArray[Any]:
    """Return the width of a step, rounded to the graph's type; of zeros alone, the smallest."""
    least = np.float32(2.0**-14 if dtype == ir.DataType.FLOAT16 else 2.0**-126)
    steps = np.asarray(bounds, np.float32) / np.float32(levels)
    return np.maximum(steps, least).astype(dtype.numpy())


def quantise(graph: ir.Graph, bounds: Mapping[str, float]) -> list[ir.Value]:
    """Put the products of a graph's blocks into int8, in place.

    Args:
        graph: spelled for TensorRT.
        bounds: the largest magnitude that int8 stands for, by name of an activation.

    Returns:
        The initializers that hold weights in int8.
    """
    weights, ready = list[ir.Value](), dict[ir.Value, ir.Value]()
    for product in products(graph):
        tape = ir.tape.Tape()
        node, activation, weight = product.node, product.activation, product.weight
        if activation not in ready:
            ready[activation] = _there_and_back(tape, activation, bounds[str(activation.name)])
        steps, scales = quantised(tensor_of(weight).numpy(), _type(weight))
        name = f"{node.name}.weight"
        weights.append(tape.initializer(ir.tensor(steps), name=f"{name}.int8"))
        scale_of = tape.initializer(ir.tensor(scales, dtype=weight.dtype), name=f"{name}.scale")
        zero = np.zeros(scales.shape, np.int8)
        zero_of = tape.initializer(ir.tensor(zero), name=f"{name}.zero")
        inputs = [weights[-1], scale_of, zero_of]
        back = _typed(tape.op("DequantizeLinear", inputs, {"axis": 1}), weight)
        place(graph, node, tape)
        node.replace_input_with(0, ready[activation])
        node.replace_input_with(1, back)
    drop_unused(graph)
    return weights


def _there_and_back(tape: ir.tape.Tape, value: ir.Value, bound: float) -> ir.Value:
    """Return a value after int8, for the products that read it."""
    name, scale = str(value.name), _scale(bound, _type(value))
    scale_of = tape.initializer(ir.tensor(scale, dtype=value.dtype), name=f"{name}.scale")
    zero_of = tape.initializer(_INT8_ZERO, name=f"{name}.zero")
    steps = tape.op("QuantizeLinear", [value, scale_of, zero_of])
    steps.dtype, steps.shape = ir.DataType.INT8, value.shape
    return _typed(tape.op("DequantizeLinear", [steps, scale_of, zero_of]), value)


def _typed(made: ir.Value, like: ir.Value) -> ir.Value:
    made.dtype, made.shape = _type(like), like.shape
    return made


def _type(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype


def drop_unused(graph: ir.Graph) -> None:
    """Take weights that nothing reads any more off a graph."""
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]


def export_weights(weights: Sequence[ir.Value], path: Path) -> None:
    """Write weights in int8 into a file of their own, which the graph then refers to."""
    tensors = [tensor_of(value) for value in weights]
    written = ir.external_data.convert_tensors_to_external(tensors, path.parent, path.name)
    for value, tensor in zip(weights, written, strict=True):
        value.const_value = tensor


def tensor_of(value: ir.Value) -> ir.TensorProtocol:
    """Return the numbers of an initializer."""
    assert value.const_value is not None
    return value.const_value
