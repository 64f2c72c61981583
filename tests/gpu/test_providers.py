"""Engines and CUDA sessions on the device itself: right numbers, graphs, and what crosses.

None of this runs without a GPU; the same sessions are driven elsewhere through ONNX Runtime's CPU
provider and through stand-ins.
"""

import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mdruntime.bundle import Bundle
from mdruntime.cli import main
from mdruntime.errors import ProviderError
from mdruntime.ort import import_onnxruntime
from mdruntime.ort_libraries import load_required
from mdruntime.probe import pipeline_of, request_of
from mdruntime.runner import Runner
from mdruntime.trt.api import import_tensorrt
from mdruntime.verify import verify

pytestmark = pytest.mark.gpu

PROVIDERS = ("tensorrt", "cuda", "ort-tensorrt")
MODELS = ("digits", "glyphs")
PRECISIONS = ("fp32", "fp16")

Bundles = Callable[[str, str], Bundle]
Say = Callable[[str], None]
Ready = Callable[[str, str, str], Bundle]


@pytest.fixture(scope="session")
def ready(bundle_of: Bundles) -> Ready:
    """Return a function that makes a bundle ready for a provider, or skips with the reason."""
    built: set[Any] = set()

    def make(provider: str, name: str, precision: str) -> Bundle:
        try:
            _require(provider)
        except ProviderError as error:
            pytest.skip(f"{provider}: {error}")
        bundle = bundle_of(name, precision)
        if provider == "tensorrt" and bundle.folder not in built:
            assert main(["build", str(bundle.folder)]) == 0
            built.add(bundle.folder)
        return bundle

    return make


def _require(provider: str) -> None:
    """Raise ProviderError where a package is missing; what is there must work."""
    if provider == "tensorrt":
        import_tensorrt()
        return
    runtime = import_onnxruntime()
    name = {"cuda": "CUDAExecutionProvider", "ort-tensorrt": "TensorrtExecutionProvider"}[provider]
    if name not in runtime.get_available_providers():
        raise ProviderError(f"ONNX Runtime {runtime.__version__} has no {name}")
    if provider == "ort-tensorrt":
        load_required()


def generated(runner: Runner, seed: int = 0) -> NDArray[np.int32]:
    """Return the tokens of one sample."""
    pipeline: Any = pipeline_of(runner)
    request = {**request_of(runner.manifest, 1), "seed": seed}
    *_, last = pipeline.steps(**request)
    tokens: NDArray[np.int32] = last.tokens
    return tokens


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_recorded_passes_hold(
    ready: Ready, say: Say, provider: str, name: str, precision: str
) -> None:
    bundle = ready(provider, name, precision)
    result = verify(bundle, provider)
    numbers = ", ".join(f"{key} {value:.3g}" for key, value in result.measured.items())
    say(f"- verify {name} {precision} on {provider}: {numbers}")
    assert result, result.failures
    assert all(np.isfinite(value) for value in result.measured.values())


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", MODELS)
def test_samples_repeat_and_are_mostly_the_cpus(
    ready: Ready, say: Say, provider: str, name: str
) -> None:
    """One token that a rounding moves changes all that follow: so the share is said, not asked."""
    bundle = ready(provider, name, "fp32")
    with closing(Runner(bundle)) as cpu, closing(Runner(bundle, provider)) as device:
        pairs = [(generated(cpu, seed), generated(device, seed)) for seed in range(8)]
        share = np.mean([np.mean(expected == found) for expected, found in pairs])
        say(f"- samples of {name} on {provider}: {share:.1%} of the tokens are the CPU's")
        np.testing.assert_array_equal(generated(device, 0), pairs[0][1])


@pytest.mark.parametrize("provider", ["tensorrt", "cuda"])
@pytest.mark.parametrize("name", MODELS)
def test_passes_become_graphs_and_compute_the_same(
    ready: Ready, say: Say, monkeypatch: pytest.MonkeyPatch, provider: str, name: str
) -> None:
    bundle = ready(provider, name, "fp16")
    with closing(Runner(bundle, provider)) as runner:
        first = generated(runner)
        for _ in range(4):
            np.testing.assert_array_equal(generated(runner), first)
        session: Any = runner.session("denoiser")
        say(f"- graphs of {name} on {provider}: {session.graphs}; notes: {session.notes or 'none'}")
        assert session.graphs > 0
        assert not [note for note in session.notes if "graph" in note]
    for module in ("mdruntime.trt.capture", "mdruntime.ort_cuda"):
        monkeypatch.setattr(f"{module}._EAGER_RUNS", 1 << 30)
    with closing(Runner(bundle, provider)) as eager:
        np.testing.assert_array_equal(generated(eager), first)
        assert eager.session("denoiser").graphs == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_ids_and_draws_cross_and_caches_do_not(ready: Ready, say: Say, provider: str) -> None:
    bundle = ready(provider, "glyphs", "fp16")
    spec = bundle.manifest.denoiser
    cache = sum(
        np.prod([size for size in tensor.shape[1:] if isinstance(size, int)]) * 2
        for tensor in bundle.manifest.graphs["denoiser"].inputs
        if tensor.name.startswith("past.")
    )
    with closing(Runner(bundle, provider)) as runner:
        session: Any = runner.session("denoiser")
        generated(runner)  # what crosses once, such as conditions
        before = session.uploaded + session.downloaded
        passes = sum(1 for _ in pipeline_of(runner).steps(**request_of(bundle.manifest, 1)))
        crossed = (session.uploaded + session.downloaded - before) / passes
    say(f"- bytes crossing per pass, glyphs on {provider}: {crossed:.0f}; one cache row: {cache}")
    assert 0 < crossed < 16384 + 64 * spec.canvas
    assert crossed < cache


@pytest.mark.parametrize("provider", ["tensorrt", "cuda"])
def test_clones_work_in_threads_of_their_own(ready: Ready, provider: str) -> None:
    bundle = ready(provider, "digits", "fp16")
    with closing(Runner(bundle, provider)) as runner:
        expected = [generated(runner, seed) for seed in range(3)]
        found: dict[int, Any] = {}

        def work(seed: int) -> None:
            with closing(runner.clone()) as twin:
                found[seed] = [generated(twin, seed) for _ in range(4)]

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for seed, tokens in enumerate(expected):
        for each in found[seed]:
            np.testing.assert_array_equal(each, tokens)


def test_images_are_the_cpus(ready: Ready, say: Say) -> None:
    bundle = ready("tensorrt", "glyphs", "fp16")
    tokens = np.random.default_rng(0).integers(
        0, bundle.manifest.denoiser.codebook, (2, bundle.manifest.denoiser.length)
    )
    with closing(Runner(bundle)) as cpu, closing(Runner(bundle, "tensorrt")) as device:
        expected, found = (
            np.asarray(pipeline_of(each).decode(tokens.astype(np.int32)), np.float64)
            for each in (cpu, device)
        )
    error = np.mean((expected - found) ** 2)
    say(f"- images of glyphs on tensorrt: mean squared error {error:.3g} of 255^2")
    assert error < 255**2 / 10 ** (35 / 10)
