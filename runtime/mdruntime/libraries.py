"""Shared libraries: where they lie, and which others one needs."""

import os
import re
import site
import struct
from collections.abc import Iterator
from pathlib import Path

__all__ = ["find", "needed", "version_of"]

_SYSTEM = (
    *("usr/lib", "usr/lib64", "lib", "usr/lib/*-linux-gnu", "lib/*-linux-gnu"),
    *("usr/local/lib", "usr/local/cuda*/lib64", "usr/local/cuda*/targets/*/lib"),
    *("usr/local/tensorrt*/lib", "opt/tensorrt/lib", "usr/src/tensorrt/lib"),
)
_WHEELS = ("tensorrt_libs", "nvidia/*/lib")
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_ENTRY = struct.Struct("<qQ")
_LOAD, _DYNAMIC = 1, 2  # PT_LOAD, PT_DYNAMIC
_NEEDED, _STRINGS = 1, 5  # DT_NEEDED, DT_STRTAB


def find(stem: str, root: Path = Path("/")) -> list[Path]:
    """Return all shared libraries of that name, such as ``libnvinfer``, once each.

    Args:
        stem: the name before ``.so``.
        root: folder taken for the root of the file system.
    """
    found: dict[Path, Path] = {}
    for folder in _folders(root):
        for path in sorted(folder.glob(f"{stem}.so*")):
            real = path.resolve()
            # Of a library and its links, keep the name that says most about its version.
            if real.is_file() and len(path.name) > len(found.get(real, Path()).name):
                found[real] = path
    return sorted(found.values())


def _folders(root: Path) -> Iterator[Path]:
    for pattern in _SYSTEM:
        yield from sorted(root.glob(pattern))
    if root == Path("/"):
        listed = os.environ.get("LD_LIBRARY_PATH", "").split(":")
        yield from (Path(folder) for folder in listed if folder)
        for packages in (*site.getsitepackages(), site.getusersitepackages()):
            for pattern in _WHEELS:
                yield from sorted(Path(packages).glob(pattern))


def version_of(path: Path) -> tuple[int, ...]:
    """Return the version in a library's name, (10, 3, 0) of ``libnvinfer.so.10.3.0``."""
    match = re.search(r"\.so\.([0-9.]*[0-9])$", path.name)
    return tuple(int(part) for part in match[1].split(".")) if match else ()


def needed(path: Path) -> tuple[str, ...]:
    """Return the names of the libraries that a 64-bit ELF file is linked with (DT_NEEDED).

    Raises:
        ValueError: no such file.
    """
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{path.name} is no 64-bit little-endian ELF file")
    try:
        segments = list(_segments(data))
        entries = list(_entries(data, segments))
        strings = _offset(next(value for tag, value in entries if tag == _STRINGS), segments)
        names = [strings + value for tag, value in entries if tag == _NEEDED]
        return tuple(data[start : data.index(b"\0", start)].decode() for start in names)
    except (struct.error, StopIteration) as error:
        raise ValueError(f"{path.name} is a damaged ELF file ({error!r})") from None


def _segments(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield kind, offset in the file, address and bytes of the file's segments."""
    fields = _HEADER.unpack_from(data)
    start, size, count = fields[5], fields[9], fields[10]
    for number in range(count):
        kind, _, offset, address, _, length, _, _ = _SEGMENT.unpack_from(
            data, start + number * size
        )
        yield kind, offset, address, length


def _entries(data: bytes, segments: list[tuple[int, int, int, int]]) -> Iterator[tuple[int, int]]:
    for kind, offset, _, length in segments:
        if kind == _DYNAMIC:
            yield from _ENTRY.iter_unpack(data[offset : offset + length])


def _offset(address: int, segments: list[tuple[int, int, int, int]]) -> int:
    for kind, offset, start, length in segments:
        if kind == _LOAD and start <= address < start + length:
            return address - start + offset
    raise ValueError("an address outside all segments")
