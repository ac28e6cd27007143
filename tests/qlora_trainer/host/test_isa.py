"""The ISA probe, CPU shares and control groups."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_contract.cpus import format_cpu_list
from qlora_contract.run import ISA_TIERS, IsaTier
from qlora_trainer import cpu

AVX2 = "fpu sse2 fma avx avx2"
AVX512 = f"{AVX2} avx512f avx512dq avx512bw avx512vl"
SKYLAKE = f"{AVX512} avx512cd"
COOPER_LAKE = f"{AVX512} avx512_vnni avx512_bf16"
SAPPHIRE_RAPIDS = f"{COOPER_LAKE} amx_bf16 amx_tile amx_int8"


def cpuinfo(*flags: str) -> str:
    """The text of /proc/cpuinfo with one processor per set of flags."""
    return "\n".join(f"processor\t: {n}\nmodel name\t: X\nflags\t\t: {f}\n" for n, f in enumerate(flags))


@pytest.mark.parametrize(
    ("flags", "permitted", "tier"),
    [
        pytest.param(SAPPHIRE_RAPIDS, True, "amx_bf16", id="amx"),
        pytest.param(SAPPHIRE_RAPIDS, False, "avx512_bf16", id="amx that the kernel refuses"),
        pytest.param(f"{AVX512} amx_tile amx_int8", True, "avx512", id="amx without bf16"),
        pytest.param(COOPER_LAKE, False, "avx512_bf16", id="avx512 with bf16"),
        pytest.param(SKYLAKE, False, "avx512", id="avx512"),
        pytest.param(f"{AVX2} avx512f avx512cd", False, "avx2", id="avx512 without bw, dq and vl"),
        pytest.param(AVX2, False, "avx2", id="avx2"),
    ],
)
def test_the_best_tier_that_nothing_is_missing_for(flags: str, permitted: bool, tier: str) -> None:
    """A processor gets the best tier whose flags and permission it has."""
    assert cpu.best_tier(cpu.cpu_flags(cpuinfo(flags)), amx_permitted=permitted) == tier


@pytest.mark.parametrize(
    ("text", "names"),
    [
        pytest.param(cpuinfo("sse2 avx avx2"), "lacks fma:", id="avx2 without fma"),
        pytest.param("processor : 0\nFeatures : fp asimd sve\n", "lacks avx2, fma:", id="not x86"),
    ],
)
def test_below_avx2_is_refused(text: str, names: str) -> None:
    """A processor below AVX2 is refused with what it lacks."""
    with pytest.raises(cpu.CpuError, match=names):
        cpu.best_tier(cpu.cpu_flags(text), amx_permitted=False)


def test_a_flag_counts_only_if_every_processor_has_it() -> None:
    """On a machine with mixed cores only the common flags count."""
    assert cpu.cpu_flags(cpuinfo("avx2 fma avx512f", "avx2 fma")) == {"avx2", "fma"}


def test_what_a_tier_lacks_is_named() -> None:
    """Missing flags are named, and the refused permission only when the flags are there."""
    flags = cpu.cpu_flags(cpuinfo(SAPPHIRE_RAPIDS))

    assert cpu.tier_lacks(flags, "amx_bf16", amx_permitted=False) == [cpu.AMX_PERMISSION]
    assert cpu.tier_lacks(flags - {"amx_tile"}, "amx_bf16", amx_permitted=False) == ["amx_tile"]
    assert cpu.tier_lacks(flags, "amx_bf16", amx_permitted=True) == []


def test_a_better_tier_meets_a_lower_need() -> None:
    """A tier meets itself and every tier after it in the contract's order."""
    met = [[cpu.meets(have, need) for need in ISA_TIERS] for have in ISA_TIERS]

    assert met == [[column >= row for column in range(4)] for row in range(4)]


def test_the_probe_agrees_with_this_processor() -> None:
    """The probe of the real machine finds a tier whose flags /proc/cpuinfo shows."""
    found = cpu.probe()
    tier: IsaTier = cpu.probe_isa()

    assert tier == found.tier
    assert cpu.TIER_FLAGS[tier] <= cpu.cpu_flags(Path("/proc/cpuinfo").read_text())
    assert found.lacks(tier) == []


@given(st.sets(st.integers(0, 300), min_size=1))
def test_a_cpu_list_survives_the_round_trip(cpus: set[int]) -> None:
    """What is formatted parses to the same CPUs, sorted."""
    assert cpu.parse_cpu_list(format_cpu_list(cpus)) == sorted(cpus)


def test_a_cpu_list_is_written_as_the_kernel_does() -> None:
    """Runs are shortened, single CPUs are not."""
    assert format_cpu_list([8, 3, 2, 1, 0, 0]) == "0-3,8"
    assert cpu.parse_cpu_list("8,0-3\n") == [0, 1, 2, 3, 8]


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1-2-3", "3-1", "0,x", "²"])
def test_a_malformed_cpu_list_is_refused(text: str) -> None:
    """Anything but numbers and rising ranges is refused with an example."""
    with pytest.raises(cpu.CpuError, match="0-3,8"):
        cpu.parse_cpu_list(text)


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
    assert cpu.cpu_quota(v2(tmp_path, "/a/b", files)) == quota


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

    assert cpu.cpu_quota(v1(tmp_path, shown, files)) == 3.0


def test_no_quota_in_v1(tmp_path: Path) -> None:
    """-1 is v1's word for no quota."""
    files = {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}

    assert cpu.cpu_quota(v1(tmp_path, "/kubepods/pod1/c1", files)) is None


def test_a_group_above_the_mount_is_taken_as_the_mount(tmp_path: Path) -> None:
    """A group shown as /../x lies outside this namespace; the mount's own files are read."""
    assert cpu.cpu_quota(v2(tmp_path, "/../x", {"cpu.max": "200000 100000"})) == 2.0


def test_without_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    """A machine without cgroup files has no limits and no figures."""
    assert cpu.cpu_quota(tmp_path) is None
    assert cpu.memory_limit(tmp_path) is None
    assert cpu.memory_current_and_peak(tmp_path) == (None, None)
    assert cpu.oom_kills(tmp_path) == 0


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

    assert cpu.memory_limit(root) == 1000
    assert cpu.memory_current_and_peak(root) == (300, 700)
    assert cpu.oom_kills(root) == 3


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

    assert cpu.memory_limit(root) == 2000
    assert cpu.memory_current_and_peak(root) == (5, 6)
    assert cpu.oom_kills(root) == 4


def test_this_machine_is_read_without_error() -> None:
    """The real files of this machine parse, whatever they hold."""
    cpus, quota = cpu.available_cpus()

    assert cpus == sorted(os.sched_getaffinity(0))
    assert quota is None or quota > 0
    assert (cpu.memory_limit() or 1) > 0
    assert cpu.oom_kills() >= 0


ROLLUP = """56288311e000-7ffc3081f000 ---p 00000000 00:00 0                          [rollup]
Rss:                1736 kB
Pss:                 306 kB
Pss_Anon:            112 kB
Pss_File:            194 kB
Pss_Shmem:             8 kB
"""


def test_memory_is_told_apart_by_what_is_behind_it() -> None:
    """Anonymous, shared and file-backed memory are separate, in bytes; only the first two are needed."""
    memory = cpu.parse_smaps_rollup(ROLLUP)

    assert (memory.anonymous, memory.shared, memory.file) == (112 * 1024, 8 * 1024, 194 * 1024)
    assert memory.needed == 120 * 1024


def test_an_old_kernel_is_refused() -> None:
    """Without Pss_Anon the message says which kernel is needed."""
    with pytest.raises(cpu.CpuError, match=r"Linux 5\.4"):
        cpu.parse_smaps_rollup("Rss: 1 kB\nPss: 1 kB\n")


def test_allocated_memory_is_seen() -> None:
    """Memory that this process writes to shows up as anonymous."""
    before = cpu.process_memory().anonymous
    block = bytearray(b"x" * (64 << 20))

    assert cpu.process_memory().anonymous - before >= (60 << 20)
    assert len(block) == 64 << 20
