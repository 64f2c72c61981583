"""The text tower of CLIP and its tokenizer against those of transformers."""

import copy
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mdruntime.manifest import PromptSpec
from mdzoo import checkpoint
from mdzoo.checkpoint import CheckpointError
from mdzoo.clip import ClipConfig, ClipText, from_published, to_published
from mdzoo.clip_tokenizer import clip_prompt, clip_tokenizer_json

SMALL = ClipConfig(
    vocabulary=50, positions=9, width=32, depth=3, heads=4, hidden=48, projection=24, end=49
)
PROMPTS = torch.tensor(
    [
        [48, 5, 7, 49, 49, 49, 49, 49],
        [48, 49, 1, 1, 1, 1, 1, 1],  # padded by another token than the end
        [48, 3, 2, 1, 9, 8, 7, 49],
    ]
)

TEXTS = [
    "a cat and  a dog",
    "The CAT's\tdog!! 12 3",
    "café CAFE\u0301 \u00e9",
    "日本 😀 ½ x²",
    "<|endoftext|> a <|startoftext|>b <|ENDOFTEXT|>",
    "",
    " ",
    "i'm we'll you've they're he'd don't",
    "a\u00a0b\u2028c\x00",
]
MERGES = ["c a", "ca t</w>", "d o", "do g</w>", "' s</w>", "Ã ©</w>", "! !</w>", "1 2</w>"]


def transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers")


def random_tower(config: ClipConfig) -> ClipText:
    torch.manual_seed(0)
    model = ClipText(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def write_tower(folder: Path, model: ClipText, **extra: Any) -> dict[str, Any]:
    """Write a tower as transformers does, and return its config."""
    from safetensors.torch import save_file

    config = model.config
    published = {
        "model_type": "clip_text_model",
        "architectures": ["CLIPTextModelWithProjection"],
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.positions,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "projection_dim": config.projection,
        "hidden_act": config.activation,
        "eos_token_id": config.end,
        "bos_token_id": 48,
    }
    state = {key: value.clone() for key, value in to_published(model.state_dict()).items()} | {
        "text_model.embeddings.position_ids": torch.arange(config.positions)[None]
    }
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(published | extra))
    return published


@pytest.mark.parametrize(("activation", "end"), [("gelu", 49), ("quick_gelu", 49), ("gelu", 2)])
def test_states_are_those_of_transformers(activation: str, end: int, tmp_path: Path) -> None:
    config = replace(SMALL, activation=activation, end=end)
    published = write_tower(tmp_path, random_tower(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        original = transformers().CLIPTextModelWithProjection.from_pretrained(tmp_path).eval()
    assert ClipConfig.from_json(published) == config
    model = ClipText(config)
    state = from_published(checkpoint.read(tmp_path))
    checkpoint.fit(model, state, source="text_encoder")
    with torch.no_grad():
        states, summary = model.eval()(PROMPTS)
        expected = original(PROMPTS, output_hidden_states=True)
    torch.testing.assert_close(states, expected.hidden_states[-2], atol=1e-5, rtol=0)
    torch.testing.assert_close(summary, expected.text_embeds, atol=1e-5, rtol=0)


def test_a_token_sees_nothing_of_what_follows_it() -> None:
    model = random_tower(SMALL)
    with torch.no_grad():
        states, _ = model(PROMPTS[:1])
        shorter, _ = model(PROMPTS[:1, :3])
    torch.testing.assert_close(states[:, :3], shorter)


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, width=20, heads=5, depth=1, positions=4)])
def test_sizes_come_from_the_checkpoint(config: ClipConfig) -> None:
    state = to_published(ClipText(config).state_dict())
    assert ClipConfig.from_state(state, ClipConfig(), config.heads) == config
    with pytest.raises(CheckpointError, match=r"width \d+ .* 768, .* pass --set text_heads=N"):
        ClipConfig.from_state(state, ClipConfig())
    back = from_published(state)
    assert back.keys() == ClipText(config).state_dict().keys()


def test_published_sizes_give_the_published_tensors() -> None:
    with torch.device("meta"):
        state = to_published(ClipText(ClipConfig()).state_dict())
    assert len(state) == 197
    assert sum(tensor.numel() for tensor in state.values()) == 123_650_304
    assert ClipConfig.from_state(state, ClipConfig()) == ClipConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act .* must be one of gelu, quick_gelu, found 'relu'"),
        ({"num_attention_heads": 5}, "must divide its width 32, got 5; .* --set text_heads=N"),
    ],
)
def test_other_towers_are_refused(change: Mapping[str, Any], message: str, tmp_path: Path) -> None:
    published = write_tower(tmp_path, random_tower(SMALL))
    with pytest.raises(CheckpointError, match=message):
        ClipConfig.from_json({**published, **change})


def test_half_precision_stays_close() -> None:
    model = random_tower(SMALL)
    with torch.no_grad():
        full, half = model(PROMPTS), copy.deepcopy(model).half()(PROMPTS)
    for expected, found in zip(full, half, strict=True):
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)


def write_tokenizer(folder: Path, settings: object) -> dict[str, int]:
    """Write a small vocabulary in the published files: all bytes, some words, special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [*map(chr, printable), *map(chr, range(256, 256 + 256 - len(printable)))]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [merge.replace(" ", "") for merge in MERGES] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = "".join(f"{merge}\n" for merge in MERGES)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return vocabulary


PADDED = {"pad_token": "!", "bos_token": {"__type": "AddedToken", "content": "<|startoftext|>"}}


@pytest.mark.parametrize("settings", [{}, PADDED])
def test_words_become_the_tokens_of_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    write_tokenizer(tmp_path, settings)
    original = transformers().CLIPTokenizerFast.from_pretrained(tmp_path)
    ours = tokenizers.Tokenizer.from_str(clip_tokenizer_json(tmp_path).decode())
    for text in TEXTS:
        bare = ours.encode(text, add_special_tokens=False).ids
        assert bare == original(text, add_special_tokens=False).input_ids, text
        assert ours.encode(text).ids == original(text).input_ids, text
    spec = clip_prompt(tmp_path, replace(SMALL, vocabulary=600), "tokenizer.json")
    ids = original.bos_token_id, original.eos_token_id, original.pad_token_id
    assert (spec.begin, spec.end, spec.pad) == ids
    assert spec == PromptSpec("tokenizer.json", 600, 9, *ids)


def test_a_published_tokenizer_is_taken_but_for_its_padding(tmp_path: Path) -> None:
    vocabulary = write_tokenizer(tmp_path, {})
    assembled = json.loads(clip_tokenizer_json(tmp_path))
    padding = {"strategy": {"Fixed": 77}, "pad_id": 3}
    published = assembled | {"padding": padding, "added_tokens": assembled["added_tokens"][:1]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(published))
    (tmp_path / "vocab.json").unlink()
    taken = json.loads(clip_tokenizer_json(tmp_path))
    assert taken == published | {"padding": None, "truncation": None}
    assert clip_prompt(tmp_path, replace(SMALL, vocabulary=600), "x").end == len(vocabulary) - 1


def test_damaged_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"vocab\.json does not exist"):
        clip_tokenizer_json(tmp_path)
    vocabulary = write_tokenizer(tmp_path, {"pad_token": "<pad>"})
    with pytest.raises(CheckpointError, match="must know its pad token '<pad>', found no id"):
        clip_tokenizer_json(tmp_path)
    write_tokenizer(tmp_path, {})
    with pytest.raises(CheckpointError, match=f"ids below 50, .* found {len(vocabulary) - 1}"):
        clip_prompt(tmp_path, SMALL, "tokenizer.json")
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(CheckpointError, match="pairs of symbols, found 'a b c'"):
        clip_tokenizer_json(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"merges\.txt does not exist"):
        clip_tokenizer_json(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": [["a", -1.0]]}}')
    with pytest.raises(CheckpointError, match="a tokenizer of byte pairs, found another"):
        clip_prompt(tmp_path, SMALL, "tokenizer.json")
