"""The second spelling of a graph, in operators that TensorRT is published to have.

ONNX Runtime is fastest with the Attention operator of opset 23; TensorRT's support for it is
young and has open defects, so attention is spelled out there, in opset 20. Both spellings share
one weight file.
"""

import onnx_ir as ir

__all__ = ["TENSORRT_OPSET", "drop_output", "keep_softmax_in_float32", "spell_attention_out"]

TENSORRT_OPSET = 20
_ATTENTION = "Attention"


def keep_softmax_in_float32(model: ir.Model) -> None:
    """Make every Attention operator compute its softmax in float32."""
    for node in model.graph.all_nodes():
        if node.op_type == _ATTENTION:
            node.attributes["softmax_precision"] = ir.AttrInt64(
                "softmax_precision", ir.DataType.FLOAT.value
            )


def drop_output(model: ir.Model, name: str) -> None:
    """Take an output off a graph; what only it needs goes too where the graph is optimised."""
    model.graph.outputs[:] = [value for value in model.graph.outputs if value.name != name]


def spell_attention_out(model: ir.Model) -> None:
    """Replace every Attention operator by products and a softmax in float32, in place."""
    for node in list(model.graph.all_nodes()):
        if node.op_type == _ATTENTION:
            _replace(model.graph, node)
    model.opset_imports[""] = TENSORRT_OPSET


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    query, key, value = node.inputs[:3]
    if query is None or key is None or value is None or len(node.inputs) > 3:
        raise ValueError(f"attention with a mask or a cache of its own: {node.name}")
    tape = ir.tape.Tape()
    head_size = query.shape[-1] if query.shape is not None else None
    if not isinstance(head_size, int):
        raise ValueError(f"attention over heads of unknown size: {node.name}")
    scale = node.attributes.get_float("scale", head_size**-0.5)
    dtype = query.dtype or ir.DataType.FLOAT
    factor = tape.initializer(ir.tensor(scale, dtype=dtype), name=f"{node.name}.scale")
    # Scaled before the product, which then stays in float16's range.
    scaled = tape.op("Mul", [query, factor])
    scores = tape.op("MatMul", [scaled, tape.op("Transpose", [key], {"perm": [0, 1, 3, 2]})])
    if dtype != ir.DataType.FLOAT:
        scores = tape.op("Cast", [scores], {"to": ir.DataType.FLOAT.value})
    weights = tape.op("Softmax", [scores], {"axis": -1})
    if dtype != ir.DataType.FLOAT:
        weights = tape.op("Cast", [weights], {"to": dtype.value})
    mixed = tape.op("MatMul", [weights, value])
    old = node.outputs[0]
    mixed.shape, mixed.type, mixed.name = old.shape, old.type, f"{old.name}.spelled"
    for initializer in tape.initializers:
        graph.register_initializer(initializer)
    ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, [old], [mixed])
