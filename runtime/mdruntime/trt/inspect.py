"""What a built engine computes in: the precision of its layers, as TensorRT's inspector tells it.

A builder may take another precision than the graph's without a word (NVIDIA/TensorRT issue 4590:
FP8 asked for, FP32 built), so that what was asked for is compared with what was made.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from types import ModuleType
from typing import Any

__all__ = ["Achieved", "achieved", "inspect_engine"]

_TYPES = (  # the inspector writes "Half", or "Row major linear FP16 format", by version and layer
    ("bf16", re.compile(r"bf16|bfloat16", re.IGNORECASE)),
    ("fp16", re.compile(r"half|fp16|float16", re.IGNORECASE)),
    ("fp8", re.compile(r"fp8|float8", re.IGNORECASE)),
    ("fp32", re.compile(r"fp32|float", re.IGNORECASE)),
    ("int8", re.compile(r"\bint8", re.IGNORECASE)),
)
_DECIDING = ("int8", "fp8", "fp32", "bf16", "fp16")
_PRODUCT = re.compile(r"gemm|gemv|matmul|matrix_?multiply|conv|correlation|mha", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Achieved:
    """How many layers compute in a precision: of all, and of products of matrices."""

    layers: dict[str, int]
    products: dict[str, int]

    def failure(self, precision: str) -> str:
        """Return what is wrong with an engine that was asked for in a precision, or nothing.

        Some operators stay in float32 on purpose, so that most products have to be in the
        precision asked for. Where the inspector names no products, some layers have to; and in
        int8, where what is worth it is the builder's choice, and its speed is what decides.
        """
        whole = not self.products or precision == "int8"
        counted = self.layers if whole else self.products
        got = counted.get(precision, 0)
        if precision == "fp32" or got > (0 if whole else sum(counted.values()) / 2):
            return ""
        kind = "layers" if whole else "products of matrices"
        found = ", ".join(f"{count} in {name}" for name, count in sorted(counted.items()))
        return f"{precision} was asked for, but the engine has of its {kind} {found or 'none'}"


def inspect_engine(trt: ModuleType, engine: Any) -> Achieved:
    """Return what an engine computes in; it has to be built with detailed profiling verbosity."""
    inspector = engine.create_engine_inspector()
    return achieved(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def achieved(information: str) -> Achieved:
    """Return what an engine computes in.

    Args:
        information: the inspector's JSON.
    """
    try:
        found = json.loads(information)
    except ValueError:  # versions differ in how well they escape names
        found = {}
    layers, products = Counter[str](), Counter[str]()
    for layer in found.get("Layers", []) if isinstance(found, dict) else []:
        if not isinstance(layer, dict):  # names only: the engine was built without details
            continue
        precision = _precision(layer)
        if precision:
            layers[precision] += 1
            if _is_product(layer):
                products[precision] += 1
    return Achieved(dict(layers), dict(products))


def _precision(layer: dict[str, Any]) -> str:
    """Return what a layer computes in; indices and shapes do not count.

    Beside eight bits it reads biases, scales and residuals that are wider; otherwise the widest
    type decides.
    """
    texts = [str(tensor.get("Format/Datatype", "")) for tensor in layer.get("Inputs", [])]
    types = {_type(text) for text in texts}
    weights = layer.get("Weights")
    if isinstance(weights, dict):  # a layer may also read int8 and compute in float32
        types = {_type(str(weights.get("Type", "")))}
    return next((name for name in _DECIDING if name in types), "")


def _type(text: str) -> str:
    return next((name for name, pattern in _TYPES if pattern.search(text)), "")


def _is_product(layer: dict[str, Any]) -> bool:
    return any(
        _PRODUCT.search(str(layer.get(field, "")))
        for field in ("LayerType", "ParameterType", "TacticName", "Name")
    )
