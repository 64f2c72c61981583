"""A whole graph in the opset and the operators that TensorRT is published to have.

Graphs are traced in opset 23. From there to opset 20 only two operators that models use change
their meaning: Attention, which is new, and GroupNormalization, whose scale and bias speak of
channels since opset 21 and spoke of groups before. TensorRT takes bytes at the border of a network
only, so images become numbers before anything else happens to them; and it compares numbers only,
not truth values.
"""

import onnx_ir as ir
from onnx_ir.tape import Tape

from mdexport.groups import GROUPS, as_instances
from mdexport.spelling import spell_attention_out
from mdexport.tapes import replace_node

__all__ = ["lower"]

_SAME_TYPE = ("Transpose", "Reshape")  # operators that return what they are given


def lower(model: ir.Model) -> None:
    """Spell a graph for TensorRT, in place.

    Raises:
        ValueError: an operator in a form that has no other spelling here.
    """
    spell_attention_out(model)
    for node in list(model.graph.all_nodes()):
        if node.op_type == GROUPS:
            as_instances(model.graph, node)
        elif node.op_type == "Equal" and _is_boolean(node):
            _spell_equal(model.graph, node)
        elif node.attributes.get_string("reduction", "") == "none":
            # Scattering is not reducing by default; TensorRT's parser before 10.9 had a fault with
            # this operator since opset 18, which brought the attribute's new values.
            node.attributes.pop("reduction")
    for value in model.graph.inputs:
        if value.dtype == ir.DataType.UINT8:
            _cast_first(model.graph, value)


def _is_boolean(node: ir.Node) -> bool:
    return any(value is not None and value.dtype == ir.DataType.BOOL for value in node.inputs)


def _spell_equal(graph: ir.Graph, node: ir.Node) -> None:
    tape = Tape()
    replace_node(graph, node, tape, tape.op("Not", [tape.op("Xor", list(node.inputs))]))


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
