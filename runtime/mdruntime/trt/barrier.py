"""A barrier against fusion: what attention reads becomes an output of the network.

Fusing the products of queries, keys and values into what follows them went wrong in several
versions of TensorRT, in half precision and without a warning (NVIDIA/TensorRT issue 4837,
NVIDIA/TensorRT-Edge-LLM issues 105 and 151). A tensor that is an output has to exist in memory, so
that nothing is fused across it.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

__all__ = ["mark_attention"]


def mark_attention(trt: ModuleType, network: Any) -> tuple[str, ...]:
    """Mark the queries, keys and values of every attention as outputs, and return their names."""
    graph = _Graph(trt, network)
    marked: dict[str, Any] = {}
    for softmax in graph.layers(trt.LayerType.SOFTMAX):
        for tensor in graph.attended(softmax):
            marked.setdefault(tensor.name, tensor)
    names = []
    for name, tensor in marked.items():
        if not tensor.is_network_output and not tensor.is_network_input:
            network.mark_output(tensor)
            names.append(name)
    return tuple(names)


class _Graph:
    """Which layer makes a tensor, and which ones read it."""

    def __init__(self, trt: ModuleType, network: Any) -> None:
        kinds = trt.LayerType
        self._product = kinds.MATRIX_MULTIPLY
        self._passing = (kinds.CAST, kinds.IDENTITY, kinds.SHUFFLE)
        self._constant = kinds.CONSTANT
        self._layers = [network.get_layer(index) for index in range(network.num_layers)]
        self._makers: dict[str, Any] = {}
        self._readers: dict[str, list[Any]] = {}
        for layer in self._layers:
            for tensor in _outputs(layer):
                self._makers[tensor.name] = layer
            for tensor in _inputs(layer):
                self._readers.setdefault(tensor.name, []).append(layer)

    def layers(self, kind: Any) -> list[Any]:
        """Return the layers of a kind."""
        return [layer for layer in self._layers if layer.type == kind]

    def attended(self, softmax: Any) -> list[Any]:
        """Return queries, keys and values around a softmax, or nothing: a head has one too."""
        scores = self._maker(softmax.get_input(0))
        mixed = self._reader(softmax.get_output(0))
        if scores is None or mixed is None:
            return []
        values = [tensor for tensor in _inputs(mixed) if not self._comes_from(tensor, softmax)]
        found = [*_inputs(scores), *values]
        return [] if any(self._is_constant(tensor) for tensor in found) else found

    def _maker(self, tensor: Any) -> Any:
        """Return the product that a tensor comes from, through casts and reshapes."""
        layer = self._makers.get(tensor.name)
        while layer is not None and layer.type in self._passing:
            layer = self._makers.get(layer.get_input(0).name)
        return layer if layer is not None and layer.type == self._product else None

    def _reader(self, tensor: Any) -> Any:
        """Return the product that reads a tensor, through casts and reshapes."""
        for layer in self._readers.get(tensor.name, []):
            if layer.type == self._product:
                return layer
            if layer.type in self._passing:
                found = self._reader(layer.get_output(0))
                if found is not None:
                    return found
        return None

    def _comes_from(self, tensor: Any, source: Any) -> bool:
        layer = self._makers.get(tensor.name)
        while layer is not None and layer.type in self._passing:
            layer = self._makers.get(layer.get_input(0).name)
        return layer is source

    def _is_constant(self, tensor: Any) -> bool:
        layer = self._makers.get(tensor.name)
        return layer is not None and layer.type == self._constant


def _inputs(layer: Any) -> Iterator[Any]:
    """Yield the inputs of a layer; optional ones may be left out."""
    for index in range(layer.num_inputs):
        tensor = layer.get_input(index)
        if tensor is not None:
            yield tensor


def _outputs(layer: Any) -> Iterator[Any]:
    for index in range(layer.num_outputs):
        tensor = layer.get_output(index)
        if tensor is not None:
            yield tensor
