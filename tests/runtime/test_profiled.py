"""Profiles of ONNX Runtime: a hand-made one with known arithmetic, and real ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mdruntime.arithmetic import Tensor, is_product, work_of
from mdruntime.bench import PassTime
from mdruntime.bundle import open_bundle
from mdruntime.ceiling import Ceiling
from mdruntime.cli_roofline import operator_lines, roofline_lines
from mdruntime.errors import BundleError
from mdruntime.profiled import Run, read_profile
from mdruntime.roofline import Operator, PassProfile, PassWork, Roofline, profile_passes, roofline

CEILING = Ceiling(gigaflops=100.0, gigabytes=10.0, threads=2)


def kernel(ts: int, dur: int, op: str, inputs: list[Any], outputs: list[Any]) -> dict[str, Any]:
    shapes = {"input_type_shape": inputs, "output_type_shape": outputs}
    args = {"op_name": op, **shapes}
    return {"cat": "Node", "name": f"n{ts}_kernel_time", "ts": ts, "dur": dur, "args": args}


def run_of(ts: int, dur: int) -> dict[str, Any]:
    return {"cat": "Session", "name": "model_run", "ts": ts, "dur": dur, "args": {}}


def a_run(ts: int, dur: int, rows: int) -> list[dict[str, Any]]:
    """Two products with weights, attention, a loop that holds one of them, and a softmax."""
    wide = [{"float": [1, rows, 100]}]
    heads = [{"float": [1, 4, rows, 25]}, {"float": [1, 4, 50, 25]}, {"float": [1, 4, 50, 25]}]
    return [
        kernel(ts + 1, 104, "MatMul", wide, [{"float": [1, rows, 200]}]),
        kernel(ts + 110, 300, "Loop", [], []),
        kernel(ts + 120, 200, "MatMul", [*wide, {"float": [100, 50]}], [{"float": [1, rows, 50]}]),
        kernel(ts + 420, 80, "Attention", heads, heads[:1]),
        kernel(ts + 510, 20, "Softmax", wide, wide),
        run_of(ts, dur),
    ]


def written(path: Path, events: Any) -> Path:
    path.write_text(json.dumps(events), encoding="utf-8")
    return path


@pytest.fixture
def runs(tmp_path: Path) -> dict[int, list[Run]]:
    """Three full passes and one over 10 rows, in a file whose events are in no order."""
    loading = {"cat": "Session", "name": "model_loading_uri", "ts": 0, "dur": 900, "args": {}}
    passes = [
        a_run(1000, 700, 50),
        a_run(2000, 900, 50),
        a_run(3000, 600, 50),
        a_run(4000, 550, 10),
    ]
    events = [loading, *(event for some in passes for event in some)]
    first, second, third, small = read_profile(written(tmp_path / "p.json", events[::-1]))
    return {50: [first, second, third], 10: [small]}


def test_arithmetic_is_that_of_all_products(runs: dict[int, list[Run]]) -> None:
    found = roofline(CEILING, runs, operators=True)
    rows = {each.rows: (each.gigaflop, each.weight_mb, each.uncounted) for each in found.passes}
    assert list(rows) == [50, 10]
    for size, facts in rows.items():
        gigaflop = 2e-9 * size * (100 * 250 + 2 * 50 * 100)
        assert facts[:2] == pytest.approx((gigaflop, 0.1))
        assert facts[2] == ()
    full, small = found.operators
    assert (full.rows, full.ms, small.rows, small.ms) == (50, 0.6, 10, 0.55)  # the fastest of each
    table = {each.name: (each.calls, each.ms, each.product) for each in full.operators}
    assert table == {
        "MatMul": (2, pytest.approx(0.304), True),
        "Attention": (1, 0.08, True),
        "Softmax": (1, 0.02, False),
    }
    assert [each.name for each in full.operators] == ["MatMul", "Attention", "Softmax"]
    assert full.between_ms == pytest.approx(0.6 - 0.404)
    assert roofline(CEILING, runs, operators=False).operators == ()


def test_tables_say_speeds_and_shares(runs: dict[int, list[Run]]) -> None:
    found = roofline(CEILING, runs, operators=True)
    passes = [PassTime(50, False, 0.5), PassTime(50, True, 9.0), PassTime(10, False, 0.2)]
    lines = list(roofline_lines(found, passes))
    # 0.0035 GFLOP in 0.5 ms are 7 GFLOP/s; 0.1 MB at 10 GB/s take 0.01 ms.
    assert lines[1].split()[-5:] == ["0.004", "7.0", "7%", "0.1", "2%"]
    assert lines[2].split()[-5:] == ["0.001", "3.5", "4%", "0.1", "5%"]
    full = list(operator_lines(CEILING, found.operators[0], passes))
    cells = {line[:28].strip(): line[28:].split() for line in full}
    assert cells["MatMul"] == ["2", "0.30", "50.7%", "8.2", "8%"]
    assert cells["Attention"] == ["1", "0.08", "13.3%", "12.5", "12%"]
    assert cells["Softmax"] == ["1", "0.02", "3.3%"]
    assert cells["between operators"] == ["0.20", "32.7%"]
    assert full[-3] == "products are 64% of the 0.60 ms, at 9% of the peak; then Softmax 3.3%"
    assert full[-2] == ("gap to the peak (0.04 ms): products +0.35, others +0.02, between +0.20 ms")
    assert full[-1] == "(profiling included; without it the pass takes 0.50 ms)"
    assert max(map(len, [*lines, *full])) <= 80


def test_rare_operators_share_a_line() -> None:
    names = [f"Operator{index}" for index in range(3)]
    kinds = tuple(
        Operator(name, 3, ms, 0.0, False) for name, ms in zip(names, (98, 0.5, 0.25), strict=True)
    )
    lines = list(operator_lines(CEILING, PassProfile(1, 100, kinds), []))
    assert lines[2].split() == ["2", "more", "kinds", "6", "0.75", "0.8%"]
    assert lines[0].startswith("operators, 1 row ")


def test_what_cannot_be_counted_is_named() -> None:
    lines = list(roofline_lines(Roofline(CEILING, (PassWork(4, 1.0, 1.0, ("Conv",)),)), []))
    assert lines[-1] == "not counted, as their shapes are not known: Conv"


def tensors_of(dtype: str) -> Callable[..., Tensor]:
    return lambda *shape: Tensor(dtype, shape)


FLOAT, HALF, BYTE = map(tensors_of, ("float", "float16", "uint8"))


@pytest.mark.parametrize(
    ("operator", "inputs", "output", "flop", "weight_bytes"),
    [
        ("MatMul", [FLOAT(2, 3, 5)], FLOAT(2, 3, 7), 2 * 2 * 3 * 5 * 7, 4 * 35),
        ("MatMul", [HALF(3, 5), HALF(5, 7)], HALF(3, 7), 2 * 3 * 5 * 7, 2 * 35),
        ("MatMul", [FLOAT(2, 4, 3, 5), FLOAT(2, 4, 5, 7)], FLOAT(2, 4, 3, 7), 2 * 8 * 105, 0),
        ("Gemm", [FLOAT(3, 5), FLOAT(7, 5), FLOAT(7)], FLOAT(3, 7), 2 * 105, 4 * 35),
        ("FusedMatMul", [FLOAT(5, 3)], FLOAT(3, 7), 2 * 105, 4 * 35),  # transposed
        (
            "MatMulIntegerToFloat",
            [BYTE(1, 3, 5), FLOAT(), FLOAT(7), BYTE(), BYTE()],
            FLOAT(1, 3, 7),
            2 * 105,
            35,
        ),
        ("Attention", [FLOAT(2, 4, 3, 8)] + 2 * [FLOAT(2, 4, 9, 8)], FLOAT(2, 4, 3, 8), 6912, 0),
        ("Attention", [FLOAT(2, 3, 32)] + 2 * [FLOAT(2, 9, 32)], FLOAT(2, 3, 32), 6912, 0),
        (
            "Conv",
            [FLOAT(1, 4, 8, 8), FLOAT(6, 4, 3, 3), FLOAT(6)],
            FLOAT(1, 6, 8, 8),
            2 * 6 * 64 * 36,
            4 * 216,
        ),
    ],
)
def test_products_are_counted_by_their_shapes(
    operator: str, inputs: list[Tensor], output: Tensor, flop: int, weight_bytes: int
) -> None:
    found = work_of(operator, inputs, [output])
    assert found is not None
    assert (found.gigaflop, found.weight_mb) == pytest.approx((1e-9 * flop, 1e-6 * weight_bytes))
    assert is_product(operator)


def test_what_shapes_do_not_tell_is_not_guessed() -> None:
    assert work_of("Softmax", [FLOAT(3, 5)], [FLOAT(3, 5)]) is None
    assert not is_product("Softmax")
    assert work_of("MatMul", [], [FLOAT(3, 5)]) is None
    assert work_of("MatMul", [FLOAT(5)], [FLOAT(5)]) is None
    assert work_of("Conv", [FLOAT(1, 4, 8, 8)], [FLOAT(1, 6, 8, 8)]) is None
    packed = [FLOAT(1, 3, 8), FLOAT(8, 24), FLOAT(24)]  # Microsoft's own operator of that name
    assert work_of("Attention", packed, [FLOAT(1, 3, 8)]) is None


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"name": "model_run"}]', '{"a": 1}'])
def test_what_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text, encoding="utf-8")
    if text == "{}":
        assert read_profile(path) == []
        return
    with pytest.raises(BundleError, match="profile cannot be read"):
        read_profile(path)


@pytest.mark.parametrize("batch", [1, 3])
def test_passes_of_a_real_model_have_the_arithmetic_of_its_weights(
    digits_bundle: Path, batch: int
) -> None:
    from mdexport.bench import gigaflop, weight_shapes

    bundle = open_bundle(digits_bundle, check=False)
    runs = profile_passes(bundle, threads=1, batch=batch, repeats=2)
    found = roofline(CEILING, runs, operators=True)
    shapes, spec = weight_shapes(bundle.path("denoiser")), bundle.manifest.denoiser
    assert found.passes[0].rows == 65
    assert {len(some) for some in runs.values()} == {2}
    for each in found.passes:
        if each.rows == 1:  # whose logits are asked for twice
            continue
        expected = batch * gigaflop(shapes, bundle.manifest.graphs["denoiser"], spec, each.rows)
        # Token 65, the class, has no logits; and a shared table of tokens is no initializer.
        assert expected * 0.97 <= each.gigaflop <= expected * 1.03
        assert each.uncounted == ()
    assert found.passes[0].weight_mb == pytest.approx(
        4e-6 * sum(a * b for a, b in shapes), rel=0.03
    )
    full, small = found.operators
    assert (full.rows, small.rows) == (65, 16)
    assert {"MatMul", "Attention"} <= {each.name for each in full.operators if each.product}
    assert 0 < sum(each.ms for each in full.operators) <= full.ms


def test_nothing_is_left_of_a_profile(
    digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = set(Path.cwd().iterdir())
    assert profile_passes(open_bundle(digits_bundle, check=False), threads=1)
    assert list(tmp_path.iterdir()) == []
    assert set(Path.cwd().iterdir()) == before
