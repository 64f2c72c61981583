"""What TensorRT's real bindings offer, and what of it a program touches.

Run as a script, it prints the surface of real bindings as JSON: ``python surface.py FOLDER``.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Use", "accepts", "defined_in", "dump", "signatures", "uses"]

Version = tuple[int, ...]
_SPLIT = re.compile(r",(?![^\[\(<]*[\]\)>])")


def dump(folder: str) -> dict[str, Any]:
    """Return the surface of the bindings in a folder.

    Returns:
        ``version``, ``enums`` (name to member to number), ``classes`` (name to member to its
        docstring, "" for what is no function) and ``functions``.
    """
    sys.path.insert(0, folder)
    import tensorrt_bindings as trt  # type: ignore[import-not-found,unused-ignore]

    enums: dict[str, dict[str, int]] = {}
    classes: dict[str, dict[str, str]] = {}
    others: list[str] = []
    for name in dir(trt):
        value = getattr(trt, name)
        if hasattr(value, "__members__"):
            enums[name] = {member: int(number) for member, number in value.__members__.items()}
        elif isinstance(value, type):
            classes[name] = {member: _doc(value, member) for member in dir(value)}
        else:
            others.append(name)
    severity = trt.ILogger.Severity.__members__
    enums["Severity"] = {member: int(number) for member, number in severity.items()}
    return {
        "version": trt.__version__,
        "enums": enums,
        "classes": classes,
        "functions": others,
    }


def _doc(cls: type, member: str) -> str:
    value = getattr(cls, member)
    return (value.__doc__ or "") if callable(value) and not isinstance(value, type) else ""


def signatures(doc: str, name: str) -> list[list[str]]:
    """Return the parameters of every overload, each as ``name`` or ``name=``, without self."""
    found = re.findall(rf"^(?:\d+\. )?{name}\((.*)\)(?: ->.*)?$", doc, re.MULTILINE)
    overloads = [one for one in found if not one.startswith("*args")]
    return [_parameters(one) for one in overloads]


def _parameters(text: str) -> list[str]:
    names = []
    for part in _SPLIT.split(text):
        label, _, rest = part.strip().partition(":")
        if label and label != "self" and not re.match(r"arg\d+$", label):
            names.append(label + ("=" if "=" in rest else ""))
        elif label.startswith("arg"):
            names.append(label)
    return names


def accepts(overload: Sequence[str], positional: int, keywords: Sequence[str]) -> bool:
    """Return whether an overload can be called so."""
    names = [name.rstrip("=") for name in overload]
    needed = [name for name in overload[positional:] if not name.endswith("=")]
    return (
        positional <= len(names)
        and set(keywords) <= set(names[positional:])
        and set(needed) <= set(keywords)
    )


@dataclass(frozen=True)
class Use:
    """A name that a program touches.

    Attributes:
        path: from the module on, such as ``trt.BuilderFlag.TF32``, or from an object whose class
            is not known, such as ``engine.num_io_tensors``.
        where: file and line.
        call: number of positional arguments and names of the others, where it is called.
        below: the versions that get there are lower than each of these.
        above: the versions that get there are not lower than any of these.
        optional: it is only touched where it exists.
    """

    path: tuple[str, ...]
    where: str
    call: tuple[int, tuple[str, ...]] | None = None
    below: tuple[Version, ...] = ()
    above: tuple[Version, ...] = ()
    optional: bool = False

    def reached_by(self, version: Version) -> bool:
        """Return whether a version of TensorRT gets there."""
        return all(version < one for one in self.below) and all(version >= o for o in self.above)


def uses(paths: Sequence[Path]) -> Iterator[Use]:
    """Yield every attribute that some files touch, but those of the modules they import."""
    for path in paths:
        walker = _Walker(path.name)
        walker.visit(ast.parse(path.read_text("utf-8")))
        yield from walker.found


@dataclass
class _Walker(ast.NodeVisitor):
    file: str
    found: list[Use] = field(default_factory=list)
    imported: set[str] = field(default_factory=set)
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    below: tuple[Version, ...] = ()
    above: tuple[Version, ...] = ()
    optional: frozenset[str] = frozenset()

    def visit_Import(self, node: ast.Import) -> None:
        self.imported |= {(name.asname or name.name).split(".")[0] for name in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.imported |= {name.asname or name.name for name in node.names}

    def visit_Assign(self, node: ast.Assign) -> None:
        self._alias(node.targets[0], node.value)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._alias(node.target, node.value)
        self.generic_visit(node)

    def _alias(self, target: ast.expr, value: ast.expr | None) -> None:
        """Remember what names stand for a part of the module: ``kinds = trt.LayerType``."""
        pairs = [(target, value)]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = list(zip(target.elts, value.elts, strict=False))
        for name, part in pairs:
            chain = self._chain(part) if isinstance(part, ast.Attribute) else ()
            if isinstance(name, ast.Name):
                self.aliases.pop(name.id, None)
                if chain and chain[0] == "trt":
                    self.aliases[name.id] = chain

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        before = self.below, self.above, self.optional
        self._narrow(node.test, taken=True)
        for statement in node.body:
            self.visit(statement)
        self.below, self.above, self.optional = before
        self._narrow(node.test, taken=False)
        for statement in node.orelse:
            self.visit(statement)
        self.below, self.above, self.optional = before

    def _narrow(self, test: ast.expr, *, taken: bool) -> None:
        """Follow a switch on the version, or on whether a name exists."""
        if isinstance(test, ast.Call) and ast.unparse(test.func) == "hasattr" and taken:
            self.optional |= {ast.literal_eval(test.args[1])}
        if not isinstance(test, ast.Compare) or "version" not in ast.unparse(test.left):
            return
        try:
            limit = ast.literal_eval(test.comparators[0])
        except ValueError:
            return
        lower = isinstance(test.ops[0], ast.Lt)
        if isinstance(limit, tuple) and isinstance(test.ops[0], ast.Lt | ast.GtE):
            if lower == taken:
                self.below += (limit,)
            else:
                self.above += (limit,)

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func) == "getattr" and isinstance(node.args[1], ast.Constant):
            receiver = self._chain(node.args[0])
            name = str(node.args[1].value)
            self._add((*receiver, name), node, None, optional=len(node.args) == 3)
        if isinstance(node.func, ast.Attribute):
            starred = any(isinstance(one, ast.Starred) for one in node.args)
            names = tuple(word.arg for word in node.keywords if word.arg)
            self._add(self._chain(node.func), node, None if starred else (len(node.args), names))
            self.visit(node.func.value)
            for part in (*node.args, *(word.value for word in node.keywords)):
                self.visit(part)
        else:
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._add(self._chain(node), node, None)
        if not isinstance(node.value, ast.Attribute):
            self.visit(node.value)

    def _add(
        self,
        path: tuple[str, ...],
        node: ast.expr,
        call: tuple[int, tuple[str, ...]] | None,
        *,
        optional: bool = False,
    ) -> None:
        if len(path) > 1 and path[0] not in self.imported:
            where = f"{self.file}:{node.lineno}"
            optional = optional or path[-1] in self.optional
            self.found.append(Use(path, where, call, self.below, self.above, optional))

    def _chain(self, node: ast.expr | None) -> tuple[str, ...]:
        """Return the names of ``a.b.c``; what ``a`` is called is all that is known of it."""
        if isinstance(node, ast.Attribute):
            return (*self._chain(node.value), node.attr)
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id, (node.id,))
        return ("?",)


def defined_in(paths: Sequence[Path]) -> set[str]:
    """Return the names that some files define: of functions, classes, fields and attributes."""
    names: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= set().union(*map(_names, targets))
    return names


def _names(target: ast.expr) -> set[str]:
    if isinstance(target, ast.Tuple):
        return set().union(*map(_names, target.elts))
    if isinstance(target, ast.Attribute):
        own = isinstance(target.value, ast.Name) and target.value.id in ("self", "twin", "made")
        return {target.attr} if own else set()
    return {target.id} if isinstance(target, ast.Name) else set()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dump(sys.argv[1])))
