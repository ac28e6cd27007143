"""Notices that a peer died or stopped, whatever the backend is doing.

Rank 0 listens, every other rank connects to it, and both sides send a small
beat. A connection that ends without a goodbye is a peer that died: it is lost
at once. A peer that is silent for the timeout is lost then. Rank 0 tells the
others whom it lost, so that every rank names the same culprit.

All of it happens in one thread (`peer_monitor`), which alone touches the sockets; collectives
release the interpreter's lock, so it runs while the main thread waits in one.
"""

import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import NoReturn, Protocol

from qlora_contract.exit_codes import COLLATERAL_DELAY_SECONDS, ExitCode
from qlora_trainer.distributed.peer_monitor import BEAT_SECONDS, DRAIN_SECONDS, FLUSH_SECONDS, PeerMonitor
from qlora_trainer.distributed.peers import Farewell, Goodbye, Hello, LostPeer
from qlora_trainer.distributed.world import World
from qlora_trainer.errors import RendezvousError
from qlora_trainer.host.network import listen, resolve

_KEY = "heartbeat"
_REASON_CHARACTERS = 2_000


class Store(Protocol):
    """The part of c10d's store that the heartbeat needs."""

    def set(self, key: str, value: str, /) -> None: ...  # noqa: D102
    def get(self, key: str, /) -> bytes: ...  # noqa: D102


class Heartbeat:
    """This rank's heartbeat. A world of one starts nothing.

    `on_lost` is called once, in the heartbeat's thread, at the first loss; see
    `leave` for what it usually does. `host` is the name that peers report.
    `stop` is set on every rank, within moments, once it is set on one.
    """

    def __init__(
        self,
        world: World,
        store: Store,
        timeout_seconds: float,
        on_lost: Callable[[LostPeer], None],
        host: str,
        stop: threading.Event | None = None,
    ) -> None:
        self._world = world
        self._store = store
        self._timeout = timeout_seconds
        self._on_lost = on_lost
        self._host = host
        self._stop = threading.Event() if stop is None else stop
        self._monitor: PeerMonitor | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Connect, and return once every rank has (or one is lost).

        Every rank calls this. Raises RendezvousError when rank 0 cannot listen or be reached.
        """
        if self._world.size == 1:
            return
        doing = "listen for heartbeats" if self._world.rank == 0 else "reach rank 0's heartbeat"
        try:
            if self._world.rank == 0:
                listener = listen(resolve(self._world.master_addr, self._world.master_port), 0)
                token = secrets.token_hex(16)
                here = {"port": listener.getsockname()[1], "token": token, "host": self._host}
                monitor = PeerMonitor(range(1, self._world.size), self._timeout, self._stop, listener, token)
                self._store.set(_KEY, json.dumps(here))
            else:
                rank_0 = json.loads(self._store.get(_KEY))
                address = (self._world.master_addr, rank_0["port"])
                sock = socket.create_connection(address, timeout=self._timeout)
                monitor = PeerMonitor(range(1), self._timeout, self._stop)
                connection = monitor.connections.add(sock)
                connection.rank, connection.host = 0, rank_0["host"]
                connection.send(Hello(self._world.rank, self._host, rank_0["token"]))
        except (OSError, RuntimeError) as error:
            host, reason = self._world.master_addr, str(error).splitlines()[0]
            raise RendezvousError(f"rank {self._world.rank} cannot {doing} at {host}: {reason}") from None
        self._monitor = monitor
        self._thread = threading.Thread(
            target=monitor.run, args=(self._on_lost,), name="heartbeat", daemon=True
        )
        self._thread.start()
        monitor.joined.wait(self._timeout + 2 * BEAT_SECONDS)

    def stop_on_sigterm(self) -> None:
        """Have SIGTERM set `stop`, from now on and in the main thread, which alone may call this.

        Python runs a handler only once the main thread comes out of what it is doing, such as a collective that waits
        for all the others; the heartbeat's thread hears of the signal at once, and so do the peers.
        """
        signal.signal(signal.SIGTERM, lambda *_: self._stop.set())
        if self._monitor is not None:
            signal.set_wakeup_fd(self._monitor.connections.signal_fd, warn_on_full_buffer=False)

    def lost(self, wait_seconds: float = 0.0) -> LostPeer | None:
        """The peer that was lost, waiting so long for the news.

        A collective may fail before the heartbeat knows which peer died:
        wait here then, or the report names no peer.
        """
        monitor = self._monitor
        return monitor.lost_peer if monitor is not None and monitor.decided.wait(wait_seconds) else None

    def goodbye(self) -> None:
        """End in order, after a last barrier. Peers think nothing of it."""
        self._leave(Goodbye())

    def farewell(self, reason: str, code: int) -> None:
        """End for a reason of our own, with an exit code: the peers receive it, and leave naming it."""
        name = next((known.name for known in ExitCode if known == code), f"exit code {code}")
        self._leave(Farewell(f"ended: {name}: {' '.join(reason.split())[:_REASON_CHARACTERS]}"))

    def _leave(self, message: Goodbye | Farewell) -> None:
        if self._monitor is None or self._thread is None:
            return
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)  # what it wrote to is closed with the loop
        self._monitor.leave(message)
        if threading.current_thread() is not self._thread:
            self._thread.join(FLUSH_SECONDS + 2 * DRAIN_SECONDS)


def leave(
    lost: LostPeer, write_report: Callable[[LostPeer], None], code: ExitCode = ExitCode.LOST_PEER
) -> NoReturn:
    """End this process as a peer's collateral, or with another code; what `on_lost` usually does.

    The report has the collateral delay to be written, whatever becomes of its
    storage. The process ends at once after that, since its main thread may
    hang in a collective that cannot be aborted.
    """
    threading.Thread(target=write_report, args=(lost,), name="report", daemon=True).start()
    time.sleep(COLLATERAL_DELAY_SECONDS)
    os._exit(code)
