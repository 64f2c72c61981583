"""One plan from one ONNX graph: parser, profiles, builder, and a monitor that can cancel.

Networks are strongly typed: precision stands in the graph, and TensorRT 11 has no flags for it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mdruntime.errors import BundleError
from mdruntime.trt import api
from mdruntime.trt.barrier import mark_attention
from mdruntime.trt.identity import BuildOptions
from mdruntime.trt.inspect import Achieved, inspect_engine
from mdruntime.trt.memory import MIB, out_of_memory
from mdruntime.trt.profiles import Profile
from mdruntime.trt.progress import Phases

__all__ = ["Built", "PlanRequest", "build_plan"]

Tell = Callable[[float, str], None]
"""Takes the share that is done, 0 to 1, and the phase at work."""


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """A plan to be built."""

    graph: str
    onnx: str  # file to read
    plan: str  # file to write
    timing_cache: str  # file to read, if it is there, and to write
    profiles: tuple[Profile, ...]
    options: BuildOptions
    workspace: int  # bytes
    fusion_barrier: bool


@dataclass(frozen=True, slots=True)
class Built:
    """What became of it."""

    seconds: float
    achieved: Achieved
    device_bytes: int  # of activations
    barriers: tuple[str, ...]  # tensors that were marked as outputs
    cache_reused: bool


def build_plan(
    trt: ModuleType,
    logger: Any,
    request: PlanRequest,
    tell: Tell,
    cancelled: Callable[[], bool],
) -> Built:
    """Build a plan and write it.

    Args:
        trt: TensorRT's module.
        logger: with ``lines``, pairs of severity and text.
        request: what to build.
        tell: is called with the share that is done, 0 to 1, and the phase at work.
        cancelled: says whether to give up; asked at every step.

    Raises:
        KeyboardInterrupt: it was cancelled.
        MemoryError: tactics found no memory.
        BundleError: TensorRT cannot parse or build the graph.
    """
    began = time.perf_counter()
    builder = trt.Builder(logger)
    network, parser = _parse(trt, logger, builder, request)
    barriers = mark_attention(trt, network) if request.fusion_barrier else ()
    config, reused = _configure(trt, builder, request)
    monitor = _monitor(trt, tell, cancelled)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if cancelled():
        raise KeyboardInterrupt
    if plan is None:
        raise _failure(logger, request)
    Path(request.plan).write_bytes(memoryview(plan))
    Path(request.timing_cache).write_bytes(memoryview(config.get_timing_cache().serialize()))
    seconds = time.perf_counter() - began
    del network, parser, config, builder  # before the engine: both may not fit on a small device
    achieved, device_bytes = _examine(trt, logger, request, plan)
    return Built(seconds, achieved, device_bytes, barriers, reused)


def _parse(trt: ModuleType, logger: Any, builder: Any, request: PlanRequest) -> tuple[Any, Any]:
    """Return a network and its parser, which owns the weights until the plan is built."""
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request.onnx):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        words = "; ".join(
            f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors[:3]
        )
        raise BundleError(
            f"TensorRT {trt.__version__} cannot parse {Path(request.onnx).name}: "
            f"{words or 'no reason given'}"
        )
    return network, parser


def _configure(trt: ModuleType, builder: Any, request: PlanRequest) -> tuple[Any, bool]:
    """Return the builder's configuration, and whether it knows timings of an earlier build."""
    config, options = builder.create_builder_config(), request.options
    for profile in request.profiles:
        config.add_optimization_profile(_profile(builder, profile))
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace)
    config.builder_optimization_level = options.optimisation_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector needs it
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 is asked for where it matters
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    return config, _add_timings(config, Path(request.timing_cache))


def _profile(builder: Any, profile: Profile) -> Any:
    made = builder.create_optimization_profile()
    for name, (smallest, usual, largest) in profile.shapes.items():
        made.set_shape(name, smallest, usual, largest)
    return made


def _add_timings(config: Any, path: Path) -> bool:
    """Let the builder use and extend a timing cache; one of another device is left out."""
    known = path.read_bytes() if path.is_file() else b""
    # None is also what TensorRT returns for a cache that it refuses.
    found = config.create_timing_cache(known) if known else None
    if found is not None and config.set_timing_cache(found, False):
        return True
    empty = config.create_timing_cache(b"")
    if empty is not None:
        config.set_timing_cache(empty, False)
    return False


def _monitor(trt: ModuleType, tell: Tell, cancelled: Callable[[], bool]) -> Any:
    """Return a monitor: a class of TensorRT's, which cannot be named before it is imported."""
    phases, base = Phases(), trt.IProgressMonitor

    class Monitor(base):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            base.__init__(self)  # the bindings refuse super() here

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase or "", num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            tell(phases.step(phase_name, step), phase_name)
            return not cancelled()

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()


def _failure(logger: Any, request: PlanRequest) -> Exception:
    """Return what a build without a plan really failed of.

    "Could not find any implementation for node" mostly means that every tactic was skipped because
    its workspace could not be allocated (NVIDIA/TensorRT issue 2642).
    """
    texts = [text for _, text in logger.lines]
    missing = [text for text in texts if "any implementation for node" in text]
    short = out_of_memory(texts)
    what = f"the plan of {request.graph!r}"
    if short:
        hidden = f" (TensorRT's own words: {_brief(missing[-1])})" if missing else ""
        return MemoryError(
            f"building {what} ran out of device memory while tactics were timed, with a workspace "
            f"of {request.workspace // MIB} MiB: {_brief(short[-1])}{hidden}; try a smaller "
            "--workspace or --max-batch, stop other processes, or add swap"
        )
    if missing:
        return BundleError(
            f"building {what} failed: {_brief(missing[-1])}; nothing in the log speaks of memory, "
            "so that this TensorRT has no kernel for it: try another --optimisation-level or "
            "TensorRT version"
        )
    reason = _brief((api.errors_of(logger) or ["TensorRT gave no reason"])[-1])
    return BundleError(f"building {what} failed: {reason}")


def _brief(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:200]}..."


def _examine(trt: ModuleType, logger: Any, request: PlanRequest, plan: Any) -> tuple[Achieved, int]:
    """Return what the engine computes in, and the bytes of its activations."""
    runtime = trt.Runtime(logger)
    # Such a plan brings a runtime of its own, which is code; this one was made here.
    runtime.engine_host_code_allowed = request.options.version_compatible
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise _failure(logger, request)
    return inspect_engine(trt, engine), int(engine.device_memory_size_v2)
