"""From PyTorch modules to ONNX graphs with the names and free axes of the bundle."""

import ast
import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim

from mdexport.denoiser import VISIBLE, ConditionGraph, Denoiser, DenoiserGraph, HeadGraph
from mdexport.expansions import drop_expansions
from mdexport.head import OUTPUTS
from mdruntime.denoiser import CONDITION
from mdruntime.manifest import ImageSpec, PromptSpec, TensorSpec

__all__ = [
    "MODULE",
    "OPSET",
    "cache_names",
    "tensor_specs",
    "trace_condition",
    "trace_decoder",
    "trace_denoiser",
    "trace_encoder",
    "trace_head",
]

OPSET = 23  # the first with the Attention operator
MODULE = "module"
"""In the metadata of nodes: the path of the PyTorch module that a node comes from."""
_MOST_ROWS = 4096
_SAMPLES = 2  # of the example inputs; any number but 1, which would be taken for a constant
_COLUMNS = 3
_WANTED = 2


def cache_names(denoiser: Denoiser) -> tuple[tuple[str, str], ...]:
    """Return (input, output) names of every cache."""
    return tuple((f"past.{name}", f"present.{name}") for name in denoiser.empty_caches(1, 1))


def _example_labels(denoiser: Denoiser, rows: int, prompt: PromptSpec | None) -> Tensor:
    if prompt is None:
        return torch.zeros(rows, dtype=torch.int32)
    return torch.full((rows, prompt.length), prompt.end, dtype=torch.int32)


def example_inputs(denoiser: Denoiser, prompt: PromptSpec | None) -> dict[str, Any]:
    """Return inputs of a partial pass over ``_SAMPLES`` guided samples."""
    spec = denoiser.spec
    rows, batch, m, k = 2 * _SAMPLES, _SAMPLES, _COLUMNS, _WANTED
    with torch.no_grad():
        extras = denoiser.condition(_example_labels(denoiser, rows, prompt))
    if spec.visible:
        extras[VISIBLE] = torch.arange(_WANTED, dtype=torch.int32).repeat(rows, 1)
    return {
        "tokens": torch.zeros(rows, m * spec.slots, dtype=torch.int32),
        "positions": torch.arange(m, dtype=torch.int32).repeat(rows, 1),
        "columns": torch.arange(k, dtype=torch.int32).repeat(rows, 1),
        "conditional": torch.arange(batch, dtype=torch.int32),
        "unconditional": torch.arange(batch, rows, dtype=torch.int32),
        **{name: torch.ones(batch) for name in ("guidance", "temperature", "beta", "token_beta")},
        "uniforms": torch.zeros(batch, k * spec.slots),
        "extras": extras,
        "caches": list(denoiser.empty_caches(rows, spec.canvas).values()),
    }


def trace_denoiser(denoiser: Denoiser, prompt: PromptSpec | None) -> ir.Model:
    """Trace a denoiser with its sampler head.

    Args:
        denoiser: satisfies ``mdexport.Denoiser``, in the precision of the graph.
        prompt: what its condition graph reads, where that is text.
    """
    spec, inputs = denoiser.spec, example_inputs(denoiser, prompt)
    rows, m, k = (Dim(name, min=1, max=_MOST_ROWS) for name in ("rows", "m", "k"))
    batch = Dim("batch", min=1, max=_MOST_ROWS)
    extras = inputs["extras"]
    seen = {VISIBLE: {0: rows, 1: Dim("v", min=1, max=_MOST_ROWS)}}
    canvas = {2: Dim("canvas", min=1, max=_MOST_ROWS)} if spec.flexible else {}
    free: dict[str, Any] = {
        "tokens": {0: rows, 1: m * spec.slots if spec.slots > 1 else m},
        "positions": {0: rows, 1: m},
        "columns": {0: rows, 1: k},
        "uniforms": {0: batch, 1: k * spec.slots if spec.slots > 1 else k},
        "extras": [seen.get(name, {0: rows}) for name in extras],
        "caches": [{0: rows, **canvas}] * len(inputs["caches"]),
    }
    axes = {name: free.get(name, {0: batch}) for name in inputs}  # matched by order, not by name
    names = list(extras)
    model = _export(DenoiserGraph(denoiser, names), {**inputs, "extras": [*extras.values()]}, axes)
    before, after = zip(*cache_names(denoiser), strict=True)
    given = [name if name == VISIBLE else CONDITION + name for name in names]
    _rename(model.graph.inputs[-len(before) - len(given) :], [*given, *before])
    _rename(model.graph.outputs, [*OUTPUTS, *after, "logits"])
    drop_expansions(model)
    return model


def trace_head(codebook: int) -> ir.Model:
    """Trace the sampler head alone, from guided logits (batch, k, codebook) to its outputs."""
    k, batch = (Dim(name, min=1, max=_MOST_ROWS) for name in ("k", "batch"))
    inputs = {
        "logits": torch.zeros(_SAMPLES, _COLUMNS, codebook),
        **{name: torch.ones(_SAMPLES) for name in ("temperature", "beta", "token_beta")},
        "uniforms": torch.zeros(_SAMPLES, _COLUMNS),
    }
    free = {"logits": {0: batch, 1: k}, "uniforms": {0: batch, 1: k}}
    model = _export(HeadGraph(), inputs, {name: free.get(name, {0: batch}) for name in inputs})
    _rename(model.graph.outputs, OUTPUTS)
    return model


def trace_condition(denoiser: Denoiser, prompt: PromptSpec | None) -> ir.Model:
    """Trace what a denoiser computes once for a trajectory, from its labels or prompts."""
    labels = _example_labels(denoiser, _SAMPLES, prompt)
    with torch.no_grad():
        names = list(denoiser.condition(labels))
    rows = Dim("rows", min=1, max=_MOST_ROWS)
    model = _export(ConditionGraph(denoiser), {"labels": labels}, {"labels": {0: rows}})
    _rename(model.graph.inputs, ["labels" if prompt is None else "prompt"])
    _rename(model.graph.outputs, names)
    return model


def trace_decoder(decoder: nn.Module, length: int) -> ir.Model:
    """Trace a decoder from int32 tokens (batch, length) to uint8 images."""
    batch = Dim("batch", min=1, max=_MOST_ROWS)
    inputs = {"tokens": torch.zeros(_SAMPLES, length, dtype=torch.int32)}
    model = _export(decoder, inputs, {"tokens": {0: batch}})
    _rename(model.graph.outputs, ["images"])
    return model


def trace_encoder(encoder: nn.Module, image: ImageSpec) -> ir.Model:
    """Trace an encoder from uint8 images (batch, height, width, 3) to int32 tokens."""
    shape = (_SAMPLES, image.height, image.width, 3)
    batch = Dim("batch", min=1, max=_MOST_ROWS)
    inputs = {"images": torch.zeros(shape, dtype=torch.uint8)}
    model = _export(encoder, inputs, {"images": {0: batch}})
    _rename(model.graph.outputs, ["tokens"])
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
    _name_axes(model.graph, inputs, axes)
    for node in model.graph.all_nodes():
        path = _module_path(node)
        node.metadata_props.clear()  # stack traces: paths of the machine that exported
        if path:
            node.metadata_props[MODULE] = path
        node.doc_string = None
    return model


def _name_axes(graph: ir.Graph, inputs: Mapping[str, Any], axes: Mapping[str, Any]) -> None:
    """Give the free axes the names they were asked for with.

    PyTorch calls an axis s15 or so once it has found out what it has to be equal to.
    """
    asked = [axis for name in inputs for axis in _listed(axes[name])]
    names: dict[str, str] = {}
    for value, wanted in zip(graph.inputs, asked, strict=True):
        found = value.shape or ()
        free = {place: found[place] for place, axis in wanted.items() if type(axis) is Dim}
        names |= {str(size): wanted[place].__name__ for place, size in free.items()}
    outputs = (value for node in graph.all_nodes() for value in node.outputs)
    for value in (*graph.inputs, *outputs):
        if value.shape is not None:
            value.shape = ir.Shape([_named(size, names) for size in value.shape])


def _named(size: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | str | None:
    """Return a size with the symbols in it, such as s15 in 2*s15, replaced by their names."""
    if isinstance(size, int) or size.value is None:
        return size if isinstance(size, int) else None
    return re.sub(r"\w+", lambda found: names.get(found[0], found[0]), size.value)


def _listed(axes: Any) -> list[Mapping[int, Any]]:
    """Return the axes of an input: of a single tensor, or of each of a list."""
    return list(axes) if isinstance(axes, list) else [axes]


def _module_path(node: ir.Node) -> str:
    """Return the path of the PyTorch module that a node comes from; "" where none is named."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    paths = [scope for scope in scopes[:-1] if not scope.startswith("_")]  # the last is the call
    return paths[-1].removeprefix("denoiser.") if paths else ""


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
