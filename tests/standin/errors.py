"""The error codes of the CUDA runtime that a stand-in answers with."""

from enum import IntEnum

__all__ = ["CodeError", "Cuda"]


class Cuda(IntEnum):
    """Members of ``cudaError_t``."""

    SUCCESS = 0
    INVALID_VALUE = 1
    MEMORY_ALLOCATION = 2
    INITIALIZATION_ERROR = 3
    INSUFFICIENT_DRIVER = 35
    NO_DEVICE = 100
    INVALID_DEVICE = 101
    INVALID_RESOURCE_HANDLE = 400
    NOT_READY = 600
    ILLEGAL_ADDRESS = 700
    LAUNCH_FAILURE = 719
    NOT_SUPPORTED = 801
    STREAM_CAPTURE_UNSUPPORTED = 900
    STREAM_CAPTURE_INVALIDATED = 901
    STREAM_CAPTURE_UNMATCHED = 903
    STREAM_CAPTURE_IMPLICIT = 906
    UNKNOWN = 999

    @property
    def label(self) -> str:
        """Its name in the header."""
        kind = "" if self is Cuda.SUCCESS else "Error"
        return f"cuda{kind}{self.name.title().replace('_', '')}"


class CodeError(Exception):
    """A call of the CUDA runtime answers with this code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code
