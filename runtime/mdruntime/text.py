"""The text pipeline: prompts or texts with gaps in, texts out."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdruntime.bundle import Bundle
from mdruntime.conditions import Conditions, tokens_of, whole
from mdruntime.errors import BundleError, SamplingError
from mdruntime.manifest import Manifest
from mdruntime.runner import Runner
from mdruntime.sampler import Step, Tokens
from mdruntime.sampling import Sampling
from mdruntime.tokenizer import open_tokenizer

__all__ = ["GAP", "HIDDEN", "TextPipeline", "TextStep"]

GAP = "___"
"""Stands for a gap in a text to be filled in: three underscores, or more of them."""

HIDDEN = "\N{LIGHT SHADE}"
"""Stands for a token that is still hidden, in the texts of steps."""

_GAPS = re.compile(r"_{3,}")


@dataclass(frozen=True, slots=True)
class TextStep:
    """The texts after one pass."""

    texts: list[str]  # with ``HIDDEN`` in the place of every hidden token
    step: Step  # tokens, passes and all else


class TextPipeline:
    """A bundle ready to write text. Use one per thread: ``clone()`` shares the weights."""

    def __init__(self, runner: Runner) -> None:
        """Take an opened bundle of a text model; see ``mdruntime.load_text``."""
        text = runner.manifest.text
        assert text is not None  # load_text() has seen to it
        self._runner = runner
        self._text = text
        spec = runner.manifest.denoiser
        folder = runner.bundle.folder
        self.tokenizer = open_tokenizer(folder, text.tokenizer, spec.codebook)
        # Tokenizers may know the mask token, and models may have spare ids.
        if not 0.9 * spec.codebook <= self.tokenizer.size <= spec.codebook + 1:
            raise BundleError(
                f"the tokenizer has {self.tokenizer.size} ids, the model {spec.codebook}: they do "
                "not belong together; export the bundle again with the model's own --tokenizer"
            )

    @property
    def bundle(self) -> Bundle:
        """The folder and its manifest."""
        return self._runner.bundle

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self._runner.manifest

    @property
    def provider(self) -> str:
        """The execution provider in use."""
        return self._runner.provider

    def __enter__(self) -> "TextPipeline":
        """Return the pipeline; leaving the context closes it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the pipeline."""
        self.close()

    def close(self) -> None:
        """Release the sessions' memory."""
        self._runner.close()

    def clone(self) -> "TextPipeline":
        """Return a pipeline for another thread: the same weights, caches of its own."""
        return TextPipeline(self._runner.clone())

    def sampling(self, preset: str = "default", **options: Any) -> Sampling:
        """Return a preset of the bundle, with some options changed.

        Raises:
            SamplingError: an unknown preset or option, or a value out of range.
        """
        return self._runner.sampling(preset, options)

    def generate(
        self,
        prompts: Sequence[str] | None = None,
        *,
        count: int = 1,
        length: int = 0,
        batch_size: int = 16,
        **options: Any,
    ) -> list[str]:
        """Write texts.

        A text depends on the seed, its index, its length and the options only, not on the batch.

        Args:
            prompts: how each text begins; None writes ``count`` texts from nothing.
            count: number of texts where there are no prompts.
            length: tokens of each text, prompt included; 0 stands for the model's own length.
            batch_size: largest number of texts that are written together.
            options: ``seed``, ``first_index``, ``preset``, and fields of ``Sampling``.

        Returns:
            The texts, prompts included, each up to the token that ends it.

        Raises:
            SamplingError: a prompt is no text or too long, or an option is out of range.
        """
        return self._write(self.canvas(prompts, count=count, length=length), batch_size, options)

    def infill(
        self, texts: Sequence[str] | str, *, gap: int = 16, batch_size: int = 16, **options: Any
    ) -> list[str]:
        """Fill the gaps of texts.

        Args:
            texts: each with at least one ``GAP``; what stands around the gaps does not change.
            gap: tokens that every gap is filled with.
            batch_size: largest number of texts that are written together.
            options: ``seed``, ``first_index``, ``preset``, and fields of ``Sampling``.

        Returns:
            The whole texts.

        Raises:
            SamplingError: a text without a gap, one that is too long, or a bad option.
        """
        given = [texts] if isinstance(texts, str) else list(texts)
        canvases = [self.gaps(text, gap) for text in given]
        done: list[str] = []
        for index, canvas in enumerate(canvases):  # of different lengths, hence one by one
            first = whole("first_index", options.get("first_index", 0)) + index
            done += self._write(canvas, batch_size, {**options, "first_index": first})
        return done

    def steps(self, canvas: Tokens, **options: Any) -> Iterator[TextStep]:
        """Reveal the hidden tokens of canvases, yielding the texts after every pass.

        Args:
            canvas: int32 (batch, length), of ``canvas`` or ``gaps``.
            options: ``seed``, ``first_index``, ``preset``, and fields of ``Sampling``.
        """
        ids = tokens_of(self.manifest.denoiser, canvas)
        sampling, source = self._runner.request(len(ids), options)
        for step in self._runner.unmask(ids, self._conditions(ids), sampling, source):
            yield TextStep([self.decode(row) for row in step.tokens], step)

    def canvas(
        self, prompts: Sequence[str] | None = None, *, count: int = 1, length: int = 0
    ) -> Tokens:
        """Return canvases that begin with prompts, int32 (batch, length), to be revealed."""
        length = self._length(length)
        if prompts is None:
            return self._runner.blank(whole("count", count, 1), length)
        if isinstance(prompts, str):
            raise SamplingError('prompts must be a list of texts, as ["Once upon"], got one text')
        canvas = self._runner.blank(len(prompts), length)
        for row, prompt in zip(canvas, prompts, strict=True):
            ids = [*self._begin(), *self._encode(prompt)]
            self._check_room(len(ids), length, prompt)
            row[: len(ids)] = ids
        return canvas

    def gaps(self, text: str, gap: int = 16) -> Tokens:
        """Return the canvas of a text with gaps of ``gap`` tokens, int32 (1, length)."""
        pieces = _GAPS.split(_checked(text))
        if len(pieces) == 1:
            raise SamplingError(
                f"a text to be filled in must have a gap {GAP!r}, got {text[:40]!r}"
            )
        hole = [self.manifest.denoiser.mask_token] * whole("gap", gap, 1)
        ids = [*self._begin(), *self._encode(pieces[0])]
        for piece in pieces[1:]:
            ids += [*hole, *self._encode(piece)]
        spec = self.manifest.denoiser
        self._check_room(len(ids), spec.length + 1, text)
        if not spec.flexible:
            ids += [spec.mask_token] * (spec.length - len(ids))
        return np.array([ids], np.int32)

    def decode(self, tokens: NDArray[np.int32]) -> str:
        """Return the text of one canvas (length,), up to the token that ends it."""
        ids, spec = tokens.tolist(), self.manifest.denoiser
        begin, end = self._text.begin, self._text.end
        if ids and ids[0] == begin:
            ids = ids[1:]
        if end in ids:
            ids = ids[: ids.index(end)]
        parts: list[str] = []
        run: list[int] = []
        for token in ids:
            if token != spec.mask_token:
                run.append(token)
                continue
            parts += [self.tokenizer.decode(run) if run else "", HIDDEN]
            run = []
        return "".join([*parts, self.tokenizer.decode(run) if run else ""])

    def _write(self, canvas: Tokens, batch_size: int, options: dict[str, Any]) -> list[str]:
        parts = self._runner.finish(canvas, self._conditions(canvas), batch_size, options)
        return [self.decode(row) for part in parts for row in part]

    def _conditions(self, canvas: Tokens) -> Conditions:
        """Return conditions under which guidance strengthens what is given."""
        known = canvas != self.manifest.denoiser.mask_token
        return Conditions(np.full(len(canvas), -1), given=known)

    def _begin(self) -> list[int]:
        return [] if self._text.begin < 0 else [self._text.begin]

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(_checked(text)) if text else []
        largest = self.manifest.denoiser.codebook - 1
        if ids and max(ids) > largest:
            raise SamplingError(
                f"the tokenizer gave the id {max(ids)}, the model knows 0 to {largest}: "
                "they do not belong together"
            )
        return ids

    def _length(self, length: int) -> int:
        spec = self.manifest.denoiser
        wished = whole("length", length) or spec.length
        if wished > spec.length or (wished != spec.length and not spec.flexible):
            most = "between 1 and" if spec.flexible else "0 or"
            raise SamplingError(f"length must be {most} {spec.length} tokens, got {wished}")
        return wished

    def _check_room(self, tokens: int, length: int, text: str) -> None:
        if tokens >= length:
            raise SamplingError(
                f"a text of {tokens} tokens leaves no room on a canvas of {length}: "
                f"{text[:40]!r}...; shorten it, or allow for a larger length"
            )


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise SamplingError(f"a text must be a string, got {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SamplingError(f"a text must be valid Unicode, got {text[:40]!r}") from None
    return text
