"""How far the conditionals of partial passes are from the true ones.

A partial pass attends to cached keys and values, of which those of rows it does not recompute are
stale. Its conditionals are compared with those of a full pass over the same canvas, and so are
those of the full pass at the begin of the round, which a sampler without partial passes would use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from grids import label
from mdruntime import Sampling
from page import Verdict, table
from probe import Seen, trajectory

__all__ = ["Stale", "divergence", "measured", "stale_table", "verdict"]

LogP = NDArray[np.float64]  # (..., codebook)


@dataclass(frozen=True, slots=True)
class Stale:
    """Mean divergences in nats, over rounds, samples and positions."""

    sampling: Sampling
    part: int  # partial passes since the full one, from 1
    partial: float  # KL(true || partial pass)
    error: float  # standard error of it over samples
    start: float  # KL(true || full pass of the round); NaN for orders that are known beforehand


def divergence(true: LogP, other: LogP) -> NDArray[np.float64]:
    """Return KL(true || other) in nats of log-probabilities (..., codebook)."""
    return np.asarray((np.exp(true) * (true - other)).sum(axis=-1))


def measured(folder: Path, sampling: Sampling, samples: int, *, threads: int = 0) -> list[Stale]:
    """Run a sampler, and measure by part of the round how stale its conditionals are.

    Args:
        folder: the bundle.
        sampling: one with partial passes.
        samples: of the batch.
        threads: of the CPU; 0 takes all.
    """
    start: dict[int, LogP] = {}  # by position, (samples, codebook)
    found: dict[int, list[tuple[NDArray[np.float64], NDArray[np.float64]]]] = {}
    for seen in trajectory(folder, sampling, samples, threads=threads):
        if seen.step.part == 0:
            start = {} if sampling.known else _by_position(seen, samples)
            continue
        partial = divergence(seen.true_log_p, seen.log_p)
        before = np.full_like(partial, np.nan)
        if start:
            before = divergence(seen.true_log_p, _at(start, seen))
        found.setdefault(seen.step.part, []).append((partial, before))
    return [_mean(sampling, part, pairs) for part, pairs in sorted(found.items())]


def _by_position(seen: Seen, samples: int) -> dict[int, LogP]:
    canvas: dict[int, LogP] = {}
    codebook = seen.log_p.shape[-1]
    for row, sample in enumerate(seen.request.samples.tolist()):
        for column, position in enumerate(seen.request.wanted[row].tolist()):
            values = canvas.setdefault(position, np.full((samples, codebook), np.nan))
            values[sample] = seen.log_p[row, column]
    return canvas


def _at(start: dict[int, LogP], seen: Seen) -> LogP:
    samples = seen.request.samples.tolist()
    wanted = seen.request.wanted.tolist()
    return np.stack(
        [
            [start[position][sample] for position in positions]
            for sample, positions in zip(samples, wanted, strict=True)
        ]
    )


def _mean(
    sampling: Sampling, part: int, pairs: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]]
) -> Stale:
    """Return means over rounds, which reveal different numbers of positions."""
    partial = np.concatenate([one for one, _ in pairs], axis=1).mean(axis=1)
    start = np.concatenate([other for _, other in pairs], axis=1)
    error = float(partial.std(ddof=1) / len(partial) ** 0.5) if len(partial) > 1 else np.nan
    return Stale(sampling, part, float(partial.mean()), error, float(start.mean()))


def verdict(found: Sequence[Stale]) -> Verdict:
    """Judge whether partial passes are nearer to the truth than the round's full pass."""
    telling = [each for each in found if np.isfinite(each.start)]
    nearer = [each.partial < each.start for each in telling]
    return Verdict(
        "a partial pass sees conditionals nearer to the true ones than the full pass before it",
        sum(nearer),
        len(nearer) - sum(nearer),
        note=_removed(telling),
    )


def _removed(found: Sequence[Stale]) -> str:
    if not found:
        return ""
    kept = [each.partial / each.start for each in found]
    return f"Between {1 - max(kept):.0%} and {1 - min(kept):.0%} of the divergence is gone."


def stale_table(found: Sequence[Stale]) -> str:
    """Return a Markdown table of divergences in nats."""
    return table(
        ("sampler", "partial pass", "KL(true, partial)", "KL(true, full pass before)"),
        (
            (
                label(each.sampling),
                str(each.part),
                f"{each.partial:.2g} ± {each.error:.1g}",
                f"{each.start:.2g}" if np.isfinite(each.start) else "not looked at",
            )
            for each in found
        ),
    )
