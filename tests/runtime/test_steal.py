"""Time that a host gave to others."""

from pathlib import Path

import pytest

from mdruntime.cli_bench import noise_line
from mdruntime.steal import read_ticks, stolen_share

STAT = """cpu  {user} 10 50 {idle} 7 3 2 {steal} {guest} 0
cpu0 1 1 1 1 1 1 1 999 0 0
intr 12
"""


def ticks(path: Path, user: int, idle: int, steal: int, guest: int = 0) -> tuple[int, int]:
    path.write_text(STAT.format(user=user, idle=idle, steal=steal, guest=guest), encoding="utf-8")
    return read_ticks(path)


def test_the_share_is_of_the_time_that_cores_had_work(tmp_path: Path) -> None:
    before = ticks(tmp_path / "stat", user=100, idle=5000, steal=40)
    after = ticks(tmp_path / "stat", user=190, idle=99_000, steal=50, guest=80)
    assert before == (40, 100 + 10 + 50 + 3 + 2 + 40)
    assert stolen_share(before, after) == pytest.approx(10 / (90 + 10))
    assert stolen_share(after, before) == 0
    assert stolen_share(after, after) == 0


@pytest.mark.parametrize("text", ["", "cpu\n", "cpu 1 2 3 4\n", "cpu a b c d e f g h\n", "x 1\n"])
def test_what_counts_nothing_steals_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "stat"
    assert read_ticks(path) == (0, 0)
    path.write_text(text, encoding="utf-8")
    assert read_ticks(path) == (0, 0)
    assert stolen_share((0, 0), read_ticks(path)) == 0


def test_the_noise_line_says_which_it_was() -> None:
    spread, stolen, both = noise_line(0.5), noise_line(0.1, 0.12), noise_line(0.5, 0.12)
    assert "slow repeats took 50% more" in spread
    assert "host" not in spread
    assert "the host gave 12% of the cores' time to others (over 5%)" in stolen
    assert "slow repeats" not in stolen
    assert "slow repeats took 50% more" in both
    assert "the host gave 12%" in both
    for line in (spread, stolen, both):
        assert line.startswith("noisy: ")
        assert max(map(len, line.splitlines())) <= 80
