"""A bundle on the stand-in for TensorRT: every kind of model, threads, memory, and refusals."""

import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import mdruntime
from mdruntime.cli import main
from mdruntime.errors import BundleError, EngineError, ProviderError, SamplingError
from mdruntime.runner import Runner
from mdruntime.session import PROVIDERS, open_backend, open_session
from mdruntime.trt import api
from mdruntime.trt.backend import TrtBackend
from mdruntime.trt.session import TrtSession
from tests.standin import Options, StandIn, install

WithEngines = Callable[..., Path]
Small = Callable[[str], Path]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A stand-in for a GPU with TensorRT; the test leaves nothing behind on it."""
    made = install(monkeypatch)
    yield made
    made.check()


def finished(pipeline: mdruntime.Pipeline, **options: Any) -> Any:
    return list(pipeline.steps(**options))[-1].tokens


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("mage", {"count": 2, "rounds": 3, "substeps": 2}),  # knows which rows are visible
    ("maskbit", {"labels": [1, 2], "rounds": 3, "substeps": 2, "guidance": 1.0}),  # two slots
    ("amused", {"prompts": ["1 2", "3"], "rounds": 3, "substeps": 2}),  # a condition graph
]


@pytest.mark.parametrize(("family", "options"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_every_kind_of_model_draws_what_the_cpu_draws(
    small_bundle: Small,
    with_engines: WithEngines,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    options: dict[str, Any],
) -> None:
    found = []
    engines = with_engines(small_bundle(family))
    device = install(monkeypatch)  # not before torch, which would look at it, has done its part
    for folder, provider in ((small_bundle(family), "cpu"), (engines, "tensorrt")):
        with mdruntime.load(folder, provider, check=False, threads=1) as pipeline:
            assert pipeline.provider == provider
            found.append([finished(pipeline, seed=seed, **options) for seed in range(3)])
    np.testing.assert_array_equal(found[0], found[1])
    device.check()


def test_texts_of_any_length_are_those_of_the_cpu(
    small_bundle: Small, with_engines: WithEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    folders = {"cpu": small_bundle("mdlm"), "tensorrt": with_engines(small_bundle("mdlm"))}
    device = install(monkeypatch)
    options: dict[str, Any] = {"substeps": 2, "order": "moment", "schedule": "cosine"}
    for provider, folder in folders.items():
        with mdruntime.load_text(folder, provider, check=False, threads=1) as pipeline:
            found.append(
                [
                    pipeline.generate(count=2, length=n, rounds=min(n, 4), seed=n, **options)
                    for n in (5, 32, 1, 20, 9)
                ]
                + [pipeline.generate(["abc", "def"], length=12, rounds=4, guidance=1.0, **options)]
            )
    assert found[0] == found[1]
    device.check()


def test_conditions_go_up_once_as_long_as_they_stay_the_same(
    small_bundle: Small, with_engines: WithEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = mdruntime.open_bundle(with_engines(small_bundle("amused")), check=False)
    device = install(monkeypatch)
    runner = Runner(bundle, "tensorrt")
    pipeline = mdruntime.Pipeline(runner)
    steps = list(pipeline.steps(prompts=["1 2"], rounds=4, guidance=1.0, seed=0))
    sent = device.counters.uploads
    inputs = bundle.manifest.graphs["denoiser"].inputs
    conditions = sum(tensor.name.startswith("condition.") for tensor in inputs)
    condition_graph = 1
    assert sent == condition_graph + len(steps) + conditions
    list(
        pipeline.steps(prompts=["1 2"], rounds=4, guidance=1.0, seed=1)
    )  # the same condition again
    assert device.counters.uploads == sent + condition_graph + len(steps)
    pipeline.close()
    device.check()


def test_clones_run_in_two_threads_and_share_their_engines(
    digits_bundle: Path, with_engines: WithEngines, device: StandIn
) -> None:
    options: dict[str, Any] = {"rounds": 4, "substeps": 2, "guidance": 1.0}
    with mdruntime.load(digits_bundle, check=False, threads=1) as pipeline:
        expected = {label: finished(pipeline, labels=[label], **options) for label in (3, 7)}
    found: dict[int, list[Any]] = {3: [], 7: []}
    with mdruntime.load(with_engines(digits_bundle), "tensorrt", check=False) as pipeline:
        twin = pipeline.clone()

        def draw(each: mdruntime.Pipeline, label: int) -> None:
            found[label].extend(finished(each, labels=[label], **options) for _ in range(5))

        threads = [threading.Thread(target=draw, args=a) for a in ((pipeline, 3), (twin, 7))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert engines_in(device) == 1
        pipeline.close()
        again = finished(twin, labels=[7], **options)
        np.testing.assert_array_equal(again, expected[7])
        twin.close()
    for label, results in found.items():
        for tokens in results:
            np.testing.assert_array_equal(tokens, expected[label])


def test_a_process_made_by_fork_is_refused(
    digits_bundle: Path, with_engines: WithEngines, device: StandIn
) -> None:
    with mdruntime.load(with_engines(digits_bundle), "tensorrt", check=False) as pipeline:
        read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: it has threads
            child = os.fork()
        if not child:  # nothing may leave this block: the test goes on in the parent only
            said = b"nothing was refused"
            try:
                pipeline.generate([1])
            except ProviderError as error:
                pipeline.close()
                said = str(error).encode()
            except BaseException as error:
                said = repr(error).encode()
            finally:
                os.write(write, said)
                os._exit(0)
        os.close(write)
        os.waitpid(child, 0)
        with os.fdopen(read, "rb") as pipe:
            text = pipe.read().decode()
        assert f"opened in process {os.getpid()}, and CUDA cannot be used" in text
        assert f"by fork ({child})" in text
        assert "get_context('spawn')" in text
        assert pipeline.generate([1], rounds=1).shape == (1, 8, 8, 3)


def engines_in(device: StandIn) -> int:
    """How many engines lie in the device's memory."""
    return sum("engine.py" in str(one) for one in device.device.memory.live())


def test_with_reduced_memory_decoder_and_encoder_come_and_go(
    digits_bundle: Path, with_engines: WithEngines, device: StandIn
) -> None:
    folder = with_engines(digits_bundle)
    with mdruntime.load(digits_bundle, check=False, threads=1) as pipeline:
        expected = pipeline.generate([3], seed=0, rounds=2)
    with mdruntime.load(folder, "tensorrt", check=False, reduce_memory=True) as pipeline:
        before = len(device.device.memory.live())
        for turn in range(6):
            found = pipeline.generate([3], seed=0, rounds=2)
            np.testing.assert_array_equal(found, expected)
            assert engines_in(device) == 1
            after = len(device.device.memory.live())
            before = after if turn == 0 else before  # the denoiser's buffers came with the first
            assert after == before
        assert device.counters.launches > 0  # of the denoiser, whose graphs outlive the decoder
        pipeline.encode(found)
        assert engines_in(device) == 1
    with mdruntime.load(folder, "tensorrt", check=False) as pipeline:
        pipeline.encode(pipeline.generate([3], seed=0, rounds=2))
        assert engines_in(device) == 3


def test_a_graph_that_needs_a_larger_block_makes_the_others_move(
    digits_bundle: Path, with_engines: WithEngines, device: StandIn
) -> None:
    folder = with_engines(digits_bundle)
    bundle = mdruntime.open_bundle(folder, check=False)
    opened = open_backend(bundle, "tensorrt")
    assert isinstance(opened, TrtBackend)
    small = TrtBackend(bundle, opened._loaded, opened._cuda, reserve=0, reduce_memory=False)
    decoder = small.session("decoder")
    tokens = np.arange(64, dtype=np.int32)[None] % 17
    first = [decoder.run({"tokens": tokens}, ["images"])["images"] for _ in range(5)]
    launches = device.counters.launches
    assert decoder.graphs == 1
    assert launches > 0
    small.session("denoiser")
    later = [decoder.run({"tokens": tokens}, ["images"])["images"] for _ in range(5)]
    assert decoder.graphs == 1
    assert device.counters.launches > launches
    np.testing.assert_array_equal(first, later)
    small.close()


@pytest.mark.parametrize("nth", range(1, 9))
def test_memory_that_does_not_suffice_is_told_and_given_back(
    digits_bundle: Path, with_engines: WithEngines, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """Whatever is allocated first, second and so on fails once: nothing is left behind."""
    device = install(monkeypatch, failures=(("cudaMalloc", nth, 2), ("cudaHostAlloc", nth, 2)))
    folder = with_engines(digits_bundle)

    def run() -> None:
        with mdruntime.load(folder, "tensorrt", check=False) as pipeline:
            for labels in ([1], [1, 2]):
                pipeline.generate(labels, rounds=2, substeps=2, guidance=1.0)

    with pytest.raises(MemoryError, match="MemoryAllocation"):
        run()
    device.check()


def test_a_plan_that_does_not_fit_is_no_other_error(
    digits_bundle: Path, with_engines: WithEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = mdruntime.open_bundle(with_engines(digits_bundle), check=False)
    device = install(monkeypatch, memory=1 << 12)
    (folder,) = (bundle.folder / "engines").iterdir()
    backend = open_backend(bundle, "tensorrt", engines=folder)
    with pytest.raises(MemoryError, match=r"denoiser\.plan cannot be loaded .* for want of memory"):
        backend.session("denoiser")
    backend.close()
    device.check()


def test_an_engine_of_another_graph_is_refused(
    digits_bundle: Path, with_engines: WithEngines, device: StandIn
) -> None:
    bundle = mdruntime.open_bundle(with_engines(digits_bundle), check=False)
    backend = open_backend(bundle, "tensorrt")
    assert isinstance(backend, TrtBackend)
    wrong = backend._loaded["decoder"].plan
    plan = backend._loaded["denoiser"].plan
    object.__setattr__(plan, "path", wrong.path)
    with pytest.raises(EngineError, match=r"decoder\.plan does not belong to the graph 'denoiser'"):
        backend.session("denoiser")
    backend.close()


def test_a_plan_that_tensorrt_refuses_is_an_engine_error(
    digits_bundle: Path, with_engines: WithEngines, device: StandIn, tmp_path: Path
) -> None:
    bundle = mdruntime.open_bundle(with_engines(digits_bundle), check=False)
    backend = open_backend(bundle, "tensorrt")
    assert isinstance(backend, TrtBackend)
    plan = backend._loaded["denoiser"].plan
    (tmp_path / "cut.plan").write_bytes(plan.path.read_bytes()[:1000])
    object.__setattr__(plan, "path", tmp_path / "cut.plan")
    words = r"cut\.plan cannot be loaded \(build it again: mdruntime build .*Serialization"
    with pytest.raises(EngineError, match=words):
        backend.session("denoiser")
    backend.close()


def test_a_bundle_without_engines_says_how_to_build_them(
    digits_bundle: Path, device: StandIn
) -> None:
    with pytest.raises(EngineError, match=f"mdruntime build {digits_bundle}"):
        mdruntime.load(digits_bundle, "tensorrt", check=False)
    with pytest.raises(EngineError, match="mdruntime build"):
        open_session(mdruntime.open_bundle(digits_bundle, check=False), "denoiser", "tensorrt")
    assert EngineError.exit_code == 5


def test_the_command_line_tells_what_was_not_as_it_should_be(
    digits_bundle: Path,
    with_engines: WithEngines,
    device: StandIn,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    request = ["--provider", "tensorrt", "--rounds", "2", "-o", str(tmp_path / "page.png")]
    assert main(["generate", str(digits_bundle), "--labels", "1", *request]) == 5
    assert f"build them on this machine with: mdruntime build {digits_bundle}" in (
        capsys.readouterr().err
    )
    folder = str(with_engines(digits_bundle))
    device.library.fail("cudaGraphInstantiateWithFlags", 999)  # the decoder's third image is first
    labels = ["--labels", "1,2,3,4", "--batch-size", "2"]
    assert main(["generate", folder, *labels, *request]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "no CUDA graphs" in line]
    assert len(notes) == 1
    assert notes[0].startswith("mdruntime: decoder.plan: no CUDA graphs from now on")
    assert main(["generate", folder, *labels, *request, "--reduce-memory"]) == 0
    assert "no CUDA graphs" not in capsys.readouterr().err
    assert main(["generate", folder, "--labels", "1,2,3", "--batch-size", "3", *request]) == 5
    assert "--max-batch 3" in capsys.readouterr().err


def test_a_single_session_gives_everything_back(
    digits_bundle: Path, with_engines: WithEngines, device: StandIn
) -> None:
    bundle = mdruntime.open_bundle(with_engines(digits_bundle), check=False)
    session = open_session(bundle, "decoder", "tensorrt")
    assert isinstance(session, TrtSession)
    with pytest.raises(EngineError, match=r"decoder\.plan was not built for inputs .*\[2, 64\]"):
        session.run({"tokens": np.zeros((2, 64), np.int32)}, ["images"])
    session.close()
    with pytest.raises(BundleError, match="the bundle has no graph 'nothing'"):
        open_session(bundle, "nothing", "tensorrt")


def test_what_a_provider_does_not_have_is_refused(digits_bundle: Path) -> None:
    bundle = mdruntime.open_bundle(digits_bundle, check=False)
    with pytest.raises(ProviderError, match=f"must be one of {', '.join(PROVIDERS)}, got 'tpu'"):
        open_session(bundle, "denoiser", "tpu")
    with pytest.raises(SamplingError, match="spelled as they were built"):
        open_backend(bundle, "tensorrt", spelling="tensorrt")
    with pytest.raises(SamplingError, match="provider 'cpu' has none"):
        open_backend(bundle, "cpu", engines=digits_bundle)


def test_tensorrt_is_missing_here_and_the_cure_is_told(
    digits_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ProviderError, match=r"(?s)module is missing.*pip install 'tensorrt>=10\.3"):
        mdruntime.load(digits_bundle, "tensorrt", check=False)


@pytest.mark.parametrize("version", ["8.6.1", "10.2.0.19", "12.0.0", ""])
def test_versions_that_are_not_known_are_refused(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    module = ModuleType("tensorrt")
    module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(ProviderError, match=r"10\.3 to 11 is needed, and .*was found"):
        api.import_tensorrt()


@pytest.mark.parametrize("level", ["10.3", "11.4"])
def test_the_logger_keeps_lines_and_tells_memory_from_other_reasons(level: str) -> None:
    trt, heard = StandIn(Options(api=level)).trt, list[str]()
    log = api.logger(trt, heard.append)
    severity = trt.ILogger.Severity
    for kind, text in (("VERBOSE", "a"), ("INFO", "b"), ("ERROR", "c  d"), ("WARNING", "e")):
        log.log(getattr(severity, kind), text)
    assert log.lines == [("INFO", "b"), ("ERROR", "c  d"), ("WARNING", "e")]
    assert heard == ["INFO: b", "ERROR: c  d", "WARNING: e"]
    assert str(api.failure(log, "it failed")) == "it failed: c d"
    assert isinstance(api.failure(log, "it failed", EngineError), EngineError)
    log.log(severity.INTERNAL_ERROR, "Cuda Runtime (out of memory)")
    assert isinstance(api.failure(log, "it failed", EngineError), MemoryError)
