"""How the launchers of a job agree on the world when each pod has as many ranks as its CPUs suggest.

Before rank 0 serves its store at MASTER_ADDR:MASTER_PORT, its launcher listens there. Every other launcher connects
and says one line, {"job": uid, "attempt": n, "pods": n, "pod": index, "ranks": n}, and is told how long pod 0 will
wait for the others, {"wait": seconds}: it started at another time, and pod 0's clock rules. When all have come, each
gets {"ranks": [ranks of pod 0, of pod 1, ...]}, the port is closed, and the ranks are started: rank numbers count over
the pods in the order of their indices. When not all come, or one does not belong, the line is {"error": why}.
"""

import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address

from pydantic import Field, ValidationError

from qlora_contract.base import ContractModel

LINE_BYTES = 65_536
"""No line is longer: what sends more is no launcher."""
CONNECT_SECONDS = 5.0
RETRY_SECONDS = 0.25
TURN_SECONDS = 0.1
"""How soon a request to stop is seen."""


class AgreementError(Exception):
    """The launchers did not come together; the text says who is missing, or who does not belong."""


class Stopped(Exception):  # noqa: N818 - a request, not an error
    """Told to stop while waiting."""


class Hello(ContractModel):
    """What a launcher says of itself."""

    job: str = Field(max_length=64)
    """The job's uid."""
    attempt: int
    pods: int = Field(ge=1)
    pod: int = Field(ge=0)
    """Completion index."""
    ranks: int = Field(ge=1)
    """How many ranks it will start."""


class Answer(ContractModel):
    """What pod 0's launcher answers."""

    ranks: list[int] = Field(default_factory=list)
    """Of each pod, by index."""
    error: str = ""
    """Why there is no agreement."""
    wait: float | None = None
    """Seconds until pod 0 gives up waiting for others; then another line follows."""


def agree(hello: Hello, host: str, port: int, seconds: float, stopping: Callable[[], bool]) -> list[int]:
    """The number of ranks of each pod, the same in every pod. Pod 0 serves; the others ask it.

    Raises:
        AgreementError: not everyone came within `seconds`, or this pod is of another job or attempt.
        Stopped: `stopping` became true.
    """
    if hello.pods == 1:
        return [hello.ranks]
    deadline = time.monotonic() + seconds
    if hello.pod == 0:
        return _Host(hello, host, port, seconds, deadline).gather(stopping)
    return _ask(hello, host, port, seconds, deadline, stopping)


# --- pod 0


@dataclass(eq=False)
class _Guest:
    """A connection to pod 0's launcher."""

    sock: socket.socket
    inbox: bytes = b""


@dataclass
class _Host:
    """Pod 0's launcher while it waits for the others."""

    hello: Hello
    name: str
    port: int
    seconds: float
    deadline: float
    guests: dict[int, tuple[Hello, _Guest]] = field(default_factory=dict)
    """By pod."""

    def gather(self, stopping: Callable[[], bool]) -> list[int]:
        with self._listen() as listener, selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            try:
                while len(self.guests) < self.hello.pods - 1:
                    _check_time(stopping, self.deadline, self._attendance)
                    for key, _ in selector.select(TURN_SECONDS):
                        self._serve(key.data, listener, selector)
                counts = [self.hello.ranks, *(self.guests[pod][0].ranks for pod in range(1, self.hello.pods))]
                self._tell_all(Answer(ranks=counts))
                return counts
            except AgreementError as error:
                self._tell_all(Answer(error=str(error)))
                raise
            finally:
                for key in list(selector.get_map().values()):
                    if key.data is not None:
                        key.data.sock.close()

    def _listen(self) -> socket.socket:
        try:
            if _is_loopback(self.name, self.port):
                return socket.create_server(("127.0.0.1", self.port), backlog=1024)
            # On every address: the name may stand for one that is translated on the way.
            if socket.has_dualstack_ipv6():
                return socket.create_server(
                    ("::", self.port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
                )
            return socket.create_server(("", self.port), backlog=1024)
        except OSError as error:
            reason = f"pod 0 cannot listen at {self.name}:{self.port}: {error.strerror}"
            raise AgreementError(f"{reason}; MASTER_PORT must be free") from None

    def _serve(self, guest: _Guest | None, listener: socket.socket, selector: selectors.BaseSelector) -> None:
        if guest is None:
            with suppress(OSError):  # it is gone again, or there are too many
                sock, _ = listener.accept()
                sock.setblocking(False)  # noqa: FBT003
                selector.register(sock, selectors.EVENT_READ, _Guest(sock))
        elif not self._read(guest):
            selector.unregister(guest.sock)
            guest.sock.close()
            self.guests = {pod: known for pod, known in self.guests.items() if known[1] is not guest}

    def _read(self, guest: _Guest) -> bool:
        """Whether to keep the connection."""
        try:
            received = guest.sock.recv(LINE_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        guest.inbox += received
        if not received or len(guest.inbox) > LINE_BYTES:
            return False
        if not guest.inbox.endswith(b"\n"):
            return True
        try:
            self._admit(_parse_hello(guest.inbox), guest)
        except AgreementError as error:
            _send(guest.sock, Answer(error=str(error)))
            return False
        return True

    def _admit(self, theirs: Hello, guest: _Guest) -> None:
        """Note a pod; one that comes again takes its own place. Raises AgreementError for one that is not of us."""
        ours = self.hello
        if (theirs.job, theirs.attempt, theirs.pods) != (ours.job, ours.attempt, ours.pods):
            raise AgreementError(
                f"pod {theirs.pod} is of job uid {theirs.job!r}, attempt {theirs.attempt}, {theirs.pods} pods, and "
                f"{self.name}:{self.port} serves uid {ours.job!r}, attempt {ours.attempt}, {ours.pods} pods"
            )
        if not 1 <= theirs.pod < ours.pods:
            raise AgreementError(
                f"a launcher says it is pod {theirs.pod}; pods 1 to {ours.pods - 1} are expected"
            )
        self.guests[theirs.pod] = (theirs, guest)
        _send(guest.sock, Answer(wait=max(0.0, self.deadline - time.monotonic())))

    def _attendance(self) -> str:
        missing = sorted(set(range(1, self.hello.pods)) - set(self.guests))
        return (
            f"{self.hello.pods - len(missing)} of {self.hello.pods} pods came to {self.name}:{self.port} within "
            f"{self.seconds:g} s; pod(s) {', '.join(map(str, missing))} did not: see whether they were started and "
            "can reach that address"
        )

    def _tell_all(self, message: ContractModel) -> None:
        for _, guest in self.guests.values():
            _send(guest.sock, message)


def _is_loopback(host: str, port: int) -> bool:
    """Whether a name stands for this machine alone. One that does not resolve yet, as a new pod's, does not."""
    try:
        address = socket.getaddrinfo(host, port, family=socket.AF_INET, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return False
    return ip_address(address).is_loopback


def _parse_hello(line: bytes) -> Hello:
    try:
        return Hello.model_validate_json(line)
    except ValidationError:
        raise AgreementError(
            "this is the launcher of a job's pod 0, and what came is no launcher's line"
        ) from None


def _send(sock: socket.socket, message: ContractModel) -> None:
    """One line, which fits into a send buffer. Who is gone gets none."""
    with suppress(OSError):
        sock.sendall(_encoded(message))


# --- the others


def _ask(
    hello: Hello, host: str, port: int, seconds: float, deadline: float, stopping: Callable[[], bool]
) -> list[int]:
    """Ask pod 0 until it answers. Raises AgreementError and Stopped as `agree` does."""
    reason = ""

    def absent() -> str:
        return (
            f"pod {hello.pod} waited {seconds:g} s for the launcher of pod 0 at {host}:{port}, "
            f"which did not answer: {reason}"
        )

    while True:
        _check_time(stopping, deadline, absent)
        try:
            with _connect(host, port) as sock:
                sock.sendall(_encoded(hello))
                return _verdict(sock, hello, deadline, stopping, absent)
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(RETRY_SECONDS)


def _connect(host: str, port: int) -> socket.socket:
    sock = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
    # While nobody listens on an ephemeral port, a connection to it can meet itself.
    if sock.getsockname()[:2] == sock.getpeername()[:2]:
        sock.close()
        raise ConnectionRefusedError("nobody listens there")
    return sock


def _verdict(
    sock: socket.socket, hello: Hello, deadline: float, stopping: Callable[[], bool], late: Callable[[], str]
) -> list[int]:
    """What pod 0 says in the end. Raises ConnectionError when the connection ends before."""
    sock.settimeout(TURN_SECONDS)
    received = b""
    while True:
        while b"\n" not in received and len(received) <= LINE_BYTES:
            _check_time(stopping, deadline, late)
            with suppress(TimeoutError):
                part = sock.recv(LINE_BYTES)
                if not part:
                    raise ConnectionError("the connection was closed")
                received += part
        line, _, received = received.partition(b"\n")
        answer = _parse_answer(line)
        if answer.wait is None:
            return _counts(answer, line, hello)
        deadline = max(deadline, time.monotonic() + answer.wait + CONNECT_SECONDS)


def _parse_answer(line: bytes) -> Answer:
    try:
        return Answer.model_validate_json(line)
    except ValidationError:
        return Answer()


def _counts(answer: Answer, line: bytes, hello: Hello) -> list[int]:
    if answer.error:
        raise AgreementError(f"pod 0 says: {answer.error}")
    if len(answer.ranks) != hello.pods or answer.ranks[hello.pod] != hello.ranks:
        raise AgreementError(f"what listens where pod 0 should is no launcher: it says {line[:80]!r}")
    return answer.ranks


# --- both


def _check_time(stopping: Callable[[], bool], deadline: float, late: Callable[[], str]) -> None:
    if stopping():
        raise Stopped
    if time.monotonic() >= deadline:
        raise AgreementError(late())


def _encoded(message: ContractModel) -> bytes:
    return message.model_dump_json(by_alias=True).encode() + b"\n"
