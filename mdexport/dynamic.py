"""int8 for CPUs: weights once and for all, activations row by row while they are computed.

The products of a model's blocks become products of int8, in operators of ONNX Runtime; embeddings,
norms, attention's own products and the head stay in float32. Two choices differ from ONNX Runtime's
own quantiser, and keep what a sample promises:

- Every row of an activation (a token of a sample) has a scale of its own, where
  ``DynamicQuantizeLinear`` has one for all: what a sample becomes does not depend on the batch it
  ran in, nor a row on how many others a pass recomputes, and the error is about half.
- Weights have 7 bits. A CPU without VNNI adds two products of 8 bits in 16 bits and saturates;
  with 7 bits the sum fits, so that all CPUs compute the same.
"""

from pathlib import Path

import numpy as np
import onnx_ir as ir

from mdexport.quantise import (
    NO_PRODUCTS,
    drop_unused,
    export_weights,
    products,
    quantised,
    tensor_of,
)
from mdexport.tapes import constant, place
from mdruntime.errors import VerificationError

__all__ = ["DOMAIN", "WEIGHT_LEVELS", "quantise_rows", "write_cpu_int8"]

WEIGHT_LEVELS = 63  # of a weight, on either side of zero
_STEP = np.float32(1 / 127)  # of an activation, as a share of its row's largest magnitude
_MIDDLE = 128  # stands for zero in an activation's bytes
_LEAST = np.float32(2.0**-100)  # magnitude of a row that holds nothing but zeros
_GELU_DEPTH = np.float32(0.171)  # no value of GELU is below -0.1701
DOMAIN = "com.microsoft"


def write_cpu_int8(source: Path, target: Path) -> int:
    """Write a denoiser with the products of its blocks in int8; return how many these are.

    Args:
        source: the denoiser in float32, spelled for ONNX Runtime.
        target: the graph to write; its weights in int8 go into a file of its own beside it.

    Raises:
        VerificationError: the model has no products in numbered blocks.
    """
    model = ir.load(source)
    weights = quantise_rows(model.graph)
    if not weights:
        raise VerificationError(NO_PRODUCTS)
    model.opset_imports[DOMAIN] = 1
    export_weights(weights, target.with_suffix(".weights"))
    ir.save(model, target)
    return len(weights)


def quantise_rows(graph: ir.Graph) -> list[ir.Value]:
    """Put the products of a graph's blocks into int8, in place.

    Returns:
        The initializers that hold weights in int8.
    """
    weights, ready = list[ir.Value](), dict[ir.Value, tuple[ir.Value, ir.Value]]()
    for product in products(graph):
        tape = ir.tape.Tape()
        node, activation = product.node, product.activation
        if activation not in ready:
            ready[activation] = _rows_in_int8(tape, activation)
        rows, largest = ready[activation]
        name = f"{node.name}.weight"
        whole, scales = quantised(
            tensor_of(product.weight).numpy(), ir.DataType.FLOAT, levels=WEIGHT_LEVELS
        )
        weights.append(tape.initializer(ir.tensor(whole), name=f"{name}.int8"))
        inputs = [
            rows,
            weights[-1],
            constant(tape, f"{name}.row", _STEP),
            constant(tape, f"{name}.scale", scales),
            constant(tape, f"{name}.middle", np.uint8(_MIDDLE)),
            constant(tape, f"{name}.zero", np.int8(0)),
        ]
        summed = tape.op("MatMulIntegerToFloat", inputs, domain=DOMAIN)
        result = tape.op("Mul", [summed, largest])
        old = node.outputs[0]
        result.dtype, result.shape = ir.DataType.FLOAT, old.shape
        place(graph, node, tape)
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    drop_unused(graph)
    return weights


def _rows_in_int8(tape: ir.tape.Tape, value: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return the bytes (..., rows, width) of an activation, and each row's largest magnitude."""
    name = str(value.name)
    last = constant(tape, f"{name}.last", np.array([-1]))
    share = constant(tape, f"{name}.share", _STEP)
    middle = constant(tape, f"{name}.middle", np.uint8(_MIDDLE))
    bounds = [tape.op("ReduceMax", [value, last])]
    node = value.producer()
    if node is not None and node.op_type == "Gelu":
        bounds.append(constant(tape, f"{name}.lowest", _GELU_DEPTH))
    else:
        # Two reductions are faster here than a copy of all magnitudes and one.
        bounds.append(tape.op("Neg", [tape.op("ReduceMin", [value, last])]))
        bounds.append(constant(tape, f"{name}.least", _LEAST))
    largest = tape.op("Max", bounds)
    return tape.op("QuantizeLinear", [tape.op("Div", [value, largest]), share, middle]), largest
