"""What a TensorRT engine belongs to: one machine, one bundle, and the choices it was built with.

TensorRT itself mostly notices a foreign plan, in words about serialisation or after a crash. Here
all that matters is written beside the plans and compared before they are deserialised.
"""

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any

from mdruntime.bundle import Bundle
from mdruntime.cuda import Cuda
from mdruntime.errors import SamplingError
from mdruntime.records import to_json
from mdruntime.trt.profiles import BatchRange, profiles

__all__ = [
    "INT8",
    "SPELLING",
    "BuildOptions",
    "EngineIdentity",
    "Version",
    "current",
    "spelling_of",
]

SPELLING = "tensorrt"
INT8 = "tensorrt-int8"
"""Spellings of a graph in the manifest: what the plans of a graph are built from."""

_LEVELS = range(6)
_AMPERE = (8, 0)
_MOST = 4096  # samples of a batch
_HASH = 12  # hexadecimal digits of a key

Version = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """The choices of whoever builds engines."""

    max_batch: int = 1
    """Largest batch; batches of one keep profiles of their own."""
    int8: bool = False
    """Build the denoiser's int8 spelling, and use it if it is faster here and exact enough."""
    version_compatible: bool = False
    """Let newer TensorRT versions load the plans."""
    hardware_compatible: bool = False
    """Let other GPUs load the plans: those of compute capability 8.0 and newer."""
    optimisation_level: int = 3
    """From 0, quick to build, to 5, where all tactics are tried."""

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if not 1 <= self.max_batch <= _MOST:
            raise SamplingError(f"max_batch must be between 1 and {_MOST}, got {self.max_batch}")
        if self.optimisation_level not in _LEVELS:
            raise SamplingError(
                f"optimisation_level must be between 0 and {_LEVELS[-1]}, "
                f"got {self.optimisation_level}"
            )

    @property
    def ranges(self) -> tuple[BatchRange, ...]:
        """The batch ranges that get profiles of their own."""
        alone = (BatchRange(1, 1),)
        return alone if self.max_batch == 1 else (*alone, BatchRange(2, self.max_batch))

    @property
    def flags(self) -> list[str]:
        """The command line's flags for these choices."""
        found = []
        for field in fields(self):
            value, flag = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            if value != field.default:
                found += [flag] if value is True else [flag, str(value)]
        return found


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """All that must be the same where plans are built and where they are used."""

    tensorrt: str
    compute_capability: str  # such as 8.7
    gpu: str  # name and memory: boards of one name come in several sizes
    cuda: str  # version of the runtime library
    os: str  # system and machine
    bundle: str  # digest of its manifest
    graphs: str  # SHA-256 of the graphs and weights that are built
    profiles: str  # SHA-256 of the shapes that are built for
    precision: str
    version_compatible: bool
    hardware_compatible: bool
    optimisation_level: int

    @property
    def key(self) -> str:
        """Name of the engines' folder: some words for people, and a hash of everything."""
        digits = _sha256(to_json(self))[:_HASH]
        capability = self.compute_capability.replace(".", "")
        return f"trt{self.tensorrt}-sm{capability}-{self.precision}-{digits}"

    @property
    def is_ampere(self) -> bool:
        """Whether the GPU is of the Ampere generation or a newer one."""
        return _version(self.compute_capability) >= _AMPERE

    def chosen(self, bundle: Bundle, options: BuildOptions) -> "EngineIdentity":
        """Return the identity that engines of these choices have on this machine."""
        return replace(self, **_choices(bundle, options))

    def differences(self, here: "EngineIdentity") -> list[tuple[str, Any, Any]]:
        """Return fields of engines that do not fit here: name, what they have, what is here.

        The flags allow what NVIDIA documents for them (TensorRT documentation, "Engine
        Compatibility"): version-compatible plans run in the TensorRT they were built with and in
        newer ones, from 10 to 11 too; hardware-compatible ones on all GPUs of compute capability
        8.0 (Ampere) and newer. Nothing is documented about CUDA, so that it has to be the same.
        """
        pairs = {f.name: (getattr(self, f.name), getattr(here, f.name)) for f in fields(self)}
        return [
            (name, *pair)
            for name, pair in pairs.items()
            if pair[0] != pair[1] and not self._allows(name, here)
        ]

    def _allows(self, name: str, here: "EngineIdentity") -> bool:
        if name == "tensorrt" and self.version_compatible:
            return _version(here.tensorrt) >= _version(self.tensorrt)
        if name in ("gpu", "compute_capability") and self.hardware_compatible:
            return self.is_ampere and here.is_ampere
        return False


def current(
    bundle: Bundle, cuda: Cuda, trt: ModuleType, options: BuildOptions | None = None
) -> EngineIdentity:
    """Return the identity that engines of a bundle would have if they were built here and now.

    Args:
        bundle: an opened bundle.
        cuda: the device.
        trt: TensorRT's module.
        options: the choices; whoever only looks for engines need not know them.
    """
    memory = cuda.memory()[1] / 2**30
    return EngineIdentity(
        tensorrt=str(trt.__version__),
        compute_capability=".".join(map(str, cuda.compute_capability())),
        gpu=f"{cuda.name()}, {memory:.0f} GiB",
        cuda=".".join(map(str, cuda.runtime_version)),
        os=f"{platform.system()} {platform.machine()}",
        bundle=bundle.manifest.digest,
        **_choices(bundle, options or BuildOptions()),
    )


def spelling_of(graph: str, options: BuildOptions) -> str:
    """Return which spelling of a graph is built."""
    return INT8 if options.int8 and graph == "denoiser" else SPELLING


def _choices(bundle: Bundle, options: BuildOptions) -> dict[str, Any]:
    """Return the fields that do not depend on the machine but on what was asked for."""
    manifest = bundle.manifest
    shapes = {name: profiles(manifest, name, options.ranges) for name in manifest.engines}
    return {
        "graphs": _sha256(_files(bundle, options)),
        "profiles": _sha256(to_json(shapes)),
        "precision": "int8" if options.int8 else manifest.precision,
        "version_compatible": options.version_compatible,
        "hardware_compatible": options.hardware_compatible,
        "optimisation_level": options.optimisation_level,
    }


def _files(bundle: Bundle, options: BuildOptions) -> Sequence[tuple[str, str]]:
    """Return names and hashes of the files that plans are built from."""
    files = bundle.manifest.files
    graphs = {
        bundle.path(name, spelling_of(name, options)).relative_to(bundle.folder).as_posix()
        for name in bundle.manifest.engines
    }
    built = [name for name in files if name in graphs or name.endswith(".weights")]
    return [(name, files[name].sha256) for name in sorted(built)]


def _sha256(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _version(text: str) -> Version:
    """Return a version's leading numbers, which compare as versions do."""
    numbers = []
    for part in text.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)
