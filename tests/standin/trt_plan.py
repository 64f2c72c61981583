"""The stand-in's plans: bytes that hold the ONNX graph, its weights and what was asked for."""

import json
from dataclasses import asdict, dataclass

__all__ = ["Plan", "PlanError", "Shapes"]

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, best and largest shape of an input."""

_MAGIC = b"stand-in plan\n"


class PlanError(ValueError):
    """Bytes that are no whole plan."""


@dataclass(frozen=True)
class Plan:
    """What a plan holds, but the graph.

    Attributes:
        version: of TensorRT that built it.
        name: of the GPU.
        compute_capability: of the GPU.
        version_compatible: may be read by later versions of the same major one.
        hardware: hardware compatibility level.
        verbosity: profiling verbosity.
        profiles: of every profile, the shapes of every input.
        single: the inspector shows float32 layers.
        nan: results are NaN.
        quantised: there are quantised layers.
    """

    version: str
    name: str
    compute_capability: tuple[int, int]
    version_compatible: bool
    hardware: str
    verbosity: str
    profiles: tuple[dict[str, Shapes], ...]
    single: bool
    nan: bool
    quantised: bool

    def pack(self, graph: bytes) -> bytes:
        """Return the bytes of a plan with its ONNX graph."""
        head = json.dumps(asdict(self)).encode()
        return b"%s%d %d\n%s%s" % (_MAGIC, len(head), len(graph), head, graph)

    @staticmethod
    def unpack(data: bytes) -> "tuple[Plan, bytes]":
        """Return a plan and its ONNX graph from bytes.

        Raises:
            PlanError: the bytes are cut short, or no plan.
        """
        if not data.startswith(_MAGIC):
            raise PlanError("magic tag does not match")
        sizes, _, rest = data.removeprefix(_MAGIC).partition(b"\n")
        head, graph = map(int, sizes.split())
        if len(rest) != head + graph:
            raise PlanError("the size does not match")
        values = json.loads(rest[:head])
        values["compute_capability"] = tuple(values["compute_capability"])
        values["profiles"] = tuple(
            {name: tuple(map(tuple, shapes)) for name, shapes in profile.items()}
            for profile in values["profiles"]
        )
        return Plan(**values), rest[head:]
