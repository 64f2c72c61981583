"""Passes over random tokens, run to be timed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mdruntime.conditions import Conditions
from mdruntime.costs import Kind, Surface
from mdruntime.denoiser import Denoiser, conditioner
from mdruntime.head import Controls
from mdruntime.layout import layout_of
from mdruntime.manifest import Manifest
from mdruntime.pipeline import Pipeline
from mdruntime.prompt import conditions_of
from mdruntime.runner import Runner
from mdruntime.sampler import Pass
from mdruntime.session import Feeds, Outputs, Session, Wrapper
from mdruntime.text import TextPipeline

__all__ = ["Clock", "Probe", "denoiser_of", "guidable", "pipeline_of", "request_of"]

Clock = Callable[[], float]  # seconds

_BETA = np.float32(1.25)  # of the moments; any other takes as long


def pipeline_of(runner: Runner) -> Pipeline | TextPipeline:
    """Return the pipeline that makes what the bundle makes."""
    return TextPipeline(runner) if runner.manifest.image is None else Pipeline(runner)


def request_of(manifest: Manifest, batch: int) -> dict[str, Any]:
    """Return what to ask a pipeline for: ``batch`` samples, each with a condition if it can."""
    if manifest.prompt is not None:
        return {"prompts": [f"a picture, {index}" for index in range(batch)]}
    if manifest.denoiser.classes:
        return {"labels": [index % manifest.denoiser.classes for index in range(batch)]}
    return {"count": batch}


def guidable(manifest: Manifest) -> bool:
    """Return whether samples that begin with nothing but a condition can be guided."""
    conditional = manifest.denoiser.classes > 0 or manifest.prompt is not None
    return conditional and manifest.denoiser.unconditional


class _Timed(Wrapper):
    """A session that knows what its last pass took."""

    def __init__(self, session: Session, clock: Clock) -> None:
        super().__init__(session)
        self._clock = clock
        self.ms = 0.0
        self.size = (0, 0)  # rows and columns

    def run(self, feeds: Feeds, fetch: Sequence[str]) -> Outputs:
        began = self._clock()
        outputs = super().run(feeds, fetch)
        self.ms = 1000 * (self._clock() - began)
        self.size = (feeds["positions"].shape[1], feeds["columns"].shape[1])
        return outputs

    def clone(self) -> "_Timed":
        return _Timed(self.inner.clone(), self._clock)

    def close(self) -> None:
        """Leave the session open: it is the runner's."""


class Probe:
    """Passes of one kind, over random tokens."""

    def __init__(
        self, runner: Runner, kind: Kind, rows: Sequence[int], clock: Clock, *, length: int = 0
    ) -> None:
        """Prepare passes.

        Args:
            runner: of the bundle.
            kind: of all of them.
            rows: numbers of rows that ``points`` are to lie around.
            clock: that tells the seconds.
            length: tokens of a canvas; 0 is the model's own length.
        """
        spec, rng = runner.manifest.denoiser, np.random.default_rng(0)
        length = length or spec.length
        self._kind = kind
        self._session = _Timed(runner.session("denoiser"), clock)
        self._denoiser = denoiser_of(runner, self._session, kind.samples)
        self._layout = layout_of(spec, length)
        self._count = len(self._layout.tokens_of_row)
        self._order = rng.permutation(self._count)
        self._tokens = rng.integers(0, spec.codebook, (kind.samples, length)).astype(np.int32)
        self._tokens[:, rng.random(length) < 0.5] = spec.mask_token
        self._sizes: dict[tuple[int, int], tuple[int, int]] = {}
        extra = self._layout.canvas - self._count if spec.refresh_context else 0
        wanted = [size - extra for size in rows if size < self._layout.canvas]
        parts = _around(wanted, [1, *runner.manifest.buckets], self._count)
        some = (1, self._count // 4, self._count // 2, self._count)
        columns = sorted({max(size, min(2, self._count)) for size in some}, reverse=True)
        # Rows and columns that hold tokens; 0 rows stand for a full pass, which fills the caches.
        self.points = [(0, size) for size in columns] + [(size, size) for size in parts]

    def ms(self, rows: int, columns: int) -> float:
        """Run a pass and return its time."""
        self._denoiser(self._request(rows, columns))
        self._sizes[rows, columns] = self._session.size
        return self._session.ms

    def surface(self, ms: Mapping[tuple[int, int], float]) -> Surface:
        """Return the surface through the times of all points."""
        full = sorted((self._sizes[point][1], ms[point]) for point in self.points if not point[0])
        columns, full_ms = zip(*full, strict=True)
        less = [(self._layout.canvas, 0.0)]
        for point in self.points:
            if point[0]:
                rows, some = self._sizes[point]
                less.append((rows, float(np.interp(some, columns, full_ms)) - ms[point]))
        sizes, less_ms = zip(*sorted(less), strict=True)
        return Surface(sizes, less_ms, columns, full_ms)

    def _request(self, rows: int, columns: int) -> Pass:
        samples = np.arange(self._kind.samples)
        tokens, positions = self._tokens, None
        if rows:
            positions = self._positions(rows)
            tokens = np.take_along_axis(tokens, positions, axis=1)
        wanted = self._positions(columns)
        one = np.ones(len(samples), np.float32)
        controls = Controls(one * self._kind.guided, one, one * _BETA, one * _BETA)
        uniforms = np.full(wanted.shape, 0.5, np.float32)
        return Pass(samples, positions, tokens, wanted, controls, uniforms, self._kind.logits)

    def _positions(self, rows: int) -> Any:
        """Return the tokens of so many rows, the same ones for all samples."""
        tokens = np.sort(self._layout.tokens_of_row[self._order[:rows]].ravel())
        return np.tile(tokens, (self._kind.samples, 1))


def _around(wanted: Sequence[int], grid: Sequence[int], most: int) -> list[int]:
    """Return those numbers of the grid that have a wanted one beside them, falling."""
    sizes = sorted({size for size in grid if size < 0.8 * most} | {most})
    kept: set[int] = set()
    for size in wanted:
        above = int(np.searchsorted(sizes, size))
        kept.update(sizes[max(0, above - 1) : above + 1])
    return sorted(kept - {most}, reverse=True)


def denoiser_of(runner: Runner, session: Session, samples: int) -> Denoiser:
    """Return a denoiser for a batch of samples, each with a condition if it can have one."""
    manifest, condition = runner.manifest, None
    if "condition" in manifest.graphs:
        condition = conditioner(runner.session("condition"), manifest.graphs["condition"])
    conditions = _conditions(runner, samples)
    return Denoiser(session, manifest.denoiser, conditions, condition=condition)


def _conditions(runner: Runner, samples: int) -> Conditions:
    if runner.manifest.image is None:
        return Conditions(np.full(samples, -1))
    request = request_of(runner.manifest, samples)
    labels, prompts = request.get("labels"), request.get("prompts")
    return conditions_of(runner.bundle, labels, prompts, "", samples)
