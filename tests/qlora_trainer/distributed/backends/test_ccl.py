"""What oneCCL is told, and what it must leave alone."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from qlora_trainer.distributed.backends import ccl

pytestmark = pytest.mark.process


def test_the_thread_that_calls_does_the_work() -> None:
    """No worker threads, and so no CPUs for them; the interface towards rank 0 is used for all."""
    wanted = ccl.settings("eth0", ["a", "a"], 1, {0, 1}, {})

    assert wanted["CCL_WORKER_OFFLOAD"] == "0"
    assert (wanted["CCL_LOCAL_RANK"], wanted["CCL_LOCAL_SIZE"]) == ("1", "2")
    assert {wanted["CCL_KVS_IFACE"], wanted["FI_TCP_IFACE"]} == {"eth0"}
    assert "CCL_WORKER_AFFINITY" not in wanted


@pytest.mark.parametrize(
    ("environ", "affinity"),
    [
        pytest.param({}, "7", id="one"),
        pytest.param({"CCL_WORKER_COUNT": "2"}, "6,7", id="two"),
        pytest.param({"CCL_WORKER_AFFINITY": "3"}, None, id="the-user's-stays"),
    ],
)
def test_workers_get_cpus_of_this_process(environ: dict[str, str], affinity: str | None) -> None:
    """Who turns workers on gets them on the last CPUs of the rank, not of the host."""
    wanted = ccl.settings("lo", ["a"], 0, {4, 5, 6, 7}, {"CCL_WORKER_OFFLOAD": "1", **environ})

    assert wanted.get("CCL_WORKER_AFFINITY") == affinity
    assert "CCL_WORKER_OFFLOAD" not in wanted


def test_another_fabric_may_be_chosen() -> None:
    """What the user set is kept."""
    assert "FI_PROVIDER" not in ccl.settings("lo", ["a"], 0, {0}, {"FI_PROVIDER": "psm3"})


@pytest.mark.parametrize(
    ("hosts", "shared"),
    [pytest.param(["a", "b"], "0", id="apart"), pytest.param(["a", "a", "b"], "1", id="some-together")],
)
def test_all_ranks_agree_on_shared_memory(hosts: list[str], shared: str) -> None:
    """It is on for every rank as soon as two share a host, also for one that is alone on its own."""
    said = [ccl.settings("lo", hosts, rank, {0}, {})["CCL_ATL_SHM"] for rank in range(len(hosts))]

    assert said == [shared] * len(hosts)


@pytest.mark.parametrize(
    ("hosts", "environ", "algorithm"),
    [
        pytest.param(["a", "b"], {}, None, id="two"),
        pytest.param(["a", "a", "b"], {}, "ring", id="more"),
        pytest.param(["a", "a", "b"], {"CCL_ALLREDUCE": "direct"}, None, id="the-user's-stays"),
    ],
)
def test_more_than_two_ranks_add_up_in_one_order(
    hosts: list[str], environ: dict[str, str], algorithm: str | None
) -> None:
    """A sum of two numbers has one rounding; of more, the order counts."""
    assert ccl.settings("lo", hosts, 0, {0}, environ).get("CCL_ALLREDUCE") == algorithm


def test_the_same_numbers_have_the_same_sum_in_every_call(start_ranks: Callable[..., Any]) -> None:
    """And in every rank, also of the sizes that oneCCL would add up as they come."""
    outputs = start_ranks(
        """
        import hashlib, json, os, torch
        from qlora_trainer.distributed import Group, World

        world = World.from_environ(os.environ)
        own = torch.randn(100_000, generator=torch.Generator().manual_seed(world.rank))
        sums = set()
        with Group.open(world, "ccl", 60, 60) as group:
            for _ in range(20):
                buffer = own.clone()
                group.all_reduce_sum(buffer)
                sums.add(hashlib.sha256(buffer.numpy().tobytes()).hexdigest())
        print(json.dumps(sorted(sums)))
        """,
        3,
    ).outputs()

    sums = [line for said in outputs.values() for line in said.splitlines() if line.startswith("[")]
    assert len(sums) == 3
    assert len(set(sums)) == len(json.loads(sums[0])) == 1


def test_signals_and_shared_memory_stay_in_order(start_ranks: Callable[..., Any]) -> None:
    """A dead rank's file goes at the start; ours stays on SIGTERM, since peers need it, and goes at the end."""
    outputs = start_ranks(
        """
        import json, os, signal, subprocess, torch
        from pathlib import Path
        from qlora_trainer.distributed import Group, World

        world = World.from_environ(os.environ)
        caught = []
        signal.signal(signal.SIGTERM, lambda *_: caught.append("SIGTERM"))
        dead = subprocess.Popen(["true"])
        dead.wait()
        left = Path(f"/dev/shm/{dead.pid}:0:0")
        left.write_bytes(b"")
        with Group.open(world, "ccl", 60, 60) as group:
            group.all_reduce_sum(torch.ones(1000))
            os.kill(os.getpid(), signal.SIGTERM)
            group.barrier()
            own = list(Path("/dev/shm").glob(f"{os.getpid()}:*"))
            said = [left.exists(), caught, len(own)]
        print(json.dumps([*said, own[0].exists()]))
        """,
        2,
    ).outputs()

    lines = [line for said in outputs.values() for line in said.splitlines() if line.startswith("[")]
    assert [json.loads(line) for line in lines] == [[False, ["SIGTERM"], 1, False]] * 2
