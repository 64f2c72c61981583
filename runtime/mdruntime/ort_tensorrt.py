"""ONNX Runtime's own TensorRT provider: what it needs, and what it is told.

It is a second way to TensorRT for those who have ONNX Runtime's GPU package anyway. The session of
``mdruntime.trt`` checks its plans before it uses them; this one leaves building to ONNX Runtime,
so ``mdruntime verify --provider ort-tensorrt`` is the check.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from mdruntime.bundle import Bundle
from mdruntime.cuda import Cuda, open_cuda
from mdruntime.ort_binding import Copy
from mdruntime.ort_libraries import load_required
from mdruntime.trt.profiles import BatchRange, Profile, profiles

__all__ = ["SAMPLES", "cache_folder", "device_copy", "shapes", "tensorrt_options"]

SAMPLES = 1
"""Most that run together: memory is planned for the largest shapes, whether they come or not."""


def tensorrt_options(bundle: Bundle, graph: str) -> dict[str, str]:
    """Return options of ONNX Runtime's TensorRT provider for a graph of a bundle.

    Raises:
        ProviderError: its libraries are missing or of another version, or there is no GPU.
    """
    library = load_required()
    cuda = open_cuda()
    found = profiles(bundle.manifest, graph, [BatchRange(1, SAMPLES)])
    folder = cache_folder(bundle, cuda, library, found)
    folder.mkdir(parents=True, exist_ok=True)
    half = bundle.manifest.precision
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_engine_cache_prefix": graph,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        "trt_max_workspace_size": str(cuda.memory()[0] // 2),
        "trt_fp16_enable": str(int(half == "fp16")),
        "trt_bf16_enable": str(int(half == "bf16")),
        "trt_layer_norm_fp32_fallback": "1",
        **shapes(found),
    }


def shapes(found: Iterable[Profile]) -> dict[str, str]:
    """Return the options that say which shapes an engine is for.

    One profile that spans all of them: ONNX Runtime builds several, but runs the first alone
    (microsoft/onnxruntime, pull request 31624). Its optimum is that of the last, the full pass.
    """
    every = [profile.shapes for profile in found]
    texts: dict[str, list[str]] = {"min": [], "opt": [], "max": []}
    for name, (_, optimum, _) in every[-1].items():
        smallest = tuple(map(min, zip(*(each[name][0] for each in every), strict=True)))
        largest = tuple(map(max, zip(*(each[name][2] for each in every), strict=True)))
        for kind, shape in (("min", smallest), ("opt", optimum), ("max", largest)):
            texts[kind].append(f"{name}:{'x'.join(map(str, shape))}")
    return {f"trt_profile_{kind}_shapes": ",".join(parts) for kind, parts in texts.items()}


def cache_folder(bundle: Bundle, cuda: Cuda, library: str, found: Iterable[Profile]) -> Path:
    """Return the folder of the engines of just this bundle, GPU, TensorRT and these shapes.

    ONNX Runtime compares less than that before it takes an engine from its cache.
    """
    identity = (
        bundle.manifest.digest,
        library,
        cuda.name(),
        cuda.compute_capability(),
        cuda.runtime_version,
        sorted(shapes(found).items()),
    )
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    return bundle.folder / "engines" / f"ort-{key}"


def device_copy() -> Copy:
    """Return a function that copies device memory and waits until it is done.

    Raises:
        ProviderError: no GPU.
    """
    cuda = open_cuda()
    stream = cuda.stream()

    def copy(target: int, source: int, nbytes: int) -> None:
        cuda.copy(target, source, nbytes, stream)
        stream.synchronize()

    return copy
