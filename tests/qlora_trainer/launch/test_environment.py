"""What ranks find in their environment."""

import subprocess
from pathlib import Path

import pytest

from qlora_trainer.topology.environment import HELPERS_ENV, allocator, memory_settings, thread_settings
from qlora_trainer.topology.layout import RankPlace
from qlora_trainer.topology.machine import HugePages


def test_threads_are_those_of_the_place() -> None:
    """torch's libraries compute with the layout's threads, numpy's with one, and nothing binds single threads."""
    got = thread_settings(RankPlace((0, 1, 2), 3), {"OMP_NUM_THREADS": "64"})

    torchs = {"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3", "MKL_DYNAMIC": "FALSE"}
    assert got == torchs | {"OPENBLAS_NUM_THREADS": "1"}


def test_helpers_are_named() -> None:
    """A rank learns on which CPUs its other threads belong."""
    assert thread_settings(RankPlace((0, 1), 2, (8, 9, 10)), {})[HELPERS_ENV] == "8-10"


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
    assert thread_settings(RankPlace((0,), 1), environ).get("KMP_BLOCKTIME") == expected


HUGE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
JEMALLOC = "usr/lib/x86_64-linux-gnu/libjemalloc.so.2"
TCMALLOC = "usr/lib64/libtcmalloc_minimal.so.4"


@pytest.mark.parametrize(
    ("environ", "mode", "library", "expected"),
    [
        pytest.param({}, "madvise", None, HUGE, id="huge pages on request"),
        pytest.param({}, "always", None, {}, id="huge pages always"),
        pytest.param({}, "never", None, {}, id="huge pages never"),
        pytest.param({}, None, None, {}, id="not told"),
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
