"""Fakes shared by the tests of the sampler: model-free denoisers that always see everything."""

import runpy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mdruntime.bundle import Bundle
from mdruntime.head import Controls, draw
from mdruntime.manifest import (
    DenoiserSpec,
    Manifest,
    TextSpec,
    VerificationRecord,
    WeightsSpec,
)
from mdruntime.randomness import Purpose, Randomness
from mdruntime.runner import Runner
from mdruntime.sampler import Denoise, Pass, Result, Tokens
from mdruntime.sampling import Sampling
from mdruntime.session import Feeds, FunctionSession
from mdruntime.text import TextPipeline


@dataclass(frozen=True, slots=True)
class Lookup:
    """A denoiser that looks its logits up by the state of the whole canvas.

    The canvas, read as digits in base codebook + 1, is a number; modulo the table's length it
    names a row. With a row per canvas that is any denoiser, with fewer a chaotic one. All of
    the canvas is looked at in partial passes too, so nothing is ever stale.
    """

    table: NDArray[np.float32]  # (states, length, codebook)
    canvas: Tokens  # (batch, length), as last seen

    def __call__(self, request: Pass) -> Result:
        if request.positions is None:
            self.canvas[request.samples] = request.tokens
        else:
            self.canvas[request.samples[:, None], request.positions] = request.tokens
        states, length, codebook = self.table.shape
        digits = np.array([(codebook + 1) ** place % states for place in range(length)])
        logits = self.table[self.canvas[request.samples].astype(np.int64) @ digits % states]
        logits = np.take_along_axis(logits, request.wanted[..., None], axis=1)
        return Result(draw(logits, request.controls, request.uniforms), logits)


class Bulk(Randomness):
    """Random numbers of another stream for a whole batch at once: for laws, which need many."""

    def take(self, samples: Sequence[int]) -> "Bulk":
        return Bulk(self.seed, [self.indices[sample] for sample in samples])

    def bits(self, purpose: Purpose, turn: int, count: int) -> NDArray[np.uint64]:
        counter = np.array([0, purpose, turn, 0], np.uint64)
        stream = np.random.Philox(counter=counter, key=np.array([self.seed, 1 << 63], np.uint64))
        wide: NDArray[np.uint64] = stream.random_raw((max(self.indices) + 1) * count)
        return wide.reshape(-1, count)[np.array(self.indices)]


@pytest.fixture(scope="session")
def lookup() -> Callable[[NDArray[np.float32], int], Denoise]:
    """Return a function from a table (states, length, codebook) and a batch size to a fake."""

    def build(table: NDArray[np.float32], batch: int) -> Denoise:
        return Lookup(table, np.zeros((batch, table.shape[1]), np.int32))

    return build


@pytest.fixture(scope="session")
def bulk() -> Callable[[int, int], Randomness]:
    """Return a function from a seed and a batch size to random numbers."""
    return lambda seed, batch: Bulk(seed, range(batch))


@pytest.fixture
def toy(lookup: Callable[[NDArray[np.float32], int], Denoise]) -> Callable[[int], Denoise]:
    """Return a function from a batch size to a chaotic denoiser of 4 x 4 tokens out of 8."""
    table = np.random.default_rng(0).normal(0, 2, (97, 16, 8)).astype(np.float32)
    return lambda batch: lookup(table, batch)


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a family to a bundle of a small random model, built once."""
    place, done = tmp_path_factory.mktemp("small"), dict[str, Path]()

    def build(family: str) -> Path:
        import mdexport

        if family not in done:
            families = Path(__file__).parents[1] / "exporter" / "families.py"
            model = runpy.run_path(str(families))["small_model"](family)
            for _ in mdexport.build(model, place / family, mdexport.Options()):
                pass
            done[family] = place / family
        return done[family]

    return build


@pytest.fixture(scope="session")
def with_engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function from a bundle to a copy of it with engines that the stand-in built.

    It also takes the largest batch, a fusion barrier, a spelling, and options of the stand-in.
    """
    place, done = tmp_path_factory.mktemp("engines"), dict[Any, Path]()

    def build(
        folder: Path,
        max_batch: int = 2,
        *,
        barrier: bool = False,
        spelling: str = "tensorrt",
        **played: Any,
    ) -> Path:
        key = (folder, max_batch, barrier, spelling, *sorted(played.items()))
        if key not in done:
            done[key] = place / f"{len(done)}-{folder.name}"
            shutil.copytree(folder, done[key])
            _add_engines(done[key], max_batch, barrier, spelling, played)
        return done[key]

    return build


def _add_engines(
    folder: Path, max_batch: int, barrier: bool, spelling: str, played: dict[str, Any]
) -> None:
    """Build plans in this process, and publish them without the verification on the device."""
    from mdruntime.bundle import file_spec, open_bundle
    from mdruntime.cuda import Cuda
    from mdruntime.trt import api, builder, identity, profiles, store
    from tests.standin import Options, StandIn

    made, bundle = StandIn(Options(**played)), open_bundle(folder, check=False)
    chosen = identity.BuildOptions(max_batch=max_batch)
    here = identity.current(bundle, Cuda(made.library), made.trt, chosen)
    place = folder / store.ENGINES / here.key
    place.mkdir(parents=True)
    plans = {}
    for graph in bundle.manifest.engines:
        shapes = profiles.profiles(bundle.manifest, graph, chosen.ranges)
        plan = place / f"{graph}.plan"
        request = builder.PlanRequest(
            graph=graph,
            onnx=str(bundle.path(graph, spelling)),
            plan=str(plan),
            timing_cache=str(place / "timing.cache"),
            profiles=shapes,
            options=chosen,
            workspace=1 << 26,
            fusion_barrier=barrier and graph == "denoiser",
        )
        done = builder.build_plan(
            made.trt, api.logger(made.trt), request, lambda *_: None, lambda: False
        )
        spec = file_spec(plan)
        plans[graph] = store.PlanRecord(
            spec.sha256, spec.bytes, shapes, 0.0, done.achieved.layers, done.device_bytes
        )
    now = store.now()
    nothing: dict[str, float] = {}
    record = store.EngineRecord(
        store.RECORD_FORMAT, here, chosen, plans, barrier, nothing, nothing, nothing, 0.0, now, now
    )
    store.write_record(place, record)


@dataclass
class Script:
    """A text denoiser that wants a certain token at every position, and keeps what it is fed."""

    wanted: Sequence[int]  # (length,), or fewer: the last one for all the rest
    codebook: int
    feeds: list[Feeds] = field(default_factory=list)

    def __call__(self, feeds: Feeds) -> dict[str, NDArray[np.float32]]:
        self.feeds.append(feeds)
        active = len(feeds["conditional"])
        places = np.take_along_axis(feeds["positions"], feeds["columns"], axis=1)[:active]
        wanted = np.array(self.wanted)[np.minimum(places, len(self.wanted) - 1)]
        logits = np.zeros((*places.shape, self.codebook), np.float32)
        np.put_along_axis(logits, wanted[..., None], np.float32(60), axis=2)
        return {"logits": logits}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[TextPipeline, Script]]:
    """Return a function from wanted tokens to a pipeline that writes them, and its denoiser."""

    def build(
        wanted: Sequence[int],
        text: TextSpec | None = None,
        folder: Path = Path(),
        **changes: Any,
    ) -> tuple[TextPipeline, Script]:
        sizes = {"length": 24, "codebook": 256, "flexible": True, **changes}
        length, codebook = sizes["length"], sizes["codebook"]
        spec = DenoiserSpec(
            canvas=length,
            first=0,
            grid=(length,),
            patch=(1,),
            mask_token=codebook,
            classes=0,
            layers=1,
            context=(),
            **sizes,
        )
        manifest = Manifest(
            format=2,
            name="script",
            family="script",
            task="text",
            precision="fp32",
            weights=WeightsSpec("random", 0, {}, 1, "none"),
            denoiser=spec,
            image=None,
            text=text or TextSpec("bytes"),
            prompt=None,
            graphs={},
            buckets=(),
            presets={"default": Sampling(rounds=4, schedule="ancestral", order="vanilla")},
            files={},
            verification=VerificationRecord("none", {}, {}),
            toolchain={},
            study=None,
        )
        script = Script(wanted, codebook)
        session = FunctionSession(script)
        monkeypatch.setattr("mdruntime.session.open_session", lambda *_, **__: session)
        return TextPipeline(Runner(Bundle(folder, manifest), head="numpy")), script

    return build


@dataclass
class FakeDevice:
    """A device whose clock moves only while a graph runs, by a known number of milliseconds."""

    start_ms: float = 1.0  # of a pass
    row_ms: float = 0.1  # of a row of a sequence
    column_ms: float = 0.05  # of a column of a sample
    logits_ms: float = 0.2  # of a column of a sample whose logits are wanted
    decoder_ms: float = 4.0  # of an image
    condition_ms: float = 2.0  # of a batch's conditions
    now: float = 0.0  # seconds
    codebook: int = 0
    ran: list[tuple[int, int, int]] = field(default_factory=list)  # sequences, rows, columns
    provider: str = "cpu"

    def clock(self) -> float:
        return self.now

    def start(self, canvas: int) -> None: ...

    def close(self) -> None: ...

    def views(self, sequences: int) -> None: ...

    def clone(self) -> "FakeDevice":
        return self

    def run(self, feeds: Feeds, fetch: Sequence[str]) -> dict[str, NDArray[Any]]:
        if list(feeds) == ["tokens"]:
            self.now += self.decoder_ms / 1000
            return {name: np.zeros((1, 8, 8, 3), np.uint8) for name in fetch}
        if list(feeds) == ["classes"]:
            self.now += self.condition_ms / 1000
            return {name: np.zeros((len(feeds["classes"]), 3), np.float32) for name in fetch}
        (sequences, rows), columns = feeds["positions"].shape, feeds["columns"].shape[1]
        samples = len(feeds["conditional"])
        self.ran.append((sequences, rows, columns))
        ms = self.start_ms + self.row_ms * sequences * rows + self.column_ms * samples * columns
        ms += self.logits_ms * samples * columns * ("logits" in fetch)
        self.now += ms / 1000
        shape = samples, feeds["uniforms"].shape[1]
        logits = np.zeros((*shape, self.codebook), np.float32)
        draws = draw(logits, _controls(feeds), feeds["uniforms"][:samples])
        return {name: logits if name == "logits" else getattr(draws, name) for name in fetch}


def _controls(feeds: Feeds) -> Controls:
    return Controls(*(feeds[name] for name in Controls._fields))


@pytest.fixture
def fake_device(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[Runner, FakeDevice]]:
    """Return a function from a bundle and a device's times to a runner of it on that device."""

    def build(bundle: Bundle, **times: float) -> tuple[Runner, FakeDevice]:
        device = FakeDevice(codebook=bundle.manifest.denoiser.codebook, **times)  # type: ignore[arg-type]
        monkeypatch.setattr("mdruntime.session.open_session", lambda *_, **__: device)
        return Runner(bundle), device

    return build
