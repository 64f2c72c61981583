"""Plans at work on the device, before they are published: are they right, and how fast are they?

Recorded passes are of two samples. They are replayed sample by sample, for the profiles of batch 1,
and together where larger batches were built for; and some of them once more in every larger row
bucket, so that no profile is published that never ran.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdruntime.bundle import Bundle
from mdruntime.cuda import open_cuda
from mdruntime.denoiser import VISIBLE, conditioner
from mdruntime.head import Draws
from mdruntime.measures import compare
from mdruntime.session import Backend, Feeds, Outputs, Wrapper, open_backend
from mdruntime.timing import interleaved, noise_of
from mdruntime.trt import api
from mdruntime.trt.identity import BuildOptions, current, spelling_of
from mdruntime.trt.store import Engines, find, read_engines
from mdruntime.verify import (
    CONDITIONED,
    DECODER_VECTORS,
    ENCODER_VECTORS,
    Replay,
    Verification,
    agreement,
    psnr,
    read_passes,
    recorded_inputs,
)

__all__ = [
    "Comparison",
    "Trial",
    "alone",
    "compare_times",
    "try_out",
    "verify_engines",
    "widened",
]

Arrays = Mapping[str, NDArray[Any]]

_BY_ROW = ("tokens", "positions", "columns", VISIBLE, CONDITIONED)
_SHARED = ("canvas", "shown")
_WIDENED = 2  # partial passes of a trajectory that are tried in all buckets
_REPEATS = 15
_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Trial:
    """What was found."""

    measured: dict[str, float]
    limits: dict[str, float]
    failures: tuple[str, ...]
    passes: int
    timings: dict[str, float]  # ms


@dataclass(frozen=True, slots=True)
class Comparison:
    """Times of a trajectory, and by how much repeats differ."""

    now_ms: float
    then_ms: float
    noise: float


def verify_engines(bundle: Bundle, folder: Path | None = None) -> Verification:
    """Replay the bundle's test vectors on its engines.

    Args:
        bundle: an opened bundle.
        folder: of engines that are not published yet, in place of those in use.
    """
    engines = _in_use(bundle) if folder is None else read_engines(folder)
    with closing(open_backend(bundle, "tensorrt", engines=engines.folder)) as backend:
        return _verified(bundle, backend, engines.record.options)


def try_out(bundle: Bundle, folder: Path) -> Trial:
    """Verify plans, and time a trajectory of one sample.

    Args:
        bundle: an opened bundle.
        folder: of plans that may not be published yet.
    """
    options = read_engines(folder).record.options
    with closing(open_backend(bundle, "tensorrt", engines=folder)) as backend:
        found = _verified(bundle, backend, options)
        times = _times(bundle, {"": backend}) if found else {"": [0.0]}
    timings = {"trajectory_ms": float(np.median(times[""]))}
    failures = tuple(found.failures)
    return Trial(found.measured, found.limits, failures, found.passes, timings)


def _in_use(bundle: Bundle) -> Engines:
    trt, cuda = api.import_tensorrt(), open_cuda()
    return find(bundle, current(bundle, cuda, trt))


def _verified(bundle: Bundle, backend: Backend, options: BuildOptions) -> Verification:
    passes, replay = list(_passes(bundle, options.max_batch)), _replay(bundle, backend)
    measured = compare(zip(passes, replay.over(passes, Draws._fields), strict=True))
    measured |= _images(bundle, backend)
    known = bundle.manifest.verification
    limits = {**known.limits, **known.limits_of(spelling_of("denoiser", options))}
    held = {name: limit for name, limit in limits.items() if name in measured}
    return Verification(measured, held, len(passes), tuple(replay.faults))


def compare_times(bundle: Bundle, now: Path, then: Path) -> Comparison:
    """Time the recorded trajectory on two sets of plans in turn, so that noise meets both.

    Args:
        bundle: an opened bundle.
        now: folder of the plans in question.
        then: folder of the plans they would replace.
    """
    with ExitStack() as opened:
        backends = {}
        for name, folder in (("now", now), ("then", then)):
            backends[name] = open_backend(bundle, "tensorrt", engines=folder)
            opened.enter_context(closing(backends[name]))
        times = _times(bundle, backends)
    now_ms, then_ms = (float(np.median(times[name])) for name in ("now", "then"))
    return Comparison(now_ms, then_ms, noise_of(times.values()))


def _times(bundle: Bundle, backends: Mapping[str, Backend]) -> dict[str, list[float]]:
    """Return the times of the trajectory of one sample, in ms."""
    passes = list(alone(read_passes(bundle), 0))
    jobs = {name: _job(_replay(bundle, backend), passes) for name, backend in backends.items()}
    return interleaved(jobs, repeats=_REPEATS, seconds=_SECONDS)


def alone(passes: Sequence[Arrays], sample: int) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield recorded passes as they are for one sample alone, with its one or two sequences."""
    for one in passes:
        pair = (one["conditional"][sample], one["unconditional"][sample])
        rows = list(dict.fromkeys(pair))
        found = {
            name: array
            if name in _SHARED
            else array[rows if name in _BY_ROW else slice(sample, sample + 1)]
            for name, array in one.items()
        }
        found["conditional"] = np.zeros(1, np.int32)
        found["unconditional"] = np.full(1, len(rows) - 1, np.int32)
        yield found


def widened(
    passes: Sequence[Arrays], buckets: Sequence[int]
) -> Iterator[Mapping[str, NDArray[Any]]]:
    """Yield passes, and some partial ones again in all larger buckets.

    A row that is computed twice is written twice with the same values.
    """
    partial = 0
    for one in passes:
        yield one
        if one["canvas"] or partial >= _WIDENED:
            continue
        partial += 1
        rows = one["positions"].shape[1]
        for bucket in sorted(size for size in buckets if size > rows)[1:]:
            yield {**one, **{name: _padded(one, name, bucket) for name in ("tokens", "positions")}}


def _padded(one: Arrays, name: str, bucket: int) -> NDArray[Any]:
    """Repeat the last row of a pass until there are as many as a bucket has."""
    count, rows = one["positions"].shape
    wide = one[name].reshape(count, rows, -1)  # a row of the canvas may hold several tokens
    last = np.repeat(wide[:, -1:], bucket - rows, axis=1)
    return np.concatenate([wide, last], axis=1).reshape(count, -1)


def _passes(bundle: Bundle, max_batch: int) -> Iterator[Arrays]:
    recorded = read_passes(bundle)
    buckets = bundle.manifest.buckets
    samples = len(recorded[0]["conditional"])
    for sample in range(samples):
        yield from widened(list(alone(recorded, sample)), buckets)
    if max_batch >= samples > 1:
        yield from widened(recorded, buckets)


def _replay(bundle: Bundle, backend: Backend) -> Replay:
    graphs, condition = bundle.manifest.graphs, None
    if "condition" in graphs:
        condition = conditioner(backend.session("condition"), graphs["condition"])
    return Replay(backend.session("denoiser"), condition, recorded_inputs(bundle))


def _job(replay: Replay, passes: Sequence[Arrays]) -> Callable[[], float]:
    def ms() -> float:
        began = perf_counter()
        for _ in replay.over(passes, Draws._fields):
            pass
        return 1000 * (perf_counter() - began)

    return ms


class _OneByOne(Wrapper):
    """A session of an image graph, whose engine takes one image at a time."""

    def run(self, feeds: Feeds, fetch: Sequence[str]) -> Outputs:
        """Run the graph for each item."""
        ((name, items),) = feeds.items()
        found = [super(_OneByOne, self).run({name: item[None]}, fetch) for item in items]
        return {output: np.concatenate([one[output] for one in found]) for output in fetch}

    def clone(self) -> "_OneByOne":
        """Return the same for another thread."""
        return _OneByOne(self.inner.clone())

    def close(self) -> None:
        """Leave the session to the backend."""


def _images(bundle: Bundle, backend: Backend) -> dict[str, float]:
    """Compare decoder and encoder, as far as the bundle has them."""
    graphs, measured = bundle.manifest.graphs, {}
    if "decoder" in graphs:
        session = _OneByOne(backend.session("decoder"))
        measured["psnr_db"] = psnr(session, bundle.folder / DECODER_VECTORS)
    if "encoder" in graphs:
        session = _OneByOne(backend.session("encoder"))
        measured["encoder_agreement"] = agreement(session, bundle.folder / ENCODER_VECTORS)
    return measured
