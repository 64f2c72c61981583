"""Limits of control groups, read from folders such as the kernel shows."""

from pathlib import Path

import pytest

from mdruntime.cgroup import quota
from mdruntime.ort import available_threads


def tree(root: Path, groups: str, files: dict[str, str]) -> tuple[Path, Path]:
    """Write the kernel's files and return where they are."""
    for name, text in files.items():
        path = root / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "groups").write_text(groups)
    return root / "groups", root / "mount"


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/", {"cpu.max": "max 100000\n"}, None),
        ("0::/", {"cpu.max": "250000 100000\n"}, 2.5),
        # Version 2, a service in a slice: the slice allows less.
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000", "a/cpu.max": "max 100000"}, 0.5),
        # The path of the host, seen from within a container that has its own group as the root.
        ("0::/docker/1f", {"cpu.max": "200000 100000"}, 2.0),
        # Version 1.
        (
            "5:cpuset:/x\n4:cpu,cpuacct:/x/y\n",
            {
                "cpu,cpuacct/x/y/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/x/y/cpu.cfs_period_us": "100000",
                "cpu,cpuacct/x/cpu.cfs_quota_us": "300000",
                "cpu,cpuacct/x/cpu.cfs_period_us": "100000",
                "cpuset/x/cpu.max": "1 100000",  # no controller of time
            },
            3.0,
        ),
        (
            "4:cpu:/gone\n",
            {"cpu/cpu.cfs_quota_us": "120000\n", "cpu/cpu.cfs_period_us": "60000\n"},
            2.0,
        ),
        ("", {}, None),
        ("nonsense\n0::/a", {"a/cpu.max": "nonsense"}, None),
        ("0::/a", {"a/cpu.max": "100 0"}, None),
    ],
)
def test_the_least_limit_of_nested_groups_holds(
    tmp_path: Path, groups: str, files: dict[str, str], cores: float | None
) -> None:
    assert quota(*tree(tmp_path, groups, files)) == cores


def test_no_control_groups_no_limit(tmp_path: Path) -> None:
    assert quota(tmp_path / "none", tmp_path / "none") is None


@pytest.mark.parametrize(("limit", "threads"), [(None, 4), (2.5, 2), (0.5, 1), (64.0, 4)])
def test_threads_follow_the_limit_and_not_the_cores(
    monkeypatch: pytest.MonkeyPatch, limit: float | None, threads: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr("mdruntime.ort.quota", lambda: limit)
    assert available_threads() == threads
