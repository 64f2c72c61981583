"""The stand-in's engine: a plan whose graph ONNX Runtime runs on the CPU."""

import math
import weakref
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from tests.standin.memory import Allocation
from tests.standin.trt_api import Api, Dims, IHostMemory, ILogger, State, integer
from tests.standin.trt_network import data_type
from tests.standin.trt_plan import Plan, Shapes
from tests.standin.widen import narrow, wide, widened

__all__ = ["ICudaEngine", "numpy_type"]

_BLOCK = 512
_NUMPY: dict[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": np.uint16,  # its bits
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


def numpy_type(name: str) -> Any:
    """Return NumPy's type for a member of ``DataType``."""
    return _NUMPY[name]


class ICudaEngine(Api):
    """A plan in memory, its weights on the device."""

    def _begin(self, plan: Plan, graph: bytes, weights: Allocation, logger: ILogger) -> None:
        self._plan, self._logger, self._graph = plan, logger, graph
        self._model = onnx.load_from_string(graph)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            widened(self._model), options, providers=["CPUExecutionProvider"]
        )
        values = self._model.graph
        self._values = {value.name: value for value in (*values.input, *values.output)}
        self._inputs = [value.name for value in values.input]
        self._outputs = [value.name for value in values.output]
        self._dry: dict[Any, dict[str, tuple[int, ...]]] = {}
        weakref.finalize(self, _release, self._state, weights.address)

    @property
    def name(self) -> str:
        """Name of the network."""
        return self._model.graph.name

    @property
    def num_io_tensors(self) -> int:
        """How many inputs and outputs."""
        return len(self._values)

    @property
    def num_layers(self) -> int:
        """How many layers."""
        return len(self._model.graph.node)

    @property
    def num_optimization_profiles(self) -> int:
        """How many profiles."""
        return len(self._plan.profiles)

    @property
    def device_memory_size(self) -> int:
        """Device memory that a context needs, in bytes."""
        return self.device_memory_size_v2

    @property
    def device_memory_size_v2(self) -> int:
        """Device memory that a context needs, in bytes."""
        return max(map(self._need, range(self.num_optimization_profiles)))

    @property
    def profiling_verbosity(self) -> Any:
        """What the inspector may tell."""
        return getattr(self._state.module.ProfilingVerbosity, self._plan.verbosity)

    @property
    def hardware_compatibility_level(self) -> Any:
        """For which devices it was built."""
        return getattr(self._state.module.HardwareCompatibilityLevel, self._plan.hardware)

    @property
    def num_aux_streams(self) -> int:
        """How many streams it uses besides the one it is given."""
        return 0

    def get_device_memory_size_for_profile(self, profile_index: int) -> int:
        """Return the device memory that a context needs under a profile, in bytes."""
        return self._need(integer(profile_index))

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        """Return the device memory that a context needs under a profile, in bytes."""
        return self._need(integer(profile_index))

    def get_tensor_name(self, index: int) -> str:
        """Return the name of an input or output."""
        return list(self._values)[integer(index)]

    def get_tensor_mode(self, name: str) -> Any:
        """Return whether a tensor is an input or an output."""
        modes = self._state.module.TensorIOMode
        if name not in self._values:
            return modes.NONE
        return modes.INPUT if name in self._inputs else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        """Return the element type of a tensor."""
        return getattr(self._state.module.DataType, self._type(name))

    def get_tensor_shape(self, name: str) -> Dims:
        """Return the shape of a tensor, -1 where it is free."""
        dims = self._values[name].type.tensor_type.shape.dim
        return Dims([dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims])

    def get_tensor_location(self, name: str) -> Any:
        """Return where a tensor must lie."""
        return self._state.module.TensorLocation.DEVICE

    def get_tensor_format(self, name: str) -> Any:
        """Return how a tensor is laid out."""
        return self._state.module.TensorFormat.LINEAR

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        """Return the smallest, best and largest shape of an input under a profile."""
        return [Dims(shape) for shape in self._plan.profiles[integer(profile_index)][name]]

    def is_shape_inference_io(self, name: str) -> bool:
        """Return whether a tensor's values decide about shapes."""
        return False

    def serialize(self) -> IHostMemory:
        """Return the plan."""
        return IHostMemory(self._plan.pack(self._graph))

    def create_engine_inspector(self) -> Any:
        """Return who tells about layers."""
        return self._state.new("EngineInspector", self)

    def create_execution_context(self, strategy: Any = None) -> Any:
        """Return a context; None where its memory does not fit."""
        strategies = self._state.module.ExecutionContextAllocationStrategy
        chosen = strategies.STATIC if strategy is None else strategy
        self._state.expect(chosen, "ExecutionContextAllocationStrategy")
        block = None
        if chosen is not strategies.USER_MANAGED:
            memory = self._state.device.memory
            block = memory.device(self.device_memory_size_v2, backed=False)
            if block is None:
                self._logger.log(ILogger.ERROR, "Error Code 1: Cuda Runtime (out of memory)")
                return None
        return self._state.new("IExecutionContext", self, block)

    def _type(self, name: str) -> str:
        return data_type(self._values[name].type.tensor_type.elem_type)

    def _bytes(self, name: str, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * np.dtype(numpy_type(self._type(name))).itemsize

    def _need(self, profile: int) -> int:
        largest: dict[str, Shapes] = self._plan.profiles[profile]
        total = sum(self._bytes(name, shapes[2]) for name, shapes in largest.items())
        return -(-2 * total // _BLOCK) * _BLOCK

    def _axes(self, name: str) -> list[str]:
        return [dim.dim_param for dim in self._values[name].type.tensor_type.shape.dim]

    def _output_shapes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all outputs for shapes of all inputs."""
        sizes = {
            axis: size
            for name, shape in shapes.items()
            for axis, size in zip(self._axes(name), shape, strict=True)
        }
        named = {name: self._named(name, sizes) for name in self._outputs}
        if not any(-1 in shape for shape in named.values()):
            return named
        key = tuple(sorted(shapes.items()))
        if key not in self._dry:
            feeds = {
                name: np.zeros(shape, numpy_type(self._type(name)))
                for name, shape in shapes.items()
            }
            results = self._compute(feeds)
            self._dry[key] = {name: result.shape for name, result in results.items()}
        return self._dry[key]

    def _named(self, name: str, sizes: dict[str, int]) -> tuple[int, ...]:
        """Return a shape by the names of its axes, -1 where they do not tell."""
        pairs = zip(self._axes(name), self.get_tensor_shape(name), strict=True)
        return tuple(size if size != -1 else sizes.get(axis, -1) for axis, size in pairs)

    def _run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        outputs = self._compute(feeds)
        for name, value in outputs.items() if self._plan.nan else ():
            if self._type(name) in ("FLOAT", "HALF"):
                value.flat[:1] = np.nan
        return outputs

    def _compute(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        given = {n: wide(x) if self._type(n) == "BF16" else x for n, x in feeds.items()}
        results = zip(self._outputs, self._session.run(self._outputs, given), strict=True)
        return {n: narrow(x) if self._type(n) == "BF16" else x for n, x in results}


def _release(state: State, address: int) -> None:
    state.device.memory.free(address, host=False)
