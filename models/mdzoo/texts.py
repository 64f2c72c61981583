"""Tokenizers that belong into a bundle: of text models, and of the prompts of image models."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from mdruntime.manifest import PromptSpec, TextSpec
from mdruntime.tokenizer import IDS
from mdzoo import folder
from mdzoo.checkpoint import CheckpointError
from mdzoo.clip import ClipConfig
from mdzoo.clip_tokenizer import clip_prompt, clip_tokenizer_json

__all__ = ["TOKENIZER", "prompt_files", "text_files"]

TOKENIZER = "tokenizer/tokenizer.json"
"""Where a bundle has the tokenizer."""


def text_files(
    text: TextSpec, tokenizer: Path | None, fallback: str, codebook: int
) -> tuple[TextSpec, dict[str, bytes]]:
    """Return how a model's text becomes tokens, and the files that takes.

    Args:
        text: what the published model does.
        tokenizer: ``tokenizer.json``, or a folder that holds it.
        fallback: what stands for a file that was not given, or nothing.
        codebook: number of ids that the model draws.

    Raises:
        CheckpointError: the file is needed and not given, is no tokenizer, or another model's.
    """
    if tokenizer is None:
        if not fallback:
            raise CheckpointError(
                "a text model needs --tokenizer FILE, the tokenizer.json that it was trained with"
            )
        return TextSpec(fallback), {}
    content = read_tokenizer(tokenizer)
    size = _size(json.loads(content))
    # Tokenizers may know the mask token, and models may have spare ids.
    if size and not 0.9 * codebook <= size <= codebook + 1:
        raise CheckpointError(
            f"{tokenizer} has {size} ids, the model {codebook}: they do not belong together; "
            "pass the model's own --tokenizer"
        )
    return replace(text, tokenizer=TOKENIZER), {TOKENIZER: content}


def _size(found: dict[str, Any]) -> int:
    """Return the number of ids of a tokenizer; 0 where its kind has no list of them."""
    words = found["model"].get("vocab", ()) if isinstance(found["model"], dict) else ()
    added = found.get("added_tokens", ())
    names = {str(word[0]) if isinstance(word, list) else str(word) for word in words}
    return len(names | {str(token.get("content")) for token in added}) if names else 0


def prompt_files(path: Path | None, config: ClipConfig) -> tuple[PromptSpec, dict[str, bytes]]:
    """Return how prompts become tokens, and the files that takes.

    Args:
        path: the published folder; None with random weights, whose prompts are ids.
        config: of the text tower.

    Raises:
        CheckpointError: the folder holds no tokenizer, or one of another text tower.
    """
    if path is None:
        end = config.vocabulary - 1
        return PromptSpec(IDS, config.vocabulary, config.positions, end - 1, end, end), {}
    place = folder.root(path) / "tokenizer"
    return clip_prompt(place, config, TOKENIZER), {TOKENIZER: clip_tokenizer_json(place)}


def read_tokenizer(path: Path) -> bytes:
    """Return the content of ``tokenizer.json``.

    Raises:
        CheckpointError: there is no such file, or it is of another kind.
    """
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        content = path.read_bytes()
        found: Any = json.loads(content)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(
            f"{path} must be a tokenizer.json, found no JSON; download it again"
        ) from None
    if not isinstance(found, dict) or "model" not in found:
        raise CheckpointError(
            f"{path} must be a tokenizer.json of the tokenizers package, found other JSON; "
            "have it saved by transformers' tokenizer.save_pretrained"
        )
    return content
