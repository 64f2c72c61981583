"""What ONNX Runtime is told on CUDA, and when a pass becomes a CUDA graph."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["EAGER", "Captures", "cuda_options", "is_board", "placed_elsewhere"]

EAGER = -1
"""The number that ONNX Runtime takes for a run that is neither captured nor replayed."""

_EAGER_RUNS = 2  # of a shape before it is captured: most shapes of a text never come again
_MOST_GRAPHS = 32
_BOARD = Path("/proc/device-tree/model")


def is_board(path: Path = _BOARD) -> bool:
    """Return whether this is a Jetson, whose GPU shares the memory of the system."""
    try:
        return b"NVIDIA" in path.read_bytes()
    except OSError:
        return False


def cuda_options(*, graphs: bool, board: bool) -> dict[str, str]:
    """Return options of ONNX Runtime's CUDA provider.

    Args:
        graphs: passes may become CUDA graphs.
        board: memory is short.
    """
    return {
        "enable_cuda_graph": str(int(graphs)),
        # By default the arena doubles, and half of it may never be used.
        "arena_extend_strategy": "kSameAsRequested",
        # By default every shape of a convolution is timed with all algorithms, in much memory.
        "cudnn_conv_algo_search": "HEURISTIC",
        "cudnn_conv_use_max_workspace": str(int(not board)),
        # By default products of float32 matrices keep 10 bits of a number's 23.
        "use_tf32": "0",
    }


class Captures:
    """Which runs of a session are CUDA graphs, and by what number.

    ONNX Runtime keeps a graph for each number, captures at the first run under a number, and
    replays at all others: shapes and addresses must be the same there.
    """

    def __init__(self, numbers: Iterator[int] | None = None) -> None:
        """Take the source of numbers, shared by all who share a session."""
        self._numbers = itertools.count(1) if numbers is None else numbers
        self.on = True
        self.count = 0

    def number(self, runs: int, number: int) -> int:
        """Return the number of a run.

        Args:
            runs: earlier ones with these shapes and addresses.
            number: of the last one.
        """
        if not self.on:
            return EAGER
        if number != EAGER or runs < _EAGER_RUNS or self.count >= _MOST_GRAPHS:
            return number
        self.count += 1
        return next(self._numbers)

    def release(self, number: int) -> None:
        """Take back the room of a graph that is used no more."""
        self.count -= int(number != EAGER)


def placed_elsewhere(session: Any, providers: Iterable[str]) -> str:
    """Return which nodes run on other providers than these, in words; "" for none.

    Args:
        session: of ONNX Runtime, with its placement recorded.
        providers: names of ONNX Runtime's.
    """
    try:
        parts = session.get_provider_graph_assignment_info()
    except (AttributeError, RuntimeError):  # older versions
        return "this version of ONNX Runtime cannot tell which nodes run elsewhere"
    counts: dict[str, Counter[str]] = {}
    for part in parts:
        counts.setdefault(part.ep_name, Counter()).update(n.op_type for n in part.get_nodes())
    total = sum(sum(each.values()) for each in counts.values())
    wanted = set(providers)
    texts = [
        f"{sum(found.values())} of {total} nodes run on {name}: "
        + ", ".join(f"{count} {operator}" for operator, count in found.most_common())
        for name, found in counts.items()
        if name not in wanted
    ]
    return "; ".join(texts)
