"""Recorded passes once more, through a graph in ONNX Runtime, to look at its inner values."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from mdexport.denoiser import Denoiser
from mdexport.trace import tensor_specs
from mdruntime.denoiser import CONDITION
from mdruntime.manifest import GraphSpec
from mdruntime.ort import OrtSession
from mdruntime.session import Outputs
from mdruntime.verify import CONDITIONED

__all__ = ["Arrays", "conditioned_passes", "replay", "spec_of"]

Arrays = Mapping[str, NDArray[Any]]


def spec_of(model: ir.Model, file: str, caches: Sequence[tuple[str, str]] = ()) -> GraphSpec:
    """Return what a session has to know of a graph."""
    graph = model.graph
    return GraphSpec(
        file=file,
        opset=model.opset_imports[""],
        spellings={},
        inputs=tensor_specs(graph.inputs),
        outputs=tensor_specs(graph.outputs),
        caches=tuple(caches),
        float32_operators=(),
    )


def replay(
    model: ir.Model,
    path: Path,
    passes: Iterable[Arrays],
    fetch: Sequence[str],
    caches: Sequence[tuple[str, str]] = (),
) -> Iterator[Outputs]:
    """Write a graph, run it over recorded passes, and delete it.

    Args:
        model: its weights are references into a file of the folder that ``path`` lies in.
        path: a name for the graph, for as long as it runs.
        passes: inputs by name, among other arrays, and ``canvas`` where a pass starts one.
        fetch: outputs to yield of every pass.
        caches: (input, output) names; the session keeps them.
    """
    spec = spec_of(model, path.name, caches)
    kept = {before for before, _ in caches}
    inputs = {one.name: np.dtype(one.dtype) for one in spec.inputs if one.name not in kept}
    try:
        ir.save(model, path)
        session = OrtSession(path, spec, "cpu")
        for one in passes:
            if one.get("canvas", np.int64(0)):
                session.start(int(one["canvas"]))
            feeds = {name: one[name].astype(dtype, copy=False) for name, dtype in inputs.items()}
            yield session.run(feeds, fetch)
        session.close()
    finally:
        path.unlink(missing_ok=True)


def conditioned_passes(denoiser: Denoiser, passes: Iterable[Arrays]) -> Iterator[Arrays]:
    """Yield recorded passes with what the condition graph makes of their labels or prompts."""
    known: dict[bytes, Arrays] = {}
    for one in passes:
        if CONDITIONED not in one:
            yield one
            continue
        inputs = np.ascontiguousarray(one[CONDITIONED])
        key = inputs.tobytes()
        if key not in known:
            with torch.no_grad():
                found = denoiser.condition(torch.from_numpy(inputs))
            known[key] = {CONDITION + name: tensor.numpy() for name, tensor in found.items()}
        yield {**one, **known[key]}
