"""One set of plans: built graph by graph into a folder that is not published yet."""

import errno
import math
import shutil
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdruntime.bundle import Bundle, file_spec
from mdruntime.errors import VerificationError
from mdruntime.manifest import GraphSpec
from mdruntime.records import from_json, to_json
from mdruntime.trt import store
from mdruntime.trt.builder import Built, PlanRequest
from mdruntime.trt.identity import BuildOptions, EngineIdentity, spelling_of
from mdruntime.trt.memory import MIB, Memory, Need, need, require, workspace
from mdruntime.trt.profiles import Profile, profiles
from mdruntime.trt.steps import Progress, Steps

__all__ = ["TIMINGS", "Plans", "require_room"]

TIMINGS = "timing.cache"
_BYTES = {"float32": 4, "int32": 4, "int64": 8, "uint8": 1, "bool": 1, "int8": 1}
_HALF = 2  # bytes of a number in any other type: float16, bfloat16
_PRODUCTS = {"MatMul", "Gemm", "Conv", "Attention"}


@dataclass
class Plans:
    """A set of plans in the making."""

    bundle: Bundle
    options: BuildOptions
    identity: EngineIdentity
    folder: Path
    workspace: int  # bytes; 0 takes half of what is free
    cached: bool = False  # an earlier build left its timings
    made: dict[str, store.PlanRecord] = field(default_factory=dict)
    barriers: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def build(
        self, graph: str, steps: Steps, free: Memory, *, barrier: bool = False
    ) -> Generator[Progress, None, None]:
        """Build the plan of a graph.

        Args:
            graph: its name.
            steps: to run it in.
            free: memory of this machine.
            barrier: mark attention's inputs as outputs.

        Raises:
            VerificationError: the engine computes in another precision than was asked for.
        """
        name = f"{graph}{', with barrier' if barrier else ''}"
        expected = self._expected(graph)
        request = self._request(graph, free, barrier)
        yield steps.begin(name, f"{store.minutes(expected)} last time" if expected else "")
        result = yield from steps.run(name, "build", to_json(request), expected)
        built = from_json(Built, result, "the builder's answer")
        self._check_precision(graph, built)
        spec = file_spec(self.folder / f"{graph}.plan")
        self.made[graph] = store.PlanRecord(
            sha256=spec.sha256,
            bytes=spec.bytes,
            profiles=request.profiles,
            seconds=built.seconds,
            layers=built.achieved.layers,
            device_bytes=built.device_bytes,
        )
        self.barriers[graph] = built.barriers
        yield steps.end(name, self._summary(graph, built))

    def take(self, graph: str, engines: store.Engines) -> None:
        """Take over a plan that does not depend on what these plans differ in."""
        shutil.copyfile(engines.plan(graph), self.folder / f"{graph}.plan")
        self.made[graph] = engines.record.plans[graph]

    def record(self, **found: Any) -> store.EngineRecord:
        """Return the record of the plans; ``found`` is what only the verification knows."""
        blank = {"measured": {}, "limits": {}, "timings": {}, "seconds": 0.0}
        time = store.now()
        return store.EngineRecord(
            format=store.RECORD_FORMAT,
            identity=self.identity,
            options=self.options,
            plans=self.made,
            fusion_barrier=any(self.barriers.values()),
            built=time,
            chosen=time,
            **{**blank, **found},
        )

    def _request(self, graph: str, free: Memory, barrier: bool) -> PlanRequest:
        shapes = profiles(self.bundle.manifest, graph, self.options.ranges)
        needed = _need(self.bundle, graph, self.options, shapes)
        require(graph, needed, free, self.workspace)
        return PlanRequest(
            graph=graph,
            onnx=str(self.bundle.path(graph, spelling_of(graph, self.options))),
            plan=str(self.folder / f"{graph}.plan"),
            timing_cache=str(self.folder / TIMINGS),
            profiles=shapes,
            options=self.options,
            workspace=self.workspace or workspace(needed, free),
            fusion_barrier=barrier,
        )

    def _expected(self, graph: str) -> float:
        """Return the seconds that building this plan took the last time here; 0: never."""
        kept = sorted(store.records(self.bundle), key=lambda one: one[1].built)
        here = _effort(self.identity, self.options)
        for _, record in reversed(kept):
            if graph in record.plans and _effort(record.identity, record.options) == here:
                return record.plans[graph].seconds
        return 0.0

    def _check_precision(self, graph: str, built: Built) -> None:
        """Refuse an engine that computes in another precision than its graph."""
        wide = _PRODUCTS & set(self.bundle.manifest.graphs[graph].float32_operators)
        main = graph == "denoiser"
        if not main and (wide or not built.achieved.products):
            return  # on purpose, or nothing to judge by
        precision = self.identity.precision if main else self.bundle.manifest.precision
        failure = built.achieved.failure(precision)
        if failure:
            raise VerificationError(f"the plan of {graph!r} was not published: {failure}")

    def _summary(self, graph: str, built: Built) -> str:
        layers = ", ".join(f"{n} {name}" for name, n in sorted(built.achieved.layers.items()))
        words = [f"{self.made[graph].bytes / 1e6:.1f} MB"]
        words += [f"layers: {layers}"] if layers else []
        words += ["timing cache reused"] if self.cached and built.cache_reused else []
        return "; ".join(words)


def _effort(identity: EngineIdentity, options: BuildOptions) -> tuple[str, int, int]:
    """Return what mostly decides how long building takes."""
    return identity.gpu, options.max_batch, options.optimisation_level


def require_room(bundle: Bundle, folder: Path) -> None:
    """Refuse early what cannot fit on the disk.

    Raises:
        OSError: with what is needed and what is free.
    """
    weights = sum(_weights(bundle, graph, BuildOptions()) for graph in bundle.manifest.engines)
    needed, free = int(1.2 * weights) + 16 * MIB, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"the engines need about {needed // MIB} MiB, {free // MIB} MiB are free"
        )


def _need(bundle: Bundle, graph: str, options: BuildOptions, shapes: tuple[Profile, ...]) -> Need:
    spec = bundle.manifest.graphs[graph]
    tensors = max((_tensors(spec, one.shapes) for one in shapes), default=0)
    return need(_weights(bundle, graph, options), tensors)


def _weights(bundle: Bundle, graph: str, options: BuildOptions) -> int:
    """Return the bytes of a graph and its weights."""
    files = bundle.manifest.files
    file = bundle.path(graph, spelling_of(graph, options)).relative_to(bundle.folder).as_posix()
    weights = (name for name in files if name.endswith(".weights"))
    parts = [file, *(name for name in weights if name.startswith(f"{graph}."))]
    return sum(files[name].bytes for name in parts)


def _tensors(spec: GraphSpec, shapes: Mapping[str, tuple[Any, Any, Any]]) -> int:
    """Return the bytes of all inputs at their largest."""
    return sum(
        math.prod(shapes[tensor.name][2]) * _BYTES.get(tensor.dtype, _HALF)
        for tensor in spec.inputs
        if tensor.name in shapes
    )
