"""What a rank's environment has to say before torch is loaded: threads, and who allocates memory."""

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from qlora_contract.cpus import format_cpu_list
from qlora_trainer.cpu import ROOT
from qlora_trainer.topology.layout import RankPlace
from qlora_trainer.topology.machine import HugePages

HELPERS_ENV = "QLORA_HELPER_CPUS"
"""CPU list for a rank's threads that do not compute; see `helpers.on_helpers`."""

MIMALLOC = ("cmeel-mimalloc", "libmimalloc.so.3")
"""The distribution that brings an allocator along, and the file. Second choice: jemalloc needs a tenth less memory."""
ALLOCATORS = ("libjemalloc.so.2", "libtcmalloc.so.4", "libtcmalloc_minimal.so.4")
"""In the order of preference."""
LIBRARY_FOLDERS = ("usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/local/lib")

PRELOAD_ENV = "LD_PRELOAD"
TUNABLES_ENV = "GLIBC_TUNABLES"


def thread_settings(place: RankPlace, environ: Mapping[str, str]) -> dict[str, str]:
    """Thread counts of a rank, which override what is set, and where its helpers run.

    OMP_PROC_BIND and KMP_AFFINITY stay unset: they bind the first thread to one CPU when the library is loaded, and
    every helper that it starts would inherit that. A rank's affinity binds its threads well enough: there are as many
    as CPUs.
    """
    settings = {
        "OMP_NUM_THREADS": str(place.threads),
        "MKL_NUM_THREADS": str(place.threads),
        "MKL_DYNAMIC": "FALSE",
        # numpy's threads would wait all the time: what is multiplied is torch's.
        "OPENBLAS_NUM_THREADS": "1",
    }
    if place.helpers:
        settings[HELPERS_ENV] = format_cpu_list(place.helpers)
    if "libiomp5" in environ.get(PRELOAD_ENV, ""):
        # Intel's OpenMP, unlike torch's own, keeps idle threads spinning for 200 ms, in communication's way.
        settings["KMP_BLOCKTIME"] = environ.get("KMP_BLOCKTIME", "1")
    return settings


def memory_settings(
    environ: Mapping[str, str], huge_pages: HugePages | None, library: str | None
) -> dict[str, str]:
    """This allocator, else glibc's with huge pages where memory has to ask for them.

    What the environment says already is left alone.
    """
    if environ.get(PRELOAD_ENV):
        return {}
    if library:
        return {PRELOAD_ENV: library}
    if huge_pages == "madvise" and not environ.get(TUNABLES_ENV):
        return {TUNABLES_ENV: "glibc.malloc.hugetlb=1"}
    return {}


def allocator(root: Path = ROOT) -> str | None:
    """The path of the system's jemalloc or tcmalloc, else of the mimalloc that is installed with us; None: of none."""
    for name in ALLOCATORS:
        for folder in LIBRARY_FOLDERS:
            if (root / folder / name).exists():
                return f"/{folder}/{name}"
    return _installed(*MIMALLOC)


def _installed(distribution: str, name: str) -> str | None:
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.name == name)
    return next((str(path.resolve()) for path in paths if path.exists()), None)
