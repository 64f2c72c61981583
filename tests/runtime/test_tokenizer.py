"""Tokenizers: of files in two styles that are published, of bytes, of bare ids."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Reader
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mdruntime.errors import BundleError, ProviderError, SamplingError
from mdruntime.manifest import TextSpec
from mdruntime.text import HIDDEN, TextPipeline
from mdruntime.tokenizer import (
    BYTES,
    IDS,
    ByteTokenizer,
    FileTokenizer,
    IdTokenizer,
    open_tokenizer,
)

Scripted = Callable[..., tuple[TextPipeline, Any]]
CORPUS = ["the cat sat on the mat. the dog sat on the log. see the .com café"] * 9
ODD = [
    "the cat",
    " the mat",
    "  two  blanks  ",
    "\nthe\n\n dog\t.",
    "café 😀 中",
    "<|endoftext|> is </s> text",
    " ",
    ".com",
    "___",
]


def gpt2_like() -> Reader:
    """Byte-level BPE, as GPT-2's: MDLM, SDTT."""
    reader = Reader(models.BPE())
    reader.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reader.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    reader.train_from_iterator(CORPUS, trainer)
    return reader


def llama_like() -> Reader:
    """BPE with a blank before the text and bytes for unknown characters, as Llama's: SMDM."""
    reader = Reader(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    reader.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    reader.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
        show_progress=False,
    )
    reader.train_from_iterator(CORPUS, trainer)
    data = json.loads(reader.to_str())
    data["added_tokens"] = data["added_tokens"][: len(special)]  # bytes are no special tokens
    return Reader.from_str(json.dumps(data))


@pytest.fixture(params=[gpt2_like, llama_like], ids=["gpt2", "llama"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    reader: Reader = request.param()
    reader.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize("text", ODD, ids=repr)
def test_text_comes_back_as_it_went_in(file: Path, text: str) -> None:
    tokenizer = FileTokenizer(file)
    for inside in (False, True):
        ids = tokenizer.encode(text, inside=inside)
        assert all(0 <= index < tokenizer.size for index in ids)
        assert tokenizer.decode(ids, inside=inside) == text


def test_text_inside_has_the_ids_that_it_has_in_the_whole(file: Path) -> None:
    tokenizer = FileTokenizer(file)
    for front, back in (("the dog", " sat on"), ("see\n", "the mat"), ("a", "\ttab")):
        whole = tokenizer.encode(front + back)
        assert whole == tokenizer.encode(front) + tokenizer.encode(back, inside=True)


def test_special_tokens_are_neither_read_nor_written(file: Path) -> None:
    reader, tokenizer = Reader.from_file(str(file)), FileTokenizer(file)
    special = [
        index
        for name in ("<|endoftext|>", "</s>")
        if (index := reader.token_to_id(name)) is not None
    ]
    (mark,) = special
    assert reader.encode("<|endoftext|></s>", add_special_tokens=False).ids.count(mark) == 1
    assert mark not in tokenizer.encode("<|endoftext|></s>")
    assert tokenizer.decode([mark, *tokenizer.encode("cat"), mark]) == "cat"


def test_settings_of_training_neither_cut_nor_pad_a_prompt(file: Path) -> None:
    reader = Reader.from_file(str(file))
    expected = FileTokenizer(file).encode("the cat sat")
    reader.enable_truncation(1)
    reader.enable_padding(length=64)
    reader.save(str(file))
    assert FileTokenizer(file).encode("the cat sat") == expected


def test_infilling_keeps_given_text_whatever_the_tokenizer(file: Path, scripted: Scripted) -> None:
    tokenizer = FileTokenizer(file)
    reader = Reader.from_file(str(file))
    half = reader.token_to_id("<0xC3>") or reader.token_to_id("Ã")
    sizes = {"folder": file.parent, "codebook": tokenizer.size, "length": 99}
    text = TextSpec(file.name, begin=0, end=0)
    for wanted in ([half], [0], tokenizer.encode(" mat", inside=True)[:1]):
        pipeline, _ = scripted(wanted, text, **sizes)
        for front, back in (("the cat ", " dog"), ("café", "é 中"), ("", "  x"), ("x\n", "\ny")):
            (found,) = pipeline.infill(f"{front}___{back}", gap=2)
            assert found.startswith(front)
            assert found.endswith(back)
            (found,) = pipeline.generate([f"{front}<|endoftext|>"])
            assert found.startswith(f"{front}<|endoftext|>")


def test_a_word_behind_hidden_tokens_keeps_its_blank(file: Path, scripted: Scripted) -> None:
    tokenizer = FileTokenizer(file)
    text = TextSpec(file.name)
    pipeline, _ = scripted([3], text, file.parent, codebook=tokenizer.size, length=99)
    assert pipeline.decode(pipeline.gaps("the cat___ on", 1)[0]) == f"the cat{HIDDEN} on"
    on = tokenizer.encode(" on", inside=True)
    assert pipeline.gaps("the cat___ on", 1)[0, -len(on) :].tolist() == on
    assert pipeline.gaps("the cat___ on", 1)[0, -len(on) - 1] == tokenizer.size
    ids = [*tokenizer.encode("the cat"), tokenizer.size, *tokenizer.encode(" on", inside=True)]
    assert pipeline.decode(ids) == f"the cat{HIDDEN} on"


def test_bytes_and_ids() -> None:
    tokenizer = open_tokenizer(Path("nowhere"), BYTES, 256)
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 10]
    assert tokenizer.decode([0xC3, 0xA9, 10]) == "é\n"
    assert tokenizer.decode([0xC3, 65]) == "\N{REPLACEMENT CHARACTER}A"
    numbers = open_tokenizer(Path("nowhere"), IDS, 1000)
    assert isinstance(numbers, IdTokenizer)
    assert numbers.size == 1000
    assert numbers.encode(" 3  999\n0") == [3, 999, 0]
    assert numbers.decode([3, 999, 0]) == "3 999 0"
    for wrong in ("1000", "-1", "1.5", "cat", "²"):
        with pytest.raises(SamplingError, match="a text must be ids below 1000 with blanks"):
            numbers.encode(f"1 {wrong}")


def test_models_without_a_tokenizer_speak_ids(scripted: Scripted) -> None:
    pipeline, _ = scripted([*range(10, 34)], TextSpec(IDS))
    assert pipeline.generate(["1 2"], length=4) == ["1 2 12 13"]
    assert pipeline.infill("1 ___ 9", gap=2)[0].split() == ["1", "11", "12", "9"]
    with pytest.raises(SamplingError, match="a text must be ids below 256"):
        pipeline.generate(["256"])


def test_a_tokenizer_of_another_model_is_refused(file: Path, scripted: Scripted) -> None:
    size = FileTokenizer(file).size
    text = TextSpec(file.name)
    for codebook in (size - 2, size + 200):
        message = f"the tokenizer has {size} ids, the model {codebook}: .* the model's own"
        with pytest.raises(BundleError, match=message):
            scripted([0], text, file.parent, codebook=codebook)
    pipeline, _ = scripted([0], text, file.parent, codebook=size - 1)  # it may know the mask token
    word = FileTokenizer(file).decode([size - 1], inside=True)
    assert FileTokenizer(file).encode(word, inside=True)[0] == size - 1
    with pytest.raises(SamplingError, match=f"gave the id {size - 1}, the model knows 0 to"):
        pipeline.infill(f"___{word}", gap=1)


@pytest.mark.parametrize("content", ["", "{}", '{"model": {"type": "Magic"}}', "no JSON"])
def test_damaged_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer \(.*export the"):
        FileTokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(BundleError, match=r"other\.json is not a tokenizer"):
        FileTokenizer(tmp_path / "other.json")


def test_texts_that_a_tokenizer_has_no_ids_for_are_refused(tmp_path: Path) -> None:
    Reader(models.WordLevel({"cat": 0}, unk_token="[UNK]")).save(str(tmp_path / "words.json"))
    tokenizer = FileTokenizer(tmp_path / "words.json")
    assert tokenizer.encode("cat") == tokenizer.encode("cat", inside=True) == [0]
    assert tokenizer.decode([0]) == tokenizer.decode([0], inside=True) == "cat"
    with pytest.raises(SamplingError, match="the tokenizer cannot read 'dog'"):
        tokenizer.encode("dog")


def test_a_missing_package_is_named_with_its_remedy(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ProviderError, match="python -m pip install tokenizers"):
        FileTokenizer(file)
