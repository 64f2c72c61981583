"""One pipeline's side of a device: a stream, and the memory that its engines compute in."""

import os

from mdruntime.cuda import Cuda, DeviceBuffer, Stream
from mdruntime.errors import ProviderError

__all__ = ["Activations", "Guard", "TrtDevice", "rounded"]

_ALIGNMENT = 256  # bytes; of every address that TensorRT is given


def rounded(nbytes: int) -> int:
    """Return a size rounded up so that what follows is aligned as TensorRT asks for."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class Guard:
    """Knows the process that opened CUDA: none made from it by fork may use it."""

    def __init__(self) -> None:
        """Belong to this process."""
        self._process = os.getpid()

    @property
    def forked(self) -> bool:
        """Whether this is a process made by fork."""
        return os.getpid() != self._process

    def check(self) -> None:
        """Refuse to go on in a process made by fork.

        Raises:
            ProviderError: it is one.
        """
        if self.forked:
            raise ProviderError(
                f"this bundle was opened in process {self._process}, and CUDA cannot be used in a "
                f"process that was made from it by fork ({os.getpid()}); open the bundle in the "
                "new process, and start that by multiprocessing.get_context('spawn')"
            )


class Activations:
    """Memory for what engines compute in between: one block for all that run in turn."""

    def __init__(self, cuda: Cuda) -> None:
        """Begin with no memory."""
        self._cuda = cuda
        self._block: DeviceBuffer | None = None
        self._users = 0
        self.generation = 0  # another one means another address

    @property
    def address(self) -> int:
        """Where the block begins."""
        assert self._block is not None
        return self._block.address

    @property
    def nbytes(self) -> int:
        """Its size."""
        return 0 if self._block is None else self._block.nbytes

    def acquire(self, nbytes: int) -> None:
        """Be one more user, of so many bytes at least; nothing may be running."""
        if nbytes > self.nbytes or self._block is None:
            self._free()  # before there is a larger one: both may not fit
            self._block = self._cuda.allocate(max(nbytes, _ALIGNMENT))
            self.generation += 1
        self._users += 1

    def release(self) -> None:
        """Be one user less; the last one gives the memory back."""
        self._users -= 1
        if not self._users:
            self._free()

    def _free(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            block.free()


class TrtDevice:
    """A stream and shared activations, for as long as a session uses them."""

    def __init__(self, cuda: Cuda) -> None:
        """Take CUDA; nothing is created yet."""
        self.cuda = cuda
        self.guard = Guard()
        self.activations = Activations(cuda)
        self._stream: Stream | None = None
        self._users = 0

    @property
    def stream(self) -> Stream:
        """The stream on which all work of this pipeline is done, in order."""
        assert self._stream is not None
        return self._stream

    def acquire(self) -> None:
        """Be one more user."""
        if self._stream is None:
            self._stream = self.cuda.stream()
        self._users += 1

    def release(self) -> None:
        """Be one user less; with the last one the stream goes."""
        self._users -= 1
        if not self._users and self._stream is not None:
            stream, self._stream = self._stream, None
            stream.close()

    def clone(self) -> "TrtDevice":
        """Return the same for another thread, with a stream and activations of its own."""
        self.guard.check()
        return TrtDevice(self.cuda)
