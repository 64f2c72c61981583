"""Engines of a bundle: built, verified on the device, and published only then.

Everything is written to a folder that ends in ``.partial`` and renamed once it is verified. The
builder's log stays even where building fails; an interrupted build leaves nothing.
"""

import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from mdruntime.bundle import Bundle
from mdruntime.errors import BundleError, SamplingError, VerificationError
from mdruntime.records import from_json, to_json
from mdruntime.trt import store
from mdruntime.trt.identity import INT8, BuildOptions, EngineIdentity
from mdruntime.trt.launch import KINDS, Launch, error_of, kind_of, launch
from mdruntime.trt.memory import MIB, Memory
from mdruntime.trt.plans import TIMINGS, Plans, require_room
from mdruntime.trt.steps import Progress, Steps
from mdruntime.trt.trial import Comparison, Trial

__all__ = ["Here", "build"]

_LINES_OF_PROBE = 2  # of the log

Making = Generator[Progress, None, store.Engines]

_GRAPH_OF = {"psnr_db": "decoder", "encoder_agreement": "encoder"}
"""Which graph a measure of the verification is about, where it is not the denoiser."""


@dataclass(frozen=True, slots=True)
class Here:
    """What a machine says of itself before anything is built."""

    identity: EngineIdentity
    memory: Memory
    total: int  # bytes of the device


@dataclass(frozen=True, slots=True)
class _Work:
    """What all parts of a build share."""

    bundle: Bundle
    here: Here
    steps: Steps
    force: bool
    workspace: int


def build(
    bundle: Bundle,
    options: BuildOptions,
    *,
    force: bool = False,
    workspace: int = 0,
    launch: Launch = launch,
    clock: Callable[[], float] = time.perf_counter,
) -> Making:
    """Build the engines of a bundle for this machine, yielding how far it is.

    Args:
        bundle: an opened bundle.
        options: the choices.
        force: build again what is there already.
        workspace: bytes that tactics may use; 0 takes half of what is free.
        launch: runs a task in a process of its own.
        clock: that tells the seconds.

    Returns:
        The published engines, which are those in use from now on.

    Raises:
        ProviderError: no TensorRT or no GPU here.
        SamplingError: this GPU does not allow what was chosen.
        VerificationError: the engines are wrong, or int8 is no gain; nothing was published then.
        MemoryError: there is not enough of it.
        BundleError: TensorRT cannot build a graph.
    """
    if options.int8 and INT8 not in bundle.manifest.graphs["denoiser"].spellings:
        raise BundleError(
            f"{str(bundle.folder)!r} was exported without int8; export it again with: mdexport "
            f"build --model {bundle.manifest.name} --int8"
        )
    with _log(bundle.folder / store.ENGINES) as log:
        steps = Steps(launch, log, clock, steps=len(bundle.manifest.engines) + 2)
        yield steps.begin("device")
        data = {"bundle": str(bundle.folder), "options": to_json(options)}
        answer = yield from steps.run("device", "probe", data)
        here = from_json(Here, answer, "the device's answer")
        yield steps.end("device", _machine(here))
        _check(here.identity)
        work = _Work(bundle, here, steps, force, workspace)
        return (yield from (_int8 if options.int8 else _plain)(work, options))


def _check(identity: EngineIdentity) -> None:
    """Refuse what TensorRT would refuse later, in fewer words.

    Raises:
        SamplingError: a choice that this GPU does not allow.
    """
    if identity.hardware_compatible and not identity.is_ampere:
        raise SamplingError(
            "--hardware-compatible needs a GPU of compute capability 8.0 or newer, got "
            f"{identity.compute_capability}; leave it out"
        )


def _machine(here: Here) -> str:
    identity, free = here.identity, here.memory.device // MIB
    return f"{identity.gpu}, TensorRT {identity.tensorrt}; {free} of {here.total // MIB} MiB free"


@contextmanager
def _log(place: Path) -> Iterator[Path]:
    """Give a file for the log: kept where building fails, and gone where it is interrupted."""
    place.mkdir(exist_ok=True)
    store.sweep(place)
    log, kept = place / f"{os.getpid()}{store.PARTIAL}.log", place / store.FAILED
    log.touch()
    try:
        yield log
        kept.unlink(missing_ok=True)
    except Exception as error:
        if not isinstance(error, KINDS) or _is_short(log):
            raise
        log.replace(kept)
        text = f"{error} (the whole log: {kept})"
        raise error_of({"kind": kind_of(error), "text": text}) from error
    finally:
        log.unlink(missing_ok=True)
        with suppress(OSError):  # it holds something
            place.rmdir()


def _is_short(log: Path) -> bool:
    """Return whether nothing was built yet."""
    return len(log.read_text(errors="replace").splitlines()) <= _LINES_OF_PROBE


def _plain(work: _Work, options: BuildOptions) -> Making:
    """Build engines of the bundle's own precision, unless they are there."""
    identity = work.here.identity.chosen(work.bundle, options)
    found = None if work.force else store.same(work.bundle, identity)
    if found is not None:
        yield work.steps.begin("engines")
        yield work.steps.end("engines", f"there already, built {found.record.built[:10]}")
        return store.choose(found)
    with _making(work, options, identity) as plans:
        for graph in work.bundle.manifest.engines:
            yield from plans.build(graph, work.steps, work.here.memory)
        trial = yield from _verified(work, plans)
        return _publish(work, plans, trial)


def _int8(work: _Work, options: BuildOptions) -> Making:
    """Build the denoiser in int8 too, and use it where it is exact enough and faster."""
    higher = replace(options, int8=False)
    work.steps.steps += 3
    then = yield from _plain(work, higher)
    identity = work.here.identity.chosen(work.bundle, options)
    with _making(work, options, identity) as plans:
        for graph in work.bundle.manifest.engines:
            if graph != "denoiser":
                plans.take(graph, then)
        yield from plans.build("denoiser", work.steps, work.here.memory)
        precision = work.bundle.manifest.precision
        kept = f"the {precision} engines stay in use"
        try:
            trial = yield from _verified(work, plans)
        except VerificationError as error:
            raise VerificationError(f"int8 was refused, {kept}: {error}") from None
        yield work.steps.begin("compare")
        store.write_record(plans.folder, plans.record())
        data = {**_folders(work, plans), "then": str(then.folder)}
        answer = yield from work.steps.run("compare", "compare", data)
        times = from_json(Comparison, answer, "the comparison")
        words = f"int8 {times.now_ms:.2f} ms a trajectory, {precision} {times.then_ms:.2f} ms"
        if not times.now_ms < times.then_ms:
            agreement = trial.measured.get("token_agreement", float("nan"))
            raise VerificationError(
                f"int8 was refused, {kept}: it is not faster here: {words} (repeats differ by "
                f"{times.noise:.0%}; token agreement {agreement:.4f})"
            )
        yield work.steps.end("compare", words)
        timings = {**trial.timings, f"{precision}_trajectory_ms": times.then_ms}
        return _publish(work, plans, replace(trial, timings=timings))


@contextmanager
def _making(work: _Work, options: BuildOptions, identity: EngineIdentity) -> Iterator[Plans]:
    """Give a folder to build into, which is gone afterwards whatever happens."""
    partial = work.bundle.folder / store.ENGINES / f"{identity.key}.{os.getpid()}{store.PARTIAL}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        require_room(work.bundle, partial)
        known = store.timings(work.bundle, identity, TIMINGS)
        if known is not None:
            shutil.copyfile(known, partial / TIMINGS)
        cached = known is not None
        yield Plans(work.bundle, options, identity, partial, work.workspace, cached)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _verified(work: _Work, plans: Plans) -> Generator[Progress, None, Trial]:
    """Verify plans on the device; with a barrier against fusion where they are wrong without.

    Raises:
        VerificationError: they are wrong either way.
    """
    trial = yield from _try_out(work, plans)
    if not trial.failures:
        return trial
    first = "; ".join(trial.failures)
    wrong = {_GRAPH_OF.get(failure.split()[0], "denoiser") for failure in trial.failures}
    work.steps.steps += len(wrong) + 1
    work.steps.note(f"verification failed ({first}); trying again with a barrier against fusion")
    for graph in sorted(wrong):
        yield from plans.build(graph, work.steps, work.here.memory, barrier=True)
    tried = any(plans.barriers.values())
    if tried:
        trial = yield from _try_out(work, plans)
    if not tried or trial.failures:
        second = "; ".join(trial.failures) if tried else "there is no attention to put one around"
        raise VerificationError(
            f"verification failed on this device: {first}; with a barrier against fusion: "
            f"{second}; nothing was published"
        )
    work.steps.note(f"the barrier around {sum(map(len, plans.barriers.values()))} tensors cured it")
    return trial


def _try_out(work: _Work, plans: Plans) -> Generator[Progress, None, Trial]:
    yield work.steps.begin("verify")
    store.write_record(plans.folder, plans.record())
    answer = yield from work.steps.run("verify", "verify", _folders(work, plans))
    numbers = {name: float(value) for name, value in answer["measured"].items()}  # NaN is a text
    trial = from_json(Trial, {**answer, "measured": numbers}, "the verification")
    words = trial.failures or [f"{name} {value:.4g}" for name, value in trial.measured.items()]
    yield work.steps.end("verify", f"{'WRONG: ' * bool(trial.failures)}{', '.join(words)}")
    return trial


def _folders(work: _Work, plans: Plans) -> dict[str, str]:
    return {"bundle": str(work.bundle.folder), "plans": str(plans.folder)}


def _publish(work: _Work, plans: Plans, trial: Trial) -> store.Engines:
    """Give the plans their name, beside the record of what is known of them."""
    record = plans.record(
        measured=trial.measured,
        limits=trial.limits,
        timings=trial.timings,
        seconds=work.steps.total(),
    )
    store.write_record(plans.folder, record)
    shutil.copyfile(work.steps.log, plans.folder / store.LOG)
    folder = plans.folder.with_name(plans.identity.key)
    store.publish(plans.folder, folder)
    return store.Engines(folder, record)
