"""Bundles: every kind of damage is one clear error, and the manifest's bytes never drift."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdruntime import BundleError, load, open_bundle
from mdruntime.bundle import MANIFEST, file_spec
from mdruntime.manifest import (
    ContextRow,
    DenoiserSpec,
    FileSpec,
    GraphSpec,
    ImageSpec,
    Manifest,
    TensorSpec,
    VerificationRecord,
    WeightsSpec,
    dump,
    parse,
)
from mdruntime.sampling import Sampling
from mdruntime.verify import DECODER_VECTORS, DENOISER_VECTORS, verify

Data = dict[str, Any]

FILES = (
    "decoder.onnx",
    "denoiser.onnx",
    "denoiser.tensorrt.onnx",
    "denoiser.weights",
    "report.md",
    "verify/decoder.npz",
    "verify/denoiser.npz",
)

TINY = Manifest(
    format=1,
    name="tiny",
    family="maskgit",
    task="class to image",
    precision="fp16",
    weights=WeightsSpec("checkpoint", -1, {"é.pth": "0" * 64}, 123, "MIT"),
    denoiser=DenoiserSpec(4, 5, 0, (2, 2), 6, 6, 3, 1, 2, 8, (ContextRow(4, 7, 10),)),
    image=ImageSpec(8, 8),
    graphs={
        "denoiser": GraphSpec(
            file="denoiser.onnx",
            opset=23,
            spellings={"tensorrt": "graphs/denoiser.tensorrt.onnx"},
            inputs=(TensorSpec("tokens", "int32", ("rows", "m")),),
            outputs=(TensorSpec("present.0.key", "float16", ("rows", 2, 5, 8)),),
            caches=(("past.0.key", "present.0.key"),),
            float32_operators=("Softmax",),
        )
    },
    buckets=(5,),
    presets={"default": Sampling(alpha=4, exploration=(1, 0))},
    files={
        "denoiser.onnx": FileSpec("1" * 64, 10),
        "graphs/denoiser.tensorrt.onnx": FileSpec("2" * 64, 20),
    },
    verification=VerificationRecord("PyTorch", {"log_prob": 0.05}, {"log_prob": 1e-05}),
    toolchain={"mdexport": "0.1.0"},
)

GOLDEN = """\
{
  "format": 1,
  "name": "tiny",
  "family": "maskgit",
  "task": "class to image",
  "precision": "fp16",
  "weights": {
    "origin": "checkpoint",
    "seed": -1,
    "files": {
      "é.pth": "0000000000000000000000000000000000000000000000000000000000000000"
    },
    "parameters": 123,
    "licence": "MIT"
  },
  "denoiser": {
    "length": 4,
    "canvas": 5,
    "first": 0,
    "grid": [
      2,
      2
    ],
    "codebook": 6,
    "mask_token": 6,
    "classes": 3,
    "layers": 1,
    "heads": 2,
    "head_size": 8,
    "context": [
      {
        "position": 4,
        "offset": 7,
        "dropped": 10
      }
    ]
  },
  "image": {
    "height": 8,
    "width": 8
  },
  "graphs": {
    "denoiser": {
      "file": "denoiser.onnx",
      "opset": 23,
      "spellings": {
        "tensorrt": "graphs/denoiser.tensorrt.onnx"
      },
      "inputs": [
        {
          "name": "tokens",
          "dtype": "int32",
          "shape": [
            "rows",
            "m"
          ]
        }
      ],
      "outputs": [
        {
          "name": "present.0.key",
          "dtype": "float16",
          "shape": [
            "rows",
            2,
            5,
            8
          ]
        }
      ],
      "caches": [
        [
          "past.0.key",
          "present.0.key"
        ]
      ],
      "float32_operators": [
        "Softmax"
      ]
    }
  },
  "buckets": [
    5
  ],
  "presets": {
    "default": {
      "rounds": 8,
      "schedule": "cosine",
      "entropy_bound": 0.0,
      "order": "moment",
      "exploitation_order": "moment",
      "exploration_order": "halton",
      "exploration": [
        1.0,
        0.0
      ],
      "alpha": 4.0,
      "annealing": true,
      "temperature": 1.0,
      "tokens": "order",
      "substeps": 1,
      "refresh": "chosen",
      "refresh_interval": 1,
      "guidance": 0.0,
      "guidance_schedule": "constant",
      "guidance_power": 3.0,
      "guidance_interval": [
        0.0,
        1.0
      ]
    }
  },
  "files": {
    "denoiser.onnx": {
      "sha256": "1111111111111111111111111111111111111111111111111111111111111111",
      "bytes": 10
    },
    "graphs/denoiser.tensorrt.onnx": {
      "sha256": "2222222222222222222222222222222222222222222222222222222222222222",
      "bytes": 20
    }
  },
  "verification": {
    "reference": "PyTorch",
    "limits": {
      "log_prob": 0.05
    },
    "measured": {
      "log_prob": 1e-05
    }
  },
  "toolchain": {
    "mdexport": "0.1.0"
  },
  "digest": "10e18506479b8be54a74a686f4d3e970496e14715482d4c465068d5c13b60e24"
}
"""
GOLDEN_DIGEST = "10e18506479b8be54a74a686f4d3e970496e14715482d4c465068d5c13b60e24"
GOLDEN_FILE = "2a183ab98b524774856d418b73751a42d59b8acd93aa40b5e4a5ec658a993387"


def refusal(folder: Path) -> str:
    """Return the one line that says why a folder is no bundle."""
    with pytest.raises(BundleError) as caught:
        open_bundle(folder)
    message = str(caught.value)
    assert message.strip() == message != ""
    assert "\n" not in message
    return message


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


@pytest.fixture(scope="module")
def damaged(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private copy that tests of this file damage and mend again."""
    return Path(shutil.copytree(digits_bundle, tmp_path_factory.mktemp("damaged") / "digits"))


@pytest.fixture
def bundle(damaged: Path, digits_bundle: Path) -> Iterator[Path]:
    """Yield the copy; afterwards it is whole again."""
    yield damaged
    for name in (*FILES, MANIFEST):
        path = damaged / name
        if path.is_symlink() or path.is_fifo() or path.is_dir():
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.copyfile(digits_bundle / name, path)


def test_a_bundle_holds_what_its_manifest_lists_and_nothing_else(digits_bundle: Path) -> None:
    found = [path for path in digits_bundle.rglob("*") if path.is_file()]
    names = {path.relative_to(digits_bundle).as_posix() for path in found}
    assert names == {*FILES, MANIFEST}
    assert set(open_bundle(digits_bundle).manifest.files) == set(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.37, 1.0])
def test_one_flipped_bit_is_found_in_every_file(bundle: Path, name: str, where: float) -> None:
    path = bundle / name
    raw = bytearray(path.read_bytes())
    raw[int(where * (len(raw) - 1))] ^= 1
    path.write_bytes(raw)
    message = refusal(bundle)
    assert message.startswith(f"{name} does not match {MANIFEST} (its SHA-256 differs)")
    assert "copy or export the bundle again" in message


def test_only_sizes_are_compared_when_that_is_asked_for(bundle: Path) -> None:
    path = bundle / "report.md"
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"d", b"e", 1))
    assert open_bundle(bundle, check=False).folder == bundle
    path.write_bytes(raw + b" ")
    with pytest.raises(BundleError, match=rf"report\.md.*{len(raw)} bytes, found {len(raw) + 1}"):
        open_bundle(bundle, check=False)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_found(bundle: Path, name: str) -> None:
    path = bundle / name
    size = path.stat().st_size
    os.truncate(path, size - 1)
    message = refusal(bundle)
    assert message.startswith(f"{name} does not match")
    assert f"expected {size} bytes, found {size - 1}" in message


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    assert refusal(bundle).startswith(f"{name} is missing from the bundle")


def test_a_folder_or_a_pipe_in_place_of_a_file_is_found(bundle: Path) -> None:
    (bundle / "denoiser.weights").unlink()
    (bundle / "denoiser.weights").mkdir()
    assert refusal(bundle).startswith("denoiser.weights is missing")
    (bundle / "denoiser.weights").rmdir()
    os.mkfifo(bundle / "denoiser.weights")
    assert refusal(bundle).startswith("denoiser.weights is missing")


def test_a_link_that_leaves_the_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "weights"
    (bundle / "denoiser.weights").rename(outside)
    (bundle / "denoiser.weights").symlink_to(outside)
    assert refusal(bundle).startswith("denoiser.weights is a link that leaves the bundle")


def test_a_link_that_leads_to_itself_is_refused(bundle: Path) -> None:
    (bundle / "report.md").unlink()
    (bundle / "report.md").symlink_to("report.md")
    assert refusal(bundle).startswith("report.md is ")


def test_a_linked_folder_out_of_the_bundle_is_refused(
    altered: Callable[[], Path], tmp_path: Path
) -> None:
    folder = altered()
    (folder / "verify").rename(tmp_path / "elsewhere")
    (folder / "verify").symlink_to(tmp_path / "elsewhere")
    assert "is a link that leaves the bundle" in refusal(folder)


def test_links_within_a_bundle_and_to_a_bundle_are_fine(bundle: Path, tmp_path: Path) -> None:
    inside = bundle / "weights.bin"
    (bundle / "denoiser.weights").rename(inside)
    (bundle / "denoiser.weights").symlink_to("weights.bin")
    (tmp_path / "link").symlink_to(bundle)
    try:
        assert open_bundle(tmp_path / "link").manifest.name == "digits"
    finally:
        inside.unlink()


def test_what_is_no_folder_is_no_bundle(digits_bundle: Path, tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent").endswith(
        "'" + str(tmp_path / "absent") + "' does not exist"
    )
    assert refusal(digits_bundle / MANIFEST).endswith("is a file")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert refusal(tmp_path / "dangling").endswith("does not exist")
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").endswith(f"holds no {MANIFEST}, so it is not a bundle")
    (tmp_path / "odd" / MANIFEST).mkdir(parents=True)
    assert "holds no manifest.json" in refusal(tmp_path / "odd")


def test_an_unfinished_build_is_no_bundle(altered: Callable[[], Path], tmp_path: Path) -> None:
    (tmp_path / "new.partial").mkdir()
    assert "(it is an unfinished build)" in refusal(tmp_path / "new.partial")
    whole = altered()
    partial = whole.rename(tmp_path / "digits.partial")
    assert "is an unfinished, unverified build" in refusal(partial)
    # Killed after its first manifest, and given the final name by hand.
    renamed = partial.rename(tmp_path / "digits")
    manifest = open_bundle(renamed).manifest
    unverified = replace(manifest, verification=replace(manifest.verification, measured={}))
    (renamed / MANIFEST).write_bytes(dump(unverified))
    assert "is an unfinished, unverified build" in refusal(renamed)


def test_the_format_of_the_manifest_is_golden() -> None:
    assert dump(TINY).decode() == GOLDEN
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


@pytest.mark.parametrize("offset", range(0, len(GOLDEN.encode()), 3))
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


@pytest.mark.parametrize("number", [0, 2, 99, -1])
def test_a_manifest_of_another_format_says_which_and_what_to_do(number: int) -> None:
    message = rejection(signed({**tiny(), "format": number}))
    assert f"has format {number}, this mdruntime reads format 1" in message
    assert "install the mdruntime that belongs to the exporter" in message


def test_a_newer_format_is_named_whatever_else_it_holds() -> None:
    assert "has format 7" in rejection(b'{"format": 7, "everything": ["is", "different"]}')


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_lacks_are_refused(number: str) -> None:
    raw = dump(TINY).replace(b'"log_prob": 0.05', f'"log_prob": {number}'.encode())
    assert "altered" in rejection(raw)


def test_half_a_character_is_refused() -> None:
    assert "altered" in rejection(dump(TINY).replace(b'"tiny"', rb'"\ud800"'))


def test_a_missing_and_an_unknown_field_are_both_named() -> None:
    data = tiny()
    del data["buckets"]
    data["bukets"] = [5]
    message = rejection(signed(data))
    assert "manifest lacks 'buckets', has the unknown field 'bukets'" in message


def test_every_field_is_required() -> None:
    for name in set(tiny()) - {"digest"}:
        data = tiny()
        del data[name]
        expected = "has no format number" if name == "format" else f"manifest lacks {name!r}"
        assert expected in rejection(signed(data))


def _set(data: Data, path: str, value: object) -> Data:
    *parents, last = path.split("/")
    place: Any = data
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[int(last) if isinstance(place, list) else last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("format", True, "manifest.format must be an integer, got True"),
        ("name", 5, "manifest.name must be a text, got 5"),
        ("weights", [], "manifest.weights must be an object, got []"),
        ("weights/seed", "1", "manifest.weights.seed must be an integer, got '1'"),
        ("weights/seed", 1.0, "manifest.weights.seed must be an integer, got 1.0"),
        ("weights/files", ["a"], "manifest.weights.files must be an object"),
        ("denoiser/length", None, "manifest.denoiser.length must be an integer, got None"),
        ("denoiser/grid", 4, "manifest.denoiser.grid must be a list, got 4"),
        ("denoiser/grid/1", "2", "manifest.denoiser.grid[1] must be an integer"),
        ("denoiser/context/0", {}, "manifest.denoiser.context[0] lacks 'dropped', lacks 'offset'"),
        ("graphs/denoiser/caches/0", ["a"], "caches[0] must be a list of 2"),
        ("graphs/denoiser/inputs/0/shape/0", 1.5, "shape[0] must be int or str, got 1.5"),
        ("graphs/denoiser/inputs/0/shape/0", True, "shape[0] must be int or str, got True"),
        ("presets/default", 8, "manifest.presets.default must be an object"),
        ("presets/default/alpha", "4", "manifest.presets.default.alpha must be float"),
        ("presets/default/alpha", True, "manifest.presets.default.alpha must be float"),
        ("presets/default/annealing", 1, "manifest.presets.default.annealing must be"),
        ("presets/default/rounds", 0, "manifest.presets.default: rounds must be between 1"),
        ("presets/default/order", "best", "manifest.presets.default: order must be one of"),
        ("presets/default/exploration", [1.0], "exploration must be a list of 2"),
        ("files/denoiser.onnx/bytes", 1.5, "bytes must be an integer, got 1.5"),
        ("verification/limits/log_prob", [], "limits.log_prob must be float, got []"),
        ("toolchain/mdexport", 1, "manifest.toolchain.mdexport must be a text, got 1"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_place(
    path: str, value: object, expected: str
) -> None:
    assert expected in rejection(signed(_set(tiny(), path, value)))


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../../x", "..", "", ".", "a\\..\\b", "C:\\x", "a\0b", "//x"]
)
def test_a_path_that_could_leave_the_bundle_is_refused(path: str) -> None:
    data = tiny()
    data["files"][path] = {"sha256": "1" * 64, "bytes": 1}
    assert rejection(signed(data)).endswith("leaves the bundle; do not trust this bundle")
    for place in ("graphs/denoiser/file", "graphs/denoiser/spellings/tensorrt"):
        data = _set(tiny(), place, path)
        data["files"][path] = {"sha256": "1" * 64, "bytes": 1}
        assert "leaves the bundle" in rejection(signed(data))


def test_a_graph_without_a_hash_is_refused() -> None:
    data = _set(tiny(), "graphs/denoiser/file", "other.onnx")
    assert "names the graph 'other.onnx' but not its hash" in rejection(signed(data))


def test_presets_must_have_a_default() -> None:
    data = tiny()
    data["presets"]["mine"] = data["presets"].pop("default")
    assert "manifest.presets lacks 'default'" in rejection(signed(data))


def test_a_graph_that_is_not_there_is_named_with_those_that_are(digits_bundle: Path) -> None:
    opened = open_bundle(digits_bundle)
    with pytest.raises(BundleError, match="no graph 'encoder', only denoiser, decoder"):
        opened.path("encoder")
    assert opened.path("denoiser", "tensorrt").name == "denoiser.tensorrt.onnx"
    assert opened.path("denoiser", "other").name == "denoiser.onnx"


def _rewritten(folder: Path, name: str, raw: bytes) -> None:
    """Replace a file and its hash, as somebody does who knows the format."""
    (folder / name).write_bytes(raw)
    manifest = open_bundle(folder, check=False).manifest if not raw else _manifest(folder)
    files = {**manifest.files, name: file_spec(folder / name)}
    (folder / MANIFEST).write_bytes(dump(replace(manifest, files=files)))


def _manifest(folder: Path) -> Manifest:
    return parse((folder / MANIFEST).read_bytes())


@pytest.mark.parametrize("name", [DENOISER_VECTORS, DECODER_VECTORS])
@pytest.mark.parametrize("raw", [b"PK", b"PK\3\4" + bytes(100), b"\x93NUMPY", b"garbage" * 9])
def test_vectors_that_cannot_be_read_are_a_damaged_bundle(
    bundle: Path, name: str, raw: bytes
) -> None:
    _rewritten(bundle, name, raw)
    with pytest.raises(BundleError, match=rf"{Path(name).name} cannot be read"):
        verify(open_bundle(bundle))


def test_vectors_without_their_arrays_are_a_damaged_bundle(bundle: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "empty.npz")
    _rewritten(bundle, DENOISER_VECTORS, (tmp_path / "empty.npz").read_bytes())
    with pytest.raises(BundleError, match=r"denoiser\.npz holds no whole passes"):
        verify(open_bundle(bundle))
    np.savez(tmp_path / "part.npz", allow_pickle=False, **{"000.tokens": np.zeros((1, 1))})
    _rewritten(bundle, DENOISER_VECTORS, (tmp_path / "part.npz").read_bytes())
    with pytest.raises(BundleError, match=r"denoiser\.npz holds no whole passes"):
        verify(open_bundle(bundle))


def test_a_graph_that_is_none_is_a_damaged_bundle(bundle: Path) -> None:
    _rewritten(bundle, "denoiser.onnx", b"no graph at all")
    with pytest.raises(BundleError, match=r"ONNX Runtime cannot load denoiser\.onnx: ") as caught:
        load(bundle)
    assert "\n" not in str(caught.value)
