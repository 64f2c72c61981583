"""Operators that compute in another precision than the rest of their graph.

Graphs are typed: an operator computes in the type of its inputs. So precision is changed by giving
operators' values another type, with casts where they meet the others.
"""

from collections.abc import Collection, Iterable

import onnx_ir as ir

__all__ = ["low_values", "retype", "rounded", "widen"]

FLOAT = ir.DataType.FLOAT

_MOVES = {
    *("Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Neg"),
    *("Pad", "Reshape", "ScatterElements", "ScatterND", "Slice", "Split", "Squeeze", "Tile"),
    *("Transpose", "Unsqueeze", "Where"),
}
"""Operators that return the numbers they were given, so that there is nothing to round."""


def low_values(graph: ir.Graph, low: ir.DataType) -> list[ir.Value]:
    """Return the inputs and inner values of a graph that are of this type, in order."""
    inner = (value for node in graph for value in node.outputs)
    return [value for value in (*graph.inputs, *inner) if value.dtype == low]


def retype(
    graph: ir.Graph,
    nodes: Iterable[ir.Node],
    low: ir.DataType,
    high: ir.DataType = FLOAT,
    borders: Collection[str] = (),
    *,
    tidy: bool = True,
) -> None:
    """Let some operators compute in another type, in place.

    Values between these operators stay in ``high``; all other operators get what they got before,
    through casts.

    Args:
        graph: to be changed.
        nodes: those that compute in ``low`` and shall compute in ``high``.
        low: the type of the others.
        high: the new type.
        borders: names of inputs and outputs of the graph that become ``high``; those that are not
            named here keep their type.
        tidy: drop casts that have become idle.
    """
    chosen = set(nodes)
    for value in _of(graph.inputs, low, borders):
        value.dtype = high
        _lower_for_others(graph, value, low, chosen)
    raised: dict[ir.Value, ir.Value] = {}
    for node in [node for node in graph if node in chosen]:
        _raise_inputs(graph, node, low, high, raised)
        for value in _raise_outputs(node, low, high):
            _lower_for_others(graph, value, low, chosen)
            if value.is_graph_output() and value.name not in borders:
                _settle(graph, value, low)
    for value in _of(graph.outputs, low, borders):
        _settle(graph, value, high)
    if tidy:
        _drop_idle_casts(graph, chosen)


def _of(values: Iterable[ir.Value], low: ir.DataType, borders: Collection[str]) -> list[ir.Value]:
    return [value for value in values if value.dtype == low and value.name in borders]


def widen(graph: ir.Graph, low: ir.DataType) -> None:
    """Let all of a graph compute in float32, in place; weights are cast where they are used."""
    borders = [str(value.name) for value in (*graph.inputs, *graph.outputs)]
    retype(graph, list(graph), low, FLOAT, borders)


def rounded(graph: ir.Graph, low: ir.DataType) -> None:
    """Let a graph compute in float32 and round every result to ``low``, in place.

    Inputs and outputs of the graph keep their types.

    So a backend without arithmetic of that type computes what one does that has it and accumulates
    in float32, as GPUs do. ONNX Runtime needs it on a CPU for float16 too: it computes in float32
    there, and leaves out the rounding between operators, and with it every overflow.
    """
    results = [
        value
        for node in graph
        if node.op_type not in _MOVES
        for value in node.outputs
        if value.dtype == low
    ]
    retype(graph, list(graph), low, tidy=False)  # casts to the lower type were roundings
    for value in results:
        users = list(value.uses())
        there = _cast(value, low)
        back = _cast(there, FLOAT)
        graph.insert_after(_producer(value), [_producer(there), _producer(back)])
        for node, index in users:
            node.replace_input_with(index, back)


def _raise_inputs(
    graph: ir.Graph,
    node: ir.Node,
    low: ir.DataType,
    high: ir.DataType,
    raised: dict[ir.Value, ir.Value],
) -> None:
    """Cast what a node reads in the lower type; one cast serves all nodes that follow."""
    for index, value in enumerate(node.inputs):
        if value is None or value.dtype != low:
            continue
        if value not in raised:
            raised[value] = _cast(value, high)
            graph.insert_before(node, _producer(raised[value]))
        node.replace_input_with(index, raised[value])


def _raise_outputs(node: ir.Node, low: ir.DataType, high: ir.DataType) -> list[ir.Value]:
    """Let a node return the higher type."""
    found = [value for value in node.outputs if value.dtype == low]
    if found and node.op_type == "Cast":
        node.attributes["to"] = ir.AttrInt64("to", high.value)
    if found and node.op_type in ("Constant", "ConstantOfShape"):
        array = node.attributes["value"].as_tensor().numpy().astype(high.numpy())
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))
    for value in found:
        value.dtype = high
    return found


def _lower_for_others(
    graph: ir.Graph, value: ir.Value, low: ir.DataType, chosen: Collection[ir.Node]
) -> None:
    """Give a value in the lower type to those users that are not chosen."""
    others = [(node, index) for node, index in value.uses() if node not in chosen]
    if not others:
        return
    lowered, producer = _cast(value, low), value.producer()
    if producer is None:
        graph.insert_before(graph[0], _producer(lowered))
    else:
        graph.insert_after(producer, _producer(lowered))
    for node, index in others:
        node.replace_input_with(index, lowered)


def _settle(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> None:
    """Cast an output of the graph; the cast takes over its name."""
    name, value.name = value.name, f"{value.name}.inner"
    settled = _cast(value, dtype)
    settled.name = name
    graph.append(_producer(settled))
    graph.outputs[graph.outputs.index(value)] = settled


def _drop_idle_casts(graph: ir.Graph, nodes: Iterable[ir.Node]) -> None:
    for node in nodes:
        if node.op_type != "Cast":
            continue
        before, after = node.inputs[0], node.outputs[0]
        if before is not None and before.dtype == after.dtype and not after.is_graph_output():
            after.replace_all_uses_with(before)
            graph.remove(node, safe=True)


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Value:
    made = ir.node("Cast", [value], {"to": dtype.value}).outputs[0]
    made.dtype, made.shape = dtype, value.shape
    return made


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None  # it is asked for results only
    return node
