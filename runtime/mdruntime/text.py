"""The text pipeline: prompts or texts with gaps in, texts out."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mdruntime.bundle import Bundle
from mdruntime.conditions import Conditions, text_of, tokens_of, whole
from mdruntime.errors import BundleError, SamplingError
from mdruntime.manifest import Manifest
from mdruntime.passes import Counted
from mdruntime.runner import Runner
from mdruntime.sampler import Step, Tokens
from mdruntime.sampling import Sampling
from mdruntime.tokenizer import open_tokenizer

__all__ = ["GAP", "HIDDEN", "TextPipeline", "TextStep"]

GAP = "___"
"""Stands for a gap in a text to be filled in: three underscores, or more of them. A prompt has no
gaps: there underscores are text."""

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

    def counted(self) -> Counted:
        """Return what remembers the sizes of the denoiser's passes from now on."""
        return self._runner.counted()

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
            prompts: how each text begins, word for word; None writes ``count`` texts from nothing.
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
            batch_size: largest number of texts that are written together; those that follow each
                other and are equally long in tokens are.
            options: ``seed``, ``first_index``, ``preset``, and fields of ``Sampling``.

        Returns:
            The whole texts.

        Raises:
            SamplingError: a text without a gap, one that is too long, or a bad option.
        """
        given = [texts] if isinstance(texts, str) else list(texts)
        canvases = [self.gaps(text, gap) for text in given]
        first = whole("first_index", options.get("first_index", 0))
        done: list[str] = []
        for _, alike in groupby(canvases, np.size):
            request = {**options, "first_index": first + len(done)}
            done += self._write(np.concatenate(list(alike)), batch_size, request)
        return done

    def steps(self, canvas: Tokens, **options: Any) -> Iterator[TextStep]:
        """Reveal the hidden tokens of canvases, yielding the texts after every pass.

        Args:
            canvas: int32 (batch, length), of ``canvas`` or ``gaps``.
            options: ``seed``, ``first_index``, ``preset``, and fields of ``Sampling``.
        """
        ids = tokens_of(self.manifest.denoiser, canvas)
        sampling, source = self._runner.request(len(ids), options)
        given = self._given(ids)
        for step in self._runner.unmask(ids, self._conditions(ids), sampling, source):
            yield TextStep(list(map(self.decode, step.tokens, given)), step)

    def canvas(
        self, prompts: Sequence[str] | None = None, *, count: int = 1, length: int = 0
    ) -> Tokens:
        """Return canvases that begin with prompts, int32 (batch, length), to be revealed."""
        length = self._length(length)
        if prompts is None:
            return self._runner.blank(whole("count", count, 1), length)
        if isinstance(prompts, str) or not len(prompts):
            raise SamplingError(
                f'prompts must be a list of texts, such as ["Once upon"], got {prompts!r}'
            )
        canvas = self._runner.blank(len(prompts), length)
        for row, prompt in zip(canvas, prompts, strict=True):
            ids = [*self._begin(), *self._encode("a prompt", prompt)]
            if len(ids) >= length:
                raise SamplingError(
                    f"a prompt must leave room on a canvas of {length} tokens, got {len(ids)} "
                    f"tokens, {prompt[:40]!r}; shorten it" + self._longer(length)
                )
            row[: len(ids)] = ids
        return canvas

    def gaps(self, text: str, gap: int = 16) -> Tokens:
        """Return the canvas of a text with gaps of ``gap`` tokens, int32 (1, length)."""
        name, spec = "a text with gaps", self.manifest.denoiser
        first, *others = _GAPS.split(text_of(name, text))
        if not others:
            raise SamplingError(f"{name} must have a gap {GAP!r}, got {text[:40]!r}")
        ids = [*self._begin(), *self._encode(name, first)]
        rest = [self._encode(name, piece, inside=True) for piece in others]
        size = whole("gap", gap, 1)
        total = len(ids) + sum(map(len, rest)) + size * len(rest)
        if total > spec.length:
            raise SamplingError(
                f"{name} must have at most {spec.length} tokens, got {total} with {size} for a "
                f"gap, {text[:40]!r}; shorten it or its gaps"
            )
        for piece in rest:
            ids += [spec.mask_token] * size + piece
        left = 0 if spec.flexible else spec.length - total
        return np.array([ids + [spec.mask_token] * left], np.int32)

    def decode(self, tokens: ArrayLike, given: ArrayLike = False) -> str:
        """Return the text of a canvas, up to the token that ends it.

        Args:
            tokens: int (length,); hidden ones become ``HIDDEN``.
            given: bool (length,), tokens that were not drawn. They are in the text, whatever is
                drawn between them.
        """
        spec = self.manifest.denoiser
        ids = tokens_of(spec, np.asarray(tokens)[None])[0]
        known = np.broadcast_to(np.asarray(given, bool), ids.shape)
        start = int(ids[0] == self._text.begin)
        # A token that ends the text in a gap must not end what is given behind the gap.
        behind = max(start, int(known.nonzero()[0].max(initial=-1)) + 1)
        ends = np.flatnonzero(ids[behind:] == self._text.end)
        stop = behind + int(ends[0]) if len(ends) else len(ids)
        kinds = zip(ids.tolist(), known.tolist(), strict=True)
        return self._joined(list(kinds)[start:stop])

    def _joined(self, tokens: list[tuple[int, bool]]) -> str:
        """Return the text of ids that are given or not: what is drawn cannot spoil what is given.

        A half character at the border would, in tokenizers that spell bytes as tokens.
        """
        mask, marks = self.manifest.denoiser.mask_token, (self._text.begin, self._text.end)
        parts: list[str] = []
        for (hidden, _), run in groupby(tokens, lambda pair: (pair[0] == mask, pair[1])):
            ids = [token for token, _ in run if token not in marks]
            if hidden:
                parts.append(HIDDEN * len(ids))
            else:
                parts.append(self.tokenizer.decode(ids, inside=bool(parts)))
        return "".join(parts)

    def _write(self, canvas: Tokens, batch_size: int, options: dict[str, Any]) -> list[str]:
        parts = self._runner.finish(canvas, self._conditions(canvas), batch_size, options)
        return list(map(self.decode, np.concatenate(list(parts)), self._given(canvas)))

    def _given(self, canvas: Tokens) -> NDArray[np.bool_]:
        return canvas != self.manifest.denoiser.mask_token

    def _conditions(self, canvas: Tokens) -> Conditions:
        """Return conditions under which guidance strengthens what is given."""
        return Conditions(np.full(len(canvas), -1), given=self._given(canvas))

    def _begin(self) -> list[int]:
        return [] if self._text.begin < 0 else [self._text.begin]

    def _encode(self, name: str, text: str, *, inside: bool = False) -> list[int]:
        text = text_of(name, text)
        ids = self.tokenizer.encode(text, inside=inside) if text else []
        largest = self.manifest.denoiser.codebook - 1
        if max(ids, default=0) > largest:
            raise SamplingError(
                f"the tokenizer gave the id {max(ids)}, the model knows 0 to {largest}: they do "
                "not belong together; export the bundle again with the model's own --tokenizer"
            )
        return ids

    def _length(self, length: int) -> int:
        spec = self.manifest.denoiser
        wished = whole("length", length) or spec.length
        if wished > spec.length or (wished != spec.length and not spec.flexible):
            most = "between 1 and" if spec.flexible else "0 or"
            raise SamplingError(f"length must be {most} {spec.length} tokens, got {wished}")
        return wished

    def _longer(self, length: int) -> str:
        return " or allow for a larger length" if length < self.manifest.denoiser.length else ""
