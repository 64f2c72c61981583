"""Folders of checkpoints, in the layouts in which they are published and cached."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mdzoo import checkpoint, folder
from mdzoo.checkpoint import CheckpointError


def put(path: Path, value: float = 1.0, name: str = "a") -> Path:
    """Write a file of weights, in the format of its suffix, that holds ``value``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: torch.tensor([value])}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def put_index(path: Path, weight_map: Any) -> Path:
    path.write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}))
    return path


def put_shards(path: Path, stem: str = "model", suffix: str = "safetensors") -> Path:
    """Write two shards with one tensor each and return their index."""
    names = {f"{key}": f"{stem}-0000{i}-of-00002.{suffix}" for i, key in ((1, "a"), (2, "b"))}
    for value, (key, name) in enumerate(names.items()):
        put(path / name, value, key)
    return put_index(path / f"{stem}.{suffix}.index.json", names)


def values(state: dict[str, Tensor]) -> dict[str, float]:
    return {key: tensor.item() for key, tensor in state.items()}


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "diffusion_pytorch_model.safetensors",
        "pytorch_model.bin",
        "generator_titok_l32.bin",
        "ImageNet_256_tiny.pth",
        "last.ckpt",
        "vq_ds16_c2i.pt",
        "model-00001-of-00001.safetensors",
        "maskgit_imagenet256_checkpoint",
        "model.fp16.safetensors",
    ],
)
def test_the_only_file_of_weights_is_read(tmp_path: Path, name: str) -> None:
    put(tmp_path / name)
    for other in ("config.json", "README.md", ".gitattributes"):
        (tmp_path / other).write_text('{"abcd":{}}')
    for other in ("optimizer.pt", "scheduler.bin", "training_args.bin", "rng_state_0.pth"):
        if not name.startswith("maskgit"):
            put(tmp_path / other, 2)
    assert values(checkpoint.read(tmp_path)) == {"a": 1}


@pytest.mark.parametrize(
    ("wanted", "others"),
    [
        ("model.safetensors", ["pytorch_model.bin", "model.fp16.safetensors"]),
        ("pytorch_model.bin", ["model.fp16.safetensors"]),
        (
            "diffusion_pytorch_model.safetensors",
            ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"],
        ),
        ("mdm-170M-100e18.safetensors", ["mdm-170M-100e18.fp16.safetensors"]),
    ],
)
def test_the_preferred_form_of_one_model_is_read(
    tmp_path: Path, wanted: str, others: list[str]
) -> None:
    put(tmp_path / wanted, 1)
    for other in others:
        put(tmp_path / other, 2)
    assert values(checkpoint.read(tmp_path)) == {"a": 1}


@pytest.mark.parametrize(
    ("stem", "suffix"),
    [
        ("model", "safetensors"),
        ("pytorch_model", "bin"),
        ("diffusion_pytorch_model", "safetensors"),
        ("diffusion_pytorch_model.fp16", "safetensors"),
    ],
)
def test_shards_are_joined(tmp_path: Path, stem: str, suffix: str) -> None:
    index = put_shards(tmp_path, stem, suffix)
    assert values(checkpoint.read(tmp_path)) == {"a": 0, "b": 1}
    assert values(checkpoint.read(index)) == {"a": 0, "b": 1}
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.glob("*-of-*")
    }
    assert len(digests) == 2
    assert checkpoint.hashes(tmp_path) == digests


def test_the_hash_of_a_folder_is_that_of_its_file(tmp_path: Path) -> None:
    path = put(tmp_path / "last.ckpt")
    expected = {"last.ckpt": checkpoint.sha256(path)}
    assert checkpoint.hashes(tmp_path) == checkpoint.hashes(path) == expected


def put_cache(path: Path, revisions: list[str]) -> Path:
    """Write the cache of a repository as huggingface_hub lays it out, with links into blobs."""
    for value, revision in enumerate(revisions):
        blob = put(path / "blobs" / f"{value:040x}", value)
        snapshot = path / "snapshots" / revision
        (snapshot / "transformer").mkdir(parents=True)
        link = snapshot / "transformer" / "diffusion_pytorch_model.safetensors"
        link.symlink_to(Path("../../..") / "blobs" / blob.name)
        (snapshot / "transformer" / "config.json").write_text(json.dumps({"revision": revision}))
    (path / "refs").mkdir()
    return path


def test_the_only_snapshot_of_a_cache_is_read_through_its_links(tmp_path: Path) -> None:
    cache = put_cache(tmp_path / "models--amused--amused-256", ["c0ffee"])
    assert values(checkpoint.read(cache)) == {"a": 0}
    assert folder.root(cache) == cache / "snapshots" / "c0ffee"
    assert values(checkpoint.read(folder.root(cache) / "transformer")) == {"a": 0}
    assert folder.read_json(cache, "transformer/config.json") == {"revision": "c0ffee"}
    assert values(checkpoint.read(tmp_path)) == {"a": 0}


def test_the_main_branch_decides_among_snapshots(tmp_path: Path) -> None:
    cache = put_cache(tmp_path, ["c0ffee", "decade"])
    (cache / "refs" / "main").write_text("decade\n")
    assert values(checkpoint.read(cache)) == {"a": 1}
    assert folder.read_json(cache, "transformer/config.json") == {"revision": "decade"}


@pytest.mark.parametrize("main", ["", "facade", "../../elsewhere"])
def test_snapshots_among_which_nothing_decides_are_named(tmp_path: Path, main: str) -> None:
    cache = put_cache(tmp_path, ["c0ffee", "decade"])
    (cache / "refs" / "main").write_text(main)
    with pytest.raises(CheckpointError, match="found c0ffee, decade; name one of them"):
        checkpoint.read(cache)


def test_a_link_to_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a link to nothing"):
        checkpoint.read(tmp_path)


def test_names_may_differ_in_case(tmp_path: Path) -> None:
    put(tmp_path / "ImageNet_384_large.pth", 1)
    assert values(checkpoint.read(tmp_path / "ImageNet_384_Large.pth")) == {"a": 1}
    put(tmp_path / "ImageNet_384_Large.pth", 2)
    assert values(checkpoint.read(tmp_path / "ImageNet_384_Large.pth")) == {"a": 2}
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.read(tmp_path / "ImageNet_384_LARGE.pth")


def test_files_are_looked_for_one_folder_down(tmp_path: Path) -> None:
    put(tmp_path / "ckpts" / "last.ckpt")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "model.yaml").touch()
    assert values(checkpoint.read(tmp_path)) == {"a": 1}
    put(tmp_path / "vqvae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="found weights in ckpts, vqvae; name one of them"):
        checkpoint.read(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ["a.pth", "b.pth"],
        ["diffusion_pytorch_model.safetensors", "model.safetensors"],
        ["first", "second"],
    ],
)
def test_several_models_are_named(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        put(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"found {', '.join(names)}; name one of them"):
        checkpoint.read(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = put_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"needs model-00002-of-00002\.safetensors beside"):
        checkpoint.read(index)


def test_a_missing_index_is_named(tmp_path: Path) -> None:
    put_shards(tmp_path).unlink()
    with pytest.raises(CheckpointError, match=r"download model\.safetensors\.index\.json too"):
        checkpoint.read(tmp_path)


PLACES = ["../x.pth", "/x.pth", "x/../y.pth", "..", "sub/x.pth", r"..\x.pth", "", 3, None, ["x"]]


@pytest.mark.parametrize("place", PLACES)
def test_an_index_cannot_name_files_elsewhere(tmp_path: Path, place: object) -> None:
    put(tmp_path / "x.pth")
    (tmp_path / "in").mkdir()
    index = put_index(tmp_path / "in" / "x.index.json", {"a": place})
    with pytest.raises(CheckpointError, match="must name files beside it, found") as caught:
        checkpoint.read(index)
    assert "\n" not in str(caught.value)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
INDICES: list[tuple[str, str]] = [
    ("[]", "must hold settings by name, found a list"),
    ("{}", "must hold weight_map, the file of each tensor, found NoneType"),
    ('{"weight_map": []}', "must hold weight_map, .* found list"),
    ('{"weight_map": {}}', "must hold weight_map, .* found dict"),
    ("{", "must be a file of JSON, found a damaged or foreign one"),
    ("[" * 200_000, "must be a file of JSON, found a damaged or foreign one"),
    ("<!DOCTYPE html>", "found a web page"),
    (POINTER, "found a Git LFS pointer"),
    ("", "found an empty file"),
]


@pytest.mark.parametrize(("text", "message"), INDICES, ids=[case[1] for case in INDICES])
def test_a_damaged_index_is_told(tmp_path: Path, text: str, message: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.read(tmp_path)
    assert str(index) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tensor_in_two_shards_is_told(tmp_path: Path) -> None:
    index = put_shards(tmp_path)
    save_file(
        {"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"00002-of-00002.* found a in two shards; download"):
        checkpoint.read(index)


def test_a_tensor_that_is_not_in_its_shard_is_told(tmp_path: Path) -> None:
    index = put_shards(tmp_path)
    put(tmp_path / "model-00001-of-00002.safetensors", name="c")
    with pytest.raises(CheckpointError, match=r"00001-of-00002.* found no a; download both again"):
        checkpoint.read(index)


@pytest.mark.parametrize("content", [POINTER, "<html>"])
def test_a_shard_that_is_not_there_yet_is_told(tmp_path: Path, content: str) -> None:
    put_shards(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_text(content)
    with pytest.raises(
        CheckpointError, match=f"{re.escape(str(shard))} must be .*; (run|download)"
    ):
        checkpoint.read(tmp_path)


def test_settings_are_read_from_a_folder_a_neighbour_or_the_file_itself(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"heads": 12}')
    neighbour = put(tmp_path / "model.safetensors")
    for path in (tmp_path, neighbour, config, tmp_path / "CONFIG.JSON", put_shards(tmp_path)):
        assert folder.read_json(path, "config.json") == {"heads": 12}
    with pytest.raises(CheckpointError, match=r"vqvae/config\.json does not exist"):
        folder.read_json(tmp_path, "vqvae/config.json")


def test_a_folder_that_may_not_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        checkpoint.read(tmp_path)


def test_folders_without_end_are_left_alone(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c" / "d" / "e"
    put(deep / "last.ckpt")
    with pytest.raises(CheckpointError, match="must be a file, found a folder with a; name one"):
        checkpoint.read(tmp_path)
