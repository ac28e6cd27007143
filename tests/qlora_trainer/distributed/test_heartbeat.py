"""Heartbeats over real sockets: of threads where nobody dies, of processes where somebody does."""

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import HashStore

from qlora_contract.exit_codes import ExitCode
from qlora_trainer.distributed import World
from qlora_trainer.distributed.heartbeat import Heartbeat
from qlora_trainer.distributed.peer_monitor import MOST_STRANGERS
from qlora_trainer.distributed.peers import Farewell, Hello, LostPeer, encode
from qlora_trainer.errors import RendezvousError

pytestmark = pytest.mark.process

PATIENCE = 120.0
"""Seconds after which a test has failed; far more than a slow machine needs."""


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


# Threads of this process.


class Circle:
    """The heartbeats of a whole world, in one process."""

    def __init__(self, size: int, timeout: float = 60.0) -> None:
        self.store = HashStore()
        self.stops = [threading.Event() for _ in range(size)]
        self.lost: dict[int, LostPeer] = {}
        self.members = [self._member(rank, size, timeout) for rank in range(size)]
        with ThreadPoolExecutor(size) as pool:
            list(pool.map(Heartbeat.start, self.members))

    def _member(self, rank: int, size: int, timeout: float) -> Heartbeat:
        world = World(rank, size, rank, "127.0.0.1", 1)
        return Heartbeat(
            world, self.store, timeout, lambda lost: self.lost.update({rank: lost}), f"host-{rank}",
            self.stops[rank],
        )  # fmt: skip


@pytest.fixture
def circle() -> Iterator[Callable[..., Circle]]:
    """Make a world of heartbeats; all of their threads end with the test."""
    made: list[Circle] = []

    def make(size: int, timeout: float = 60.0) -> Circle:
        made.append(Circle(size, timeout))
        return made[-1]

    yield make
    for member in (member for each in made for member in each.members):
        member.goodbye()
    for thread in [each for each in threading.enumerate() if each.name == "heartbeat"]:
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("asked", [0, 2])
def test_a_stop_asked_of_one_rank_reaches_all(circle: Callable[..., Circle], asked: int) -> None:
    """Within a beat, through rank 0, and no rank is lost for it."""
    world = circle(4)
    world.stops[asked].set()

    until(lambda: all(stop.is_set() for stop in world.stops))
    assert world.lost == {}


def test_sigterm_is_heard_while_the_main_thread_is_busy(circle: Callable[..., Circle]) -> None:
    """Python's own handler has to wait for a collective, or a product of matrices, to end; peers do not."""
    world = circle(2)
    heard: list[bool] = []

    def ask() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        heard.append(world.stops[1].wait(PATIENCE))

    before = signal.getsignal(signal.SIGTERM)
    asking = threading.Timer(0.2, ask)
    try:
        world.members[0].stop_on_sigterm()
        asking.start()
        while not heard:
            # C code that holds no lock and knows no signals; far more than a second of it on any machine.
            hashlib.pbkdf2_hmac("sha256", b"x", b"y", 3_000_000)
            heard.append(world.stops[1].is_set())
    finally:
        asking.join()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, before)

    assert heard[0]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_goodbyes_in_any_order_are_silent(circle: Callable[..., Circle], order: tuple[int, ...]) -> None:
    """Ranks that end in order lose nobody, whoever goes first."""
    world = circle(3)
    for rank in order:
        world.members[rank].goodbye()

    assert world.lost == {}


def test_goodbyes_at_once_are_silent(circle: Callable[..., Circle]) -> None:
    """Ranks that end at the same time lose nobody."""
    for _ in range(20):
        world = circle(4)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(Heartbeat.goodbye, world.members))

        assert world.lost == {}


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_farewell_tells_every_other_rank_why(circle: Callable[..., Circle], culprit: int) -> None:
    """A rank that ends for its own reason is named with it by all the others, and not by itself."""
    world = circle(3)
    world.members[culprit].farewell("row 7 of data.jsonl\nhas no text", ExitCode.INVALID_DATA)
    others = {0, 1, 2} - {culprit}
    until(lambda: set(world.lost) == others)

    expected = f"rank {culprit} on host host-{culprit} ended: INVALID_DATA: row 7 of data.jsonl has no text"
    assert {str(lost) for lost in world.lost.values()} == {expected}
    assert world.members[culprit].lost() is None


def test_the_main_thread_can_wait_for_the_verdict(circle: Callable[..., Circle]) -> None:
    """Who asks while nobody is lost gets None; who waits gets the culprit."""
    world = circle(2)
    before = world.members[0].lost()
    world.members[1].farewell("enough", 99)

    assert before is None
    assert world.members[0].lost(PATIENCE) == LostPeer(1, "host-1", "ended: exit code 99: enough")


@pytest.mark.parametrize(
    "hello",
    [
        pytest.param(b"GET / HTTP/1.0\r\n\r\n", id="a-browser"),
        pytest.param(encode(Farewell("x")), id="no-hello"),
        pytest.param(encode(Hello(1, "x", "guess")), id="wrong-token"),
        pytest.param(encode(Hello(1, "x", "TOKEN")), id="a-rank-that-is-there"),
        pytest.param(encode(Hello(7, "x", "TOKEN")), id="no-such-rank"),
        pytest.param(encode(Hello(1, "x", "TOKEN")).replace(b"1", b'"1"'), id="rank-as-text"),
        pytest.param(encode(Hello(1, "x", "TOKEN")).replace(b"1", b"null"), id="rank-null"),
        pytest.param(b"[" * 60_000 + b"\n", id="nested-too-deep"),
        pytest.param(encode(Hello(1, "x", "\ud800")), id="half-a-character"),
    ],
)
def test_strangers_are_dropped_and_change_nothing(circle: Callable[..., Circle], hello: bytes) -> None:
    """Who does not know the store's secret, or is no missing rank, cannot end the job."""
    world = circle(2)
    place = json.loads(world.store.get("heartbeat"))
    hello = hello.replace(b"TOKEN", place["token"].encode())
    with socket.create_connection(("127.0.0.1", place["port"]), timeout=PATIENCE) as stranger:
        stranger.sendall(hello)
        while stranger.recv(1024):
            pass
    world.members[1].farewell("still heard", 1)

    assert world.members[0].lost(PATIENCE) == LostPeer(1, "host-1", "ended: UNEXPECTED: still heard")


def test_many_strangers_keep_no_rank_out() -> None:
    """Of those that connect and say nothing the oldest make room."""
    store, lost = HashStore(), []
    members = [
        Heartbeat(World(rank, 2, rank, "127.0.0.1", 1), store, 60.0, lost.append, "a") for rank in range(2)
    ]
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(members[0].start)
        port = json.loads(store.get("heartbeat"))["port"]
        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(MOST_STRANGERS + 9)]
        try:
            assert strangers[0].recv(1) == b""
            members[1].start()
            starting.result(PATIENCE)
        finally:
            for sock in strangers:
                sock.close()
    for member in members:
        member.goodbye()

    assert lost == []


def test_a_rank_that_never_comes_is_lost(circle: Callable[..., Circle]) -> None:
    """Rank 0 does not wait for ever at the start."""
    lost: list[LostPeer] = []
    alone = Heartbeat(World(0, 2, 0, "127.0.0.1", 1), HashStore(), 1.0, lost.append, "a")
    alone.start()

    assert alone.lost(PATIENCE) == LostPeer(1, "unknown", "gave no sign of life for 1 s")
    until(lambda: len(lost) == 1)


def test_a_rank_0_that_does_not_listen_is_named() -> None:
    """A rank says that it cannot reach rank 0's heartbeat."""
    store = HashStore()
    with socket.create_server(("127.0.0.1", 0)) as gone:
        store.set("heartbeat", json.dumps({"port": gone.getsockname()[1], "token": "t", "host": "a"}))
    heartbeat = Heartbeat(World(1, 2, 1, "127.0.0.1", 1), store, 5.0, lambda lost: None, "b")

    with pytest.raises(RendezvousError, match=r"rank 1 cannot reach rank 0's heartbeat at 127.0.0.1"):
        heartbeat.start()


def test_a_world_of_one_starts_nothing() -> None:
    """Alone there is nobody to lose."""
    alone = Heartbeat(World(0, 1, 0, "127.0.0.1", 1), HashStore(), 5.0, lambda lost: None, "a")
    alone.start()
    threads = {thread.name for thread in threading.enumerate()}
    alone.farewell("x", 1)
    alone.goodbye()

    assert "heartbeat" not in threads
    assert alone.lost() is None


# Processes.

PROCESSES = multiprocessing.get_context("forkserver")
"""Processes that start from one which has imported torch already: seconds less for each."""
PROCESSES.set_forkserver_preload(["qlora_trainer.distributed.heartbeat"])

RANK = """
import os, pathlib, time, torch
from qlora_trainer.distributed import Group, World, heartbeat

def say(name, text=""):
    part = folder / f".{name}-{world.rank}"
    part.write_text(text)
    part.rename(folder / f"{name}-{world.rank}")

heartbeat.COLLATERAL_DELAY_SECONDS = 0.5
group = Group.open(world, "gloo", 600, 120)
beat = heartbeat.Heartbeat(
    world, group.store, timeout,
    lambda lost: heartbeat.leave(lost, lambda lost: say("lost", str(lost))), f"host-{world.rank}")
beat.start()
say("started")
"""
WAIT = """
while not (folder / "end").exists():
    time.sleep(0.02)
beat.goodbye()
say("bye")
group.close()
"""
COLLECTIVE = """
group.all_reduce_sum(torch.ones(8) if world.rank != absent else time.sleep(600))
"""


class Ranks:
    """Ranks as processes, each with a heartbeat."""

    def __init__(self, folder: Path, script: str, size: int, timeout: float, absent: int = -1) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.processes = []
        for rank in range(size):
            world = World(rank, size, rank, "127.0.0.1", port)
            scope = {"world": world, "folder": folder, "timeout": timeout, "absent": absent}
            process = PROCESSES.Process(target=exec, args=(textwrap.dedent(RANK + script), scope))
            process.start()
            self.processes.append(process)
        until(lambda: all(self.said("started", rank) is not None for rank in range(size)))

    def said(self, name: str, rank: int) -> str | None:
        """What a rank wrote under a name."""
        file = self.folder / f"{name}-{rank}"
        return file.read_text() if file.exists() else None

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal."""
        for rank in ranks:
            pid = self.processes[rank].pid
            assert pid is not None
            os.kill(pid, number)

    def code(self, rank: int) -> int | None:
        """Wait for a rank's exit code."""
        self.processes[rank].join(PATIENCE)
        return self.processes[rank].exitcode


@pytest.fixture
def start_ranks(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    """Start ranks; none outlives the test."""
    made: list[Ranks] = []

    def start(script: str, size: int = 3, timeout: float = 3.0, absent: int = -1) -> Ranks:
        made.append(Ranks(tmp_path, script, size, timeout, absent))
        return made[-1]

    yield start
    for process in (process for each in made for process in each.processes):
        process.kill()
        process.join()


@pytest.mark.parametrize("victim", [0, 1])
def test_survivors_name_a_killed_rank_and_leave(start_ranks: Callable[..., Ranks], victim: int) -> None:
    """SIGKILL of any rank is noticed by its connection, long before the timeout."""
    ranks = start_ranks(WAIT, timeout=600.0)
    ranks.send(signal.SIGKILL, victim)
    survivors = {0, 1, 2} - {victim}

    assert {ranks.code(rank) for rank in survivors} == {ExitCode.LOST_PEER}
    assert {ranks.said("lost", rank) for rank in survivors} == {
        f"rank {victim} on host host-{victim} died: its connection closed without a goodbye"
    }


@pytest.mark.parametrize("victim", [0, 1])
def test_survivors_leave_a_collective_that_hangs_on_a_stopped_rank(
    start_ranks: Callable[..., Ranks], victim: int
) -> None:
    """SIGSTOP beyond the timeout ends ranks that wait in a collective, and the stopped one when it wakes."""
    ranks = start_ranks(COLLECTIVE, absent=victim)
    ranks.send(signal.SIGSTOP, victim)
    survivors = {0, 1, 2} - {victim}
    codes = {ranks.code(rank) for rank in survivors}
    ranks.send(signal.SIGCONT, victim)
    codes.add(ranks.code(victim))

    assert codes == {ExitCode.LOST_PEER}
    assert {ranks.said("lost", rank) for rank in range(3)} == {
        f"rank {victim} on host host-{victim} gave no sign of life for 3 s"
    }


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stop_shorter_than_the_timeout_is_survived(start_ranks: Callable[..., Ranks], stopped: int) -> None:
    """A rank that was stopped for a while is not accused, nor does it accuse anyone."""
    ranks = start_ranks(WAIT, timeout=8.0)
    ranks.send(signal.SIGSTOP, stopped)
    time.sleep(2.5)
    ranks.send(signal.SIGCONT, stopped)
    time.sleep(1.0)
    (ranks.folder / "end").touch()

    assert [ranks.code(rank) for rank in range(3)] == [0, 0, 0]
    assert [ranks.said("lost", rank) for rank in range(3)] == [None, None, None]


@pytest.mark.parametrize("first", [0, 1])
def test_a_job_that_was_frozen_whole_accuses_nobody(start_ranks: Callable[..., Ranks], first: int) -> None:
    """Ranks stopped together for longer than the timeout go on together, whoever wakes first."""
    ranks = start_ranks(WAIT, timeout=3.0)
    others = [rank for rank in range(3) if rank != first]
    ranks.send(signal.SIGSTOP, 0, 1, 2)
    time.sleep(4.0)
    ranks.send(signal.SIGCONT, first)
    time.sleep(0.5)
    ranks.send(signal.SIGCONT, *others)
    time.sleep(1.0)
    (ranks.folder / "end").touch()

    assert [ranks.code(rank) for rank in range(3)] == [0, 0, 0]
    assert [ranks.said("lost", rank) for rank in range(3)] == [None, None, None]
