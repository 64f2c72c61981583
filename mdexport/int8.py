"""The denoiser's spelling in int8: calibrated in several ways, the best of which is written."""

import math
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from mdexport.calibration import CALIBRATIONS, Histogram, histograms
from mdexport.graphs import TENSORRT, Passes
from mdexport.operators import require_listed
from mdexport.quantise import NO_PRODUCTS, export_weights, products, quantise
from mdexport.replay import replay
from mdexport.retype import rounded
from mdruntime.errors import VerificationError
from mdruntime.head import Draws
from mdruntime.manifest import GraphSpec
from mdruntime.measures import compare
from mdruntime.session import INT8 as CPU_INT8

__all__ = ["INT8", "int8_for", "write_int8"]

INT8 = "tensorrt-int8"
"""Name of the spelling."""


def int8_for(precision: str) -> str:
    """Return the spelling in int8 for the processors that a precision is for."""
    return CPU_INT8 if precision == "fp32" else INT8


def write_int8(
    folder: Path,
    spec: GraphSpec,
    low: ir.DataType | None,
    trajectories: Passes,
    reference: Passes,
) -> str:
    """Write the denoiser with the products of its blocks in int8; return how it was calibrated.

    Args:
        folder: of the bundle, where the spelling for TensorRT lies already.
        spec: of the denoiser.
        low: the type of its operators; None where that is float32.
        trajectories: recorded passes of all rounds, for calibration.
        reference: recorded passes with the reference's answers, on which the ways are compared.

    Raises:
        VerificationError: the model has no products in numbered blocks.
    """
    source, target = folder / spec.spellings[TENSORRT], folder / f"denoiser.{INT8}.onnx"
    names = _activations(source)
    if not names:
        raise VerificationError(NO_PRODUCTS)
    found = histograms(source, low, trajectories(), names, spec.caches)
    errors = {}
    for way in CALIBRATIONS:
        graph = _quantised(source, target, found, way)
        if low is not None:
            rounded(graph.graph, low)
        answers = replay(graph, folder / "trial.onnx", reference(), Draws._fields, spec.caches)
        error = compare(zip(reference(), answers, strict=True))["mean_log_prob"]
        errors[way] = error if math.isfinite(error) else math.inf
    best = min(errors, key=lambda way: errors[way])
    ir.save(_quantised(source, target, found, best), target)
    require_listed(target)
    return best


def _activations(source: Path) -> Sequence[str]:
    graph = ir.load(source).graph
    return list(dict.fromkeys(str(product.activation.name) for product in products(graph)))


def _quantised(source: Path, target: Path, found: dict[str, Histogram], way: str) -> ir.Model:
    """Return the graph in int8; its weights lie in a file beside ``target``."""
    graph = ir.load(source)
    bounds = {name: CALIBRATIONS[way](histogram) for name, histogram in found.items()}
    export_weights(quantise(graph.graph, bounds), target.with_suffix(".weights"))
    return graph
