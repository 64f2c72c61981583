"""Image decoders in int8: against the same graph in float32, and on a trained model."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

import mdexport
import mdruntime
import mdzoo
from mdexport import convolutions
from mdexport.convolutions import quantise_convolutions, ranges_of, write_cpu_int8_images
from mdruntime.bundle import open_bundle
from mdruntime.verify import verify

Array = NDArray[Any]
RNG = np.random.default_rng(0)


def decoder(weights: list[Array], *, between: str = "Relu") -> ir.Model:
    """Return a decoder of 4 x 4 tokens: a table of 8 channels, and convolutions."""
    tape = ir.tape.Tape()
    tokens = ir.Value(
        name="tokens", shape=ir.Shape(["batch", 16]), type=ir.TensorType(ir.DataType.INT32)
    )

    def constant(name: str, value: Array) -> ir.Value:
        return tape.initializer(ir.tensor(value), name=name)

    table = constant("table", RNG.normal(size=(32, 8)).astype(np.float32))
    rows = tape.op("Gather", [table, tokens])
    turned = tape.op("Transpose", [rows], {"perm": [0, 2, 1]})
    x = tape.op("Reshape", [turned, constant("shape", np.array([-1, 8, 4, 4]))])
    for number, weight in enumerate(weights):
        bias = constant(f"bias.{number}", RNG.normal(size=len(weight)).astype(np.float32))
        padding = weight.shape[-1] // 2
        attributes = {"kernel_shape": list(weight.shape[2:]), "pads": [padding] * 4}
        x = tape.op("Conv", [x, constant(f"weight.{number}", weight), bias], attributes)
        x.dtype = ir.DataType.FLOAT
        if between and number + 1 < len(weights):
            x = tape.op(between, [x])
    x.name, x.shape = "images", ir.Shape(["batch", None, 4, 4])
    result = tape.op("Identity", [x])
    result.name, result.dtype, result.shape = "found", ir.DataType.FLOAT, x.shape
    for number, node in enumerate(tape.nodes):
        node.name = f"node.{number}"
    graph = ir.Graph(
        [tokens],
        [result],
        nodes=tape.nodes,
        initializers=tape.initializers,
        opset_imports={"": 23},
        name="decoder",
    )
    return ir.Model(graph, ir_version=10)


def some(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32) / np.float32(np.sqrt(np.prod(shape[1:])))


def run(path: Path, tokens: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found: Array = session.run(None, {"tokens": tokens})[0]
    return found


@pytest.fixture
def tokens() -> Array:
    return np.random.default_rng(1).integers(0, 32, (6, 16)).astype(np.int32)


@pytest.mark.parametrize("between", ["Relu", ""])
def test_a_decoder_in_int8_is_near_the_one_in_float32(
    tmp_path: Path, tokens: Array, between: str
) -> None:
    source, target = tmp_path / "decoder.onnx", tmp_path / "decoder.int8.onnx"
    weights = [some(16, 8, 3, 3), some(16, 16, 3, 3), some(3, 16, 1, 1)]
    ir.save(decoder(weights, between=between), source)
    assert write_cpu_int8_images(source, target, lambda: tokens) == 3
    assert target.with_suffix(".weights").stat().st_size >= 16 * 8 * 9 + 16 * 16 * 9 + 3 * 16
    expected, found = run(source, tokens), run(target, tokens)
    assert not np.array_equal(found, expected)
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()
    kinds = [node.op_type for node in ir.load(tmp_path / "decoder.int8.optimised.onnx").graph]
    assert kinds.count("QLinearConv") == 3  # what ONNX Runtime has made of the pairs
    assert "Conv" not in kinds
    one = run(target, tokens[:1])
    np.testing.assert_array_equal(one, found[:1])  # whatever runs beside it


def test_the_largest_sums_do_not_saturate(tmp_path: Path, tokens: Array) -> None:
    """All weights and inputs at their ends: the sum of two products fits 16 bits."""
    model = decoder([np.ones((16, 8, 3, 3), np.float32), np.ones((1, 16, 3, 3), np.float32)])
    model.graph.initializers["table"].const_value = ir.tensor(np.full((32, 8), 2, np.float32))
    source, target = tmp_path / "decoder.onnx", tmp_path / "decoder.int8.onnx"
    ir.save(model, source)
    write_cpu_int8_images(source, target, lambda: tokens)
    np.testing.assert_allclose(run(target, tokens), run(source, tokens), rtol=0.01)


def test_ranges_are_those_of_all_images(tmp_path: Path, tokens: Array) -> None:
    model = decoder([some(4, 8, 1, 1)])
    (node,) = convolutions.convolutions(model.graph)
    source = tmp_path / "decoder.onnx"
    ir.save(model, source)
    found = ranges_of(source, tokens)
    expected = run(source, tokens)
    assert found[str(node.outputs[0].name)] == (expected.min(), expected.max())
    table = model.graph.initializers["table"].const_value
    assert table is not None
    values = table.numpy()[tokens]
    assert node.inputs[0] is not None
    assert found[str(node.inputs[0].name)] == (values.min(), values.max())


@pytest.mark.parametrize(("least", "largest"), [(-1.0, 3.0), (2.0, 3.0), (-3.0, -2.0), (0.0, 0.0)])
def test_zero_is_a_byte_of_its_own(least: float, largest: float) -> None:
    step, zero = convolutions._byte(least, largest)
    assert step > 0
    for end in (min(least, 0.0), max(largest, 0.0)):
        byte = np.clip(np.rint(end / step) + zero, 0, 255)
        assert float((byte - zero) * step) == pytest.approx(end, abs=0.51 * float(step))


def test_a_decoder_without_convolutions_stays_as_it_is(tmp_path: Path, tokens: Array) -> None:
    ir.save(decoder([]), tmp_path / "decoder.onnx")
    assert (
        write_cpu_int8_images(tmp_path / "decoder.onnx", tmp_path / "x.onnx", lambda: tokens) == 0
    )
    assert [path.name for path in tmp_path.iterdir()] == ["decoder.onnx"]
    assert quantise_convolutions(decoder([]).graph, {}) == []


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "glyphs"
    for _ in mdexport.build(
        mdzoo.load(mdzoo.CATALOGUE["glyphs"], mdzoo.Sources()), folder, mdexport.Options(int8=True)
    ):
        pass
    return folder


def test_pictures_of_a_trained_model_stay_what_they_are(glyphs: Path) -> None:
    bundle = open_bundle(glyphs)
    assert bundle.manifest.graphs["decoder"].spellings["int8"] == "decoder.int8.onnx"
    assert bundle.manifest.verification.spellings["int8"].measured["psnr_db"] > 40
    result = verify(bundle, spelling="int8")
    assert result
    assert result.limits["psnr_db"] == 35
    tokens = np.load(glyphs / "verify" / "decoder.npz")["tokens"]
    with (
        mdruntime.load(glyphs) as whole,
        mdruntime.load(glyphs, precision="int8") as small,
    ):
        images = [pipeline.decode(tokens).astype(float) for pipeline in (whole, small)]
    assert 0 < np.abs(images[0] - images[1]).mean() < 2


def test_pictures_that_change_too_much_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolutions, "WEIGHT_LEVELS", 2)
    with pytest.raises(mdruntime.VerificationError, match=r"int8 does not hold: psnr_db"):
        for _ in mdexport.build(
            mdzoo.load(mdzoo.CATALOGUE["glyphs"], mdzoo.Sources()),
            tmp_path / "glyphs",
            mdexport.Options(int8=True),
        ):
            pass
    assert list(tmp_path.iterdir()) == []
