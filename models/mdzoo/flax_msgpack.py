"""Reads the checkpoints of flax: a tree of arrays in MessagePack.

Arrays are extensions of kind 1 (kind 3: scalars of NumPy) whose content is MessagePack again:
shape, name of the type, elements in C order. Arrays beyond 1 GiB are cut into a map of chunks.

Sources: the MessagePack specification (repository msgpack/msgpack, ``spec.md``) and repository
google/flax, ``flax/serialization.py``. Unlike a general reader, this one demands texts as keys,
each once, and nothing after the tree.
"""

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["load", "recognises"]

DEPTH = 64
"""Maps and arrays inside one another; the trees of optimisers stay below 20."""

OBJECTS = 1_000_000
"""Objects in a file, so that a damaged one cannot ask for all memory; models have thousands."""

CHUNKED = "__msgpack_chunked_array__"

ROOTS = (("optimizer", "target"), ("target",), ("params",))
"""Where training states keep the weights, tried in this order."""

DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("bfloat16", "float16", "float32", "float64", "complex64", "complex128", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    )
}


class Array(NamedTuple):
    """An array that is not yet copied from the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[memoryview, ...]  # elements in C order, one part after the other

    def tensor(self) -> Tensor:
        """Return a copy; elements lie at any address in the file, so none can be used in place."""
        content = bytearray().join(self.parts)
        if not content:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(content, dtype=self.dtype).reshape(self.shape)


def recognises(start: bytes) -> bool:
    """Say whether a file that begins so is a map whose first key is a text."""
    if not start:
        return False
    key = {0xDE: 3, 0xDF: 5}.get(start[0], 1 if 0x81 <= start[0] <= 0x8F else len(start))
    return len(start) > key and (0xA0 <= start[key] <= 0xBF or 0xD9 <= start[key] <= 0xDB)


def load(path: Path) -> dict[str, Tensor]:
    """Return the weights under their paths in the tree, such as ``Embed_0/embedding``.

    Paths begin below ``params``, ``target`` or ``optimizer/target`` (and below ``params`` within
    those), where the tree has such a key; the optimiser and the like stay unread.

    Raises:
        ValueError: the file is damaged or of another kind.
    """
    with path.open("rb") as stream:
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    reader = _Reader(memoryview(content))
    tree = reader.value(DEPTH)
    reader.finish()
    weights: dict[str, Tensor] = {}
    for name, array in _leaves(_root(tree), ""):
        if name in weights:
            raise ValueError(f"two arrays at {name!r}")
        weights[name] = array.tensor()
    return weights


def _root(tree: Any) -> Any:
    for path in ROOTS:
        found = tree
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        tree = found if isinstance(found, Mapping) else tree
    return tree


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Array]]:
    if isinstance(tree, Array):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}/{key}" if path else key)


class _Reader:
    """A position in MessagePack content, which every read moves on."""

    def __init__(self, content: memoryview) -> None:
        self._content, self._at, self._objects = content, 0, 0

    def take(self, count: int) -> memoryview:
        if count > len(self._content) - self._at:
            raise ValueError(f"a part of {count} bytes that goes beyond the end")
        self._at += count
        return self._content[self._at - count : self._at]

    def finish(self) -> None:
        if self._at != len(self._content):
            raise ValueError(f"{len(self._content) - self._at} bytes follow the tree")

    def value(self, depth: int) -> Any:
        """Return the next object, which may hold others to this depth."""
        self._objects += 1
        if self._objects > OBJECTS:
            raise ValueError(f"more than {OBJECTS} objects")
        code = self.take(1)[0]
        if code <= 0x7F or code >= 0xE0:
            return code if code <= 0x7F else code - 0x100
        if code in CONSTANTS:
            return CONSTANTS[code]
        if code in NUMBERS:
            form = struct.Struct(f">{NUMBERS[code]}")
            return form.unpack(self.take(form.size))[0]
        return self._sized(code, depth)

    def _sized(self, code: int, depth: int) -> Any:
        kind, count = self._size(code)
        if kind == "text":
            return str(self.take(count), "utf-8")
        if kind == "bytes":
            return self.take(count)
        if kind == "extension":
            return _extension(self.take(1)[0], self.take(count), depth - 1)
        if depth <= 0:
            raise ValueError(f"objects inside one another to a depth of more than {DEPTH}")
        if kind == "array":
            return [self.value(depth - 1) for _ in range(count)]
        return self._map(count, depth - 1)

    def _size(self, code: int) -> tuple[str, int]:
        if code <= 0x8F:
            return "map", code & 0x0F
        if code <= 0x9F:
            return "array", code & 0x0F
        if code <= 0xBF:
            return "text", code & 0x1F
        if code not in SIZED:
            raise ValueError(f"the byte {code:#x}, which begins no object")
        kind, width = SIZED[code]
        if width < 0:  # of a fixed size
            return kind, -width
        return kind, int.from_bytes(self.take(width), "big")

    def _map(self, count: int, depth: int) -> Any:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.value(0)
            if not isinstance(key, str) or key in found:
                raise ValueError(f"a key that must be a text of its own, found {key!r}")
            found[key] = self.value(depth)
        return _joined(found) if CHUNKED in found else found


CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}

NUMBERS = dict(zip(range(0xCA, 0xD4), "fdBHIQbhiq", strict=True))
"""Numbers by their first byte, in the letters of ``struct``."""

SIZED = {
    **{0xC4 + i: ("bytes", 1 << i) for i in range(3)},
    **{0xC7 + i: ("extension", 1 << i) for i in range(3)},
    **{0xD4 + i: ("extension", -(1 << i)) for i in range(5)},
    **{0xD9 + i: ("text", 1 << i) for i in range(3)},
    **{0xDC + i: ("array", 2 << i) for i in range(2)},
    **{0xDE + i: ("map", 2 << i) for i in range(2)},
}
"""What begins with a byte, and in how many bytes its size follows; negative: the size itself."""


def _extension(kind: int, content: memoryview, depth: int) -> Any:
    if kind not in (1, 2, 3):
        raise ValueError(f"an extension of the unknown kind {kind}")
    reader = _Reader(content)
    parts = reader.value(min(depth, 2))  # a list, with the list of the shape within
    reader.finish()
    if kind == 2:
        return parts  # a complex number, which is no weight
    match parts:
        case [list(shape), str() | memoryview() as name, memoryview() as elements]:
            return _array(shape, name if isinstance(name, str) else str(name, "ascii"), elements)
    raise ValueError("an array that must hold a shape, a type and elements")


def _array(shape: list[Any], name: str, elements: memoryview) -> Array:
    if name not in DTYPES:
        raise ValueError(f"an array of the unknown type {name!r}")
    expected = _count(shape) * DTYPES[name].itemsize
    if len(elements) != expected:
        raise ValueError(f"an array of shape {shape} with {len(elements)} bytes, not {expected}")
    return Array(tuple(shape), DTYPES[name], (elements,))


def _count(shape: list[Any]) -> int:
    if len(shape) > 16 or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError("an array whose shape must be a few numbers of 0 or more")
    return math.prod(shape)


def _joined(found: dict[str, Any]) -> Array:
    """Return the array of a map of chunks."""
    shape, chunks = _in_order(found.get("shape")), _in_order(found.get("chunks"))
    kinds = {chunk.dtype if isinstance(chunk, Array) else None for chunk in chunks}
    if len(kinds) != 1 or None in kinds:
        raise ValueError("an array in chunks whose chunks must be arrays of one type")
    parts = tuple(part for chunk in chunks for part in chunk.parts)
    if _count(shape) != sum(math.prod(chunk.shape) for chunk in chunks):
        raise ValueError(f"an array in chunks that together do not have the shape {shape}")
    return Array(tuple(shape), chunks[0].dtype, parts)


def _in_order(found: Any) -> list[Any]:
    """Return the values of the keys "0", "1" and so on."""
    if not isinstance(found, dict) or found.keys() != {str(i) for i in range(len(found))}:
        raise ValueError("an array in chunks whose shape and chunks must be numbered from 0")
    return [found[str(i)] for i in range(len(found))]
