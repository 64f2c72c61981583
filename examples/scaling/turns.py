"""Jobs of very different lengths, timed in turns."""

from collections.abc import Callable, Mapping
from typing import TypeVar

__all__ = ["Tell", "in_turns"]

Key = TypeVar("Key")
Tell = Callable[[str], None]


_MORE = 10  # times the repeats are made where they are over too soon


def in_turns(
    jobs: Mapping[Key, Callable[[], float]],
    *,
    repeats: int,
    shortest: float,
    longest: float,
    tell: Tell,
) -> dict[Key, list[float]]:
    """Run jobs in turn, so that what disturbs the machine disturbs all of them alike.

    The first run of a job does not count, unless it is the only one: what is cold is a small share
    of it then.

    Args:
        jobs: each returns its time in milliseconds.
        repeats: that count, of each job.
        shortest: seconds before which a job goes on although they are made, up to ten times.
        longest: seconds after which it is not run again.
        tell: is told what goes on.
    """
    found: dict[Key, list[float]] = {key: [] for key in jobs}

    def waits(key: Key, turn: int) -> bool:
        seconds = sum(found[key]) / 1000
        return seconds < longest and (turn <= repeats or seconds < shortest)

    for turn in range(_MORE * repeats + 1):
        waiting = [key for key in jobs if waits(key, turn)]
        for key in waiting:
            found[key].append(jobs[key]())
            if not turn:
                tell(f"{_name(key)}: {found[key][-1]:.1f} ms")
        if waiting and 0 < turn <= repeats:
            tell(f"turn {turn} of {repeats}: {len(waiting)} of {len(jobs)} measured again")
    return {key: ms[1:] or ms for key, ms in found.items()}


def _name(key: object) -> str:
    return ", ".join(map(str, key)) if isinstance(key, tuple) else str(key)
