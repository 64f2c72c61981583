"""How large the values of a graph become, and which of them float16 cannot hold.

The recorded trajectories are replayed in float32 before anything is cast, and the largest
magnitude of every value is kept. Operators whose values come near the end of float16's range stay
in float32: islands, which the manifest names.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mdexport.lowering import lower
from mdexport.replay import Arrays, replay
from mdexport.retype import low_values, retype, widen
from mdexport.trace import MODULE
from mdruntime.errors import VerificationError
from mdruntime.manifest import Island

__all__ = ["LARGEST", "MARGIN", "Ranges", "keep_in_float32", "measure", "too_large"]

LARGEST = 65504.0  # in float16
MARGIN = 4.0
"""How many times larger than in the recorded trajectories a value may become elsewhere. Measured:
over 64 other samples the largest values of the shipped models grow twofold at most."""

Ranges = Mapping[str, float]
"""Largest magnitudes by name of a value; names of values inside an Attention operator begin with
that of its output and a dot."""


def measure(
    path: Path,
    low: ir.DataType,
    passes: Iterable[Arrays],
    caches: Sequence[tuple[str, str]] = (),
) -> Ranges:
    """Return the largest magnitude, computed in float32, of every value of a graph's lower type.

    Args:
        path: the graph as it was traced, its weights already in ``low``.
        low: float16 or bfloat16.
        passes: recorded ones.
        caches: (input, output) names of the graph's caches.

    Raises:
        VerificationError: a value is NaN or infinite in float32 already.
    """
    model = ir.load(path)
    lower(model)
    inputs = {before for before, _ in caches}  # bound to the outputs' memory: seen there
    watched = [value for value in low_values(model.graph, low) if value.name not in inputs]
    names = [str(value.name) for value in watched]
    if not names:
        return {}
    _add_extremes(model.graph, watched)
    widen(model.graph, low)
    found = np.zeros(len(watched), np.float32)
    for outputs in replay(model, path.with_name("ranges.onnx"), passes, [_EXTREMES], caches):
        found = np.maximum(found, outputs[_EXTREMES])  # NaN stays NaN
    for value, largest in zip(watched, found, strict=True):
        if not np.isfinite(largest):
            raise VerificationError(
                f"{_name_of(value)} of {path.stem} returns {largest} in float32 already; are the "
                "weights whole? Nothing was written"
            )
    return {name: float(largest) for name, largest in zip(names, found, strict=True)}


_EXTREMES = "extremes"


def _add_extremes(graph: ir.Graph, values: Sequence[ir.Value]) -> None:
    """Add an output (n,) that holds the largest magnitude of each of these values.

    A ReduceMax may overlook NaN, a sum does not: the sum's multiple of zero carries it over.
    """
    tape = ir.tape.Tape()
    zero = tape.initializer(ir.tensor(np.zeros(1, np.float32)), name=f"{_EXTREMES}.zero")
    one = tape.initializer(ir.tensor(np.array([1], np.int64)), name=f"{_EXTREMES}.one")
    found = []
    for value in values:
        size = tape.op("Abs", [value])
        largest = tape.op("Reshape", [tape.op("ReduceMax", [size], {"keepdims": 0}), one])
        total = tape.op("Reshape", [tape.op("ReduceMean", [size], {"keepdims": 0}), one])
        found.append(tape.op("Add", [largest, tape.op("Mul", [total, zero])]))
    joined = tape.op("Concat", found, {"axis": 0})
    joined.name, joined.dtype, joined.shape = _EXTREMES, ir.DataType.FLOAT, ir.Shape([len(values)])
    for initializer in tape.initializers:
        graph.register_initializer(initializer)
    graph.extend(tape.nodes)
    graph.outputs.append(joined)


def too_large(ranges: Ranges) -> set[str]:
    """Return the names of values that float16 cannot be trusted with."""
    return {name for name, largest in ranges.items() if largest * MARGIN > LARGEST}


def keep_in_float32(
    graph: ir.Graph,
    ranges: Ranges,
    caches: Sequence[tuple[str, str]] = (),
    borders: Collection[str] | None = None,
) -> tuple[Island, ...]:
    """Keep the operators around values that are too large in float32, in place.

    Their weights stay in float16, where the numbers of a weight fit, and are cast.

    Args:
        graph: in float16, its attention not spelled out.
        ranges: what ``measure`` found in it.
        caches: (input, output) names; both become float32 where one of them is too large.
        borders: names of outputs that become float32 whatever was measured, and no others; by
            default those that are too large.
    """
    wide = too_large(ranges)
    outputs = {value.name for value in graph.outputs}
    if borders is not None:
        wide = {name for name in wide if name not in outputs} | set(borders)
    wide |= {name for pair in caches for name in pair if not wide.isdisjoint(pair)}
    nodes = [node for node in graph if _touches(node, wide)]
    islands = _islands(graph, ranges, wide)
    retype(graph, nodes, ir.DataType.FLOAT16, borders=wide)
    return islands


def _touches(node: ir.Node, wide: Collection[str]) -> bool:
    values = (*node.inputs, *node.outputs)
    if any(value is not None and value.name in wide for value in values):
        return True
    inside = f"{node.outputs[0].name}."
    return node.op_type == "Attention" and any(name.startswith(inside) for name in wide)


def _islands(graph: ir.Graph, ranges: Ranges, wide: Collection[str]) -> tuple[Island, ...]:
    """Return the modules whose values are too large, with the largest of each."""
    made = {value.name: value for node in graph for value in node.outputs}
    found: dict[str, float] = {}
    for name, largest in ranges.items():
        if name in wide:
            value = made.get(name) or made.get(name.rpartition(".")[0])
            module = name if value is None else _name_of(value)
            found[module] = max(found.get(module, 0.0), largest)
    return tuple(Island(name, largest) for name, largest in found.items())


def _name_of(value: ir.Value) -> str:
    """Return the path of the module that a value comes from; its own name where there is none."""
    node = value.producer()
    path = "" if node is None else node.metadata_props.get(MODULE, "")
    return path or str(value.name)
