"""Checkpoints of flax: written here after the format's description, read back bit by bit."""

import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mdzoo import checkpoint, flax_msgpack
from mdzoo.checkpoint import CheckpointError

KINDS = {"text": 0xD9, "bytes": 0xC4, "extension": 0xC7}
CONTAINERS = {"array": (0x90, 0xDC, 0xDD), "map": (0x80, 0xDE, 0xDF)}


def header(kind: str, count: int) -> bytes:
    """The shortest spelling of a size, as the specification's writers choose it."""
    if kind in CONTAINERS:
        short, middle, long = CONTAINERS[kind]
        if count < 16:
            return bytes([short | count])
        return (
            struct.pack(">BH", middle, count)
            if count < 1 << 16
            else struct.pack(">BI", long, count)
        )
    if kind == "text" and count < 32:
        return bytes([0xA0 | count])
    width = 0 if count < 1 << 8 else 1 if count < 1 << 16 else 2
    return bytes([KINDS[kind] + width]) + count.to_bytes(1 << width, "big")


def whole(value: int) -> bytes:
    if -32 <= value < 128:
        return struct.pack("b" if value < 0 else "B", value)
    first, letters = (0xD0, "bhiq") if value < 0 else (0xCC, "BHIQ")
    sizes = [8, 16, 32, 64]
    width = next(i for i in range(4) if -(2 ** (sizes[i] - 1)) <= value < 2 ** sizes[i])
    return bytes([first + width]) + struct.pack(f">{letters[width]}", value)


def extension(kind: int, content: bytes) -> bytes:
    if len(content) in (1, 2, 4, 8, 16):
        return bytes([0xD4 + int(math.log2(len(content))), kind]) + content
    return header("extension", len(content)) + bytes([kind]) + content


def array(value: Any, name: str = "") -> bytes:
    content = value.tobytes("C")
    return b"".join(
        (
            header("array", 3),
            header("array", value.ndim),
            *(whole(side) for side in value.shape),
            pack(name or value.dtype.name),
            header("bytes", len(content)) + content,
        )
    )


def pack(value: Any) -> bytes:
    if value is None or isinstance(value, bool):
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, np.ndarray):
        return extension(1, array(value))
    if isinstance(value, np.generic):
        return extension(3, array(np.asarray(value)))
    simple: dict[type, Callable[[Any], bytes]] = {
        int: whole,
        float: lambda number: struct.pack(">Bd", 0xCB, number),
        str: lambda text: header("text", len(text.encode())) + text.encode(),
        bytes: lambda content: header("bytes", len(content)) + content,
        list: lambda items: header("array", len(items)) + b"".join(map(pack, items)),
        Raw: lambda raw: raw.content,
    }
    if type(value) in simple:
        return simple[type(value)](value)
    items = [pack(key) + pack(item) for key, item in value.items()]
    return header("map", len(items)) + b"".join(items)


class Raw(NamedTuple):
    """Bytes that stand where an object should."""

    content: bytes


def brain(values: list[float]) -> Raw:
    """An array in bfloat16, which is the upper half of float32."""
    upper = (np.array(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return Raw(extension(1, array(upper, "bfloat16")))


def chunked(value: Any, sizes: list[int]) -> dict[str, Any]:
    parts = np.split(value.reshape(-1), np.cumsum(sizes))[: len(sizes) + 1]
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): side for i, side in enumerate(value.shape)},
        "chunks": {str(i): part for i, part in enumerate(parts)},
    }


EMBEDDING = np.arange(12, dtype=np.float32).reshape(3, 4)
PARAMS: dict[str, Any] = {
    "Embed_0": {"word_embeddings": {"embedding": EMBEDDING}},
    "TransformerLayer_0": {"out": {"kernel": EMBEDDING.reshape(2, 3, 2).transpose(2, 0, 1)}},
    "half": np.array([1.5, -2.0], np.float16),
    "step": np.int64(7),
    "scale": np.float32(0.5),
    "empty": np.zeros((0, 3), np.float32),
    "wide": np.zeros(300, np.float64),
    "none": None,
    "list": [EMBEDDING],
}
WEIGHTS: dict[str, Any] = {
    "Embed_0/word_embeddings/embedding": EMBEDDING,
    "TransformerLayer_0/out/kernel": PARAMS["TransformerLayer_0"]["out"]["kernel"],
    **{key: PARAMS[key] for key in ("half", "step", "scale", "empty", "wide")},
}
STATE = {
    "step": 70000,
    "rate": 0.5,
    "name": "run " * 20,
    "key": b"\0" * 300,
    "low": -70000,
    "opt_state": {str(i): {"mu": np.zeros(2, np.uint32)} for i in range(20)},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "maskgit_imagenet256_checkpoint"


def assert_weights(found: dict[str, Tensor]) -> None:
    assert list(found) == list(WEIGHTS)
    for key, expected in WEIGHTS.items():
        assert found[key].shape == expected.shape
        np.testing.assert_array_equal(found[key].numpy(), expected, strict=True)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda params: params,
        lambda params: {"params": params},
        lambda params: {**STATE, "params": params},
        lambda params: {"target": {"params": params, "batch_stats": {}}, "state": STATE},
        lambda params: {"optimizer": {"state": STATE, "target": params}, "step": 3},
        lambda params: {"optimizer": {"target": {"params": params}}},
    ],
    ids=["bare", "params", "state", "target", "optimizer", "optimizer params"],
)
def test_weights_are_found_in_the_states_of_trainers(path: Path, wrap: Any) -> None:
    path.write_bytes(pack(wrap(PARAMS)))
    assert_weights(checkpoint.read(path))


def test_bfloat16_is_read(path: Path) -> None:
    path.write_bytes(pack({"params": {"a": brain([1.5, -2.0, 0.0078125])}}))
    expected = torch.tensor([1.5, -2.0, 0.0078125], dtype=torch.bfloat16)
    torch.testing.assert_close(checkpoint.read(path)["a"], expected, rtol=0, atol=0)


def test_arrays_in_chunks_are_joined(path: Path) -> None:
    path.write_bytes(pack({"params": {"a": chunked(EMBEDDING, [5, 5]), "b": EMBEDDING}}))
    found = checkpoint.read(path)
    assert list(found) == ["a", "b"]
    np.testing.assert_array_equal(found["a"].numpy(), EMBEDDING)


def test_what_flax_writes_is_read(path: Path) -> None:
    """Written with the msgpack package 1.2.4 as ``flax.serialization`` calls it."""
    path.write_bytes(
        bytes.fromhex(
            "81a6706172616d7381a14482a66b65726e656c"
            "c7160193920102a7666c6f61743332c4080000803f00000040a462696173"
            "c71101939101a7666c6f61743332c404000040bf"
        )
    )
    found = checkpoint.read(path)
    assert {key: found[key].tolist() for key in found} == {
        "D/kernel": [[1.0, 2.0]],
        "D/bias": [-0.75],
    }


SPECIFIED = [
    ("82a7636f6d70616374c3a6736368656d6100", {"compact": True, "schema": 0}),
    ("93c0c2c3", [None, False, True]),
    ("96007fe0ffccffcdffff", [0, 127, -32, -1, 255, 65535]),
    ("92ceffffffffcfffffffffffffffff", [2**32 - 1, 2**64 - 1]),
    ("94d080d18000d280000000d38000000000000000", [-(2**7), -(2**15), -(2**31), -(2**63)]),
    ("92ca3fc00000cbbff8000000000000", [1.5, -1.5]),
    ("93d903616263da0003616263db00000003616263", ["abc", "abc", "abc"]),
    ("93c403616263c50003616263c600000003616263", [b"abc", b"abc", b"abc"]),
    ("92dc0001c0dd00000001c0", [[None], [None]]),
    ("92de0001a161c0df00000001a161c0", [{"a": None}, {"a": None}]),
]


@pytest.mark.parametrize(("content", "expected"), SPECIFIED, ids=[case[0] for case in SPECIFIED])
def test_objects_are_read_as_the_specification_spells_them(content: str, expected: object) -> None:
    reader = flax_msgpack._Reader(memoryview(bytes.fromhex(content)))
    assert reader.value(4) == expected
    reader.finish()


def misshapen(shape: Any, name: Any = "float32", content: Any = bytes(8)) -> bytes:
    return b"\x81\xa1a" + extension(1, pack([shape, name, content]))


def chunks(**changes: Any) -> bytes:
    return pack({"a": chunked(EMBEDDING, [5]) | changes})


GOOD = pack({"params": PARAMS})
UNFIT: list[tuple[str, bytes, str]] = [
    ("cut", GOOD[:-3], "a part of .* bytes that goes beyond the end"),
    ("cut early", GOOD[:20], "goes beyond the end"),
    ("more", GOOD + b"\0\0", "2 bytes follow the tree"),
    ("deep", b"\x81\xa1a" * 70 + b"\xc0", "objects inside one another to a depth of more than 64"),
    (
        "deeper",
        b"\x81\xa1a" * 100_000 + b"\xc0",
        "objects inside one another to a depth of more than 64",
    ),
    ("endless map", b"\xdf\xff\xff\xff\xff\xa1a\xc0", "goes beyond the end"),
    ("endless array", b"\x81\xa1a\xdd\xff\xff\xff\xff\xc0", "goes beyond the end"),
    ("endless text", b"\x81\xa1a\xdb\xff\xff\xff\xff", "a part of 4294967295 bytes that goes"),
    ("endless extension", b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "a part of 4294967295 bytes"),
    ("many", b"\x81\xa1a\xdd\x00\x20\x00\x00" + bytes(1 << 21), "more than 1000000 objects"),
    ("unused byte", b"\x81\xa1a\xc1", "the byte 0xc1, which begins no object"),
    ("number as key", b"\x82\xa1a\xc0\x01\xc0", "a key that must be a text of its own, found 1"),
    ("map as key", b"\x82\xa1a\xc0\x80\xc0", "inside one another"),
    ("key twice", b"\x82\xa1a\xc0\xa1a\xc0", "a key that must be a text of its own, found 'a'"),
    ("no text", b"\x81\xa1\xff\xc0", "UnicodeDecodeError"),
    ("extension", b"\x81\xa1a" + extension(9, b"12"), "an extension of the unknown kind 9"),
    ("long shape", misshapen([3]), r"an array of shape \[3\] with 8 bytes, not 12"),
    ("huge shape", misshapen([2**62, 2**62]), "an array of shape .* with 8 bytes, not"),
    ("no side", misshapen([-2, -1]), "whose shape must be a few numbers of 0 or more"),
    ("true side", misshapen([True, 2]), "whose shape must be a few numbers"),
    ("sides", misshapen([1] * 20), "whose shape must be a few numbers"),
    ("type", misshapen([2], "object"), "an array of the unknown type 'object'"),
    ("no shape", misshapen(2), "must hold a shape, a type and elements"),
    ("no bytes", misshapen([2], content=[0, 0]), "must hold a shape, a type and elements"),
    ("deep shape", misshapen([[[2]]]), "objects inside one another"),
    ("empty extension", b"\x81\xa1a\xc7\x00\x01", "goes beyond the end"),
    ("chunks missing", chunks(chunks={}), "whose chunks must be arrays of one type"),
    ("chunks of two", chunks(chunks={"0": EMBEDDING, "1": np.ones(1)}), "arrays of one type"),
    ("chunks of none", chunks(chunks={"0": None}), "arrays of one type"),
    ("chunks apart", chunks(chunks={"1": EMBEDDING}), "must be numbered from 0"),
    ("chunks listed", chunks(shape=[3, 4]), "must be numbered from 0"),
    ("chunks short", chunks(shape={"0": 5}), r"together do not have the shape \[5\]"),
    ("collision", pack({"a/b": EMBEDDING, "a": {"b": EMBEDDING}}), "two arrays at 'a/b'"),
]


@pytest.mark.parametrize(
    ("content", "message"), [case[1:] for case in UNFIT], ids=[case[0] for case in UNFIT]
)
def test_damaged_files_are_told_in_one_line(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.read(path)
    assert re.match(rf"{path} must be a file of .*; download it again$", str(caught.value))


def test_a_tree_without_arrays_holds_no_weights(path: Path) -> None:
    path.write_bytes(pack({"params": {}, "step": 3}))
    with pytest.raises(CheckpointError, match="must hold tensors by name, found none"):
        checkpoint.read(path)


def told(path: Path) -> str:
    try:
        checkpoint.read(path)
    except CheckpointError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("seed", range(10))
def test_any_damage_has_one_error_or_none(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(50):
        content = bytearray(GOOD)
        for at in rng.integers(len(content), size=rng.integers(1, 4)):
            content[at] = rng.integers(256)
        path.write_bytes(content[: rng.integers(1, len(content) + 1)])
        assert "\n" not in told(path)


def test_other_formats_are_not_taken_for_flax(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "zip")
    torch.save({"a": torch.ones(1)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    save_file({"a": torch.ones(1)}, tmp_path / "safe")
    starts = [path.read_bytes()[:512] for path in tmp_path.iterdir()]
    assert [flax_msgpack.recognises(start) for start in [*starts, b"", b"\x81"]] == [False] * 5
    assert all(flax_msgpack.recognises(pack({key: 1})) for key in ("a", "b" * 40))
