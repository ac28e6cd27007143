"""Ranks on two hosts: network, shared memory and host name of each are its own."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from disturbances import RANK_0, set_link, two_hosts
from qlora_contract.exit_codes import ExitCode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def family() -> str:
    """What addresses the hosts have."""
    return "ipv4"


@pytest.fixture
def hosts(family: str) -> Iterator[list[list[str]]]:
    """The beginning of a command that shall run on either host."""
    with two_hosts(family) as hosts:
        yield hosts


SCRIPT = """
import json, os, sys, torch, torch.distributed as dist
from qlora_trainer.distributed.backends.registry import prepare
dist.init_process_group(prepare(sys.argv[1]))
sums = torch.full((300_000,), float(dist.get_rank() + 1))
dist.all_reduce(sums)
names = [None] * dist.get_world_size()
dist.all_gather_object(names, os.uname().nodename)
print(json.dumps([sums.unique().tolist(), len(set(names)), os.environ["FI_TCP_IFACE"]]), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("family", "size"), [("ipv4", 4), ("ipv6", 2)], ids=["ipv4", "ipv6"])
def test_ranks_of_two_hosts_reach_each_other(
    backend: str, family: str, size: int, hosts: list[list[str]]
) -> None:
    """The ranks of two hosts sum what all have, over the interface that leads to rank 0, by either family alone."""
    world = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": RANK_0[family],
        "MASTER_PORT": "29500",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [*hosts[2 * rank // size], sys.executable, "-c", SCRIPT, backend],
            env=os.environ | world | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [rank.communicate(timeout=240)[0].splitlines()[-1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()

    assert said == [f'[[{size * (size + 1) / 2}], 2, "link0"]'] * size
    assert [rank.returncode for rank in ranks] == [0] * size


@pytest.mark.parametrize("family", ["ipv6"])
def test_a_job_runs_where_hosts_have_ipv6_alone(
    hosts: list[list[str]],
    make_job: Callable[..., Any],
    two: Any,
    assert_same_bits: Callable[..., None],
) -> None:
    """From the ranks' meeting to the adapter, by gloo as by the libraries above, to the bits of one host's job."""
    job = make_job()
    job.hosts = hosts
    job.extra_environ = {"MASTER_ADDR": RANK_0["ipv6"]}

    with job.start(2, pods=2) as attempt:
        ends = attempt.wait()

    assert [end.code for end in ends] == [ExitCode.DONE] * 2, ends[0].log + ends[1].log
    assert_same_bits(job, two)


def test_partition_is_noticed_on_both_sides(
    backend: str, hosts: list[list[str]], make_job: Callable[..., Any]
) -> None:
    """When the link between two hosts breaks, each side says that it hears nothing of the other, and leaves."""
    job = make_job(distributed={"timeoutSeconds": 8, "backend": backend})
    job.hosts = hosts
    job.extra_environ = {"MASTER_ADDR": RANK_0["ipv4"]}

    with job.start(2, pods=2) as attempt:
        attempt.until_step(6)
        set_link(hosts[0], "down")
        ends = attempt.wait()

    assert [end.code for end in ends] == [ExitCode.LOST_PEER] * 2, ends[0].log + ends[1].log
    for end, peer in zip(ends, (1, 0), strict=True):
        assert re.search(rf"rank {peer} on host \S+ gave no sign of life for 8 s", end.report.cause)
