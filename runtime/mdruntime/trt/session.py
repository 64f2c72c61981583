"""A graph on TensorRT: inputs go up in one piece, what is asked for comes down in one piece.

Caches never leave the device. Passes are on one stream, and the host waits at the end of each: it
needs the tokens, and may then write to the page-locked memory again.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdruntime.cuda import Stream
from mdruntime.denoiser import CONDITION
from mdruntime.errors import BundleError, EngineError, SamplingError
from mdruntime.session import CLOSED, Feeds, Outputs
from mdruntime.trt.buffers import Block, CacheSets, Place, arrange
from mdruntime.trt.capture import Kept, Passes
from mdruntime.trt.device import Activations, TrtDevice
from mdruntime.trt.engine import Context, LoadedEngine
from mdruntime.trt.fitting import Fit, fit, largest_batch, padded_to
from mdruntime.trt.profiles import Shape

__all__ = ["TrtSession"]


class TrtSession:
    """A graph in TensorRT; satisfies ``session.Session``."""

    provider = "tensorrt"

    def __init__(
        self,
        engine: LoadedEngine,
        device: TrtDevice,
        *,
        activations: Activations | None = None,
        reserve: int = 0,
    ) -> None:
        """Load an engine where nobody did yet, and provide for its activations.

        Args:
            engine: shared with clones.
            device: of this thread.
            activations: a block of memory in place of the device's own one.
            reserve: bytes of activations that other graphs will need of the same block.

        Raises:
            EngineError: TensorRT refuses the plan.
            MemoryError: the device has not enough.
        """
        self._engine, self._device = engine, device
        self._activations = activations or device.activations
        self.uploaded = self.downloaded = 0  # bytes, over all runs
        with contextlib.ExitStack() as held:
            engine.acquire()
            held.callback(engine.release)
            device.acquire()
            held.callback(device.release)
            self._activations.acquire(max(engine.activation_bytes, reserve))
            held.callback(self._activations.release)
            self._held: contextlib.ExitStack | None = held.pop_all()
        self._caches = CacheSets(device.cuda, engine.plan.spec)
        self._cached = {name for pair in engine.plan.spec.caches for name in pair}
        self._inputs, self._steady, self._outputs = (Block(device.cuda) for _ in range(3))
        self._sent: dict[str, Place] | None = None  # what lies in the steady block
        self._generation = 0
        self._passes = Passes(device.cuda, self._context)

    @property
    def notes(self) -> list[str]:
        """What is not as it should be, such as passes that cannot become CUDA graphs."""
        return [f"{self._engine.plan.path.name}: {note}" for note in self._passes.notes]

    @property
    def graphs(self) -> int:
        """How many CUDA graphs there are."""
        return self._passes.graphs

    def start(self, canvas: int) -> None:
        """Make the next passes go over canvases of this many rows."""
        self._caches.start(canvas)

    def views(self, sequences: int) -> None:
        """Return None: caches stay on the device."""

    def clone(self) -> "TrtSession":
        """Return a session on the same engine with a stream and caches of its own."""
        self._ready()
        return TrtSession(self._engine, self._device.clone())

    def close(self) -> None:
        """Give all memory back; in a process made by fork, do nothing."""
        if self._held is None or self._device.guard.forked:
            return
        held, self._held = self._held, None
        with held:
            self._passes.close()
            for memory in (self._caches, self._inputs, self._steady, self._outputs):
                memory.free()

    def run(self, feeds: Feeds, fetch: Sequence[str]) -> Outputs:
        """Run the graph and return the outputs in ``fetch``, in host memory of the caller's own.

        Raises:
            EngineError: the engine was not built for these sizes.
            ProviderError: TensorRT or CUDA failed.
        """
        self._ready()
        rows = len(feeds["tokens"]) if self._cached else 0
        stream = self._device.stream
        try:
            kept = self._prepared(feeds, fetch, rows)
            self._send(kept, feeds, stream)
            self._passes.launch(kept, stream)
            if rows:
                self._caches.keep(rows, stream)
            self._outputs.download(kept.download, stream)
            stream.synchronize()
        except BaseException:
            self._sent = None
            with contextlib.suppress(Exception):  # the first error says more
                stream.synchronize()
            raise
        if rows:
            self._caches.turn(rows)
        self.downloaded += kept.download
        return self._taken(kept, feeds, fetch)

    def _ready(self) -> None:
        self._device.guard.check()
        if self._held is None:
            raise BundleError(CLOSED)
        if self._generation != self._activations.generation:
            self._passes.clear()  # they were captured with another address
            self._generation = self._activations.generation

    def _context(self) -> Context:
        return Context(self._engine, self._activations)

    def _prepared(self, feeds: Feeds, fetch: Sequence[str], rows: int) -> Kept:
        """Return the pass with these shapes, new or known."""
        given = {**_shapes(feeds), **(self._caches.shapes(rows) if rows else {})}
        missing = [name for name in self._engine.inputs if name not in given]
        if missing:
            raise BundleError(f"the graph needs the input {', '.join(missing)}")
        given = {name: given[name] for name in self._engine.inputs}
        found = fit(self._engine.profiles, given)
        if found is None:
            raise self._unfit(given)
        if rows and self._caches.make_room(rows):
            self._passes.clear()
        key = (found.profile, *found.shapes.items(), tuple(fetch), self._caches.side)
        kept = self._passes.find(key)
        if kept is None:
            kept = self._laid_out(found, fetch)
            self._passes.add(key, kept)
        return kept

    def _laid_out(self, found: Fit, fetch: Sequence[str]) -> Kept:
        """Find places for all inputs and outputs of a pass."""
        types, answers = self._engine.inputs, self._engine.outputs
        _check_fetch(fetch, answers)
        crossing = [name for name in types if name not in self._cached]
        steady = [name for name in crossing if name.startswith(CONDITION)]
        moving = [name for name in crossing if name not in steady]
        self._passes.eager.reshape(found, self._device.stream)
        shapes = {**found.shapes, **self._passes.eager.output_shapes()}
        inputs, upload = arrange((n, shapes[n], types[n]) for n in moving)
        constant, size = arrange((n, shapes[n], types[n]) for n in steady)
        wanted, download = arrange((n, shapes[n], answers[n]) for n in fetch)
        rest = [n for n in answers if n not in wanted and n not in self._cached]
        others, end = arrange(((n, shapes[n], answers[n]) for n in rest), download)
        outputs = {**wanted, **others}
        self._reserve((upload, upload), (size, size), (end, download))
        addresses = self._addresses(inputs, constant, outputs)
        return Kept(found, inputs, constant, outputs, upload, download, addresses)

    def _reserve(self, *sizes: tuple[int, int]) -> None:
        blocks = (self._inputs, self._steady, self._outputs)
        moved = [
            block.reserve(*size) for block, size in zip(blocks, sizes, strict=True) if any(size)
        ]
        if any(moved):
            self._passes.clear()
            self._sent = None

    def _addresses(
        self,
        inputs: Mapping[str, Place],
        steady: Mapping[str, Place],
        outputs: Mapping[str, Place],
    ) -> dict[str, int]:
        found = dict(self._caches.addresses()) if self._cached else {}
        for block, places in (
            (self._inputs, inputs),
            (self._steady, steady),
            (self._outputs, outputs),
        ):
            found.update({name: block.address(place) for name, place in places.items()})
        return found

    def _send(self, kept: Kept, feeds: Feeds, stream: Stream) -> None:
        """Put the inputs on their way, conditions only where they changed."""
        shapes = _shapes(feeds)
        for name, place in kept.inputs.items():
            padded_to(self._inputs.view(place), name, feeds[name], shapes)
        self._inputs.upload(0, kept.upload, stream)
        self.uploaded += kept.upload
        same, self._sent = self._sent == kept.steady, kept.steady
        for name, place in kept.steady.items():
            view = self._steady.view(place)
            if not (same and np.array_equal(view, feeds[name])):
                np.copyto(view, feeds[name], casting="no")
                self._steady.upload(place.offset, place.nbytes, stream)
                self.uploaded += place.nbytes

    def _taken(self, kept: Kept, feeds: Feeds, fetch: Sequence[str]) -> Outputs:
        """Return the fetched outputs without the columns that were padded."""
        width = feeds["uniforms"].shape[1] if "uniforms" in feeds else None
        found: dict[str, NDArray[Any]] = {}
        for name in fetch:
            view = self._outputs.view(kept.outputs[name])
            found[name] = np.array(view if width is None else view[:, :width])
        return found

    def _unfit(self, given: Mapping[str, Shape]) -> EngineError:
        """Say what an engine was built for, what was asked for, and what helps."""
        plan = self._engine.plan
        most = largest_batch(self._engine.profiles)
        asked = given["conditional"][0] if "conditional" in given else 0
        if asked > most > 0:
            return EngineError(
                f"the engines of this bundle were built for batches of up to {most}, and {asked} "
                f"were asked for; ask for at most {most} at a time (--batch-size {most}), or build "
                f"engines for more: {plan.rebuild(asked)}"
            )
        words = ", ".join(f"{name} {list(shape)}" for name, shape in given.items())
        return EngineError(
            f"{plan.path.name} was not built for inputs of these shapes: {words}; build it again: "
            f"{plan.rebuild(0)}"
        )


def _check_fetch(fetch: Sequence[str], answers: Mapping[str, Any]) -> None:
    unknown = [name for name in fetch if name not in answers]
    if "logits" in unknown:
        raise SamplingError(
            "these engines return no logits, which order 'maskgit-exact' and head 'numpy' need; "
            "choose another order and head 'graph', or export the bundle again with --logits"
        )
    if unknown:
        raise BundleError(f"the graph has no output {', '.join(unknown)}")


def _shapes(feeds: Feeds) -> dict[str, Shape]:
    return {name: array.shape for name, array in feeds.items()}
