"""float16 that holds, bfloat16 and int8: what is built is what was asked for, or nothing is."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

import mdexport
import mdruntime
import mdzoo
from mdexport import int8, trace
from mdexport.calibration import LEVELS, Histogram
from mdexport.cli import _run
from mdexport.operators import misfits
from mdexport.precision import LIMITS, LIMITS_INT8, cast
from mdexport.quantise import quantised
from mdexport.reference import record, trajectories
from mdruntime.bundle import open_bundle
from mdruntime.manifest import Manifest
from mdruntime.verify import verify
from mdzoo.maskgit import MaskGIT, MaskGITConfig
from mdzoo.palette import Palette

TINY = MaskGITConfig(grid=4, codebook=6, classes=3, width=16, depth=2, heads=2, hidden=24)
FLOAT, HALF, BRAIN = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16

Build = Callable[..., Path]


def tiny_model(large: bool = False) -> mdzoo.Model:
    """A model that works; a ``large`` one has a hidden unit whose activations reach 10^5."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        denoiser = MaskGIT(TINY).eval()
        torch.nn.init.normal_(denoiser.tokens.weight, std=0.3)
        torch.nn.init.normal_(denoiser.positions, std=0.3)
        if large:
            mlp = next(denoiser.blocks.blocks()).mlp
            mlp.up.weight[0] *= 2e5  # type: ignore[index, union-attr, operator]
            mlp.down.weight[:, 0] /= 1e5  # type: ignore[index, union-attr, operator]
    digits = mdzoo.load(mdzoo.CATALOGUE["digits"], mdzoo.Sources(random_seed=0))
    return replace(digits, name="tiny", denoiser=denoiser, decoder=Palette(4, 6), encoder=None)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("precision")


@pytest.fixture(scope="module")
def build(place: Path) -> Build:
    """Return a function that builds a tiny model; each is traced once, whatever becomes of it."""
    genuine = trace.trace_denoiser

    def build(name: str, *, large: bool = False, **options: Any) -> Path:
        def once(denoiser: Any, prompt: Any) -> ir.Model:
            path = place / f"{options['precision']}-{large}.onnx"
            if not path.exists():
                ir.save(genuine(denoiser, prompt), path, external_data=f"{path.stem}.weights")
            return ir.load(path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules["mdexport.build"], "trace_denoiser", once)
            folder = place / name
            for _ in mdexport.build(tiny_model(large), folder, mdexport.Options(**options)):
                pass
        return folder

    return build


@pytest.fixture(scope="module")
def in_int8(build: Build) -> Path:
    return build("int8", precision="fp16", int8=True, logits=True)


@pytest.fixture(scope="module")
def in_bfloat16(build: Build) -> Path:
    return build("bfloat16", precision="bf16", int8=True)


def manifest_of(folder: Path) -> Manifest:
    return open_bundle(folder).manifest


def test_large_activations_fail_without_islands(
    build: Build, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdexport.graphs.fit", lambda *given: ())
    with pytest.raises(mdruntime.VerificationError, match=r"TensorRT spelling: pass 0: .* NaN"):
        build("without", large=True, precision="fp16")
    assert not list(place.glob("without*"))


def test_large_activations_hold_with_islands_and_are_named(build: Build) -> None:
    folder = build("with", large=True, precision="fp16")
    graph = manifest_of(folder).graphs["denoiser"]
    (island,) = [one for one in graph.float32_islands if one.name == "blocks.0.mlp.up"]
    assert island.largest > 65504
    assert all(one.name.startswith("blocks.0.mlp") for one in graph.float32_islands)
    report = (folder / "report.md").read_text()
    assert f"| denoiser | `blocks.0.mlp.up` | {island.largest:.4g} |" in report
    model = ir.load(folder / graph.spellings["tensorrt"])
    kinds = {
        node.metadata_props[trace.MODULE]: node.outputs[0].dtype
        for node in model.graph
        if node.op_type == "MatMul" and trace.MODULE in node.metadata_props
    }
    assert kinds["blocks.0.mlp.up"] == kinds["blocks.0.mlp.down"] == FLOAT
    assert kinds["blocks.1.mlp.up"] == kinds["blocks.0.attention.qkv"] == HALF
    assert verify(open_bundle(folder))


def test_a_model_of_ordinary_range_has_no_islands(in_int8: Path) -> None:
    manifest = manifest_of(in_int8)
    assert all(graph.float32_islands == () for graph in manifest.graphs.values())
    assert "islands" not in (in_int8 / "report.md").read_text()


def test_a_spelling_that_is_not_there_is_not_verified_as_another(build: Build) -> None:
    bundle = open_bundle(build("plain", precision="fp16"))
    with pytest.raises(mdruntime.BundleError, match=r"no spelling 'tensorrt-int8', only tensorrt;"):
        verify(bundle, spelling="tensorrt-int8")


def test_a_weight_that_a_precision_cannot_hold_is_named() -> None:
    module = torch.nn.Linear(2, 2)
    with torch.no_grad():
        module.weight[0, 0] = 1e5
    with pytest.raises(mdruntime.SamplingError, match=r"'weight' holds numbers that fp16 cannot"):
        cast(module, "fp16")
    assert cast(module, "bf16").weight.dtype == torch.bfloat16
    assert cast(module, "fp32") is module


def test_bfloat16_is_in_the_tensorrt_spelling_and_nowhere_at_a_border(in_bfloat16: Path) -> None:
    manifest = manifest_of(in_bfloat16)
    assert manifest.precision == "bf16"
    for graph in manifest.graphs.values():
        for tensor in (*graph.inputs, *graph.outputs):
            assert np.dtype(tensor.dtype)  # NumPy has no bfloat16
    graph = manifest.graphs["denoiser"]
    caches = {name for pair in graph.caches for name in pair}
    kinds = {one.dtype for one in (*graph.inputs, *graph.outputs) if one.name in caches}
    assert kinds == {"float16"}
    spelled = ir.load(in_bfloat16 / graph.spellings["tensorrt"])
    products = [node.outputs[0].dtype for node in spelled.graph if node.op_type == "MatMul"]
    assert products.count(BRAIN) == 6 * TINY.depth + 3  # stem and last map besides
    assert set(products) == {BRAIN, FLOAT}
    assert misfits(in_bfloat16 / graph.spellings["tensorrt"]) == []
    assert "LayerNormalization" in graph.float32_operators
    assert "MatMul" in graph.float32_operators  # of the head; the products of blocks are not


def test_onnx_runtime_gets_a_graph_in_float32_that_rounds_to_bfloat16(
    in_bfloat16: Path, half_error: float
) -> None:
    graph = ir.load(in_bfloat16 / "denoiser.onnx").graph
    rounding = {
        node.op_type for node in graph if any(value.dtype == BRAIN for value in node.outputs)
    }
    assert rounding == {"Cast"}
    manifest = manifest_of(in_bfloat16)
    for name in ("tensorrt", "tensorrt-int8"):
        assert "no arithmetic in bfloat16" in manifest.verification.spellings[name].checked
    assert not list(in_bfloat16.rglob("*.check.onnx"))
    result = verify(open_bundle(in_bfloat16))
    assert result
    assert result.limits["mean_log_prob"] == LIMITS["bf16"]["mean_log_prob"]
    # Three bits of mantissa less than float16 has: the rounding is not optimised away.
    assert result.measured["mean_log_prob"] > 2 * half_error


@pytest.fixture
def half_error(in_int8: Path) -> float:
    """What float16 makes of the same model."""
    record = manifest_of(in_int8).verification
    return record.spellings["tensorrt"].measured["mean_log_prob"]


def quantisers(graph: ir.Graph, operator: str) -> list[ir.Node]:
    return [node for node in graph if node.op_type == operator]


def constant(value: ir.Value | None) -> np.ndarray[Any, np.dtype[Any]]:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def producer(value: ir.Value | None) -> str:
    node = None if value is None else value.producer()
    return "" if node is None else node.op_type


@pytest.mark.parametrize("which", ["in_int8", "in_bfloat16"])
def test_products_of_blocks_are_in_int8_and_nothing_else(
    which: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(which)
    path = folder / manifest_of(folder).graphs["denoiser"].spellings["tensorrt-int8"]
    graph = ir.load(path).graph
    inside = [
        node
        for node in graph
        if node.op_type == "MatMul" and producer(node.inputs[1]) == "DequantizeLinear"
    ]
    wanted = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    assert [node.metadata_props[trace.MODULE] for node in inside] == [
        f"blocks.{block}.{part}" for block in range(TINY.depth) for part in wanted
    ]
    assert all(producer(node.inputs[0]) == "DequantizeLinear" for node in inside)
    pairs = 4 * TINY.depth
    assert len(quantisers(graph, "QuantizeLinear")) == pairs
    assert len(quantisers(graph, "DequantizeLinear")) == 2 * pairs
    fed = {
        node.op_type
        for made in quantisers(graph, "DequantizeLinear")
        for node, _ in made.outputs[0].uses()
    }
    assert fed == {"MatMul"}
    assert misfits(path) == []


def test_int8_is_symmetric_with_a_scale_for_each_column(in_int8: Path) -> None:
    folder = in_int8
    graph = ir.load(folder / "denoiser.tensorrt-int8.onnx").graph
    plain = ir.load(folder / "denoiser.tensorrt.onnx").graph
    before = {node.name: node for node in plain if node.op_type == "MatMul"}
    for node in quantisers(graph, "QuantizeLinear"):
        assert node.inputs[0] is not None
        assert node.inputs[0].dtype == node.inputs[1].dtype == HALF  # type: ignore[union-attr]
        assert constant(node.inputs[1]).shape == ()
        assert constant(node.inputs[1]) > 0
        assert constant(node.inputs[2]) == 0
        assert constant(node.inputs[2]).dtype == np.int8
    bytes_of_weights = 0
    for node in quantisers(graph, "DequantizeLinear"):
        if producer(node.inputs[0]) == "QuantizeLinear":
            continue
        steps, scale, zero = (constant(value) for value in node.inputs)
        (use,) = node.outputs[0].uses()
        weight = constant(before[use.node.name].inputs[1]).astype(np.float32)
        assert node.attributes.get_int("axis") == 1
        assert steps.dtype == zero.dtype == np.int8
        assert not zero.any()
        assert scale.shape == zero.shape == (weight.shape[1],)
        assert scale.dtype == np.float16
        wide = scale.astype(np.float32)
        assert (np.abs(steps * wide - weight) <= 0.502 * wide + 1e-3 * np.abs(weight)).all()
        assert (np.abs(steps.astype(int)).max(axis=0) >= 126).all()  # no step is wasted
        bytes_of_weights += steps.size
    assert (folder / "denoiser.tensorrt-int8.weights").stat().st_size >= bytes_of_weights


def test_the_manifest_says_how_int8_was_checked_and_what_was_found(in_int8: Path) -> None:
    bundle = open_bundle(in_int8)
    records = bundle.manifest.verification.spellings
    assert list(records) == ["tensorrt", "tensorrt-int8"]
    assert records["tensorrt"].limits.items() <= LIMITS["fp16"].items()
    found = records["tensorrt-int8"]
    assert found.limits == LIMITS_INT8
    assert set(found.limits) <= set(found.measured)
    assert found.measured["mean_log_prob"] > 2 * records["tensorrt"].measured["mean_log_prob"]
    again = verify(bundle, spelling="tensorrt-int8")
    assert again, again.failures
    assert again.limits == LIMITS_INT8
    report = (in_int8 / "report.md").read_text()
    assert "### tensorrt-int8: denoiser.tensorrt-int8.onnx" in report
    assert f"{found.measured['close_agreement']:.6g}" in report


def test_int8_that_does_not_hold_is_refused_with_its_numbers(
    build: Build, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = {"far too small": lambda histogram: histogram.largest / 40}
    monkeypatch.setattr(int8, "CALIBRATIONS", ways)
    with pytest.raises(mdruntime.VerificationError) as caught:
        build("refused", precision="fp16", int8=True, logits=True)
    text = str(caught.value)
    assert "int8 does not hold: " in text
    assert "mean_log_prob" in text
    assert "(at most 0.1)" in text
    assert text.endswith("build it without --int8")
    assert not list(place.glob("refused*"))


def test_a_model_without_numbered_blocks_is_told_so(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdexport.int8.products", lambda graph: [])
    with pytest.raises(mdruntime.VerificationError, match=r"numbered list.*without --int8"):
        build("none", precision="fp16", int8=True)


def test_weights_of_zeros_and_of_bfloat16_are_quantised_too() -> None:
    weight = np.zeros((3, 2), np.float16)
    weight[:, 1] = (-2, 1.01, 0.5)
    steps, scale = quantised(weight, HALF)
    np.testing.assert_array_equal(steps[:, 0], 0)
    np.testing.assert_array_equal(steps[:, 1], [-127, 64, 32])
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    brain = weight.astype(BRAIN.numpy())
    steps, scale = quantised(brain, BRAIN)
    assert scale.dtype == BRAIN.numpy()
    assert np.abs(steps[:, 1].astype(np.float32) * float(scale[1]) - [-2, 1.01, 0.5]).max() < 0.01


def samples(kind: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    random = np.random.default_rng(0)
    values = random.normal(size=40_000).astype(np.float32)
    if kind == "outliers":
        values[:4] = 60
    return values


def error_of(values: np.ndarray[Any, np.dtype[np.float32]], bound: float) -> float:
    """The mean squared error of int8, by doing it."""
    step = bound / LEVELS
    back = np.clip(np.rint(values / step), -LEVELS, LEVELS) * step
    return float(np.mean((values - back) ** 2))


@pytest.mark.parametrize("kind", ["normal", "outliers"])
def test_a_histogram_knows_what_all_values_together_would_tell(kind: str) -> None:
    values, histogram = samples(kind), Histogram()
    for part in np.array_split(values, 7):
        histogram.add(part.reshape(-1, 1))
    assert histogram.largest == np.abs(values).max()
    for share in (0.5, 0.99, 0.999):
        expected = float(np.quantile(np.abs(values), share))
        assert histogram.quantile(share) == pytest.approx(expected, rel=0.02)
    assert histogram.quantile(1.0) == histogram.largest
    bounds = histogram.largest * np.linspace(0.02, 1, 200)
    least = min(error_of(values, float(bound)) for bound in bounds)
    assert error_of(values, histogram.least_error()) <= 1.1 * least
    if kind == "outliers":
        assert histogram.least_error() < histogram.largest


def test_a_value_that_is_always_zero_can_be_calibrated() -> None:
    histogram = Histogram()
    histogram.add(np.zeros(5, np.float16))
    assert histogram.largest == histogram.least_error() == histogram.quantile(0.99999) == 0


def test_calibration_sees_all_rounds_classes_and_guidance() -> None:
    model = tiny_model().denoiser
    passes, (checked, _) = trajectories(model), record(model)
    ratios = {round(float((one["tokens"] == TINY.codebook).mean()), 1) for one in passes}
    assert len(ratios) >= 6
    assert {len(one["tokens"]) for one in passes} == {2, 4}  # plain and guided
    assert {one["tokens"].shape[1] == model.spec.canvas for one in passes} == {True, False}
    classes = {int(one["tokens"][row, -1]) for one in passes if one["canvas"] for row in range(2)}
    assert len(classes) >= 2
    known = {float(number) for one in checked for number in one["uniforms"].ravel()}
    known -= {0.0}  # where a single row is asked for twice
    assert not known & {float(number) for one in passes for number in one["uniforms"].ravel()[:3]}


def test_precisions_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--fp16", "--bf16"], ["--bf16", "--precision", "fp32"]):
        assert _run(["build", "-m", "digits", *flags]) == 2
        assert f"choose one precision, not {flags[0]} and --" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "precision", "quantises"),
    [
        ([], "fp32", False),
        (["--half"], "fp16", False),
        (["--bf16", "--int8"], "bf16", True),
        (["--precision", "bf16", "--bf16"], "bf16", False),
    ],
)
def test_flags_become_options(
    flags: list[str],
    precision: str,
    quantises: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[Path, mdexport.Options]] = []

    def stop(model: Any, folder: Path, options: mdexport.Options) -> Any:
        asked.append((folder, options))
        raise FileExistsError("far enough")

    monkeypatch.setattr("mdexport.cli.build", stop)
    monkeypatch.chdir(tmp_path)
    assert _run(["build", "-m", "digits", *flags]) == 2
    ((folder, options),) = asked
    assert folder == Path(f"digits-{precision}")
    assert options == mdexport.Options(precision=precision, int8=quantises)
