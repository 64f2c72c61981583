"""Layers, public names and wheels: what is imported, what is exported, what is shipped."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "mdexport": ROOT / "mdexport",
    "mdruntime": ROOT / "runtime" / "mdruntime",
    "mdzoo": ROOT / "models" / "mdzoo",
}
MODULES = [path for folder in PACKAGES.values() for path in sorted(folder.glob("*.py"))]
HEAVY = (
    *("torch", "onnx", "onnxruntime", "tensorrt", "PIL", "tokenizers"),
    *("mdexport", "mdzoo", "click"),
)
LATE = {"ort.py": {"onnxruntime"}, "images.py": {"PIL"}, "tokenizer.py": {"tokenizers"}}
"""What modules of the runtime import where it is used: packages that some can do without."""


def imports(path: Path, *, inside_functions: bool) -> set[str]:
    """Return the packages that a module imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if inside_functions else iter(tree.body)
    return set(_packages(nodes))


def _packages(nodes: Iterator[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("path", sorted(PACKAGES["mdruntime"].glob("*.py")), ids=lambda p: p.name)
def test_the_runtime_imports_numpy_and_the_standard_library_alone(path: Path) -> None:
    allowed = set(sys.stdlib_module_names) | {"numpy", "mdruntime"}
    assert imports(path, inside_functions=False) <= allowed
    late = imports(path, inside_functions=True) - allowed
    assert late <= LATE.get(path.name, set())


def test_only_the_command_line_looks_models_up_by_name() -> None:
    users = {
        path.name
        for path in PACKAGES["mdexport"].glob("*.py")
        if "mdzoo" in imports(path, inside_functions=True)
    }
    assert users == {"cli.py", "cli_bench.py", "cli_models.py"}


def test_models_do_not_know_the_exporter() -> None:
    for path in PACKAGES["mdzoo"].glob("*.py"):
        assert "mdexport" not in imports(path, inside_functions=True), path.name


def test_importing_the_runtime_loads_nothing_heavy() -> None:
    source = "import sys, mdruntime; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    assert "numpy" in done.stdout.split()
    assert not set(done.stdout.split()) & set(HEAVY)


def import_seconds(package: str) -> float:
    source = (
        f"import time; t = time.perf_counter(); import {package}; print(time.perf_counter() - t)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, check=True)
    return float(done.stdout)


def test_importing_the_runtime_takes_less_than_three_times_numpys_own_import() -> None:
    """A ratio, taken in turn: seconds would speak of what else the machine is doing."""
    pairs = [(import_seconds("mdruntime"), import_seconds("numpy")) for _ in range(7)]
    ours, numpys = (min(times) for times in zip(*pairs, strict=True))
    assert ours < 3 * numpys, pairs


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_modules_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_exist_are_sorted_and_documented(name: str) -> None:
    package = importlib.import_module(name)
    public = list(package.__all__)
    assert public == sorted(public)
    for each in public:
        value = getattr(package, each)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), each


def test_nobody_is_told_to_install_a_strangers_package() -> None:
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *MODULES, *ROOT.glob("examples/*")]:
        if path.is_file() and path.suffix in (".md", ".py", ".sh"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"pip install (-\S+ )*['\"]?mdexport", text), path.name


def build_wheel(folder: Path, target: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(target), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = target.glob("*.whl")
    return wheel


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.mark.slow
def test_the_workstation_wheel_holds_three_packages_and_the_weights(tmp_path: Path) -> None:
    names = contents(build_wheel(ROOT, tmp_path))
    assert {name.partition("/")[0] for name in names} == set(PACKAGES)
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert "mdzoo/weights/digits.safetensors" in names


@pytest.mark.slow
def test_the_runtime_wheel_is_small_and_stands_alone(tmp_path: Path) -> None:
    wheel = build_wheel(ROOT / "runtime", tmp_path / "wheel")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < 220_000  # bytes; the TensorRT backend is a fifth of it
    assert {name.partition("/")[0] for name in contents(wheel)} == {"mdruntime"}
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        text = archive.read(metadata).decode()
    needs = [line for line in text.splitlines() if line.startswith("Requires-Dist")]
    assert [line for line in needs if "extra ==" not in line] == ["Requires-Dist: numpy>=1.26"]
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    source = "import mdruntime; print(mdruntime.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).is_relative_to(site)
