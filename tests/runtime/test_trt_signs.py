"""What is read from a builder and its engine: precision, progress, memory, and its last words."""

import json
from pathlib import Path
from typing import Any

import pytest

from mdruntime.trt import memory
from mdruntime.trt.inspect import Achieved, achieved
from mdruntime.trt.memory import MIB, Memory, Need
from mdruntime.trt.progress import Phases


def layer(kind: str, *types: str, **more: Any) -> dict[str, Any]:
    tensors = [{"Name": "x", "Dimensions": [1], "Format/Datatype": name} for name in types]
    return {"Name": "a", "LayerType": kind, "Inputs": tensors, "Outputs": [], **more}


def found(*layers: Any) -> Achieved:
    return achieved(json.dumps({"Layers": list(layers), "Bindings": []}))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Half", "fp16"),
        ("Row major linear FP16 format", "fp16"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("Float", "fp32"),
        ("Row major linear FP32", "fp32"),
        ("BFloat16", "bf16"),
        ("BF16", "bf16"),
        ("Int8", "int8"),
        ("FP8", "fp8"),
    ],
)
def test_types_are_read_in_all_spellings(text: str, name: str) -> None:
    assert found(layer("gemm", text)) == Achieved({name: 1}, {name: 1})


def test_indices_and_shapes_are_no_precision() -> None:
    assert found(layer("gather", "Int32", "Int64", "Bool", "UInt8"), "a name only") == Achieved(
        {}, {}
    )


def test_a_layer_counts_as_the_widest_type_it_reads() -> None:
    mixed = layer("kgen", "Half", "Float", "Int32")
    assert found(mixed) == Achieved({"fp32": 1}, {})


def test_eight_bits_decide_whatever_is_added_to_them_unless_the_weights_are_wider() -> None:
    assert found(layer("gemm", "Int8", "Int8", "Half")).products == {"int8": 1}
    for kind, name in (("Float", "fp32"), ("Int8", "int8")):
        weights = {"Type": kind, "Count": 9}
        assert found(layer("CaskConvolution", "Int8", Weights=weights)).products == {name: 1}


def test_products_are_known_by_kind_or_tactic() -> None:
    layers = [
        layer("MatrixMultiply", "Half"),
        layer("kgen", "Half", TacticName="_gemm_mha_v2_0x1"),
        layer("fusion", "Half", TacticName="sm80_xmma_gemm_f16f16_f16f16_f16"),
        layer("kgen", "Half", TacticName="__myl_AddMul"),
        layer("Reformat", "Half"),
    ]
    assert found(*layers) == Achieved({"fp16": 5}, {"fp16": 3})


def test_an_engine_is_judged_by_most_of_its_products() -> None:
    half, single = layer("gemm", "Half"), layer("gemm", "Float")
    norms = [layer("kgen", "Float")] * 50  # in float32 on purpose
    assert found(half, half, single, *norms).failure("fp16") == ""
    text = found(half, single, single, *norms).failure("fp16")
    assert text == (
        "fp16 was asked for, but the engine has of its products of matrices 1 in fp16, 2 in fp32"
    )
    assert found(half, half).failure("bf16").endswith("2 in fp16")
    assert found(single).failure("fp32") == ""
    assert found(*norms).failure("fp16").endswith("has of its layers 50 in fp32")
    assert found(layer("kgen", "Half"), *norms).failure("fp16") == ""
    assert found().failure("fp16").endswith("has of its layers none")
    assert found(layer("gemm", "Int8"), half, half).failure("int8") == ""
    assert found(half, half).failure("int8")


def test_what_is_no_json_tells_nothing() -> None:
    assert achieved('{"Layers": ["a" "b"') == achieved("[]") == Achieved({}, {})


def test_phases_become_a_share_that_only_grows() -> None:
    phases, seen = Phases(), list[float]()
    phases.start("build", "", 4)
    seen.append(phases.step("build", 0))  # 1 of 4
    phases.start("timing", "build", 10)
    seen += [phases.step("timing", step) for step in (0, 4, 2)]  # reported out of order
    phases.finish("timing")
    seen.append(phases.step("build", 1))
    phases.start("another", "", 100)  # a root of its own takes nothing back
    seen += [phases.step("another", 0), phases.step("build", 3), phases.step("unknown", 9)]
    assert seen == pytest.approx([0.25, 0.275, 0.375, 0.375, 0.5, 0.5, 1.0, 1.0])


def test_building_is_refused_where_memory_is_short() -> None:
    needed = memory.need(weights=700 * MIB, tensors=300 * MIB)
    assert needed.device >= 2000 * MIB
    assert needed.host >= 2100 * MIB
    plenty = Memory(device=8000 * MIB, host=8000 * MIB)
    memory.require("denoiser", needed, plenty)
    for free, kind in (
        (Memory(needed.device, plenty.host), "device"),  # no room for any workspace
        (Memory(plenty.device, needed.host - 1), "host"),
        (Memory(4000 * MIB, 4000 * MIB, shared=True), "shared"),  # each by itself would fit
    ):
        with pytest.raises(MemoryError, match=rf"of {kind} memory, and \d+ MiB are free; try a"):
            memory.require("denoiser", needed, free)
    with pytest.raises(MemoryError, match="try a smaller --workspace, or --max-batch"):
        memory.require("denoiser", needed, plenty, limit=7000 * MIB)


def test_the_workspace_is_half_of_what_is_left() -> None:
    needed = Need(device=2000 * MIB, host=3000 * MIB)
    assert memory.workspace(needed, Memory(8000 * MIB, 9000 * MIB)) == 3000 * MIB
    shared = Memory(8000 * MIB, 7000 * MIB, shared=True)
    assert memory.workspace(needed, shared) == 1000 * MIB
    assert memory.workspace(needed, Memory(2000 * MIB, 9000 * MIB)) == 64 * MIB


def test_failed_allocations_are_recognised_in_a_log() -> None:
    signs = [  # as users quote them
        "Requested amount of GPU memory (2833252352 bytes) could not be allocated.",
        "UNSUPPORTED_STATE: Skipping tactic 28 due to insufficient memory on requested size of 28.",
        "[virtualMemoryBuffer.cpp::resizePhysical::154] Error Code 2: OutOfMemory (Requested ...)",
        "Try decreasing the workspace size with IBuilderConfig::setMemoryPoolLimit().",
        "CUDA error 2: out of memory",
    ]
    others = ["Could not find any implementation for node /a/MatMul.", "Memory usage: 5 MiB"]
    assert memory.out_of_memory([*others, *signs]) == signs


def test_free_host_memory_is_that_of_the_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_JETSON", tmp_path / "nv_tegra_release")
    assert memory.host_memory() == (1 << 62, False)  # nothing is known
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert memory.host_memory() == (5000 * 1024, False)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "nv_tegra_release").touch()
    assert memory.host_memory() == (5000 * 1024, True)
    (tmp_path / "memory.max").write_text("2001000\n")
    assert memory.host_memory() == (2000000, True)
