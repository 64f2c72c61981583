"""The denoiser graph in PyTorch, under the runtime's samplers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdexport.denoiser import VISIBLE, Denoiser, DenoiserGraph
from mdexport.head import OUTPUTS
from mdruntime.denoiser import CONDITION
from mdruntime.session import Feeds, Outputs

__all__ = ["TorchPasses"]


class TorchPasses:
    """Passes of a denoiser in float32: satisfies ``mdruntime.Session``."""

    provider = "torch"

    def __init__(self, denoiser: Denoiser, *, compiled: bool = False) -> None:
        """Take a denoiser in float32, and compile its passes where that is wanted."""
        self._denoiser, self._compiled = denoiser, compiled
        self._canvas = 0
        self._caches: list[Tensor] = []
        self._graph: Any = None

    def start(self, canvas: int) -> None:
        """Begin with empty caches for this many rows of the canvas."""
        self._canvas, self._caches = canvas, []

    def run(self, feeds: Feeds, fetch: Sequence[str]) -> Outputs:
        """Run a pass."""
        outputs = self._outputs(feeds)
        return {name: outputs[name] for name in fetch}

    @torch.no_grad()
    def _outputs(self, feeds: Feeds) -> Outputs:
        """Run a pass and return all that the head returns, and the logits."""
        if not self._caches:
            empty = self._denoiser.empty_caches(len(feeds["tokens"]), self._canvas)
            self._caches = list(empty.values())
        tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in feeds.items()}
        extras = {name: tensors.pop(name) for name in list(tensors) if _is_extra(name)}
        if self._graph is None:
            names = [name.removeprefix(CONDITION) for name in extras]
            graph = DenoiserGraph(self._denoiser, names)
            self._graph = _compiled(graph) if self._compiled else graph
        outputs = self._graph(**tensors, extras=list(extras.values()), caches=self._caches)
        *found, logits = outputs
        self._caches = found[len(OUTPUTS) :]
        draws = dict(zip(OUTPUTS, found[: len(OUTPUTS)], strict=True))
        return {name: value.numpy() for name, value in {**draws, "logits": logits}.items()}

    def views(self, sequences: int) -> None:
        """Return None: caches are PyTorch's."""

    def clone(self) -> "TorchPasses":
        """Return a session on the same weights."""
        return TorchPasses(self._denoiser, compiled=self._compiled)

    def close(self) -> None:
        """Drop the caches."""
        self._caches = []


def _compiled(graph: Any) -> Any:
    """Return a graph compiled as PyTorch does by default: from the second size on for all sizes."""
    # Beyond its limit PyTorch would go on uncompiled, with a line in the log.
    config: Any = torch._dynamo.config
    config.recompile_limit, config.fail_on_recompile_limit_hit = 64, True
    return torch.compile(graph)


def _is_extra(name: str) -> bool:
    return name == VISIBLE or name.startswith(CONDITION)
