"""A peer as the heartbeat sees it: its connection, its silence, its loss."""

import json
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]

LINE_BYTES = 65_536
"""No message is longer; what sends more is no peer."""


@dataclass(frozen=True)
class LostPeer:
    """A rank that is gone, and how that showed."""

    rank: int
    host: str
    reason: str
    """Goes on from the subject: `died: ...`, `gave no sign of life for 30 s`, `ended: INVALID_DATA: ...`."""

    def __str__(self) -> str:
        return f"rank {self.rank} on host {self.host} {self.reason}"


class Silences:
    """How long each peer has been silent. Pure: times are passed in, in seconds of one clock."""

    def __init__(self, ranks: Iterable[int], timeout_seconds: float, now: float) -> None:
        self._timeout = timeout_seconds
        self._heard = dict.fromkeys(ranks, now)
        self._turn = now

    def turn(self, now: float) -> None:
        """Start a turn of the loop that listens.

        When the last one began more than half a timeout ago, we ourselves were
        stopped; our peers may have been, too (a frozen machine), so all
        deadlines start again.
        """
        if now - self._turn > self._timeout / 2:
            self._heard = dict.fromkeys(self._heard, now)
        self._turn = now

    def heard(self, rank: int, now: float) -> None:
        """A peer gave a sign of life."""
        if rank in self._heard:
            self._heard[rank] = now

    def forget(self, rank: int) -> None:
        """A peer said goodbye: its silence means nothing."""
        self._heard.pop(rank, None)

    def overdue(self, now: float) -> int | None:
        """The peer that has been silent longest, if that is longer than the timeout."""
        if not self._heard:
            return None
        rank = min(self._heard, key=lambda each: (self._heard[each], each))
        return rank if now - self._heard[rank] > self._timeout else None


@dataclass(eq=False)
class Connection:
    """A non-blocking socket that carries JSON objects, one a line."""

    sock: socket.socket
    opened: float
    rank: int | None = None
    """None until it said hello."""
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
            messages = [_parse(line) for line in lines]
        except ValueError:
            return [], False
        return messages, bool(received) and len(self.inbox) <= LINE_BYTES

    def send(self, message: Message) -> None:
        """Send a message, now or with later calls of `flush`."""
        self.outbox += json.dumps(message).encode() + b"\n"
        self.flush()

    def beat(self) -> None:
        """Send a sign of life, unless an older message still waits to be sent."""
        if self.outbox:
            self.flush()
        else:
            self.send({"kind": "beat"})

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


def _parse(line: bytes) -> Message:
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("not an object")  # noqa: TRY004 - bad input, as json's own errors are
    return message
