"""Group normalisation in other operators: neither backend has the one of opset 21.

ONNX Runtime would take it apart into operators too, but into more: each copies the whole image,
and two casts change nothing. The steps here are fewer, and the variance is that of centred
numbers, which does not cancel where the mean is large.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from mdexport.tapes import constant, replace_node

__all__ = ["GROUPS", "as_instances", "in_steps"]

GROUPS = "GroupNormalization"


class _Norm:
    """A normalisation of groups, and what it is written anew with."""

    def __init__(self, node: ir.Node) -> None:
        images, scale, bias = node.inputs
        shape = None if images is None else images.shape
        if images is None or scale is None or bias is None or shape is None:
            raise ValueError(f"group normalisation of unknown shape: {node.name}")
        inner = list(shape)[1:]
        if not all(isinstance(size, int) for size in inner):
            raise ValueError(f"group normalisation of images of free size: {node.name}")
        self.node, self.tape = node, Tape()
        self.images, self.scale, self.bias = images, scale, bias
        self.inner = [int(str(size)) for size in inner]  # channels, height, width
        self.groups = node.attributes.get_int("num_groups", 0)
        self.epsilon = node.attributes.get_float("epsilon", 1e-5)
        self._column = self.sizes("column", -1, self.inner[0], *[1] * (len(inner) - 1))

    def number(self, name: str, numbers: object) -> ir.Value:
        """Record a constant of the images' type."""
        dtype = self.images.dtype or ir.DataType.FLOAT
        return constant(self.tape, f"{self.node.name}.{name}", np.asarray(numbers, dtype.numpy()))

    def sizes(self, name: str, *numbers: int) -> ir.Value:
        """Record a constant of sizes or axes."""
        return constant(self.tape, f"{self.node.name}.{name}", np.array(numbers, np.int64))

    def flat(self) -> ir.Value:
        """Return the images as (batch, groups, numbers of a group)."""
        return self.tape.op("Reshape", [self.images, self.sizes("flat", 0, self.groups, -1)])

    def back(self, flat: ir.Value) -> ir.Value:
        """Return (batch, groups, numbers of a group) as images."""
        return self.tape.op("Reshape", [flat, self.sizes("back", 0, *self.inner)])

    def column(self, values: ir.Value) -> ir.Value:
        """Return one value for each channel, of all images or of each, to be broadcast."""
        return self.tape.op("Reshape", [values, self._column])


def as_instances(graph: ir.Graph, node: ir.Node) -> None:
    """Replace a normalisation of groups by one of instances, each of a group's numbers.

    Raises:
        ValueError: the size of the images is not known.
    """
    norm = _Norm(node)
    tape = norm.tape
    ones, zeros = (norm.number(f"{n}", np.full(norm.groups, n)) for n in (1, 0))
    inputs = [norm.flat(), ones, zeros]
    normal = tape.op("InstanceNormalization", inputs, {"epsilon": norm.epsilon})
    scaled = tape.op("Mul", [norm.back(normal), norm.column(norm.scale)])
    replace_node(graph, node, tape, tape.op("Add", [scaled, norm.column(norm.bias)]))


def in_steps(model: ir.Model) -> None:
    """Replace every normalisation of groups by its steps, in place.

    Raises:
        ValueError: the size of the images is not known.
    """
    for node in list(model.graph):
        if node.op_type == GROUPS:
            _in_steps(model.graph, node)


def _in_steps(graph: ir.Graph, node: ir.Node) -> None:
    norm = _Norm(node)
    tape = norm.tape
    last, flat = norm.sizes("last", 2), norm.flat()
    centred = tape.op("Sub", [flat, tape.op("ReduceMean", [flat, last])])
    squares = tape.op("ReduceSumSquare", [centred, last])
    share = norm.number("share", norm.groups / np.prod(norm.inner))
    variance = tape.op("Mul", [squares, share])
    deviation = tape.op("Sqrt", [tape.op("Add", [variance, norm.number("epsilon", norm.epsilon)])])
    grouped = norm.sizes("grouped", 1, norm.groups, -1)
    factor = tape.op("Div", [tape.op("Reshape", [norm.scale, grouped]), deviation])
    scaled = tape.op("Mul", [norm.back(centred), norm.column(factor)])
    replace_node(graph, node, tape, tape.op("Add", [scaled, norm.column(norm.bias)]))
