"""What the launcher finds in its environment, and ranks in theirs."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_contract.env import RENDEZVOUS_PORT
from qlora_contract.run_config import RunConfig
from qlora_trainer.errors import ConfigurationError
from qlora_trainer.host.affinity import SERVICE_CPUS_ENV
from qlora_trainer.host.numa import HugePages
from qlora_trainer.launch.cpu_layout import CpuAssignment
from qlora_trainer.launch.environment import (
    allocator,
    memory_settings,
    pod_index,
    rank_environment,
    thread_settings,
)


def test_threads_are_those_of_the_assignment() -> None:
    """torch's libraries compute with the layout's threads, numpy's with one, and nothing pins single threads."""
    got = thread_settings(CpuAssignment((0, 1, 2), 3), {"OMP_NUM_THREADS": "64"})

    torchs = {"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3", "MKL_DYNAMIC": "FALSE"}
    assert got == torchs | {"OPENBLAS_NUM_THREADS": "1"}


def test_service_cpus_are_named() -> None:
    """A rank learns on which CPUs its other threads belong."""
    assert thread_settings(CpuAssignment((0, 1), 2, (8, 9, 10)), {})[SERVICE_CPUS_ENV] == "8-10"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        pytest.param({"LD_PRELOAD": "/opt/lib/libiomp5.so"}, "1", id="preloaded"),
        pytest.param({"LD_PRELOAD": "/opt/lib/libiomp5.so", "KMP_BLOCKTIME": "9"}, "9", id="chosen"),
        pytest.param({}, None, id="torch's own"),
    ],
)
def test_intels_openmp_does_not_spin(environ: dict[str, str], expected: str | None) -> None:
    """With Intel's library preloaded its idle threads sleep soon, unless somebody chose otherwise."""
    assert thread_settings(CpuAssignment((0,), 1), environ).get("KMP_BLOCKTIME") == expected


HUGE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
JEMALLOC = "usr/lib/x86_64-linux-gnu/libjemalloc.so.2"
TCMALLOC = "usr/lib64/libtcmalloc_minimal.so.4"


@pytest.mark.parametrize(
    ("environ", "mode", "library", "expected"),
    [
        pytest.param({}, "madvise", None, HUGE, id="huge pages on request"),
        pytest.param({}, "always", None, {}, id="huge pages always"),
        pytest.param({}, "never", None, {}, id="huge pages never"),
        pytest.param({}, None, None, {}, id="unknown"),
        pytest.param({"GLIBC_TUNABLES": "x=1"}, "madvise", None, {}, id="tunables are somebody's"),
        pytest.param({}, "madvise", "/lib/j.so", {"LD_PRELOAD": "/lib/j.so"}, id="an allocator"),
        pytest.param({"LD_PRELOAD": "x.so"}, "madvise", "/lib/j.so", {}, id="preloading is somebody's"),
    ],
)
def test_who_allocates_memory(
    environ: dict[str, str], mode: HugePages | None, library: str | None, expected: dict[str, str]
) -> None:
    """An allocator that there is, else glibc's with huge pages; what is set already stays."""
    assert memory_settings(environ, mode, library) == expected


@pytest.mark.parametrize(
    ("libraries", "expected"),
    [
        pytest.param([JEMALLOC], f"/{JEMALLOC}", id="jemalloc"),
        pytest.param([TCMALLOC], f"/{TCMALLOC}", id="tcmalloc"),
        pytest.param([TCMALLOC, JEMALLOC], f"/{JEMALLOC}", id="both"),
    ],
)
def test_the_systems_allocator_comes_first(tmp_path: Path, libraries: list[str], expected: str) -> None:
    """jemalloc before tcmalloc, wherever the system keeps its libraries."""
    for library in libraries:
        (tmp_path / library).parent.mkdir(parents=True)
        (tmp_path / library).touch()

    assert allocator(tmp_path) == expected


@pytest.mark.process
def test_without_one_of_the_systems_there_is_the_one_installed_with_us(tmp_path: Path) -> None:
    """It can be loaded: a process that is started with it has it."""
    found = allocator(tmp_path)
    assert found is not None

    maps = subprocess.run(
        ["/bin/cat", "/proc/self/maps"],
        env={"LD_PRELOAD": found},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found in maps.stdout
    assert maps.stderr == ""


@pytest.mark.parametrize(
    ("pods", "ranks", "index", "local", "expected"),
    [
        pytest.param(1, 1, 0, 0, ("0", "1", "0", "1", "0", "1"), id="alone"),
        pytest.param(2, 3, 1, 2, ("5", "6", "2", "3", "1", "2"), id="last of six"),
        pytest.param(4, 1, 2, 0, ("2", "4", "0", "1", "2", "4"), id="one rank a pod"),
    ],
)
def test_ranks_are_numbered_over_all_pods(
    a_run: Callable[..., RunConfig], pods: int, ranks: int, index: int, local: int, expected: tuple[str, ...]
) -> None:
    """RANK counts over all pods, LOCAL_RANK within one, NODE_RANK the pods; PET_* agree."""
    run = a_run(layout={"pods": pods, "ranksPerPod": ranks})
    assignment, environ = CpuAssignment((4, 5, 6), 3), {"MASTER_ADDR": "host-0.svc", "KEPT": "yes"}
    got = rank_environment(run, [ranks] * pods, index, local, assignment, environ)

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "PET_NNODES")
    assert tuple(got[name] for name in names) == expected
    assert got["PET_NODE_RANK"] == got["GROUP_RANK"] == got["NODE_RANK"]
    assert got["PET_NPROC_PER_NODE"] == got["LOCAL_WORLD_SIZE"]
    assert got["MASTER_ADDR"] == got["PET_MASTER_ADDR"] == "host-0.svc"
    assert got["MASTER_PORT"] == got["PET_MASTER_PORT"] == str(RENDEZVOUS_PORT)
    assert got["KEPT"] == "yes"


def test_threads_and_offline_switches_are_set_for_a_rank(a_run: Callable[..., RunConfig]) -> None:
    """A rank computes with its own threads, offline, whatever the launcher's environment says."""
    inherited = {"OMP_NUM_THREADS": "64", "HF_HUB_OFFLINE": "0", "MASTER_PORT": "1234"}
    got = rank_environment(a_run(), [2], 0, 0, CpuAssignment((0, 1), 2), inherited)

    assert got["OMP_NUM_THREADS"] == got["MKL_NUM_THREADS"] == "2"
    assert got["MKL_DYNAMIC"] == "FALSE"
    assert got["HF_HUB_OFFLINE"] == got["TRANSFORMERS_OFFLINE"] == got["PYTHONUNBUFFERED"] == "1"
    assert got["TOKENIZERS_PARALLELISM"] == "false"
    assert got["MASTER_PORT"] == got["PET_MASTER_PORT"] == "1234"
    assert got["MASTER_ADDR"] == "127.0.0.1"


def test_several_pods_need_a_master_address(a_run: Callable[..., RunConfig]) -> None:
    """With more than one pod there is no default for the host of rank 0."""
    with pytest.raises(ConfigurationError, match="MASTER_ADDR is not set, and 2 pods need"):
        rank_environment(a_run(layout={"pods": 2}), [2, 2], 0, 0, CpuAssignment((0,), 1), {})


@pytest.mark.parametrize(
    ("pods", "environ", "index"),
    [
        pytest.param(1, {}, 0, id="alone"),
        pytest.param(3, {"JOB_COMPLETION_INDEX": "2"}, 2, id="given"),
        pytest.param(3, {}, None, id="missing"),
        pytest.param(3, {"JOB_COMPLETION_INDEX": "3"}, None, id="too large"),
        pytest.param(3, {"JOB_COMPLETION_INDEX": "-1"}, None, id="negative"),
        pytest.param(3, {"JOB_COMPLETION_INDEX": "one"}, None, id="not a number"),
    ],
)
def test_the_pods_index(
    a_run: Callable[..., RunConfig], pods: int, environ: dict[str, str], index: int | None
) -> None:
    """The index is taken from Kubernetes and must be one of the pods'."""
    run = a_run(layout={"pods": pods})
    if index is not None:
        assert pod_index(run, environ) == index
        return
    with pytest.raises(ConfigurationError, match=r"JOB_COMPLETION_INDEX is .* must be from 0 to 2"):
        pod_index(run, environ)
