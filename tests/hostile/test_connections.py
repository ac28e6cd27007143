"""Connections of strangers: whatever they send, they are dropped, and the job does not notice."""

import contextlib
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import strategies as st
from torch.distributed import HashStore, TCPStore

from builders import a_run
from hostile import INPUTS, VALUES, attack, damaged_bytes, damaged_json, json_text
from qlora_trainer.distributed import World
from qlora_trainer.distributed.backends import pmi
from qlora_trainer.distributed.heartbeat import Heartbeat
from qlora_trainer.distributed.peers import Beat, Farewell, Goodbye, Hello, Joined, LostPeer, Stop, encode
from qlora_trainer.host.network import listen
from qlora_trainer.launch import world_size
from qlora_trainer.launch.world_size import JoinReply, JoinRequest, WorldSizeError, agree_on_rank_counts
from qlora_trainer.telemetry.progress import Progress, starting_report
from qlora_trainer.telemetry.progress_server import ProgressServer

pytestmark = pytest.mark.process

PATIENCE = 120.0
"""Seconds after which a test has failed."""
HTTP = b"GET /progress HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nbodybodyb"


def visit(port: int, data: bytes) -> bytes:
    """Connect, send that, send no more, and read until the other side closes."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as stranger:
        with contextlib.suppress(OSError):  # it has been enough for them before all was sent
            stranger.sendall(data)
            stranger.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while part := stranger.recv(1 << 16):
                received += part
    return received


def lines(*right: bytes) -> st.SearchStrategy[bytes]:
    """One of these lines, or several, damaged; as JSON, too, where they are JSON; or other protocols'."""
    of_json = [json.loads(line) for line in right if line.startswith(b"{")]
    ways = [damaged_bytes([*right, b"".join(right), HTTP]), st.binary(max_size=200)]
    if of_json:
        ways += [
            st.lists(
                st.one_of([damaged_json(value) for value in of_json] + [st.sampled_from(VALUES)])
                .map(json_text)
                .map(str.encode),
                max_size=4,
            ).map(lambda texts: b"".join(text + b"\n" for text in texts))
        ]
    return st.one_of(ways)


# --- the heartbeat


@pytest.fixture
def pair() -> Iterator[tuple[list[Heartbeat], list[LostPeer], list[threading.Event], int]]:
    """The heartbeats of two ranks; who is lost; their stops; rank 0's port."""
    store, lost = HashStore(), []
    stops = [threading.Event(), threading.Event()]
    ranks = [
        Heartbeat(World(rank, 2, rank, "127.0.0.1", 1), store, 60.0, lost.append, "a", stops[rank])
        for rank in range(2)
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Heartbeat.start, ranks))
    yield ranks, lost, stops, json.loads(store.get("heartbeat"))["port"]
    for rank in ranks:
        rank.goodbye()


@INPUTS
def test_strangers_of_the_heartbeat_are_dropped(
    pair: tuple[list[Heartbeat], list[LostPeer], list[threading.Event], int], inputs: int
) -> None:
    """They lose no rank, stop no job, and end no thread."""
    ranks, lost, stops, port = pair
    said = [Hello(1, "x", "guess"), Hello(0, "x", ""), Joined(), Beat(), Stop(), Goodbye(), Farewell("x"),
            LostPeer(1, "x", "died")]  # fmt: skip

    attack(inputs, lines(*map(encode, said)), lambda data: visit(port, data))

    assert not any(stop.is_set() for stop in stops)
    assert lost == []
    ranks[1].farewell("still heard", 1)
    assert ranks[0].lost(PATIENCE) == LostPeer(1, "a", "ended: UNEXPECTED: still heard")


# --- launchers

JOB = {"job": "u-1", "attempt": 0, "pods": 2}


@INPUTS
def test_strangers_of_a_launcher_are_dropped(inputs: int) -> None:
    """The launchers of the job agree all the same, on what they are."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    of_pods = [JoinRequest.model_validate({**JOB, "pod": pod, "ranks": pod + 3}) for pod in range(2)]

    def join(pod: int) -> list[int]:
        return agree_on_rank_counts(of_pods[pod], "127.0.0.1", port, 3000, lambda: False)

    strangers = [
        {**JOB, "pod": 1, "ranks": 2, "job": "another one"},
        {**JOB, "pod": 7, "ranks": 2},
        {"ranks": [1, 2]},
    ]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(join, 0)
        until_it_listens(port)

        attack(
            inputs,
            lines(*(json.dumps(each).encode() + b"\n" for each in strangers)),
            lambda data: visit(port, data),
        )

        assert pool.submit(join, 1).result(PATIENCE) == first.result(PATIENCE) == [3, 4]


@INPUTS
def test_a_stranger_at_pod_0s_address_is_told_apart(inputs: int) -> None:
    """What answers a launcher there and is no launcher is said to be none."""
    own = JoinRequest.model_validate({**JOB, "pod": 1, "ranks": 2})
    replies = [JoinReply(ranks=[1, 2]), JoinReply(error="no"), JoinReply(ranks=[1, 2, 3])]

    def read(data: bytes) -> None:
        with contextlib.suppress(WorldSizeError):
            assert world_size._counts(data, own)[1] == 2

    attack(inputs, lines(*(world_size._line(reply) for reply in replies)), read)


def until_it_listens(port: int) -> None:
    """Wait for a server."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            visit(port, b"")
            return
        time.sleep(0.01)


# --- MPI's process manager


@INPUTS
def test_strangers_of_the_process_manager_are_dropped(inputs: int) -> None:
    """Ranks that come after them are served, and end it."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    ours, theirs = socket.socketpair()
    server = pmi.Server(listener, pmi.KeyValueSpace(2, ""), "right")
    with ThreadPoolExecutor(1) as pool, listener, ours, theirs:
        serving = pool.submit(server.serve, theirs.fileno())
        said = [pmi.line(cmd="initack", pmiid=0, token="guess"), pmi.line(cmd="initack", pmiid=1),
                pmi.line(cmd="barrier_in"), pmi.line(cmd="put", key="a", value="b c"), pmi.line(cmd="finalize"),
                pmi.line(cmd="abort"), pmi.line(cmd="get", key="PMI_process_mapping")]  # fmt: skip

        attack(inputs, lines(*(line.encode() for line in said)), lambda data: visit(port, data))

        assert server.space.values == {"PMI_process_mapping": ""}
        for rank in (0, 1):
            with pmi.connect("127.0.0.1", port, rank, "right") as sock:
                sock.sendall(b"cmd=finalize\n")
                assert sock.recv(99) == b"cmd=finalize_ack\n"
        serving.result(PATIENCE)
        for connection in server.connections:  # in life its process ends
            connection.sock.close()
        server.selector.close()


# --- live progress


@INPUTS
def test_strangers_of_the_progress_server_change_nothing(inputs: int) -> None:
    """Requests of any form get an answer or none, and the next one gets the report."""
    server = ProgressServer(Progress(starting_report(a_run())), "127.0.0.1", 0)
    requests = [HTTP, b"POST /progress HTTP/1.0\r\n\r\n", b"GET /metrics HTTP/1.1\r\nRange: bytes=0-9\r\n\r\n",
                b"GET " + b"/" * 70_000 + b" HTTP/1.1\r\n\r\n", b"GET /../../etc/passwd HTTP/1.1\r\n\r\n"]  # fmt: skip

    attack(
        inputs,
        st.one_of(damaged_bytes(requests), st.binary(max_size=200)),
        lambda data: visit(server.port, data),
    )

    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/progress", timeout=PATIENCE) as answer:
        assert json.load(answer)["stage"] == "Starting"
    server.close()


# --- the ranks' store, which is torch's


@INPUTS
def test_strangers_of_the_store_change_nothing(inputs: int) -> None:
    """What is no client of torch's is dropped; ranks still find what ranks have set."""
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    store = TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    store.set("rendezvous/rank/0", "here")

    attack(inputs, st.one_of(st.binary(max_size=200), damaged_bytes([HTTP])), lambda data: visit(port, data))

    client = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    assert client.get("rendezvous/rank/0") == b"here"
