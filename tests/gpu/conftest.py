"""What the tests on a GPU share: the device, bundles to run, and the report that they write."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mdruntime.bundle import Bundle, open_bundle
from mdruntime.cuda import Cuda, open_cuda
from mdruntime.doctor import examine
from mdruntime.errors import ProviderError
from mdruntime.machine import this_machine

BUNDLES = "MDRUNTIME_GPU_BUNDLES"  # a folder with bundles that were copied here
REPORT = "MDRUNTIME_GPU_REPORT"  # the file that the report goes to
LINES = pytest.StashKey[list[str]]()

Bundles = Callable[[str, str], Bundle]
Say = Callable[[str], None]


@pytest.fixture(scope="session")
def gpu() -> Cuda:
    """The device, without which nothing here can run."""
    try:
        return open_cuda()
    except ProviderError as error:
        pytest.skip(f"no GPU here: {error}")


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Say:
    """Return a function that adds a line to the report."""
    return request.config.stash.setdefault(LINES, []).append


@pytest.fixture(scope="session")
def bundle_of(gpu: Cuda, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Return a function from a model and a precision to a bundle that may be written to."""
    place, made = tmp_path_factory.mktemp("bundles"), dict[tuple[str, str], Bundle]()

    def get(name: str, precision: str) -> Bundle:
        if (name, precision) not in made:
            folder = place / f"{name}-{precision}"
            _copy(name, precision, folder)
            made[name, precision] = open_bundle(folder, check=False)
        return made[name, precision]

    return get


def _copy(name: str, precision: str, folder: Path) -> None:
    """Put a bundle at ``folder``: a copied one, or one exported here."""
    given = os.environ.get(BUNDLES)
    for source in (Path(given) / f"{name}-{precision}", Path(given) / name) if given else ():
        if source.is_dir() and open_bundle(source, check=False).manifest.precision == precision:
            shutil.copytree(source, folder, ignore=shutil.ignore_patterns("engines"))
            return
    try:
        import mdexport
        import mdzoo
    except ImportError as error:
        pytest.skip(
            f"{error}, so nothing can be exported here; copy a bundle named {name}-{precision} "
            f"into a folder and run: bash tests/gpu.sh --bundles FOLDER"
        )
    entry = mdzoo.CATALOGUE[name]
    sources = mdzoo.Sources() if entry.shipped else mdzoo.Sources(random_seed=0)
    options: dict[str, Any] = {"precision": precision, "encoder": bool(entry.shipped)}
    for _ in mdexport.build(mdzoo.load(entry, sources), folder, mdexport.Options(**options)):
        pass


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the report, and write it where it was asked for."""
    target = os.environ.get(REPORT)
    if not target:
        return
    lines = [*_machine(), "", *config.stash.get(LINES, ["nothing could be run"]), "", "skipped:"]
    skipped = terminalreporter.stats.get("skipped", [])
    lines += sorted({f"- {each.longrepr[2]}" for each in skipped}) or ["- nothing"]
    failed = terminalreporter.stats.get("failed", [])
    lines += ["", "failed:", *([f"- {each.nodeid}" for each in failed] or ["- nothing"])]
    Path(target).write_text("\n".join(lines) + "\n", encoding="utf-8")
    terminalreporter.write_sep("=", f"report, also in {target}: please paste it into an issue")
    terminalreporter.write_line("\n".join(lines))


def _machine() -> Iterator[str]:
    machine = this_machine("cuda")
    yield f"## GPU report of {machine.date}"
    yield ""
    for finding in examine():
        cure = f" -> {finding.cure}" if finding.cure else ""
        yield f"- {finding.name}: {finding.value}{cure}"
