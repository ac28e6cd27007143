"""Messages, silence and connections, without a heartbeat around them."""

import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.distributed.peers import (
    LINE_BYTES,
    Beat,
    Connection,
    Farewell,
    Goodbye,
    Hello,
    Joined,
    LastSeen,
    LostPeer,
    Message,
    decode,
    encode,
)

pytestmark = pytest.mark.process

TIMEOUT = 10.0


def after_turns(*turns: tuple[float, list[int]]) -> int | None:
    """Who is overdue after turns at given times, in each of which given ranks were heard; ranks 1 to 3."""
    last_seen = LastSeen([1, 2, 3], TIMEOUT, 0.0)
    overdue = None
    for now, heard in turns:
        last_seen.start_turn(now)
        for rank in heard:
            last_seen.saw(rank, now)
        overdue = last_seen.overdue(now)
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
    last_seen = LastSeen([1], TIMEOUT, 0.0)
    last_seen.forget(1)
    last_seen.saw(1, 1.0)

    assert last_seen.overdue(1000.0) is None


def test_a_lost_peer_reads_as_a_sentence() -> None:
    """A loss names the rank, its host and how it showed."""
    assert str(LostPeer(2, "b", "died: x")) == "rank 2 on host b died: x"


RANKS, TEXTS = st.integers(0, 1 << 20), st.text(st.characters())
MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(Hello, RANKS, TEXTS, TEXTS),
    st.builds(LostPeer, RANKS, TEXTS, TEXTS),
    st.builds(Farewell, TEXTS),
    st.sampled_from([Joined(), Beat(), Goodbye()]),
)


@given(MESSAGES)
def test_a_message_is_one_line_that_reads_as_it_was_written(message: Message) -> None:
    """Any text travels, also half of a surrogate pair, which a file's name may hold."""
    line = encode(message)

    assert line.count(b"\n") == 1
    assert decode(line) == message


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b'{"kind": "Farewell"}', id="without-a-field"),
        pytest.param(b'{"kind": "Farewell", "reason": 7}', id="another-type"),
        pytest.param(b'{"kind": "LostPeer", "rank": true, "host": "a", "reason": "b"}', id="true-is-no-rank"),
        pytest.param(b'{"kind": "Beat", "more": 1}', id="one-field-more"),
        pytest.param(b'{"kind": "object"}', id="another-kind"),
        pytest.param(b'{"kind": ["Beat"]}', id="kind-of-another-type"),
        pytest.param(b'"Beat"', id="not-an-object"),
    ],
)
def test_a_line_with_other_fields_is_refused(line: bytes) -> None:
    """A message has exactly the fields of its kind, each of its type."""
    with pytest.raises(ValueError, match="not a message of a peer"):
        decode(line)


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
    sent = encode(Beat()) + encode(Goodbye())
    theirs.sendall(sent[:-5])
    first = connection.read()
    theirs.sendall(sent[-5:])

    assert [first, connection.read()] == [([Beat()], True), ([Goodbye()], True)]


def test_what_came_before_the_end_is_read(pair: tuple[Connection, socket.socket]) -> None:
    """A goodbye is not lost with the connection."""
    connection, theirs = pair
    theirs.sendall(encode(Goodbye()))
    theirs.close()

    assert [connection.read(), connection.read()] == [([Goodbye()], True), ([], False)]


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.0\n", b"[]\n", b"\xff\xfe\n", b"[" * 60_000 + b"\n", b"x" * (LINE_BYTES + 1)]
)
def test_anything_but_a_message_ends_the_connection(
    pair: tuple[Connection, socket.socket], sent: bytes
) -> None:
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
            sender.send(Farewell(text))

        assert reader.read()[0] == [Farewell(text) for text in texts]


def test_a_peer_that_reads_nothing_takes_no_memory(pair: tuple[Connection, socket.socket]) -> None:
    """Beats to a peer that was stopped are not piled up beyond the one that is half sent."""
    connection, _ = pair
    connection.send(Farewell("x" * 1_000_000))
    waiting = len(connection.outbox)
    for _ in range(1000):
        connection.beat()

    assert 0 < len(connection.outbox) <= waiting


def test_writing_to_a_peer_that_is_gone_is_left_to_reading(pair: tuple[Connection, socket.socket]) -> None:
    """Nothing is raised, and nothing waits to be sent for ever."""
    connection, theirs = pair
    theirs.close()
    connection.send(Beat())
    connection.finish_writing()

    assert not connection.outbox
    assert connection.read() == ([], False)
