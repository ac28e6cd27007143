"""What ranks find in their environment."""

from pathlib import Path

import pytest

from qlora_trainer.topology.environment import HELPERS_ENV, allocator, memory_settings, thread_settings
from qlora_trainer.topology.layout import RankPlace


def test_threads_are_those_of_the_place() -> None:
    """Every library computes with the layout's threads, and nothing binds single threads."""
    got = thread_settings(RankPlace((0, 1, 2), 3), {"OMP_NUM_THREADS": "64"})

    assert got == {"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3", "MKL_DYNAMIC": "FALSE"}


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
    ("environ", "mode", "libraries", "expected"),
    [
        pytest.param({}, "madvise", [], HUGE, id="huge pages on request"),
        pytest.param({}, "always", [], {}, id="huge pages always"),
        pytest.param({}, "never", [], {}, id="huge pages never"),
        pytest.param({}, None, [], {}, id="not told"),
        pytest.param({"GLIBC_TUNABLES": "x=1"}, "madvise", [], {}, id="tunables are somebody's"),
        pytest.param({}, "madvise", [JEMALLOC], {"LD_PRELOAD": f"/{JEMALLOC}"}, id="jemalloc"),
        pytest.param({}, "never", [TCMALLOC], {"LD_PRELOAD": f"/{TCMALLOC}"}, id="tcmalloc"),
        pytest.param({}, None, [TCMALLOC, JEMALLOC], {"LD_PRELOAD": f"/{JEMALLOC}"}, id="both"),
        pytest.param({"LD_PRELOAD": "x.so"}, "madvise", [JEMALLOC], {}, id="preloading is somebody's"),
    ],
)
def test_who_allocates_memory(
    tmp_path: Path, environ: dict[str, str], mode: str | None, libraries: list[str], expected: dict[str, str]
) -> None:
    """An allocator of the image, else glibc's with huge pages; what is set already stays."""
    for library in libraries:
        (tmp_path / library).parent.mkdir(parents=True)
        (tmp_path / library).touch()

    assert memory_settings(environ, mode, tmp_path) == expected  # type: ignore[arg-type]


def test_an_allocator_that_is_found_here_can_be_loaded() -> None:
    """Its path is absolute, and the file is there."""
    found = allocator()

    assert found is None or (Path(found).is_absolute() and Path(found).is_file())
