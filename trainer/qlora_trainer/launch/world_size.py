"""How many ranks each pod has, when every launcher finds out only for its own (`topology.ranksPerPod: auto`).

Pods of one job may differ: a kubelet with static CPU management may give one pod the CPUs of a single NUMA node and
another pod those of two. So before rank 0 serves its store at MASTER_ADDR:MASTER_PORT, pod 0's launcher listens there.
Every other launcher connects and sends one line, {"job": uid, "attempt": n, "pods": n, "pod": index, "ranks": n}. Once
all have, each receives {"ranks": [of pod 0, of pod 1, ...]}; when not all come in time, or one does not belong to the
job, it receives {"error": why}. Then the port is closed, for rank 0 to listen on.

By hand: torch's store could carry these numbers, but torch must not be loaded before the thread counts that follow
from them are set, and would keep hundreds of MiB in the launcher.
"""

import asyncio
import socket
import time
from collections.abc import Callable

from pydantic import Field, ValidationError

from qlora_contract.base import ContractModel
from qlora_trainer.host.network import connect, listen, resolve

CONNECT_SECONDS = 5.0
RETRY_SECONDS = 0.25
REQUEST_SECONDS = 10.0
"""For a launcher to say who it is, once it has connected; it does at once."""
POLL_SECONDS = 0.1
"""How soon a request to stop, or the last pod, is noticed."""


class WorldSizeError(Exception):
    """The launchers did not come together; the message says which pod is missing, or does not belong."""


class Stopped(Exception):  # noqa: N818 - a request, not an error
    """Asked to stop while waiting."""


class JoinRequest(ContractModel):
    """What a launcher says about its pod."""

    job: str = Field(max_length=64)
    """The job's uid."""
    attempt: int
    pods: int = Field(ge=1)
    pod: int = Field(ge=0)
    """Completion index."""
    ranks: int = Field(ge=1)
    """How many ranks it will start."""


class JoinReply(ContractModel):
    """What pod 0's launcher answers."""

    ranks: list[int] = Field(default_factory=list)
    """Of each pod, by index."""
    error: str = ""
    """Why no answer came."""


def agree_on_rank_counts(
    own: JoinRequest, host: str, port: int, seconds: float, stopping: Callable[[], bool]
) -> list[int]:
    """The number of ranks of each pod, the same list in every pod. Pod 0 serves it; the others ask.

    Args:
        own: this pod.
        host: host name or address of pod 0.
        port: where it listens.
        seconds: how long to wait for other pods, the same in every pod.
        stopping: asked meanwhile; True: give up.

    Raises:
        WorldSizeError: not every pod came in time, or this pod is of another job or attempt.
        Stopped: `stopping` became true.
    """
    if own.pods == 1:
        return [own.ranks]
    exchange = _serve if own.pod == 0 else _ask

    async def until_stopped() -> list[int]:
        task = asyncio.ensure_future(exchange(own, host, port, seconds))
        while not task.done():
            if stopping():
                raise Stopped
            await asyncio.wait([task], timeout=POLL_SECONDS)
        return task.result()

    return asyncio.run(until_stopped())


# --- pod 0


async def _serve(own: JoinRequest, host: str, port: int, seconds: float) -> list[int]:
    joined: dict[asyncio.StreamWriter, JoinRequest] = {}

    def counts() -> dict[int, int]:
        """Ranks by pod. A pod that connects again replaces its earlier request."""
        return {own.pod: own.ranks} | {request.pod: request.ranks for request in joined.values()}

    async def admit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                line = await reader.readline()
            joined[writer] = _checked(line, own, f"{host}:{port}")
            await reader.read(1)  # until the connection ends
        # ValueError: an endless line. TimeoutError, which is an OSError: a stranger that says nothing.
        except (WorldSizeError, OSError, ValueError) as error:
            writer.write(_line(JoinReply(error=str(error))))
        except asyncio.CancelledError:
            pass  # we are done; Python 3.11 logs a handler that ends as cancelled as an error
        finally:
            joined.pop(writer, None)
            writer.close()

    with _listen(host, port) as listener:
        server = await asyncio.start_server(admit, sock=listener)
        try:
            async with asyncio.timeout(seconds):
                while len(counts()) < own.pods:
                    await asyncio.sleep(POLL_SECONDS)
            reply = JoinReply(ranks=[ranks for _, ranks in sorted(counts().items())])
        except TimeoutError:
            missing = sorted(set(range(own.pods)).difference(counts()))
            reply = JoinReply(
                error=f"{own.pods - len(missing)} of {own.pods} pods reached {host}:{port} within {seconds:g} s; "
                f"pod(s) {', '.join(map(str, missing))} did not: check whether they were started and can reach that "
                "address"
            )
        finally:
            server.close()
    for writer in joined:
        writer.write(_line(reply))
    if reply.error:
        raise WorldSizeError(reply.error)
    return reply.ranks


def _listen(host: str, port: int) -> socket.socket:
    try:
        address = resolve(host, port)
    except OSError:
        address = "0.0.0.0"  # noqa: S104 - the name of a new pod may not resolve yet, and is not loopback
    try:
        return listen(address, port)
    except OSError as error:
        reason = f"pod 0 cannot listen at {host}:{port}: {error.strerror}"
        raise WorldSizeError(f"{reason}; MASTER_PORT must be free") from None


def _checked(line: bytes, own: JoinRequest, address: str) -> JoinRequest:
    """What another launcher says about its pod. Raises WorldSizeError when it does not belong to our job."""
    try:
        theirs = JoinRequest.model_validate_json(line)
    except ValidationError:
        raise WorldSizeError("a job's launcher listens here, and it received something else") from None
    if (theirs.job, theirs.attempt, theirs.pods) != (own.job, own.attempt, own.pods):
        raise WorldSizeError(
            f"pod {theirs.pod} is of job uid {theirs.job!r}, attempt {theirs.attempt}, {theirs.pods} pods, but "
            f"{address} serves uid {own.job!r}, attempt {own.attempt}, {own.pods} pods"
        )
    if not 1 <= theirs.pod < own.pods:
        raise WorldSizeError(f"a launcher says it is pod {theirs.pod}; pods 1 to {own.pods - 1} are expected")
    return theirs


# --- the others


async def _ask(own: JoinRequest, host: str, port: int, seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    reason = ""
    while time.monotonic() < deadline:
        try:
            reader, writer = await asyncio.open_connection(sock=connect(host, port, CONNECT_SECONDS))
            writer.write(_line(own))
            try:
                # Pod 0 has listened since before it accepted this, so it gives up, and says so, before we do.
                line = await asyncio.wait_for(reader.readline(), seconds + CONNECT_SECONDS)
            except TimeoutError:
                reason = "it accepted the connection but did not answer"
                continue
            finally:
                writer.close()
            if line:
                return _counts(line, own)
            reason = "it closed the connection"
        except (OSError, ValueError) as error:  # ValueError: an endless line
            reason = getattr(error, "strerror", None) or str(error)
        await asyncio.sleep(RETRY_SECONDS)
    raise WorldSizeError(
        f"pod {own.pod} waited {seconds:g} s for the launcher of pod 0 at {host}:{port}, which did not answer: {reason}"
    )


def _counts(line: bytes, own: JoinRequest) -> list[int]:
    try:
        reply = JoinReply.model_validate_json(line)
    except ValidationError:
        reply = JoinReply()
    if reply.error:
        raise WorldSizeError(f"pod 0 says: {reply.error}")
    if len(reply.ranks) != own.pods or reply.ranks[own.pod] != own.ranks:
        raise WorldSizeError(
            f"the process that listens at pod 0's address is not a launcher: it answers {line[:80]!r}"
        )
    return reply.ranks


def _line(message: ContractModel) -> bytes:
    return message.model_dump_json(by_alias=True).encode() + b"\n"
