"""New nodes, recorded on a tape of onnx_ir, and put into a graph."""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

__all__ = ["constant", "place", "replace_node"]


def constant(tape: Tape, name: str, value: NDArray[Any] | np.generic) -> ir.Value:
    """Record an initializer."""
    return tape.initializer(ir.tensor(np.asarray(value)), name=name)


def place(graph: ir.Graph, node: ir.Node, tape: Tape, *, after: bool = False) -> None:
    """Put what a tape has recorded before a node, or after it."""
    _adopt(graph, node, tape)
    put = graph.insert_after if after else graph.insert_before
    put(node, tape.nodes)


def replace_node(graph: ir.Graph, node: ir.Node, tape: Tape, result: ir.Value) -> None:
    """Put what a tape has recorded in the place of a node with one output.

    Args:
        graph: that the node is in.
        node: to be replaced.
        tape: what it recorded has the type of the node's output, where nothing else was said.
        result: on the tape, what the output becomes.
    """
    old = node.outputs[0]
    assert old.dtype is not None  # every value of a traced graph has a type
    result.shape, result.type, result.name = old.shape, old.type, f"{old.name}.spelled"
    for value in (made for recorded in tape.nodes for made in recorded.outputs):
        value.dtype = value.dtype or old.dtype
    _adopt(graph, node, tape)
    ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, [old], [result])


def _adopt(graph: ir.Graph, node: ir.Node, tape: Tape) -> None:
    """Let new nodes belong to a node's module, and their initializers to its graph."""
    for made in tape.nodes:
        made.metadata_props.update(node.metadata_props)
    for initializer in tape.initializers:
        graph.register_initializer(initializer)
