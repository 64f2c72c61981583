"""The stand-in's execution context: shapes, addresses and memory checked before anything runs."""

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.standin.device import Operation
from tests.standin.errors import CodeError
from tests.standin.memory import Allocation, MisuseError, Range
from tests.standin.trt_api import Api, Dims, Field, ILogger, State, integer
from tests.standin.trt_engine import ICudaEngine, numpy_type

__all__ = ["IExecutionContext"]

_ALIGNMENT = 256  # of every address that TensorRT is given


class RefusalError(Exception):
    """Why a call answers False."""


class IExecutionContext(Api):
    """The state of one engine at work: a profile, shapes, addresses and activations."""

    name = Field("", str)

    def _begin(self, engine: ICudaEngine, block: Allocation | None) -> None:
        self._engine = engine
        self._own = block is not None
        self._block = None if block is None else (block.address, block.nbytes)
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._version = 0  # goes up whenever something changes that a captured graph relies on
        self._warm = False  # work was enqueued since shapes or profile changed
        self._switched: tuple[int, Operation] | None = None
        self._last: list[tuple[int, Operation]] = []  # shared with what outlives the context
        self._forget_shapes()
        weakref.finalize(self, _end, self._state, self._last, block)

    @property
    def engine(self) -> ICudaEngine:
        """Whose context it is."""
        return self._engine

    @property
    def active_optimization_profile(self) -> int:
        """Index of the profile in use."""
        return self._profile

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """Change the profile in a stream's turn: all shapes must be set again."""
        index, handle = integer(profile_index), integer(stream_handle)

        def work() -> None:
            if not 0 <= index < self._engine.num_optimization_profiles:
                raise RefusalError(f"profile {index} does not exist")
            if self._capturing(handle):
                raise RefusalError("the profile cannot be changed while the stream is captured")
            if index != self._profile:
                self._profile = index
                self._forget_shapes()
                self._changed(cold=True)
            switch = Operation("a change of profile", (), lambda: None)
            self._state.device.enqueue(handle, switch)
            self._switched = handle, switch

        return self._answer("setOptimizationProfileAsync", work)

    def set_input_shape(self, name: str, shape: Any) -> bool:
        """Set the shape of an input."""
        sizes = tuple(map(integer, shape))

        def work() -> None:
            if name not in self._engine._inputs:
                raise RefusalError(f"{name!r} is no input")
            low, _, high = self._engine._plan.profiles[self._profile][name]
            fits = len(sizes) == len(low) and all(
                a <= size <= b for a, size, b in zip(low, sizes, high, strict=True)
            )
            if not fits:
                raise RefusalError(
                    f"{name}: {sizes} is outside of profile {self._profile}, {low} to {high}"
                )
            if self._shapes.get(name) != sizes:
                self._shapes[name] = sizes
                self._changed(cold=True)

        return self._answer("setInputShape", work)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        """Set where an input or output lies."""
        address = integer(memory)

        def work() -> None:
            if name not in self._engine._values:
                raise RefusalError(f"{name!r} is no input or output")
            if address % _ALIGNMENT:
                raise MisuseError(f"{name}: {address:#x} is not aligned to {_ALIGNMENT} bytes")
            if self._addresses.get(name) != address:
                self._addresses[name] = address
                self._changed(cold=False)

        return self._answer("setTensorAddress", work)

    def get_tensor_address(self, name: str) -> int:
        """Return where an input or output lies."""
        return self._addresses.get(name, 0)

    def get_tensor_shape(self, name: str) -> Dims:
        """Return the shape of an input or output, -1 where it is not known yet."""
        if name in self._engine._outputs and not self.infer_shapes():
            return Dims(self._engine._output_shapes(self._shapes)[name])
        return Dims(self._shapes.get(name, self._engine.get_tensor_shape(name)))

    def infer_shapes(self) -> list[str]:
        """Return the inputs whose shapes are not set.

        Raises:
            RuntimeError: the shapes do not go together.
        """
        lacking = [name for name in self._engine._inputs if name not in self._shapes]
        if not lacking:
            self._check_axes(RuntimeError)
        return lacking

    def set_device_memory(self, memory: int, size: int) -> None:
        """Set the memory for activations, where the user manages it."""
        block = integer(memory), integer(size)

        def work() -> None:
            if self._own:
                raise RefusalError("the context allocated its memory itself")
            if block[0] % _ALIGNMENT:
                raise MisuseError(f"activations at {block[0]:#x} are not aligned to {_ALIGNMENT}")
            if self._block != block:
                self._block = block
                self._changed(cold=False)

        self._answer("setDeviceMemoryV2", work)

    def update_device_memory_size_for_shapes(self) -> int:
        """Return the memory for activations that the shapes set now need, in bytes."""
        return self._engine._need(self._profile) if not self.infer_shapes() else 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Put a pass on a stream."""
        handle = integer(stream_handle)
        return self._answer("enqueueV3", lambda: self._enqueue(handle))

    def _enqueue(self, handle: int) -> None:
        device = self._state.device
        lacking = self.infer_shapes() + [n for n in self._engine._values if not self._address(n)]
        if lacking:
            raise RefusalError(f"shapes or addresses are not set: {', '.join(lacking)}")
        operation = self._operation()
        if self._capturing(handle) and not self._warm:
            device.stream(handle).capture.broken = True  # type: ignore[union-attr]
            raise RefusalError("resources are allocated: enqueue these shapes once before capture")
        earlier = [*self._last, *([self._switched] if self._switched else [])]
        for other, before in earlier:
            if other != handle and before in _pending(self._state, other):
                raise MisuseError("one context is enqueued on two streams at once")
        device.enqueue(handle, operation)
        device.counters.enqueues += 1
        self._last[:] = [(handle, operation)]
        self._warm = self._warm or not self._capturing(handle)

    def _operation(self) -> Operation:
        engine, state = self._engine, self._state
        shapes = {**self._shapes, **engine._output_shapes(self._shapes)}
        addresses = dict(self._addresses)
        ranges = {
            name: Range(
                addresses[name],
                engine._bytes(name, shapes[name]),
                name in engine._outputs,
                label=name,
            )
            for name in engine._values
        }
        _check_apart(list(ranges.values()))
        block = Range(*self._activations(), write=True, label="the activations' memory")
        context = weakref.ref(self)
        version = self._version

        def recheck() -> None:
            now = context()
            if now is None:
                raise MisuseError("a graph is launched whose execution context is gone")
            if now._version != version:
                raise MisuseError(
                    "a graph is launched although the execution context that it was captured from "
                    "has other shapes, addresses or memory now; use a context for every graph"
                )

        def run() -> None:
            _run(state, engine, shapes, ranges)

        options = state.options
        ms = options.int8_ms if engine._plan.quantised else options.engine_ms
        return Operation("a pass", (*ranges.values(), block), run, ms, recheck)

    def _activations(self) -> tuple[int, int]:
        need = self._engine._need(self._profile)
        if self._block is None or self._block[1] < need:
            found = "none" if self._block is None else f"{self._block[1]} bytes"
            raise RefusalError(f"{need} bytes of device memory are needed, and {found} were set")
        return self._block[0], need

    def _address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def _capturing(self, handle: int) -> bool:
        return self._state.device.stream(handle).capture is not None

    def _forget_shapes(self) -> None:
        fixed = self._engine._plan.profiles[self._profile]
        static = {n: s[0] for n, s in fixed.items() if -1 not in self._engine.get_tensor_shape(n)}
        self._shapes = static

    def _changed(self, *, cold: bool) -> None:
        self._version += 1
        self._warm = self._warm and not cold

    def _check_axes(self, error: type[Exception]) -> None:
        sizes: dict[str, int] = {}
        for name, shape in self._shapes.items():
            for axis, size in zip(self._engine._axes(name), shape, strict=True):
                if axis and sizes.setdefault(axis, size) != size:
                    raise error(f"{name}: axis {axis} is {size} here and {sizes[axis]} elsewhere")

    def _answer(self, what: str, work: Any) -> bool:
        try:
            self._state.library.guarded(work)
        except (RefusalError, CodeError, RuntimeError) as error:
            text = f"IExecutionContext::{what}: Error Code 3: API Usage Error ({error})"
            self._engine._logger.log(ILogger.ERROR, text)
            return False
        return True


def _pending(state: State, handle: int) -> Sequence[Operation]:
    found = state.device.streams.get(handle)
    return () if found is None else tuple(found.pending)


def _check_apart(ranges: Sequence[Range]) -> None:
    """Refuse outputs that share memory with another tensor."""
    for one, other in itertools.combinations(ranges, 2):
        if one.clashes(other):
            raise MisuseError(f"{one.label} and {other.label} share memory, and one is an output")


def _run(
    state: State,
    engine: ICudaEngine,
    shapes: dict[str, tuple[int, ...]],
    ranges: dict[str, Range],
) -> None:
    memory = state.device.memory
    feeds = {
        name: memory.view(ranges[name]).view(numpy_type(engine._type(name))).reshape(shapes[name])
        for name in engine._inputs
    }
    outputs = engine._run({name: np.array(value) for name, value in feeds.items()})
    for name, value in outputs.items():
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        memory.view(ranges[name])[...] = data
    state.device.counters.passes += 1


def _end(state: State, last: list[tuple[int, Operation]], block: Allocation | None) -> None:
    """Follow a context that is gone: its work must be over, and its memory goes."""
    if any(operation in _pending(state, handle) for handle, operation in last):
        state.library.misuse.append("an execution context is destroyed before its work was done")
    if block is not None:
        state.device.memory.free(block.address, host=False)
