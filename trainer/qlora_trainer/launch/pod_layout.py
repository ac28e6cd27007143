"""The layout of this pod: what the job asks for, on the CPUs that this launcher may use of this machine."""

from collections.abc import Mapping
from pathlib import Path

from qlora_contract.cpus import CpuListError, format_cpu_list, parse_cpu_list
from qlora_contract.env import CPUS_ENV
from qlora_contract.run_config import RunConfig
from qlora_trainer.errors import ConfigurationError
from qlora_trainer.host.cgroups import available_cpus
from qlora_trainer.host.hbm import allowed_memory_nodes, may_set_memory_policy
from qlora_trainer.host.kernel_files import ROOT
from qlora_trainer.host.numa import read_machine
from qlora_trainer.launch.cpu_layout import AvailableCpus, CpuLayout, CpuRequest, LayoutError, compute_layout


def pod_layout(run: RunConfig, environ: Mapping[str, str], root: Path = ROOT) -> CpuLayout:
    """Where each rank of this pod runs: on the CPUs that QLORA_CPUS names, else on all that the kernel allows.

    Raises:
        ConfigurationError: the ranks do not fit, or QLORA_CPUS is malformed or names CPUs that are not allowed.
    """
    allowed, quota = available_cpus(root)
    cpu_list = environ.get(CPUS_ENV)
    try:
        cpus = parse_cpu_list(cpu_list) if cpu_list else allowed
    except CpuListError as error:
        raise ConfigurationError(f"{CPUS_ENV}: {error}") from error
    if missing := sorted(set(cpus) - set(allowed)):
        raise ConfigurationError(
            f"{CPUS_ENV} names CPUs {format_cpu_list(missing)}, which this process may not use; "
            f"it may use {format_cpu_list(allowed)}"
        )
    available = AvailableCpus(
        tuple(cpus),
        quota,
        exclusive=bool(cpu_list),
        memory_nodes=allowed_memory_nodes(root),
        may_set_memory_policy=may_set_memory_policy(),
    )
    asked = run.layout
    request = CpuRequest(asked.ranks_per_pod, asked.pod_cpus, asked.pinning, asked.memory_tier)
    try:
        return compute_layout(read_machine(root), available, request)
    except LayoutError as error:
        raise ConfigurationError(str(error)) from error
