"""The names that the code and the stand-ins touch, in NVIDIA's real bindings and real libcudart.

The bindings' wheels and CUDA's runtime wheels are downloaded into a scratch folder. TensorRT's own
libraries cannot be: empty ones in their place let the real module be imported, so that its names,
enumerations and signatures can be read. Nothing is built or run, and no GPU is used.
"""

import ast
import builtins
import collections
import contextlib
import datetime
import functools
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import types
import zipfile
from collections.abc import Callable, Mapping
from ctypes import POINTER, c_float, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdruntime import cuda, cuda_resources, cudart
from tests.standin.cudart import StandInCudart
from tests.standin.errors import Cuda as CudaCode
from tests.standin.options import LEVELS, Options
from tests.standin.surface import Use, accepts, defined_in, signatures, uses

ROOT = Path(__file__).parents[2]
CODE = ROOT / "runtime" / "mdruntime"
TENSORRT = sorted((CODE / "trt").glob("*.py"))

BINDINGS = {
    "10.3.0": "tensorrt-cu12-bindings==10.3.0",
    "10.16.1.11": "tensorrt-cu12-bindings==10.16.1.11",
    "11.4.0.106": "tensorrt-cu13-bindings==11.4.0.106",
}
RUNTIMES = {
    (12, 6): "nvidia-cuda-runtime-cu12==12.6.77",
    (13, 0): "nvidia-cuda-runtime==13.0.96",
}
# The entry points that the bindings take from the three libraries that are not there.
ENTRY_POINTS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")

# What objects of TensorRT are called in the code: what a syntax tree cannot tell.
CALLED = {
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "error": "ParserError",
    "inspector": "EngineInspector",
    "layer": "ILayer",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "runtime": "Runtime",
    "softmax": "ILayer",
    "tensor": "ITensor",
}
# Used through getattr, subclasses or buffers, where no attribute is written out.
HIDDEN = {
    "IHostMemory": ("nbytes",),
    "ILogger": ("log", "Severity"),
    "IOptimizationProfile": ("set_shape",),
    "IProgressMonitor": ("phase_start", "step_complete", "phase_finish"),
}
PYTHON: tuple[Any, ...] = (
    *(value for value in vars(builtins).values() if isinstance(value, type)),
    collections.Counter,
    collections.OrderedDict,
    contextlib.ExitStack,
    datetime.datetime,
    functools.partial,
    hashlib.sha256(),
    io.TextIOWrapper,
    np,
    np.ndarray,
    np.dtype,
    os.stat_result,
    Path,
    re.Match,
    re.Pattern,
    subprocess.CompletedProcess([], 0),
    threading.Event,
    threading.Lock(),
    threading.Thread,
    types.ModuleType,
    types.TracebackType,
)
POPEN = {"args", "kill", "pid", "poll", "returncode", "stderr", "stdin", "stdout", "wait"}


@functools.cache
def _attempt(specification: str, folder: Path) -> str:
    """Download a wheel and unpack it; return why that cannot be done, or nothing."""
    folder.mkdir()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
            *("--disable-pip-version-check", "--retries=1", "--timeout=15", "--quiet"),
            *("--dest", str(folder), specification),
        ],
        capture_output=True,
        text=True,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        return (done.stderr.strip().splitlines() or ["there is no wheel"])[-1]
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder)
    return ""


def _download(specification: str, folder: Path) -> Path:
    """Return the folder of an unpacked wheel; skip where it cannot be had."""
    reason = _attempt(specification, folder)
    if reason:
        pytest.skip(f"{specification} cannot be downloaded: {reason}")
    return folder


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nvidia")


@pytest.fixture(scope="module")
def surface(scratch: Path) -> Callable[[str], Any]:
    """A function from a version to what its real bindings offer, each read in its own process."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is missing: it compiles the empty libraries that the bindings link")

    @functools.cache
    def read(version: str) -> Any:
        folder = _download(BINDINGS[version], scratch / version)
        source = folder / "empty.c"
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in ENTRY_POINTS))
        for library in LIBRARIES:
            name = f"{library}.so.{version.split('.')[0]}"
            subprocess.run(
                [
                    *("gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}"),
                    *("-o", str(folder / name), str(source)),
                ],
                check=True,
            )
        done = subprocess.run(
            [sys.executable, ROOT / "tests" / "standin" / "surface.py", folder],
            env={**os.environ, "LD_LIBRARY_PATH": str(folder)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["version"] == version
        return found

    return read


# (a) What mdruntime touches exists, and can be called as it is called.


def _ours() -> set[str]:
    """Return the names that are ours or Python's own."""
    ours = defined_in(sorted(CODE.rglob("*.py"))) | POPEN
    return ours.union(*map(dir, PYTHON))


def _module_path(use: Use) -> tuple[str, ...]:
    """Return the path from the module on where a use begins there, or nothing."""
    for place, name in enumerate(use.path):
        if name in ("trt", "_trt"):
            return use.path[place + 1 :]
    return ()


def _problem(use: Use, real: Any, ours: set[str]) -> str:
    """Return what is wrong with a use under some bindings, or nothing."""
    path = _module_path(use)
    if path:
        return _path_problem(path, use, real)
    name, receiver = use.path[-1], use.path[-2].lstrip("_")
    owners = [cls for cls, members in real["classes"].items() if name in members]
    if name in ours:  # it may be either: then nothing is known
        return ""
    if not owners:
        return "" if use.optional else "no class of the bindings has it"
    cls = CALLED.get(receiver)
    if cls is not None and cls not in owners:
        return f"{cls} does not have it, but {', '.join(owners)}"
    return _call_problem(use, [real["classes"][one][name] for one in owners], name)


def _path_problem(path: tuple[str, ...], use: Use, real: Any) -> str:
    first, rest = path[0], path[1:]
    if first == "ILogger" and rest[:1] == ("Severity",):
        first, rest = "Severity", rest[1:]
    if first in real["enums"]:
        known = not rest or rest[0] in real["enums"][first] or rest[0] == "__members__"
        return "" if known else f"{first} has no {rest[0]}"
    if first in real["classes"]:
        if not rest and use.call:
            return _call_problem(use, [real["classes"][first]["__init__"]], "__init__")
        return "" if not rest or rest[0] in real["classes"][first] else f"no {rest[0]}"
    return "" if first in real["functions"] or use.optional else "the module does not have it"


def _call_problem(use: Use, docs: list[str], name: str) -> str:
    overloads = [one for doc in docs for one in signatures(doc, name)]
    if use.call is None or not overloads or any(accepts(one, *use.call) for one in overloads):
        return ""
    return f"called with {use.call}, takes {overloads}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


@pytest.mark.parametrize("version", BINDINGS)
def test_what_the_code_touches_exists(version: str, surface: Callable[[str], Any]) -> None:
    real, ours = surface(version), _ours()
    touched = [use for use in uses(TENSORRT) if use.reached_by(_numbers(version))]
    wrong = [(use.where, ".".join(use.path), _problem(use, real, ours)) for use in touched]
    assert [one for one in wrong if one[2]] == []
    for cls, names in HIDDEN.items():
        assert set(names) <= set(real["classes"][cls])


def test_the_names_are_found_by_themselves() -> None:
    names = {use.path[-1] for use in uses(TENSORRT)}
    assert {
        "STRONGLY_TYPED",
        "build_serialized_network",
        "deserialize_cuda_engine",
        "execute_async_v3",
        "get_engine_information",
        "set_device_memory",
        "set_input_shape",
        "set_optimization_profile_async",
        "set_tensor_address",
    } <= names


WRONG = """
def work(trt, engine, context, version):
    context.execute_async_v9(1)
    context.set_input_shape("x")
    engine.execute_async_v3(1)
    trt.BuilderFlag.FP17
    trt.Builder()
    if version(trt) < (11,):
        trt.BuilderFlag.FP16
    else:
        engine.device_memory_size_v2
    if hasattr(engine, "later"):
        engine.later
    kinds = trt.LayerType
    kinds.ATTENTION
"""


@pytest.mark.parametrize("version", ["10.3.0", "11.4.0.106"])
def test_a_wrong_name_would_be_found(
    version: str, tmp_path: Path, surface: Callable[[str], Any]
) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    real, ours = surface(version), _ours()
    found = {
        use.path[-1]: _problem(use, real, ours)
        for use in uses([tmp_path / "wrong.py"])
        if use.reached_by(_numbers(version))
    }
    wrong = {name for name, problem in found.items() if problem}
    assert wrong == {
        "execute_async_v9",
        "set_input_shape",
        "execute_async_v3",
        "FP17",
        "Builder",
        "ATTENTION",
    }
    assert ("FP16" in found) is (version == "10.3.0")


# (b) The functions of libcudart, in the real library and its header.

C_TYPES: Mapping[str, Any] = {
    "int": c_int,
    "unsigned int": c_uint,
    "unsigned long long": c_ulonglong,
    "size_t": c_size_t,
    "cudaError_t": c_int,
    "cudaStream_t": c_void_p,
    "cudaEvent_t": c_void_p,
    "cudaGraph_t": c_void_p,
    "cudaGraphExec_t": c_void_p,
    "void *": c_void_p,
    "struct cudaDeviceProp *": c_void_p,
    "void **": POINTER(c_void_p),
    "cudaStream_t *": POINTER(c_void_p),
    "cudaEvent_t *": POINTER(c_void_p),
    "cudaGraph_t *": POINTER(c_void_p),
    "cudaGraphExec_t *": POINTER(c_void_p),
    "int *": POINTER(c_int),
    "size_t *": POINTER(c_size_t),
    "float *": POINTER(c_float),
}
# Numbers of the header that the code writes out.
NUMBERS = {
    "cudaMemcpyHostToDevice": cuda._HOST_TO_DEVICE,
    "cudaMemcpyDeviceToHost": cuda._DEVICE_TO_HOST,
    "cudaMemcpyDeviceToDevice": cuda._DEVICE_TO_DEVICE,
    "cudaStreamCaptureModeThreadLocal": cuda._THREAD_LOCAL,
    "cudaDevAttrComputeCapabilityMajor": cuda._CC_MAJOR,
    "cudaDevAttrComputeCapabilityMinor": cuda._CC_MINOR,
    "cudaStreamNonBlocking": cuda_resources._NON_BLOCKING,
    "cudaErrorMemoryAllocation": cudart.OUT_OF_MEMORY,
    "cudaErrorInsufficientDriver": cudart.INSUFFICIENT_DRIVER,
    "cudaErrorNoDevice": cudart.NO_DEVICE,
    **{code.label: int(code) for code in CudaCode},
}
CURES = {  # of what each cure is
    3: "cudaErrorInitializationError",
    34: "cudaErrorStubLibrary",
    35: "cudaErrorInsufficientDriver",
    46: "cudaErrorDevicesUnavailable",
    100: "cudaErrorNoDevice",
    700: "cudaErrorIllegalAddress",
    716: "cudaErrorMisalignedAddress",
    719: "cudaErrorLaunchFailure",
    803: "cudaErrorSystemDriverMismatch",
    804: "cudaErrorCompatNotSupportedOnDevice",
}


@pytest.fixture(scope="module")
def installed(scratch: Path) -> Callable[[tuple[int, int]], Path]:
    """A function from a version to the folder of CUDA's real runtime."""
    return functools.cache(
        lambda version: _download(RUNTIMES[version], scratch / f"cuda{version[0]}")
    )


def _header(folder: Path, name: str) -> str:
    text = next(folder.rglob(f"include/{name}")).read_text("utf-8")
    return re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)


def _prototype(header: str, name: str) -> tuple[Any, tuple[Any, ...]]:
    found = re.search(rf"extern\s+([^;]*?)\bCUDARTAPI\s+{name}\(([^;]*)\);", header)
    assert found is not None, f"the header does not declare {name}"
    parts = [part for part in found[2].replace("__dv(0)", "").split(",") if part.strip() != "void"]
    result = "text" if re.search(r"const\s+char\s*\*", found[1]) else "code"
    return result, tuple(_c_type(part) for part in parts)


def _c_type(declaration: str) -> Any:
    words = re.sub(r"\bconst\b|\w+\s*$", "", declaration.strip()).strip()
    words = re.sub(r"\s*(\*+)", r" \1", " ".join(words.split()))
    return c_int if words.startswith("enum ") else C_TYPES[words]


@pytest.mark.parametrize("version", RUNTIMES)
def test_functions_are_declared_as_the_header_does(
    version: tuple[int, int], installed: Callable[[tuple[int, int]], Path]
) -> None:
    header = _header(installed(version), "cuda_runtime_api.h")
    for name, argtypes in cudart.SIGNATURES.items():
        result, parameters = _prototype(header, name)
        assert parameters == argtypes, name
        assert result == ("text" if name in cudart.TEXTS else "code"), name


@pytest.mark.parametrize("version", RUNTIMES)
def test_numbers_are_those_of_the_header(
    version: tuple[int, int], installed: Callable[[tuple[int, int]], Path]
) -> None:
    types_header = _header(installed(version), "driver_types.h")
    pairs = re.findall(r"\b(cuda\w+)\s*=\s*(0x[0-9a-fA-F]+|\d+)", types_header)
    pairs += re.findall(r"#define\s+(cuda\w+)\s+(0x[0-9a-fA-F]+|\d+)", types_header)
    real = {name: int(number, 0) for name, number in pairs}
    assert {name: real.get(name) for name in NUMBERS} == NUMBERS
    assert {real[label]: label for label in CURES.values()} == CURES
    assert set(CURES) == set(cudart._CURES)
    struct = re.search(r"struct [^;{]*cudaDeviceProp\s*\{\s*([^;]*);", types_header)
    assert struct is not None
    assert struct[1].split() == ["char", f"name[{cuda._NAME_BYTES}]"]


ASK = """
import ctypes, sys
from mdruntime.cuda import Cuda
from mdruntime.cudart import SIGNATURES, TEXTS
library = ctypes.CDLL(sys.argv[1])
cuda = Cuda(library)
print(cuda.runtime_version, cuda.driver_version, sep="|")
try:
    print("devices", cuda.devices())
except Exception as error:
    print(type(error).__name__, error.code, error.name, error, sep="|")
    for call in (cuda.name, cuda.compute_capability, cuda.memory, cuda.stream, cuda.event):
        try:
            call()
            print("no error")
        except Exception as error:
            print(type(error).__name__)
"""


@pytest.mark.parametrize("version", RUNTIMES)
def test_the_real_library_answers_and_its_errors_are_explained(
    version: tuple[int, int], installed: Callable[[tuple[int, int]], Path]
) -> None:
    library = next(installed(version).rglob("libcudart.so.*"))
    done = subprocess.run(
        [sys.executable, "-c", ASK, library],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(CODE.parent)},
    )
    assert done.returncode == 0, done.stderr
    versions, answer, *rest = done.stdout.splitlines()
    mine, driver = map(ast.literal_eval, versions.split("|"))
    assert mine == version
    if answer.startswith("devices"):
        pytest.skip(f"there is a driver of CUDA {driver} here, so that nothing fails")
    kind, code, name, text = answer.split("|")
    assert kind == "CudaError"
    assert (int(code), name) in {(35, "cudaErrorInsufficientDriver"), (100, "cudaErrorNoDevice")}
    assert cudart._CURES[int(code)] in text
    if driver == (0, 0):
        assert "no driver is loaded" in text
    assert rest == ["CudaError"] * 5


@pytest.mark.parametrize("version", RUNTIMES)
def test_the_stand_in_names_errors_as_the_real_library_does(
    version: tuple[int, int], installed: Callable[[tuple[int, int]], Path]
) -> None:
    library = next(installed(version).rglob("libcudart.so.*"))
    code = (
        "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); "
        "library.cudaGetErrorName.restype = ctypes.c_char_p; "
        "print(*(library.cudaGetErrorName(int(c)).decode() for c in sys.argv[2:]))"
    )
    codes = [str(int(one)) for one in CudaCode]
    command = [sys.executable, "-c", code, str(library), *codes]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert names == [one.label for one in CudaCode]


# (c) What the stand-ins offer exists in the real bindings of their level.


def _stand_in(level: str) -> Any:
    pytest.importorskip("onnxruntime")
    from tests.standin.trt_module import make_module

    options = Options(api=level)
    return make_module(StandInCudart(options), options)


def _own(cls: type) -> dict[str, Any]:
    """Return the public members of a class of the stand-in, without Python's own."""
    inherited = set(dir(bytearray)) if issubclass(cls, bytearray) else set(dir(object))
    names = [name for name in dir(cls) if not name.startswith("_") and name not in inherited]
    return {name: getattr(cls, name) for name in names if hasattr(cls, name)}


@pytest.mark.parametrize("level", LEVELS)
def test_the_stand_in_offers_nothing_that_its_level_lacks(
    level: str, surface: Callable[[str], Any]
) -> None:
    from tests.standin.trt_module import CLASSES, PLAIN

    real, module = surface(LEVELS[level]), _stand_in(level)
    assert module.__version__ == real["version"]
    for cls in (*CLASSES, *PLAIN):
        own = _own(getattr(module, cls.__name__))
        missing = set(own) - set(real["classes"][cls.__name__])
        assert not missing, f"{cls.__name__} has {missing}"
        for name, member in own.items():
            doc = real["classes"][cls.__name__][name]
            assert callable(member) or not signatures(doc, name), f"{name} is a method"
            if isinstance(member, types.FunctionType) and doc:
                mine = list(member.__code__.co_varnames[1 : member.__code__.co_argcount])
                reals = [[one.rstrip("=") for one in some] for some in signatures(doc, name)]
                assert mine in reals, f"{cls.__name__}.{name}{mine}, real: {reals}"
    public = {name for name in vars(module) if not name.startswith("_")}
    assert public <= {*real["classes"], *real["enums"], *real["functions"]}


@pytest.mark.parametrize("level", LEVELS)
def test_enumerations_have_the_real_numbers(level: str, surface: Callable[[str], Any]) -> None:
    from tests.standin.trt_enums import enumerations

    real, module = surface(LEVELS[level]), _stand_in(level)
    for name in [*enumerations(level), "Severity"]:
        enumeration = getattr(module, name, module.ILogger.Severity)
        for member in enumeration:
            assert real["enums"][name].get(member.name) == int(member), f"{name}.{member.name}"
    # Members that the stand-in has must not be fewer where a level removed some.
    assert set(real["enums"]["NetworkDefinitionCreationFlag"]) == {
        member.name for member in module.NetworkDefinitionCreationFlag
    }


@pytest.mark.parametrize("level", LEVELS)
def test_what_the_stand_in_calls_absent_is_absent(
    level: str, surface: Callable[[str], Any]
) -> None:
    from tests.standin.trt_module import ABSENT

    real = surface(LEVELS[level])
    for path in ABSENT[level]:
        cls, name = path.split(".")
        assert name not in real["classes"][cls], path
