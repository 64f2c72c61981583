"""The stand-in's ONNX parser."""

from pathlib import Path
from typing import Any

import onnx

from tests.standin.trt_api import Api, ILogger, begun, integer
from tests.standin.trt_network import INetworkDefinition

__all__ = ["OnnxParser", "ParserError"]

_LATER = ("Attention", "RMSNormalization", "RotaryEmbedding", "Swish", "TensorScatter")


class ParserError(Api):
    """Why a graph could not be parsed."""

    def _begin(self, code: str, text: str, node: int, name: str, operator: str) -> None:
        self._code, self._text, self._node = code, text, node
        self._name, self._operator = name, operator

    def code(self) -> Any:
        """Kind of error."""
        return getattr(self._state.module.ErrorCode, self._code)

    def desc(self) -> str:
        """Say what is wrong."""
        return self._text

    def node(self) -> int:
        """Index of the node; -1 for the file as a whole."""
        return self._node

    def node_name(self) -> str:
        """Name of the node."""
        return self._name

    def node_operator(self) -> str:
        """Operator of the node."""
        return self._operator


class OnnxParser(Api):
    """Fills a network from an ONNX file."""

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        if not isinstance(network, INetworkDefinition):
            raise TypeError("incompatible constructor arguments: a network is needed")
        self._network = network
        self._logger = begun(logger, ILogger)
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        """How many errors there were."""
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        """Return an error."""
        return self._errors[integer(index)]

    def clear_errors(self) -> None:
        """Forget all errors."""
        self._errors = []

    def parse_from_file(self, model: str) -> bool:
        """Fill the network from a file, and return whether that worked."""
        if not isinstance(model, str):
            raise TypeError(f"incompatible function arguments: {model!r} is no str")
        try:
            found = onnx.load(model)
        except Exception as error:
            return self._wrong("MODEL_DESERIALIZE_FAILED", f"Failed to parse {model}: {error}")
        if not Path(model).is_file() or not found.graph.node:
            return self._wrong("INVALID_GRAPH", "the graph is empty")
        for index, node in enumerate(found.graph.node):
            later = node.op_type in _LATER and self._state.options.api == "10.3"
            if node.domain or later:
                text = f"No importer registered for op: {node.op_type}"
                return self._wrong("UNSUPPORTED_NODE", text, index, node)
        self._network._parsed(found, self)
        return True

    def _wrong(
        self, code: str, text: str, index: int = -1, node: onnx.NodeProto | None = None
    ) -> bool:
        name, operator = ("", "") if node is None else (node.name, node.op_type)
        self._errors.append(self._state.new("ParserError", code, text, index, name, operator))
        self._logger.log(ILogger.ERROR, f"ModelImporter: {text}")
        return False
