"""The stand-in's network: one layer for every node of an ONNX graph."""

import weakref
from typing import Any

import onnx
from onnx import TensorProto

from tests.standin.memory import MisuseError
from tests.standin.trt_api import Api, Dims, Field, integer

__all__ = ["ILayer", "INetworkDefinition", "ITensor", "data_type"]

_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT8: "INT8",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.UINT8: "UINT8",
    TensorProto.BOOL: "BOOL",
}
_LAYERS = {
    "Cast": "CAST",
    "Concat": "CONCATENATION",
    "Conv": "CONVOLUTION",
    "DequantizeLinear": "DEQUANTIZE",
    "Expand": "SLICE",
    "Gather": "GATHER",
    "GatherElements": "GATHER",
    "GatherND": "GATHER",
    "Gemm": "MATRIX_MULTIPLY",
    "LayerNormalization": "NORMALIZATION",
    "MatMul": "MATRIX_MULTIPLY",
    "QuantizeLinear": "QUANTIZE",
    "Reshape": "SHUFFLE",
    "Resize": "RESIZE",
    "ScatterElements": "SCATTER",
    "ScatterND": "SCATTER",
    "Shape": "SHAPE",
    "Slice": "SLICE",
    "Softmax": "SOFTMAX",
    "Split": "SLICE",
    "TopK": "TOPK",
    "Transpose": "SHUFFLE",
    "Where": "SELECT",
}
_UNARY = ("Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "Log", "Neg", "Not", "Sin", "Sqrt")


def data_type(element: int) -> str:
    """Return the member of ``DataType`` for an ONNX element type."""
    return _TYPES[element]


class ITensor(Api):
    """A tensor of a network."""

    def _begin(self, network: "INetworkDefinition", name: str) -> None:
        self._network, self._name = network, name

    @property
    def name(self) -> str:
        """Name in the ONNX graph."""
        return self._name

    @property
    def dtype(self) -> Any:
        """Element type."""
        return getattr(self._state.module.DataType, data_type(self._network._element(self._name)))

    @property
    def shape(self) -> Dims:
        """Shape, -1 where it is free."""
        return Dims(self._network._shape(self._name))

    @property
    def is_network_input(self) -> bool:
        """Whether it is fed."""
        return self._name in self._network._names("input")

    @property
    def is_network_output(self) -> bool:
        """Whether it is an output, of the graph or marked as one."""
        return self._name in self._network._outputs

    @property
    def is_shape_tensor(self) -> bool:
        """Whether its values decide about shapes; none of our inputs' do."""
        return False


class ILayer(Api):
    """A layer of a network: a node of the ONNX graph."""

    def _begin(self, network: "INetworkDefinition", node: onnx.NodeProto) -> None:
        self._network, self._node = network, node

    @property
    def name(self) -> str:
        """Name of the node."""
        return self._node.name or f"node_of_{self._node.output[0]}"

    @property
    def type(self) -> Any:
        """Kind of layer."""
        operator = self._node.op_type
        kind = _LAYERS.get(operator, "UNARY" if operator in _UNARY else "ELEMENTWISE")
        if operator.startswith("Reduce"):
            kind = "REDUCE"
        return getattr(self._state.module.LayerType, kind)

    @property
    def num_inputs(self) -> int:
        """How many inputs."""
        return len(self._node.input)

    @property
    def num_outputs(self) -> int:
        """How many outputs."""
        return len(self._node.output)

    def get_input(self, index: int) -> ITensor | None:
        """Return an input; None where an optional one is left out."""
        return self._network._tensor(self._node.input[integer(index)])

    def get_output(self, index: int) -> ITensor | None:
        """Return an output."""
        return self._network._tensor(self._node.output[integer(index)])


class INetworkDefinition(Api):
    """A network: empty until a parser fills it."""

    name = Field("", str)

    def _begin(self, strongly_typed: bool, flags: int) -> None:
        self._model: onnx.ModelProto | None = None
        self._parser: weakref.ref[object] | None = None
        self._strongly_typed, self._flags = strongly_typed, flags
        self._outputs: list[str] = []
        self._tensors: dict[str, ITensor] = {}
        self._inferred: dict[str, onnx.TypeProto] = {}

    @property
    def flags(self) -> int:
        """What it was made with."""
        return self._flags

    def get_flag(self, flag: Any) -> bool:
        """Return whether a flag is set."""
        return bool(self._flags >> int(self._state.expect(flag, type(flag).__name__)) & 1)

    @property
    def num_inputs(self) -> int:
        """How many inputs."""
        return len(self._names("input"))

    @property
    def num_outputs(self) -> int:
        """How many outputs."""
        return len(self._outputs)

    @property
    def num_layers(self) -> int:
        """How many layers."""
        return 0 if self._model is None else len(self._model.graph.node)

    def get_input(self, index: int) -> ITensor | None:
        """Return an input."""
        return self._tensor(self._names("input")[integer(index)])

    def get_output(self, index: int) -> ITensor | None:
        """Return an output."""
        return self._tensor(self._outputs[integer(index)])

    def get_layer(self, index: int) -> ILayer:
        """Return a layer."""
        assert self._model is not None
        made: ILayer = self._state.new("ILayer", self, self._model.graph.node[integer(index)])
        return made

    def mark_output(self, tensor: ITensor) -> None:
        """Make a tensor an output."""
        if not isinstance(tensor, ITensor):
            raise TypeError(f"incompatible function arguments: {tensor!r} is no ITensor")
        if tensor.name not in self._outputs:
            self._outputs.append(tensor.name)

    def unmark_output(self, tensor: ITensor) -> None:
        """Make a tensor no output."""
        self._outputs.remove(tensor.name)

    def _graph(self) -> onnx.ModelProto:
        """Return what was parsed, whose weights the parser owns."""
        if self._model is None or not self._outputs:
            raise ValueError("Network must have at least one output")
        if self._parser is None or self._parser() is None:
            raise MisuseError("the parser that owns the network's weights is gone")
        return self._model

    def _parsed(self, model: onnx.ModelProto, parser: object) -> None:
        self._model = model
        self._parser = weakref.ref(parser)
        self._outputs = self._names("output")
        bare = onnx.ModelProto()
        bare.CopyFrom(model)
        inferred = onnx.shape_inference.infer_shapes(bare)
        graph = inferred.graph
        self._inferred = {v.name: v.type for v in (*graph.input, *graph.output, *graph.value_info)}
        for weight in model.graph.initializer:
            kind = onnx.helper.make_tensor_type_proto(weight.data_type, list(weight.dims))
            self._inferred[weight.name] = kind

    def _names(self, side: str) -> list[str]:
        if self._model is None:
            return []
        return [value.name for value in getattr(self._model.graph, side)]

    def _element(self, name: str) -> int:
        return self._inferred[name].tensor_type.elem_type

    def _shape(self, name: str) -> list[int]:
        dims = self._inferred[name].tensor_type.shape.dim
        return [dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims]

    def _axes(self, name: str) -> list[str]:
        return [dim.dim_param for dim in self._inferred[name].tensor_type.shape.dim]

    def _tensor(self, name: str) -> ITensor | None:
        if not name:
            return None
        if name not in self._tensors:
            self._tensors[name] = self._state.new("ITensor", self, name)
        return self._tensors[name]
