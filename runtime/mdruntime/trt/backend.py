"""A bundle on TensorRT: its engines, and the sessions of one thread."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mdruntime.bundle import Bundle
from mdruntime.cuda import Cuda, open_cuda
from mdruntime.session import ON_DEMAND
from mdruntime.trt import api, identity, store
from mdruntime.trt.device import Activations, TrtDevice
from mdruntime.trt.engine import LoadedEngine, PlanFile
from mdruntime.trt.session import TrtSession
from mdruntime.trt.store import Engines

__all__ = ["TrtBackend", "open_trt"]

_RARE = ("encoder",)  # graphs whose activations nobody waits for


class TrtBackend:
    """Satisfies ``session.Backend``: one stream and one block of activations for all graphs."""

    provider = "tensorrt"

    def __init__(
        self,
        bundle: Bundle,
        loaded: Mapping[str, LoadedEngine],
        cuda: Cuda,
        *,
        reserve: int,
        reduce_memory: bool,
    ) -> None:
        """Take a bundle's engines; they are loaded when they are first used.

        Args:
            bundle: an opened bundle.
            loaded: engines by graph, shared with clones.
            cuda: the device.
            reserve: bytes of activations that suffice for what mostly runs.
            reduce_memory: keep decoder and encoder in memory only while they run.
        """
        self._bundle, self._loaded, self._cuda = bundle, loaded, cuda
        self._reserve, self._reduce_memory = reserve, reduce_memory
        self._device = TrtDevice(cuda)
        self._sessions: dict[str, TrtSession] = {}

    def session(self, graph: str) -> TrtSession:
        """Return the session of a graph.

        Raises:
            BundleError: the bundle has no such graph.
            EngineError: there is no plan of it, or TensorRT refuses it.
        """
        self._bundle.path(graph)
        if graph not in self._sessions:
            self._sessions[graph] = self._open(graph)
        return self._sessions[graph]

    def _open(self, graph: str) -> TrtSession:
        self._device.guard.check()
        engine = self._loaded[graph]
        if self._reduce_memory and graph in ON_DEMAND:
            # In the shared block its activations would stay, and every CUDA graph would go.
            return TrtSession(engine, self._device, activations=Activations(self._cuda))
        return TrtSession(engine, self._device, reserve=self._reserve)

    def release(self, graph: str) -> None:
        """Close the session of a graph that is opened on demand."""
        if self._reduce_memory and graph in ON_DEMAND and graph in self._sessions:
            self._sessions.pop(graph).close()

    @property
    def notes(self) -> list[str]:
        """What the sessions say of themselves."""
        return [note for session in self._sessions.values() for note in session.notes]

    def clone(self) -> "TrtBackend":
        """Return a backend for another thread, with a stream of its own."""
        self._device.guard.check()
        return TrtBackend(
            self._bundle,
            self._loaded,
            self._cuda,
            reserve=self._reserve,
            reduce_memory=self._reduce_memory,
        )

    def close(self) -> None:
        """Close all sessions."""
        for session in self._sessions.values():
            session.close()


def open_trt(
    bundle: Bundle, *, reduce_memory: bool = False, engines: Path | None = None
) -> TrtBackend:
    """Open a bundle's engines for this machine.

    Args:
        bundle: an opened bundle.
        reduce_memory: keep decoder and encoder in memory only while they run.
        engines: folder of engines that are not published yet, in place of those of the bundle.

    Raises:
        ProviderError: TensorRT or CUDA is not available here.
        EngineError: no engines were built for this bundle and machine.
    """
    trt, cuda = api.import_tensorrt(), open_cuda()
    if engines is None:
        found = store.find(bundle, identity.current(bundle, cuda, trt))
    else:
        found = store.read_engines(engines)
    plans = found.record.plans
    loaded = {
        graph: LoadedEngine(trt, _plan(bundle, found, graph)) for graph in bundle.manifest.engines
    }
    skipped = (*_RARE, *(ON_DEMAND if reduce_memory else ()))
    reserve = max((plan.device_bytes for name, plan in plans.items() if name not in skipped))
    return TrtBackend(bundle, loaded, cuda, reserve=reserve, reduce_memory=reduce_memory)


def _plan(bundle: Bundle, engines: Engines, graph: str) -> PlanFile:
    options = engines.record.options

    def rebuild(batch: int) -> str:
        chosen = replace(options, max_batch=batch) if batch else options
        return store.build_command(bundle, chosen)

    return PlanFile(
        graph,
        engines.plan(graph),
        bundle.manifest.graphs[graph],
        options.version_compatible,
        rebuild,
    )
