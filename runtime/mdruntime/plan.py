"""Plans: which pass recomputes which rows and reveals how many positions.

A round is one *full pass* over the whole canvas followed by *partial passes*, each over few rows
against the K/V cache (Hayakawa et al. 2025, section 4.1). A plan is a list of rounds, a round a
list of counts: how many positions each of its passes reveals. Plain sampling, partial caching and
known-order decoding are three plans of this one form:

    plain                   [[18], [27], ...]                one pass a round
    substeps=3              [[6, 6, 6], [9, 9, 9], ...]      a round's positions in three parts
    refresh_interval=2      [[18, 27], ...]                  a full pass every second round
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from mdruntime.schedule import Schedule

__all__ = ["Plan", "Round", "make_plan", "pass_rows", "split"]

Round = list[int]  # positions revealed by each pass of a round; the first pass is a full one
Plan = list[Round]


def split(count: int, parts: int) -> Round:
    """Return ``count`` split as evenly as possible; parts that would be empty are left out."""
    parts = min(parts, count)
    return [count * (part + 1) // parts - count * part // parts for part in range(parts)]


def make_plan(
    hidden: int, schedule: Schedule, *, substeps: int = 1, refresh_interval: int = 1
) -> Plan:
    """Return the plan for a canvas with ``hidden`` masked tokens.

    Args:
        hidden: masked tokens at the start.
        schedule: tokens still hidden after each round.
        substeps: parts into which a round's positions are split.
        refresh_interval: rounds of the schedule that share one full pass.
    """
    left = [hidden, *schedule.tolist()]
    counts = [before - after for before, after in pairwise(left)]
    parts = [split(count, substeps) for count in counts]
    return [
        [count for part in parts[start : start + refresh_interval] for count in part]
        for start in range(0, len(parts), refresh_interval)
    ]


def pass_rows(plan: Iterable[Sequence[int]], refresh: str, canvas: int) -> list[int]:
    """Return how many rows of one sequence every pass of a plan recomputes.

    Args:
        plan: rounds of reveal counts.
        refresh: ``chosen``: a partial pass recomputes all positions of its round; ``recent``:
            those just revealed and those about to be.
        canvas: rows of a full pass.
    """
    rows = []
    for parts in plan:
        rows.append(canvas)
        for before, now in pairwise(parts):
            rows.append(sum(parts) if refresh == "chosen" else before + now)
    return rows
