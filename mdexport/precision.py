"""Precision is written into the graph: half the weights, with islands that stay in float32."""

import copy
from typing import Any, TypeVar

import onnx_ir as ir
import torch

from mdruntime.errors import SamplingError

__all__ = ["LIMITS", "PRECISIONS", "cast", "dtype_of", "float32_operators"]

Module = TypeVar("Module")  # an nn.Module, perhaps known by a protocol only

PRECISIONS = ("fp32", "fp16")

LIMITS = {
    "fp32": {
        "log_prob": 1e-4,
        "score": 1e-3,
        "token_shift": 1e-4,
        "psnr_db": 60.0,
        "encoder_agreement": 0.99,
    },
    "fp16": {
        "log_prob": 0.05,
        "score": 0.1,
        "token_shift": 0.05,
        "psnr_db": 35.0,
        "encoder_agreement": 0.9,
    },
}
"""Largest differences in nats, and smallest agreement, against the float32 PyTorch model."""


def dtype_of(precision: str) -> torch.dtype:
    """Return the dtype of weights and caches.

    Raises:
        SamplingError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise SamplingError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    return {"fp32": torch.float32, "fp16": torch.float16}[precision]


def cast(module: Module, precision: str) -> Module:
    """Return a copy of a module with floating-point weights of that precision."""
    dtype = dtype_of(precision)
    if dtype == torch.float32:
        return module
    copied: Any = copy.deepcopy(module)
    return copied.to(dtype)


def float32_operators(model: ir.Model) -> tuple[str, ...]:
    """Return the types of operators that compute in float32, for the manifest of an fp16 graph."""
    found = {
        node.op_type
        for node in model.graph.all_nodes()
        if node.op_type != "Cast" and any(v.dtype == ir.DataType.FLOAT for v in node.outputs)
    }
    softmax = ir.DataType.FLOAT.value
    if any(n.attributes.get_int("softmax_precision", 0) == softmax for n in model.graph):
        found.add("Attention (softmax)")
    return tuple(sorted(found))
