"""The process manager that MPI's ranks ask for each other's addresses: PMI-1, over TCP.

    python pmi.py SIZE MAPPING

Listens on a free port and writes the port to standard output. Ends when every
rank has left, when one is lost, or when standard input, whose other end rank 0
has, is closed. A process of its own, since MPI asks without Python's lock. It
imports the standard library only, and is run by its path, so that it starts at once.

The wire format is MPICH's simple PMI: lines of `cmd=NAME key=value ...`.
"""

import contextlib
import selectors
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

KVS = "kvs"
_LONGEST = 1024
"""Bytes of a key or of a value, at most."""
_LINE = 16_384
_ANSWER_SECONDS = 60.0
_WELCOME_LINES = 4

Message = dict[str, str]


def parse(line: str) -> Message:
    """`cmd=put kvsname=k key=a value=b c` -> its parts; a value that comes last may have spaces.

    Raises ValueError for what is no such line.
    """
    words = line.strip().split(" ")
    message: Message = {}
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{line.strip()!r} is no line of PMI: {word!r} has no '='")
        if name == "value":
            message[name] = " ".join([value, *words[place + 1 :]])
            break
        message[name] = value
    if "cmd" not in message:
        raise ValueError(f"{line.strip()!r} is no line of PMI: it has no cmd")
    return message


def line(**parts: object) -> str:
    """The line that `parse` reads."""
    return " ".join(f"{name}={value}" for name, value in parts.items()) + "\n"


def mapping(nodes: list[str]) -> str:
    """Which ranks share a node, as MPICH writes it: `(vector,(first node,nodes,ranks each),...)`.

    `nodes` has the name of each rank's node, in rank order.
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(nodes))}
    blocks: list[list[int]] = []
    for name in nodes:
        if blocks and blocks[-1][0] == numbers[name]:
            blocks[-1][2] += 1
        else:
            blocks.append([numbers[name], 1, 1])
    return f"(vector,{','.join('({},{},{})'.format(*block) for block in blocks)})"


class Space:
    """What the ranks have told each other. Pure: messages in, replies out."""

    def __init__(self, size: int, process_mapping: str) -> None:
        self.size = size
        self.values = {"PMI_process_mapping": process_mapping}
        self.waiting: list[int] = []
        """Ranks in the barrier."""
        self.left: set[int] = set()
        """Ranks that said they were done."""

    @property
    def deserted(self) -> bool:
        """Whether every rank has left."""
        return len(self.left) == self.size

    def answer(self, rank: int, message: Message) -> list[tuple[int, str]]:
        """(rank, line) of each reply. Raises ValueError for a command that nobody knows."""
        name = message["cmd"]
        if name == "barrier_in":
            return self._barrier(rank)
        if name == "abort":  # said before its process ends; the heartbeat tells the peers
            return []
        answers: dict[str, Callable[[Message], str]] = {
            "init": lambda _: line(cmd="response_to_init", pmi_version=1, pmi_subversion=1, rc=0),
            "get_maxes": lambda _: line(
                cmd="maxes", kvsname_max=256, keylen_max=_LONGEST, vallen_max=_LONGEST
            ),
            "get_appnum": lambda _: line(cmd="appnum", appnum=0),
            "get_my_kvsname": lambda _: line(cmd="my_kvsname", kvsname=KVS),
            "get_universe_size": lambda _: line(cmd="universe_size", size=self.size),
            "put": self._put,
            "get": self._get,
            "finalize": lambda _: line(cmd="finalize_ack"),
        }
        if name not in answers:
            raise ValueError(f"PMI command {name!r} is not known")
        if name == "finalize":
            self.left.add(rank)
        return [(rank, answers[name](message))]

    def _barrier(self, rank: int) -> list[tuple[int, str]]:
        self.waiting.append(rank)
        if len(self.waiting) < self.size:
            return []
        everyone, self.waiting = self.waiting, []
        return [(each, line(cmd="barrier_out")) for each in everyone]

    def _put(self, message: Message) -> str:
        self.values[message["key"]] = message["value"]
        return line(cmd="put_result", rc=0, msg="success")

    def _get(self, message: Message) -> str:
        if message["key"] not in self.values:
            return line(cmd="get_result", rc=-1, msg="key_not_found", value="unknown")
        return line(cmd="get_result", rc=0, msg="success", value=self.values[message["key"]])


def enter(host: str, port: int, rank: int) -> socket.socket:
    """A rank's connection to the manager, as MPI expects it in PMI_FD. Raises OSError."""
    with contextlib.ExitStack() as failing:
        sock = failing.enter_context(socket.create_connection((host, port), timeout=_ANSWER_SECONDS))
        sock.sendall(line(cmd="initack", pmiid=rank).encode())
        received = b""
        while received.count(b"\n") < _WELCOME_LINES:
            part = sock.recv(_LINE)
            if not part:
                raise ConnectionError(f"the process manager at {host}:{port} does not take rank {rank}")
            received += part
        sock.settimeout(None)
        failing.pop_all()
    return sock


@dataclass(eq=False)
class _Rank:
    """A rank's connection."""

    sock: socket.socket
    number: int | None = None
    inbox: bytes = b""
    """What has come of a line that has not ended."""


@dataclass
class Server:
    """Serves one world, then ends."""

    listener: socket.socket
    space: Space
    ranks: list[_Rank] = field(default_factory=list)
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    broken: bool = False
    """A rank went without a word."""

    def serve(self, parent: int) -> None:
        """Serve until all ranks have left, one is lost, or the file descriptor `parent` is closed.

        Who still waits for a lost rank learns it by the end of its own connection.
        """
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(parent, selectors.EVENT_READ)
        while not (self.broken or self.space.deserted):
            for key, _ in self.selector.select():
                if key.fd == parent:
                    return
                if isinstance(key.data, _Rank):
                    self._read(key.data)
                else:
                    self._accept()

    def _accept(self) -> None:
        sock, _ = self.listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        rank = _Rank(sock)
        self.ranks.append(rank)
        self.selector.register(sock, selectors.EVENT_READ, rank)

    def _read(self, rank: _Rank) -> None:
        try:
            received = rank.sock.recv(1 << 16)
            *lines, rank.inbox = (rank.inbox + received).split(b"\n")
            for each in lines:
                self._take(rank, parse(each.decode()))
            if received and len(rank.inbox) <= _LINE:
                return
        except (OSError, ValueError, KeyError) as error:
            print(f"pmi: rank {rank.number}: {error!r}", file=sys.stderr, flush=True)
        self.selector.unregister(rank.sock)
        self.ranks.remove(rank)
        rank.sock.close()
        self.broken |= rank.number is not None and rank.number not in self.space.left

    def _take(self, rank: _Rank, message: Message) -> None:
        if message["cmd"] == "initack":
            rank.number = int(message["pmiid"])
            facts = (("size", self.space.size), ("rank", rank.number), ("debug", 0))
            replies = [line(cmd="initack"), *(line(cmd="set", **{name: value}) for name, value in facts)]
            rank.sock.sendall("".join(replies).encode())
        elif rank.number is None:
            raise ValueError(f"{message} before initack")
        else:
            for number, reply in self.space.answer(rank.number, message):
                self._send(number, reply)

    def _send(self, number: int, reply: str) -> None:
        for rank in self.ranks:
            if rank.number == number:
                rank.sock.sendall(reply.encode())


def main(arguments: list[str]) -> None:
    """Serve the world of the command line."""
    size, process_mapping = arguments
    if socket.has_dualstack_ipv6():
        listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    else:
        listener = socket.create_server(("", 0), backlog=1024)
    print(listener.getsockname()[1], flush=True)
    Server(listener, Space(int(size), process_mapping)).serve(sys.stdin.fileno())


if __name__ == "__main__":
    main(sys.argv[1:])
