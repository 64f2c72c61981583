"""What a machine can do at best, measured in a process of its own."""

import subprocess
import sys
from typing import Any

import pytest

from mdruntime.ceiling import Ceiling, better, measure_ceiling
from mdruntime.errors import ProviderError


def test_products_and_memory_are_measured_by_a_process_with_so_many_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []
    run = subprocess.run

    def watched(command: list[str], **options: Any) -> Any:
        seen.append((command, options["env"]))
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", watched)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    found = measure_ceiling(1, seconds=0.0)
    ((command, environment),) = seen
    assert command[:3] == [sys.executable, "-m", "mdruntime.ceiling"]
    for library in ("OPENBLAS", "OMP", "MKL", "BLIS"):
        assert environment[f"{library}_NUM_THREADS"] == "1"
    assert found.threads == 1
    assert found.gigaflops > 0.1  # slower is no machine that this runs on
    assert found.gigabytes > 0.1


def test_the_better_of_two_counts_for_each() -> None:
    assert better(Ceiling(10, 3, 2), Ceiling(9, 4, 2)) == Ceiling(10, 4, 2)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import sys; sys.exit('no memory')", "no memory"),
        ("print('[1]')", "must be an object"),
        ("print('nothing')", "Expecting value"),
    ],
)
def test_a_process_that_fails_is_reported(
    monkeypatch: pytest.MonkeyPatch, source: str, reason: str
) -> None:
    run = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda _, **options: run([sys.executable, "-c", source], **options)
    )
    with pytest.raises(ProviderError, match=rf"at best .*{reason}.*--no-roofline"):
        measure_ceiling(1)
