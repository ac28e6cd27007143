"""Silences and connections, without a heartbeat around them."""

import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.peers import LINE_BYTES, Connection, LostPeer, Silences

TIMEOUT = 10.0


def after_turns(*turns: tuple[float, list[int]]) -> int | None:
    """Who is overdue after turns at given times, in each of which given ranks were heard; ranks 1 to 3."""
    silences = Silences([1, 2, 3], TIMEOUT, 0.0)
    overdue = None
    for now, heard in turns:
        silences.turn(now)
        for rank in heard:
            silences.heard(rank, now)
        overdue = silences.overdue(now)
    return overdue


EVERY = [(float(now), [1, 2, 3]) for now in range(1, 4)]


@pytest.mark.parametrize(
    ("turns", "overdue"),
    [
        pytest.param(EVERY, None, id="all-heard"),
        pytest.param([*EVERY, *((float(now), [1, 3]) for now in range(4, 14))], None, id="silent-until-timeout"),
        pytest.param([*EVERY, *((float(now), [1, 3]) for now in range(4, 15))], 2, id="silent-beyond-timeout"),
        pytest.param([*EVERY, *((float(now), []) for now in range(4, 15))], 1, id="all-silent-lowest-named"),
        pytest.param([*EVERY, (20.0, [])], None, id="we-were-stopped-nobody-accused"),
        pytest.param([*EVERY, (20.0, []), *((float(now), [1, 3]) for now in range(21, 31))], None, id="restarted"),
        pytest.param([*EVERY, (20.0, []), *((float(now), [1, 3]) for now in range(21, 32))], 2, id="full-again"),
        pytest.param(
            [*EVERY, *((now, [1, 3]) for now in (7.5, 12.0, 16.5))], 2, id="a-slow-loop-still-finds-the-silent"
        ),
    ],
)  # fmt: skip
def test_only_silence_that_we_listened_to_counts(
    turns: list[tuple[float, list[int]]], overdue: int | None
) -> None:
    """A peer is overdue after a whole timeout in which we ran and did not hear it."""
    assert after_turns(*turns) == overdue


def test_who_said_goodbye_is_never_overdue() -> None:
    """A forgotten peer's silence means nothing, and hearing it again changes nothing."""
    silences = Silences([1], TIMEOUT, 0.0)
    silences.forget(1)
    silences.heard(1, 1.0)

    assert silences.overdue(1000.0) is None


def test_a_lost_peer_reads_as_a_sentence() -> None:
    """A loss names the rank, its host and how it showed."""
    assert str(LostPeer(2, "b", "died: x")) == "rank 2 on host b died: x"


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    """A connection, and the raw socket at its other end."""
    ours, theirs = socket.socketpair()
    ours.settimeout(0)
    with ours, theirs:
        yield Connection(ours, opened=0.0), theirs


def test_messages_arrive_whole_however_they_are_cut(pair: tuple[Connection, socket.socket]) -> None:
    """Half a line waits for its other half."""
    connection, theirs = pair
    theirs.sendall(b'{"kind": "beat"}\n{"kind": "goo')
    first = connection.read()
    theirs.sendall(b'dbye"}\n')

    assert [first, connection.read()] == [([{"kind": "beat"}], True), ([{"kind": "goodbye"}], True)]


def test_what_came_before_the_end_is_read(pair: tuple[Connection, socket.socket]) -> None:
    """A goodbye is not lost with the connection."""
    connection, theirs = pair
    theirs.sendall(b'{"kind": "goodbye"}\n')
    theirs.close()

    assert [connection.read(), connection.read()] == [([{"kind": "goodbye"}], True), ([], False)]


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.0\n", b"[]\n", b"\xff\xfe\n", b"x" * (LINE_BYTES + 1)])
def test_what_is_no_message_ends_the_connection(pair: tuple[Connection, socket.socket], sent: bytes) -> None:
    """Bytes that no peer sends are not waited on."""
    connection, theirs = pair
    theirs.sendall(sent)

    assert connection.read() == ([], False)


@given(st.lists(st.text(), max_size=20))
def test_what_is_sent_is_what_is_read(texts: list[str]) -> None:
    """Messages come out as they went in, in order."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(0)
        theirs.settimeout(0)
        sender, reader = Connection(ours, opened=0.0), Connection(theirs, opened=0.0)
        for text in texts:
            sender.send({"text": text})

        assert reader.read()[0] == [{"text": text} for text in texts]


def test_a_peer_that_reads_nothing_takes_no_memory(pair: tuple[Connection, socket.socket]) -> None:
    """Beats to a peer that was stopped are not piled up beyond the one that is half sent."""
    connection, _ = pair
    connection.send({"padding": "x" * 1_000_000})
    waiting = len(connection.outbox)
    for _ in range(1000):
        connection.beat()

    assert 0 < len(connection.outbox) <= waiting


def test_writing_to_a_peer_that_is_gone_is_left_to_reading(pair: tuple[Connection, socket.socket]) -> None:
    """Nothing is raised, and nothing waits to be sent for ever."""
    connection, theirs = pair
    theirs.close()
    connection.send({"kind": "beat"})
    connection.finish_writing()

    assert not connection.outbox
    assert connection.read() == ([], False)
