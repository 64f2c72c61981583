"""Bundles: every kind of damage to a file is one clear error."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mdruntime import BundleError, load, open_bundle
from mdruntime.bundle import MANIFEST, file_spec
from mdruntime.manifest import Manifest, dump, parse
from mdruntime.verify import DECODER_VECTORS, DENOISER_VECTORS, verify

FILES = (
    "decoder.onnx",
    "decoder.tensorrt.onnx",
    "denoiser.onnx",
    "denoiser.tensorrt.onnx",
    "denoiser.weights",
    "encoder.onnx",
    "encoder.tensorrt.onnx",
    "head.onnx",
    "report.md",
    "verify/decoder.npz",
    "verify/denoiser.npz",
    "verify/encoder.npz",
)


def refusal(folder: Path) -> str:
    """Return the one line that says why a folder is no bundle."""
    with pytest.raises(BundleError) as caught:
        open_bundle(folder)
    message = str(caught.value)
    assert message.strip() == message != ""
    assert "\n" not in message
    return message


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


def test_a_graph_that_is_not_there_is_named_with_those_that_are(digits_bundle: Path) -> None:
    opened = open_bundle(digits_bundle)
    with pytest.raises(BundleError, match="no graph 'condition', only denoiser, head, decoder"):
        opened.path("condition")
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
