"""The stand-ins refuse what the real libraries refuse or get wrong in silence: see tests/standin.

Tests of sessions and of engine building lean on them, so that each check of theirs is shown to
fail here. They are not the real ones: test_real_surface.py compares the names.
"""

import gc
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mdruntime.cuda import Cuda, CudaError, DeviceBuffer, Stream, open_cuda
from tests.standin import MisuseError, Options, StandIn, environment, install
from tests.standin.widen import narrow, wide

WIDTH, LONGEST = 8, 6


def _attention(dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """Return self-attention over x (batch, rows, WIDTH), with an output of indices beside it."""
    rng = np.random.default_rng(0)
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    weights = [
        numpy_helper.from_array(rng.normal(size=(WIDTH, WIDTH)).astype(kind), f"w{name}")
        for name in "qkv"
    ]
    nodes = [
        *(helper.make_node("MatMul", ["x", f"w{n}"], [n], name=f"project_{n}") for n in "qkv"),
        helper.make_node("Transpose", ["k"], ["kt"], name="turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["scores"], name="scores"),
        helper.make_node("Softmax", ["scores"], ["shares"], name="softmax"),
        helper.make_node("MatMul", ["shares", "v"], ["y"], name="mix"),
        helper.make_node("Add", ["n", "n"], ["twice"], name="double"),
    ]
    graph = helper.make_graph(
        nodes,
        "attention",
        [
            helper.make_tensor_value_info("x", dtype, ["batch", "rows", WIDTH]),
            helper.make_tensor_value_info("n", TensorProto.INT32, ["batch"]),
        ],
        [
            helper.make_tensor_value_info("y", dtype, ["batch", "rows", WIDTH]),
            helper.make_tensor_value_info("twice", TensorProto.INT32, ["batch"]),
        ],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "attention.onnx"
    onnx.save(_attention(), path)
    return path


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StandIn]]:
    """A function from options to stand-ins in place; the garbage of engines goes at the end."""
    yield lambda **options: install(monkeypatch, **options)
    gc.collect()


@dataclass
class Bench:
    """A builder and all it takes, of one stand-in."""

    standin: StandIn
    graph: Path

    def __post_init__(self) -> None:
        self.trt: Any = self.standin.trt
        self.log = self.trt.Logger(self.trt.Logger.VERBOSE)
        self.builder = self.trt.Builder(self.log)
        typed = 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.network = self.builder.create_network(typed)
        self.parser = self.trt.OnnxParser(self.network, self.log)
        assert self.parser.parse_from_file(str(self.graph))
        self.config = self.builder.create_builder_config()
        self.config.profiling_verbosity = self.trt.ProfilingVerbosity.DETAILED

    def profile(self, low: int, high: int, *, rows: int = LONGEST) -> None:
        profile = self.builder.create_optimization_profile()
        profile.set_shape("x", (low, 1, WIDTH), (low, rows, WIDTH), (high, rows, WIDTH))
        profile.set_shape("n", (low,), (low,), (high,))
        self.config.add_optimization_profile(profile)

    def build(self) -> bytes:
        plan = self.builder.build_serialized_network(self.network, self.config)
        assert plan is not None, self.errors()
        return bytes(plan)

    def engine(self) -> Any:
        return self.trt.Runtime(self.log).deserialize_cuda_engine(self.build())

    def errors(self) -> str:
        return "\n".join(text for _, text in self.log._kept)


@pytest.fixture
def bench(play: Callable[..., StandIn], graph: Path) -> Callable[..., Bench]:
    """A function from options to a bench with a profile of batches 1 to 4."""

    def made(**options: Any) -> Bench:
        bench = Bench(play(**options), graph)
        bench.profile(1, 4)
        return bench

    return made


class Rig:
    """A context with all its memory: runs a batch of x, and returns y."""

    def __init__(self, bench: Bench, engine: Any) -> None:
        self.cuda = Cuda(bench.standin.library)
        self.stream: Stream = self.cuda.stream()
        self.trt, self.engine = bench.trt, engine
        user = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.context: Any = engine.create_execution_context(user)
        self.block = self.cuda.allocate(engine.device_memory_size_v2)
        self.context.set_device_memory(self.block.address, self.block.nbytes)
        self.buffers: dict[str, DeviceBuffer] = {}

    def bind(self, batch: int, rows: int) -> None:
        assert self.context.set_input_shape("x", (batch, rows, WIDTH))
        assert self.context.set_input_shape("n", (batch,))
        for index in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(index)
            shape = self.context.get_tensor_shape(name)
            dtype = np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(name)))
            self.buffers[name] = self.cuda.allocate(self.trt.volume(shape) * dtype.itemsize)
            assert self.context.set_tensor_address(name, self.buffers[name].address)

    def put(self, x: NDArray[Any]) -> None:
        with self.staged(x) as staging:
            self.cuda.upload(self.buffers["x"].address, staging.address, x.nbytes, self.stream)
            self.stream.synchronize()

    def staged(self, x: NDArray[Any]) -> Any:
        staging = self.cuda.pinned(x.shape, x.dtype)
        staging.array[...] = x
        return staging

    def get(self, shape: tuple[int, ...], dtype: Any = np.float32) -> NDArray[Any]:
        with self.cuda.pinned(shape, dtype) as out:
            self.cuda.download(out.address, self.buffers["y"].address, out.nbytes, self.stream)
            self.stream.synchronize()
            return out.array.copy()

    def close(self) -> None:
        for held in (*self.buffers.values(), self.block, self.stream):
            held.close()


def _expected(x: NDArray[np.float32]) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    q, k, v = (x @ rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) for _ in "qkv")
    scores = q @ k.transpose(0, 2, 1)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (shares / shares.sum(axis=-1, keepdims=True)) @ v


def _x(batch: int, rows: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).normal(size=(batch, rows, WIDTH)).astype(np.float32)


# Device memory and streams.


@pytest.fixture
def device(play: Callable[..., StandIn]) -> Iterator[tuple[StandIn, Cuda, Stream]]:
    standin = play()
    cuda = open_cuda()
    with cuda.stream() as stream:
        yield standin, cuda, stream


def test_memory_that_was_freed_cannot_be_used(device: tuple[StandIn, Cuda, Stream]) -> None:
    standin, cuda, stream = device
    buffer = cuda.allocate(16)
    address = buffer.address
    buffer.free()
    with pytest.raises(MisuseError, match=r"used after they were freed at test_standin\.py"):
        cuda.zero(address, 16, stream)
    with pytest.raises(AssertionError, match="misuse of the device"):
        standin.check()


def test_memory_that_is_freed_after_a_capture_fails_the_launch(
    device: tuple[StandIn, Cuda, Stream],
) -> None:
    _, cuda, stream = device
    buffer = cuda.allocate(16)
    with cuda.capture(stream) as captured:
        cuda.zero(buffer.address, 16, stream)
    buffer.free()
    with pytest.raises(MisuseError, match="used after they were freed"):
        captured.graph.launch(stream)


def test_a_copy_must_stay_inside_of_an_allocation(device: tuple[StandIn, Cuda, Stream]) -> None:
    _, cuda, stream = device
    with cuda.allocate(16) as buffer, cuda.pinned((8,), np.int32) as host:
        with pytest.raises(MisuseError, match="run over the end of 16 bytes of device memory"):
            cuda.upload(buffer.address, host.address, 20, stream)
        with pytest.raises(MisuseError, match="run over the end"):
            cuda.zero(buffer.address + 8, 16, stream)
        with pytest.raises(MisuseError, match="belong to no allocation"):
            cuda.zero(buffer.address + 1024, 4, stream)
        with pytest.raises(MisuseError, match="are not device memory"):
            cuda.upload(host.address, buffer.address, 4, stream)
        unpinned = np.zeros(4, np.int32)
        with pytest.raises(MisuseError, match=r"belong to no allocation|not page-locked"):
            cuda.upload(buffer.address, unpinned.ctypes.data, 16, stream)


def test_memory_is_not_freed_twice(device: tuple[StandIn, Cuda, Stream]) -> None:
    standin, cuda, _ = device
    address = cuda.allocate(16).address
    assert standin.library.cudaFree(address) == 0
    with pytest.raises(MisuseError, match="freed twice"):
        standin.library.cudaFree(address)
    assert standin.library.cudaFree(address + 4) == 1


def test_what_is_uploaded_is_what_the_host_has_when_the_stream_gets_there(
    device: tuple[StandIn, Cuda, Stream],
) -> None:
    _, cuda, stream = device
    with cuda.allocate(4) as buffer, cuda.pinned((1,), np.int32) as host:
        host.array[0] = 1
        cuda.upload(buffer.address, host.address, 4, stream)
        host.array[0] = 2  # too early: the first number is lost
        cuda.download(host.address, buffer.address, 4, stream)
        stream.synchronize()
        assert host.array[0] == 2


def test_fresh_memory_is_full_of_nan(device: tuple[StandIn, Cuda, Stream]) -> None:
    _, cuda, stream = device
    with cuda.allocate(8) as buffer, cuda.pinned((2,), np.float32) as host:
        cuda.download(host.address, buffer.address, 8, stream)
        stream.synchronize()
        assert np.isnan(host.array).all()


def test_page_locked_memory_waits_for_the_stream(device: tuple[StandIn, Cuda, Stream]) -> None:
    _, cuda, stream = device
    host = cuda.pinned((4,), np.int32)
    with cuda.allocate(16) as buffer:
        cuda.upload(buffer.address, host.address, 16, stream)
        with pytest.raises(MisuseError, match="freed while a stream still has to use it"):
            host.free()
        stream.synchronize()


def test_two_streams_must_not_race(device: tuple[StandIn, Cuda, Stream]) -> None:
    _, cuda, stream = device
    with cuda.allocate(16) as buffer, cuda.allocate(16) as other, cuda.stream() as second:
        cuda.zero(buffer.address, 16, stream)
        cuda.zero(other.address, 16, second)
        with pytest.raises(MisuseError, match="on another stream has not finished with it"):
            cuda.copy(other.address, buffer.address, 16, second)
        stream.synchronize()
        cuda.copy(other.address, buffer.address, 16, second)


def test_the_default_stream_is_refused(device: tuple[StandIn, Cuda, Stream]) -> None:
    standin, cuda, stream = device
    with cuda.allocate(4) as buffer:
        with pytest.raises(MisuseError, match="legacy default stream"):
            standin.library.cudaMemsetAsync(buffer.address, 0, 4, 0)
        with cuda.capture(stream):
            assert standin.library.cudaMemsetAsync(buffer.address, 0, 4, 0) == 906


def test_another_thread_may_allocate_while_this_one_captures(
    device: tuple[StandIn, Cuda, Stream],
) -> None:
    _, cuda, stream = device
    with cuda.capture(stream):
        thread = threading.Thread(target=lambda: cuda.allocate(4).free())
        thread.start()
        thread.join()


def test_leaks_are_told_with_their_origin(device: tuple[StandIn, Cuda, Stream]) -> None:
    standin, cuda, _ = device
    with cuda.allocate(4), pytest.raises(AssertionError, match=r"4 bytes of device .*test_standin"):
        standin.check()


def test_calls_fail_when_they_are_told_to(play: Callable[..., StandIn]) -> None:
    play(failures=(("cudaMalloc", 2, 700),))
    cuda = open_cuda()
    with (
        cuda.allocate(4),
        pytest.raises(CudaError, match=r"cudaErrorIllegalAddress \(700\).*start it again"),
    ):
        cuda.allocate(4)


# Engines.


@pytest.mark.parametrize("api", ["10.3", "11.4"])
def test_an_engine_computes_what_its_graph_says(api: str, bench: Callable[..., Bench]) -> None:
    made = bench(api=api)
    rig = Rig(made, made.engine())
    for batch, rows in ((1, 3), (4, LONGEST)):
        rig.bind(batch, rows)
        x = _x(batch, rows)
        rig.put(x)
        assert rig.context.execute_async_v3(rig.stream.handle), made.errors()
        np.testing.assert_allclose(rig.get(x.shape), _expected(x), atol=1e-5)
        for buffer in rig.buffers.values():
            buffer.free()
    rig.close()
    del rig
    made.standin.check()


def test_a_graph_of_a_pass_repeats_it(bench: Callable[..., Bench]) -> None:
    made = bench()
    rig = Rig(made, made.engine())
    rig.bind(2, 3)
    assert rig.context.execute_async_v3(rig.stream.handle)
    with rig.cuda.capture(rig.stream) as captured:
        assert rig.context.execute_async_v3(rig.stream.handle)
    x = _x(2, 3)
    rig.put(x)
    captured.graph.launch(rig.stream)
    np.testing.assert_allclose(rig.get(x.shape), _expected(x), atol=1e-5)
    rig.context.set_input_shape("x", (2, 3, WIDTH))  # no change
    captured.graph.launch(rig.stream)
    rig.context.set_input_shape("x", (2, 4, WIDTH))
    with pytest.raises(MisuseError, match="use a context for every graph"):
        captured.graph.launch(rig.stream)
    rig.context = None
    gc.collect()
    with pytest.raises(MisuseError, match="whose execution context is gone"):
        captured.graph.launch(rig.stream)


def test_a_pass_must_run_once_before_it_is_captured(bench: Callable[..., Bench]) -> None:
    made = bench()
    rig = Rig(made, made.engine())
    rig.bind(2, 3)
    with (
        pytest.raises(CudaError, match="cudaErrorStreamCaptureInvalidated"),
        rig.cuda.capture(rig.stream),
    ):
        assert not rig.context.execute_async_v3(rig.stream.handle)
    assert "enqueue these shapes once before capture" in made.errors()


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda c: c.set_input_shape("x", (5, 3, WIDTH)), r"outside of profile 0"),
        (lambda c: c.set_input_shape("x", (1, WIDTH)), r"outside of profile 0"),
        (lambda c: c.set_input_shape("y", (1, 3, WIDTH)), r"'y' is no input"),
        (lambda c: c.set_tensor_address("z", 512), r"'z' is no input or output"),
        (lambda c: c.set_optimization_profile_async(1, 0x5EED_0010), r"profile 1 does not exist"),
    ],
)
def test_wrong_calls_answer_false_and_are_logged(
    wrong: Callable[[Any], bool], text: str, bench: Callable[..., Bench]
) -> None:
    made = bench()
    rig = Rig(made, made.engine())
    assert wrong(rig.context) is False
    assert text in made.errors()


def test_shapes_addresses_and_memory_must_be_set(bench: Callable[..., Bench]) -> None:
    made = bench()
    rig = Rig(made, made.engine())
    assert rig.context.infer_shapes() == ["x", "n"]
    assert rig.context.get_tensor_shape("y") == (-1, -1, WIDTH)
    assert not rig.context.execute_async_v3(rig.stream.handle)
    rig.bind(1, 3)
    assert rig.context.get_tensor_shape("y") == (1, 3, WIDTH)
    rig.context.set_device_memory(rig.block.address, 256)
    assert not rig.context.execute_async_v3(rig.stream.handle)
    assert "256 bytes were set" in made.errors()
    rig.context.set_device_memory(rig.block.address, rig.block.nbytes)
    rig.context.set_tensor_address("twice", 0)
    assert not rig.context.execute_async_v3(rig.stream.handle)
    assert "not set: twice" in made.errors()


def test_axes_of_one_name_must_agree(bench: Callable[..., Bench]) -> None:
    made = bench()
    rig = Rig(made, made.engine())
    rig.context.set_input_shape("x", (2, 3, WIDTH))
    rig.context.set_input_shape("n", (1,))
    with pytest.raises(RuntimeError, match="axis batch is 1 here and 2 elsewhere"):
        rig.context.infer_shapes()


def test_a_profile_that_changes_takes_its_shapes_along(
    play: Callable[..., StandIn], graph: Path
) -> None:
    made = Bench(play(), graph)
    made.profile(1, 1)
    made.profile(2, 4)
    rig = Rig(made, made.engine())
    rig.bind(1, 3)
    assert rig.context.set_optimization_profile_async(1, rig.stream.handle)
    assert rig.context.active_optimization_profile == 1
    assert rig.context.infer_shapes() == ["x", "n"]
    assert not rig.context.set_input_shape("x", (1, 3, WIDTH))
    sizes = [rig.engine.get_device_memory_size_for_profile_v2(index) for index in (0, 1)]
    assert sizes[0] < sizes[1] == rig.engine.device_memory_size_v2


def test_misplaced_memory_is_misuse(bench: Callable[..., Bench]) -> None:
    made = bench()
    rig = Rig(made, made.engine())
    rig.bind(2, 3)
    with pytest.raises(MisuseError, match="is not aligned to 256 bytes"):
        rig.context.set_tensor_address("y", rig.buffers["y"].address + 4)
    rig.context.set_tensor_address("y", rig.buffers["x"].address)
    with pytest.raises(MisuseError, match="x and y share memory, and one is an output"):
        rig.context.execute_async_v3(rig.stream.handle)
    with rig.cuda.allocate(16) as small:
        rig.context.set_tensor_address("y", small.address)
        with pytest.raises(MisuseError, match=r"y: 192 bytes .* run over the end of 16 bytes"):
            rig.context.execute_async_v3(rig.stream.handle)
    with pytest.raises(MisuseError, match="used after they were freed"):
        rig.context.execute_async_v3(rig.stream.handle)


def test_one_context_works_on_one_stream_at_a_time(bench: Callable[..., Bench]) -> None:
    made = bench()
    rig = Rig(made, made.engine())
    rig.bind(2, 3)
    with rig.cuda.stream() as second:
        assert rig.context.execute_async_v3(rig.stream.handle)
        with pytest.raises(MisuseError, match="enqueued on two streams at once"):
            rig.context.execute_async_v3(second.handle)
        rig.stream.synchronize()
        assert rig.context.execute_async_v3(second.handle)


def test_contexts_that_share_activations_must_not_run_at_once(bench: Callable[..., Bench]) -> None:
    made = bench()
    engine = made.engine()
    one, two = Rig(made, engine), Rig(made, engine)
    for rig in (one, two):
        rig.context.set_device_memory(one.block.address, one.block.nbytes)
        rig.bind(2, 3)
    assert one.context.execute_async_v3(one.stream.handle)
    with pytest.raises(MisuseError, match="the activations' memory while a pass on another"):
        two.context.execute_async_v3(two.stream.handle)


def test_a_context_must_outlive_its_work(bench: Callable[..., Bench]) -> None:
    made = bench()
    rig = Rig(made, made.engine())
    rig.bind(2, 3)
    assert rig.context.execute_async_v3(rig.stream.handle)
    rig.context = None
    gc.collect()
    with pytest.raises(AssertionError, match="destroyed before its work was done"):
        made.standin.check()


def test_a_context_may_bring_its_own_memory(bench: Callable[..., Bench]) -> None:
    made = bench()
    engine = made.engine()
    before = made.standin.device.memory.used
    context = engine.create_execution_context()
    assert made.standin.device.memory.used == before + engine.device_memory_size_v2
    del context
    gc.collect()
    assert made.standin.device.memory.used == before


# Building.


def test_a_build_needs_profiles_that_fit(play: Callable[..., StandIn], graph: Path) -> None:
    made = Bench(play(), graph)
    build = made.builder.build_serialized_network
    assert build(made.network, made.config) is None
    assert "no optimization profile has been defined" in made.errors()
    profile = made.builder.create_optimization_profile()
    profile.set_shape("x", (1, 1, WIDTH + 1), (1, 1, WIDTH + 1), (1, 1, WIDTH + 1))
    profile.set_shape("n", (1,), (1,), (1,))
    made.config.add_optimization_profile(profile)
    assert build(made.network, made.config) is None
    assert "does not fit" in made.errors()
    with pytest.raises(ValueError, match="inconsistent for x"):
        profile.set_shape("x", (2, 1, WIDTH), (1, 1, WIDTH), (1, 1, WIDTH))


def test_a_profile_must_give_one_size_to_an_axis(play: Callable[..., StandIn], graph: Path) -> None:
    made = Bench(play(), graph)
    profile = made.builder.create_optimization_profile()
    profile.set_shape("x", (1, 1, WIDTH), (1, 1, WIDTH), (2, 1, WIDTH))
    profile.set_shape("n", (1,), (1,), (4,))
    made.config.add_optimization_profile(profile)
    assert made.builder.build_serialized_network(made.network, made.config) is None
    assert "axis batch" in made.errors()


def test_a_parser_must_outlive_the_build(bench: Callable[..., Bench]) -> None:
    made = bench()
    del made.parser
    gc.collect()
    with pytest.raises(MisuseError, match="the parser that owns the network's weights is gone"):
        made.builder.build_serialized_network(made.network, made.config)


def test_a_graph_that_cannot_be_parsed_is_told(
    play: Callable[..., StandIn], tmp_path: Path
) -> None:
    trt: Any = play().trt
    log = trt.Logger()
    network = trt.Builder(log).create_network(0)
    parser = trt.OnnxParser(network, log)
    model = _attention()
    model.graph.node[0].op_type = "Attention"
    onnx.save(model, tmp_path / "newer.onnx")
    assert not parser.parse_from_file(str(tmp_path / "newer.onnx"))
    assert parser.get_error(0).desc() == "No importer registered for op: Attention"
    assert parser.get_error(0).node_name() == "project_q"
    assert not parser.parse_from_file(str(tmp_path / "absent.onnx"))
    assert parser.num_errors == 2


def test_precision_flags_do_not_go_with_strong_types(bench: Callable[..., Bench]) -> None:
    made = bench(api="10.3")
    made.config.set_flag(made.trt.BuilderFlag.FP16)
    assert made.builder.build_serialized_network(made.network, made.config) is None
    assert "strongly typed network" in made.errors()


def _monitor(trt: Any, seen: list[str], stop_at: int) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            seen.append(f"{parent_phase} > {phase_name}: {num_steps}")

        def step_complete(self, phase_name: str, step: int) -> bool:
            return step < stop_at

        def phase_finish(self, phase_name: str) -> None:
            seen.append(f"end of {phase_name}")

    return Monitor()


def test_a_monitor_hears_of_phases_and_may_cancel(bench: Callable[..., Bench]) -> None:
    made = bench()
    seen: list[str] = []
    made.config.progress_monitor = _monitor(made.trt, seen, 100)
    assert made.build()
    assert seen[0] == "None > Building Engine: 20"
    assert seen[-1] == "end of Building Engine"
    made.config.progress_monitor = _monitor(made.trt, [], 3)
    assert made.builder.build_serialized_network(made.network, made.config) is None
    assert "cancelled" in made.errors()


def test_subclasses_must_call_the_base_class(play: Callable[..., StandIn]) -> None:
    trt: Any = play().trt

    class Silent(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            self.lines = 0

    with pytest.raises(TypeError, match=r"ILogger\.__init__\(\) must be called"):
        trt.Builder(Silent())
    with pytest.raises(TypeError, match="is no ILogger"):
        trt.Runtime(None)


def test_attributes_that_do_not_exist_cannot_be_set(bench: Callable[..., Bench]) -> None:
    made = bench()
    with pytest.raises(AttributeError, match="max_workspace_size"):
        made.config.max_workspace_size = 1
    with pytest.raises(TypeError, match="is no BuilderFlag"):
        made.config.set_flag(3)
    with pytest.raises(TypeError):
        made.config.builder_optimization_level = 3.5
    with pytest.raises(TypeError):
        _ = 1 << made.trt.BuilderFlag.TF32


def test_timings_are_kept_for_one_device_and_version(bench: Callable[..., Bench]) -> None:
    made = bench()
    cache = made.config.create_timing_cache(b"")
    assert made.config.set_timing_cache(cache, False)
    made.build()
    data = bytes(made.config.get_timing_cache().serialize())
    assert b"Softmax" in data
    other = bench(name="Stand-in Nano")
    foreign = other.config.create_timing_cache(data)
    assert not other.config.set_timing_cache(foreign, False)
    assert other.config.set_timing_cache(foreign, True)
    assert made.config.create_timing_cache(b"rubbish") is None


def test_a_memory_that_is_too_small_ends_a_build_as_it_does(bench: Callable[..., Bench]) -> None:
    made = bench(unimplemented=True)
    assert made.builder.build_serialized_network(made.network, made.config) is None
    assert "Could not find any implementation for node" in made.errors()
    assert "out of memory" in made.errors()


# Plans and where they fit.


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"version": "10.4.0"}, "not compatible with this version of TensorRT"),
        ({"compute_capability": (8, 9)}, r"expecting compute 8.9 got compute 8.7"),
        ({"memory": 64}, "out of memory"),
    ],
)
def test_a_plan_fits_where_it_was_built(
    changed: dict[str, Any], text: str, bench: Callable[..., Bench]
) -> None:
    plan = bench().build()
    other = bench(**changed)
    assert other.trt.Runtime(other.log).deserialize_cuda_engine(plan) is None
    assert text in other.errors()


def test_a_plan_of_another_model_of_gpu_is_a_warning(bench: Callable[..., Bench]) -> None:
    plan = bench().build()
    other = bench(name="Stand-in Nano")
    assert other.trt.Runtime(other.log).deserialize_cuda_engine(plan) is not None
    assert other.log._kept[-1][0] == "WARNING"


@pytest.mark.parametrize("cut", [slice(0, 40), slice(0, -1), slice(7, None)])
def test_a_damaged_plan_is_refused(cut: slice, bench: Callable[..., Bench]) -> None:
    made = bench()
    assert made.trt.Runtime(made.log).deserialize_cuda_engine(made.build()[cut]) is None
    assert "Serialization assertion failed" in made.errors()


def test_compatible_plans_go_further(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.config.set_flag(made.trt.BuilderFlag.VERSION_COMPATIBLE)
    made.config.hardware_compatibility_level = made.trt.HardwareCompatibilityLevel.AMPERE_PLUS
    plan = made.build()
    other = bench(version="10.9.0", compute_capability=(8, 9))
    runtime = other.trt.Runtime(other.log)
    assert runtime.deserialize_cuda_engine(plan) is None
    assert "engine_host_code_allowed is not set" in other.errors()
    runtime.engine_host_code_allowed = True
    assert runtime.deserialize_cuda_engine(plan) is not None
    older = bench(version="10.2.0")
    assert older.trt.Runtime(older.log).deserialize_cuda_engine(plan) is None


def test_no_driver_is_what_it_looks_like_on_real_machines(play: Callable[..., StandIn]) -> None:
    trt: Any = play(driver=(0, 0)).trt
    for made in (trt.Builder, trt.Runtime):
        with pytest.raises(TypeError, match="factory function returned nullptr"):
            made(trt.Logger())


# What goes wrong on purpose.


def _y(made: Bench) -> NDArray[Any]:
    rig = Rig(made, made.engine())
    rig.bind(2, 3)
    rig.put(_x(2, 3))
    assert rig.context.execute_async_v3(rig.stream.handle), made.errors()
    return rig.get((2, 3, WIDTH))


def test_faulty_attention_is_mended_by_a_barrier(bench: Callable[..., Bench]) -> None:
    expected = _expected(_x(2, 3))
    wrong = _y(bench(fault=True))
    assert np.abs(wrong - expected).max() > 0.1
    np.testing.assert_allclose(np.roll(wrong, 1, axis=-1), expected, atol=1e-5)
    for names, mended in (("qk", False), ("qkv", True)):
        made = bench(fault=True)
        layers = [made.network.get_layer(index) for index in range(made.network.num_layers)]
        for layer in layers:
            if layer.name in [f"project_{name}" for name in names]:
                made.network.mark_output(layer.get_output(0))
        assert bool(np.abs(_y(made) - expected).max() < 1e-5) is mended, names


def test_stubborn_faults_stay(bench: Callable[..., Bench]) -> None:
    made = bench(stubborn=True)
    for name in "qkv":
        made.network.mark_output(made.network._tensor(name))
    assert np.abs(_y(made) - _expected(_x(2, 3))).max() > 0.1


def test_results_may_be_nan(bench: Callable[..., Bench]) -> None:
    assert np.isnan(_y(bench(nan=True))).sum() == 1


@pytest.mark.parametrize(("single", "words"), [(False, "Half"), (True, "Float")])
def test_the_inspector_tells_the_types_of_layers(
    single: bool, words: str, play: Callable[..., StandIn], tmp_path: Path
) -> None:
    onnx.save(_attention(TensorProto.FLOAT16), tmp_path / "half.onnx")
    made = Bench(play(single=single), tmp_path / "half.onnx")
    made.profile(1, 4)
    engine = made.engine()
    assert engine.get_tensor_dtype("x") == made.trt.DataType.HALF
    json_format = made.trt.LayerInformationFormat.JSON
    inspector = engine.create_engine_inspector()
    layers = json.loads(inspector.get_engine_information(json_format))["Layers"]
    softmax = next(layer for layer in layers if layer["LayerType"] == "Softmax")
    assert softmax["Inputs"][0]["Format/Datatype"] == words


def test_bfloat16_comes_and_goes_as_bits(play: Callable[..., StandIn], tmp_path: Path) -> None:
    onnx.save(_attention(TensorProto.BFLOAT16), tmp_path / "bfloat16.onnx")
    made = Bench(play(), tmp_path / "bfloat16.onnx")
    made.profile(1, 4)
    rig = Rig(made, made.engine())
    with pytest.raises(TypeError, match="Could not resolve"):
        made.trt.nptype(rig.engine.get_tensor_dtype("x"))
    made.trt.nptype = lambda trt_type: np.uint16 if trt_type.name == "BF16" else np.int32
    rig.bind(2, 3)
    x = wide(narrow(_x(2, 3)))
    rig.put(narrow(x))
    assert rig.context.execute_async_v3(rig.stream.handle), made.errors()
    y = wide(rig.get(x.shape, np.uint16))
    np.testing.assert_allclose(y, _expected(x), atol=0.1)


def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even() -> None:
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-7, -3.0e38, np.inf], np.float32)
    rounded = wide(narrow(values))
    assert rounded[:4].tolist() == [1.0, 1.0, 1 + 2**-6, 1 + 2**-7]
    np.testing.assert_allclose(rounded, values, rtol=2**-8)
    assert np.isnan(wide(narrow(np.array([np.nan], np.float32)))).all()


# API levels and child processes.


def test_names_come_and_go_with_the_level(bench: Callable[..., Bench]) -> None:
    old, new = bench(api="10.3"), bench(api="11.4")
    assert (old.trt.__version__, new.trt.__version__) == ("10.3.0", "11.4.0.106")
    assert int(old.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) == 1
    assert int(new.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) == 0
    assert hasattr(old.trt.BuilderFlag, "FP16")
    assert not hasattr(new.trt.BuilderFlag, "FP16")
    assert hasattr(old.engine(), "device_memory_size")
    assert not hasattr(new.engine(), "device_memory_size")


def test_a_child_process_meets_the_stand_ins(tmp_path: Path) -> None:
    code = (
        "import tensorrt; from mdruntime.cuda import open_cuda; "
        "print(tensorrt.__version__, tensorrt._stand_in, open_cuda().name())"
    )
    options: dict[str, Any] = {"api": "11.4", "name": "Stand-in Thor", "failures": [("f", 1, 2)]}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(**options),
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert done.stdout.split(maxsplit=2) == ["11.4.0.106", "True", "Stand-in Thor\n"]
    again = Options.from_json(Options(**options).to_json())
    assert again.failures == (("f", 1, 2),)
