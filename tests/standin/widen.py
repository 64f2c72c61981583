"""bfloat16 for ONNX Runtime's CPU provider, which has no such products: computed in float32.

Weights, inputs and outputs stay rounded to bfloat16; what is in between is not. So the stand-in is
better than a device there, not worse.
"""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

__all__ = ["narrow", "wide", "widened"]


def wide(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return bfloat16 numbers, given as bits, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return float32 numbers as the bits of bfloat16, rounded to the nearest, ties to even."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def widened(model: onnx.ModelProto) -> bytes:
    """Return a graph as bytes, float32 wherever it says bfloat16."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type
        kind.elem_type = _wide_type(kind.elem_type)
    for tensor in graph.initializer:
        _widen(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "output_dtype"):
                attribute.i = _wide_type(attribute.i)
            if attribute.HasField("t"):
                _widen(attribute.t)
    return copy.SerializeToString()


def _wide_type(element: int) -> Any:
    return TensorProto.FLOAT if element == TensorProto.BFLOAT16 else element


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.BFLOAT16:
        array = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
