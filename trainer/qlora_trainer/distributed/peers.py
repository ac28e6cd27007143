"""A peer as the heartbeat sees it: the messages to and from it, when it was last seen, how it was lost."""

import json
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields

LINE_BYTES = 65_536
"""No message is longer; what sends more is not a peer."""


@dataclass(frozen=True)
class Hello:
    """The first message of a rank to rank 0."""

    rank: int
    host: str
    token: str
    """Rank 0's, from the store: only who can read the store may say that a rank died."""


@dataclass(frozen=True)
class Joined:
    """Every rank has registered."""


@dataclass(frozen=True)
class Beat:
    """A sign of life."""


@dataclass(frozen=True)
class Stop:
    """A rank was asked to stop: all are."""


@dataclass(frozen=True)
class Goodbye:
    """The sender ends in order."""


@dataclass(frozen=True)
class Farewell:
    """The sender ends for a reason of its own."""

    reason: str
    """Continues a sentence after its subject: `ended: INVALID_DATA: ...`."""


@dataclass(frozen=True)
class LostPeer:
    """A rank that is gone, and how that showed. As a message: the sender has lost it."""

    rank: int
    host: str
    reason: str
    """Follows its subject: `died: ...`, `gave no sign of life for 30 s`, `ended: INVALID_DATA: ...`."""

    def __str__(self) -> str:
        return f"rank {self.rank} on host {self.host} {self.reason}"


Message = Hello | Joined | Beat | Stop | Goodbye | Farewell | LostPeer
_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind for kind in (Hello, Joined, Beat, Stop, Goodbye, Farewell, LostPeer)
}


def encode(message: Message) -> bytes:
    """A message as a line: a JSON object of its kind and its fields."""
    return json.dumps({"kind": type(message).__name__, **asdict(message)}).encode() + b"\n"


def decode(line: bytes) -> Message:
    """The message of a line. Raises ValueError for anything else, RecursionError for JSON that is nested too deep."""
    values = json.loads(line)
    kind = _KINDS.get(str(values.pop("kind", None))) if isinstance(values, dict) else None
    if kind is None or {name: type(value) for name, value in values.items()} != {
        of.name: of.type for of in fields(kind)
    }:
        raise ValueError("not a message of a peer")
    for text in (value for value in values.values() if isinstance(value, str)):
        text.encode()  # JSON has half characters, which are none: UnicodeEncodeError is a ValueError
    return kind(**values)


class LastSeen:
    """When each peer last gave a sign of life. Pure: times are passed in, in seconds of one clock."""

    def __init__(self, ranks: Iterable[int], timeout_seconds: float, now: float) -> None:
        self._timeout = timeout_seconds
        self._seen = dict.fromkeys(ranks, now)
        self._turn = now

    def start_turn(self, now: float) -> None:
        """Start a turn of the loop that listens.

        When the last one began more than half a timeout ago, we ourselves were
        stopped; our peers may have been, too (a frozen machine), so all
        deadlines start again.
        """
        if now - self._turn > self._timeout / 2:
            self._seen = dict.fromkeys(self._seen, now)
        self._turn = now

    def saw(self, rank: int, now: float) -> None:
        """A peer gave a sign of life."""
        if rank in self._seen:
            self._seen[rank] = now

    def forget(self, rank: int) -> None:
        """A peer said goodbye: its silence means nothing."""
        self._seen.pop(rank, None)

    def overdue(self, now: float) -> int | None:
        """The peer that has been silent longest, if that is longer than the timeout."""
        if not self._seen:
            return None
        rank = min(self._seen, key=lambda rank: (self._seen[rank], rank))
        return rank if now - self._seen[rank] > self._timeout else None


@dataclass(eq=False)
class Connection:
    """A non-blocking socket that carries messages."""

    sock: socket.socket
    opened: float
    rank: int | None = None
    """None until it has registered."""
    host: str = "unknown"
    inbox: bytes = b""
    outbox: bytearray = field(default_factory=bytearray)

    def read(self) -> tuple[list[Message], bool]:
        """The whole messages that have come, and whether the connection is still open."""
        try:
            # One read empties the kernel's buffer: beats are small and few.
            received = self.sock.recv(1 << 20)
        except BlockingIOError:
            return [], True
        except OSError:
            return [], False
        *lines, self.inbox = (self.inbox + received).split(b"\n")
        try:
            messages = [decode(line) for line in lines]
        except (ValueError, RecursionError):
            return [], False
        return messages, bool(received) and len(self.inbox) <= LINE_BYTES

    def send(self, message: Message) -> None:
        """Send a message, now or with later calls of `flush`."""
        self.outbox += encode(message)
        self.flush()

    def beat(self) -> None:
        """Send a sign of life, unless an older message still waits to be sent."""
        if self.outbox:
            self.flush()
        else:
            self.send(Beat())

    def flush(self) -> None:
        """Send what the kernel takes now."""
        try:
            while self.outbox:
                del self.outbox[: self.sock.send(self.outbox)]
        except BlockingIOError:
            return
        except OSError:
            # What the peer sent before it went is still to be read, and reading tells that it is gone.
            self.outbox.clear()

    def finish_writing(self) -> None:
        """Let the peer read to the end of what was sent."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:  # it is gone already
            return
