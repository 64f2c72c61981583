"""Sentences about Python: the data of the ``prose`` model.

The text is Python's own documentation, as Debian's package ``python3.11-doc`` brings it, and the
docstrings of the standard library that runs this file. Markup, code, tables and headings are taken
out; what is left are paragraphs of prose. Whole documents and modules are held out.

    apt-get install python3.11-doc               installs the documentation
    python models/prose.py --sample 5            prints some paragraphs of the data
"""

import argparse
import ast
import hashlib
import re
import sys
import sysconfig
import textwrap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DOCUMENTATION = Path("/usr/share/doc/python3.11/html/_sources")
PACKAGE = "python3.11-doc"
HELD_OUT = 20  # one document in so many
SHORTEST = 60  # characters of a paragraph
LETTERS = 0.78  # least share of a paragraph's letters and spaces


class CorpusError(RuntimeError):
    """The documentation is not on this machine."""


@dataclass(frozen=True, slots=True)
class Document:
    """Paragraphs, one a line."""

    name: str
    text: str

    @property
    def use(self) -> str:
        """``train`` or ``held-out``: a module's documentation and docstrings go together."""
        topic = Path(self.name).name.split(".")[0]
        return "held-out" if zlib.crc32(topic.encode()) % HELD_OUT == 0 else "train"


_SKIPPED = frozenset(  # directives whose body is no prose
    {"code-block", "code", "doctest", "testcode", "testoutput", "testsetup", "testcleanup"}
    | {"productionlist", "toctree", "index", "image", "figure", "highlight", "highlightlang"}
    | {"literalinclude", "parsed-literal", "sourcecode", "math", "raw", "table", "list-table"}
    | {"csv-table", "rubric", "sectionauthor", "moduleauthor", "module", "currentmodule", "only"}
    | {"include", "program", "tabularcolumns", "contents", "comment", "opcode", "impl-detail"}
    | {"default-domain"}
)
_DIRECTIVE = re.compile(r"\.\. +(?:(?P<name>[\w:+-]+)::(?P<rest>.*)|.*)", re.DOTALL)
_BULLET = re.compile(r"^(?:[*+-]|#\.|\(?\d+[.)]|\(?[a-z]\))\s+")
_HEADING = re.compile(r"^(.)\1{2,}\s*$", re.MULTILINE)
_TABLE = re.compile(r"^\s*(?:[|+]|={2,} +={2,})", re.MULTILINE)
_FIELD = re.compile(r"^:[\w -]+:(?:\s|$)")
_INLINE = (  # pattern, replacement
    (re.compile(r"\[#?\w*\]_"), ""),
    (re.compile(r":(?:[\w+.-]+:)+`~(?:[^`<]*\.)?([^`<.]+)`"), r"\1"),
    (re.compile(r":(?:[\w+.-]+:)+`!?([^`<]+?)\s*<[^`]*>`"), r"\1"),
    (re.compile(r":(?:[\w+.-]+:)+`!?([^`]+)`"), r"\1"),
    (re.compile(r"``([^`]*)``"), r"\1"),
    (re.compile(r"`([^`<]+?)\s*<[^`]*>`_{1,2}"), r"\1"),
    (re.compile(r"`([^`]+)`_{0,2}"), r"\1"),
    (re.compile(r"(?<![\w*])\*{1,2}([^\s*][^*]*?)\*{1,2}(?![\w*])"), r"\1"),
    (re.compile(r"\|(\w+)\|"), r"\1"),
    (re.compile(r"\\(.)"), r"\1"),
    (re.compile(r"::\s*$"), ":"),
    (re.compile(r"\s+"), " "),
)
_ASCII = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\u2026\xa0", "''\"\"--. ")


def plain(paragraph: str) -> str:
    """Return a paragraph without its markup, on one line."""
    for pattern, replacement in _INLINE:
        paragraph = pattern.sub(replacement, paragraph)
    return paragraph.translate(_ASCII).strip()


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph on one line consists of sentences."""
    if len(paragraph) < SHORTEST or not paragraph.isascii() or "`" in paragraph:
        return False
    letters = sum(char.isalpha() or char == " " for char in paragraph)
    return letters >= LETTERS * len(paragraph) and paragraph[-1] in ".:!?)"


def paragraphs(markup: str) -> Iterator[str]:
    """Yield the paragraphs of prose in reStructuredText."""
    for body in _blocks(markup):
        if _HEADING.search(body) or _TABLE.search(body) or body.startswith(">>>"):
            continue
        for part in re.split(r"\n(?=(?:[*+-]|#\.) )", body):
            text = plain(_BULLET.sub("", part))
            if not _FIELD.match(part) and is_prose(text):
                yield text


def _blocks(markup: str) -> Iterator[str]:
    """Yield what stands between empty lines, without code and without directives' first blocks."""
    skipped: int | None = None  # indentation that ends what is being skipped
    for block in re.split(r"\n\s*\n", markup.expandtabs()):
        if not block.strip():
            continue
        indent = min(len(line) - len(line.lstrip()) for line in block.splitlines() if line.strip())
        if skipped is not None and indent > skipped:
            continue
        body = textwrap.dedent(block).strip()
        directive = _DIRECTIVE.match(body)
        hides = body.endswith("::") if directive is None else _hides(directive)
        skipped = indent if hides else None
        if not directive:
            yield body


def _hides(directive: re.Match[str]) -> bool:
    """Whether the body of a directive, or of a comment, is no prose."""
    return directive["name"] is None or directive["name"].split(":")[-1] in _SKIPPED


def documentation(folder: Path = DOCUMENTATION) -> Iterator[Document]:
    """Yield the documents of Python's documentation.

    Raises:
        CorpusError: they are not there.
    """
    files = sorted(folder.rglob("*.rst.txt"))
    if not files:
        raise CorpusError(
            f"no *.rst.txt file is in {str(folder)!r}; install them: apt-get install {PACKAGE}"
        )
    for path in files:
        name = path.relative_to(folder).as_posix().removesuffix(".rst.txt")
        yield _document(name, path.read_text(encoding="utf-8"))


def docstrings() -> Iterator[Document]:
    """Yield the docstrings of the standard library, module by module."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part in ("site-packages", "test", "tests", "idlelib") for part in parts):
            continue
        yield _document("/".join(parts), "\n\n".join(docstrings_of(path)))


def docstrings_of(path: Path) -> Iterator[str]:
    """Yield the docstrings of a module, of its classes and functions; empty where there is none."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # some files of lib2to3 are meant to be wrong
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _document(name: str, markup: str) -> Document:
    return Document(name, "\n".join(paragraphs(markup)))


def corpus(
    use: str, *, folder: Path = DOCUMENTATION, partial: bool = False
) -> tuple[Document, ...]:
    """Return the documents of one use, each paragraph once.

    Args:
        use: ``train`` or ``held-out``.
        folder: of the documentation.
        partial: do with the docstrings.
    """
    return tuple(some for some in _distinct(None if partial else folder) if some.use == use)


@cache
def _distinct(folder: Path | None) -> tuple[Document, ...]:
    """Return all documents without the paragraphs that stood in one before."""
    seen: set[str] = set()
    found = []
    for document in [*(documentation(folder) if folder else []), *docstrings()]:
        new = [line for line in document.text.splitlines() if line not in seen]
        seen.update(new)
        if new:
            found.append(Document(document.name, "\n".join(new)))
    return tuple(found)


def digest(documents: tuple[Document, ...]) -> str:
    """Return the first 16 digits of the SHA-256 of a corpus."""
    return hashlib.sha256("\0".join(some.text for some in documents).encode()).hexdigest()[:16]


def main() -> None:
    """Print sizes and a sample of the data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sample", type=int, default=3, metavar="N", help="paragraphs to print")
    parser.add_argument("--partial", action="store_true", help="do with the docstrings")
    options = parser.parse_args()
    for use in ("train", "held-out"):
        documents = corpus(use, partial=options.partial)
        size = sum(len(some.text) for some in documents)
        counts = f"{use}: {len(documents)} documents, {size} characters"
        sys.stdout.write(f"{counts}, {digest(documents)}\n")
        lines = [line for some in documents for line in some.text.splitlines()]
        for line in lines[:: max(1, len(lines) // max(options.sample, 1))][: options.sample]:
            sys.stdout.write(textwrap.indent(textwrap.fill(line, 96), "    ") + "\n")


if __name__ == "__main__":
    main()
