"""Where engines are kept: ``engines/<key>/`` of a bundle, plans beside ``engine.json``.

A plan is what TensorRT made, byte for byte, so that its other tools can read it too. A folder
without ``.partial`` at the end of its name is complete and was verified on the device.
"""

import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from mdruntime.bundle import Bundle, file_spec
from mdruntime.errors import BundleError, EngineError
from mdruntime.records import from_json, to_json
from mdruntime.trt.identity import BuildOptions, EngineIdentity
from mdruntime.trt.profiles import Profile

__all__ = [
    "ENGINES",
    "FAILED",
    "LOG",
    "PARTIAL",
    "RECORD_FORMAT",
    "EngineRecord",
    "Engines",
    "PlanRecord",
    "build_command",
    "choose",
    "find",
    "minutes",
    "now",
    "publish",
    "read_engines",
    "records",
    "same",
    "sweep",
    "timings",
    "write_record",
]

ENGINES = "engines"
LOG = "build.log"
FAILED = "failed.log"
"""What was said by the last build that failed."""
PARTIAL = ".partial"
RECORD_FORMAT = 1
_RECORD = "engine.json"


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """A plan: one graph, built for some shapes."""

    sha256: str
    bytes: int
    profiles: tuple[Profile, ...]
    seconds: float  # that building took
    layers: dict[str, int]  # how many layers of the engine compute in a precision
    device_bytes: int = 0  # of activations


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """The whole of ``engine.json``."""

    format: int
    identity: EngineIdentity
    options: BuildOptions
    plans: dict[str, PlanRecord]
    fusion_barrier: bool  # attention's inputs are outputs too, because fusing them went wrong
    measured: dict[str, float]  # of the verification on the device; empty before it
    limits: dict[str, float]
    timings: dict[str, float]  # ms
    seconds: float  # from beginning to end
    built: str
    chosen: str  # when it was last asked for; the last one is used


@dataclass(frozen=True, slots=True)
class Engines:
    """A folder of plans whose record was read and whose files were checked."""

    folder: Path
    record: EngineRecord

    def plan(self, graph: str) -> Path:
        """Return the plan of a graph.

        Raises:
            EngineError: there is none.
        """
        if graph not in self.record.plans:
            known = ", ".join(self.record.plans)
            raise EngineError(f"{self.folder.name} has no plan of {graph!r}, only of {known}")
        return _plan(self.folder, graph)

    def profiles(self, graph: str) -> tuple[Profile, ...]:
        """Return what the plan of a graph was built for, in the order of its profiles."""
        self.plan(graph)
        return self.record.plans[graph].profiles


def find(bundle: Bundle, here: EngineIdentity) -> Engines:
    """Return the engines of a bundle that fit this machine; of several those last asked for.

    Args:
        bundle: an opened bundle.
        here: this machine, see ``identity.current``; its choices do not matter.

    Raises:
        EngineError: there are none, or all belong elsewhere, or their files are damaged; the text
            names what differs and the command that builds them.
    """
    kept = sorted(records(bundle), key=lambda one: one[1].chosen)
    found = [(_foreign(bundle, record, here), folder, record) for folder, record in kept]
    fitting = [one for one in found if not one[0]]
    if fitting:
        return read_engines(fitting[-1][1], build_command(bundle, fitting[-1][2].options))
    if not found:
        raise EngineError(
            f"{str(bundle.folder)!r} holds no engines of TensorRT yet; build them on this machine "
            f"with: {build_command(bundle)}"
        )
    differences, folder, record = min(reversed(found), key=lambda one: len(one[0]))
    raise EngineError(_explanation(bundle, differences, folder, record, len(found) - 1))


def _foreign(bundle: Bundle, record: EngineRecord, here: EngineIdentity) -> list[Any]:
    return list(record.identity.differences(here.chosen(bundle, record.options)))


def _explanation(
    bundle: Bundle, differences: list[Any], folder: Path, record: EngineRecord, others: int
) -> str:
    words = "; ".join(
        f"{name} is {_short(here)} here and was {_short(built)} there"
        for name, built, here in differences
    )
    also = f" (and {others} more do not fit)" if others else ""
    return (
        f"the engines in {ENGINES}/{folder.name} were built elsewhere or for something else: "
        f"{words}{also}; build them for this machine with: "
        f"{build_command(bundle, record.options)} ({minutes(record.seconds)} last time)"
    )


def _short(value: Any) -> str:
    """Return a value in words, and only the beginning of a hash."""
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text


def minutes(seconds: float) -> str:
    """Return a duration in words."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def build_command(bundle: Bundle, options: BuildOptions | None = None) -> str:
    """Return the command that builds engines of a bundle with the same choices."""
    flags = options.flags if options is not None else []
    return shlex.join(["mdruntime", "build", str(bundle.folder), *flags])


def records(bundle: Bundle) -> Iterator[tuple[Path, EngineRecord]]:
    """Yield the finished engine folders of a bundle that can be read."""
    for path in sorted((bundle.folder / ENGINES).glob(f"*/{_RECORD}")):
        if not path.parent.name.endswith(PARTIAL):
            try:
                yield path.parent, _read(path)
            except EngineError:  # of another version, or damaged: as good as absent
                continue


def read_engines(folder: Path, command: str = "") -> Engines:
    """Read a folder of engines and compare its plans with their hashes.

    Args:
        folder: with a record; need not be finished.
        command: that builds them again.

    Raises:
        EngineError: a file is missing or damaged.
    """
    record = _read(folder / _RECORD)
    cure = f"; build again with: {command}" if command else "; build the engines again"
    for graph, plan in record.plans.items():
        path = _plan(folder, graph)
        if not path.is_file():
            raise EngineError(f"{path.name} is missing from {ENGINES}/{folder.name}{cure}")
        if file_spec(path).sha256 != plan.sha256:
            raise EngineError(
                f"{path.name} in {ENGINES}/{folder.name} is not what was built and verified (its "
                f"SHA-256 differs){cure}"
            )
    return Engines(folder, record)


def _plan(folder: Path, graph: str) -> Path:
    return folder / f"{graph}.plan"


def _read(path: Path) -> EngineRecord:
    try:
        data = json.loads(path.read_bytes())
        return from_json(EngineRecord, data, _RECORD)
    except (OSError, ValueError, RecursionError) as error:  # BundleError is a ValueError
        reason = str(error) if isinstance(error, BundleError) else f"{_RECORD}: {error}"
        raise EngineError(f"{str(path.parent)!r} cannot be read ({reason})") from None


def write_record(folder: Path, record: EngineRecord) -> None:
    """Write the record of a folder of engines, replacing an older one in one step."""
    part = folder / f".{_RECORD}{PARTIAL}"
    text = json.dumps(to_json(record), indent=2, ensure_ascii=False)
    try:
        part.write_text(f"{text}\n", encoding="utf-8")
        part.replace(folder / _RECORD)
    finally:
        part.unlink(missing_ok=True)


def same(bundle: Bundle, identity: EngineIdentity) -> Engines | None:
    """Return the engines of just this identity, or None where there are none or damaged ones."""
    try:
        engines = read_engines(bundle.folder / ENGINES / identity.key)
    except EngineError:
        return None
    return engines if engines.record.identity == identity else None


def timings(bundle: Bundle, identity: EngineIdentity, name: str) -> Path | None:
    """Return the newest timing cache of this device and these versions."""
    kept = sorted(records(bundle), key=lambda one: one[1].built)
    found = [folder / name for folder, record in kept if _times_alike(record.identity, identity)]
    return next((path for path in reversed(found) if path.is_file()), None)


def _times_alike(one: EngineIdentity, other: EngineIdentity) -> bool:
    names = ("tensorrt", "compute_capability", "gpu", "cuda", "os")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def publish(partial: Path, folder: Path) -> None:
    """Give a finished folder its name; a predecessor disappears only then."""
    old = folder.with_name(f"{folder.name}.old.{os.getpid()}{PARTIAL}")
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException:  # an interrupt, too, must not leave the predecessor under another name
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sweep(place: Path) -> None:
    """Remove what builds left behind that were killed."""
    for path in place.glob(f"*{PARTIAL}*"):
        number = path.name.split(PARTIAL)[0].rpartition(".")[2]
        if number.isdecimal() and not _alive(int(number)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def choose(engines: Engines) -> Engines:
    """Make engines those that are used, and return them with their new record."""
    chosen = replace(engines.record, chosen=now())
    write_record(engines.folder, chosen)
    return Engines(engines.folder, chosen)


def now() -> str:
    """Return the time in the form that records keep, which sorts as time does."""
    return datetime.fromtimestamp(time.time()).astimezone().isoformat(timespec="microseconds")
