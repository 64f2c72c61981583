"""An engine of TensorRT in memory, shared by all who run it, and contexts in which it runs."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mdruntime.cuda import Stream
from mdruntime.errors import EngineError
from mdruntime.manifest import GraphSpec
from mdruntime.trt import api
from mdruntime.trt.buffers import numpy_type
from mdruntime.trt.device import Activations
from mdruntime.trt.fitting import Fit, Ranges
from mdruntime.trt.profiles import Shape

__all__ = ["Context", "LoadedEngine", "PlanFile"]

_TYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT32": "int32",
    "INT64": "int64",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}

_LEFT_OUT = "logits"  # an output that TensorRT's spelling of a graph mostly lacks


@dataclass(frozen=True, slots=True)
class PlanFile:
    """A plan that was checked, and what is known of it."""

    graph: str
    path: Path
    spec: GraphSpec
    trusted: bool  # may run code of its own, as version-compatible plans do; it was made here
    rebuild: Callable[[int], str]  # from a largest batch (0: as it was) to the command


class LoadedEngine:
    """A plan, deserialised while somebody uses it."""

    def __init__(self, trt: ModuleType, plan: PlanFile) -> None:
        """Take a plan; nothing is loaded yet."""
        self.plan = plan
        self.log = api.logger(trt)
        self.inputs: dict[str, np.dtype[Any]] = {}
        self.outputs: dict[str, np.dtype[Any]] = {}
        self.profiles: tuple[Ranges, ...] = ()
        self._trt = trt
        self._engine: Any = None
        self._runtime: Any = None
        self._users = 0
        self._lock = threading.Lock()  # contexts are created and dropped by several threads

    @property
    def activation_bytes(self) -> int:
        """Bytes in which any of its profiles can run."""
        return int(self._engine.device_memory_size_v2)

    def acquire(self) -> None:
        """Be one more user; the first one loads the plan.

        Raises:
            EngineError: TensorRT refuses the plan, or it does not belong to the graph.
        """
        with self._lock:
            if self._engine is None:
                self._load()
            self._users += 1

    def release(self) -> None:
        """Be one user less; with the last one the engine goes. Its contexts must be gone."""
        with self._lock:
            self._users -= 1
            if not self._users:
                self._engine = self._runtime = None

    def context(self) -> Any:
        """Create a context without memory for activations."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        with self._lock:
            made = self._engine.create_execution_context(strategy)
        if made is None:
            raise api.failure(self.log, f"no context of {self.plan.path.name} can be created")
        return made

    def _load(self) -> None:
        plan, trt = self.plan, self._trt
        runtime = trt.Runtime(self.log)
        if plan.trusted:
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(plan.path.read_bytes())
        if engine is None:
            what = f"{plan.path.name} cannot be loaded (build it again: {plan.rebuild(0)})"
            raise api.failure(self.log, what, EngineError)
        self._describe(engine)
        self._engine, self._runtime = engine, runtime

    def _describe(self, engine: Any) -> None:
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.inputs, self.outputs = {}, {}
        for name in names:
            takes = engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
            dtype = numpy_type(_TYPES[engine.get_tensor_dtype(name).name])
            (self.inputs if takes else self.outputs)[name] = dtype
        self.profiles = tuple(
            {name: _three(engine.get_tensor_profile_shape(name, index)) for name in self.inputs}
            for index in range(engine.num_optimization_profiles)
        )
        self._compare()

    def _compare(self) -> None:
        """Refuse an engine of another graph: wrong names or types would end in wrong numbers."""
        spec, found = self.plan.spec, {**self.inputs, **self.outputs}
        known = {tensor.name: numpy_type(tensor.dtype) for tensor in spec.inputs}
        strange = [name for name in self.inputs if name not in known]
        known.update({tensor.name: numpy_type(tensor.dtype) for tensor in spec.outputs})
        strange += [name for name in known if found.get(name, known[name]) != known[name]]
        wanted = {tensor.name for tensor in spec.outputs} - {_LEFT_OUT}
        strange += sorted(wanted - set(self.outputs))
        if strange:
            raise EngineError(
                f"{self.plan.path.name} does not belong to the graph {self.plan.graph!r} (see "
                f"{', '.join(sorted(set(strange)))}); build it again: {self.plan.rebuild(0)}"
            )


def _three(shapes: Any) -> tuple[Shape, Shape, Shape]:
    low, usual, high = (tuple(int(size) for size in shape) for shape in shapes)
    return low, usual, high


class Context:
    """One execution context: a profile, shapes, and addresses at a time."""

    def __init__(self, engine: LoadedEngine, activations: Activations) -> None:
        """Create it; the engine and the activations must outlive it."""
        self._engine, self._activations = engine, activations
        self._context = engine.context()
        self._generation = 0
        self._profile = -1
        self._shapes: Mapping[str, Shape] = {}
        self._bound: Mapping[str, int] = {}

    def reshape(self, fitted: Fit, stream: Stream) -> None:
        """Take on a profile and the shapes of all inputs."""
        if fitted.profile != self._profile:
            done = self._context.set_optimization_profile_async(fitted.profile, stream.handle)
            self._require(done, "its profile cannot be set")
            self._profile, self._shapes = fitted.profile, {}
        for name, shape in fitted.shapes.items():
            if self._shapes.get(name) != shape:
                done = self._context.set_input_shape(name, shape)
                self._require(done, f"{name} cannot be of shape {shape}")
        self._shapes = dict(fitted.shapes)

    def output_shapes(self) -> dict[str, Shape]:
        """Return the shapes of all outputs, once those of all inputs are set."""
        missing = self._context.infer_shapes()
        self._require(not missing, f"the shapes of {', '.join(missing)} are not known")
        return {name: tuple(self._context.get_tensor_shape(name)) for name in self._engine.outputs}

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Take on the addresses of all inputs and outputs, and of the activations."""
        if self._generation != self._activations.generation:
            self._context.set_device_memory(self._activations.address, self._activations.nbytes)
            self._generation = self._activations.generation
        for name, address in addresses.items():
            if self._bound.get(name) != address:
                done = self._context.set_tensor_address(name, address)
                self._require(done, f"{name} cannot be bound")
        self._bound = dict(addresses)

    def enqueue(self, stream: Stream) -> None:
        """Put a run on a stream.

        Raises:
            MemoryError: there was not enough.
            ProviderError: any other failure.
        """
        done = self._context.execute_async_v3(stream.handle)
        self._require(done, "a run cannot be started")

    def _require(self, done: bool, what: str) -> None:
        if not done:
            name = self._engine.plan.path.name
            raise api.failure(self._engine.log, f"TensorRT failed on {name} ({what})")
