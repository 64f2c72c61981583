"""The stand-in's builder: it checks what the real one checks, and packs the graph into a plan."""

import time
from collections.abc import Callable

import onnx

from tests.standin.faults import misfuse
from tests.standin.trt_api import Api, IHostMemory, ILogger, IProgressMonitor, State, begun, integer
from tests.standin.trt_config import IBuilderConfig, IOptimizationProfile
from tests.standin.trt_network import INetworkDefinition
from tests.standin.trt_plan import Plan, Shapes

__all__ = ["Builder"]

_STEPS = 20
_PRECISIONS = ("FP16", "BF16", "INT8", "FP8", "OBEY_PRECISION_CONSTRAINTS")
_NULL = "pybind11::init(): factory function returned nullptr"


class RefusalError(Exception):
    """Why nothing is built."""


class Builder(Api):
    """Builds plans."""

    _state: State

    def __init__(self, logger: ILogger) -> None:
        self._logger = begun(logger, ILogger)
        options = self._state.options
        if not options.devices or options.driver[0] < options.runtime[0]:
            raise TypeError(_NULL)

    @property
    def logger(self) -> ILogger:
        """Who is told what happens."""
        return self._logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        """Return an empty network; ``flags`` are bits."""
        members = self._state.module.NetworkDefinitionCreationFlag.__members__.values()
        if integer(flags) >> len(members):
            raise TypeError(_NULL)
        flag = self._state.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        typed = self._state.options.api != "10.3" or bool(flags >> int(flag) & 1)
        made: INetworkDefinition = self._state.new("INetworkDefinition", typed, flags)
        return made

    def create_builder_config(self) -> IBuilderConfig:
        """Return a configuration of defaults."""
        made: IBuilderConfig = self._state.new("IBuilderConfig")
        return made

    def create_optimization_profile(self) -> IOptimizationProfile:
        """Return a profile without shapes."""
        made: IOptimizationProfile = self._state.new("IOptimizationProfile")
        return made

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> IHostMemory | None:
        """Return a plan; None where it cannot be built, and the logger knows why."""
        try:
            self._check(network, config)
            profiles = self._profiles(network, config)
            self._work(network, config)
        except RefusalError as refusal:
            self._logger.log(ILogger.ERROR, f"IBuilder::buildSerializedNetwork: {refusal}")
            return None
        return IHostMemory(self._pack(network, config, profiles))

    def _check(self, network: INetworkDefinition, config: IBuilderConfig) -> None:
        try:
            model = network._graph()
        except ValueError as error:
            raise RefusalError(f"Error Code 4: API Usage Error ({error})") from None
        asked = config._flags.intersection(_PRECISIONS)
        if network._strongly_typed and asked:
            raise RefusalError(
                f"Error Code 4: API Usage Error (flags {sorted(asked)} in a strongly typed network)"
            )
        known = {name for node in model.graph.node for name in node.output}
        lost = set(network._outputs) - known - set(network._names("input"))
        if lost:
            raise RefusalError(f"Error Code 4: API Usage Error (no layer makes {sorted(lost)})")

    def _profiles(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> tuple[dict[str, Shapes], ...]:
        shapes = {name: tuple(network._shape(name)) for name in network._names("input")}
        free = {name for name, shape in shapes.items() if -1 in shape}
        if free and not config._profiles:
            raise RefusalError(
                "Error Code 4: API Usage Error (Network has dynamic or shape inputs, but no "
                "optimization profile has been defined.)"
            )
        given = [profile._shapes for profile in config._profiles] or [{}]
        return tuple(self._profile(network, shapes, one) for one in given)

    def _profile(
        self,
        network: INetworkDefinition,
        shapes: dict[str, tuple[int, ...]],
        given: dict[str, Shapes],
    ) -> dict[str, Shapes]:
        unknown = sorted(set(given) - set(shapes))
        if unknown:
            raise RefusalError(f"Error Code 4: API Usage Error ({unknown} are no inputs)")
        done = {}
        axes: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            if name not in given and -1 in shape:
                raise RefusalError(f"Error Code 4: API Usage Error ({name}: no shape in a profile)")
            triple = given.get(name, (shape, shape, shape))
            for size, sizes in zip(shape, zip(*triple, strict=True), strict=False):
                if len(triple[0]) != len(shape) or (size != -1 and set(sizes) != {size}):
                    raise RefusalError(
                        f"Error Code 4: API Usage Error ({name}: profile {triple} does not fit "
                        f"{shape})"
                    )
            self._same_axes(network, name, triple, axes)
            done[name] = triple
        return done

    def _same_axes(
        self,
        network: INetworkDefinition,
        name: str,
        triple: Shapes,
        axes: dict[str, tuple[int, ...]],
    ) -> None:
        """Refuse a profile that gives two sizes to one named axis."""
        for axis, sizes in zip(network._axes(name), zip(*triple, strict=True), strict=True):
            if axis and axes.setdefault(axis, sizes) != sizes:
                raise RefusalError(
                    f"Error Code 4: API Usage Error ({name}: axis {axis} is {sizes} here and "
                    f"{axes[axis]} elsewhere in the profile)"
                )

    def _work(self, network: INetworkDefinition, config: IBuilderConfig) -> None:
        """Pass the time that building takes, telling the monitor."""
        wanted = {node.op_type + node.output[0] for node in network._graph().graph.node}
        cache = config._cache
        known = cache is not None and wanted <= cache._entries
        seconds = self._state.options.build_seconds * (0.1 if known else 1.0)
        monitor = config._monitor
        if monitor is None:
            self._steps(seconds, lambda step: True)
        else:
            self._told(seconds, monitor)
        if cache is not None:
            cache._entries |= wanted

    def _told(self, seconds: float, monitor: IProgressMonitor) -> None:
        """Do the steps under two nested phases of a monitor."""
        outer, inner = "Building Engine", "Tactic Selection"
        monitor.phase_start(outer, None, _STEPS)
        monitor.phase_start(inner, outer, _STEPS)
        try:
            self._steps(
                seconds,
                lambda step: all(monitor.step_complete(phase, step) for phase in (inner, outer)),
            )
        finally:
            monitor.phase_finish(inner)
            monitor.phase_finish(outer)

    def _steps(self, seconds: float, goes_on: Callable[[int], bool]) -> None:
        for step in range(_STEPS):
            time.sleep(seconds / _STEPS)
            if not goes_on(step):
                raise RefusalError("Error Code 2: Internal Error (build cancelled by monitor)")
            if self._state.options.unimplemented and step == _STEPS // 2:
                self._run_out()

    def _run_out(self) -> None:
        """Fail as builders do that have too little memory."""
        log = self._logger.log
        log(
            ILogger.WARNING,
            "Tactic Device request: 6144MB Available: 2048MB. Device memory is insufficient to use "
            "tactic.",
        )
        log(ILogger.ERROR, "[defaultAllocator.cpp] Error Code 1: Cuda Runtime (out of memory)")
        raise RefusalError(
            "Error Code 10: Internal Error (Could not find any implementation for node "
            "{ForeignNode[/blocks.0/attention...]}.)"
        )

    def _pack(
        self,
        network: INetworkDefinition,
        config: IBuilderConfig,
        profiles: tuple[dict[str, Shapes], ...],
    ) -> bytes:
        options = self._state.options
        model = onnx.ModelProto()
        model.CopyFrom(network._graph())
        outputs = network._outputs
        kinds = network._inferred
        del model.graph.output[:]
        model.graph.output.extend(
            onnx.ValueInfoProto(name=name, type=kinds[name]) for name in outputs
        )
        if options.fault or options.stubborn:
            misfuse(model, set(outputs), stubborn=options.stubborn)
        operators = {node.op_type for node in model.graph.node}
        weak = not network._strongly_typed and "FP16" not in config._flags
        plan = Plan(
            version=options.tensorrt,
            name=options.name,
            compute_capability=options.compute_capability,
            version_compatible="VERSION_COMPATIBLE" in config._flags,
            hardware=config.hardware_compatibility_level.name,
            verbosity=config.profiling_verbosity.name,
            profiles=profiles,
            single=options.single or weak,
            nan=options.nan,
            quantised="DequantizeLinear" in operators,
        )
        return plan.pack(model.SerializeToString())
