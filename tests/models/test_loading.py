"""Loading by the catalogue: prefixes, tensors without a place, and tokenizers of other models."""

import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

import mdzoo
from mdruntime.manifest import TextSpec
from mdzoo.checkpoint import CheckpointError
from mdzoo.loading import _text_of
from mdzoo.maskgit import MaskGIT, MaskGITConfig, to_published
from mdzoo.texts import text_files

SMALL = MaskGITConfig(grid=4, codebook=32, classes=10, width=16, depth=1, heads=4, hidden=24)
SETTINGS = {"heads": 4, "classes": 10}


def save(path: Path, prefix: str = "", **extra: Tensor) -> Path:
    torch.manual_seed(0)
    state = {**to_published(MaskGIT(SMALL).state_dict()), **extra}
    torch.save({prefix + name: tensor for name, tensor in state.items()}, path)
    return path


PREFIXES = ["", "model.", "backbone.backbone.", "module.model.backbone.", "_orig_mod.module."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_wraps_a_denoiser_leaves_its_names(tmp_path: Path, prefix: str) -> None:
    entry = mdzoo.CATALOGUE["maskgit256"]
    plain, wrapped = (
        cast(
            MaskGIT,
            mdzoo.load_denoiser(entry, mdzoo.Sources(checkpoint=path, settings=SETTINGS)),
        )
        for path in (save(tmp_path / "a.pth"), save(tmp_path / "b.pth", prefix))
    )
    assert torch.equal(plain.tokens.weight, wrapped.tokens.weight)


def test_a_tensor_without_a_place_is_refused_or_named(tmp_path: Path) -> None:
    entry, path = mdzoo.CATALOGUE["maskgit256"], save(tmp_path / "a.pth", stray=torch.ones(2))
    sources = mdzoo.Sources(checkpoint=path, settings=SETTINGS)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(stray\)"):
        mdzoo.load_denoiser(entry, sources)
    model = mdzoo.load_denoiser(entry, replace(sources, extra_tensors=True))
    assert mdzoo.unused_tensors(model) == ("stray",)


def tokenizer(path: Path, words: int) -> Path:
    vocabulary = {f"w{number}": number for number in range(words)}
    found = {"model": {"type": "WordLevel", "vocab": vocabulary}, "added_tokens": []}
    path.write_text(json.dumps(found))
    return path


def test_another_models_tokenizer_is_refused_before_the_build(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has 99 ids, the model 32: they do not belong"):
        text_files(TextSpec(""), tokenizer(tmp_path / "t.json", 99), "", 32)
    spec, files = text_files(TextSpec(""), tokenizer(tmp_path / "t.json", 33), "", 32)
    assert list(files) == [spec.tokenizer]


@pytest.mark.parametrize(("codebook", "begin"), [(50257, 50256), (300, -1)])
def test_only_the_published_vocabulary_has_its_begin_and_end(codebook: int, begin: int) -> None:
    entry = mdzoo.CATALOGUE["mdlm-owt"]
    sizes = {"length": 8, "codebook": codebook, "width": 8, "depth": 1, "heads": 2, "hidden": 8}
    small = replace(entry, config=replace(entry.config, **sizes))
    denoiser = mdzoo.load_denoiser(small, mdzoo.Sources(random_seed=0))
    assert entry.text is not None
    assert _text_of(entry, entry.text, denoiser).begin == begin
