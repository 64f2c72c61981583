"""What this machine offers, what is wrong with it, and the command that mends it."""

import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path

from mdruntime.doctor_gpu import examine_gpu
from mdruntime.errors import ProviderError
from mdruntime.findings import Finding, installed
from mdruntime.ort import available_threads, import_onnxruntime

__all__ = ["Finding", "examine"]

_OPTIONAL = {
    "pillow": "image files",
    "tokenizers": "texts and prompts",
    "huggingface_hub": "checkpoints named hub:..., on the workstation",
}
_LAST_ONNXRUNTIME = {(3, 10): "1.23"}  # whose wheels there are for this Python


def examine(root: Path = Path("/")) -> Iterator[Finding]:
    """Yield findings about this machine.

    Args:
        root: folder taken for the root of the file system.
    """
    yield Finding("system", f"{platform.system()} {platform.machine()}")
    yield Finding("python", f"{platform.python_version()} ({sys.executable})")
    yield Finding("numpy", version("numpy"))
    yield Finding("cpu threads", f"{available_threads()} usable of {os.cpu_count()}")
    yield _memory()
    gpu = list(examine_gpu(root))
    yield from gpu
    # Engines run without ONNX Runtime.
    yield from _onnxruntime(needed=not any(_is_tensorrt(finding) for finding in gpu))
    for package, use in _OPTIONAL.items():
        yield _optional(package, use)


def _memory() -> Finding:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Finding("memory", f"{available / 2**30:.1f} GiB free of {total / 2**30:.1f} GiB")


def _is_tensorrt(finding: Finding) -> bool:
    return finding.name == "tensorrt module" and finding.value != "none" and not finding.cure


def _onnxruntime(*, needed: bool) -> Iterator[Finding]:
    packages = sorted(set(packages_distributions().get("onnxruntime", [])))
    if len(packages) > 1:
        yield Finding(
            "packages",
            f"{' and '.join(packages)} are both installed and overwrite each other",
            f"python -m pip uninstall -y {' '.join(packages)}, then install one of them",
        )
    try:
        runtime = import_onnxruntime()
    except ProviderError as error:
        last = _LAST_ONNXRUNTIME.get(sys.version_info[:2])
        cure = f"python -m pip install 'onnxruntime=={last}.*'" if last else ""
        cure = cure or "python -m pip install onnxruntime"
        yield Finding("onnxruntime", str(error), cure, fatal=needed)
        return
    yield Finding("onnxruntime", runtime.__version__)
    # What a wheel was built with, not what works here: a session tells, and is made to tell.
    yield Finding("providers built in", ", ".join(runtime.get_available_providers()))


def _optional(package: str, use: str) -> Finding:
    found = installed(package)
    if found:
        return Finding(package, found)
    return Finding(package, f"missing: needed for {use}", f"python -m pip install {package}")
