"""Sessions of TensorRT on its stand-in: the same tokens as ONNX Runtime, and nothing too much.

The stand-in (tests/standin) checks addresses, sizes, lifetimes and the order of a stream's work,
and runs an engine's graph in ONNX Runtime. What a real TensorRT computes it cannot say.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import mdruntime
from mdruntime.cuda import Stream
from mdruntime.errors import BundleError, EngineError, ProviderError, SamplingError
from mdruntime.head import Draws
from mdruntime.passes import PassShape, foreseen
from mdruntime.session import Feeds, Session, open_backend, open_session
from mdruntime.trt.engine import Context
from mdruntime.trt.session import TrtSession
from tests.standin import StandIn, install

WithEngines = Callable[..., Path]
PLANS: list[dict[str, Any]] = [
    {"rounds": 4, "guidance": 0.0},
    {"rounds": 3, "guidance": 1.5, "substeps": 3, "refresh": "chosen"},
    {"rounds": 4, "guidance": 1.5, "substeps": 2, "refresh": "recent", "order": "moment"},
    {"rounds": 6, "guidance": 1.0, "refresh_interval": 3, "order": "random"},
]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A stand-in for a GPU with TensorRT; the test leaves nothing behind on it."""
    made = install(monkeypatch)
    yield made
    made.check()


def images_of(folder: Path, provider: str, options: dict[str, Any], **more: Any) -> Any:
    with mdruntime.load(folder, provider, check=False, threads=1, **more) as pipeline:
        return pipeline.generate([3, 1, 4], seed=5, batch_size=2, **options)


@pytest.mark.parametrize("options", PLANS, ids=str)
def test_every_plan_draws_what_the_cpu_draws(
    digits_bundle: Path, with_engines: WithEngines, device: StandIn, options: dict[str, Any]
) -> None:
    expected = images_of(digits_bundle, "cpu", options)
    found = images_of(with_engines(digits_bundle), "tensorrt", options)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("head", "options"),
    [
        ("numpy", {"rounds": 3, "guidance": 1.5, "substeps": 2}),
        ("graph", {"rounds": 3, "order": "maskgit-exact", "guidance_interval": (0.0, 0.5)}),
    ],
)
def test_logits_come_down_where_an_engine_has_them(
    digits_bundle: Path,
    with_engines: WithEngines,
    monkeypatch: pytest.MonkeyPatch,
    head: str,
    options: dict[str, Any],
) -> None:
    device = install(monkeypatch, api="11.4")  # this graph's attention is no operator of 10.3's
    folder = with_engines(digits_bundle, spelling="", api="11.4")
    found = images_of(folder, "tensorrt", options, head=head)
    np.testing.assert_array_equal(found, images_of(digits_bundle, "cpu", options, head=head))
    device.check()


def test_logits_that_an_engine_lacks_are_asked_for_with_the_cure(
    digits_bundle: Path, with_engines: WithEngines, device: StandIn
) -> None:
    folder = with_engines(digits_bundle)
    with pytest.raises(SamplingError, match=r"return no logits, .* export the bundle .* --logits"):
        images_of(folder, "tensorrt", {"order": "maskgit-exact"})


def test_samples_that_finish_early_drop_out(
    digits_bundle: Path, with_engines: WithEngines, device: StandIn
) -> None:
    canvas = np.full((2, 64), 17)
    canvas[0, :62] = 9
    options: dict[str, Any] = {"order": "moment", "rounds": 6, "substeps": 2, "guidance": 1.0}
    found = []
    for folder, provider in ((digits_bundle, "cpu"), (with_engines(digits_bundle), "tensorrt")):
        with mdruntime.load(folder, provider, check=False, threads=1) as pipeline:
            counted = pipeline.counted()
            found.append(list(pipeline.steps([3, 4], tokens=canvas, seed=1, **options))[-1].tokens)
            assert {shape.samples for shape in counted.shapes} == {1, 2}
    np.testing.assert_array_equal(found[0], found[1])


CANVAS, CODEBOOK, DROPPED = 65, 17, 28  # of digits: the class row comes last


def feeds_of(rows: Sequence[Sequence[int]], wanted: int, seed: int = 0) -> Feeds:
    """Feeds of a guided pass over canvas rows of samples, each row of a random id."""
    rng = np.random.default_rng(seed)
    batch = len(rows)
    positions = np.array([*rows, *rows], np.int32)
    ids: NDArray[np.int32] = rng.integers(0, CODEBOOK, positions.shape).astype(np.int32)
    ids[positions == CANVAS - 1] = DROPPED
    ones: NDArray[np.float32] = np.ones(batch, np.float32)
    return {
        "tokens": ids,
        "positions": positions,
        "columns": np.tile(np.arange(wanted, dtype=np.int32), (2 * batch, 1)),
        "conditional": np.arange(batch, dtype=np.int32),
        "unconditional": np.arange(batch, 2 * batch, dtype=np.int32),
        "guidance": ones,
        "temperature": ones,
        "beta": 2 * ones,
        "token_beta": ones,
        "uniforms": rng.random((batch, wanted), np.float32),
    }


def compared(session: Session, reference: Session, feeds: Feeds) -> None:
    fetch = list(Draws._fields)
    found, expected = session.run(feeds, fetch), reference.run(feeds, fetch)
    for name in fetch:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.fixture
def pair(
    digits_bundle: Path, with_engines: WithEngines, device: StandIn
) -> Iterator[tuple[TrtSession, Session]]:
    """The denoiser of digits on TensorRT, and on ONNX Runtime."""
    bundle = mdruntime.open_bundle(with_engines(digits_bundle), check=False)
    spec = bundle.manifest.denoiser
    assert (spec.canvas, spec.codebook, spec.context[0].dropped) == (CANVAS, CODEBOOK, DROPPED)
    reference = open_session(bundle, "denoiser", "cpu", threads=1, spelling="tensorrt")
    session = open_backend(bundle, "tensorrt").session("denoiser")
    assert isinstance(session, TrtSession)
    for each in (session, reference):
        each.start(65)
    yield session, reference
    session.close()
    reference.close()


Pair = tuple[TrtSession, Session]


def test_passes_of_every_size_are_padded_to_their_bucket_and_answer_the_same(pair: Pair) -> None:
    session, reference = pair
    compared(session, reference, feeds_of([range(65)] * 2, 65))
    for m in (1, 7, 8, 9, 16, 31, 33, 64, 65):
        rows = [range(m), range(65 - m, 65)]
        for wanted in sorted({1, (m + 1) // 2, m}):
            compared(session, reference, feeds_of(rows, wanted, seed=m))


def test_a_pass_with_fewer_sequences_keeps_the_caches_of_the_others(pair: Pair) -> None:
    session, reference = pair
    compared(session, reference, feeds_of([range(65)] * 2, 65))
    for turn, batch in enumerate((1, 2, 1, 1, 2, 2)):
        rows = [range(turn, turn + 9)] * batch
        compared(session, reference, feeds_of(rows, 9, seed=turn))


def test_a_pass_that_fails_leaves_the_caches_as_they_were(device: StandIn, pair: Pair) -> None:
    session, reference = pair
    compared(session, reference, feeds_of([range(65)], 65))
    for name in ("cudaMemcpyAsync", "cudaStreamSynchronize"):
        device.library.fail(name, 719)
        with pytest.raises(ProviderError, match=f"{name} failed with cudaErrorLaunchFailure"):
            session.run(feeds_of([range(8)], 8, seed=1), ["sampled"])
        compared(session, reference, feeds_of([range(8)], 8, seed=2))


def aligned(count: int, width: int = 4) -> int:
    return -(-count * width // 256) * 256


def padded(shape: PassShape) -> tuple[int, int]:
    """Rows and columns of a pass of digits as engines get them."""
    rows = next(bucket for bucket in (8, 16, 32, 64, 65) if bucket >= shape.rows)
    step = -(-rows // 8)
    return rows, min(rows, -(-shape.columns // step) * step)


def test_only_ids_positions_uniforms_and_the_heads_outputs_cross(
    digits_bundle: Path, with_engines: WithEngines, device: StandIn
) -> None:
    options: dict[str, Any] = {"rounds": 5, "substeps": 2, "guidance": 1.0}
    with mdruntime.load(with_engines(digits_bundle), "tensorrt", check=False) as pipeline:
        passes = foreseen(pipeline.manifest, pipeline.sampling(**options), batch=2)
        up = down = 0
        for shape in passes:
            rows, columns = padded(shape)
            by_row = 2 * aligned(shape.sequences * rows) + aligned(shape.sequences * columns)
            by_sample = 6 * aligned(shape.samples) + aligned(shape.samples * columns)
            up += by_row + by_sample
            down += len(Draws._fields) * aligned(shape.samples * columns)
        counters = device.counters
        steps = list(pipeline.steps([1, 2], seed=0, **options))
        assert len(steps) == len(passes)
        assert (counters.uploaded, counters.downloaded) == (up, down)
        assert (counters.uploads, counters.downloads) == (len(passes), len(passes))
        session = pipeline._runner.session("denoiser")
        assert isinstance(session, TrtSession)
        assert (session.uploaded, session.downloaded) == (up, down)


def test_each_profile_shape_and_side_of_the_caches_becomes_one_graph_after_two_runs(
    digits_bundle: Path, with_engines: WithEngines, device: StandIn
) -> None:
    options: dict[str, Any] = {"rounds": 5, "substeps": 2, "guidance": 1.0}
    with mdruntime.load(digits_bundle, check=False, threads=1) as pipeline:
        expected = list(pipeline.steps([1, 2], seed=0, **options))[-1].tokens
    seen = Counter[Any]()
    with mdruntime.load(with_engines(digits_bundle), "tensorrt", check=False) as pipeline:
        passes = foreseen(pipeline.manifest, pipeline.sampling(**options), batch=2)
        turn = replayed = 0
        for _ in range(6):
            steps = list(pipeline.steps([1, 2], seed=0, **options))
            np.testing.assert_array_equal(steps[-1].tokens, expected)
            for shape in passes:
                key = (shape.sequences, *padded(shape), turn % 2)
                seen[key] += 1
                replayed += seen[key] > 3  # the third run is eager in the context to be captured
                turn += 1
        session = pipeline._runner.session("denoiser")
        assert isinstance(session, TrtSession)
        assert session.graphs == device.counters.captures == sum(n > 2 for n in seen.values()) > 4
        assert device.counters.launches == replayed > 0
        assert pipeline._runner.notes == []


@pytest.mark.parametrize("function", ["cudaStreamBeginCapture", "cudaGraphInstantiateWithFlags"])
def test_a_capture_that_fails_is_told_once_and_passes_go_on_without(
    pair: Pair, device: StandIn, function: str
) -> None:
    session, reference = pair
    device.library.fail(function, 900)
    for turn in range(8):
        compared(session, reference, feeds_of([range(65)], 65, seed=turn))
    (note,) = session.notes
    assert note.startswith("denoiser.plan: no CUDA graphs from now on, which makes passes slower: ")
    assert f"{function} failed with cudaErrorStreamCaptureUnsupported" in note
    assert session.graphs == device.counters.launches == 0


def test_what_cannot_be_captured_is_run_without_a_graph(
    pair: Pair, device: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, reference = pair
    enqueue = Context.enqueue

    def allocating(context: Context, stream: Stream) -> None:
        enqueue(context, stream)
        session._device.cuda.allocate(1).free()  # as an engine with an unsupported layer does

    monkeypatch.setattr(Context, "enqueue", allocating)
    for turn in range(8):
        compared(session, reference, feeds_of([range(65)], 65, seed=turn))
    (note,) = session.notes
    assert "no CUDA graphs from now on" in note
    assert "capture" in note
    assert session.graphs == device.counters.launches == 0


def test_memory_that_moves_takes_its_graphs_along(device: StandIn, pair: Pair) -> None:
    session, reference = pair
    for batch in (1, 2, 1):  # two samples need larger caches and blocks than one
        for turn in range(12):
            rows = [range(65) if turn % 4 == 0 else range(turn, turn + 8)] * batch
            compared(session, reference, feeds_of(rows, 8, seed=turn))
        assert session.graphs > 0
    assert device.counters.launches > 0


def test_outputs_that_are_no_ones_business_are_bound_all_the_same(
    digits_bundle: Path, with_engines: WithEngines, device: StandIn
) -> None:
    folder = with_engines(digits_bundle, barrier=True)
    found = images_of(folder, "tensorrt", PLANS[1])
    np.testing.assert_array_equal(found, images_of(digits_bundle, "cpu", PLANS[1]))
    with mdruntime.load(folder, "tensorrt", check=False) as pipeline:
        session = pipeline._runner.session("denoiser")
        assert isinstance(session, TrtSession)
        known = {tensor.name for tensor in pipeline.manifest.graphs["denoiser"].outputs}
        assert set(session._engine.outputs) - known


def test_a_larger_batch_than_was_built_for_is_refused_with_the_command(
    digits_bundle: Path, with_engines: WithEngines, device: StandIn
) -> None:
    folder = with_engines(digits_bundle)
    with mdruntime.load(folder, "tensorrt", check=False) as pipeline:
        words = f"batches of up to 2, and 3 were .*--batch-size 2.*build {folder} --max-batch 3"
        with pytest.raises(EngineError, match=words):
            pipeline.generate([1, 2, 3], batch_size=3)
        assert pipeline.generate([1, 2, 3], batch_size=2).shape == (3, 8, 8, 3)


def test_inputs_and_outputs_that_are_not_the_graphs_are_refused(pair: Pair) -> None:
    session, _ = pair
    feeds = dict(feeds_of([range(65)], 65))
    with pytest.raises(BundleError, match="the graph has no output nothing"):
        session.run(feeds, ["nothing"])
    with pytest.raises(EngineError, match=r"not built for inputs .*positions \[2, 66\]"):
        session.run(feeds_of([range(66)], 1), ["sampled"])
    del feeds["uniforms"]
    with pytest.raises(BundleError, match="the graph needs the input uniforms"):
        session.run(feeds, ["sampled"])


def test_a_closed_session_says_so_and_closes_twice(pair: Pair) -> None:
    session, _ = pair
    session.close()
    session.close()
    with pytest.raises(BundleError, match="closed; load the bundle again"):
        session.run(feeds_of([range(65)], 65), ["sampled"])
    with pytest.raises(BundleError, match="closed"):
        session.clone()


def test_a_clone_of_a_session_has_caches_of_its_own(pair: Pair) -> None:
    session, reference = pair
    twin, other = session.clone(), reference.clone()
    for one, spare, seed in ((session, reference, 0), (twin, other, 1)):
        one.start(65)
        spare.start(65)
        compared(one, spare, feeds_of([range(65)], 65, seed=seed))
    for turn in range(4):
        feeds = feeds_of([range(8)], 8, seed=turn)
        compared(session, reference, feeds)
        compared(twin, other, feeds)
    twin.close()
    compared(session, reference, feeds_of([range(8)], 8, seed=9))
    other.close()
