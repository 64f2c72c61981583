"""Answers of first passes, kept: they are the same for every seed.

A trajectory begins with a full pass over a canvas on which nothing is drawn yet. Its logits, keys
and values depend on the condition, the guidance and the tokens that were given, but on no random
number; only the draws from the logits do. So whoever asks for the same again gets the logits that
were kept, and the head, as a graph of its own, draws from them what the pass would have drawn.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdruntime.head import Draws
from mdruntime.session import Feeds, Outputs, Session

__all__ = ["FIRST_PASS_MB", "HEAD", "HEAD_INPUTS", "FirstPass", "FirstPasses"]

HEAD = "head"
"""The graph from logits to draws."""
FIRST_PASS_MB = 128.0
"""Megabytes for answers that pipelines keep unless told otherwise."""
HEAD_INPUTS = ("logits", "temperature", "beta", "token_beta", "uniforms")

_OF_SAMPLES = ("guidance", "temperature", "beta", "token_beta", "uniforms")
_FREE = (*_OF_SAMPLES[1:], "columns", "conditional", "unconditional")
"""Inputs that logits do not depend on, or only by where they are wanted."""
_MOST_SEEN = 4096

Array = NDArray[Any]
Key = bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """What a pass said of a sample."""

    logits: Array  # (k, codebook), guided
    caches: tuple[Array, ...]  # of its sequences, (1 or 2, ...) each; none where none are needed

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return sum(array.nbytes for array in (self.logits, *self.caches))


class FirstPasses:
    """Answers within a limit of memory, the ones not asked for for longest going first.

    What is asked for once may never be asked for again, and keeping it costs time: an answer is
    kept from the second time on. Safe to share between threads.
    """

    def __init__(self, megabytes: float) -> None:
        """Keep at most so many megabytes (10^6 bytes); 0 keeps nothing."""
        self.limit = int(megabytes * 1e6)
        self.hits = 0
        """Samples whose first pass did not have to run."""
        self._answers: OrderedDict[Key, Answer] = OrderedDict()
        self._seen: OrderedDict[Key, None] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Key) -> Answer | None:
        """Return an answer that is kept."""
        with self._lock:
            if key in self._answers:
                self._answers.move_to_end(key)
            return self._answers.get(key)

    def asked_before(self, key: Key) -> bool:
        """Return whether this was asked for before, and remember that it was."""
        with self._lock:
            before = key in self._seen
            self._seen[key] = None
            self._seen.move_to_end(key)
            if len(self._seen) > _MOST_SEEN:
                self._seen.popitem(last=False)
            return before

    def put(self, key: Key, answer: Answer) -> None:
        """Keep an answer, if it fits at all."""
        with self._lock:
            if answer.bytes > self.limit or key in self._answers:
                return
            self._answers[key] = answer
            self._bytes += answer.bytes
            while self._bytes > self.limit:
                self._bytes -= self._answers.popitem(last=False)[1].bytes


class FirstPass:
    """Runs the first pass of a batch, as far as its answers are not known."""

    def __init__(
        self,
        kept: FirstPasses,
        session: Session,
        head: Callable[[], Session] | None,
        *,
        partial: bool,
    ) -> None:
        """Take what is kept and what runs.

        Args:
            kept: answers of earlier passes.
            session: of the denoiser.
            head: opens the graph ``HEAD``, which most first passes never need; without it, only
                logits are answered.
            partial: whether partial passes will follow, which need keys and values.
        """
        self._kept, self._session, self._head, self._partial = kept, session, head, partial

    def run(
        self, feeds: Feeds, fetch: Sequence[str], everywhere: NDArray[np.int32], codebook: int
    ) -> Outputs:
        """Return what the session's ``run`` would return, bit by bit.

        Args:
            feeds: of a full pass, just after the session's ``start``.
            fetch: names of the outputs wanted.
            everywhere: int32 (sequences, K), rising: all columns that logits may ever be wanted of,
                for a known order wants others of them for every seed.
            codebook: tokens that logits are about.
        """
        if not self._useful(feeds, fetch, everywhere, codebook):
            return self._session.run(feeds, fetch)
        keys = list(_keys(feeds, f"{_sequences(feeds)} sequences, caches: {self._partial}"))
        found = {key: self._kept.get(key) for key in keys}
        again = {key for key in found if self._kept.asked_before(key) or keys.count(key) > 1}
        missing = [keys.index(key) for key, answer in found.items() if answer is None]
        if len(missing) == len(keys) and not again:
            return self._session.run(feeds, fetch)
        if missing:
            for sample, new in self._answers(_part(feeds, missing, everywhere), missing):
                found[keys[sample]] = new
                if keys[sample] in again:
                    self._kept.put(keys[sample], new)
        self._kept.hits += len(keys) - len(missing)
        answers = [answer for key in keys if (answer := found[key])]
        return self._drawn(answers, feeds, fetch, everywhere)

    def _useful(self, feeds: Feeds, fetch: Sequence[str], everywhere: Array, codebook: int) -> bool:
        """Return whether answers of these feeds can be kept and used."""
        if self._head is None and set(fetch) != {"logits"}:
            return False
        numbers = everywhere.shape[1] * _slots(feeds) * codebook
        bytes_ = numbers * np.dtype(np.float32).itemsize
        if self._partial:
            views = self._session.views(len(feeds["tokens"]))
            if views is None:
                return False
            bytes_ += _sequences(feeds) * sum(view[:1].nbytes for view in views)
        return bytes_ <= self._kept.limit

    def _answers(self, feeds: Feeds, samples: Sequence[int]) -> Iterator[tuple[int, Answer]]:
        """Run the pass of some samples; yield each with its answer."""
        logits = self._session.run(feeds, ["logits"])["logits"]
        views = self._session.views(len(feeds["tokens"])) if self._partial else None
        for place, sample in enumerate(samples):
            caches = [np.array(view[place :: len(samples)]) for view in views or ()]
            yield sample, Answer(np.array(logits[place]), tuple(caches))

    def _drawn(
        self, answers: Sequence[Answer], feeds: Feeds, fetch: Sequence[str], everywhere: Array
    ) -> Outputs:
        """Return the outputs of a pass with these answers, and leave its caches behind."""
        samples = len(answers)
        views = self._session.views(len(feeds["tokens"])) if self._partial else None
        for number, view in enumerate(views or ()):
            for sample, answer in enumerate(answers):
                view[sample::samples] = answer.caches[number]
        wanted = feeds["columns"][:samples, :, None]
        place = (everywhere[:samples, None] < wanted).sum(axis=2)[..., None]
        row = (place * _slots(feeds) + np.arange(_slots(feeds))).reshape(samples, -1)
        logits = np.stack([one.logits[rows] for one, rows in zip(answers, row, strict=True)])
        outputs: Outputs = {"logits": logits}
        if set(fetch) != {"logits"}:
            assert self._head is not None
            inputs = {"logits": logits, **{name: feeds[name] for name in HEAD_INPUTS[1:]}}
            outputs |= self._head().run(inputs, list(Draws._fields))
        return {name: outputs[name] for name in fetch}


def _sequences(feeds: Feeds) -> int:
    """Return how many sequences there are of each sample: two under guidance."""
    return len(feeds["tokens"]) // len(feeds["guidance"])


def _slots(feeds: Feeds) -> int:
    """Return how many tokens share a row."""
    return int(feeds["uniforms"].shape[1] // feeds["columns"].shape[1])


def _keys(feeds: Feeds, kind: str) -> Iterator[Key]:
    """Yield, for each sample, a hash of all that its answer depends on."""
    samples = len(feeds["guidance"])
    for sample in range(samples):
        hashed = hashlib.blake2b(kind.encode(), digest_size=16)
        for name, array in feeds.items():
            if name not in _FREE:
                part = array[sample::samples]
                hashed.update(repr((name, part.shape, part.dtype.str)).encode())
                hashed.update(part.tobytes())
        yield hashed.digest()


def _part(feeds: Feeds, samples: Sequence[int], everywhere: Array) -> Feeds:
    """Return the feeds of some samples of a batch, which want logits everywhere."""
    batch, sequences, count = len(feeds["guidance"]), _sequences(feeds), len(samples)
    uniforms = np.zeros((batch, everywhere.shape[1] * _slots(feeds)), np.float32)
    whole = {**feeds, "columns": everywhere, "uniforms": uniforms}
    chosen = np.asarray(samples, np.int64)
    rows = np.concatenate([chosen + batch * number for number in range(sequences)])
    first = np.arange(count, dtype=np.int32)
    pairs = {"conditional": first, "unconditional": first + np.int32(count * (sequences - 1))}
    return {
        name: pairs[name] if name in pairs else array[chosen if name in _OF_SAMPLES else rows]
        for name, array in whole.items()
    }
