"""The tokenizer of CLIP's text tower in the format of the tokenizers package.

Byte-pair encoding of lower-case words that end in ``</w>`` (Radford et al. 2021, arXiv
2103.00020). Published folders have it as ``vocab.json`` and ``merges.txt``, newer ones as
``tokenizer.json`` too. Source: repository huggingface/transformers (Apache 2.0),
``models/clip/tokenization_clip.py``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mdruntime.manifest import PromptSpec
from mdzoo import folder
from mdzoo.checkpoint import CheckpointError
from mdzoo.clip import ClipConfig
from mdzoo.weightfile import existing

__all__ = ["clip_prompt", "clip_tokenizer_json"]

BEGIN, END = "<|startoftext|>", "<|endoftext|>"

WORDS = "|".join(
    [
        r"'s|'t|'re|'ve|'m|'ll|'d",  # what follows an apostrophe in English
        r"[\p{L}]+",
        r"[\p{N}]",
        r"[^\s\p{L}\p{N}]+",
    ]
)
"""What the tokenizer takes for a word: letters, one digit, or a run of other signs."""

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
"""Files that name the special tokens, the first that does counts."""


def clip_tokenizer_json(path: Path) -> bytes:
    """Return the content of ``tokenizer.json``, without settings of padding and truncation.

    Args:
        path: the folder ``tokenizer`` of a published model.

    Raises:
        CheckpointError: the folder holds no tokenizer, or a damaged one.
    """
    path = folder.root(path)
    if (path / "tokenizer.json").is_file():
        found = folder.read_json(path, "tokenizer.json")
    else:
        found = _assemble(folder.read_json(path, "vocab.json"), _merges(path / "merges.txt"), path)
    return json.dumps(found | {"padding": None, "truncation": None}, ensure_ascii=False).encode()


def clip_prompt(path: Path, config: ClipConfig, tokenizer: str) -> PromptSpec:
    """Return how a prompt becomes the tokens of a text tower.

    Args:
        path: the folder ``tokenizer`` of a published model.
        config: of the text tower.
        tokenizer: name of ``clip_tokenizer_json``'s file in the bundle.

    Raises:
        CheckpointError: the folder holds no tokenizer, or one that knows its own special tokens
            or those of the tower not.
    """
    path = folder.root(path)
    ids = _ids(json.loads(clip_tokenizer_json(path)), path)
    begin, end, pad = (_special(ids, path, name)[1] for name in ("bos", "eos", "pad"))
    if max(ids.values()) >= config.vocabulary:
        raise CheckpointError(
            f"{path} must have ids below {config.vocabulary}, the vocabulary of the text encoder, "
            f"found {max(ids.values())}; take both from one model"
        )
    return PromptSpec(tokenizer, config.vocabulary, config.positions, begin, end, pad)


def _merges(path: Path) -> list[list[str]]:
    try:
        lines = existing(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download it again") from error
    merges = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    strange = [merge for merge in merges if len(merge) != 2]
    if strange:
        raise CheckpointError(
            f"{path} must hold pairs of symbols, found {' '.join(strange[0])[:80]!r}; "
            "download it again"
        )
    return merges


def _assemble(vocabulary: Mapping[str, Any], merges: list[list[str]], path: Path) -> dict[str, Any]:
    """Return a tokenizer as the tokenizers package writes it."""
    # A special token stands for itself inside words too; with some models "!" is one.
    names = ("bos", "eos", "unk", "pad")
    begin, end, unknown, pad = (_special(vocabulary, path, name) for name in names)
    special = dict([begin, end, unknown, pad])
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "added_tokens": [_added(*each) for each in special.items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": WORDS},
                    "behavior": "Removed",
                    "invert": True,
                },
                bytes_ | {"use_regex": True},
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": list(end),
            "cls": list(begin),
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": bytes_ | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown[0],
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(vocabulary),
            "merges": merges,
        },
    }


def _added(token: str, number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **flags, "special": True}


def _ids(tokenizer: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Return all tokens of a ``tokenizer.json`` with their ids."""
    try:
        added = {each["content"]: int(each["id"]) for each in tokenizer.get("added_tokens", ())}
        return {name: int(number) for name, number in tokenizer["model"]["vocab"].items()} | added
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} must hold a tokenizer of byte pairs, found another in its tokenizer.json "
            f"({type(error).__name__}: {error}); convert a model of CLIP"
        ) from error


def _special(ids: Mapping[str, Any], path: Path, name: str) -> tuple[str, int]:
    """Return a special token and its id, by the name that settings give the token."""
    token = _stated(path, f"{name}_token") or (BEGIN if name == "bos" else END)
    if not isinstance(ids.get(token), int):
        raise CheckpointError(
            f"{path} must know its {name} token {token!r}, found no id for it; "
            "download the whole folder"
        )
    return token, int(ids[token])


def _stated(path: Path, name: str) -> str:
    for file in SETTINGS:
        stated = folder.read_json(path, file) if (path / file).is_file() else {}
        entry = stated.get(name)
        token = entry.get("content") if isinstance(entry, Mapping) else entry
        if isinstance(token, str):
            return token
    return ""
