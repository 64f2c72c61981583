"""The stand-in's runtime: it refuses the plans that do not fit here."""

from typing import Any

from tests.standin.trt_api import Api, ILogger, begun
from tests.standin.trt_engine import ICudaEngine
from tests.standin.trt_plan import Plan, PlanError

__all__ = ["Runtime"]

_NULL = "pybind11::init(): factory function returned nullptr"


class Runtime(Api):
    """Makes engines of plans."""

    def __init__(self, logger: ILogger) -> None:
        self._logger = begun(logger, ILogger)
        self._host_code = False
        options = self._state.options
        if not options.devices or options.driver[0] < options.runtime[0]:
            raise TypeError(_NULL)

    @property
    def logger(self) -> ILogger:
        """Who is told what happens."""
        return self._logger

    @property
    def engine_host_code_allowed(self) -> bool:
        """Whether plans may bring code for the host: version-compatible ones do."""
        return self._host_code

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, allowed: bool) -> None:
        self._host_code = bool(allowed)

    def deserialize_cuda_engine(self, serialized_engine: Any) -> "ICudaEngine | None":
        """Return an engine; None where the plan does not fit, and the logger knows why."""
        try:
            plan, graph = Plan.unpack(bytes(serialized_engine))
        except PlanError as error:
            return self._no(
                f"Error Code 1: Serialization (Serialization assertion failed: {error})"
            )
        refusal = self._refusal(plan)
        if refusal:
            return self._no(refusal)
        weights = self._state.device.memory.device(len(graph), backed=False)
        if weights is None:
            return self._no("Error Code 1: Cuda Runtime (out of memory)")
        if plan.name != self._state.options.name:
            self._logger.log(
                ILogger.WARNING,
                "Using an engine plan file across different models of devices is not recommended",
            )
        made: ICudaEngine = self._state.new("ICudaEngine", plan, graph, weights, self._logger)
        return made

    def _refusal(self, plan: Plan) -> str:
        options = self._state.options
        mine, its = options.tensorrt.split("."), plan.version.split(".")
        if its != mine:
            newer = mine[0] == its[0] and [int(n) for n in its] < [int(n) for n in mine]
            if not (plan.version_compatible and newer):
                return (
                    "Error Code 6: API Usage Error (The engine plan file is not compatible with "
                    f"this version of TensorRT, expecting library version {options.tensorrt} got "
                    f"{plan.version}, please rebuild.)"
                )
        if plan.version_compatible and not self._host_code:
            return (
                "Error Code 4: API Usage Error (Cannot deserialize engine with lean runtime: "
                "engine_host_code_allowed is not set)"
            )
        capability = options.compute_capability
        ampere = plan.hardware == "AMPERE_PLUS" and capability >= (8, 0)
        if plan.compute_capability != capability and not ampere:
            return (
                "Error Code 6: API Usage Error (The engine plan file is generated on an "
                f"incompatible device, expecting compute {_dotted(capability)} got compute "
                f"{_dotted(plan.compute_capability)}, please rebuild.)"
            )
        return ""

    def _no(self, text: str) -> "ICudaEngine | None":
        self._logger.log(ILogger.ERROR, f"IRuntime::deserializeCudaEngine: {text}")
        return None


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
