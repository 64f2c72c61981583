"""The enumerations of TensorRT that the stand-in offers, with their numbers at each API level."""

import enum
from typing import Any

__all__ = ["enumerations"]

# Read from the bindings of 10.3.0 and 11.4.0.106; test_real_surface.py compares them again.
_BOTH = {
    "EngineCapability": "STANDARD=0 SAFETY=1 DLA_STANDALONE=2",
    "ErrorCode": "SUCCESS=0 INTERNAL_ERROR=1 MEM_ALLOC_FAILED=2 MODEL_DESERIALIZE_FAILED=3 "
    "INVALID_VALUE=4 INVALID_GRAPH=5 INVALID_NODE=6 UNSUPPORTED_GRAPH=7 UNSUPPORTED_NODE=8",
    "ExecutionContextAllocationStrategy": "STATIC=0 ON_PROFILE_CHANGE=1 USER_MANAGED=2",
    "LayerInformationFormat": "ONELINE=0 JSON=1",
    "LayerType": "CAST=1 ACTIVATION=2 CONVOLUTION=0 SOFTMAX=6 CONCATENATION=8 ELEMENTWISE=9 "
    "UNARY=11 PADDING=12 SHUFFLE=13 REDUCE=14 TOPK=15 GATHER=16 MATRIX_MULTIPLY=17 CONSTANT=19 "
    "IDENTITY=20 SLICE=22 SHAPE=23 RESIZE=25 SELECT=30 FILL=31 QUANTIZE=32 DEQUANTIZE=33 "
    "SCATTER=37 NORMALIZATION=45",
    "MemoryPoolType": "WORKSPACE=0 DLA_MANAGED_SRAM=1 DLA_LOCAL_DRAM=2 DLA_GLOBAL_DRAM=3 "
    "TACTIC_DRAM=4 TACTIC_SHARED_MEMORY=5",
    "ProfilingVerbosity": "LAYER_NAMES_ONLY=0 NONE=1 DETAILED=2",
    "TensorFormat": "LINEAR=0 CHW2=1 HWC8=2 CHW4=3",
    "TensorIOMode": "NONE=0 INPUT=1 OUTPUT=2",
    "TensorLocation": "DEVICE=0 HOST=1",
}
_DATA_TYPES = "FLOAT=0 HALF=1 INT8=2 INT32=3 BOOL=4 UINT8=5 FP8=6 BF16=7 INT64=8 INT4=9"
_LEVELS = {
    "10.3": {
        "BuilderFlag": "FP16=0 INT8=1 DEBUG=2 GPU_FALLBACK=3 REFIT=4 DISABLE_TIMING_CACHE=5 TF32=6 "
        "SPARSE_WEIGHTS=7 OBEY_PRECISION_CONSTRAINTS=9 PREFER_PRECISION_CONSTRAINTS=10 "
        "DIRECT_IO=11 VERSION_COMPATIBLE=13 EXCLUDE_LEAN_RUNTIME=14 FP8=15 "
        "ERROR_ON_TIMING_CACHE_MISS=16 BF16=17 DISABLE_COMPILATION_CACHE=18 STRIP_PLAN=19",
        "DataType": _DATA_TYPES,
        "HardwareCompatibilityLevel": "NONE=0 AMPERE_PLUS=1",
        "NetworkDefinitionCreationFlag": "EXPLICIT_BATCH=0 STRONGLY_TYPED=1",
        "PreviewFeature": "PROFILE_SHARING_0806=0 ALIASED_PLUGIN_IO_10_03=1",
    },
    "11.4": {
        "BuilderFlag": "DEBUG=2 GPU_FALLBACK=3 REFIT=4 DISABLE_TIMING_CACHE=5 TF32=6 "
        "SPARSE_WEIGHTS=7 DIRECT_IO=11 VERSION_COMPATIBLE=12 EXCLUDE_LEAN_RUNTIME=13 "
        "ERROR_ON_TIMING_CACHE_MISS=15 DISABLE_COMPILATION_CACHE=17 STRIP_PLAN=18 STRICT_NANS=23 "
        "MONITOR_MEMORY=24 EDITABLE_TIMING_CACHE=26",
        "DataType": f"{_DATA_TYPES} FP4=10 E8M0=11",
        "HardwareCompatibilityLevel": "NONE=0 AMPERE_PLUS=1 SAME_COMPUTE_CAPABILITY=2",
        "NetworkDefinitionCreationFlag": "STRONGLY_TYPED=0 PREFER_JIT_PYTHON_PLUGINS=1 "
        "PREFER_AOT_PYTHON_PLUGINS=2",
        "PreviewFeature": "ALIASED_PLUGIN_IO_10_03=0 RUNTIME_ACTIVATION_RESIZE_10_10=1",
    },
}
SEVERITY = "INTERNAL_ERROR=0 ERROR=1 WARNING=2 INFO=3 VERBOSE=4"


class _Member(enum.Enum):
    """Like pybind11's: an int can be made of a member, but a member equals no int."""

    def __int__(self) -> int:
        return int(self.value)

    def __index__(self) -> int:
        return int(self.value)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}.{self.name}: {self.value}>"


def enumerations(level: str) -> dict[str, Any]:
    """Return the enumerations of an API level by name."""
    return {name: make(name, text) for name, text in {**_BOTH, **_LEVELS[level]}.items()}


def make(name: str, text: str) -> Any:
    """Return an enumeration from ``NAME=number`` words."""
    pairs = (word.split("=") for word in text.split())
    functional: Any = _Member
    return functional(name, [(member, int(number)) for member, number in pairs], module="tensorrt")
