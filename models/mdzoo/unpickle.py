"""Reads files of ``torch.save`` that hold foreign objects, without running any of their code.

A pickle is a program: it names classes and functions, and whoever opens it imports and calls
them. Here no name leads to an import. The few that rebuild tensors have substitutes of this
module, other classes become ``Inert``, and names of Python itself that are no plain data, such as
``os.system``, end the reading. All that a pickle can reach is substitutes, strings, numbers,
containers and its own tensors: there is nothing of the process that it could call or alter.

Source of the formats: repository pytorch/pytorch, ``torch/serialization.py``.
"""

import functools
import io
import pickle
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

__all__ = ["Refused", "load"]

MAGIC = 0x1950A86A20F9469CFC6C  # the first number of the format before PyTorch 1.6

DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
    "UntypedStorage": torch.uint8,
}

_PATHS = {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"}

HARMLESS = {
    "_codecs": {"encode"},
    "argparse": {"Namespace"},
    "builtins": {"bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int"}
    | {"list", "object", "range", "set", "slice", "str", "tuple"},
    "collections": {"Counter", "defaultdict", "deque"},
    "copyreg": {"_reconstructor"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "functools": {"partial"},
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,  # their name in Python 3.13
    "types": {"SimpleNamespace"},
    "typing": {"Any"},
    "uuid": {"UUID"},
}
"""Names of Python itself that settings saved beside weights are made of; they become inert too."""


class Refused(pickle.UnpicklingError):
    """The file is a program rather than weights."""


class Inert:
    """Stands for a foreign object: takes whatever a pickle does to it and keeps nothing."""

    __slots__ = ()

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Drop what it would be made of."""

    def __setstate__(self, state: object) -> None:
        """Drop its attributes."""

    def __setitem__(self, key: object, value: object) -> None:
        """Drop an entry of what was a mapping."""

    def append(self, item: object) -> None:
        """Drop an item of what was a list."""

    def extend(self, items: object) -> None:
        """Drop the items of what was a list."""

    def add(self, item: object) -> None:
        """Drop an item of what was a set."""


class Ordered(dict[Any, Any]):
    """Stands for ``collections.OrderedDict``, less the attributes it may carry."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Drop the attributes, such as the ``_metadata`` of a module's state."""


class RebuildTensor(Inert):
    """Stands for ``torch._utils._rebuild_tensor_v2``: a view of a storage, which is a flat tensor.

    An object without attributes instead of a function, so that no pickle can alter it.
    """

    __slots__ = ()

    def __call__(self, storage: Tensor, offset: int, size: Any, stride: Any, *_: object) -> Tensor:
        """Return the view; PyTorch checks that it lies within the storage."""
        return storage.as_strided(size, stride, offset)


class RebuildParameter(Inert):
    """Stands for ``torch._utils._rebuild_parameter``: the tensor without its gradient's flags."""

    __slots__ = ()

    def __call__(self, data: Tensor, *_: object) -> Tensor:
        """Return the tensor itself."""
        return data


SUBSTITUTES: dict[str, Any] = {
    "collections.OrderedDict": Ordered,
    "torch._utils._rebuild_parameter": RebuildParameter(),
    "torch._utils._rebuild_parameter_with_state": RebuildParameter(),
    "torch._utils._rebuild_tensor": RebuildTensor(),
    "torch._utils._rebuild_tensor_v2": RebuildTensor(),
}

Storage = Callable[[str, int, torch.dtype], Tensor]
"""Key, number of elements and type of a storage to a flat tensor."""


def _no_storage(key: str, count: int, dtype: torch.dtype) -> Tensor:
    raise pickle.UnpicklingError(f"storage {key!r} of {count} {dtype} in a header")


class Unpickler(pickle.Unpickler):
    """An unpickler to which every name is a substitute."""

    def __init__(self, stream: IO[bytes], storage: Storage = _no_storage) -> None:
        super().__init__(stream, encoding="latin-1")  # of strings from Python 2; never fails
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        """Return the substitute of a global name, or refuse the file."""
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        path = f"{module}.{name}"
        if path in SUBSTITUTES:
            return SUBSTITUTES[path]
        if _is_standard(module) and name not in HARMLESS.get(module, ()):
            raise Refused(
                f"it asks for {path!r} to be called, which no weights need. If you trust its "
                "source, have its model.state_dict() saved alone; if not, delete it"
            )
        return type(name, (Inert,), {"__slots__": (), "__module__": module})

    def persistent_load(self, identity: Any) -> Tensor:
        """Return the flat tensor of a storage, or of a part of it in the oldest files."""
        kind, declared, key, _, count, *view = identity
        dtype = DTYPES.get(getattr(declared, "__name__", ""))
        if kind != "storage" or dtype is None:
            raise pickle.UnpicklingError(f"reference to {kind!r} of unknown type {declared!r}")
        flat = self._storage(key, count, dtype)
        if view and view[0] is not None:
            _, offset, count = view[0]
            return flat[offset : offset + count]
        return flat


def _is_standard(module: str) -> bool:
    root = module.partition(".")[0]
    return root in sys.stdlib_module_names or root in ("nt", "posix")


def _fill(flat: Tensor, stream: IO[bytes]) -> Tensor:
    target = flat.view(torch.uint8).numpy()
    found = stream.readinto(target)  # type: ignore[attr-defined] # all streams here are buffered
    if found != target.size:
        raise EOFError(f"{target.size} bytes of weights expected, {found} found")
    return flat


def _root(archive: zipfile.ZipFile) -> str:
    names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        raise Refused(
            "it is a TorchScript archive, a program with its weights. "
            "Have the state_dict() of its model saved with torch.save"
        )
    for name in names:
        if name.endswith("/data.pkl"):
            return name.removesuffix("data.pkl")
    raise pickle.UnpicklingError("a zip archive without data.pkl")


def _from_archive(archive: zipfile.ZipFile, path: Path) -> object:
    root = _root(archive)
    order = f"{root}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise pickle.UnpicklingError("numbers in big-endian byte order")
    mapped = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)

    @functools.cache  # tensors may share a storage
    def storage(key: str, count: int, dtype: torch.dtype) -> Tensor:
        start, size = _extent(archive, f"{root}data/{key}")
        wanted = count * dtype.itemsize
        if not 0 <= wanted <= size:
            raise EOFError(f"{wanted} bytes of weights expected, {size} found")
        part = mapped[start : start + wanted]
        if start % dtype.itemsize:
            part = part.clone()
        return torch.empty(0, dtype=dtype).set_(part, 0, (count,), (1,))

    return Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")), storage).load()


def _extent(archive: zipfile.ZipFile, name: str) -> tuple[int, int]:
    """Return where the bytes of a member begin in the file, and their number.

    Source: the zip format, PKWARE's APPNOTE 4.3.7: a header of 30 bytes, its last four the
    lengths of the name and of further fields, which follow it before the content.
    """
    member = archive.getinfo(name)
    with archive.open(member):
        pass  # checks the header
    stream = archive.fp
    if stream is None or member.compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError("compressed weights, which torch.save does not write")
    stream.seek(member.header_offset + 26)
    lengths = stream.read(4)
    variable = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return member.header_offset + 30 + variable, member.file_size


def _from_stream(stream: IO[bytes]) -> object:
    if Unpickler(stream).load() != MAGIC:
        raise pickle.UnpicklingError("a pickle without the header of torch.save")
    Unpickler(stream).load()  # the version of the format: there is but one
    if not Unpickler(stream).load()["little_endian"]:
        raise pickle.UnpicklingError("numbers in big-endian byte order")
    storages: dict[str, Tensor] = {}

    def storage(key: str, count: int, dtype: torch.dtype) -> Tensor:
        return storages.setdefault(key, torch.zeros(count, dtype=dtype))

    tree = Unpickler(stream, storage).load()
    for key in Unpickler(stream).load():  # the elements come after the pickles
        flat = storages[key]
        if int.from_bytes(stream.read(8), "little") != flat.numel():
            raise pickle.UnpicklingError(f"storage {key!r} of another size than announced")
        _fill(flat, stream)
    return tree


def load(path: Path) -> Any:
    """Return what ``torch.save`` wrote, with inert objects for all but containers and tensors.

    Reads the zip format of PyTorch 1.6 and later and the format before it, little-endian. From
    the zip format, weights stay on disk until they are used.

    Raises:
        Refused: the file is a program.
        Exception: the file is damaged or of another kind; a random pickle may raise anything.
    """
    with path.open("rb") as stream:
        if stream.peek(2).startswith(b"PK"):
            with zipfile.ZipFile(stream) as archive:
                return _from_archive(archive, path)
        return _from_stream(stream)
