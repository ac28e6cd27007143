"""The process manager: its lines, its answers, its end."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.distributed.backends import pmi

pytestmark = pytest.mark.process

TOKEN = "right"
KEYS = st.text("abcdefgh-_0123456789", min_size=1, max_size=20)
VALUES = st.text("abc ()=,:#0", max_size=40).map(str.strip)


@given(KEYS, VALUES)
def test_a_value_comes_back_as_it_was_put(key: str, value: str) -> None:
    """A put line is read as it was written, also when the value has spaces and equals signs."""
    space = pmi.KeyValueSpace(1, "")
    put = pmi.line(cmd="put", kvsname=pmi.KVS, key=key, value=value)
    ((_, stored),) = space.answer(0, pmi.parse(put))
    ((_, found),) = space.answer(0, {"cmd": "get", "key": key})

    assert pmi.parse(stored)["rc"] == "0"
    assert pmi.parse(found)["value"] == value


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        pytest.param("GET / HTTP/1.1", "'GET' has no '='", id="another-protocol"),
        pytest.param("key=a value=b", "has no cmd", id="no-command"),
    ],
)
def test_anything_but_a_line_of_pmi_is_refused(line: str, wrong: str) -> None:
    """A stranger's line is named, with what is wrong in it."""
    with pytest.raises(ValueError, match=wrong):
        pmi.parse(line)


def test_an_unknown_command_is_named() -> None:
    """A command outside PMI-1 is not answered with silence."""
    with pytest.raises(ValueError, match="'spawn' is unknown"):
        pmi.KeyValueSpace(1, "").answer(0, {"cmd": "spawn"})


def test_a_missing_key_is_said_to_be_missing() -> None:
    """What nobody put is answered with an error code."""
    ((_, answer),) = pmi.KeyValueSpace(1, "").answer(0, {"cmd": "get", "key": "nothing"})

    assert pmi.parse(answer)["rc"] == "-1"


def test_a_barrier_opens_when_all_have_come() -> None:
    """The last rank's arrival lets all out, in both of two barriers."""
    space = pmi.KeyValueSpace(3, "")
    for order in ([0, 1, 2], [2, 0, 1]):
        replies = [space.answer(rank, {"cmd": "barrier_in"}) for rank in order]

        assert replies[:2] == [[], []]
        assert sorted(replies[2]) == [(rank, "cmd=barrier_out\n") for rank in range(3)]


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        pytest.param(["a"], "(vector,(0,1,1))", id="one"),
        pytest.param(["a", "a", "b", "b"], "(vector,(0,1,2),(1,1,2))", id="blocks"),
        pytest.param(["a", "b", "a"], "(vector,(0,1,1),(1,1,1),(0,1,1))", id="in-turn"),
    ],
)
def test_the_mapping_numbers_hosts_in_the_order_of_ranks(hosts: list[str], expected: str) -> None:
    """Ranks of one host are written as one number, in the order of the ranks."""
    assert pmi.process_mapping(hosts) == expected


@pytest.fixture
def manager() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process manager for two ranks, and its port."""
    words = [sys.executable, "-I", "-S", str(pmi.__file__), "2", "(vector,(0,1,2))"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{TOKEN}\n")
        process.stdin.flush()
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_it_ends_when_every_rank_has_left(manager: tuple[subprocess.Popen[str], int]) -> None:
    """After the last goodbye the process is gone, though rank 0 still holds its end."""
    process, port = manager
    ranks = [pmi.connect("127.0.0.1", port, rank, TOKEN) for rank in range(2)]
    for sock in ranks:
        sock.sendall(b"cmd=finalize\n")
        assert sock.recv(4096) == b"cmd=finalize_ack\n"
        sock.close()

    assert process.wait(30) == 0


def test_it_ends_with_rank_0(manager: tuple[subprocess.Popen[str], int]) -> None:
    """When rank 0 is gone, however that came, nothing stays behind."""
    process, port = manager
    with pmi.connect("127.0.0.1", port, 1, TOKEN):
        assert process.stdin is not None
        process.stdin.close()

        assert process.wait(20) == 0


def test_who_waits_for_a_rank_that_died_is_told(manager: tuple[subprocess.Popen[str], int]) -> None:
    """A rank in a barrier sees its connection end when another rank goes without a goodbye."""
    process, port = manager
    with pmi.connect("127.0.0.1", port, 0, TOKEN) as waiting:
        waiting.sendall(b"cmd=barrier_in\n")
        pmi.connect("127.0.0.1", port, 1, TOKEN).close()

        assert waiting.recv(4096) == b""
    assert process.wait(20) == 0


def test_it_is_reached_over_ipv6(manager: tuple[subprocess.Popen[str], int]) -> None:
    """Ranks may come over either family; each is told its own number."""
    _, port = manager
    with pmi.connect("::1", port, 1, TOKEN) as six, pmi.connect("127.0.0.1", port, 0, TOKEN) as four:
        for sock in (six, four):
            sock.sendall(b"cmd=barrier_in\n")

        assert [sock.recv(4096) for sock in (six, four)] == [b"cmd=barrier_out\n"] * 2


def test_a_rank_that_is_not_taken_says_so() -> None:
    """Something else at the manager's port is named, with the rank that came to it."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        port = listener.getsockname()[1]
        entering = pool.submit(pmi.connect, "127.0.0.1", port, 3, TOKEN)
        listener.accept()[0].close()

        with pytest.raises(ConnectionError, match=f"127.0.0.1:{port} does not accept rank 3|reset"):
            entering.result(30)


def test_a_stranger_is_dropped_and_the_others_served(manager: tuple[subprocess.Popen[str], int]) -> None:
    """Another protocol at the port costs its connection only."""
    _, port = manager
    with (
        pmi.connect("127.0.0.1", port, 0, TOKEN) as rank,
        socket.create_connection(("127.0.0.1", port), timeout=30) as stranger,
    ):
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stranger.recv(4096) == b""
        rank.sendall(b"cmd=get_universe_size\n")

        assert rank.recv(4096) == b"cmd=universe_size size=2\n"


@pytest.mark.parametrize(
    ("rank", "token"),
    [
        pytest.param(1, "guess", id="no-token"),
        pytest.param(0, TOKEN, id="here-already"),
        pytest.param(7, TOKEN, id="none"),
    ],
)
def test_who_is_no_rank_that_is_awaited_ends_nothing(
    manager: tuple[subprocess.Popen[str], int], rank: int, token: str
) -> None:
    """A connection that breaks off counts as a lost rank only if it was one."""
    process, port = manager
    with pmi.connect("127.0.0.1", port, 0, TOKEN) as waiting:
        with pytest.raises(ConnectionError):
            pmi.connect("127.0.0.1", port, rank, token)
        with pmi.connect("127.0.0.1", port, 1, TOKEN) as other:
            for sock in (waiting, other):
                sock.sendall(b"cmd=barrier_in\n")

            assert [sock.recv(4096) for sock in (waiting, other)] == [b"cmd=barrier_out\n"] * 2
    assert process.wait(30) == 0


def test_many_strangers_keep_no_rank_out(manager: tuple[subprocess.Popen[str], int]) -> None:
    """Of those that connect and say nothing the oldest make room."""
    _, port = manager
    strangers = [
        socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(pmi._MOST_STRANGERS + 9)
    ]
    try:
        assert strangers[0].recv(1) == b""
        pmi.connect("127.0.0.1", port, 0, TOKEN).close()
    finally:
        for sock in strangers:
            sock.close()
