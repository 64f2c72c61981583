"""The fields of a manifest: what is missing, unknown, of another type or unsafe is named."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from mdruntime import BundleError
from mdruntime.manifest import parse

Data = dict[str, Any]

GOLDEN = Path(__file__).parent / "golden" / "manifest.json"


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
    data: Data = json.loads(GOLDEN.read_bytes())
    return data


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
        ("format", True, "has format True, this mdruntime reads format 4"),
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
        ("presets/default/annealing", True, "manifest.presets.default.annealing must be a text"),
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
    for place in (
        "graphs/denoiser/file",
        "graphs/denoiser/spellings/tensorrt",
        "text/tokenizer",
        "prompt/tokenizer",
    ):
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
