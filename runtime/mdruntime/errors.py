"""What can go wrong, as five exceptions.

MdruntimeError
├── SamplingError      (ValueError)    a request that cannot be sampled; exit code 2
├── BundleError        (ValueError)    a bundle that is damaged, altered or foreign; exit code 1
├── ProviderError      (RuntimeError)  an execution provider or package is missing; exit code 4
├── EngineError        (RuntimeError)  no engine fits machine, bundle or request; exit code 5
└── VerificationError  (RuntimeError)  numbers that are wrong; exit code 3
"""

__all__ = [
    "BundleError",
    "EngineError",
    "MdruntimeError",
    "ProviderError",
    "SamplingError",
    "VerificationError",
]


class MdruntimeError(Exception):
    """Any error of this package; ``exit_code`` is what the command line exits with."""

    exit_code = 1


class SamplingError(MdruntimeError, ValueError):
    """The request is impossible: a label, count, weight or order out of range."""

    exit_code = 2


class BundleError(MdruntimeError, ValueError):
    """The bundle is incomplete, altered, of an unknown format, or not a bundle."""


class ProviderError(MdruntimeError, RuntimeError):
    """The execution provider or the package asked for is not available on this machine."""

    exit_code = 4


class EngineError(MdruntimeError, RuntimeError):
    """No engine was built for this machine and bundle, or none for the sizes of the request."""

    exit_code = 5


class VerificationError(MdruntimeError, RuntimeError):
    """A graph computes numbers that are not those of the model it was exported from."""

    exit_code = 3
