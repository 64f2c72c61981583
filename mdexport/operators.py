"""Graphs against the operators that TensorRT is published to have.

TensorRT is not needed for this, and nothing here says that a graph builds: only that every
operator, input type and opset stands in the published list of ``tensorrt_operators.json``, which
names its sources and the oldest version of TensorRT that it speaks for.
"""

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from mdruntime.errors import VerificationError

__all__ = ["misfits", "require_listed"]

_LIST = Path(__file__).with_name("tensorrt_operators.json")
_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.FLOAT8E4M3FN: "FP8",
    TensorProto.INT4: "INT4",
    TensorProto.INT8: "INT8",
    TensorProto.UINT8: "UINT8",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.BOOL: "BOOL",
}
_ALL_INPUTS = frozenset({"Concat", "Max", "Mean", "Min", "Sum", "Where"})
_OUTPUT = frozenset({"Cast", "CastLike", "Constant", "ConstantOfShape"})
"""Operators whose output has a type of its own, which the list speaks of too."""
_NO_DATA = frozenset({"Constant", "ConstantOfShape"})  # no input whose type the list speaks of


@dataclass(frozen=True, slots=True)
class _Scope:
    """What is known of the values that a graph's nodes can see."""

    types: dict[str, str]  # of values, by name, in the list's words
    constants: set[str]
    borders: set[str]  # the model's own inputs and outputs
    problems: list[str] = field(default_factory=list)


@functools.cache
def _listed() -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(_LIST.read_text(encoding="utf-8"))
    return found


def require_listed(path: Path) -> None:
    """Refuse a graph that uses what TensorRT is not published to have.

    Raises:
        VerificationError: naming every operator, type or opset that is not listed.
    """
    found = misfits(path)
    if found:
        raise VerificationError(
            f"{path.name} does not fit the published operator list of TensorRT "
            f"{_listed()['tensorrt']}: {'; '.join(found)}; nothing was written. The model needs "
            "another spelling there (mdexport/spelling.py)"
        )


def misfits(path: Path) -> list[str]:
    """Return what in an ONNX file the published list does not have, in sorted sentences.

    Weights are not read.
    """
    model = onnx.load(path, load_external_data=False)
    found = [*_opset(model), *(f"model-local function {each.name}" for each in model.functions)]
    typed = onnx.shape_inference.infer_shapes(model, data_prop=False)
    borders = {value.name for value in (*typed.graph.input, *typed.graph.output)}
    scope = _Scope({}, set(), borders)
    _check_graph(typed.graph, scope)
    return sorted({*found, *scope.problems})


def _opset(model: ModelProto) -> Iterator[str]:
    low, high = _listed()["opsets"]
    for each in model.opset_import:
        if each.domain in ("", "ai.onnx") and not low <= each.version <= high:
            yield f"opset {each.version} (listed: {low} to {high})"


def _check_graph(graph: GraphProto, scope: _Scope) -> None:
    """Check a graph's nodes, and those of the graphs inside them, which see its values."""
    for value in (*graph.value_info, *graph.input, *graph.output):
        scope.types[value.name] = _name(value.type.tensor_type.elem_type)
    for initializer in graph.initializer:
        scope.types[initializer.name] = _name(initializer.data_type)
        scope.constants.add(initializer.name)
    scope.constants.update(
        name for node in graph.node if node.op_type == "Constant" for name in node.output
    )
    for node in graph.node:
        scope.problems.extend(_check_node(node, scope))
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _check_graph(inner, scope)


def _name(elem_type: int) -> str:
    """Return the list's word for an element type; ONNX's own where it has none, "" unknown."""
    return _TYPES.get(elem_type, "" if elem_type == 0 else TensorProto.DataType.Name(elem_type))


def _check_node(node: NodeProto, scope: _Scope) -> Iterator[str]:
    listed, operator = _listed(), node.op_type
    if node.domain not in ("", "ai.onnx"):
        yield f"operator {node.domain}.{operator}"
    elif operator in listed["later"]:
        yield f"operator {operator} (since TensorRT {listed['later'][operator]} only)"
    elif operator not in listed["operators"]:
        yield f"operator {operator}"
    else:
        yield from _check_types(node, listed["operators"][operator], scope)
        yield from _check_use(node, listed, scope)


def _check_types(node: NodeProto, types: Sequence[str], scope: _Scope) -> Iterator[str]:
    for name in _typed(node):
        found = scope.types.get(name, "")
        if found not in types:
            yield f"operator {node.op_type} of {found or f'an unknown type ({name})'}"
    for name in node.output:
        if scope.types.get(name) == "UINT8" and name not in scope.borders:
            yield f"operator {node.op_type} with UINT8 inside the graph (inputs and outputs only)"


def _typed(node: NodeProto) -> Iterable[str]:
    """Return the values whose types the list speaks of."""
    inputs = [] if node.op_type in _NO_DATA else [name for name in node.input if name]
    values = inputs if node.op_type in _ALL_INPUTS else inputs[:1]
    return [*values, *node.output] if node.op_type in _OUTPUT else values


def _check_use(node: NodeProto, listed: Mapping[str, Any], scope: _Scope) -> Iterator[str]:
    """Check the restrictions: inputs that must be constants, attributes, outputs."""
    operator = node.op_type
    for index in listed["constant_inputs"].get(operator, ()):
        name = node.input[index] if index < len(node.input) else ""
        if name and name not in scope.constants:
            yield f"operator {operator} whose input {index} is no constant"
    allowed = listed["attributes"].get(operator, {})
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        value = value.decode() if isinstance(value, bytes) else value
        if value not in allowed.get(attribute.name, [value]):
            yield f"operator {operator} with {attribute.name} {value}"
    most = listed["outputs"].get(operator, len(node.output))
    if any(node.output[most:]):
        yield f"operator {operator} with more than {most} output"
