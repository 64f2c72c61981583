"""JSON to frozen dataclasses and back, strictly: a manifest is read as what it claims to be.

Only what manifests need: integers, numbers, strings, booleans, lists as tuples, objects as
dictionaries, and nested dataclasses.
"""

import math
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

from mdruntime.errors import BundleError, SamplingError

__all__ = ["from_json", "to_json"]

Record = TypeVar("Record")


def to_json(value: Any) -> Any:
    """Return a record as dictionaries, lists and plain values.

    NaN and infinity, which JSON lacks, become texts.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    return value


def from_json(kind: type[Record], data: Any, where: str = "manifest") -> Record:
    """Return ``data`` as a record of type ``kind``.

    Args:
        kind: a dataclass.
        data: what ``json.loads`` returned.
        where: path of ``data`` inside the file, for error messages.

    Raises:
        BundleError: a field is missing, unknown or of another type.
    """
    return typing.cast(Record, _read(kind, data, where))


def _read(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        return _read_record(kind, data, where)
    if origin is tuple:
        return _read_tuple(arguments, data, where)
    if origin is dict:
        _expect(isinstance(data, dict), "an object", data, where)
        return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    if origin in (typing.Union, types.UnionType):
        return _read_union(arguments, data, where)
    if kind is float:
        _expect(isinstance(data, (int, float)) and not isinstance(data, bool), "float", data, where)
        return float(data)
    if kind is not Any:
        exact = type(data) is kind
        _expect(exact, {int: "an integer", str: "a text"}.get(kind, str(kind)), data, where)
    return data


def _read_record(kind: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), "an object", data, where)
    hints = typing.get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}
    unknown = sorted(set(data) - set(known))
    missing = sorted(
        name
        for name, field in known.items()
        if name not in data and field.default is MISSING and field.default_factory is MISSING
    )
    if unknown or missing:
        words = [f"lacks {name!r}" for name in missing]
        words += [f"has the unknown field {name!r}" for name in unknown]
        raise BundleError(f"{where} {', '.join(words)}")
    values = {name: _read(hints[name], item, f"{where}.{name}") for name, item in data.items()}
    try:
        return kind(**values)
    except SamplingError as error:
        raise BundleError(f"{where}: {error}; export the bundle again") from None


def _read_tuple(arguments: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    _expect(isinstance(data, list), "a list", data, where)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    _expect(len(data) == len(arguments), f"a list of {len(arguments)}", data, where)
    return tuple(
        _read(kind, item, f"{where}[{i}]")
        for i, (kind, item) in enumerate(zip(arguments, data, strict=True))
    )


def _read_union(arguments: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in arguments:
        return None
    for kind in arguments:
        if is_dataclass(kind):
            return _read(kind, data, where)
        if type(data) is kind:
            return data
    names = " or ".join(kind.__name__ for kind in arguments)
    raise BundleError(f"{where} must be {names}, got {data!r}")


def _expect(holds: bool, what: str, data: Any, where: str) -> None:
    if not holds:
        raise BundleError(f"{where} must be {what}, got {data!r}")
