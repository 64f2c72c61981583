"""Time that threads waited for cores that others had."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from mdruntime.cli_bench import noise_line
from mdruntime.waiting import read_waits, waited_share


def write(folder: Path, **threads: str) -> None:
    for name, text in threads.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "schedstat").write_text(text, encoding="ascii")


def test_the_share_is_of_the_time_that_threads_were_ready(tmp_path: Path) -> None:
    write(tmp_path, t1="1000 500 7\n", t2="300 0 1\n")
    before = read_waits(tmp_path)
    assert before == {"t1": (1000, 500), "t2": (300, 0)}
    write(tmp_path, t1="1600 600 9\n", t3="200 100 1\n")  # the third is new
    (tmp_path / "t2" / "schedstat").unlink()  # and the second has ended
    assert waited_share(before, read_waits(tmp_path)) == pytest.approx(200 / 1000)
    assert waited_share(before, before) == 0


@pytest.mark.parametrize("text", ["", "1 2\n", "a b c\n"])
def test_what_counts_nothing_waits_for_nothing(tmp_path: Path, text: str) -> None:
    assert read_waits(tmp_path / "none") == {}
    write(tmp_path, t1=text)
    assert read_waits(tmp_path) == {}
    assert waited_share({}, {}) == 0


def _spin(core: int, seconds: float) -> None:
    os.sched_setaffinity(0, {core})
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_steady_load_by_another_process_is_seen() -> None:
    """A neighbour that is always there widens no spread, and yet takes half of a core."""
    cores = os.sched_getaffinity(0)
    core = min(cores)
    neighbour = multiprocessing.get_context("spawn").Process(target=_spin, args=(core, 30))
    neighbour.start()
    try:
        os.sched_setaffinity(0, {core})
        deadline, share = time.perf_counter() + 25, 0.0
        while share < 0.2 and time.perf_counter() < deadline:  # until the neighbour is up
            before = read_waits()
            _spin(core, 0.5)
            share = waited_share(before, read_waits())
    finally:
        os.sched_setaffinity(0, cores)
        neighbour.kill()
        neighbour.join()
    if not read_waits():
        pytest.skip("this kernel does not count how long threads wait")
    assert 0.2 <= share < 0.95


def test_the_noise_line_says_so() -> None:
    line = noise_line(0.0, 0.0, 0.3)
    assert "waited 30% of their time for cores that others had (over 10%)" in " ".join(line.split())
    assert max(map(len, line.splitlines())) <= 80
    assert noise_line(0.0, 0.0, 0.05) == ""
