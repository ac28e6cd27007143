"""Asking rank 0 how far it is, and what may answer instead."""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_contract.progress import ProgressReport, RankFacts
from qlora_operator.controller import progress_client
from qlora_operator.controller.progress_client import MAX_REPORT_BYTES, fetch_progress, parse_progress
from qlora_trainer.telemetry.progress import Progress
from qlora_trainer.telemetry.progress_server import ProgressServer

KNOWN: dict[str, Any] = {
    "version": 1,
    "jobUid": "u",
    "attempt": 1,
    "stage": "Training",
    "step": 3,
    "totalSteps": 7,
    "epoch": 0.4,
    "updatedTime": "2026-01-31T12:00:00Z",
}
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


def a_body(**fields: Any) -> bytes:
    """A report's JSON."""
    return json.dumps({**KNOWN, **fields}).encode()


def http(body: bytes, head: str = "200 OK", *more: str) -> bytes:
    """An answer's bytes."""
    lines = [f"HTTP/1.1 {head}", f"Content-Length: {len(body)}", "Connection: close", *more]
    return "\r\n".join([*lines, "", ""]).encode() + body


@asynccontextmanager
async def served(answer: Answer, paths: list[str]) -> AsyncIterator[int]:
    """A port at which requests are answered so, their first lines noted."""
    tasks = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            paths.append((await reader.readuntil(b"\r\n\r\n")).splitlines()[0].decode())
            await answer(writer)
            await writer.drain()
        except ConnectionError:
            pass  # the client has had enough
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def fetched(answer: Answer, paths: list[str] | None = None) -> ProgressReport | None:
    """What the first attempt of job u is said to have told, when this answers at its port."""

    async def ask() -> ProgressReport | None:
        async with (
            served(answer, paths if paths is not None else []) as port,
            aiohttp.ClientSession() as session,
        ):
            return await fetch_progress(session, "127.0.0.1", port, uid="u", attempt=1)

    return asyncio.run(ask())


def saying(content: bytes) -> Answer:
    """Answers with these bytes."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(content)

    return answer


@pytest.fixture(params=["127.0.0.1", "::1"])
def host(request: pytest.FixtureRequest) -> str:
    """An address of this machine, of either kind."""
    try:
        with socket.create_server((request.param, 0), family=socket.AF_INET6 if ":" in request.param else 2):
            return str(request.param)
    except OSError:
        pytest.skip(f"this machine has no address {request.param}")


@pytest.fixture
def rank_0(host: str) -> Iterator[ProgressServer]:
    """The trainer's own server."""
    report = ProgressReport.model_validate(KNOWN | {"loss": 1.5})
    server = ProgressServer(Progress(report), host, 0)
    yield server
    server.close()


def test_rank_0_s_report_is_fetched(host: str, rank_0: ProgressServer) -> None:
    """The trainer's server is understood, at IPv4 and IPv6 addresses."""

    async def ask() -> ProgressReport | None:
        async with aiohttp.ClientSession() as session:
            return await fetch_progress(session, host, rank_0.port, uid="u", attempt=1)

    report = asyncio.run(ask())
    assert report is not None
    assert (report.step, report.loss) == (3, 1.5)


def test_a_newer_trainer_may_tell_more() -> None:
    """Fields that this operator does not know are passed over, inner ones too."""
    checkpoint = {"step": 2, "time": "2026-01-31T11:00:00Z", "uri": "pvc://a/b", "bytes": 7}
    report = fetched(saying(http(a_body(temperature=80, checkpoint=checkpoint))))

    assert report is not None
    assert report.checkpoint is not None
    assert (report.step, report.checkpoint.step) == (3, 2)


def test_the_largest_job_s_report_is_read_whole() -> None:
    """1,024 ranks with the longest host names and uneven CPU lists fit the limit."""
    ranks = [
        RankFacts(rank=rank, host=63 * "h", isa="avx512_bf16", cpus="0-15,32-47,64-79", threads=48)
        for rank in range(1024)
    ]
    report = fetched(
        saying(http(a_body(ranks=[json.loads(each.model_dump_json(by_alias=True)) for each in ranks])))
    )

    assert report is not None
    assert report.ranks == ranks


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="closes at once"),
        pytest.param(http(a_body())[:-10], id="closes in the middle"),
        pytest.param(b"\x16\x03\x01\x02\x00\r\n\r\n", id="speaks another protocol"),
        pytest.param(http(b""), id="says nothing"),
        pytest.param(http(b"<html>"), id="no JSON"),
        pytest.param(http(b"[]"), id="no report"),
        pytest.param(http(b"[" * 60_000), id="deep JSON"),
        pytest.param(http(b"\xff" + a_body()), id="no text"),
        pytest.param(http(a_body(), "404 Not Found"), id="an error that looks like a report"),
        pytest.param(http(a_body(), "206 Partial Content"), id="a part"),
        pytest.param(http(a_body(jobUid="v")), id="another job"),
        pytest.param(http(a_body(attempt=2)), id="another attempt"),
        pytest.param(http(a_body(version=2)), id="another version"),
        pytest.param(http(a_body(padding="x" * MAX_REPORT_BYTES)), id="huge"),
        pytest.param(http(a_body(), "200 OK", "X: " + "x" * 100_000), id="huge headers"),
        pytest.param(http(a_body(), "200 OK", "Content-Encoding: gzip"), id="not what was asked for"),
    ],
)
def test_what_is_not_our_report_is_none(content: bytes) -> None:
    """Whatever else answers, or breaks off, raises nothing."""
    assert fetched(saying(content)) is None


def test_redirects_are_not_followed() -> None:
    """Rank 0 cannot send the operator elsewhere."""
    paths: list[str] = []

    assert fetched(saying(http(a_body(), "307 Temporary Redirect", "Location: /other")), paths) is None
    assert paths == ["GET /progress HTTP/1.1"]


@pytest.mark.parametrize("first", [b"", http(a_body())[:-10]], ids=["silent", "stuck"])
def test_who_does_not_finish_is_given_up(first: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time holds for the whole answer, however much of it has come."""
    monkeypatch.setattr(progress_client, "FETCH_SECONDS", 0.2)

    async def stuck(writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        await writer.drain()
        await asyncio.Event().wait()

    assert fetched(stuck) is None


@pytest.mark.parametrize(
    ("every", "seconds"), [pytest.param(0.02, 0.3, id="drips"), pytest.param(0.0, 60.0, id="floods")]
)
def test_who_never_stops_is_cut_off(every: float, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow bytes meet the time limit, fast ones the size limit."""
    monkeypatch.setattr(progress_client, "FETCH_SECONDS", seconds)

    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b" " if every else b" " * 65_536)
            await writer.drain()
            await asyncio.sleep(every)

    assert fetched(endless) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid", "not a host", ""])
def test_nobody_there_is_none(host: str) -> None:
    """A refused connection, an unknown name or a bad one is no error: the pod has gone, or not come yet."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]

    async def ask() -> ProgressReport | None:
        async with aiohttp.ClientSession() as session:
            return await fetch_progress(session, host, port, uid="u", attempt=1)

    assert asyncio.run(ask()) is None


def test_the_reason_is_told_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    """Who looks closely learns on one line why there is no report."""
    with caplog.at_level(logging.DEBUG, "qlora_operator.controller.progress_client"):
        fetched(saying(http(b"{}", "500 Oh No")))
        fetched(saying(http(a_body(jobUid="v\n" * 100))))

    first, second = [each.getMessage() for each in caplog.records]
    assert first.endswith(": HTTP status 500")
    assert "not attempt 1 of u" in second
    assert "\n" not in first + second
    assert len(second) < 200


@pytest.mark.parametrize(
    "field",
    [
        b'"loss": NaN',
        b'"loss": 1e999',
        b'"etaSeconds": -Infinity',
        b'"memoryPeak": 1' + 30 * b"0",
        b'"step": 9223372036854775808',
        b'"updatedTime": "yesterday"',
        b'"updatedTime": "2026-02-30T12:00:00Z"',
        b'"updatedTime": "2026-1-31T12:00:00Z"',
        b'"updatedTime": "2026-01-31"',
        b'"checkpoint": {"step": 1, "time": "", "uri": "u"}',
    ],
)
def test_what_no_status_can_hold_is_refused(field: bytes) -> None:
    """The API server would refuse the whole status, again and again."""
    with pytest.raises(ValueError, match=r"not finite|too large|time|format|day|parsing"):
        parse_progress(a_body()[:-1] + b", " + field + b"}")


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_garbage_raises_nothing_but_value_error(body: bytes) -> None:
    """Any bytes are a report or refused."""
    with pytest.raises(ValueError, match=r"."):
        parse_progress(body)
