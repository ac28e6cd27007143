"""The process manager that MPI's ranks ask for each other's addresses: PMI-1, over TCP.

    python pmi.py SIZE MAPPING

Written by hand, because the alternatives need more than they give: mpirun (Hydra) starts ranks itself and wants SSH
between hosts, where our launchers have started them already; PMIx is a library and a daemon on every host. What MPI
asks for is nine commands, and the store of c10d cannot answer them: MPI speaks PMI only.

Reads a token, a line, from standard input, listens on a free port and writes the port to standard output. Only who
has the token is a rank. Ends when every rank has finalized, when one is lost, or when standard input, whose other end
rank 0 has, is closed. A process of its own, since MPI asks without Python's lock. It
imports the standard library only, and is run by its path, so that it starts at once.

The wire format is MPICH's simple PMI: lines of `cmd=NAME key=value ...`.
"""

import contextlib
import secrets
import selectors
import socket
import sys
from dataclasses import dataclass, field

KVS = "kvs"
_LONGEST = 1024
"""Bytes of a key or of a value, at most."""
_LINE = 16_384
_ANSWER_SECONDS = 60.0
_WELCOME_LINES = 4
_MOST_STRANGERS = 256
"""Connections that have not said which rank they are; of more the oldest is closed. A rank says it at once."""

Message = dict[str, str]


def parse(line: str) -> Message:
    """`cmd=put kvsname=k key=a value=b c` -> its parts; a value that comes last may have spaces.

    Raises ValueError for anything else.
    """
    words = line.strip().split(" ")
    message: Message = {}
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{line.strip()!r} is not a line of PMI: {word!r} has no '='")
        if name == "value":
            message[name] = " ".join([value, *words[index + 1 :]])
            break
        message[name] = value
    if "cmd" not in message:
        raise ValueError(f"{line.strip()!r} is not a line of PMI: it has no cmd")
    return message


def line(**parts: object) -> str:
    """The line that `parse` reads."""
    return " ".join(f"{name}={value}" for name, value in parts.items()) + "\n"


def process_mapping(hosts: list[str]) -> str:
    """Which ranks share a host, as MPICH writes it: `(vector,(first host,hosts,ranks of each),...)`.

    `hosts` has the id of each rank's host, in rank order.
    """
    numbers = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
    blocks: list[list[int]] = []
    for host in hosts:
        if blocks and blocks[-1][0] == numbers[host]:
            blocks[-1][2] += 1
        else:
            blocks.append([numbers[host], 1, 1])
    return f"(vector,{','.join('({},{},{})'.format(*block) for block in blocks)})"


class KeyValueSpace:
    """The values that the ranks have published to each other. Pure: messages in, replies out."""

    def __init__(self, size: int, mapping: str) -> None:
        self.size = size
        self.values = {"PMI_process_mapping": mapping}
        self.in_barrier: list[int] = []
        self.finalized: set[int] = set()

    @property
    def all_finalized(self) -> bool:
        """Whether every rank has finalized."""
        return len(self.finalized) == self.size

    def answer(self, rank: int, message: Message) -> list[tuple[int, str]]:
        """(rank, line) of each reply. Raises ValueError for a command outside PMI-1, KeyError for one without a key."""
        match message["cmd"]:
            case "abort":  # sent before the process ends; the heartbeat notifies the peers
                return []
            case "barrier_in":
                self.in_barrier.append(rank)
                if len(self.in_barrier) < self.size:
                    return []
                everyone, self.in_barrier = self.in_barrier, []
                return [(member, line(cmd="barrier_out")) for member in everyone]
            case "finalize":
                self.finalized.add(rank)
        return [(rank, self._reply(message))]

    def _reply(self, message: Message) -> str:
        match message["cmd"]:
            case "init":
                return line(cmd="response_to_init", pmi_version=1, pmi_subversion=1, rc=0)
            case "get_maxes":
                return line(cmd="maxes", kvsname_max=256, keylen_max=_LONGEST, vallen_max=_LONGEST)
            case "get_appnum":
                return line(cmd="appnum", appnum=0)
            case "get_my_kvsname":
                return line(cmd="my_kvsname", kvsname=KVS)
            case "get_universe_size":
                return line(cmd="universe_size", size=self.size)
            case "put":
                self.values[message["key"]] = message["value"]
                return line(cmd="put_result", rc=0, msg="success")
            case "get" if message["key"] in self.values:
                return line(cmd="get_result", rc=0, msg="success", value=self.values[message["key"]])
            case "get":
                return line(cmd="get_result", rc=-1, msg="key_not_found", value="unknown")
            case "finalize":
                return line(cmd="finalize_ack")
            case name:
                raise ValueError(f"PMI command {name!r} is unknown")


def connect(host: str, port: int, rank: int, token: str) -> socket.socket:
    """A rank's connection to the manager, as MPI expects it in PMI_FD. Raises OSError."""
    with contextlib.ExitStack() as failing:
        sock = failing.enter_context(socket.create_connection((host, port), timeout=_ANSWER_SECONDS))
        sock.sendall(line(cmd="initack", pmiid=rank, token=token).encode())
        received = b""
        while received.count(b"\n") < _WELCOME_LINES:
            part = sock.recv(_LINE)
            if not part:
                raise ConnectionError(f"the process manager at {host}:{port} does not accept rank {rank}")
            received += part
        sock.settimeout(None)
        failing.pop_all()
    return sock


@dataclass(eq=False)
class _Connection:
    """Of a rank, or of a stranger."""

    sock: socket.socket
    rank: int | None = None
    """None until it has reported it."""
    inbox: bytes = b""
    """What has come of a line that has not ended."""


@dataclass
class Server:
    """Serves one world, then ends."""

    listener: socket.socket
    space: KeyValueSpace
    token: str
    connections: list[_Connection] = field(default_factory=list)
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    broken: bool = False
    """A rank's connection closed before it finalized."""

    def serve(self, parent: int) -> None:
        """Serve until all ranks have finalized, one is lost, or the file descriptor `parent` is closed.

        A rank that still waits for a lost one sees its own connection close.
        """
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(parent, selectors.EVENT_READ)
        while not (self.broken or self.space.all_finalized):
            for key, _ in self.selector.select():
                if key.fd == parent:
                    return
                if isinstance(key.data, _Connection):
                    if key.data in self.connections:  # it may just have made room for another
                        self._read(key.data)
                else:
                    with contextlib.suppress(OSError):  # it went before we came
                        self._accept()

    def _accept(self) -> None:
        sock, _ = self.listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connections.append(_Connection(sock))
        self.selector.register(sock, selectors.EVENT_READ, self.connections[-1])
        strangers = [connection for connection in self.connections if connection.rank is None]
        if len(strangers) > _MOST_STRANGERS:
            self._close(strangers[0])

    def _read(self, connection: _Connection) -> None:
        try:
            received = connection.sock.recv(1 << 16)
            *lines, connection.inbox = (connection.inbox + received).split(b"\n")
            for text in lines:
                self._receive(connection, parse(text.decode()))
            if received and len(connection.inbox) <= _LINE:
                return
        except (OSError, ValueError, KeyError) as error:
            if connection.rank is not None:  # strangers would fill the log
                print(f"pmi: rank {connection.rank}: {error!r}", file=sys.stderr, flush=True)
        self._close(connection)
        self.broken |= connection.rank is not None and connection.rank not in self.space.finalized

    def _close(self, connection: _Connection) -> None:
        self.selector.unregister(connection.sock)
        self.connections.remove(connection)
        connection.sock.close()

    def _receive(self, connection: _Connection, message: Message) -> None:
        if message["cmd"] == "initack" and connection.rank is None:
            rank = int(message["pmiid"])
            if not secrets.compare_digest(message["token"].encode(), self.token.encode()):
                raise ValueError("it does not know the token")
            if rank not in range(self.space.size) or any(rank == other.rank for other in self.connections):
                raise ValueError(f"rank {rank} is here already, or is none")
            connection.rank = rank
            facts = (("size", self.space.size), ("rank", connection.rank), ("debug", 0))
            replies = [line(cmd="initack"), *(line(cmd="set", **{name: value}) for name, value in facts)]
            connection.sock.sendall("".join(replies).encode())
            return
        if connection.rank is None:
            raise ValueError(f"{message} before initack")
        for rank, reply in self.space.answer(connection.rank, message):
            for other in self.connections:
                if other.rank == rank:
                    other.sock.sendall(reply.encode())


def main(arguments: list[str]) -> None:
    """Serve the world of the command line."""
    size, mapping = arguments
    token = sys.stdin.readline().strip()
    if socket.has_dualstack_ipv6():
        listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    else:
        listener = socket.create_server(("", 0), backlog=1024)
    print(listener.getsockname()[1], flush=True)
    Server(listener, KeyValueSpace(int(size), mapping), token).serve(sys.stdin.fileno())


if __name__ == "__main__":
    main(sys.argv[1:])
