"""The second spelling of a graph, in operators that TensorRT is published to have.

ONNX Runtime is fastest with the Attention operator of opset 23; TensorRT's support for it is
young and has open defects, so attention is spelled out there, in opset 20. Both spellings share
one weight file.
"""

from typing import Any

import onnx_ir as ir

from mdexport.tapes import replace_node

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
    old, wide = node.outputs[0], ir.DataType.FLOAT

    def put(part: str, operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        made = tape.op(operator, inputs, attributes)
        made.name, made.dtype = f"{old.name}.{part}", dtype
        return made

    factor = tape.initializer(ir.tensor(scale, dtype=dtype), name=f"{node.name}.scale")
    # Scaled before the product, which then stays in float16's range.
    scaled = put("scaled", "Mul", query, factor)
    turned = put("turned", "Transpose", key, perm=[0, 1, 3, 2])
    scores = put("scores", "MatMul", scaled, turned)
    if dtype != wide:
        scores = put("wide", "Cast", scores, to=wide.value)
        scores.dtype = wide
    weights = put("weights", "Softmax", scores, axis=-1)
    if dtype != wide:
        weights.dtype = wide
        weights = put("narrow", "Cast", weights, to=dtype.value)
    replace_node(graph, node, tape, put("spelled", "MatMul", weights, value))
