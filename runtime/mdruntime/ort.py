"""Sessions of ONNX Runtime, the only module that imports it."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdruntime.bundle import Bundle
from mdruntime.cgroup import quota
from mdruntime.errors import BundleError, ProviderError, SamplingError
from mdruntime.manifest import GraphSpec
from mdruntime.ort_binding import Binding, Bindings, Caches, Copy
from mdruntime.ort_cuda import EAGER, Captures
from mdruntime.ort_open import Opened, explained, first_line, numbered, open_graph, share
from mdruntime.session import CLOSED, Feeds, Outputs

__all__ = ["OrtSession", "available_threads", "import_onnxruntime", "open_ort"]


def import_onnxruntime() -> ModuleType:
    """Import ONNX Runtime.

    Raises:
        ProviderError: it is not installed, or two of its packages overwrote each other.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ProviderError(
            f"ONNX Runtime cannot be imported ({error}); "
            "install it with: python -m pip install onnxruntime"
        ) from None
    if not hasattr(onnxruntime, "InferenceSession"):
        raise ProviderError(
            "ONNX Runtime is installed but broken, as happens when onnxruntime and onnxruntime-gpu "
            "overwrite each other; mend it with: python -m pip uninstall -y onnxruntime "
            "onnxruntime-gpu && python -m pip install onnxruntime"
        )
    return onnxruntime


def available_threads() -> int:
    """Return how many CPU threads this process may use: its affinity and its control groups."""
    cores, allowed = len(os.sched_getaffinity(0)), quota()
    return cores if allowed is None else max(1, min(cores, int(allowed)))


def _checked(threads: int) -> int:
    """Return how many threads to use, where 0 stands for all that may be."""
    cores = os.cpu_count() or 1
    if not 0 <= threads <= cores:  # more would only wait for each other, and spin meanwhile
        raise SamplingError(
            f"threads must be between 0 (as many as may be used) and {cores}, got {threads}"
        )
    return threads or available_threads()


def open_ort(
    bundle: Bundle,
    graph: str,
    provider: str,
    *,
    threads: int = 0,
    spelling: str = "",
    profile: Path | None = None,
) -> "OrtSession":
    """Open a graph of a bundle in ONNX Runtime.

    Args:
        bundle: an opened bundle.
        graph: name of the graph.
        provider: ``cpu``, ``cuda`` or ``ort-tensorrt``, which always takes TensorRT's spelling.
        threads: CPU threads; 0 takes as many as the process may use.
        spelling: open the graph as it is spelled for another backend.
        profile: folder that ONNX Runtime writes its profile into, if it is to keep one.

    Raises:
        ProviderError: the provider or its package is not available here.
    """
    spec = bundle.manifest.graphs[graph]
    if provider != "ort-tensorrt":
        path = bundle.path(graph, spelling)
        shared = bundle.manifest.digest
        return OrtSession(path, spec, provider, threads=threads, profile=profile, shared=shared)
    from mdruntime.ort_tensorrt import SAMPLES, device_copy, tensorrt_options

    return OrtSession(
        bundle.path(graph, spelling or "tensorrt"),
        spec,
        provider,
        threads=threads,
        options=tensorrt_options(bundle, graph),
        copy=device_copy(),
        samples=SAMPLES,
        shared=bundle.manifest.digest,
    )


class OrtSession:
    """A graph in ONNX Runtime, its caches, inputs and outputs resident on the device."""

    def __init__(  # noqa: PLR0913 - what providers differ in, all of it optional
        self,
        path: Path,
        spec: GraphSpec,
        provider: str,
        *,
        threads: int = 0,
        options: Mapping[str, str] = {},
        copy: Copy | None = None,
        samples: int = 0,
        profile: Path | None = None,
        shared: str = "",
    ) -> None:
        """Load the graph at ``path`` on ``provider``.

        Args:
            path: of the ONNX file.
            spec: of the graph.
            provider: ``cpu``, ``cuda`` or ``ort-tensorrt``.
            threads: CPU threads; 0 takes as many as the process may use.
            options: of ONNX Runtime's TensorRT provider.
            copy: inside the device, where passes do not work in place; see ``Caches``.
            samples: most that may run together; 0: as many as fit.
            profile: folder of ONNX Runtime's profile, if it is to keep one; see ``profiled``.
            shared: what is in the file; sessions that agree in all of this share the weights. Empty
                where that is not known.
        """
        threads = _checked(threads)
        load = partial(
            open_graph,
            import_onnxruntime(),
            path,
            provider,
            threads=threads,
            graphs=provider == "cuda" and bool(spec.caches),
            options=options,
            profile=profile,
        )
        key = (shared, path.resolve(), provider, threads, tuple(options.items()))
        opened = share(key, load) if shared and profile is None else load()
        self._samples = samples
        self._set(opened, spec, provider, copy)

    def _set(self, opened: Opened, spec: GraphSpec, provider: str, copy: Copy | None) -> None:
        device = "cpu" if provider == "cpu" else "cuda"
        self.provider = provider
        self.notes = list(opened.notes)
        self.downloaded = 0  # bytes of outputs, over all runs
        self._opened: Opened | None = opened
        self._spec, self._copy = spec, copy
        self._caches = Caches(opened.runtime, device, spec, copy)
        self._bindings = Bindings(opened.runtime, device)
        self._captures = Captures(opened.numbers) if opened.graphs else None

    @property
    def uploaded(self) -> int:
        """Bytes of inputs that went to the device, over all runs."""
        return self._bindings.uploaded

    @property
    def graphs(self) -> int:
        """How many CUDA graphs there are."""
        return 0 if self._captures is None else self._captures.count

    def profiled(self) -> Path:
        """End the profile that this session was opened with, and return its file."""
        return Path(self._open_session().session.end_profiling())

    def start(self, canvas: int) -> None:
        """Make the next passes go over canvases of this many rows."""
        self._caches.start(canvas)

    def views(self, sequences: int) -> list[NDArray[Any]] | None:
        """Return the caches of so many sequences where they are the host's."""
        if self.provider != "cpu" or self._copy is not None:
            return None
        self._make_room(self._open_session(), sequences)
        return self._caches.views(sequences)

    def clone(self) -> "OrtSession":
        """Return a session on the same weights with caches of its own."""
        twin = object.__new__(OrtSession)
        twin._samples = self._samples
        twin._set(self._open_session(), self._spec, self.provider, self._copy)
        return twin

    def close(self) -> None:
        """Drop the session and its caches."""
        if self._opened is not None:
            self._drop(self._opened, all_of_them=True)
            self._caches = Caches(self._opened.runtime, "cpu", self._spec)
        self._opened = None

    def run(self, feeds: Feeds, fetch: Sequence[str]) -> Outputs:
        """Run the graph and return the outputs in ``fetch``, in host memory."""
        opened = self._open_session()
        rows = len(feeds["tokens"]) if self._spec.caches else 0
        if rows and 0 < self._samples < len(feeds["conditional"]):
            raise SamplingError(
                f"engines of provider {self.provider!r} are for {self._samples} sample at a time, "
                f"got {len(feeds['conditional'])}; ask for batch_size={self._samples} "
                f"(--batch-size {self._samples})"
            )
        with opened.lock if opened.graphs else contextlib.nullcontext():
            try:
                outputs = self._bound(opened, feeds, fetch, rows)
            except Exception as error:
                raise explained("ONNX Runtime failed", error) from error
        self.downloaded += sum(array.nbytes for array in outputs.values())
        return outputs

    def _open_session(self) -> Opened:
        if self._opened is None:
            raise BundleError(CLOSED)
        return self._opened

    def _make_room(self, opened: Opened, rows: int) -> None:
        if self._caches.make_room(rows):
            self._drop(opened, all_of_them=True)  # they are bound to caches that are no more

    def _bound(self, opened: Opened, feeds: Feeds, fetch: Sequence[str], rows: int) -> Outputs:
        if rows:
            self._make_room(opened, rows)
        arrays = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        create = opened.session.io_binding
        bound, fresh = self._bindings.bind(arrays, fetch, self._caches.side, create)
        if fresh and rows:
            self._caches.bind(bound.binding, rows)
        self._launch(opened, bound)
        outputs = bound.fetched()
        if rows:
            self._caches.turn(rows)
        self._drop(opened)
        return outputs

    def _launch(self, opened: Opened, bound: Binding) -> None:
        if self._captures is None:
            opened.session.run_with_iobinding(bound.binding)
            return
        bound.number = self._captures.number(bound.runs, bound.number)
        bound.runs += 1
        try:
            opened.session.run_with_iobinding(bound.binding, numbered(opened, bound.number))
        except Exception as error:
            if bound.number == EAGER or isinstance(explained("", error), MemoryError):
                raise
            # A pass may be repeated: it writes what it wrote before.
            self._captures.on, bound.number = False, EAGER
            self.notes.append(f"CUDA graphs were given up: {first_line(error)}")
            opened.session.run_with_iobinding(bound.binding, numbered(opened, EAGER))

    def _drop(self, opened: Opened, *, all_of_them: bool = False) -> None:
        for number in self._bindings.evict(all_of_them=all_of_them):
            if self._captures is not None:
                self._captures.release(number)
            if hasattr(opened.session, "release_captured_graph"):
                opened.session.release_captured_graph(number)
