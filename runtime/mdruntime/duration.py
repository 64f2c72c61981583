"""Durations as people write them."""

import math

from mdruntime.errors import SamplingError

__all__ = ["milliseconds"]


def milliseconds(text: str) -> float:
    """Read a duration such as ``200ms``, ``1.5s`` or ``200``, which is in milliseconds.

    Raises:
        SamplingError: anything else.
    """
    number, factor = text.strip(), 1.0
    if number.endswith("ms"):
        number = number[:-2]
    elif number.endswith("s"):
        number, factor = number[:-1], 1000.0
    try:
        found = float(number) * factor
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise SamplingError(f"a time must be a number such as 200ms or 1.5s, got {text!r}")
    return found
