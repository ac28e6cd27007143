"""The loop of one rank over its peers: all the others for rank 0, rank 0 for the others.

One thread runs it, and it alone touches the sockets.
"""

import contextlib
import queue
import secrets
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable

from qlora_trainer.distributed.peers import (
    Connection,
    Farewell,
    Goodbye,
    Hello,
    Joined,
    LastSeen,
    LostPeer,
    Message,
    Stop,
)

BEAT_SECONDS = 2.0
"""Between two beats, at most; a tenth of the timeout when that is less."""
FLUSH_SECONDS = 1.0
"""How long a last message may take to be sent."""
MOST_STRANGERS = 256
"""Connections that have not said which rank they are; of more the oldest is closed. A rank says it at once."""
DRAIN_SECONDS = 2.0
"""How long a rank that leaves waits for its peers to have read why."""


class PeerConnections:
    """The open connections of a rank, and what wakes its loop."""

    def __init__(self, listener: socket.socket | None) -> None:
        self.open: list[Connection] = []
        self._listener = listener
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.settimeout(0)
        self._wake_out.settimeout(0)
        self.signals = b""
        """Numbers of the signals that `signal_fd` has got, one a byte."""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_in, selectors.EVENT_READ)
        if listener is not None:
            listener.settimeout(0)
            self._selector.register(listener, selectors.EVENT_READ)

    def add(self, sock: socket.socket) -> Connection:
        """Listen to a socket from now on."""
        sock.settimeout(0)
        connection = Connection(sock, opened=time.monotonic())
        self.open.append(connection)
        self._selector.register(sock, selectors.EVENT_READ, connection)
        return connection

    def close(self, connection: Connection) -> None:
        """Close a connection that is open."""
        self.open.remove(connection)
        self._selector.unregister(connection.sock)
        connection.sock.close()

    def wake(self) -> None:
        """End the `wait` of the loop, from another thread."""
        with contextlib.suppress(OSError):  # the loop has ended already
            self._wake_out.send(b".")

    @property
    def signal_fd(self) -> int:
        """For signal.set_wakeup_fd: a signal ends the `wait` of the loop, whatever the main thread is doing."""
        return self._wake_out.fileno()

    def wait(self, seconds: float) -> list[Connection]:
        """The connections that have something to read, waiting so long for one; new ones are accepted meanwhile."""
        readable = []
        for key, _ in self._selector.select(seconds):
            if isinstance(key.data, Connection):
                readable.append(key.data)
            elif key.fileobj is self._wake_in:
                with contextlib.suppress(BlockingIOError):
                    self.signals += self._wake_in.recv(4096)
            elif self._listener is not None and key.fileobj is self._listener:
                with contextlib.suppress(OSError):  # it went before we came
                    self.add(self._listener.accept()[0])
        strangers = [connection for connection in self.open if connection.rank is None]
        for connection in strangers[:-MOST_STRANGERS]:
            self.close(connection)
        return [connection for connection in readable if connection in self.open]

    def ranks(self) -> set[int]:
        """The ranks that have registered."""
        return {connection.rank for connection in self.open if connection.rank is not None}

    def send(self, message: Message) -> None:
        """Send a message to every rank."""
        for connection in self.open:
            if connection.rank is not None:
                connection.send(message)

    def send_last(self, message: Message) -> None:
        """Send a message to every rank, and nothing after it."""
        self.send(message)
        deadline = time.monotonic() + FLUSH_SECONDS
        while any(connection.outbox for connection in self.open) and time.monotonic() < deadline:
            time.sleep(0.01)
            for connection in self.open:
                connection.flush()
        for connection in self.open:
            connection.finish_writing()

    def drain(self) -> None:
        """Wait until each peer has closed: to close first can cut off what it has not read yet."""
        self._selector.unregister(self._wake_in)
        if self._listener is not None:
            self._selector.unregister(self._listener)
        deadline = time.monotonic() + DRAIN_SECONDS
        while self.open and (left := deadline - time.monotonic()) > 0:
            for connection in self.wait(left):
                if not connection.read()[1]:
                    self.close(connection)

    def close_all(self) -> None:
        """Close everything."""
        for connection in list(self.open):
            self.close(connection)
        for sock in (self._listener, self._wake_in, self._wake_out):
            if sock is not None:
                sock.close()
        self._selector.close()


class PeerMonitor:
    """Watches the peers until one is lost or this rank leaves."""

    def __init__(
        self,
        ranks: range,
        timeout_seconds: float,
        stop: threading.Event,
        listener: socket.socket | None = None,
        token: str = "",
    ) -> None:
        """Make a loop that is not running yet.

        Args:
            ranks: the peers.
            timeout_seconds: after which a silent peer is lost.
            stop: set when any rank was asked to stop; once set here, all ranks hear of it.
            listener: of rank 0.
            token: that a Hello must have, of rank 0.
        """
        self.lost_peer: LostPeer | None = None
        self.joined = threading.Event()
        """Every rank has registered, or the loop has ended."""
        self.decided = threading.Event()
        """A peer is lost, and the others have been notified."""
        self.connections = PeerConnections(listener)
        self._ranks = ranks
        self._timeout = timeout_seconds
        self._stop = stop
        self._told_to_stop: set[Connection] = set()
        self._token = token
        self._interval = min(timeout_seconds / 10, BEAT_SECONDS)
        self._next_beat = time.monotonic()
        self._last_seen = LastSeen(ranks, timeout_seconds, time.monotonic())
        self._last_words: queue.SimpleQueue[Goodbye | Farewell] = queue.SimpleQueue()

    def leave(self, message: Goodbye | Farewell) -> None:
        """Have the loop, from another thread, say this to the peers and end."""
        self._last_words.put(message)
        self.connections.wake()

    def run(self, on_lost: Callable[[LostPeer], None]) -> None:
        """Watch; calls `on_lost` once when a peer is lost, after the others have been notified."""
        try:
            while self.lost_peer is None and self._last_words.empty():
                self._turn()
            if self.lost_peer is None:
                self.connections.send_last(self._last_words.get())
                self.connections.drain()
            else:
                # The lost one is notified too: it may only have been stopped.
                self.connections.send_last(self.lost_peer)
                self.decided.set()
                self.joined.set()
                on_lost(self.lost_peer)
        finally:
            self.joined.set()
            self.connections.close_all()

    def _turn(self) -> None:
        """Read all there is, then beat, then check timeouts: who was heard must not be accused."""
        readable = self.connections.wait(max(0.0, self._next_beat - time.monotonic()))
        now = time.monotonic()
        self._last_seen.start_turn(now)
        for connection in readable:
            self._read(connection, now)
        self._spread_stop()
        if now >= self._next_beat:
            self._next_beat = now + self._interval
            for connection in list(self.connections.open):
                if connection.rank is not None:
                    connection.beat()
                elif now - connection.opened > self._timeout:
                    self.connections.close(connection)
        rank = self._last_seen.overdue(now)
        if rank is not None and self.lost_peer is None:
            hosts = {connection.rank: connection.host for connection in self.connections.open}
            reason = f"gave no sign of life for {self._timeout:g} s"
            self.lost_peer = LostPeer(rank, hosts.get(rank, "unknown"), reason)

    def _spread_stop(self) -> None:
        """Tell every peer once that a rank was asked to stop; rank 0 thereby passes on what another one said."""
        if signal.SIGTERM in self.connections.signals:
            self._stop.set()
        self.connections.signals = b""
        if self._stop.is_set():
            for connection in self.connections.open:
                if connection.rank is not None and connection not in self._told_to_stop:
                    self._told_to_stop.add(connection)
                    connection.send(Stop())

    def _read(self, connection: Connection, now: float) -> None:
        messages, is_open = connection.read()
        if messages and connection.rank is not None:
            self._last_seen.saw(connection.rank, now)
        for message in messages:
            if connection not in self.connections.open:
                return
            if connection.rank is None:
                self._register(connection, message, now)
            else:
                self._receive(connection, connection.rank, message)
        if not is_open and connection in self.connections.open:
            self.connections.close(connection)
            self._mark_lost(connection, "died: its connection closed without a goodbye")

    def _register(self, connection: Connection, message: Message, now: float) -> None:
        """Register a rank by its Hello; drop a stranger, or a rank that is here already."""
        here = self.connections.ranks()
        if not (
            isinstance(message, Hello)
            and secrets.compare_digest(message.token.encode(), self._token.encode())
            and message.rank in self._ranks
            and message.rank not in here
        ):
            self.connections.close(connection)
            return
        connection.rank, connection.host = message.rank, message.host
        self._last_seen.saw(message.rank, now)
        if len(here) + 1 == len(self._ranks):
            self.connections.send(Joined())
            self.joined.set()

    def _receive(self, connection: Connection, rank: int, message: Message) -> None:
        match message:
            case Joined():
                self.joined.set()
            case Stop():
                self._stop.set()
            case Goodbye():
                self._last_seen.forget(rank)
                self.connections.close(connection)
            case Farewell(reason):
                self.connections.close(connection)
                self._mark_lost(connection, reason)
            case LostPeer() if self.lost_peer is None:
                self.lost_peer = message
            case _:  # a beat
                pass

    def _mark_lost(self, connection: Connection, reason: str) -> None:
        """A registered peer is lost, unless another was before it."""
        if connection.rank is not None and self.lost_peer is None:
            self.lost_peer = LostPeer(connection.rank, connection.host, reason)
