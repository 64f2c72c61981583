"""Plans that are wrong on purpose: attention whose fusion went astray."""

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["misfuse"]

_THROUGH = ("Cast", "Identity", "Mul", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Add", "Div")
_DEPTH = 8


def misfuse(model: onnx.ModelProto, barriers: set[str], *, stubborn: bool) -> int:
    """Make every attention wrong whose query, key and value are not outputs of the network.

    What goes wrong is what half precision's fused attention was reported to do: q, k and v are off
    after it. Here each result is turned by one place along its last axis.

    Args:
        model: changed in place.
        barriers: tensors marked as outputs of the network.
        stubborn: no barrier helps.

    Returns:
        How many were made wrong.
    """
    made = {name: node for node in model.graph.node for name in node.output}
    wrong = 0
    for product in list(model.graph.node):
        scores = _attention(product, made)
        if scores is None:
            continue
        behind = [*scores.input, product.input[1]]
        if stubborn or not all(_behind_barrier(name, made, barriers) for name in behind):
            _turn(model, product)
            wrong += 1
    return wrong


def _attention(product: onnx.NodeProto, made: dict[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """Return the product of queries and keys where ``product`` is that of weights and values."""
    if product.op_type != "MatMul":
        return None
    softmax = _up(product.input[0], made, "Softmax")
    return None if softmax is None else _up(softmax.input[0], made, "MatMul")


def _up(name: str, made: dict[str, onnx.NodeProto], wanted: str) -> onnx.NodeProto | None:
    for _ in range(_DEPTH):
        node = made.get(name)
        if node is None or node.op_type == wanted:
            return node
        if node.op_type not in (*_THROUGH, "Where", "Sub"):
            return None
        name = next((one for one in node.input if one in made), "")
    return None


def _behind_barrier(name: str, made: dict[str, onnx.NodeProto], barriers: set[str]) -> bool:
    for _ in range(_DEPTH):
        if name in barriers:
            return True
        node = made.get(name)
        if node is None or node.op_type not in _THROUGH:
            return False
        name = next((one for one in node.input if one in made), "")
    return False


def _turn(model: onnx.ModelProto, product: onnx.NodeProto) -> None:
    """Turn the result of a product by one place along its last axis."""
    name = product.output[0]
    straight, ends = f"{name}.straight", [f"{name}.head", f"{name}.tail"]
    product.output[0] = straight
    cut = [numpy_helper.from_array(np.array([at], np.int64), f"{name}.{at}") for at in (0, 1, -1)]
    most = numpy_helper.from_array(np.array([np.iinfo(np.int64).max]), f"{name}.most")
    model.graph.initializer.extend([*cut, most])
    zero, one, last = (tensor.name for tensor in cut)
    nodes = [
        helper.make_node("Slice", [straight, zero, one, last], [ends[0]]),
        helper.make_node("Slice", [straight, one, most.name, last], [ends[1]]),
        helper.make_node("Concat", [ends[1], ends[0]], [name], axis=-1),
    ]
    place = next(i for i, node in enumerate(model.graph.node) if node is product) + 1
    for offset, node in enumerate(nodes):
        model.graph.node.insert(place + offset, node)
