"""The seam between samplers and backends: one graph on one execution provider.

A *session* runs a graph; a *backend* is all of a bundle on one provider and opens sessions.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mdruntime.bundle import Bundle
from mdruntime.errors import ProviderError, SamplingError
from mdruntime.manifest import Manifest

__all__ = [
    "CLOSED",
    "INT8",
    "ON_DEMAND",
    "PROVIDERS",
    "Backend",
    "Feeds",
    "FunctionSession",
    "Outputs",
    "Session",
    "Wrapper",
    "open_backend",
    "open_session",
    "precisions_of",
    "spelling_of",
]

Array = NDArray[Any]
Feeds = Mapping[str, Array]
Outputs = dict[str, Array]

PROVIDERS = ("cpu", "cuda", "tensorrt", "ort-tensorrt")
ON_DEMAND = ("decoder", "encoder")
"""Graphs that run before or after all passes, and need no memory in between."""
CLOSED = "the pipeline is closed; load the bundle again"
"""What a session says that is used after it was closed."""
INT8 = "int8"
"""Spelling of denoiser and decoder with products in int8, for CPUs."""


class Session(Protocol):
    """A graph that can be run.

    K/V caches are no business of the caller: the session keeps them on its device between runs,
    for as many sequences as the last full pass had.
    """

    provider: str

    def start(self, canvas: int) -> None:
        """Say that the next passes are over canvases of this many rows, from a full pass on."""

    def run(self, feeds: Feeds, fetch: Sequence[str]) -> Outputs:
        """Run the graph once and return the outputs named in ``fetch``."""

    def views(self, sequences: int) -> list[Array] | None:
        """Return the caches of so many sequences, (sequences, ...) each, to be read and written.

        None where they do not lie in the memory of the host.
        """

    def clone(self) -> "Session":
        """Return a session that shares the weights but not the caches, for another thread."""

    def close(self) -> None:
        """Release the device's memory."""


class Backend(Protocol):
    """A bundle's graphs on one execution provider, for one thread."""

    provider: str

    def session(self, graph: str) -> Session:
        """Return the session of a graph, opened when it is first asked for.

        Raises:
            BundleError: the bundle has no such graph.
        """

    def release(self, graph: str) -> None:
        """Say that a graph is not needed for now; where memory is short, its session is closed.

        Its keys and values are lost: the next pass has to be a full one.
        """

    @property
    def notes(self) -> list[str]:
        """What is not as it should be, such as why passes are slower than they could be."""

    def clone(self) -> "Backend":
        """Return a backend for another thread: the same weights, caches of its own."""

    def close(self) -> None:
        """Close all sessions."""


class FunctionSession:
    """A function in a session's clothes: makes every sampler testable without a model."""

    provider = "function"

    def __init__(self, function: Callable[[Feeds], Mapping[str, Array]]) -> None:
        """Take the function from feeds to outputs."""
        self.function = function

    def start(self, canvas: int) -> None:
        """Do nothing: a function keeps no caches."""

    def run(self, feeds: Feeds, fetch: Sequence[str]) -> Outputs:
        """Call the function and return the outputs named in ``fetch``."""
        outputs = self.function(feeds)
        return {name: np.asarray(outputs[name]) for name in fetch}

    def views(self, sequences: int) -> list[Array] | None:
        """Return nothing: a function keeps no caches."""
        return []

    def clone(self) -> "FunctionSession":
        """Return a session around the same function."""
        return FunctionSession(self.function)

    def close(self) -> None:
        """Do nothing: a function holds no memory of a device."""


class Wrapper:
    """A session around another one, to be derived from by what does something besides."""

    def __init__(self, session: Session) -> None:
        """Take the session that does the work."""
        self.inner = session
        self.provider = session.provider

    def start(self, canvas: int) -> None:
        """Pass it on."""
        self.inner.start(canvas)

    def run(self, feeds: Feeds, fetch: Sequence[str]) -> Outputs:
        """Pass it on."""
        return self.inner.run(feeds, fetch)

    def views(self, sequences: int) -> list[Array] | None:
        """Return those of the inner session."""
        return self.inner.views(sequences)

    def close(self) -> None:
        """Pass it on."""
        self.inner.close()


def open_backend(
    bundle: Bundle,
    provider: str,
    *,
    threads: int = 0,
    spelling: str = "",
    precision: str = "",
    reduce_memory: bool = False,
    engines: Path | None = None,
) -> Backend:
    """Open a bundle on the execution provider asked for, and on no other.

    Args:
        bundle: an opened bundle.
        provider: one of ``PROVIDERS``.
        threads: CPU threads; 0 takes as many as the process may use.
        spelling: open graphs as they are spelled for another backend, where they are.
        precision: ``int8`` for products in int8, where the bundle has them; as exported if empty.
        reduce_memory: keep one large graph in memory at a time; see ``load``.
        engines: folder with engines of TensorRT that are not published yet.

    Raises:
        ProviderError: the provider or its package is not available here.
        EngineError: TensorRT has no engines for this bundle and machine.
    """
    if provider not in PROVIDERS:
        raise ProviderError(f"provider must be one of {', '.join(PROVIDERS)}, got {provider!r}")
    spelling = spelling or spelling_of(bundle, provider, precision)
    if provider == "tensorrt":
        if spelling:
            raise SamplingError("engines of TensorRT are spelled as they were built: no spelling")
        from mdruntime.trt.backend import open_trt

        return open_trt(bundle, reduce_memory=reduce_memory, engines=engines)
    if engines is not None:
        raise SamplingError(f"engines are TensorRT's; provider {provider!r} has none")

    from mdruntime.sessions import Sessions

    def opened(graph: str) -> Session:
        return open_session(bundle, graph, provider, threads=threads, spelling=spelling)

    return Sessions(provider, opened, reduce_memory=reduce_memory)


def precisions_of(manifest: Manifest) -> list[str]:
    """Return the precisions that a bundle was built in, its own first."""
    spellings = manifest.graphs["denoiser"].spellings
    return [manifest.precision, *([INT8] if INT8 in spellings else [])]


def spelling_of(bundle: Bundle, provider: str, precision: str) -> str:
    """Return the spelling of a precision that a bundle was exported in; empty: its own.

    Raises:
        SamplingError: the bundle has no such precision.
        ProviderError: the provider does not run it.
    """
    manifest = bundle.manifest
    if precision in ("", manifest.precision):
        return ""
    built = precisions_of(manifest)
    if precision not in built:
        cure = ""
        if precision == INT8:
            cure = "; for int8 on a CPU export it in fp32 with: mdexport build ... --int8"
        raise SamplingError(
            f"precision must be one of {', '.join(built)} here, got {precision!r}{cure}"
        )
    if provider != "cpu":
        cure = ", or build engines with: mdruntime build --int8" if provider == "tensorrt" else ""
        raise ProviderError(
            f"precision int8 is spelled for provider 'cpu', not for {provider!r}; choose "
            f"--provider cpu{cure}"
        )
    return INT8


def open_session(
    bundle: Bundle, graph: str, provider: str, *, threads: int = 0, spelling: str = ""
) -> Session:
    """Open one graph of a bundle; the arguments are those of ``open_backend``.

    Raises:
        ProviderError: the provider or its package is not available here.
        EngineError: TensorRT has no engines for this bundle and machine.
    """
    if provider == "tensorrt" or provider not in PROVIDERS:
        return open_backend(bundle, provider, threads=threads, spelling=spelling).session(graph)
    from mdruntime.ort import open_ort

    return open_ort(bundle, graph, provider, threads=threads, spelling=spelling)
