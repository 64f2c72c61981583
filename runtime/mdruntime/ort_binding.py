"""Device memory of a session of ONNX Runtime, and what is bound to it.

Inputs and outputs of runs with the same shapes lie at the same addresses, run after run, as CUDA
graphs need it; only their contents cross. Caches stay on the device.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdruntime.manifest import GraphSpec, TensorSpec
from mdruntime.ort_cuda import EAGER

__all__ = ["Binding", "Bindings", "Caches", "Copy"]

Array = NDArray[Any]
Copy = Callable[[int, int, int], None]
"""Copy inside the device: from target and source addresses and a number of bytes."""

_MOST = 64  # bindings that are kept
_STEADY = "condition."  # inputs that mostly are what they were in the pass before


class Caches:
    """The caches of a graph, for as many sequences as needed.

    With one set, every cache output is bound to the buffer of its input and the graph scatters in
    place (measured: bit-equal to the copying run, and 5 to 60 ms a pass faster on a CPU). With two
    sets, a pass reads one and writes the other, in turn: for backends that do not promise to work
    in place.
    """

    def __init__(
        self, runtime: ModuleType, device: str, spec: GraphSpec, copy: Copy | None = None
    ) -> None:
        """Take ONNX Runtime, a device of its, and ``copy`` where two sets are to be used."""
        self._runtime, self._device, self._copy = runtime, device, copy
        tensors = {tensor.name: tensor for tensor in spec.inputs}
        self._pairs = [(tensors[before], after) for before, after in spec.caches]
        self._sets: list[dict[str, Any]] = []
        self._canvas = self._capacity = self._alive = 0
        self.side = 0  # of the sets, the one to be read next

    def start(self, canvas: int) -> None:
        """Forget what is cached; the canvases have this many rows from now on."""
        self._alive = 0
        if canvas != self._canvas:
            self._canvas, self._capacity = canvas, 0

    def make_room(self, rows: int) -> bool:
        """Provide for so many sequences; return whether the buffers are new ones."""
        if rows <= self._capacity:
            return False
        self._sets = []  # the old ones go before the new ones come
        for _ in range(1 if self._copy is None else 2):
            self._sets.append({tensor.name: self._new(tensor, rows) for tensor, _ in self._pairs})
        self._capacity, self.side = rows, 0
        return True

    def bind(self, binding: Any, rows: int) -> None:
        """Bind the first ``rows`` sequences of every cache as input and as output."""
        read, write = self._sets[self.side], self._sets[self._other]
        for tensor, after in self._pairs:
            where = (self._device, 0, np.dtype(tensor.dtype).type, self._shape(tensor, rows))
            binding.bind_input(tensor.name, *where, read[tensor.name].data_ptr())
            binding.bind_output(after, *where, write[tensor.name].data_ptr())

    def views(self, rows: int) -> list[Array]:
        """Return the first ``rows`` sequences of every cache, which must lie in host memory."""
        # On a CPU, numpy() shows the buffer itself.
        return [self._sets[self.side][tensor.name].numpy()[:rows] for tensor, _ in self._pairs]

    def turn(self, rows: int) -> None:
        """Say that a pass over ``rows`` sequences is done, so that the next reads what it wrote."""
        self._alive = max(self._alive, rows)
        if self._copy is None:
            return
        read, write = self._sets[self.side], self._sets[self._other]
        for tensor, _ in self._pairs if rows < self._alive else ():
            row = int(np.prod(self._shape(tensor, 1))) * np.dtype(tensor.dtype).itemsize
            begin, count = rows * row, (self._alive - rows) * row
            target, source = write[tensor.name].data_ptr(), read[tensor.name].data_ptr()
            self._copy(target + begin, source + begin, count)
        self.side = self._other

    @property
    def _other(self) -> int:
        return 0 if self._copy is None else 1 - self.side

    def _new(self, tensor: TensorSpec, rows: int) -> Any:
        return self._runtime.OrtValue.ortvalue_from_shape_and_type(
            self._shape(tensor, rows), np.dtype(tensor.dtype).type, self._device, 0
        )

    def _shape(self, tensor: TensorSpec, rows: int) -> list[int]:
        """Return the shape of a cache; the only free axis besides the rows is the canvas."""
        inner = [size if isinstance(size, int) else self._canvas for size in tensor.shape[1:]]
        return [rows, *inner]


class Binding:
    """Inputs and outputs of the runs of one shape, at fixed addresses."""

    def __init__(self, binding: Any, inputs: Sequence[Any], fetch: Sequence[str]) -> None:
        """Take ONNX Runtime's binding, what must outlive it, and the outputs it is to return."""
        self.binding = binding
        self.runs = 0
        self.number = EAGER
        self._inputs = inputs
        self._fetch = fetch
        self._outputs: list[Any] = []

    def fetched(self) -> dict[str, Array]:
        """Return the outputs of the last run, in host memory of the caller's own."""
        if not self._outputs:  # which ONNX Runtime allocated: they stay where they are
            self._outputs = list(self.binding.get_outputs()[: len(self._fetch)])
            for name, value in zip(self._fetch, self._outputs, strict=True):
                self.binding.bind_ortvalue_output(name, value)
        # On a CPU, numpy() shows the buffer itself, which the next run overwrites.
        found = [np.array(value.numpy()) for value in self._outputs]
        return dict(zip(self._fetch, found, strict=True))


class Bindings:
    """All bindings of a session, by shapes; those unused for longest go first."""

    def __init__(self, runtime: ModuleType, device: str) -> None:
        """Take ONNX Runtime and a device of its."""
        self._runtime, self._device = runtime, device
        self._kept: OrderedDict[Any, Binding] = OrderedDict()
        self._buffers: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()
        self._steady: dict[Any, Array] = {}  # what lies in some of them
        self.uploaded = 0  # bytes

    def bind(
        self,
        feeds: Mapping[str, Array],
        fetch: Sequence[str],
        side: int,
        create: Callable[[], Any],
    ) -> tuple[Binding, bool]:
        """Return the binding of these shapes with the feeds uploaded, and whether it is new.

        Args:
            feeds: by name.
            fetch: names of the outputs to be returned.
            side: of the caches.
            create: returns a new binding of ONNX Runtime.
        """
        shapes = tuple((name, array.shape, array.dtype.str) for name, array in feeds.items())
        key = (shapes, tuple(fetch), side)
        values = {name: self._upload(name, array) for name, array in feeds.items()}
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key], False
        binding = create()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in fetch:
            binding.bind_output(name, self._device)
        self._kept[key] = Binding(binding, list(values.values()), list(fetch))
        return self._kept[key], True

    def evict(self, *, all_of_them: bool = False) -> list[int]:
        """Drop bindings that are too many, or all, and return the numbers of their graphs."""
        gone = []
        while len(self._kept) > (0 if all_of_them else _MOST):
            gone.append(self._kept.popitem(last=False)[1].number)
        self._steady = {key: kept for key, kept in self._steady.items() if key in self._buffers}
        return [number for number in gone if number != EAGER]

    def _upload(self, name: str, array: Array) -> Any:
        key = (name, array.shape, array.dtype.str)
        value = self._buffers.get(key)
        if value is None:
            self._steady.pop(key, None)
            value = self._runtime.OrtValue.ortvalue_from_shape_and_type(
                list(array.shape), array.dtype.type, self._device, 0
            )
            self._buffers[key] = value
        elif key in self._steady and np.array_equal(self._steady[key], array, equal_nan=False):
            return value
        value.update_inplace(np.ascontiguousarray(array))
        self.uploaded += array.nbytes
        if name.startswith(_STEADY):
            self._steady[key] = array.copy()
        return value
