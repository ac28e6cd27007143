"""Notices that a peer died or stopped, whatever the backend is doing.

Rank 0 listens, every other rank connects to it, and both sides send a small
beat. A connection that ends without a goodbye is a peer that died: it is lost
at once. A peer that is silent for the timeout is lost then. Rank 0 tells the
others whom it lost, so that every rank names the same culprit.

All of it happens in one thread, which alone touches the sockets; collectives
release the interpreter's lock, so it runs while the main thread waits in one.
"""

import contextlib
import json
import os
import queue
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import NoReturn, Protocol

from qlora_contract.exit_codes import COLLATERAL_DELAY_SECONDS, ExitCode
from qlora_trainer.distributed.interface import listen, resolve
from qlora_trainer.distributed.world import World
from qlora_trainer.errors import RendezvousError
from qlora_trainer.peers import Connection, LostPeer, Message, Silences

_KEY = "heartbeat"
_BEAT_SECONDS = 2.0
"""Between two beats, at most; a tenth of the timeout when that is less."""
_FLUSH_SECONDS = 1.0
_PART_SECONDS = 2.0
"""How long a rank that leaves waits for its peers to have read why."""
_REASON_CHARACTERS = 2_000


class Store(Protocol):
    """The part of c10d's store that the heartbeat needs."""

    def set(self, key: str, value: str, /) -> None: ...  # noqa: D102
    def get(self, key: str, /) -> bytes: ...  # noqa: D102


class Heartbeat:
    """This rank's heartbeat. A world of one starts nothing.

    `on_lost` is called once, in the heartbeat's thread, at the first loss; see
    `leave` for what it usually does. `host` is the name that peers report.
    """

    def __init__(
        self,
        world: World,
        store: Store,
        timeout_seconds: float,
        on_lost: Callable[[LostPeer], None],
        host: str,
    ) -> None:
        self._world = world
        self._store = store
        self._timeout = timeout_seconds
        self._on_lost = on_lost
        self._host = host
        self._watch: _Watch | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Connect, and return once every rank has (or one is lost).

        Every rank calls this. Raises RendezvousError when rank 0 cannot listen or be reached.
        """
        if self._world.size == 1:
            return
        doing = "listen for heartbeats" if self._world.rank == 0 else "reach rank 0's heartbeat"
        try:
            watch = self._serve() if self._world.rank == 0 else self._connect()
        except (OSError, RuntimeError) as error:
            place, reason = self._world.master_addr, str(error).splitlines()[0]
            raise RendezvousError(f"rank {self._world.rank} cannot {doing} at {place}: {reason}") from None
        self._watch = watch
        self._thread = threading.Thread(
            target=watch.run, args=(self._on_lost,), name="heartbeat", daemon=True
        )
        self._thread.start()
        watch.joined.wait(self._timeout + 2 * _BEAT_SECONDS)

    def lost(self, wait_seconds: float = 0.0) -> LostPeer | None:
        """The peer that was lost, waiting so long for the news.

        A collective may fail before the heartbeat has told which peer died:
        wait here then, or the report names nobody.
        """
        watch = self._watch
        return watch.verdict if watch is not None and watch.decided.wait(wait_seconds) else None

    def goodbye(self) -> None:
        """End in order, after a last barrier. Peers think nothing of it."""
        self._part({"kind": "goodbye"})

    def farewell(self, reason: str, code: int) -> None:
        """End for a reason of our own: the peers are told it, and leave naming it."""
        self._part({"kind": "farewell", "reason": _ended(reason, code)})

    def _part(self, message: Message) -> None:
        if self._watch is None or self._thread is None:
            return
        self._watch.part(message)
        if threading.current_thread() is not self._thread:
            self._thread.join(_FLUSH_SECONDS + 2 * _PART_SECONDS)

    def _serve(self) -> "_Watch":
        listener = listen(resolve(self._world.master_addr, self._world.master_port), 0)
        # Only who can read the store may say that a rank died.
        token = secrets.token_hex(16)
        place = {"port": listener.getsockname()[1], "token": token, "host": self._host}
        watch = _Watch(range(1, self._world.size), self._timeout, listener, token)
        self._store.set(_KEY, json.dumps(place))
        return watch

    def _connect(self) -> "_Watch":
        place = json.loads(self._store.get(_KEY))
        address = (self._world.master_addr, place["port"])
        sock = socket.create_connection(address, timeout=self._timeout)
        watch = _Watch(range(1), self._timeout)
        connection = watch.adopt(sock)
        connection.rank, connection.host = 0, place["host"]
        connection.send(
            {"kind": "hello", "rank": self._world.rank, "host": self._host, "token": place["token"]}
        )
        return watch


class _Watch:
    """The loop of one rank over its peers: all the others for rank 0, rank 0 for the others."""

    def __init__(
        self, peers: range, timeout_seconds: float, listener: socket.socket | None = None, token: str = ""
    ) -> None:
        self.verdict: LostPeer | None = None
        self.joined = threading.Event()
        """Every rank has come, or the loop has ended."""
        self.decided = threading.Event()
        """There is a verdict, and the peers were told."""
        self._peers = peers
        self._timeout = timeout_seconds
        self._listener = listener
        self._token = token
        self._interval = min(timeout_seconds / 10, _BEAT_SECONDS)
        self._next_beat = time.monotonic()
        self._silences = Silences(peers, timeout_seconds, time.monotonic())
        self._connections: list[Connection] = []
        self._partings: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._wake_in, self._wake_out = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_in, selectors.EVENT_READ)
        if listener is not None:
            listener.settimeout(0)
            self._selector.register(listener, selectors.EVENT_READ)

    def adopt(self, sock: socket.socket) -> Connection:
        """Listen to a socket from now on."""
        sock.settimeout(0)
        connection = Connection(sock, opened=time.monotonic())
        self._connections.append(connection)
        self._selector.register(sock, selectors.EVENT_READ, connection)
        return connection

    def part(self, message: Message) -> None:
        """Ask the loop, from another thread, to say this and end."""
        self._partings.put(message)
        with contextlib.suppress(OSError):  # the loop has ended already
            self._wake_out.send(b".")

    def run(self, on_lost: Callable[[LostPeer], None]) -> None:
        """Watch until a peer is lost or this rank parts."""
        try:
            while self.verdict is None and self._partings.empty():
                self._turn()
            if self.verdict is None:
                self._take_leave(self._partings.get())
            else:
                self._tell(self.verdict)
                on_lost(self.verdict)
        finally:
            self.joined.set()
            self._close()

    def _turn(self) -> None:
        """Read all there is, then beat, then judge: who was heard must not be accused."""
        ready = self._selector.select(max(0.0, self._next_beat - time.monotonic()))
        now = time.monotonic()
        self._silences.turn(now)
        for key, _ in ready:
            if isinstance(key.data, Connection):
                self._read(key.data, now)
            elif key.fileobj is self._listener:
                self._accept(self._listener)
        if now >= self._next_beat:
            self._next_beat = now + self._interval
            self._beat(now)
        self._judge(now)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it went before we came
            self.adopt(listener.accept()[0])

    def _read(self, connection: Connection, now: float) -> None:
        messages, is_open = connection.read()
        if messages and connection.rank is not None:
            self._silences.heard(connection.rank, now)
        for message in messages:
            if connection in self._connections:
                self._receive(connection, message, now)
        if not is_open and connection in self._connections:
            self._drop(connection)
            self._lose(connection, "died: its connection closed without a goodbye")

    def _receive(self, connection: Connection, message: Message, now: float) -> None:
        kind = message.get("kind")
        if connection.rank is None:
            self._greet(connection, message, now)
        elif kind == "joined":
            self.joined.set()
        elif kind == "goodbye":
            self._silences.forget(connection.rank)
            self._drop(connection)
        elif kind == "farewell":
            self._drop(connection)
            self._lose(connection, str(message["reason"]))
        elif kind == "lost" and self.verdict is None:
            self.verdict = LostPeer(int(message["rank"]), str(message["host"]), str(message["reason"]))

    def _greet(self, connection: Connection, message: Message, now: float) -> None:
        """Take a rank in; drop a stranger."""
        rank, token = message.get("rank"), str(message.get("token"))
        came = {each.rank for each in self._connections} - {None}
        is_ours = secrets.compare_digest(token.encode(), self._token.encode())
        if not (is_ours and isinstance(rank, int) and rank in self._peers and rank not in came):
            self._drop(connection)
            return
        connection.rank, connection.host = rank, str(message.get("host"))
        self._silences.heard(rank, now)
        if len(came) + 1 == len(self._peers):
            self._broadcast({"kind": "joined"})
            self.joined.set()

    def _beat(self, now: float) -> None:
        for connection in list(self._connections):
            if connection.rank is not None:
                connection.beat()
            elif now - connection.opened > self._timeout:
                self._drop(connection)

    def _judge(self, now: float) -> None:
        rank = self._silences.overdue(now)
        if rank is not None and self.verdict is None:
            host = next((each.host for each in self._connections if each.rank == rank), "unknown")
            self.verdict = LostPeer(rank, host, f"gave no sign of life for {self._timeout:g} s")

    def _lose(self, connection: Connection, reason: str) -> None:
        if connection.rank is not None and self.verdict is None:
            self.verdict = LostPeer(connection.rank, connection.host, reason)

    def _tell(self, lost: LostPeer) -> None:
        """Tell the peers, the lost one too: it may only have been stopped."""
        self._say({"kind": "lost", "rank": lost.rank, "host": lost.host, "reason": lost.reason})
        self.decided.set()
        self.joined.set()

    def _take_leave(self, message: Message) -> None:
        """Say it, then wait until each peer has closed: to close first can cut off what it has not read."""
        self._selector.unregister(self._wake_in)
        if self._listener is not None:
            self._selector.unregister(self._listener)
        self._say(message)
        until = time.monotonic() + _PART_SECONDS
        while self._connections and (left := until - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                if isinstance(key.data, Connection) and not key.data.read()[1]:
                    self._drop(key.data)

    def _say(self, message: Message) -> None:
        """Send a last message to every peer."""
        self._broadcast(message)
        until = time.monotonic() + _FLUSH_SECONDS
        while any(each.outbox for each in self._connections) and time.monotonic() < until:
            time.sleep(0.01)
            for connection in self._connections:
                connection.flush()
        for connection in self._connections:
            connection.finish_writing()

    def _broadcast(self, message: Message) -> None:
        for connection in self._connections:
            if connection.rank is not None:
                connection.send(message)

    def _drop(self, connection: Connection) -> None:
        self._connections.remove(connection)
        self._selector.unregister(connection.sock)
        connection.sock.close()

    def _close(self) -> None:
        for connection in list(self._connections):
            self._drop(connection)
        for sock in (self._listener, self._wake_in, self._wake_out):
            if sock is not None:
                sock.close()
        self._selector.close()


def leave(lost: LostPeer, write_report: Callable[[LostPeer], None]) -> NoReturn:
    """End this process as a peer's collateral; what `on_lost` usually does.

    The report has the collateral delay to be written, whatever becomes of its
    storage. The process ends at once after that, since its main thread may
    hang in a collective that cannot be aborted.
    """
    threading.Thread(target=write_report, args=(lost,), name="report", daemon=True).start()
    time.sleep(COLLATERAL_DELAY_SECONDS)
    os._exit(ExitCode.LOST_PEER)


def _ended(reason: str, code: int) -> str:
    names = {int(known): known.name for known in ExitCode}
    name = names.get(code, f"exit code {code}")
    return f"ended: {name}: {' '.join(reason.split())[:_REASON_CHARACTERS]}"
