"""An opened bundle: its sessions, and the one loop that all pipelines run."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdruntime.bundle import Bundle
from mdruntime.conditions import Conditions, whole
from mdruntime.denoiser import HEADS, Denoiser, conditioner
from mdruntime.errors import SamplingError
from mdruntime.first import HEAD, FirstPass, FirstPasses
from mdruntime.manifest import Manifest
from mdruntime.ort import available_threads
from mdruntime.passes import Counted
from mdruntime.randomness import Randomness
from mdruntime.sampler import Canvas, Step, Tokens, unmask
from mdruntime.sampling import Sampling
from mdruntime.session import Backend, Session, open_backend
from mdruntime.tuned import Tuned
from mdruntime.watch import Spent, WatchedBackend

__all__ = ["Runner", "randomness"]


_PLAIN = Sampling()
_OF_ORDER = ("substeps", "refresh", "refresh_interval", "tokens")
"""Options whose good values depend on the order."""


class Runner:
    """Sessions of a bundle's graphs, opened when they are first used. One per thread."""

    def __init__(  # noqa: PLR0913 - what a device may ask for, all of it optional
        self,
        bundle: Bundle,
        provider: str = "cpu",
        *,
        threads: int = 0,
        head: str = "graph",
        tuned: Tuned | None = None,
        reduce_memory: bool = False,
        precision: str = "",
        first_pass_mb: float = 0.0,
    ) -> None:
        """Open the denoiser of a bundle.

        Args:
            bundle: an opened bundle.
            provider: execution provider; no other is used in its place.
            threads: CPU threads; 0 takes as many as the process may use.
            head: draw tokens in the ``graph``, or in ``numpy`` from its logits.
            tuned: what was chosen for this device; it is the default then.
            reduce_memory: keep one large graph in memory at a time; see ``load``.
            precision: one that the bundle was exported in, such as ``int8``; its own if empty.
            first_pass_mb: megabytes for answers of first passes; see ``FirstPasses``.

        Raises:
            SamplingError: the bundle has no such precision.
            ProviderError: the provider is not available on this machine.
            EngineError: TensorRT has no engines for this bundle and machine.
        """
        if head not in HEADS:
            raise SamplingError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
        self.bundle = bundle
        self.tuned = tuned
        self._threads = threads
        self._head = head
        self._counted: Counted | None = None
        self._runs = 0  # begun so far
        self._unfinished = False  # whether passes of the last one are yet to come
        self.first_passes = _first_passes(first_pass_mb)
        self.precision = precision or bundle.manifest.precision
        self._backend: Backend = open_backend(
            bundle,
            provider,
            threads=threads,
            precision=precision,
            reduce_memory=reduce_memory,
        )
        try:
            self.session("denoiser")
        except BaseException:
            self._backend.close()
            raise

    @classmethod
    def over(cls, bundle: Bundle, backend: Backend) -> "Runner":
        """Return a runner over a backend of one's own, which it closes."""
        runner = object.__new__(cls)
        runner.bundle, runner.tuned, runner.precision = bundle, None, bundle.manifest.precision
        runner._threads, runner._head, runner._runs = 0, "graph", 0
        runner._unfinished = False
        runner._backend, runner._counted, runner.first_passes = backend, None, FirstPasses(0)
        return runner

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.bundle.manifest

    @property
    def provider(self) -> str:
        """The execution provider in use."""
        return self._backend.provider

    @property
    def threads(self) -> int:
        """CPU threads in use."""
        return self._threads or available_threads()

    @property
    def presets(self) -> dict[str, Sampling]:
        """Those of the bundle, and ``tuned``, which is then the default."""
        if self.tuned is None:
            return self.manifest.presets
        chosen = self.tuned.sampling
        return {**self.manifest.presets, "default": chosen, "tuned": chosen}

    def session(self, graph: str) -> Session:
        """Return the session of a graph.

        Raises:
            BundleError: the bundle has no such graph.
        """
        if graph == "denoiser" and self._counted is not None:
            return self._counted
        return self._backend.session(graph)

    @property
    def notes(self) -> list[str]:
        """What is not as it should be, such as why passes are slower than they could be."""
        return self._backend.notes

    def counted(self) -> Counted:
        """Return the denoiser's session, which remembers the sizes of its passes from now on."""
        if self._counted is None:
            self._counted = Counted(self._backend.session("denoiser"))
        return self._counted

    def watched(self) -> dict[str, Spent]:
        """Return time and bytes by graph, which every run adds to from now on."""
        if not isinstance(self._backend, WatchedBackend):
            self._backend, self._counted = WatchedBackend(self._backend), None
        return self._backend.spent

    def clone(self) -> "Runner":
        """Return a runner for another thread: the same weights, caches of its own."""
        twin = Runner.over(self.bundle, self._backend.clone())
        twin.tuned, twin.precision = self.tuned, self.precision
        twin._head, twin._threads, twin.first_passes = self._head, self._threads, self.first_passes
        if self._counted is not None:
            twin.counted()
        return twin

    def close(self) -> None:
        """Release the sessions' memory."""
        self._backend.close()

    def sampling(self, preset: str, options: dict[str, Any]) -> Sampling:
        """Return a preset, with some options changed.

        Another order than the preset's own begins without partial caching and with plain settings:
        what was chosen for one order may be poor, or not even possible, with another.

        Raises:
            SamplingError: an unknown preset or option, or a value out of range.
        """
        presets = self.presets
        if preset not in presets:
            hint = "; 'mdruntime tune' makes that one" if preset == "tuned" else ""
            raise SamplingError(f"preset must be one of {', '.join(presets)}, got {preset!r}{hint}")
        base = presets[preset]
        if options.get("order", base.order) != base.order:
            base = base.but(**{name: getattr(_PLAIN, name) for name in _OF_ORDER})
        return base.but(**options)

    def unmask(
        self, tokens: Tokens, conditions: Conditions, sampling: Sampling, source: Randomness
    ) -> Iterator[Step]:
        """Reveal the hidden tokens of canvases, yielding after every pass.

        Args:
            tokens: int32 (batch, length), the mask token where hidden.
            conditions: of the batch.
            sampling: the options.
            source: randomness of the batch.
        """
        spec, graphs = self.manifest.denoiser, self.manifest.graphs
        condition = None
        if "condition" in graphs:
            condition = conditioner(self.session("condition"), graphs["condition"])
        session = self.session("denoiser")
        first = self._first_pass(session, sampling)
        denoiser = Denoiser(
            session, spec, conditions, head=self._head, condition=condition, first=first
        )
        length = tokens.shape[1]
        grid = spec.grid if length == spec.length else (length,)
        canvas = Canvas(length, grid, spec.mask_token)
        return self._alone(unmask(denoiser, tokens, canvas, sampling, source))

    def _first_pass(self, session: Session, sampling: Sampling) -> FirstPass | None:
        """Return what runs first passes, if their answers are kept."""
        if not self.first_passes.limit or session.provider != "cpu":
            return None
        head = None
        if HEAD in self.manifest.graphs and self._head == "graph":
            head = partial(self.session, HEAD)
        cached = sampling.substeps > 1 or sampling.refresh_interval > 1
        return FirstPass(self.first_passes, session, head, partial=cached)

    def _alone(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Pass steps on until another run begins: its keys and values are in the caches then."""
        self._runs += 1
        run = self._runs
        try:
            for step in steps:
                self._unfinished = step.hidden > 0
                yield step
                if step.hidden and run != self._runs:
                    raise SamplingError(
                        "another generation began on this pipeline before this one was finished; "
                        "finish one first, or run the other on a clone()"
                    )
        finally:
            if run == self._runs:
                self._unfinished = False

    def request(self, batch: int, options: dict[str, Any]) -> tuple[Sampling, Randomness]:
        """Return what a call asks for: ``seed``, ``first_index``, ``preset``, sampler options."""
        rest = dict(options)
        source = randomness(rest.pop("seed", 0), rest.pop("first_index", 0), batch)
        return self.sampling(rest.pop("preset", "default"), rest), source

    def finish(
        self, tokens: Tokens, conditions: Conditions, batch_size: int, options: dict[str, Any]
    ) -> Iterator[Tokens]:
        """Reveal all hidden tokens of canvases, and yield them batch by batch.

        Args:
            tokens: int32 (batch, length).
            conditions: of the whole batch.
            batch_size: largest number of samples that run together.
            options: see ``request``.
        """
        sampling, source = self.request(len(tokens), options)
        size = whole("batch_size", batch_size, 1)
        for start in range(0, len(tokens), size):
            part = np.arange(start, min(start + size, len(tokens)))
            some, done = source.take(part.tolist()), tokens[part]
            for step in self.unmask(done, conditions.take(part), sampling, some):
                done = step.tokens
            yield done

    def blank(self, batch: int, length: int = 0) -> Tokens:
        """Return canvases with all tokens hidden, (batch, length); 0 is the model's length."""
        spec = self.manifest.denoiser
        return np.full((batch, length or spec.length), spec.mask_token, np.int32)

    def one_by_one(self, graph: str, name: str, items: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Run a graph with one input and one output item by item, and return all results.

        Image decoders and encoders are bound by arithmetic, and their activations are large.
        """
        output = self.manifest.graphs[graph].outputs[0].name if items else ""
        if not self._unfinished:
            self._backend.release("denoiser")
        session = self.session(graph)
        try:
            return np.concatenate([session.run({name: i[None]}, [output])[output] for i in items])
        finally:
            self._backend.release(graph)


def _first_passes(megabytes: float) -> FirstPasses:
    if not 0 <= megabytes < math.inf:
        raise SamplingError(f"first_pass_mb must be 0 (keep nothing) or more, got {megabytes}")
    return FirstPasses(megabytes)


def randomness(seed: int, first_index: int, batch: int) -> Randomness:
    """Return the random numbers of ``batch`` samples, the first of which has ``first_index``."""
    first = whole("first_index", first_index)
    whole("the index of the last sample", first + batch - 1)
    return Randomness(whole("seed", seed), range(first, first + batch))
