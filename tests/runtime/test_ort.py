"""Sessions of ONNX Runtime: what is bound, what crosses, and what stays on the device.

The graph is small enough for a NumPy oracle: it writes tokens into a cache of the canvas, and sums
each row of it.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mdruntime import ort_open
from mdruntime.errors import BundleError, ProviderError, SamplingError
from mdruntime.manifest import GraphSpec, TensorSpec
from mdruntime.ort import OrtSession, import_onnxruntime
from mdruntime.ort_binding import Copy

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT32
SPEC = GraphSpec(
    file="sum.onnx",
    opset=20,
    spellings={},
    inputs=(
        TensorSpec("tokens", "int32", ("rows", "m")),
        TensorSpec("positions", "int32", ("rows", "m")),
        TensorSpec("condition.shift", "float32", ("rows",)),
        TensorSpec("past", "float32", ("rows", "canvas")),
    ),
    outputs=(
        TensorSpec("total", "float32", ("rows",)),
        TensorSpec("shown", "float32", ("rows", "m")),
        TensorSpec("present", "float32", ("rows", "canvas")),
    ),
    caches=(("past", "present"),),
    float32_operators=(),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def value(name: str, kind: int, *shape: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    nodes = [
        helper.make_node("Cast", ["tokens"], ["new"], to=FLOAT),
        helper.make_node("Cast", ["positions"], ["where"], to=TensorProto.INT64),
        helper.make_node("ScatterElements", ["past", "where", "new"], ["present"], axis=1),
        helper.make_node("ReduceSum", ["present", "one"], ["sum"], keepdims=0),
        helper.make_node("Add", ["sum", "condition.shift"], ["total"]),
        helper.make_node("GatherElements", ["present", "where"], ["shown"], axis=1),
    ]
    inputs = [value(t.name, INT if t.dtype == "int32" else FLOAT, *t.shape) for t in SPEC.inputs]  # type: ignore[arg-type]
    outputs = [value(t.name, FLOAT, *t.shape) for t in SPEC.outputs]  # type: ignore[arg-type]
    graph = helper.make_graph(nodes, "sum", inputs, outputs, [one])
    imports = [helper.make_opsetid("", 20)]
    target = tmp_path_factory.mktemp("sum") / "sum.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), target)
    return target


def moved(target: int, source: int, nbytes: int) -> None:
    ctypes.memmove(target, source, nbytes)


COPIES: dict[str, Copy | None] = {"in place": None, "two sets": moved}


class Canvas:
    """The oracle: every row as the last pass that saw it left it."""

    def __init__(self, session: OrtSession, rows: int, canvas: int, seed: int = 0) -> None:
        self.session, self.draws = session, np.random.default_rng(seed)
        self.state = np.full((rows, canvas), np.nan, np.float32)
        self.shift = self.draws.normal(size=rows).astype(np.float32)
        session.start(canvas)
        self(rows, canvas)

    def __call__(self, rows: int, m: int) -> None:
        """Run a pass over ``m`` positions of the first ``rows`` rows, and check it."""
        canvas = self.state.shape[1]
        positions = np.stack([self.draws.permutation(canvas)[:m] for _ in range(rows)])
        tokens = self.draws.integers(0, 1000, (rows, m))
        np.put_along_axis(self.state[:rows], positions, tokens.astype(np.float32), axis=1)
        feeds = {
            "tokens": tokens.astype(np.int32),
            "positions": positions.astype(np.int32),
            "condition.shift": self.shift[:rows],
        }
        found = self.session.run(feeds, ["total", "shown"])
        np.testing.assert_allclose(
            found["total"], self.state[:rows].sum(axis=1) + self.shift[:rows], rtol=1e-5
        )
        np.testing.assert_array_equal(found["shown"], tokens)


@pytest.mark.parametrize("copy", COPIES)
def test_caches_stay_over_passes_of_fewer_rows_and_positions(path: Path, copy: str) -> None:
    canvas = Canvas(OrtSession(path, SPEC, "cpu", threads=1, copy=COPIES[copy]), 4, 9)
    for rows, m in [(4, 3), (2, 3), (2, 1), (4, 3), (1, 9), (1, 2), (4, 1), (4, 9), (3, 2), (4, 2)]:
        canvas(rows, m)


@pytest.mark.parametrize("copy", COPIES)
def test_more_rows_and_other_canvases_get_new_caches(path: Path, copy: str) -> None:
    session = OrtSession(path, SPEC, "cpu", threads=1, copy=COPIES[copy])
    for rows, size in [(1, 5), (3, 5), (2, 7), (2, 5)]:
        canvas = Canvas(session, rows, size, seed=rows)
        canvas(rows, 2)


def test_clones_share_weights_but_no_caches(path: Path) -> None:
    session = OrtSession(path, SPEC, "cpu", threads=1)
    first = Canvas(session, 2, 6)
    second = Canvas(session.clone(), 2, 6, seed=1)
    for one in (first, second, first, second):
        one(2, 2)


def test_only_what_changes_crosses(path: Path) -> None:
    session = OrtSession(path, SPEC, "cpu", threads=1)
    canvas = Canvas(session, 2, 6)
    for _ in range(3):
        canvas(2, 2)
    before = session.uploaded, session.downloaded
    canvas(2, 2)
    ids = 2 * (2 * 2 * 4)  # tokens and positions
    assert session.uploaded - before[0] == ids
    assert session.downloaded - before[1] == 2 * 4 + 2 * 2 * 4  # totals, and what is shown
    canvas.shift = canvas.shift + 1
    before = session.uploaded, 0
    canvas(2, 2)
    assert session.uploaded - before[0] == ids + 2 * 4


def test_results_belong_to_the_caller(path: Path) -> None:
    session = OrtSession(path, SPEC, "cpu", threads=1)
    session.start(3)
    feeds = {
        "tokens": np.array([[1, 2, 3]], np.int32),
        "positions": np.array([[0, 1, 2]], np.int32),
        "condition.shift": np.zeros(1, np.float32),
    }
    kept = [session.run(feeds, ["shown"])["shown"] for _ in range(2)]
    session.run({**feeds, "tokens": np.array([[7, 8, 9]], np.int32)}, ["shown"])
    for each in kept:
        np.testing.assert_array_equal(each, [[1, 2, 3]])


def test_buffers_of_shapes_that_came_long_ago_are_given_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdruntime.ort_binding._MOST", 3)
    session = OrtSession(path, SPEC, "cpu", threads=1)
    canvas = Canvas(session, 2, 8)
    for m in [1, 2, 3, 4, 5, 6, 1, 2]:
        canvas(2, m)
    bindings = session._bindings
    assert len(bindings._kept) == 3
    assert {key[1] for key in bindings._buffers if key[0] == "tokens"} == {(2, 6), (2, 1), (2, 2)}


def test_a_wrong_type_is_an_error_not_a_number(path: Path) -> None:
    session = OrtSession(path, SPEC, "cpu", threads=1)
    session.start(3)
    feeds = {
        "tokens": np.array([[1.0, 2.0, 3.0]], np.float32),
        "positions": np.array([[0, 1, 2]], np.int32),
        "condition.shift": np.zeros(1, np.float32),
    }
    with pytest.raises(BundleError, match="Unexpected input data type"):
        session.run(feeds, ["shown"])


def test_a_closed_session_says_so(path: Path) -> None:
    session = OrtSession(path, SPEC, "cpu", threads=1)
    session.close()
    session.close()
    with pytest.raises(BundleError, match="closed"):
        session.run({}, [])
    with pytest.raises(BundleError, match="closed"):
        session.clone()


def capturing(path: Path) -> tuple[OrtSession, list[int]]:
    """A session that thinks it is on CUDA, and the numbers of its runs' graphs as they come."""
    session = OrtSession(path, SPEC, "cpu", threads=1)
    opened = session._open_session()
    real, numbers = opened.session, list[int]()

    def run(binding: Any, options: Any) -> None:
        numbers.append(int(options.get_run_config_entry("gpu_graph_id")))
        real.run_with_iobinding(binding)

    opened.graphs = True
    opened.session = SimpleNamespace(
        run_with_iobinding=run,
        io_binding=real.io_binding,
        release_captured_graph=lambda number: numbers.append(-number),
    )
    return session.clone(), numbers


def test_shapes_that_come_again_become_graphs_with_numbers_of_their_own(path: Path) -> None:
    session, numbers = capturing(path)
    canvas = Canvas(session, 2, 6)
    for m in [2, 2, 2, 3, 2, 3, 3, 1]:
        canvas(2, m)
    assert numbers == [-1, -1, -1, 1, -1, 1, -1, 2, -1]
    other = Canvas(session.clone(), 2, 6)
    for m in [2, 2, 2]:
        other(2, m)
    assert numbers[-4:] == [-1, -1, -1, 3]


def test_graphs_are_released_with_the_caches_they_were_made_for(path: Path) -> None:
    session, numbers = capturing(path)
    canvas = Canvas(session, 2, 6)
    for _ in range(3):
        canvas(2, 2)
    numbers.clear()
    canvas = Canvas(session, 3, 6)  # more rows: new caches
    assert numbers[0] == -1  # of graph 1, released
    assert numbers[1] == -1  # run eagerly
    for _ in range(3):
        canvas(3, 2)
    assert numbers[-1] == 2


def test_a_graph_that_fails_is_replaced_by_eager_passes_once_and_said(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, numbers = capturing(path)
    opened = session._open_session()
    real = opened.session.run_with_iobinding

    def fail(binding: Any, options: Any) -> None:
        if options.get_run_config_entry("gpu_graph_id") != "-1":
            raise RuntimeError("capture is not permitted\nand more")
        real(binding, options)

    opened.session.run_with_iobinding = fail
    canvas = Canvas(session, 2, 6)
    for _ in range(6):
        canvas(2, 2)
    assert session.notes == ["CUDA graphs were given up: capture is not permitted"]
    assert set(numbers) == {-1}


class FakeRuntime:
    """ONNX Runtime with other providers, which loads nothing."""

    __version__ = "1.0"

    def __init__(
        self,
        offered: Sequence[str],
        used: Sequence[str] | None = None,
        fail: Callable[[Mapping[str, Mapping[str, str]]], None] = lambda _: None,
    ) -> None:
        self.offered, self.used, self.fail = list(offered), used, fail
        self.asked: list[dict[str, Mapping[str, str]]] = []
        self.SessionOptions = import_onnxruntime().SessionOptions

    def get_available_providers(self) -> list[str]:
        return self.offered

    def InferenceSession(  # noqa: N802
        self, path: str, options: Any, providers: Any, *, enable_fallback: int
    ) -> Any:
        assert enable_fallback == 0
        self.asked.append(dict(providers))
        self.fail(self.asked[-1])
        used = [*self.asked[-1], "CPUExecutionProvider"] if self.used is None else list(self.used)
        nodes = [SimpleNamespace(op_type=name) for name in ("Shape", "Gather", "Shape")]
        parts = [
            SimpleNamespace(ep_name=used[0], get_nodes=lambda: nodes),
            SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: nodes),
        ]
        return SimpleNamespace(
            get_providers=lambda: used, get_provider_graph_assignment_info=lambda: parts
        )


CUDA = ["CUDAExecutionProvider", "CPUExecutionProvider"]


def opened(
    runtime: Any, monkeypatch: pytest.MonkeyPatch, *, board: bool = False, graphs: bool = True
) -> ort_open.Opened:
    monkeypatch.setattr(ort_open, "is_board", lambda: board)
    return ort_open.open_graph(
        runtime, Path("x.onnx"), "cuda", threads=1, graphs=graphs, options={}
    )


def test_nodes_that_run_elsewhere_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found = opened(FakeRuntime(CUDA), monkeypatch)
    assert found.graphs
    assert found.notes == ["x.onnx: 3 of 6 nodes run on CPUExecutionProvider: 2 Shape, 1 Gather"]


def test_a_provider_that_gives_way_to_the_cpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProviderError, match="fell back to CPUExecutionProvider"):
        opened(FakeRuntime(CUDA, ["CPUExecutionProvider"]), monkeypatch)
    with pytest.raises(ProviderError, match="offers only CPUExecutionProvider; install"):
        opened(FakeRuntime(["CPUExecutionProvider"]), monkeypatch)


def test_graphs_that_cannot_be_captured_run_without_and_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(asked: Mapping[str, Mapping[str, str]]) -> None:
        if asked["CUDAExecutionProvider"]["enable_cuda_graph"] == "1":
            raise RuntimeError("This session cannot use the graph capture feature\nbecause")

    runtime = FakeRuntime(CUDA, fail=fail)
    found = opened(runtime, monkeypatch)
    assert not found.graphs
    assert found.notes[0].startswith("x.onnx runs without CUDA graphs: This session cannot")
    assert [each["CUDAExecutionProvider"]["enable_cuda_graph"] for each in runtime.asked] == [
        "1",
        "0",
    ]


def test_a_board_gets_less_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    for board in (False, True):
        runtime = FakeRuntime(CUDA)
        opened(runtime, monkeypatch, board=board, graphs=False)
        options = runtime.asked[0]["CUDAExecutionProvider"]
        assert options["cudnn_conv_use_max_workspace"] == str(int(not board))
        assert options["arena_extend_strategy"] == "kSameAsRequested"
        assert options["use_tf32"] == "0"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Failed to allocate memory for requested buffer of size 8", MemoryError),
        ("CUDA failure 2: out of memory ; GPU=0", MemoryError),
        ("Load model failed: Protobuf parsing failed", BundleError),
    ],
)
def test_errors_of_loading_are_sorted(
    monkeypatch: pytest.MonkeyPatch, text: str, kind: type[Exception]
) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError(text)

    with pytest.raises(kind):
        opened(FakeRuntime(CUDA, fail=fail), monkeypatch)


def test_more_threads_than_cores_are_refused(path: Path) -> None:
    with pytest.raises(SamplingError, match="threads must be between 0"):
        OrtSession(path, SPEC, "cpu", threads=10_000)
