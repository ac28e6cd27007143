"""Control groups of both versions, as files and on this machine."""

import os
from pathlib import Path

import pytest

from qlora_trainer.host import cgroups


def write_tree(root: Path, files: dict[str, str]) -> Path:
    """Files below root, by relative path; returns root."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "31 30 0:27 {shown} /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n"
    "32 30 0:28 {shown} /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
)


def v2(root: Path, group: str, files: dict[str, str], mount: str = V2_MOUNT) -> Path:
    """A machine with the unified tree, the process in `group`."""
    tree = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    return write_tree(root, {"proc/self/cgroup": f"0::{group}\n", "proc/self/mountinfo": mount} | tree)


def v1(root: Path, shown: str, files: dict[str, str]) -> Path:
    """A machine with v1 trees whose mounts show the group `shown`."""
    groups = "5:memory:/kubepods/pod1/c1\n4:cpu,cpuacct:/kubepods/pod1/c1\n1:name=systemd:/x\n0::/x\n"
    tree = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    mounts = V1_MOUNTS.format(shown=shown)
    return write_tree(root, {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts} | tree)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        pytest.param({"cpu.max": "max 100000\n"}, None, id="none"),
        pytest.param({"a/b/cpu.max": "250000 100000\n"}, 2.5, id="own group"),
        pytest.param({"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n"}, 4.0, id="parent"),
        pytest.param({"a/b/cpu.max": "800000 100000\n", "a/cpu.max": "50000 50000\n"}, 1.0, id="smallest"),
        pytest.param({}, None, id="no controller"),
    ],
)
def test_quota_in_v2(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    """In the unified tree the smallest cpu.max up the tree counts."""
    assert cgroups.cpu_quota(v2(tmp_path, "/a/b", files)) == quota


@pytest.mark.parametrize(
    ("shown", "folder", "quota"),
    [
        pytest.param("/", "cpu,cpuacct/kubepods/pod1/c1", "300000", id="host's view"),
        pytest.param("/", "cpu,cpuacct/kubepods", "300000", id="an outer group"),
        pytest.param("/kubepods/pod1/c1", "cpu,cpuacct", "300000", id="container's view"),
        pytest.param("/elsewhere", "cpu,cpuacct", "300000", id="group outside the mount"),
    ],
)
def test_quota_in_v1(tmp_path: Path, shown: str, folder: str, quota: str) -> None:
    """In v1 the quota is found through the mount, whatever part of the tree it shows."""
    files = {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "100000\n"}

    assert cgroups.cpu_quota(v1(tmp_path, shown, files)) == 3.0


def test_no_quota_in_v1(tmp_path: Path) -> None:
    """-1 is v1's word for no quota."""
    files = {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}

    assert cgroups.cpu_quota(v1(tmp_path, "/kubepods/pod1/c1", files)) is None


def test_a_group_above_the_mount_is_taken_as_the_mount(tmp_path: Path) -> None:
    """A group shown as /../x lies outside this namespace; the mount's own files are read."""
    assert cgroups.cpu_quota(v2(tmp_path, "/../x", {"cpu.max": "200000 100000"})) == 2.0


def test_without_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    """A machine without cgroup files has no limits and no figures."""
    assert cgroups.cpu_quota(tmp_path) is None
    assert cgroups.memory_limit(tmp_path) is None
    assert cgroups.memory_current_and_peak(tmp_path) == (None, None)
    assert cgroups.oom_kills(tmp_path) == 0


def test_memory_in_v2(tmp_path: Path) -> None:
    """The smallest memory.max counts; use and kills are the own group's."""
    files = {
        "a/memory.max": "1000\n",
        "a/b/memory.max": "max\n",
        "a/b/memory.current": "300\n",
        "a/b/memory.peak": "700\n",
        "a/b/memory.events": "low 0\nhigh 0\nmax 9\noom 2\noom_kill 3\noom_group_kill 1\n",
    }
    root = v2(tmp_path, "/a/b", files)

    assert cgroups.memory_limit(root) == 1000
    assert cgroups.memory_current_and_peak(root) == (300, 700)
    assert cgroups.oom_kills(root) == 3


def test_memory_in_v1(tmp_path: Path) -> None:
    """v1 has other names, and a huge number for no limit."""
    files = {
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/kubepods/pod1/memory.limit_in_bytes": "2000\n",
        "memory/kubepods/pod1/c1/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/kubepods/pod1/c1/memory.usage_in_bytes": "5\n",
        "memory/kubepods/pod1/c1/memory.max_usage_in_bytes": "6\n",
        "memory/kubepods/pod1/c1/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n",
    }
    root = v1(tmp_path, "/", files)

    assert cgroups.memory_limit(root) == 2000
    assert cgroups.memory_current_and_peak(root) == (5, 6)
    assert cgroups.oom_kills(root) == 4


MEMINFO = "MemTotal:       1000 kB\nMemAvailable:    600 kB\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, (1000 * 1024, 600 * 1024), id="the machine's"),
        pytest.param({"a/memory.max": "max\n"}, (1000 * 1024, 600 * 1024), id="no limit"),
        pytest.param(
            {
                "a/memory.max": "409600\n",
                "a/memory.current": "300000\n",
                "a/memory.stat": "anon 1\nactive_file 40000\ninactive_file 60000\n",
            },
            (409600, 209600),
            id="a group's, whose page cache is free",
        ),
        pytest.param({"a/memory.max": "409600\n"}, (409600, 600 * 1024), id="usage unknown"),
    ],
)
def test_memory_that_can_be_used(
    tmp_path: Path, files: dict[str, str], expected: tuple[int | None, int | None]
) -> None:
    """The least of the machine's and of every limit; of that, what nobody else has now."""
    root = write_tree(v2(tmp_path, "/a/b", files), {"proc/meminfo": MEMINFO})

    assert cgroups.usable_memory(root) == expected


def test_memory_that_can_be_used_in_v1(tmp_path: Path) -> None:
    """The same from the files of the first version; without any files nothing is known."""
    assert cgroups.usable_memory(tmp_path) == (None, None)
    root = v1(
        tmp_path,
        "/kubepods/pod1/c1",
        {
            "memory/memory.limit_in_bytes": "3000\n",
            "memory/memory.usage_in_bytes": "2000\n",
            "memory/memory.stat": "cache 1\ntotal_active_file 300\ntotal_inactive_file 200\n",
        },
    )
    assert cgroups.usable_memory(root) == (3000, 1500)


def test_this_machine_is_read_without_error() -> None:
    """The real files of this machine parse, whatever they hold."""
    cpus, quota = cgroups.available_cpus()

    assert cpus == sorted(os.sched_getaffinity(0))
    assert quota is None or quota > 0
    assert (cgroups.memory_limit() or 1) > 0
    assert cgroups.oom_kills() >= 0
