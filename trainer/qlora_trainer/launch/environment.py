"""Environment variables: what Kubernetes tells the launcher, and what the launcher tells a rank before torch loads."""

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from qlora_contract.cpus import format_cpu_list
from qlora_contract.env import COMPLETION_INDEX_ENV, RANKS_ENV, RENDEZVOUS_PORT
from qlora_contract.run_config import RunConfig
from qlora_trainer.errors import ConfigurationError
from qlora_trainer.host.affinity import SERVICE_CPUS_ENV
from qlora_trainer.host.kernel_files import ROOT
from qlora_trainer.host.numa import HugePages
from qlora_trainer.launch.cpu_layout import CpuAssignment

MIMALLOC = ("cmeel-mimalloc", "libmimalloc.so.3")
"""The package that brings an allocator along, and the file. Second choice: jemalloc needs a tenth less memory."""
ALLOCATORS = ("libjemalloc.so.2", "libtcmalloc.so.4", "libtcmalloc_minimal.so.4")
"""In the order of preference."""
LIBRARY_FOLDERS = ("usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/local/lib")

PRELOAD_ENV = "LD_PRELOAD"
TUNABLES_ENV = "GLIBC_TUNABLES"


# --- what the launcher reads


def pod_index(run: RunConfig, environ: Mapping[str, str]) -> int:
    """This pod's completion index; 0 where there is one pod and it is unset. Raises ConfigurationError."""
    text = environ.get(COMPLETION_INDEX_ENV, "0" if run.layout.pods == 1 else "")
    if not (text.isascii() and text.isdigit() and int(text) < run.layout.pods):
        raise ConfigurationError(
            f"{COMPLETION_INDEX_ENV} is {text!r}; it must be from 0 to {run.layout.pods - 1}"
        )
    return int(text)


def master_address(run: RunConfig, environ: Mapping[str, str]) -> tuple[str, int]:
    """(host name or address of pod 0, port), where rank 0 serves its store. Raises ConfigurationError."""
    host = environ.get("MASTER_ADDR") or ("127.0.0.1" if run.layout.pods == 1 else "")
    if not host:
        raise ConfigurationError(
            f"MASTER_ADDR is not set, and {run.layout.pods} pods need the host name of rank 0"
        )
    port = environ.get("MASTER_PORT") or str(RENDEZVOUS_PORT)
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise ConfigurationError(f"MASTER_PORT is {port!r}; it must be a whole number from 1 to 65535")
    return host, int(port)


# --- what a rank reads


def rank_environment(
    run: RunConfig,
    counts: Sequence[int],
    index: int,
    local: int,
    assignment: CpuAssignment,
    environ: Mapping[str, str],
) -> dict[str, str]:
    """The whole environment of a rank, after torchrun's conventions.

    Args:
        run: the job.
        counts: ranks of each pod; rank numbers count over the pods in their order.
        index: this pod.
        local: which rank of this pod.
        assignment: where it runs.
        environ: the launcher's own environment, which the rank inherits.

    Raises:
        ConfigurationError: there are several pods, and MASTER_ADDR is not set or MASTER_PORT is not a port.
    """
    host, port = master_address(run, environ)
    return {
        **environ,
        "RANK": str(sum(counts[:index]) + local),
        "WORLD_SIZE": str(sum(counts)),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(counts[index]),
        "NODE_RANK": str(index),
        "GROUP_RANK": str(index),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "PET_NNODES": str(len(counts)),
        "PET_NPROC_PER_NODE": str(counts[index]),
        "PET_NODE_RANK": str(index),
        "PET_MASTER_ADDR": host,
        "PET_MASTER_PORT": str(port),
        RANKS_ENV: ",".join(map(str, counts)),
        **thread_settings(assignment, environ),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def thread_settings(assignment: CpuAssignment, environ: Mapping[str, str]) -> dict[str, str]:
    """Thread counts of a rank, which override what the environment says, and the CPUs of its service threads.

    OMP_PROC_BIND and KMP_AFFINITY stay unset: they pin the first thread to one CPU when the library is loaded, and
    every service thread that it starts would inherit that. A rank's affinity pins its threads well enough: there are
    as many as CPUs.
    """
    settings = {
        "OMP_NUM_THREADS": str(assignment.threads),
        "MKL_NUM_THREADS": str(assignment.threads),
        "MKL_DYNAMIC": "FALSE",
        # numpy's threads would only wait: torch does the products.
        "OPENBLAS_NUM_THREADS": "1",
    }
    if assignment.service_cpus:
        settings[SERVICE_CPUS_ENV] = format_cpu_list(assignment.service_cpus)
    if "libiomp5" in environ.get(PRELOAD_ENV, ""):
        # Unlike torch's own OpenMP, Intel's keeps idle threads spinning for 200 ms, in the way of communication.
        settings["KMP_BLOCKTIME"] = environ.get("KMP_BLOCKTIME", "1")
    return settings


def memory_settings(
    environ: Mapping[str, str], huge_pages: HugePages | None, library: str | None
) -> dict[str, str]:
    """Which allocator all ranks load; empty when the environment has chosen already.

    Args:
        environ: the launcher's environment.
        huge_pages: when the kernel gives transparent huge pages; None: unknown.
        library: path of an allocator to preload; None: glibc's own, with huge pages where they have to be asked for.
    """
    if environ.get(PRELOAD_ENV):
        return {}
    if library:
        return {PRELOAD_ENV: library}
    if huge_pages == "madvise" and not environ.get(TUNABLES_ENV):
        return {TUNABLES_ENV: "glibc.malloc.hugetlb=1"}
    return {}


def allocator(root: Path = ROOT) -> str | None:
    """Path of the system's jemalloc or tcmalloc, else of the mimalloc that is installed with us; None without any."""
    for name in ALLOCATORS:
        for folder in LIBRARY_FOLDERS:
            if (root / folder / name).exists():
                return f"/{folder}/{name}"
    distribution, name = MIMALLOC
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())).resolve() for file in files if file.name == name)
    return next((str(path) for path in paths if path.exists()), None)
