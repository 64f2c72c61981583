"""The stand-in for the module ``tensorrt``, at one API level."""

import math
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np

from tests.standin.library import StandInLibrary
from tests.standin.options import Options
from tests.standin.trt_api import (
    Absent,
    Dims,
    IHostMemory,
    ILogger,
    IProgressMonitor,
    Logger,
    State,
)
from tests.standin.trt_build import Builder
from tests.standin.trt_config import IBuilderConfig, IOptimizationProfile, ITimingCache
from tests.standin.trt_context import IExecutionContext
from tests.standin.trt_engine import ICudaEngine, numpy_type
from tests.standin.trt_enums import enumerations
from tests.standin.trt_inspector import EngineInspector
from tests.standin.trt_network import ILayer, INetworkDefinition, ITensor
from tests.standin.trt_parser import OnnxParser, ParserError
from tests.standin.trt_runtime import Runtime

__all__ = ["ABSENT", "CLASSES", "PLAIN", "make_module"]

CLASSES: tuple[type, ...] = (
    Builder,
    EngineInspector,
    IBuilderConfig,
    ICudaEngine,
    IExecutionContext,
    ILayer,
    INetworkDefinition,
    IOptimizationProfile,
    ITensor,
    ITimingCache,
    OnnxParser,
    ParserError,
    Runtime,
)
PLAIN: tuple[type, ...] = (Dims, IHostMemory, ILogger, IProgressMonitor, Logger)

# What came after 10.3, and what 11 removed.
ABSENT = {
    "10.3": ("IBuilderConfig.max_num_tactics",),
    "11.4": (
        "ICudaEngine.device_memory_size",
        "ICudaEngine.get_device_memory_size_for_profile",
    ),
}


def make_module(library: StandInLibrary, options: Options) -> ModuleType:
    """Return a stand-in for ``tensorrt`` that works on the device of a stand-in for libcudart."""
    state = State(library, options)
    module: Any = ModuleType("tensorrt", "A stand-in for TensorRT: not the real one.")
    state.module = module
    module.__version__ = options.tensorrt
    module._stand_in = True
    for cls in PLAIN:
        setattr(module, cls.__name__, cls)
    for cls in CLASSES:
        missing = {name: Absent() for name in _missing(cls, options.api)}
        setattr(module, cls.__name__, type(cls.__name__, (cls,), {"_state": state, **missing}))
    for name, enumeration in enumerations(options.api).items():
        setattr(module, name, enumeration)
    module.nptype = _nptype
    module.volume = _volume
    types: tuple[ModuleType, ...] = (module,)
    return types[0]


def _missing(cls: type, level: str) -> list[str]:
    paths = (path.split(".") for path in ABSENT[level])
    return [name for owner, name in paths if owner == cls.__name__]


def _nptype(trt_type: Any) -> Any:
    if trt_type.name == "BF16":
        raise TypeError(
            f"Could not resolve TensorRT datatype to an equivalent numpy type: {trt_type}"
        )
    return np.dtype(numpy_type(trt_type.name)).type


def _volume(iterable: Iterable[int]) -> int:
    return math.prod(iterable)
