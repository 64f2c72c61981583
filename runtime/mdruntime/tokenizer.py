"""Text to token ids and back: tokenizers of files, and one for models of plain bytes.

The file format is that of the tokenizers package (``tokenizer.json``), which is imported only
where a bundle brings such a file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from mdruntime.errors import BundleError, ProviderError, SamplingError

__all__ = [
    "BYTES",
    "IDS",
    "ByteTokenizer",
    "FileTokenizer",
    "IdTokenizer",
    "Tokenizer",
    "open_tokenizer",
]

BYTES = "bytes"
"""In the place of a file's name: ids are the bytes of UTF-8."""

IDS = "ids"
"""In the place of a file's name: a text is its ids in decimal, for models without a tokenizer."""


class Tokenizer(Protocol):
    """From text to ids and back."""

    @property
    def size(self) -> int:
        """Number of ids; all are below it."""

    def encode(self, text: str, *, inside: bool = False) -> list[int]:
        """Return the ids of a text, without any that mark its begin or end.

        Args:
            text: what looks like a special token in it is text too.
            inside: other text stands before it, which is not known yet.
        """

    def decode(self, ids: Sequence[int], *, inside: bool = False) -> str:
        """Return the text of ids; ``inside`` says that other text stands before it."""


class ByteTokenizer:
    """Ids are the bytes of UTF-8."""

    size = 256

    def encode(self, text: str, *, inside: bool = False) -> list[int]:
        """Return the bytes of a text."""
        return list(text.encode())

    def decode(self, ids: Sequence[int], *, inside: bool = False) -> str:
        """Return the text of bytes; those that are no UTF-8 become U+FFFD."""
        return bytes(i for i in ids if i < self.size).decode(errors="replace")


class IdTokenizer:
    """A text is its ids in decimal, with blanks between."""

    def __init__(self, size: int) -> None:
        """Take the number of ids."""
        self.size = size

    def encode(self, text: str, *, inside: bool = False) -> list[int]:
        """Return the ids that a text lists.

        Raises:
            SamplingError: something else than ids of the model.
        """
        words = text.split()
        for word in words:
            if not word.isdecimal() or int(word) >= self.size:
                raise SamplingError(
                    f"this model has no tokenizer: a text must be ids below {self.size} with "
                    f"blanks between, got {word[:40]!r}"
                )
        return [int(word) for word in words]

    def decode(self, ids: Sequence[int], *, inside: bool = False) -> str:
        """Return ids in decimal."""
        text = " ".join(map(str, ids))
        return f" {text}" if inside else text


class FileTokenizer:
    """A tokenizer in the format of the tokenizers package."""

    def __init__(self, path: Path) -> None:
        """Read ``tokenizer.json``.

        Raises:
            ProviderError: the tokenizers package is not installed.
            BundleError: the file is no tokenizer.
        """
        try:
            from tokenizers import Tokenizer as Reader
        except ImportError:
            raise ProviderError(
                "this model's texts need the tokenizers package; install it with: "
                "python -m pip install tokenizers"
            ) from None
        try:
            self._reader: Any = Reader.from_file(str(path))
        except Exception as error:  # the package raises plain exceptions
            raise BundleError(
                f"{path.name} is not a tokenizer ({error}); export the bundle again"
            ) from None
        # A prompt must come through whole, and "<|endoftext|>" in it is what somebody wrote.
        self._reader.no_truncation()
        self._reader.no_padding()
        self._reader.encode_special_tokens = True
        # Many tokenizers mark the begin of a text, or drop a blank there. What stands inside is
        # encoded behind a line feed, which merges with nothing, and decoded behind a full stop,
        # since line feeds may be bytes that spoil the ones after them.
        self._before, self._ahead = self._some("\n"), self._some(".")

    @property
    def size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._reader.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, inside: bool = False) -> list[int]:
        """Return the ids of a text, without any that mark its begin or end.

        Raises:
            SamplingError: the tokenizer has no ids for it.
        """
        if inside and self._before:
            count = len(self._before)
            ids = self._ids(f"\n{text}")
            if ids[:count] == self._before:
                return ids[count:]
        return self._ids(text)

    def decode(self, ids: Sequence[int], *, inside: bool = False) -> str:
        """Return the text of ids, without those that mark begin or end."""
        if not inside:
            return self._text(ids)
        return self._text([*self._ahead, *ids]).removeprefix(self._text(self._ahead))

    def _ids(self, text: str) -> list[int]:
        try:
            return list(self._reader.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # the package raises plain exceptions
            raise SamplingError(f"the tokenizer cannot read {text[:40]!r} ({error})") from None

    def _some(self, text: str) -> list[int]:
        try:
            return self._ids(text)
        except SamplingError:  # then texts have no such character
            return []

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._reader.decode(list(ids), skip_special_tokens=True))


def open_tokenizer(folder: Path, name: str, size: int) -> Tokenizer:
    """Return the tokenizer of a bundle.

    Args:
        folder: of the bundle.
        name: ``BYTES``, ``IDS``, or a file inside the folder.
        size: number of ids that the model knows.
    """
    if name == IDS:
        return IdTokenizer(size)
    return ByteTokenizer() if name == BYTES else FileTokenizer(folder / name)
