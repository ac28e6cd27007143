"""Ranks on two hosts: network, shared memory and host name of each are its own."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qlora_contract.exit_codes import ExitCode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ADDRESSES = {"ipv4": ("10.78.0.1/24", "10.78.0.2/24"), "ipv6": ("fd78::1/64", "fd78::2/64")}
RANK_0 = {family: pair[0].partition("/")[0] for family, pair in ADDRESSES.items()}
ALONE = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && hostname "$0" && exec "$@"'
"""What a process does before its command, in mounts and a host name of its own."""


def ip(*words: str) -> None:
    """The command `ip`."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def family() -> str:
    """What addresses the hosts have."""
    return "ipv4"


@pytest.fixture
def hosts(family: str) -> Iterator[list[list[str]]]:
    """The beginning of a command that shall run on either host."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    names = [f"ql{os.getpid()}{side}" for side in "ab"]
    for name in names:
        ip("netns", "add", name)
    try:
        ip("link", "add", "link0", "netns", names[0], "type", "veth", "peer", "link0", "netns", names[1])
        for name, address in zip(names, ADDRESSES[family], strict=True):
            # Of use at once, and the only one: an address of the link's own is of none for a second or two, and
            # libraries that try all addresses fail by it.
            ip("-n", name, "link", "set", "link0", "addrgenmode", "none")
            fresh = ["nodad"] if family == "ipv6" else []
            ip("-n", name, "address", "add", address, "dev", "link0", *fresh)
            for device in ("lo", "link0"):
                ip("-n", name, "link", "set", device, "up")
        yield [["ip", "netns", "exec", name, "unshare", "-mu", "sh", "-c", ALONE, name] for name in names]
    finally:
        for name in names:
            ip("netns", "delete", name)


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


def test_partition_is_noticed_on_both_sides(
    backend: str, hosts: list[list[str]], make_job: Callable[..., Any]
) -> None:
    """When the link between two hosts breaks, each side says that it hears nothing of the other, and leaves."""
    job = make_job(distributed={"timeoutSeconds": 8, "backend": backend})
    job.hosts = hosts
    job.extra_environ = {"MASTER_ADDR": RANK_0["ipv4"]}

    with job.start(2, pods=2) as attempt:
        attempt.until_step(6)
        ip("-n", hosts[0][3], "link", "set", "link0", "down")
        ends = attempt.wait()

    assert [end.code for end in ends] == [ExitCode.LOST_PEER] * 2, ends[0].log + ends[1].log
    for end, peer in zip(ends, (1, 0), strict=True):
        assert re.search(rf"rank {peer} on host \S+ gave no sign of life for 8 s", end.report.cause)
