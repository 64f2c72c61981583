"""Every family is exported with its caches, verified in both precisions, and run."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import mdexport
import mdruntime
import mdzoo
from mdexport.operators import misfits
from mdexport.reference import record
from mdruntime.bundle import open_bundle
from mdruntime.verify import verify


def _families() -> ModuleType:
    """Import the module beside this file, which is no package's."""
    spec = importlib.util.spec_from_file_location(
        "families", Path(__file__).with_name("families.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["families"] = module
    spec.loader.exec_module(module)
    return module


FAMILIES = _families()
PRECISIONS = ("fp32", "fp16")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Return a function from a family and a precision to its bundle, built once."""
    place, done = tmp_path_factory.mktemp("families"), dict[tuple[str, str], Path]()

    def build(family: str, precision: str) -> Path:
        folder = place / f"{family}-{precision}"
        if (family, precision) not in done:
            model = FAMILIES.small_model(family)
            options = mdexport.Options(precision=precision, logits=True, int8=precision == "fp32")
            for _ in mdexport.build(model, folder, options):
                pass
            done[family, precision] = folder
        return folder

    return build


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES.SMALL)
def test_trajectories_are_those_of_the_pytorch_model(
    built: Callable[[str, str], Path], family: str, precision: str
) -> None:
    bundle = open_bundle(built(family, precision))
    found, spelled = verify(bundle), verify(bundle, spelling="tensorrt")
    assert found, found.failures
    assert spelled, spelled.failures
    assert found.measured["log_prob"] < {"fp32": 1e-4, "fp16": 1e-2}[precision]
    assert found.measured["token_shift"] < {"fp32": 1e-5, "fp16": 1e-2}[precision]
    assert found.measured["token_agreement"] > {"fp32": 0.999, "fp16": 0.97}[precision]
    assert found.passes >= 17


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES.SMALL)
def test_every_graph_has_a_spelling_that_tensorrt_is_published_to_have(
    built: Callable[[str, str], Path], family: str, precision: str
) -> None:
    bundle = open_bundle(built(family, precision), check=False)
    for graph in bundle.manifest.engines:
        path = bundle.path(graph, "tensorrt")
        assert path.name == f"{graph}.tensorrt.onnx"
        assert misfits(path) == []


@pytest.mark.parametrize("family", FAMILIES.SMALL)
def test_int8_holds_in_denoiser_and_decoder(built: Callable[[str, str], Path], family: str) -> None:
    bundle = open_bundle(built(family, "fp32"), check=False)
    result = verify(bundle, spelling="int8")
    assert result, result.failures
    assert result.measured["mean_log_prob"] > 0  # it is another graph
    decoder = bundle.manifest.graphs.get("decoder")
    assert ("psnr_db" in result.measured) == (decoder is not None)
    if decoder is not None:
        assert decoder.spellings["int8"] == "decoder.int8.onnx"
        assert 30 < result.measured["psnr_db"] < 60


@pytest.mark.parametrize("family", FAMILIES.SMALL)
def test_recorded_passes_are_full_and_partial_at_all_mask_ratios(family: str) -> None:
    model = FAMILIES.small_model(family)
    passes, tokens = record(model.denoiser, model.prompt)
    spec = model.denoiser.spec
    full = [one for one in passes if one["canvas"]]
    assert len(full) >= 7
    assert len(passes) - len(full) >= 7
    assert tokens.max() < spec.codebook
    hidden = {round(float((one["tokens"] == spec.mask_token).mean()), 1) for one in full}
    assert len(hidden) >= 4
    guided = {len(one["tokens"]) for one in passes}
    strengthened = spec.unconditional and (spec.classes or model.prompt is not None)
    assert guided == ({2, 4} if strengthened else {2})


@pytest.mark.parametrize("family", FAMILIES.SMALL)
@pytest.mark.parametrize("preset", ["published", "fast", "balanced", "best"])
def test_every_preset_makes_something(
    built: Callable[[str, str], Path], family: str, preset: str
) -> None:
    folder = built(family, "fp32")
    model: mdzoo.Model = FAMILIES.small_model(family)
    rounds: dict[str, Any] = {"rounds": min(4, model.denoiser.spec.length)}
    if model.text is not None:
        with mdruntime.load_text(folder) as writer:
            texts = writer.generate(count=2, preset=preset, **rounds)
        assert len(texts) == 2
        return
    with mdruntime.load(folder) as pipeline:
        given: dict[str, Any] = {"count": 2}
        if model.denoiser.spec.classes:
            given = {"labels": [1, 3]}
        if model.prompt is not None:
            given = {"prompts": ["1 2", "3"]}
        images = pipeline.generate(**given, preset=preset, seed=3, **rounds)
        again = pipeline.generate(**given, preset=preset, seed=3, batch_size=1, **rounds)
    assert images.dtype == np.uint8
    assert images.shape[0] == 2
    np.testing.assert_array_equal(images, again)


def test_every_family_of_the_catalogue_is_here() -> None:
    names = {entry.family.name for entry in mdzoo.CATALOGUE.values()}
    covered = {mdzoo.CATALOGUE[name].family.name for name, _ in FAMILIES.SMALL.values()}
    assert covered == names
