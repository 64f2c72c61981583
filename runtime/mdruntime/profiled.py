"""What ONNX Runtime's profile says of each run: its operators, their times and arithmetic."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdruntime.arithmetic import Tensor, Work, is_product, work_of
from mdruntime.errors import BundleError

__all__ = ["Node", "Run", "read_profile"]

_KERNEL = "_kernel_time"
_CONTAINERS = ("If", "Loop", "Scan")  # whose time is that of the operators inside them


@dataclass(frozen=True, slots=True)
class Node:
    """One operator at work."""

    operator: str
    ms: float
    product: bool
    work: Work | None  # None where it is no product, or its shapes do not tell


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a graph."""

    ms: float
    nodes: tuple[Node, ...]


def read_profile(path: Path) -> list[Run]:
    """Read a profile and return its runs, in the order in which they were made.

    Raises:
        BundleError: it is no profile as ONNX Runtime writes it.
    """
    try:
        events = json.loads(path.read_text(encoding="utf-8"))
        spans = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == "model_run"]
        kernels = [event for event in events if _is_kernel(event)]
        return [_run(*span, kernels) for span in sorted(spans)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(
            f"ONNX Runtime's profile cannot be read ({type(error).__name__}: {error}); "
            "leave out --operators, and pass --no-roofline"
        ) from None


def _is_kernel(event: Any) -> bool:
    return event.get("cat") == "Node" and event["name"].endswith(_KERNEL)


def _run(began: int, ended: int, kernels: Iterable[Any]) -> Run:
    """Return the run between two times, in microseconds."""
    inside = [event for event in kernels if began <= event["ts"] < ended]
    nodes = [_node(event["dur"], event["args"]) for event in inside]
    kept = tuple(node for node in nodes if node.operator not in _CONTAINERS)
    return Run((ended - began) / 1000, kept)


def _node(microseconds: int, facts: Any) -> Node:
    operator = str(facts["op_name"])
    inputs, outputs = (list(_tensors(facts[f"{side}_type_shape"])) for side in ("input", "output"))
    work = work_of(operator, inputs, outputs)
    return Node(operator, microseconds / 1000, is_product(operator), work)


def _tensors(listed: Any) -> Iterable[Tensor]:
    """Yield what a list such as ``[{"float": [1, 65, 96]}]`` holds."""
    for each in listed:
        for dtype, shape in each.items():
            yield Tensor(dtype, tuple(int(size) for size in shape))
