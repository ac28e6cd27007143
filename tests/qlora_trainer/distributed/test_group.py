"""Collectives among real processes."""

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qlora_trainer.distributed import Group, World
from qlora_trainer.distributed.backends import registry

pytestmark = pytest.mark.process

START = """
    import json, os, signal, sys, time, torch
    from qlora_trainer.distributed import Group, World
    from qlora_trainer.errors import TrainerError
    world = World.from_environ(os.environ)
    def opened(timeout=60, rendezvous=60):
        return Group.open(world, "gloo", timeout, rendezvous)
"""


@pytest.mark.parametrize("backend", registry.TORCH_NAMES)
def test_collectives_agree_on_every_rank(backend: str, start_ranks: Callable[..., Any]) -> None:
    """Three ranks sum in fp64, int64 and fp32, broadcast and gather, and all get the same."""
    script = (
        START
        + """
    with opened() as group:
        said = {}
        for dtype in (torch.float64, torch.int64, torch.float32):
            tensor = torch.arange(4, dtype=dtype) * 10 ** world.rank
            group.all_reduce_sum(tensor)
            said[str(dtype)] = tensor.tolist()
        large = torch.full((3_000_000,), 1.0 + world.rank)
        group.all_reduce_sum(large)
        said["large"] = [large.min().item(), large.max().item()]
        sent = torch.full((2,), world.rank)
        torch.distributed.broadcast(sent, src=2)
        said["sent"] = sent.tolist()
        said["gathered"] = group.all_gather_object({"rank": world.rank})
        said["interface"] = os.environ.get("GLOO_SOCKET_IFNAME") or os.environ["FI_TCP_IFACE"]
        group.barrier()
        print(json.dumps(said))
    """
    )
    outputs = start_ranks(script.replace("gloo", backend), 3).outputs()
    lines = [outputs[rank].splitlines()[-1] for rank in range(3)]
    said = json.loads(lines[0])

    assert lines[1] == lines[2] == lines[0]
    assert said["torch.float64"] == said["torch.int64"] == said["torch.float32"] == [0, 111, 222, 333]
    assert said["large"] == [6.0, 6.0]
    assert said["sent"] == [2, 2]
    assert said["gathered"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert said["interface"] in {name for _, name in socket.if_nameindex()}


def test_a_peer_that_dies_is_told_from_one_that_is_slow(start_ranks: Callable[..., Any]) -> None:
    """A broken connection ends a collective as PeerLost, silence as CollectiveTimeout; each in one line."""
    script = (
        START
        + """
    for end in (lambda: time.sleep(6), lambda: os.kill(os.getpid(), signal.SIGKILL)):
        world = World(world.rank, 2, world.rank, "127.0.0.1", world.master_port)
        with opened(timeout=3) as group:
            group.barrier()
            if world.rank == 1:
                end()
                continue
            try:
                group.all_reduce_sum(torch.ones(8))
            except TrainerError as error:
                print(type(error).__name__, int(error.exit_code), len(str(error).splitlines()))
        del group
        time.sleep(4)
    """
    )
    outputs = start_ranks(script, 2).outputs()

    assert outputs[0].splitlines() == ["CollectiveTimeout 41 1", "PeerLost 40 1"]


@pytest.mark.parametrize("backend", ["ccl", "mpi"])
def test_silence_is_a_timeout_by_any_backend(backend: str, start_ranks: Callable[..., Any]) -> None:
    """A peer that takes no part ends a collective as CollectiveTimeout; the process can end though the call goes on."""
    script = (
        START
        + """
    group = opened(timeout=3)
    group.barrier()
    if world.rank == 1:
        time.sleep(6)
    else:
        try:
            group.all_reduce_sum(torch.ones(8))
        except TrainerError as error:
            print(type(error).__name__, int(error.exit_code), len(str(error).splitlines()), flush=True)
    os._exit(0)
    """
    )
    outputs = start_ranks(script.replace("gloo", backend), 2).outputs()

    assert outputs[0].splitlines()[-1] == "CollectiveTimeout 41 1"


def test_mpi_that_cannot_start_is_an_error_and_no_end(start_ranks: Callable[..., Any]) -> None:
    """Every rank for which MPI finds no network says so in one line, with the code of a failed rendezvous."""
    script = (
        START
        + """
    os.environ.update(FI_PROVIDER="nonsense", I_MPI_FABRICS="ofi")
    try:
        opened(rendezvous=10)
    except TrainerError as error:
        print(int(error.exit_code), error, flush=True)
    os._exit(0)
    """
    )
    outputs = start_ranks(script.replace("gloo", "mpi"), 2).outputs()

    for rank, said in outputs.items():
        assert said.startswith(f"30 rank {rank} cannot connect to the other ranks: MPI_Session_init:")
        assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        pytest.param("ccl", "30 rank 0 met the other ranks, but could not connect to them in 6 s", id="ccl"),
        pytest.param("mpi", "30 rank 0 cannot connect to the other ranks:", id="mpi"),
    ],
)
def test_a_peer_that_dies_while_connecting(backend: str, said: str, start_ranks: Callable[..., Any]) -> None:
    """Who met a peer that died before it was connected ends in time: by mpi at once, by ccl after its patience."""
    script = (
        START
        + """
    from qlora_trainer.distributed import group
    from qlora_trainer.distributed.backends import ccl, pmi
    group._GRACE_SECONDS = 0.5
    if world.rank == 1:
        connect = pmi.connect
        def die(*arguments):
            if len(arguments) > 1:
                connect(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        pmi.connect = ccl.interface_towards = die
    try:
        opened(rendezvous=6)
    except TrainerError as error:
        print(int(error.exit_code), error, flush=True)
    os._exit(0)
    """
    )
    outputs = start_ranks(script.replace("gloo", backend), 2).outputs()

    assert outputs[0].splitlines()[-1].startswith(said)


def test_a_missing_rank_is_named_by_the_others(start_ranks: Callable[..., Any]) -> None:
    """Two processes of a world of three end in time, and say that rank 1 did not come."""
    script = (
        START
        + """
    try:
        opened(rendezvous=4)
    except TrainerError as error:
        print(int(error.exit_code), error)
    """
    )
    outputs = start_ranks(script, 3, ranks=[0, 2]).outputs()

    for said in outputs.values():
        assert said.startswith("30 ranks 0, 2 of 3 came to 127.0.0.1:")
        assert "rank 1 did not" in said


def test_a_stranger_at_the_port_does_not_hang_a_rank(start_ranks: Callable[..., Any]) -> None:
    """Something that takes the connection and stays silent is given up in time, and said to be no rank 0."""
    script = (
        START
        + """
    from qlora_trainer.distributed import group
    group._GRACE_SECONDS = 0.5
    try:
        opened(rendezvous=2)
    except TrainerError as error:
        print(int(error.exit_code), error)
    """
    )
    listening = start_ranks(script, 2, ranks=[1])
    with socket.create_server(("127.0.0.1", listening.port)):
        outputs = listening.outputs()

    assert outputs[1].startswith(f"30 rank 1 reached 127.0.0.1:{listening.port}, but")
    assert outputs[1].endswith("did not answer as rank 0 does in 2 s")


def test_a_world_of_one_changes_nothing_and_starts_nothing(world: Callable[..., World]) -> None:
    """Alone, every operation is the identity, and there is no process group."""
    with Group.open(world(0, 1), "gloo", 5, 5) as alone:
        tensor = torch.arange(3.0)
        alone.all_reduce_sum(tensor)
        alone.barrier()
        alone.store.set("k", "v")

        assert tensor.tolist() == [0.0, 1.0, 2.0]
        assert alone.all_gather_object("x") == ["x"]
        assert alone.store.get("k") == b"v"
        assert not dist.is_initialized()
