"""Are texts as likely, as varied and as well spelt as those that a model was trained on?

Two n-gram models answer the first two questions. One of the training documents tells how likely
the texts are: too unlikely is nonsense, too likely is dull. One of the texts tells how likely
held-out documents are by it: less likely than by as many real texts, if the texts leave out what
those have. Real texts of the same number and size are the measure of both. An n-gram sees eight
bytes: neither model knows whether a sentence makes sense.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import islice

import numpy as np

from ngram import learnt

__all__ = ["TextJudge", "alternate", "distinct", "entropy", "openings", "words"]

DRAWS = 3  # sets of real texts that the reverse measure is compared with
SIZE_STEP = 25  # bytes; texts of similar sizes are compared with the same real ones
_WORD = re.compile(r"[A-Za-z]+(?=[^A-Za-z])")  # the last one of a text may be cut off


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, but for one that its end may have cut off."""
    return _WORD.findall(text.lower())


def entropy(symbols: Sequence[object]) -> float:
    """Return the entropy of how often symbols occur, in bits; 0 where there are none."""
    counts = np.array(list(Counter(symbols).values()), np.float64)
    shares = counts / counts.sum()
    return abs(float((shares * np.log2(shares)).sum()))


def distinct(texts: Sequence[Sequence[str]], length: int) -> float:
    """Return the share of runs of ``length`` words that are not repeats of another one."""
    runs = [
        run
        for text in texts
        for run in zip(*(islice(text, start, None) for start in range(length)), strict=False)
    ]
    return len(set(runs)) / max(1, len(runs))


def openings(documents: Sequence[str], size: int) -> list[str]:
    """Return texts of ``size`` characters that begin with a paragraph and do not overlap."""
    return [text for document in documents for text in _openings(document, size)]


def _openings(document: str, size: int) -> Iterator[str]:
    start = 0
    while start + size <= len(document):
        yield document[start : start + size]
        # The newline before may be the last character of what was just taken.
        start = document.find("\n", start + size - 1) + 1 or len(document)


def alternate(documents: Sequence[str], start: int) -> list[str]:
    """Return documents with every other paragraph only, from the paragraph ``start`` on."""
    halves = ("\n".join(document.split("\n")[start::2]) for document in documents)
    return [half for half in halves if half]


class TextJudge:
    """Scores texts against documents; satisfies ``mdexport.study.Judge``."""

    measure = "excess"

    def __init__(self, train: Sequence[str], held_out: Sequence[str]) -> None:
        """Take documents in ASCII, one paragraph a line, of training and held out."""
        self._train = train
        # What is to be foreseen is never among the real texts that stand beside the others.
        self._foreseen, self._held_out = (alternate(held_out, start) for start in (0, 1))
        self._model = learnt(train)
        self._known = frozenset(word for document in train for word in words(document + "\n"))
        self._real = cache(self._measured)

    def score(
        self, samples: Sequence[str], labels: Sequence[int] | None = None
    ) -> Mapping[str, float]:
        """Score texts.

        Args:
            samples: as many as there will be in any other set to compare with.
            labels: not used.

        Returns:
            ``nll``: bits a byte of the texts by the n-gram model of the training documents;
            ``reverse``: bits a byte of held-out paragraphs by an n-gram model of the texts;
            ``excess``: how much the two differ from those of real texts, ``reverse`` counting only
            where it is worse; ``entropy`` of single words, in bits; ``distinct_1`` to
            ``distinct_3``: shares of words, pairs and triples that are no repeats; ``words``: the
            share of words that occur in the training documents.

        Raises:
            ValueError: the samples are not texts, or all are empty.
        """
        if not all(isinstance(sample, str) for sample in samples):
            raise ValueError("this judge scores texts: its samples must be of a text model")
        nll, reverse = self._model.bits(samples), learnt(samples).bits(self._foreseen)
        size = sum(len(sample.encode()) for sample in samples) / len(samples)
        real_nll, real_reverse = self._real(len(samples), _rounded(size))
        spelt = [words(sample) for sample in samples]
        every = [word for text in spelt for word in text]
        return {
            "excess": abs(nll - real_nll) + max(0.0, reverse - real_reverse),
            "nll": nll,
            "reverse": reverse,
            "entropy": entropy(every),
            **{f"distinct_{length}": distinct(spelt, length) for length in (1, 2, 3)},
            "words": sum(word in self._known for word in every) / max(1, len(every)),
        }

    def real(self, use: str, count: int, size: int, seed: int = 0) -> list[str]:
        """Return real texts: parts of documents that begin with a paragraph, none twice.

        Args:
            use: ``train`` or ``held-out``.
            count: how many; fewer are returned where there are fewer.
            size: characters of each.
            seed: of the choice.

        Raises:
            ValueError: no document is that long.
        """
        found = openings(self._train if use == "train" else self._held_out, size)
        if not found:
            raise ValueError(f"no {use} document has {size} characters: judge shorter texts")
        chosen = np.random.default_rng(seed).permutation(len(found))[:count]
        return [found[index] for index in chosen]

    def _measured(self, count: int, size: int) -> tuple[float, float]:
        """Return ``nll`` of held-out texts, and ``reverse`` of as many training texts."""
        reverse = [
            learnt(self.real("train", count, size, seed)).bits(self._foreseen)
            for seed in range(DRAWS)
        ]
        every = self.real("held-out", sys.maxsize, size)
        return self._model.bits(every), float(np.mean(reverse))


def _rounded(size: float) -> int:
    return max(1, round(size / SIZE_STEP)) * SIZE_STEP
