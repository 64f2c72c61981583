"""The stand-in's builder configuration: flags, memory, profiles, timing cache."""

import json
from typing import Any

from tests.standin.trt_api import Api, Dims, Field, IHostMemory, IProgressMonitor, begun, integer
from tests.standin.trt_plan import Shapes

__all__ = ["IBuilderConfig", "IOptimizationProfile", "ITimingCache"]


class IOptimizationProfile(Api):
    """The shapes that an engine has to serve, and the one it is made for."""

    extra_memory_target = Field(1.0, float)

    def _begin(self) -> None:
        self._shapes: dict[str, Shapes] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        """Set the smallest, the best and the largest shape of an input."""
        low, best, high = (tuple(map(integer, shape)) for shape in (min, opt, max))
        if not len(low) == len(best) == len(high) or not all(
            0 <= a <= b <= c for a, b, c in zip(low, best, high, strict=True)
        ):
            raise ValueError(f"Shape provided for min, opt or max is inconsistent for {input}")
        self._shapes[input] = (low, best, high)

    def get_shape(self, input: str) -> list[Dims]:
        """Return what was set; empty where nothing was."""
        return [Dims(shape) for shape in self._shapes.get(input, ())]

    def __bool__(self) -> bool:
        return True


class ITimingCache(Api):
    """What earlier builds measured, for one device and version."""

    def _begin(self, head: list[Any], entries: set[str]) -> None:
        self._head, self._entries = head, entries

    def serialize(self) -> IHostMemory:
        """Return it as bytes."""
        return IHostMemory(json.dumps([self._head, sorted(self._entries)]).encode())

    def combine(self, input_cache: "ITimingCache", ignore_mismatch: bool) -> bool:
        """Add another cache's entries, and return whether they fit."""
        if input_cache._head != self._head and not ignore_mismatch:
            return False
        self._entries |= input_cache._entries
        return True

    def reset(self) -> bool:
        """Forget everything."""
        self._entries.clear()
        return True


class IBuilderConfig(Api):
    """How a network is to be built."""

    avg_timing_iterations = Field(1, int)
    builder_optimization_level = Field(3, int)
    engine_capability = Field("STANDARD", "EngineCapability")
    hardware_compatibility_level = Field("NONE", "HardwareCompatibilityLevel")
    max_aux_streams = Field(0, int)
    max_num_tactics = Field(-1, int)
    profiling_verbosity = Field("LAYER_NAMES_ONLY", "ProfilingVerbosity")

    def _begin(self) -> None:
        self._flags = {"TF32"}
        self._pools = {"WORKSPACE": self._state.options.memory}
        self._profiles: list[IOptimizationProfile] = []
        self._monitor: IProgressMonitor | None = None
        self._cache: ITimingCache | None = None
        self._features: dict[str, bool] = {}

    @property
    def flags(self) -> int:
        """All flags, as bits."""
        members = self._state.module.BuilderFlag
        return sum(1 << int(getattr(members, name)) for name in self._flags)

    @property
    def num_optimization_profiles(self) -> int:
        """How many profiles there are."""
        return len(self._profiles)

    @property
    def progress_monitor(self) -> IProgressMonitor | None:
        """Who is told how far the build is."""
        return self._monitor

    @progress_monitor.setter
    def progress_monitor(self, monitor: IProgressMonitor | None) -> None:
        self._monitor = None if monitor is None else begun(monitor, IProgressMonitor)

    def set_flag(self, flag: Any) -> None:
        """Set a flag."""
        self._flags.add(self._state.expect(flag, "BuilderFlag").name)

    def clear_flag(self, flag: Any) -> None:
        """Clear a flag."""
        self._flags.discard(self._state.expect(flag, "BuilderFlag").name)

    def get_flag(self, flag: Any) -> bool:
        """Return whether a flag is set."""
        return self._state.expect(flag, "BuilderFlag").name in self._flags

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        """Set how much memory building may take."""
        self._pools[self._state.expect(pool, "MemoryPoolType").name] = integer(pool_size)

    def get_memory_pool_limit(self, pool: Any) -> int:
        """Return how much memory building may take."""
        return self._pools.get(self._state.expect(pool, "MemoryPoolType").name, 0)

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        """Switch a preview feature."""
        self._features[self._state.expect(feature, "PreviewFeature").name] = enable

    def get_preview_feature(self, feature: Any) -> bool:
        """Return whether a preview feature is on."""
        return self._features.get(self._state.expect(feature, "PreviewFeature").name, False)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        """Add a profile, and return its index."""
        if not isinstance(profile, IOptimizationProfile):
            raise TypeError(f"incompatible function arguments: {profile!r} is no profile")
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: Any) -> ITimingCache | None:
        """Return a timing cache from bytes, or an empty one from none."""
        data = bytes(serialized_timing_cache)
        head = self._timing_head()
        if not data:
            return self._state.new("ITimingCache", head, set())
        try:
            found, entries = json.loads(data)
        except ValueError:
            return None
        return self._state.new("ITimingCache", found, set(entries))

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        """Use a timing cache, and return whether it fits this device and version."""
        if not isinstance(cache, ITimingCache):
            raise TypeError(f"incompatible function arguments: {cache!r} is no ITimingCache")
        if cache._head != self._timing_head() and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        """Return the timing cache in use."""
        return self._cache

    def _timing_head(self) -> list[Any]:
        options = self._state.options
        return [options.tensorrt, options.name, list(options.compute_capability)]
