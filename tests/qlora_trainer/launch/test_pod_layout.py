"""The layout of a pod on the machine that runs the tests."""

import os
from collections.abc import Callable

import pytest

from qlora_contract.env import CPUS_ENV
from qlora_contract.run_config import RunConfig
from qlora_trainer.errors import ConfigurationError
from qlora_trainer.launch.pod_layout import pod_layout


def test_a_cpu_that_is_not_ours_is_refused(a_run: Callable[..., RunConfig]) -> None:
    """QLORA_CPUS may only name CPUs that the kernel allows."""
    with pytest.raises(ConfigurationError, match=r"QLORA_CPUS names CPUs 9000, which .* it may use [0-9]"):
        pod_layout(a_run(), {CPUS_ENV: "9000"})


def test_a_malformed_cpu_list_is_refused(a_run: Callable[..., RunConfig]) -> None:
    """The variable is named, and what its value should look like."""
    with pytest.raises(ConfigurationError, match=r"QLORA_CPUS: 'all' is not a CPU list such as 0-3,8"):
        pod_layout(a_run(), {CPUS_ENV: "all"})


def test_ranks_that_do_not_fit_are_refused(a_run: Callable[..., RunConfig]) -> None:
    """Under strict pinning the job has to ask for less."""
    run = a_run(layout={"pinning": "strict", "cpusPerRank": 1024})
    with pytest.raises(ConfigurationError, match="need 2048 CPUs, but only"):
        pod_layout(run, {})


def test_cpus_that_were_chosen_for_a_launcher_are_its_own(a_run: Callable[..., RunConfig]) -> None:
    """A rank is pinned to the CPU that QLORA_CPUS names, however many there are besides."""
    cpu = min(os.sched_getaffinity(0))
    layout = pod_layout(a_run(ranks=1), {CPUS_ENV: str(cpu)})

    assert layout.pinned
    assert [rank.cpus for rank in layout.ranks] == [(cpu,)]
