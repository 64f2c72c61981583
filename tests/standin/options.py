"""What a stand-in plays: which device, which TensorRT, and what shall go wrong."""

import json
from dataclasses import asdict, dataclass

__all__ = ["LEVELS", "VARIABLE", "Options"]

VARIABLE = "MDRUNTIME_STANDIN"
"""Environment variable that carries the options to a child process, as JSON."""

LEVELS = {"10.3": "10.3.0", "11.4": "11.4.0.106"}
"""API levels, and the version that the stand-in of ``tensorrt`` reports."""


@dataclass(frozen=True)
class Options:
    """Options of both stand-ins.

    Attributes:
        api: API level of TensorRT, one of ``LEVELS``: names that it lacks are missing.
        version: version that TensorRT reports, where it is not the level's own.
        name: of the device.
        compute_capability: of the device.
        memory: device memory in bytes.
        devices: how many devices there are.
        runtime: version of the CUDA runtime library.
        driver: newest CUDA version that the driver serves; (0, 0) is no driver.
        failures: (function, call, code): the nth call of a function of the CUDA runtime, counted
            from 1, answers with this code.
        fault: the attention of plans that are built is wrong, unless the inputs of its products
            are outputs of the network (a barrier to fusion).
        stubborn: ``fault``, and no barrier helps.
        nan: plans that are built return NaN.
        single: the inspector shows float32 layers where the graph says half.
        unimplemented: building fails with "could not find any implementation", after a failed
            allocation in the log.
        build_seconds: how long building takes, in steps of the progress monitor.
        engine_ms: device time of a pass of an engine.
        int8_ms: the same, of an engine with quantised layers.
    """

    api: str = "10.3"
    version: str = ""
    name: str = "Stand-in Orin"
    compute_capability: tuple[int, int] = (8, 7)
    memory: int = 8 << 30
    devices: int = 1
    runtime: tuple[int, int] = (12, 6)
    driver: tuple[int, int] = (12, 6)
    failures: tuple[tuple[str, int, int], ...] = ()
    fault: bool = False
    stubborn: bool = False
    nan: bool = False
    single: bool = False
    unimplemented: bool = False
    build_seconds: float = 0.0
    engine_ms: float = 1.0
    int8_ms: float = 0.5

    @property
    def tensorrt(self) -> str:
        """Version of TensorRT."""
        return self.version or LEVELS[self.api]

    def to_json(self) -> str:
        """Return them as JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Options":
        """Return options from their JSON."""
        values = json.loads(text)
        for name in ("compute_capability", "runtime", "driver"):
            values[name] = tuple(values[name])
        values["failures"] = tuple(tuple(failure) for failure in values["failures"])
        return Options(**values)
