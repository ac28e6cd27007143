"""Launchers that agree on the number of ranks, over real sockets."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress

import pytest

from qlora_trainer.launch import world_size
from qlora_trainer.launch.world_size import JoinRequest, Stopped, WorldSizeError, agree_on_rank_counts

pytestmark = pytest.mark.process

HOST = "127.0.0.1"
LONG = 60.0
"""Seconds that nothing here takes."""
SHORT = 1.5


@pytest.fixture
def port() -> int:
    """A port that nobody listens on."""
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


def of_pod(pod: int, pods: int = 3, ranks: int = 1, job: str = "u", attempt: int = 1) -> JoinRequest:
    """What a pod's launcher says."""
    return JoinRequest(job=job, attempt=attempt, pods=pods, pod=pod, ranks=ranks)


Start = Callable[..., Future[list[int]]]


@pytest.fixture
def start(port: int) -> Iterator[Start]:
    """start(request, seconds) -> the counts that this launcher will know; none outlives the test."""
    over = threading.Event()

    def started(own: JoinRequest, seconds: float = LONG, stop: threading.Event = over) -> Future[list[int]]:
        return pool.submit(agree_on_rank_counts, own, HOST, port, seconds, stop.is_set)

    with ThreadPoolExecutor(16) as pool:
        yield started
        over.set()


def connected(port: int) -> socket.socket:
    """A connection to pod 0's launcher, once it listens."""
    while True:
        with suppress(ConnectionRefusedError):
            sock = socket.create_connection((HOST, port), timeout=LONG)
            if sock.getsockname() != sock.getpeername():
                return sock
            sock.close()


def reply_to(sock: socket.socket, message: object) -> bytes:
    """What the launcher answers, to the end of the connection."""
    sock.sendall(json.dumps(message).encode() + b"\n")
    return b"".join(iter(lambda: sock.recv(65_536), b""))


def test_a_pod_alone_asks_nobody() -> None:
    """One pod knows the world at once, whatever the address."""
    assert agree_on_rank_counts(of_pod(0, pods=1, ranks=5), "no.such.host.invalid", 1, 0.0, lambda: True) == [
        5
    ]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)], ids=["first", "last", "between"])
def test_launchers_agree_in_whatever_order_they_come(start: Start, order: tuple[int, ...]) -> None:
    """Every pod gets the counts of all, by index."""
    futures = [start(of_pod(pod, ranks=pod + 2)) for pod in order]

    assert [future.result(LONG) for future in futures] == [[2, 3, 4]] * 3


def test_the_port_is_free_afterwards(start: Start, port: int) -> None:
    """Rank 0 can listen where its launcher did, at once."""
    for future in [start(of_pod(pod)) for pod in range(3)]:
        future.result(LONG)

    with socket.create_server((HOST, port)) as listener:
        assert listener.getsockname()[1] == port


@pytest.mark.parametrize("earlier", [0, SHORT / 2])
def test_a_missing_pod_is_named_to_everyone(start: Start, earlier: float) -> None:
    """Those that came hear from pod 0 who did not, also when they started earlier and so would give up earlier."""
    second = start(of_pod(1), SHORT)
    time.sleep(earlier)
    first = start(of_pod(0), SHORT)

    with pytest.raises(
        WorldSizeError, match=r"^2 of 3 pods reached .* within 1.5 s; pod\(s\) 2 did not: check"
    ):
        first.result(LONG)
    with pytest.raises(WorldSizeError, match=r"pod 0 says: 2 of 3 pods reached .*; pod\(s\) 2 did not"):
        second.result(LONG)


def test_a_missing_pod_0_is_named(start: Start) -> None:
    """With the address that was tried, and what happened there."""
    future = start(of_pod(1), 0.3)

    with pytest.raises(WorldSizeError, match=r"pod 1 waited 0.3 s for the launcher of pod 0 at .*refused"):
        future.result(LONG)


@pytest.mark.parametrize(
    "stranger",
    [
        pytest.param(of_pod(1, job="other"), id="job"),
        pytest.param(of_pod(1, attempt=2), id="attempt"),
        pytest.param(of_pod(1, pods=2), id="pods"),
    ],
)
def test_a_pod_of_another_job_is_sent_away(start: Start, stranger: JoinRequest) -> None:
    """It ends with both names, and the gang comes together without it."""
    first, wrong = start(of_pod(0)), start(stranger)

    with pytest.raises(
        WorldSizeError, match=r"pod 1 is of job uid .*, attempt .*serves uid 'u', attempt 1, 3 pods"
    ):
        wrong.result(LONG)
    right = [start(of_pod(pod)) for pod in (1, 2)]
    assert first.result(LONG) == right[0].result(LONG) == right[1].result(LONG) == [1, 1, 1]


@pytest.mark.parametrize("pod", [0, 3])
def test_an_index_that_cannot_be_is_sent_away(start: Start, port: int, pod: int) -> None:
    """There is one pod 0, and none beyond the last."""
    first = start(of_pod(0))
    with connected(port) as sock:
        answer = reply_to(sock, of_pod(pod).model_dump())

    assert f"a launcher says it is pod {pod}; pods 1 to 2 are expected".encode() in answer
    others = [start(of_pod(pod)) for pod in (1, 2)]
    assert first.result(LONG) == others[0].result(LONG) == [1, 1, 1]


@pytest.mark.parametrize(
    "line", [b"GET / HTTP/1.1\r\n\r\n\n", b"\xff\n", b"[]\n", b'{"job": "u"}\n', b'{"pod": true}\n', b"x" * 70_000]
)  # fmt: skip
def test_whoever_is_not_a_launcher_is_sent_away(start: Start, port: int, line: bytes) -> None:
    """Whatever it sends, the gang comes together."""
    first = start(of_pod(0))
    with connected(port) as sock:
        sock.sendall(line)
        with suppress(ConnectionResetError):
            assert b"a job's launcher listens here" in sock.recv(65_536) or len(line) > 65_536
    others = [start(of_pod(pod)) for pod in (1, 2)]

    assert first.result(LONG) == others[0].result(LONG) == [1, 1, 1]


def test_a_silent_connection_holds_nobody_up(start: Start, port: int) -> None:
    """Nor does one that sends half a line."""
    first = start(of_pod(0))
    with connected(port) as silent, connected(port) as half:
        half.sendall(b'{"job": "u", ')
        others = [start(of_pod(pod)) for pod in (1, 2)]

        assert first.result(LONG) == others[1].result(LONG) == [1, 1, 1]
        assert silent.recv(1) == b""


def test_a_pod_that_comes_again_takes_its_place(start: Start, port: int) -> None:
    """Its connection broke: what counts is what it says last, and the others are still waited for."""
    first = start(of_pod(0))
    with connected(port) as sock:
        sock.sendall(of_pod(1, ranks=9).model_dump_json().encode() + b"\n")
    others = [start(of_pod(pod, ranks=2)) for pod in (2, 1)]

    assert first.result(LONG) == others[0].result(LONG) == [1, 2, 2]


@pytest.mark.parametrize("pod", [0, 1])
def test_a_launcher_that_is_told_to_stop_stops(start: Start, pod: int) -> None:
    """While it waits for the others, whichever it is."""
    stop = threading.Event()
    future = start(of_pod(pod), LONG, stop)
    stop.set()

    with pytest.raises(Stopped):
        future.result(LONG)


def test_a_port_that_is_taken_is_named(start: Start, port: int) -> None:
    """Pod 0 cannot serve where somebody else listens."""
    with socket.create_server((HOST, port)):
        future = start(of_pod(0))
        with pytest.raises(
            WorldSizeError, match=rf"cannot listen at {HOST}:{port}: .*MASTER_PORT must be free"
        ):
            future.result(LONG)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        pytest.param(b"SSH-2.0-OpenSSH\n", "is not a launcher: it answers b'SSH", id="nonsense"),
        pytest.param(b'{"ranks": [1, 1]}\n', "is not a launcher", id="too few"),
        pytest.param(b'{"ranks": [1, 7, 1]}\n', "is not a launcher", id="not our count"),
        pytest.param(b'{"wait": 0.1}\n', "is not a launcher: it answers b'{", id="another protocol"),
        pytest.param(b"", r"waited 1.5 s .*(closed|reset)", id="closed"),
        pytest.param(None, r"waited 1.5 s .*did not answer", id="silent"),
    ],
)
def test_somebody_else_listens(
    start: Start, port: int, answer: bytes | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What answers otherwise than a launcher is named; what does not answer is given up in time."""
    monkeypatch.setattr(world_size, "CONNECT_SECONDS", SHORT)
    with socket.create_server((HOST, port)) as listener, ExitStack() as opened:
        listener.settimeout(0.05)
        future = start(of_pod(1), SHORT)
        while not future.done():
            with suppress(TimeoutError):
                sock = opened.enter_context(listener.accept()[0])
                if answer is not None:
                    sock.sendall(answer)
                    sock.close()

    with pytest.raises(WorldSizeError, match=says):
        future.result(LONG)
