"""The stand-in's inspector: what an engine says of its layers."""

import json
from typing import Any

import onnx

from tests.standin.trt_api import Api, integer
from tests.standin.trt_engine import ICudaEngine
from tests.standin.trt_network import data_type

__all__ = ["EngineInspector"]

_SHORT = {"HALF": "Half", "FLOAT": "Float", "BF16": "BFloat16", "BOOL": "Bool"}
_LONG = {"FLOAT": "FP32", "HALF": "FP16"}


class EngineInspector(Api):
    """Tells about the layers of an engine, as far as it was built to."""

    def _begin(self, engine: ICudaEngine) -> None:
        self._engine, self._context = engine, None

    @property
    def execution_context(self) -> Any:
        """A context, for whole sentences about formats."""
        return self._context

    @execution_context.setter
    def execution_context(self, context: Any) -> None:
        self._context = context

    def get_engine_information(self, format: Any) -> str:
        """Return what is known of all layers."""
        layers = [self._layer(index) for index in range(self._engine.num_layers)]
        if self._engine._plan.verbosity == "NONE":
            layers = []
        names = [] if not layers else list(self._engine._values)
        if self._state.expect(format, "LayerInformationFormat").name == "JSON":
            return json.dumps({"Layers": layers, "Bindings": names})
        return "\n".join(map(str, layers))

    def get_layer_information(self, layer_index: int, format: Any) -> str:
        """Return what is known of a layer."""
        self._state.expect(format, "LayerInformationFormat")
        layer = self._layer(integer(layer_index))
        return json.dumps(layer) if format.name == "JSON" else str(layer)

    def _layer(self, index: int) -> Any:
        node = self._engine._model.graph.node[index]
        if self._engine._plan.verbosity != "DETAILED":
            return node.name
        return {
            "Name": node.name,
            "LayerType": node.op_type,
            "Inputs": [self._tensor(name) for name in node.input if name],
            "Outputs": [self._tensor(name) for name in node.output if name],
            "TacticName": "stand-in",
            "StreamId": 0,
            "Metadata": f"[ONNX Layer: {node.name}]",
        }

    def _tensor(self, name: str) -> dict[str, Any]:
        kind = self._engine_types().get(name, "FLOAT")
        if self._engine._plan.single and kind in ("HALF", "BF16"):
            kind = "FLOAT"
        words = _SHORT.get(kind, kind.title())
        if self._context is not None:
            words = f"Row major linear {_LONG.get(kind, kind)} format"
        return {"Name": name, "Location": "Device", "Dimensions": [], "Format/Datatype": words}

    def _engine_types(self) -> dict[str, str]:
        engine: Any = self._engine
        if not hasattr(engine, "_types"):
            graph = onnx.shape_inference.infer_shapes(engine._model).graph
            values = (*graph.input, *graph.output, *graph.value_info)
            types = {v.name: data_type(v.type.tensor_type.elem_type) for v in values}
            types |= {w.name: data_type(w.data_type) for w in graph.initializer}
            engine._types = types
        found: dict[str, str] = engine._types
        return found
