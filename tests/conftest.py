"""The bundle that most tests share, the versions in pytest's header, and a core for each worker."""

import os
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Give every worker of pytest-xdist a core of its own: threads that share one only wait."""
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        cores = sorted(os.sched_getaffinity(0))
        mine = int(worker["workerid"].removeprefix("gw")) % len(cores)
        os.sched_setaffinity(0, {cores[mine]})


def pytest_report_header() -> str:
    names = ("numpy", "torch", "onnx", "onnxruntime", "onnxruntime-gpu", "pillow")
    return "packages: " + ", ".join(f"{name} {_version(name)}" for name in names)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


@pytest.fixture(scope="session")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped digits model, exported in fp32. Do not write into it: see ``altered``."""
    import mdexport
    import mdzoo

    folder = tmp_path_factory.mktemp("bundles") / "digits"
    model = mdzoo.load(mdzoo.CATALOGUE["digits"], mdzoo.Sources())
    for _ in mdexport.build(model, folder, mdexport.Options()):
        pass
    return folder


@pytest.fixture
def altered(digits_bundle: Path, tmp_path: Path) -> Callable[[], Path]:
    """Return a function that makes a private copy of the digits bundle, to be damaged."""

    def copy() -> Path:
        return Path(shutil.copytree(digits_bundle, tmp_path / "altered"))

    return copy
