"""Fetches the progress of an attempt from its rank 0.

The other end runs a user's model and data, so nothing is taken on trust: neither the size of the answer, nor the time
it takes, nor that it comes from the job's own pod.
"""

import logging
import math
from typing import Any

import aiohttp
from yarl import URL

from qlora_contract import units
from qlora_contract.progress import ProgressReport
from qlora_operator.status.sanitize import sanitized

FETCH_SECONDS = 3.0
"""Timeout of the whole exchange; the poller asks again later."""
MAX_REPORT_BYTES = 1 << 18
"""Twice the size of a report of 1,024 ranks, the most that a job may have."""
MAX_NUMBER = 2**53
"""Larger than any count of bytes or steps; the largest integer that every JSON reader holds exactly."""

_log = logging.getLogger(__name__)


async def fetch_progress(
    session: aiohttp.ClientSession, host: str, port: int, *, uid: str, attempt: int
) -> ProgressReport | None:
    """Rank 0's newest report; None without an answer, or when it is of another job or attempt.

    Args:
        session: shared by all requests; it must send no credentials.
        host: a name or an IPv4 or IPv6 address.
        port: of rank 0's progress server.
        uid: of the job.
        attempt: of the job.
    """
    try:
        report = parse_progress(
            await _body(session, URL.build(scheme="http", host=host, port=port, path="/progress"))
        )
    except (aiohttp.ClientError, OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        _log.debug("no progress from %s port %s: %s", host, port, why)
        return None
    if (report.job_uid, report.attempt) != (uid, attempt):
        _log.debug(
            "%s port %s is attempt %s of job uid %.60r, not attempt %s of %s",
            host,
            port,
            report.attempt,
            report.job_uid,
            attempt,
            uid,
        )
        return None
    return report


def parse_progress(body: bytes) -> ProgressReport:
    """The report in an answer. Fields that a newer trainer has added are ignored.

    Raises ValueError for anything that is not a report, or has a number or a time that a status cannot hold.
    """
    report = ProgressReport.model_validate_json(body, extra="ignore")
    _check_numbers(report.model_dump())
    _check_time(report.updated_time)
    if report.checkpoint is not None:
        _check_time(report.checkpoint.time)
    return sanitized(report)


async def _body(session: aiohttp.ClientSession, url: URL) -> bytes:
    timeout = aiohttp.ClientTimeout(total=FETCH_SECONDS)
    # Uncompressed, so that few bytes cannot become many.
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    async with session.get(url, timeout=timeout, headers=headers, allow_redirects=False) as answer:
        if answer.status != 200:
            raise ValueError(f"HTTP status {answer.status}")
        body = bytearray()
        async for part in answer.content.iter_any():
            body += part
            if len(body) > MAX_REPORT_BYTES:
                raise ValueError(f"more than {MAX_REPORT_BYTES} bytes")
    return bytes(body)


def _check_numbers(value: Any) -> None:
    """Raise ValueError unless every number is finite, and small enough for the API server's 64 bits."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_numbers(item)
    elif isinstance(value, int | float) and not (math.isfinite(value) and abs(value) <= MAX_NUMBER):
        raise ValueError("a number is infinite, NaN or too large")


def _check_time(text: str) -> None:
    """Raise ValueError unless the API server takes it for a time."""
    if units.rfc3339(units.parse_time(text)) != text:
        raise ValueError(f"{text[:60]!r} is not a time such as 2026-01-31T12:00:00Z")
