"""A whole graph in the opset and the operators that TensorRT is published to have.

Graphs are traced in opset 23. From there to opset 20 only two operators that models use change
their meaning: Attention, which is new, and GroupNormalization, whose scale and bias speak of
channels since opset 21 and spoke of groups before. TensorRT takes bytes at the border of a network
only, so images become numbers before anything else happens to them; and it compares numbers only,
not truth values.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from mdexport.spelling import spell_attention_out

__all__ = ["lower"]

_GROUPS = "GroupNormalization"
_SAME_TYPE = ("Transpose", "Reshape")  # operators that return what they are given


def lower(model: ir.Model) -> None:
    """Spell a graph for TensorRT, in place.

    Raises:
        ValueError: an operator in a form that has no other spelling here.
    """
    spell_attention_out(model)
    for node in list(model.graph.all_nodes()):
        if node.op_type == _GROUPS:
            _spell_groups(model.graph, node)
        elif node.op_type == "Equal" and _is_boolean(node):
            _spell_equal(model.graph, node)
        elif node.attributes.get_string("reduction", "") == "none":
            # Scattering is not reducing by default; TensorRT's parser before 10.9 had a fault with
            # this operator since opset 18, which brought the attribute's new values.
            node.attributes.pop("reduction")
    for value in model.graph.inputs:
        if value.dtype == ir.DataType.UINT8:
            _cast_first(model.graph, value)


def _spell_groups(graph: ir.Graph, node: ir.Node) -> None:
    """Replace a normalisation of groups by one of instances, each of a group's numbers."""
    images, scale, bias = node.inputs
    shape = None if images is None else images.shape
    if images is None or scale is None or bias is None or shape is None:
        raise ValueError(f"group normalisation of unknown shape: {node.name}")
    inner = list(shape)[1:]
    if not all(isinstance(size, int) for size in inner):
        raise ValueError(f"group normalisation of images of free size: {node.name}")
    groups, rank = node.attributes.get_int("num_groups", 0), len(inner)
    tape, dtype = Tape(), images.dtype or ir.DataType.FLOAT

    def constant(name: str, numbers: object, kind: ir.DataType) -> ir.Value:
        array = np.asarray(numbers, kind.numpy())
        return tape.initializer(ir.tensor(array), name=f"{node.name}.{name}")

    flat = tape.op("Reshape", [images, constant("flat", [0, groups, -1], ir.DataType.INT64)])
    ones, zeros = (constant(f"{n}", np.full(groups, n), dtype) for n in (1, 0))
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    normal = tape.op("InstanceNormalization", [flat, ones, zeros], {"epsilon": epsilon})
    back = tape.op("Reshape", [normal, constant("back", [0, *inner], ir.DataType.INT64)])
    column = constant("column", [-1] + [1] * (rank - 1), ir.DataType.INT64)
    scaled = tape.op("Mul", [back, tape.op("Reshape", [scale, column])])
    moved = tape.op("Add", [scaled, tape.op("Reshape", [bias, column])])
    _replace(graph, node, tape, moved)


def _is_boolean(node: ir.Node) -> bool:
    return any(value is not None and value.dtype == ir.DataType.BOOL for value in node.inputs)


def _spell_equal(graph: ir.Graph, node: ir.Node) -> None:
    tape = Tape()
    _replace(graph, node, tape, tape.op("Not", [tape.op("Xor", list(node.inputs))]))


def _replace(graph: ir.Graph, node: ir.Node, tape: Tape, result: ir.Value) -> None:
    """Put what a tape has recorded in the place of a node."""
    old = node.outputs[0]
    assert old.dtype is not None  # every value of a traced graph has a type
    result.shape, result.type, result.name = old.shape, old.type, f"{old.name}.spelled"
    for value in (made for recorded in tape.nodes for made in recorded.outputs):
        value.dtype = old.dtype  # all of them have one type
    for initializer in tape.initializers:
        graph.register_initializer(initializer)
    ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, [old], [result])


def _cast_first(graph: ir.Graph, images: ir.Value) -> None:
    """Turn an input of bytes into float32 before all else, and what came from it as well."""
    users = list(images.uses())
    if all(use.node.op_type == "Cast" for use in users):
        return
    cast = ir.node("Cast", [images], {"to": ir.DataType.FLOAT.value})
    numbers = cast.outputs[0]
    numbers.name, numbers.shape = f"{images.name}.float32", images.shape
    numbers.dtype = ir.DataType.FLOAT
    for use in users:
        use.node.replace_input_with(use.idx, numbers)
    graph.insert_before(graph[0], cast)
    _retype(numbers, ir.DataType.FLOAT)


def _retype(value: ir.Value, dtype: ir.DataType) -> None:
    """Correct the type of what is moved, but not computed, from a value."""
    for use in value.uses():
        node = use.node
        if node.op_type in _SAME_TYPE:
            node.outputs[0].dtype = dtype
            _retype(node.outputs[0], dtype)
        elif node.op_type not in ("Cast", "Shape"):
            raise ValueError(f"{node.op_type} of bytes: {node.name}")
