"""The arithmetic of an operator, from the shapes that it was run with."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Tensor", "Work", "is_product", "work_of"]


@dataclass(frozen=True, slots=True)
class Tensor:
    """Type and shape of an input or output, as ONNX Runtime calls them."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """What an operator has to do at least."""

    gigaflop: float  # of products: two for every multiplication with its addition
    weight_mb: float = 0.0  # of weights that it multiplies with, to be read once


Tensors = Sequence[Tensor]

_BYTES = {"float": 4, "double": 8, "float16": 2, "bfloat16": 2}  # of a weight; else one


def work_of(operator: str, inputs: Tensors, outputs: Tensors) -> Work | None:
    """Return the arithmetic of products; None where the shapes do not tell it, or there is none.

    ONNX Runtime leaves weights out of a profile that it has packed into an order of its own.
    """
    rule = _RULES.get(operator)
    return None if rule is None or not inputs or not outputs else rule(inputs, outputs)


def is_product(operator: str) -> bool:
    """Return whether nearly all that an operator does are products."""
    return operator in _RULES


def _matmul(inputs: Tensors, outputs: Tensors) -> Work | None:
    left, out = inputs[0], outputs[0]
    if len(left.shape) < 2 or len(out.shape) < 2:
        return None
    rows, columns = out.shape[-2:]
    inner = left.shape[-1 if left.shape[-2] == rows else -2]  # the left one may be transposed
    others = [tensor for tensor in inputs[1:] if len(tensor.shape) > 1]
    weight_mb = 0.0
    if not others or math.prod(others[0].shape) == inner * columns:
        weight_mb = 1e-6 * inner * columns * _BYTES.get(left.dtype, 1)
    return Work(2e-9 * math.prod(out.shape) * inner, weight_mb)


def _attention(inputs: Tensors, outputs: Tensors) -> Work | None:
    """Return queries times keys, and their weights times values, (..., sequence, size) each."""
    if len(inputs) < 3 or not 3 <= len(inputs[0].shape) == len(inputs[1].shape):
        return None
    query, key = inputs[0].shape, inputs[1].shape
    return Work(2e-9 * key[-2] * (math.prod(query) + math.prod(outputs[0].shape)))


def _convolution(inputs: Tensors, outputs: Tensors) -> Work | None:
    if len(inputs) < 2 or len(inputs[1].shape) != len(inputs[0].shape):
        return None
    filters = inputs[1]  # (channels out, channels in, height, width)
    weight_mb = 1e-6 * math.prod(filters.shape) * _BYTES.get(filters.dtype, 1)
    return Work(2e-9 * math.prod(outputs[0].shape) * math.prod(filters.shape[1:]), weight_mb)


_RULES: dict[str, Callable[[Tensors, Tensors], Work | None]] = {
    **dict.fromkeys(("MatMul", "FusedMatMul", "Gemm", "FusedGemm"), _matmul),
    **dict.fromkeys(("MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul", "QGemm"), _matmul),
    **dict.fromkeys(("DynamicQuantizeMatMul",), _matmul),
    **dict.fromkeys(("Attention", "MultiHeadAttention"), _attention),
    **dict.fromkeys(("Conv", "FusedConv", "NhwcFusedConv"), _convolution),
}
