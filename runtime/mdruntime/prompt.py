"""What images are to show: classes, or texts as the condition graph reads them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mdruntime.bundle import Bundle
from mdruntime.conditions import Conditions, labels_of, text_of
from mdruntime.errors import BundleError, SamplingError
from mdruntime.tokenizer import open_tokenizer

__all__ = ["conditions_of", "conditions_of_canvases"]


def conditions_of(
    bundle: Bundle,
    labels: Sequence[int] | None,
    prompts: Sequence[str] | None,
    negative_prompt: str,
    count: int,
) -> Conditions:
    """Return the conditions of images: classes, prompts, or nothing at all.

    Args:
        bundle: of an image model.
        labels: class of each image, or None.
        prompts: text of each image, or None.
        negative_prompt: what guidance leads away from, the same for all.
        count: number of images where nothing is said.

    Raises:
        SamplingError: something that the model does not take, lacks, or that is out of range.
    """
    if bundle.manifest.prompt is None:
        if prompts is not None or negative_prompt:
            raise SamplingError("this model takes no prompts; leave them out")
        return Conditions.of(labels_of(bundle.manifest.denoiser, labels, count))
    if labels is not None:
        raise SamplingError("this model has no classes; leave labels out")
    return _prompted(bundle, prompts, negative_prompt)


def _prompted(bundle: Bundle, prompts: Sequence[str] | None, negative: str) -> Conditions:
    """Return the conditions of images that texts describe.

    Args:
        bundle: of a text-to-image model.
        prompts: text of each image.
        negative: what guidance leads away from, the same for all.

    Raises:
        SamplingError: there are no prompts, or one is not a text or too long.
    """
    if not prompts or isinstance(prompts, str):
        raise SamplingError(
            f'this model draws what texts say; pass prompts as ["a red boat"], got {prompts!r}'
        )
    tokens = _tokens(bundle, [*prompts, negative])
    return Conditions(
        np.full(len(prompts), -1), tokens[:-1], np.repeat(tokens[-1:], len(prompts), axis=0)
    )


def _tokens(bundle: Bundle, texts: Sequence[str]) -> NDArray[np.int32]:
    """Return the token ids of prompts, int32 (len(texts), prompt length).

    Raises:
        SamplingError: a prompt is not a text, or has more tokens than the model reads.
    """
    spec = bundle.manifest.prompt
    if spec is None:
        raise BundleError("the bundle has no text encoder")
    tokenizer = open_tokenizer(bundle.folder, spec.tokenizer, spec.vocabulary)
    table = np.full((len(texts), spec.length), spec.pad, np.int32)
    for row, text in zip(table, texts, strict=True):
        ids = [spec.begin, *tokenizer.encode(text_of("a prompt", text)), spec.end]
        if len(ids) > spec.length:
            raise SamplingError(
                f"a prompt must have at most {spec.length - 2} tokens, got {len(ids) - 2}: "
                f"{text[:40]!r}...; shorten it"
            )
        if max(ids) >= spec.vocabulary:
            raise SamplingError(
                f"the tokenizer gave the id {max(ids)}, the text encoder knows 0 to "
                f"{spec.vocabulary - 1}: they do not belong together"
            )
        row[: len(ids)] = ids
    return table


def conditions_of_canvases(
    bundle: Bundle,
    labels: Sequence[int] | None,
    prompts: Sequence[str] | None,
    negative_prompt: str,
    count: int,
) -> Conditions:
    """Return the conditions of ``count`` canvases; the arguments are those of ``conditions_of``.

    Raises:
        SamplingError: there are more or fewer of them.
    """
    conditions = conditions_of(bundle, labels, prompts, negative_prompt, count)
    if len(conditions.labels) != count:
        what = "labels" if prompts is None else "prompts"
        raise SamplingError(f"{what} must be {count}, one per canvas, got {len(conditions.labels)}")
    return conditions
