"""From a traced graph to its files: one weight file, one graph for each backend's spelling."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

import mdruntime
from mdexport import spelling
from mdexport.groups import in_steps
from mdexport.lowering import lower
from mdexport.operators import require_listed
from mdexport.precision import LOW, fit, float32_operators
from mdexport.ranges import measure
from mdexport.replay import Arrays
from mdexport.retype import rounded
from mdexport.trace import OPSET, tensor_specs
from mdruntime.first import HEAD
from mdruntime.manifest import GraphSpec, Island

__all__ = ["CHECK", "TENSORRT", "Passes", "Writer", "write_check"]

TENSORRT = "tensorrt"
CHECK = "check"
"""The spelling that stands for another one where ONNX Runtime lacks the arithmetic of that."""

Passes = Callable[[], Iterable[Arrays]]
"""Recorded passes; a function, for they may not fit into memory all at once."""


@dataclass(frozen=True, slots=True)
class Writer:
    """What all graphs of a bundle have in common."""

    folder: Path
    model: str
    logits: bool = False
    """Let the denoiser's TensorRT spelling return logits too."""

    def write(
        self,
        name: str,
        graph: ir.Model,
        precision: str,
        passes: Passes,
        *,
        caches: Sequence[tuple[str, str]] = (),
        float32: Collection[str] | None = None,
    ) -> GraphSpec:
        """Write a graph in all its spellings and return what the manifest says of it.

        Args:
            name: of the graph.
            graph: as it was traced, in ``precision``.
            precision: of its weights.
            passes: recorded inputs, along which the range of its values is measured.
            caches: (input, output) names.
            float32: names of outputs that must be float32, and no others, where that is known.
        """
        path, low = self.folder / f"{name}.onnx", LOW.get(precision)
        self._sign(graph, precision)
        spelling.keep_softmax_in_float32(graph)
        _save(graph, path, f"{name}.weights")
        graph = ir.load(path)  # from here on weights are references into the weight file
        islands: tuple[Island, ...] = ()
        if low is not None:
            ranges = measure(path, low, passes(), caches)
            islands = fit(graph.graph, low, ranges, caches, float32)
        ir.save(graph, path)
        spec = GraphSpec(
            file=path.name,
            opset=OPSET,
            spellings={TENSORRT: f"{name}.{TENSORRT}.onnx"},
            inputs=tensor_specs(graph.graph.inputs),
            outputs=tensor_specs(graph.graph.outputs),
            caches=tuple(caches),
            float32_operators=() if low is None else float32_operators(graph),
            float32_islands=islands,
        )
        self._spell(path, self.folder / spec.spellings[TENSORRT])
        in_steps(graph)
        ir.save(graph, path)
        if low == ir.DataType.BFLOAT16:  # which ONNX Runtime lacks on a CPU
            _round(path, path, low)
        return spec

    def write_head(self, graph: ir.Model) -> GraphSpec:
        """Write the graph of the sampler head, which has no weights and only one spelling."""
        path = self.folder / f"{HEAD}.onnx"
        self._sign(graph, "fp32")
        ir.save(graph, path)
        inputs, outputs = (tensor_specs(some) for some in (graph.graph.inputs, graph.graph.outputs))
        return GraphSpec(path.name, OPSET, {}, inputs, outputs, (), ())

    def _sign(self, graph: ir.Model, precision: str) -> None:
        graph.producer_name, graph.producer_version = "mdexport", mdruntime.__version__
        graph.metadata_props["mdexport.model"] = self.model
        graph.metadata_props["mdexport.precision"] = precision

    def _spell(self, path: Path, target: Path) -> None:
        graph = ir.load(path)
        lower(graph)
        if not self.logits:
            spelling.drop_output(graph, "logits")
        ir.save(graph, target)
        require_listed(target)


def write_check(
    folder: Path, graphs: Mapping[str, GraphSpec], name: str, low: Mapping[str, ir.DataType]
) -> dict[str, GraphSpec]:
    """Write copies of a spelling that compute in float32 and round every result; see ``rounded``.

    The files are called ``*.check.onnx`` and are to be deleted after use.

    Args:
        folder: of the bundle.
        graphs: by name.
        name: the spelling.
        low: by name of a graph, the type of its operators.

    Returns:
        The graphs with the spelling ``CHECK`` beside those that they have.
    """
    found = {}
    for graph, spec in graphs.items():
        spellings = dict(spec.spellings)
        if name in spellings:
            spellings[CHECK] = f"{graph}.{CHECK}.onnx"
            _round(folder / spellings[name], folder / spellings[CHECK], low[graph])
        found[graph] = replace(spec, spellings=spellings)
    return found


def _round(path: Path, target: Path, low: ir.DataType) -> None:
    graph = ir.load(path)
    rounded(graph.graph, low)
    ir.save(graph, target)


def _save(graph: ir.Model, path: Path, weights: str) -> None:
    """Write a graph and its weights; a graph that has no large ones gets no weight file."""
    ir.save(graph, path, external_data=weights)
    if (path.parent / weights).stat().st_size == 0:
        (path.parent / weights).unlink()
