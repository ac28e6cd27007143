"""The operator's log."""

import asyncio
import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_operator.controller import logs

OURS = "qlora_operator.controller.reconciler"
HF = "hf_" + "aB3" * 11 + "x"
AWS_ID = "AKIA" + "A1B2" * 4
AWS_SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
JWT = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl"


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Loggers as they were before, however a test sets them up."""
    loggers = [logging.getLogger(name) for name in (None, "qlora_operator", "kopf", "asyncio")]
    before = [(each, each.level, list(each.handlers), each.propagate) for each in loggers]
    yield
    for logger, level, handlers, propagate in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers
        logger.propagate = propagate


def lines(log_format: logs.Format, *records: tuple[str, int, str], verbose: bool = False) -> list[str]:
    """What is written for (logger, level, message)."""
    stream = io.StringIO()
    logs.set_up(log_format, verbose=verbose, stream=stream)
    for name, level, message in records:
        logging.getLogger(name).log(level, "%s", message)
    return stream.getvalue().splitlines()


def plain(message: str) -> str:
    """A record's message as the plain format shows it."""
    (line,) = lines("plain", (OURS, logging.INFO, message))
    return line.partition(f"{OURS} ")[2]


def test_a_plain_record_is_a_line() -> None:
    """Time, level, logger and message."""
    (line,) = lines("plain", (OURS, logging.INFO, "attempt 0 started"))

    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO    qlora_operator\.controller\.reconciler attempt 0 started",
        line,
    )


def test_a_json_record_is_an_object() -> None:
    """The same facts, each in a field."""
    (line,) = lines("json", (OURS, logging.WARNING, 'a "quoted" word,\na line'))

    fields = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", fields.pop("time"))
    assert fields == {"level": "WARNING", "logger": OURS, "message": 'a "quoted" word,\na line'}


@pytest.mark.parametrize(
    ("attempt", "shown", "fields"),
    [
        pytest.param(
            0, "[team/smollm2 a0]", {"namespace": "team", "job": "smollm2", "attempt": 0}, id="an attempt"
        ),
        pytest.param(None, "[team/smollm2]", {"namespace": "team", "job": "smollm2"}, id="no attempt"),
    ],
)
def test_a_record_tells_its_job(attempt: int | None, shown: str, fields: dict[str, Any]) -> None:
    """Whatever is logged in the block, by whomever, names the job; after it nothing does."""
    with logs.job("team", "smollm2", attempt):
        (line,) = lines("plain", (OURS, logging.INFO, "x"))
        (record,) = lines("json", ("kopf.objects", logging.WARNING, "x"))
    (after,) = lines("plain", (OURS, logging.INFO, "x"))

    assert line.endswith(f" {OURS} {shown} x")
    assert fields.items() <= json.loads(record).items()
    assert ("attempt" in json.loads(record)) is (attempt is not None)
    assert after.endswith(f" {OURS} x")


def test_blocks_nest_and_end_with_errors() -> None:
    """The inner job holds inside, the outer one again after it, even after an error."""
    with logs.job("team", "outer"):
        with pytest.raises(RuntimeError), logs.job("team", "inner"):
            raise RuntimeError
        (line,) = lines("plain", (OURS, logging.INFO, "x"))

    assert "[team/outer]" in line


def test_jobs_at_work_together_keep_their_names() -> None:
    """Tasks that take turns do not lend their job to each other."""
    stream = io.StringIO()
    logs.set_up("plain", stream=stream)

    async def work(name: str) -> None:
        with logs.job("team", name, 1):
            for _ in range(3):
                await asyncio.sleep(0)
                logging.getLogger(OURS).info("works on %s", name)

    async def both() -> None:
        await asyncio.gather(work("a"), work("b"))

    asyncio.run(both())
    told = [line.partition(f"{OURS} ")[2] for line in stream.getvalue().splitlines()]
    assert sorted(told) == 3 * ["[team/a a1] works on a"] + 3 * ["[team/b a1] works on b"]


@pytest.mark.parametrize(
    ("verbose", "shown"),
    [
        pytest.param(False, {(OURS, 20), (OURS, 30), ("kopf.objects", 30), ("aiohttp", 30)}, id="usually"),
        pytest.param(
            True,
            {(OURS, 10), (OURS, 20), (OURS, 30), ("kopf.objects", 20), ("kopf.objects", 30), ("aiohttp", 30)},
            id="verbose",
        ),
    ],
)
def test_levels_depend_on_who_speaks(verbose: bool, shown: set[tuple[str, int]]) -> None:
    """Our own progress is told, others' only when it matters."""
    said = [(name, level, "x") for name in (OURS, "kopf.objects", "aiohttp") for level in (10, 20, 30)]
    records = [json.loads(line) for line in lines("json", *said, verbose=verbose)]

    assert {(each["logger"], getattr(logging, each["level"])) for each in records} == shown


def test_what_kopf_set_up_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    """Started by kopf's command line, nothing is told twice, and asyncio's errors are heard again."""
    from kopf._core.actions import loggers

    loggers.configure()
    (line,) = lines("plain", ("asyncio", logging.ERROR, "Task exception was never retrieved"))

    assert line.endswith("asyncio Task exception was never retrieved")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("log_format", ["plain", "json"])
def test_an_exception_is_told_with_its_traceback(log_format: logs.Format) -> None:
    """In JSON it stays on the record's line; secrets in it are masked in either format."""
    stream = io.StringIO()
    logs.set_up(log_format, stream=stream)
    try:
        int(f"bad token {HF}")
    except ValueError:
        logging.getLogger(OURS).exception("reconciling failed")

    text = stream.getvalue()
    assert HF not in text
    if log_format == "json":
        (line,) = text.splitlines()
        text = json.loads(line)["exception"]
    assert "Traceback (most recent call last)" in text
    assert text.rstrip().endswith("'bad token hf_***'")


def test_a_stack_is_told_too() -> None:
    """As far as it was asked for."""
    stream = io.StringIO()
    logs.set_up("json", stream=stream)
    logging.getLogger(OURS).info("here", stack_info=True)

    assert json.loads(stream.getvalue())["exception"].startswith("Stack (most recent call last)")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        pytest.param(f"token={HF}", "token=hf_***", id="Hugging Face"),
        pytest.param(f"Authorization: Bearer {JWT}", "Authorization: Bearer ***", id="bearer"),
        pytest.param(
            f"{{'authorization': 'bearer {JWT}'}}", "{'authorization': 'bearer ***'}", id="bearer in a dict"
        ),
        pytest.param(
            "Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic ***", id="user name and password"
        ),
        pytest.param(f"key {AWS_ID} expired", "key AKIA*** expired", id="AWS id"),
        pytest.param(f"AWS_SECRET_ACCESS_KEY={AWS_SECRET}", "AWS_SECRET_ACCESS_KEY=***", id="AWS secret"),
        pytest.param(
            f'{{"SecretAccessKey": "{AWS_SECRET}", "x": 1}}',
            '{"SecretAccessKey": "***", "x": 1}',
            id="AWS secret in JSON",
        ),
        pytest.param(f"aws_session_token = {JWT}", "aws_session_token = ***", id="AWS session"),
        pytest.param(
            "https://b.s3/k?X-Amz-Signature=0a1b&X-Amz-Date=2026",
            "https://b.s3/k?X-Amz-Signature=***&X-Amz-Date=2026",
            id="signed URL",
        ),
        pytest.param(
            "proxy http://user:p%40ss@proxy:3128/",
            "proxy http://user:***@proxy:3128/",
            id="password in a URL",
        ),
    ],
)
def test_secrets_are_masked(text: str, shown: str) -> None:
    """What opens a door is not written down; what stands around it is."""
    assert plain(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "hf_hub_download failed",
        "hf://org/name@main",
        "the bearer of bad news; basic information",
        "http://example:8080/a@b",
        "secretAccessKey is missing in Secret s3",
        "sha256 0a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f9",
    ],
)
def test_other_text_is_left_alone(text: str) -> None:
    """A mask over what is no secret would hide causes."""
    assert plain(text) == text


@given(st.text())
def test_no_message_can_forge_a_record(message: str) -> None:
    """Quoted logs and names may hold anything; a plain record's message stays on its line."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.PlainFormatter())
    handler.handle(logging.LogRecord(OURS, logging.INFO, "x.py", 1, "%s", (message,), None))

    assert len(stream.getvalue().splitlines()) == 1


@given(st.text())
def test_every_json_record_is_one_object(message: str) -> None:
    """Whatever the message holds, the line is read back as it was, but for secrets."""
    line = logs.JsonFormatter().format(
        logging.LogRecord(OURS, logging.INFO, "x.py", 1, "%s", (message,), None)
    )

    assert len(line.splitlines()) == 1
    assert json.loads(line)["message"] == logs.redact(message)
