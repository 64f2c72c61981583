"""Checkpoints named as on the hub: what is fetched, and what is said where nothing can be."""

import inspect
import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from mdzoo.checkpoint import CheckpointError
from mdzoo.hub import resolve

AMUSED = [
    ".gitattributes",
    "README.md",
    "model_index.json",
    "logo.png",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "vqvae/config.json",
    "vqvae/diffusion_pytorch_model.safetensors",
    "vqvae/diffusion_pytorch_model.bin",
]
LLADA = [
    "README.md",
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "modeling_llada.py",
    "tokenizer.json",
    "onnx/model.onnx",
    "old/pytorch_model.bin",
]
HALTON = ["README.md", "ImageNet_256_tiny.pth", "ImageNet_384_large.pth"]
NESTED = [
    "pretrained_maskgit/MaskGIT/MaskGIT_ImageNet_256.pth",
    "pretrained_maskgit/MaskGIT/MaskGIT_ImageNet_512.pth",
    "pretrained_maskgit/VQGAN/last.ckpt",
    "pretrained_maskgit/VQGAN/model.yaml",
]
REPOSITORIES = {
    "amused/amused-256": AMUSED,
    "GSAI-ML/LLaDA-8B-Base": LLADA,
    "llvictorll/Halton-Maskgit": HALTON,
    "llvictorll/Maskgit-pytorch": NESTED,
    "odd/names": ["a[1].pth", "a1.pth"],
}


class Hub:
    """Stands for the package huggingface_hub: repositories of empty files, and its cache."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.fetched: list[str] = []
        self.revisions: set[str | None] = set()
        self.listing: Exception | None = None
        self.download: Exception | None = None

    def HfApi(self) -> "Hub":  # noqa: N802  # its name in the package
        return self

    def list_repo_files(self, repo_id: str, *, revision: str | None = None) -> Sequence[str]:
        if self.listing:
            raise self.listing
        self.revisions.add(revision)
        return REPOSITORIES[repo_id]

    def snapshot_download(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        allow_patterns: Sequence[str] = (),
        local_files_only: bool = False,
    ) -> str:
        snapshot = self.cache / repo_id.replace("/", "--")
        if self.download or (local_files_only and not snapshot.is_dir()):
            raise self.download or FileNotFoundError(repo_id)
        self.revisions.add(revision)
        for name in () if local_files_only else REPOSITORIES[repo_id]:
            if any(fnmatchcase(name, pattern) for pattern in allow_patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                (snapshot / name).touch()
                self.fetched.append(name)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


@pytest.mark.parametrize("text", ["weights/last.ckpt", "/x", ".", "hub/model.pth", "Hub:a/b"])
@pytest.mark.parametrize("kind", [str, Path])
def test_paths_are_returned_as_they_are(text: str, kind: Callable[[str], str | Path]) -> None:
    assert resolve(kind(text)) == Path(text)


def test_a_pipeline_is_fetched_in_full_precision_with_its_settings(hub: Hub) -> None:
    assert resolve(Path("hub:amused/amused-256")) == hub.cache / "amused--amused-256"
    left = {".gitattributes", "README.md", "logo.png", "vqvae/diffusion_pytorch_model.bin"}
    assert set(hub.fetched) == {name for name in AMUSED if "fp16" not in name} - left


def test_one_part_of_a_pipeline_is_fetched_alone(hub: Hub) -> None:
    found = resolve("hub:amused/amused-256/vqvae")
    assert found == hub.cache / "amused--amused-256" / "vqvae"
    assert hub.fetched == ["vqvae/config.json", "vqvae/diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("inside", ["", "/model.safetensors.index.json"])
def test_shards_come_with_their_index_and_tokenizer_but_no_code(hub: Hub, inside: str) -> None:
    resolve(f"hub:GSAI-ML/LLaDA-8B-Base{inside}")
    assert hub.fetched == [
        *("config.json", "generation_config.json", "model-00001-of-00002.safetensors"),
        *("model-00002-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"),
    ]


def test_a_file_may_differ_in_case_and_comes_alone(hub: Hub) -> None:
    found = resolve("hub:llvictorll/Halton-Maskgit/ImageNet_384_Large.pth")
    assert found == hub.cache / "llvictorll--Halton-Maskgit" / "ImageNet_384_large.pth"
    assert hub.fetched == ["ImageNet_384_large.pth"]


def test_folders_may_differ_in_case(hub: Hub) -> None:
    found = resolve("hub:llvictorll/Maskgit-pytorch/pretrained_maskgit/vqgan")
    assert found == hub.cache / "llvictorll--Maskgit-pytorch" / "pretrained_maskgit" / "VQGAN"
    assert hub.fetched == NESTED[2:]


def test_a_name_is_no_pattern(hub: Hub) -> None:
    assert resolve("hub:odd/names/a[1].pth").name == "a[1].pth"
    assert hub.fetched == ["a[1].pth"]


def test_the_revision_is_asked_for_each_time(hub: Hub) -> None:
    resolve("hub:amused/amused-256@refs-1.0/transformer")
    assert hub.revisions == {"refs-1.0"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "hub:llvictorll/Halton-Maskgit",
            "found ImageNet_256_tiny.pth, ImageNet_384_large.pth; name one of them",
        ),
        ("hub:llvictorll/Maskgit-pytorch", "hub:llvictorll/Maskgit-pytorch/pretrained_maskgit/Ma"),
        ("hub:amused/amused-256/unet", "is not there; found .gitattributes, README.md"),
    ],
)
def test_what_is_unclear_is_said_before_anything_is_fetched(
    hub: Hub, text: str, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        resolve(text)
    assert not hub.fetched


@pytest.mark.parametrize(
    "text",
    [
        *("hub:", "hub:gpt2", "hub:a/b/", "hub:a/b@", "hub:a/b@/x", "hub:a/b/../c", "hub:a/b//c"),
        *("hub:a b/c", "hub:a/b\n", "hub:../b", "hub:a/..", "hub:/a/b"),
    ],
)
def test_names_of_another_form_are_refused(hub: Hub, text: str) -> None:
    with pytest.raises(CheckpointError, match="must be named hub:owner/name") as caught:
        resolve(text)
    assert "\n" not in str(caught.value)
    assert not hub.revisions


def error(*names: str) -> Exception:
    """An exception as the package has them, with those it derives from."""
    kind: type[Exception] = Exception
    for name in reversed(names):
        kind = type(name, (kind,), {})
    return kind("first\nsecond")


REFUSED = [
    (error("GatedRepoError", "RepositoryNotFoundError"), "is gated; accept its terms on its page"),
    (error("RepositoryNotFoundError", "HfHubHTTPError"), "does not exist or is private; correct"),
    (error("RevisionNotFoundError", "HfHubHTTPError"), "has no such revision; correct what"),
    (error("HFValidationError"), "is no valid name; correct it"),
    (error("OfflineModeIsEnabled"), r"is not on this machine .* \(OfflineModeIsEnabled\); connect"),
    (error("ConnectError"), r"the hub cannot be reached \(ConnectError\); connect this machine"),
]


@pytest.mark.parametrize(("raised", "message"), REFUSED, ids=[case[1] for case in REFUSED])
def test_refusals_are_one_line_that_offers_a_local_path(
    hub: Hub, raised: Exception, message: str
) -> None:
    hub.listing = raised
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve("hub:amused/amused-256@main")
    assert str(caught.value).startswith("hub:amused/amused-256@main ")
    assert str(caught.value).endswith("; the path of a file or folder works too")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (error("GatedRepoError", "HfHubHTTPError"), "is gated; accept its terms"),
        (error("TimeoutError"), r"was not fetched \(TimeoutError\); try again; the path of a"),
    ],
)
def test_a_download_that_fails_is_told(hub: Hub, raised: Exception, message: str) -> None:
    hub.download = raised
    with pytest.raises(CheckpointError, match=message):
        resolve("hub:amused/amused-256")


def test_what_was_fetched_before_needs_no_hub(hub: Hub) -> None:
    before = resolve("hub:amused/amused-256/vqvae")
    hub.listing = error("OfflineModeIsEnabled")
    assert resolve("hub:amused/amused-256/VQVAE") == before
    with pytest.raises(CheckpointError, match="is not among the files on this machine"):
        resolve("hub:amused/amused-256/transformer")


def test_without_the_package_its_installation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="needs huggingface_hub: pip install huggingface_hub"):
        resolve("hub:amused/amused-256")


def test_the_package_has_what_is_called_here() -> None:
    library: Any = pytest.importorskip("huggingface_hub")
    place = {"repo_id": "a/b", "revision": None}
    inspect.signature(library.HfApi().list_repo_files).bind(**place)
    inspect.signature(library.snapshot_download).bind(**place, allow_patterns=[])
    inspect.signature(library.snapshot_download).bind(**place, local_files_only=True)
    names = ("GatedRepoError", "RepositoryNotFoundError", "RevisionNotFoundError")
    assert all(hasattr(library.errors, name) for name in (*names, "HFValidationError"))
