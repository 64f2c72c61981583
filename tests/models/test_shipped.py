"""The shipped glyphs and prose: their files belong together, and they learnt something."""

import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

import glyphs
import mdzoo
import prose
import train_glyph_tokenizer as tokenizer
import train_glyphs
import train_prose
from mdruntime.sampling import Sampling
from mdruntime.study import Study, StudyRow, chosen, presets_of
from mdzoo.checkpoint import CheckpointError, hashes
from mdzoo.maskgit import MaskGIT
from mdzoo.mdlm import MDLM

WEIGHTS = Path(__file__).parents[2] / "models" / "mdzoo" / "weights"


def load(name: str, **sources: Any) -> mdzoo.Model:
    return mdzoo.load(mdzoo.CATALOGUE[name], mdzoo.Sources(**sources))


@pytest.mark.parametrize("name", ["glyphs", "prose"])
def test_shipped_weights_are_those_of_the_catalogue(name: str) -> None:
    entry = mdzoo.CATALOGUE[name]
    model = load(name)
    assert model.denoiser.config == entry.config
    assert model.weights.origin == "trained"
    assert model.weights.files.items() >= hashes(WEIGHTS / entry.shipped).items()


def test_shipped_files_take_25_megabytes_at_most() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 25e6


def test_glyphs_come_with_the_tokenizer_they_were_trained_with() -> None:
    model = load("glyphs")
    assert set(model.weights.files) == {"glyphs.safetensors", "glyphs-tokenizer.safetensors"}
    state = load_file(WEIGHTS / "glyphs-tokenizer.safetensors")
    drawn = cast(nn.Module, model.decoder).state_dict()
    found = [tensor for name, tensor in drawn.items() if name.endswith("decoder.conv_out.weight")]
    assert torch.equal(found[0], state["decoder.conv_out.weight"].float())


def test_random_glyphs_have_a_random_tokenizer() -> None:
    model = load("glyphs", random_seed=0)
    assert model.weights.files == {}
    assert model.study is None
    one, two = (cast(nn.Module, some.decoder).state_dict() for some in (model, load("glyphs")))
    assert one.keys() == two.keys()
    assert not all(torch.equal(one[name], two[name]) for name in one)


def test_weights_of_ones_own_take_the_shipped_tokenizer_and_no_study() -> None:
    model = load("glyphs", checkpoint=WEIGHTS / "glyphs.safetensors")
    assert model.weights.origin == "checkpoint"
    assert "glyphs-tokenizer.safetensors" in model.weights.files
    assert model.study is None
    assert model.presets == mdzoo.CATALOGUE["glyphs"].presets


def test_prose_comes_with_its_tokenizer() -> None:
    model = load("prose")
    assert model.text is not None
    shipped_file = (WEIGHTS / "prose-tokenizer.json").read_bytes()
    assert model.files[model.text.tokenizer] == shipped_file


def test_a_tokenizer_of_another_codebook_is_refused(tmp_path: Path) -> None:
    state = load_file(WEIGHTS / "glyphs-tokenizer.safetensors")
    state["quantize.embedding.weight"] = state["quantize.embedding.weight"][:100].clone()
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="codebook of 100"):
        load("glyphs", tokenizer=tmp_path / "other.pt")


def row(name: str, rounds: int, quality: float, cost: float) -> StudyRow:
    low, high = quality - 0.1, quality + 0.1
    sampling = Sampling(rounds=rounds)
    return StudyRow(name, sampling, quality, low, high, {}, rounds, cost, 10, 3)


def test_a_study_decides_the_presets() -> None:
    rows = (row("a", 1, 3.0, 1.0), row("b", 4, 1.05, 4.0), row("c", 8, 1.0, 8.0))
    presets = presets_of(Study("frechet", {}, rows))
    assert {name: sampling.rounds for name, sampling in presets.items()} == {
        "default": 4,
        "fast": 1,
        "balanced": 4,
        "best": 8,
    }
    assert load("glyphs", random_seed=0).presets == mdzoo.CATALOGUE["glyphs"].presets


@pytest.mark.parametrize("name", ["digits", "glyphs", "prose"])
def test_shipped_studies_are_of_the_shipped_weights(name: str) -> None:
    model = load(name)
    if model.study is None:
        pytest.skip(f"{name} has no study yet")
    assert model.study.weights.items() >= model.weights.files.items()
    best = chosen(model.study.rows)["best"]
    assert model.presets["best"] == best.sampling
    assert best.quality == min(some.quality for some in model.study.rows)


def test_nine_of_ten_glyphs_of_the_best_preset_are_recognised() -> None:
    study = load("glyphs").study
    assert study is not None
    best = chosen(study.rows)["best"]
    assert best.samples >= 1000
    assert best.scores["accuracy"] >= 0.9  # by a classifier of other images, see judges.py


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Return images and labels of fonts that are on every machine."""
    faces = tuple(face for face in glyphs.table() if face.package == "matplotlib")
    monkeypatch.setattr(glyphs, "table", lambda: faces)
    images, labels = glyphs.dataset("train", side=32, variants=1, seed=5, partial=True)
    return torch.from_numpy(images[::13]), torch.from_numpy(labels[::13])


@torch.no_grad()
def test_the_tokenizer_of_glyphs_brings_images_back(drawn: tuple[Tensor, Tensor]) -> None:
    some, _ = drawn
    codec = train_glyphs.shipped(WEIGHTS / "glyphs-tokenizer.safetensors")
    back = codec.decode(tokenizer.encode(codec, some)).clamp(-1, 1)
    error = (back - tokenizer.pixels(some)).abs().mean() * 127.5
    assert float(error) < 5  # grey levels
    flat = torch.full_like(back, float(tokenizer.pixels(some).mean()))
    assert float((flat - tokenizer.pixels(some)).abs().mean() * 127.5) > 30


def test_glyphs_learnt_what_letters_look_like(drawn: tuple[Tensor, Tensor]) -> None:
    images, right = drawn
    codec = train_glyphs.shipped(WEIGHTS / "glyphs-tokenizer.safetensors")
    tokens = tokenizer.encode(codec, images)
    entry = mdzoo.CATALOGUE["glyphs"]
    trained = cast(MaskGIT, mdzoo.load_denoiser(entry, mdzoo.Sources()))
    losses = [
        train_glyphs.held_out_loss(trained, train_glyphs.Split(tokens, some))
        for some in (right, (right + 1) % 62)
    ]
    assert losses[0] < 3.4
    assert losses[1] > losses[0] + 0.1  # the class matters
    untrained = cast(MaskGIT, mdzoo.load_denoiser(entry, mdzoo.Sources(random_seed=0)))
    assert train_glyphs.held_out_loss(untrained, train_glyphs.Split(tokens, right)) > 5.3


def modules() -> list[Path]:
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def test_prose_learnt_what_sentences_look_like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_prose, "TEST_TEXTS", 32)
    held_out = [path for path in modules() if prose.Document(path.stem, "").use == "held-out"]
    documents = tuple(
        prose.Document(path.stem, "\n".join(prose.paragraphs(text)))
        for path in held_out[:20]
        for text in ["\n\n".join(prose.docstrings_of(path))]
    )
    encoding = Tokenizer.from_file(str(WEIGHTS / "prose-tokenizer.json"))
    test = train_prose.tokenised(documents, encoding, 128)
    entry = mdzoo.CATALOGUE["prose"]
    trained = cast(MDLM, mdzoo.load_denoiser(entry, mdzoo.Sources()))
    assert train_prose.held_out_bound(trained, test) < 5.2  # nats a token; ln 1024 is 6.93
    shuffled = replace(test, tokens=test.tokens[torch.randperm(len(test.tokens))])
    assert train_prose.held_out_bound(trained, shuffled) > 6
