"""From PyTorch modules to ONNX graphs with the names and free axes of the bundle."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.export import Dim

from mdexport.denoiser import Denoiser, DenoiserGraph
from mdexport.head import OUTPUTS
from mdruntime.manifest import DenoiserSpec, TensorSpec

__all__ = ["OPSET", "cache_names", "tensor_specs", "trace_decoder", "trace_denoiser"]

OPSET = 23  # the first with the Attention operator
_MOST_ROWS = 4096
_SAMPLES = 2  # of the example inputs; any number but 1, which would be taken for a constant
_COLUMNS = 3


def cache_names(layers: int) -> tuple[tuple[str, str], ...]:
    """Return (input, output) names of every cache: key and value of layer 0, of layer 1, ..."""
    return tuple(
        (f"past.{layer}.{part}", f"present.{layer}.{part}")
        for layer in range(layers)
        for part in ("key", "value")
    )


def example_inputs(spec: DenoiserSpec, dtype: torch.dtype) -> dict[str, Any]:
    """Return inputs of a partial pass over ``_SAMPLES`` guided samples."""
    rows, batch, m = 2 * _SAMPLES, _SAMPLES, _COLUMNS
    cache = (rows, spec.heads, spec.canvas, spec.head_size)
    return {
        "tokens": torch.zeros(rows, m, dtype=torch.int32),
        "positions": torch.arange(m, dtype=torch.int32).repeat(rows, 1),
        "conditional": torch.arange(batch, dtype=torch.int32),
        "unconditional": torch.arange(batch, rows, dtype=torch.int32),
        **{name: torch.ones(batch) for name in ("guidance", "temperature", "beta", "token_beta")},
        "uniforms": torch.zeros(batch, m),
        "caches": [torch.zeros(cache, dtype=dtype) for _ in range(2 * spec.layers)],
    }


def trace_denoiser(denoiser: Denoiser, spec: DenoiserSpec, dtype: torch.dtype) -> ir.Model:
    """Trace a denoiser with its sampler head.

    Args:
        denoiser: satisfies ``mdexport.Denoiser``; its weights have ``dtype``.
        spec: its canvas.
        dtype: of the K/V caches.
    """
    rows, m = Dim("rows", min=1, max=_MOST_ROWS), Dim("m", min=1, max=_MOST_ROWS)
    batch = Dim("batch", min=1, max=_MOST_ROWS)
    free: dict[str, Any] = {
        "tokens": {0: rows, 1: m},
        "positions": {0: rows, 1: m},
        "uniforms": {0: batch, 1: m},
        "caches": [{0: rows}] * (2 * spec.layers),
    }
    inputs = example_inputs(spec, dtype)
    axes = {name: free.get(name, {0: batch}) for name in inputs}  # matched by order, not by name
    model = _export(DenoiserGraph(denoiser), inputs, axes)
    caches = cache_names(spec.layers)
    before, after = [name for name, _ in caches], [name for _, name in caches]
    _rename(model.graph.inputs[-len(before) :], before)
    _rename(model.graph.outputs, [*OUTPUTS, *after, "logits"])
    return model


def trace_decoder(decoder: nn.Module, length: int) -> ir.Model:
    """Trace a decoder from int32 tokens (batch, length) to uint8 images."""
    batch = Dim("batch", min=1, max=_MOST_ROWS)
    inputs = {"tokens": torch.zeros(_SAMPLES, length, dtype=torch.int32)}
    model = _export(decoder, inputs, {"tokens": {0: batch}})
    _rename(model.graph.outputs, ["images"])
    return model


def _export(module: nn.Module, inputs: dict[str, Any], axes: Mapping[str, Any]) -> ir.Model:
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            kwargs=inputs,
            dynamic_shapes=dict(axes),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None  # with dynamo=True and no file it always is
    model = program.model
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces: paths of the machine that exported
        node.doc_string = None
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks about packages and axis names away from the user's terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _rename(values: Sequence[ir.Value], names: Sequence[str]) -> None:
    for value, name in zip(values, names, strict=True):
        value.name = name


def tensor_specs(values: Sequence[ir.Value]) -> tuple[TensorSpec, ...]:
    """Return names, dtypes and shapes of a graph's inputs or outputs, for the manifest."""
    return tuple(
        TensorSpec(
            name=str(value.name),
            dtype=str(value.dtype.numpy()) if value.dtype is not None else "",
            shape=tuple(size if isinstance(size, int) else str(size) for size in value.shape or ()),
        )
        for value in values
    )
