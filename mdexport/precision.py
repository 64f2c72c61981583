"""Precision is written into the graph: half the weights, with islands that stay in float32."""

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import onnx
import onnx_ir as ir
import torch

from mdexport.ranges import Ranges, keep_in_float32, too_large
from mdexport.retype import retype
from mdexport.spelling import TENSORRT_OPSET
from mdruntime.errors import SamplingError
from mdruntime.manifest import Island

__all__ = [
    "LIMITS",
    "LIMITS_INT8",
    "LOW",
    "PRECISIONS",
    "cast",
    "dtype_of",
    "fit",
    "float32_operators",
    "limits_int8",
    "of_images",
]

Module = TypeVar("Module")  # an nn.Module, perhaps known by a protocol only

PRECISIONS = ("fp32", "fp16", "bf16")

LOW = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
"""The type of a graph's operators, where it is not float32."""

LIMITS = {
    "fp32": {
        "log_prob": 1e-4,
        "score": 1e-3,
        "token_shift": 1e-4,
        "psnr_db": 60.0,
        "encoder_agreement": 0.99,
        "head_agreement": 1.0,
    },
    "fp16": {
        "log_prob": 0.05,
        "score": 0.1,
        "token_shift": 0.05,
        "psnr_db": 35.0,
        "encoder_agreement": 0.9,
        "head_agreement": 1.0,
    },
    "bf16": {
        "log_prob": 0.5,
        "score": 0.4,
        "token_shift": 0.05,
        "mean_log_prob": 0.05,
        "psnr_db": 35.0,
        "encoder_agreement": 0.9,
        "head_agreement": 1.0,
    },
}
"""Largest differences in nats, and smallest agreement, against the float32 PyTorch model."""

LIMITS_INT8 = {"score": 1.0, "token_shift": 0.2, "mean_log_prob": 0.1, "close_agreement": 0.8}
"""The same for products in int8: numbers that single draws decide get room, the mean decides."""


def limits_int8(origin: str) -> dict[str, float]:
    """Return what int8 must keep, images included, for weights of this origin.

    Decoders of random weights amplify every error, and their images mean nothing.
    """
    return {**LIMITS_INT8, "psnr_db": 20.0 if origin == "random" else 35.0}


_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def dtype_of(precision: str) -> torch.dtype:
    """Return the dtype of weights.

    Raises:
        SamplingError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise SamplingError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    return _DTYPES[precision]


def of_images(precision: str) -> str:
    """Return the precision of decoder and encoder beside a denoiser of this precision.

    bfloat16 is for the range of a transformer's activations. Convolutions have it since opset 22
    only, and its eight bits of mantissa are as few as a pixel's: images are computed in float16.
    """
    return "fp16" if precision == "bf16" else precision


def cast(module: Module, precision: str) -> Module:
    """Return a copy of a module with floating-point weights of that precision.

    Raises:
        SamplingError: a weight is too large for it.
    """
    dtype = dtype_of(precision)
    if dtype == torch.float32:
        return module
    copied: Any = copy.deepcopy(module)
    copied = copied.to(dtype)
    for name, tensor in copied.named_parameters():
        if not torch.isfinite(tensor).all():
            raise SamplingError(
                f"weight {name!r} holds numbers that {precision} cannot; choose --bf16 or "
                "--precision fp32"
            )
    return copied


def fit(
    graph: ir.Graph,
    low: ir.DataType,
    ranges: Ranges,
    caches: Sequence[tuple[str, str]],
    float32: Collection[str] | None = None,
) -> tuple[Island, ...]:
    """Keep in float32 what a lower precision cannot hold or has no operator for, in place.

    Args:
        graph: as it was traced, in ``low``.
        low: float16 or bfloat16.
        ranges: the largest magnitudes of its values.
        caches: (input, output) names.
        float32: names of outputs that are float32 whatever their range, and no others.
    """
    if low == ir.DataType.FLOAT16:
        return keep_in_float32(graph, ranges, caches, float32)
    lacking = [node for node in graph if low in _types(node) and not _has(node, low)]
    retype(graph, lacking, low)
    return _without_bfloat16(graph, ranges, dict(caches))


def _types(node: ir.Node) -> set[ir.DataType | None]:
    return {value.dtype for value in (*node.inputs, *node.outputs) if value is not None}


def _has(node: ir.Node, low: ir.DataType) -> bool:
    """Return whether an operator exists for a type in TensorRT's opset too."""
    try:
        schema = onnx.defs.get_schema(node.op_type, TENSORRT_OPSET, node.domain)
    except onnx.defs.SchemaError:
        return node.op_type == "Attention"  # spelled out there
    name = f"tensor({low.name.lower()})"
    return any(name in constraint.allowed_type_strs for constraint in schema.type_constraints)


def _without_bfloat16(
    graph: ir.Graph, ranges: Ranges, caches: Mapping[str, str]
) -> tuple[Island, ...]:
    """Give a graph inputs and outputs of types that NumPy has.

    Caches become float16, which holds every bfloat16 of their range exactly, and scatter in it;
    those whose range it does not hold, and all others, become float32.
    """
    low, islands = ir.DataType.BFLOAT16, list[Island]()
    wide = too_large(ranges)
    for before, after in caches.items():
        large = after in wide
        high = ir.DataType.FLOAT if large else ir.DataType.FLOAT16
        retype(graph, _between(graph, before, after, low), low, high, (before, after))
        if large:
            islands.append(Island(after, ranges[after]))
    borders = [value.name for value in (*graph.inputs, *graph.outputs) if value.dtype == low]
    retype(graph, [], low, ir.DataType.FLOAT, [str(name) for name in borders])
    return tuple(islands)


def _between(graph: ir.Graph, before: str, after: str, low: ir.DataType) -> list[ir.Node]:
    """Return the operators on all ways from an input to an output: those that refresh a cache.

    Ways are over values of the type ``low``: a shape that is read off a cache leads elsewhere.
    """
    reached, needed = {before}, {after}
    forth = []
    for node in graph:
        if not reached.isdisjoint(_names(node.inputs, low)):
            reached |= _names(node.outputs, low)
            forth.append(node)
    found = []
    for node in reversed(forth):
        if not needed.isdisjoint(_names(node.outputs, low)):
            needed |= _names(node.inputs, low)
            found.append(node)
    return found[::-1]


def _names(values: Iterable[ir.Value | None], low: ir.DataType) -> set[str]:
    return {str(value.name) for value in values if value is not None and value.dtype == low}


def float32_operators(model: ir.Model) -> tuple[str, ...]:
    """Return the types of operators that compute in float32, for a graph of lower precision."""
    found = {
        node.op_type
        for node in model.graph.all_nodes()
        if node.op_type != "Cast" and any(v.dtype == ir.DataType.FLOAT for v in node.outputs)
    }
    softmax = ir.DataType.FLOAT.value
    if any(n.attributes.get_int("softmax_precision", 0) == softmax for n in model.graph):
        found.add("Attention (softmax)")
    return tuple(sorted(found))
