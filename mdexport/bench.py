"""The runtime against PyTorch: the same weights, the same passes, in one run."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from mdexport.model import Model
from mdexport.rivals import original_image
from mdruntime.costs import Kind
from mdruntime.manifest import DenoiserSpec, GraphSpec
from mdruntime.probe import Probe, guidable, pipeline_of, request_of
from mdruntime.runner import Runner
from mdruntime.steal import read_ticks, stolen_share
from mdruntime.timing import interleaved, noise_of
from mdruntime.waiting import read_waits, waited_share

__all__ = [
    "AGAIN",
    "ORIGINAL",
    "Race",
    "Times",
    "gigaflop",
    "race",
    "times_as_fast",
    "weight_shapes",
]

ORIGINAL = "original"
"""The way of the published repositories; see ``rivals.original_image``."""
AGAIN = ", again"
"""After the name of a preset: of a class or canvas that was asked for before."""

Shapes = Sequence[tuple[int, int]]
Times = Sequence[float]
"""Milliseconds, turn by turn; a turn is the same one for all that ran in it."""


@dataclass(frozen=True, slots=True)
class Race:
    """All that was measured."""

    passes: dict[tuple[bool, int], dict[str, Times]]
    """By whether guided and rows (the most: a full pass), then by contestant."""
    images: dict[str, dict[str, Times]]  # by preset, then by contestant; of one sample
    products: dict[int, Times]  # the matrix products of a pass alone, by its rows
    gigaflop: dict[int, float]  # of an unguided pass, by its rows
    noise: float  # by how much slow repeats exceed the fastest, as a share
    steal: float  # share of the cores' time that the host gave to others
    waited: float  # share of this process's time that its threads waited for a core


def race(
    runners: Mapping[str, Runner],
    model: Model,
    *,
    rows: Sequence[int] = (),
    presets: Mapping[str, Sequence[str]] = {},
    keeping: Mapping[str, Runner] = {},
    repeats: int = 7,
    image_repeats: int = 3,
) -> Race:
    """Measure passes and samples of all contestants in turn, again and again.

    Args:
        runners: contestants by name, over the same weights.
        model: the same in PyTorch.
        rows: of partial passes.
        presets: what samples are drawn with, and by whom; ``ORIGINAL`` may be among them.
        keeping: some of the contestants once more, which keep the answers of first passes: they
            draw what they have been asked for before.
        repeats: of passes.
        image_repeats: of samples.
    """
    ticks, waits = read_ticks(), read_waits()
    first = next(iter(runners.values()))
    spec = first.manifest.denoiser
    denoiser = first.manifest.graphs["denoiser"]
    shapes = weight_shapes(first.bundle.path("denoiser"))
    jobs: dict[tuple[str, bool, int], Callable[[], float]] = {
        (name, guided, size): job
        for name, runner in runners.items()
        for guided in ((False, True) if guidable(first.manifest) else (False,))
        for size, job in _passes(runner, spec, guided, rows)
    }
    for size in (spec.canvas, *rows):
        jobs["", False, size] = _products(shapes, size)
    found = interleaved(jobs, repeats=repeats, seconds=600)
    passes: dict[tuple[bool, int], dict[str, Times]] = {}
    for (name, guided, size), times in found.items():
        if name:
            passes.setdefault((guided, size), {})[name] = times
    return Race(
        passes,
        _images(runners, keeping, model, presets, image_repeats),
        {size: times for (name, _, size), times in found.items() if not name},
        {size: gigaflop(shapes, denoiser, spec, size) for size in (spec.canvas, *rows)},
        noise_of(times for (name, _, _), times in found.items() if name),
        stolen_share(ticks, read_ticks()),
        waited_share(waits, read_waits()),
    )


def _passes(
    runner: Runner, spec: DenoiserSpec, guided: bool, rows: Sequence[int]
) -> Iterator[tuple[int, Callable[[], float]]]:
    probe = Probe(runner, Kind(1, guided, False), list(rows), time.perf_counter)
    everywhere = spec.length // spec.slots
    yield spec.canvas, lambda: probe.ms(0, everywhere)
    for size in rows:
        yield size, lambda size=size: probe.ms(size, size)  # type: ignore[misc]


def _images(
    runners: Mapping[str, Runner],
    keeping: Mapping[str, Runner],
    model: Model,
    presets: Mapping[str, Sequence[str]],
    repeats: int,
) -> dict[str, dict[str, Times]]:
    jobs: dict[tuple[str, str], Callable[[], float]] = {}
    for preset, names in presets.items():
        for name in names:
            jobs[preset, name] = _image(runners, model, preset, name)
        for name in keeping:
            jobs[preset + AGAIN, name] = again = _image(keeping, model, preset, name)
            again()  # answers are kept from the second time on, which the first turn is
    found = interleaved(jobs, repeats=repeats, seconds=600)
    images: dict[str, dict[str, Times]] = {}
    for (preset, name), times in found.items():
        images.setdefault(preset, {})[name] = times
    return images


def _image(
    runners: Mapping[str, Runner], model: Model, preset: str, name: str
) -> Callable[[], float]:
    runner = runners.get(name) or next(iter(runners.values()))
    request: dict[str, Any] = {**request_of(runner.manifest, 1), "preset": preset, "seed": 0}

    def draw() -> object:
        if name == ORIGINAL:
            return original_image(model, request["labels"][0], runner.sampling(preset, {}), 0)
        return pipeline_of(runner).generate(**request)

    def ms() -> float:
        began = time.perf_counter()
        draw()
        return 1000 * (time.perf_counter() - began)

    return ms


def times_as_fast(times: Times, other: Times) -> float:
    """Return how many times as fast something is as the other: the median over turns.

    What slows the machine down for a while slows both of a turn.
    """
    return float(np.median(np.asarray(other) / np.asarray(times)))


def weight_shapes(graph: Path) -> list[tuple[int, int]]:
    """Return (in, out) of every matrix of weights that a graph multiplies with."""
    found = []
    for node in ir.load(graph).graph:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        weight = node.inputs[1]
        shape = None if weight is None or not weight.is_initializer() else weight.shape
        if shape is not None and len(shape) == 2:
            sizes = [int(str(size)) for size in shape]
            turned = (
                node.op_type == "Gemm"
                and "transB" in node.attributes
                and node.attributes["transB"].as_int()
            )
            found.append((sizes[1], sizes[0]) if turned else (sizes[0], sizes[1]))
    return found


def gigaflop(shapes: Shapes, graph: GraphSpec, spec: DenoiserSpec, rows: int) -> float:
    """Return the arithmetic of a pass over so many rows: products with weights, and attention."""
    weights = sum(inner * outer for inner, outer in shapes)
    caches = {before for before, _ in graph.caches}
    sizes = [tensor.shape for tensor in graph.inputs if tensor.name in caches]
    # Each row multiplies with every cached key, and with every cached value.
    attention = sum(int(heads) * spec.canvas * int(size) for _, heads, _, size in sizes)
    return 2e-9 * rows * (weights + attention)


def _products(shapes: Shapes, rows: int) -> Callable[[], float]:
    """Return what times the products of a pass with its weights, each with operands of its own."""
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(rows, inner, generator=generator), torch.randn(inner, outer))
        for inner, outer in shapes
    ]
    results = [torch.empty(rows, outer) for _, outer in shapes]

    def ms() -> float:
        began = time.perf_counter()
        for (left, right), result in zip(pairs, results, strict=True):
            torch.mm(left, right, out=result)
        return 1000 * (time.perf_counter() - began)

    return ms
