"""The manifest: its bytes never drift, and what is not exactly a manifest is refused."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdruntime import BundleError
from mdruntime.bundle import MANIFEST
from mdruntime.manifest import (
    ContextRow,
    DenoiserSpec,
    FileSpec,
    GraphSpec,
    ImageSpec,
    Island,
    Manifest,
    PromptSpec,
    SpellingRecord,
    TensorSpec,
    TextSpec,
    VerificationRecord,
    WeightsSpec,
    dump,
    parse,
)
from mdruntime.sampling import Sampling
from mdruntime.study import Study, StudyRow

Data = dict[str, Any]

TINY = Manifest(
    format=4,
    name="tiny",
    family="maskgit",
    task="class to image",
    precision="fp16",
    weights=WeightsSpec("checkpoint", -1, {"é.pth": "0" * 64}, 123, "MIT"),
    denoiser=DenoiserSpec(4, 5, 0, (2, 2), (1, 1), 6, 6, 3, 1, (ContextRow(4, 7, 10),)),
    image=ImageSpec(8, 8, 2),
    text=TextSpec("text.json", 1, 2),
    prompt=PromptSpec("prompt.json", 40, 77, 3, 4, 5),
    graphs={
        "denoiser": GraphSpec(
            file="denoiser.onnx",
            opset=23,
            spellings={"tensorrt": "graphs/denoiser.tensorrt.onnx"},
            inputs=(TensorSpec("tokens", "int32", ("rows", "m")),),
            outputs=(TensorSpec("present.0.key", "float16", ("rows", 2, 5, 8)),),
            caches=(("past.0.key", "present.0.key"),),
            float32_operators=("Softmax",),
            float32_islands=(Island("blocks.0.mlp.down", 70000),),
        )
    },
    buckets=(5,),
    presets={"default": Sampling(alpha=4, exploration=(1, 0))},
    files={
        "denoiser.onnx": FileSpec("1" * 64, 10),
        "graphs/denoiser.tensorrt.onnx": FileSpec("2" * 64, 20),
    },
    verification=VerificationRecord(
        "PyTorch",
        {"log_prob": 0.05},
        {"log_prob": 1e-05},
        {"tensorrt": SpellingRecord("on the CPU", {"score": 1}, {"score": 0.5})},
    ),
    toolchain={"mdexport": "0.1.0"},
    study=Study(
        "frechet",
        {"é.pth": "0" * 64},
        (StudyRow("moment 8", Sampling(), 2, 1.5, 2.5, {"accuracy": 0.9}, 8, 16, 620, 5),),
    ),
)

GOLDEN = Path(__file__).parent / "golden" / "manifest.json"
GOLDEN_DIGEST = "5d5cbc3735ee0cb1b4e09e5ca2f270ac966054aa3fa3d71f553db76eabecc359"
GOLDEN_FILE = "ae10ff5a2abffe1a9f2c7db7c9755f98bc6518e16cef6a5b8d43f210d5696097"


def rejection(raw: bytes) -> str:
    """Return the one line that says why these bytes are no manifest."""
    with pytest.raises(BundleError) as caught:
        parse(raw)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def encode(data: Data) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def signed(data: Data) -> bytes:
    """Return a manifest whose digest is right, as a stranger's exporter might write it."""
    rest = {key: value for key, value in data.items() if key != "digest"}
    return encode({**rest, "digest": hashlib.sha256(encode(rest)).hexdigest()})


def tiny() -> Data:
    data: Data = json.loads(dump(TINY))
    return data


def test_the_format_of_the_manifest_is_golden() -> None:
    assert dump(TINY) == GOLDEN.read_bytes()
    assert hashlib.sha256(dump(TINY)).hexdigest() == GOLDEN_FILE
    assert parse(dump(TINY)) == replace(TINY, digest=GOLDEN_DIGEST)


def test_manifests_survive_a_round_trip_byte_by_byte(digits_bundle: Path) -> None:
    raw = (digits_bundle / MANIFEST).read_bytes()
    assert dump(parse(raw)) == raw
    assert dump(parse(dump(TINY))) == dump(TINY)


def test_whole_numbers_are_written_as_the_floats_they_stand_for() -> None:
    presets = {"default": Sampling(alpha=4.0, exploration=(1.0, 0.0))}
    assert dump(TINY) == dump(replace(TINY, presets=presets))


def test_what_could_not_be_read_back_is_not_written() -> None:
    for wrong in (np.float32(0.5), float("nan"), float("inf"), "0.5", None):
        verification = VerificationRecord("PyTorch", {"log_prob": wrong}, {})  # type: ignore[dict-item]
        with pytest.raises(BundleError, match=r"limits\.log_prob must be float"):
            dump(replace(TINY, verification=verification))


@pytest.mark.parametrize("change", [0x01, 0x20, 0x80])
def test_every_altered_byte_of_a_manifest_is_found(digits_bundle: Path, change: int) -> None:
    raw = bytearray((digits_bundle / MANIFEST).read_bytes())
    step = 23 + change % 7
    for offset in [0, 1, 2, *range(3, len(raw) - 3, step), len(raw) - 2, len(raw) - 1]:
        raw[offset] ^= change
        rejection(bytes(raw))
        raw[offset] ^= change
    assert parse(bytes(raw))


@pytest.mark.parametrize("offset", range(0, len(GOLDEN.read_bytes()), 3))
def test_no_byte_of_a_manifest_may_be_dropped_or_doubled(offset: int) -> None:
    raw = dump(TINY)
    rejection(raw[:offset] + raw[offset + 1 :])
    rejection(raw[:offset] + raw[offset : offset + 1] + raw[offset:])


def test_whitespace_counts() -> None:
    raw = dump(TINY)
    for other in (
        raw[:-1],
        raw + b"\n",
        raw + b" ",
        b" " + raw,
        b"\xef\xbb\xbf" + raw,
        raw.replace(b"\n", b"\r\n"),
        raw.replace(b"  ", b"\t"),
        raw.replace(b": 1,", b":  1,", 1),
        json.dumps(json.loads(raw)).encode(),
        raw.decode().encode("utf-16"),
    ):
        assert other != raw
        assert "manifest.json was altered" in rejection(other)


def test_escapes_and_doubled_keys_are_not_canonical() -> None:
    raw = dump(TINY)
    assert "altered" in rejection(raw.replace("é".encode(), rb"\u00e9"))
    assert "altered" in rejection(raw.replace(b'  "name"', b'  "name": "x",\n  "name"', 1))


def test_a_manifest_in_another_order_or_with_other_numbers_is_not_canonical() -> None:
    data = tiny()
    name = data.pop("name")
    assert "canonical" in rejection(signed({"name": name, **data}))
    data = tiny()
    data["presets"]["default"]["alpha"] = 4
    assert "canonical" in rejection(signed(data))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0",
        b"{",
        b"not json",
        b"\xff\xfe\xfd",
        b"[" * 100_000,
        b'{"format": 1e',
        b"\x80\x02.",
    ],
    ids=["empty", "null", "brace", "text", "bytes", "deep", "cut", "pickle"],
)
def test_what_is_no_json_is_refused(raw: bytes) -> None:
    assert "manifest.json is not JSON" in rejection(raw)


@pytest.mark.parametrize("raw", [b"null", b"[]", b"1", b'"text"', b"{}", b'{"format": "1"}'])
def test_json_without_a_format_is_refused(raw: bytes) -> None:
    assert "manifest.json has no format number" in rejection(raw)


@pytest.mark.parametrize("number", [0, 1, 99, -1])
def test_a_manifest_of_another_format_says_which_and_what_to_do(number: int) -> None:
    message = rejection(signed({**tiny(), "format": number}))
    assert f"has format {number}, this mdruntime reads format 4" in message
    assert "install the mdruntime that belongs to the exporter" in message


def test_a_newer_format_is_named_whatever_else_it_holds() -> None:
    assert "has format 7" in rejection(b'{"format": 7, "everything": ["is", "different"]}')


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_lacks_are_refused(number: str) -> None:
    raw = dump(TINY).replace(b'"log_prob": 0.05', f'"log_prob": {number}'.encode())
    assert "altered" in rejection(raw)


def test_half_a_character_is_refused() -> None:
    assert "altered" in rejection(dump(TINY).replace(b'"tiny"', rb'"\ud800"'))
