"""The operator's log: one record per line, plain or JSON, with the job that it is about and without secrets."""

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TextIO

Format = Literal["plain", "json"]

HIDDEN = "***"

_SECRETS = (
    re.compile(r"\b((?:hf|api_org)_)[A-Za-z0-9]{16,}"),  # Hugging Face tokens; hf_hub_download does not match
    re.compile(
        r"""(\bbearer\s+|authorization["']?\s*:\s*["']?basic\s+)[A-Za-z0-9._~+/=-]{8,}""", re.IGNORECASE
    ),
    re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"),  # ids of AWS access keys
    re.compile(
        r"""((?:secret_?access_?key|session_?token)["']?\s*[=:]\s*["']?)[^\s"',;&}]+""", re.IGNORECASE
    ),
    re.compile(r"(X-Amz-(?:Signature|Credential|Security-Token)=)[^\s&\"']+", re.IGNORECASE),
    re.compile(r"(://[^\s/:@]*:)[^\s/@]+(?=@)"),  # a proxy's password in its URL
)
"""What group 1 matches may stay."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True)
class JobRef:
    """The job, and if known the attempt, that records are about."""

    namespace: str
    name: str
    attempt: int | None = None

    def __str__(self) -> str:
        attempt = "" if self.attempt is None else f" a{self.attempt}"
        return f"{self.namespace}/{self.name}{attempt}"


_job: ContextVar[JobRef | None] = ContextVar("job", default=None)


@contextmanager
def job(namespace: str, name: str, attempt: int | None = None) -> Iterator[None]:
    """Within the block, also in tasks started there, records are about this job."""
    token = _job.set(JobRef(namespace, name, attempt))
    try:
        yield
    finally:
        _job.reset(token)


def set_up(log_format: Format, *, verbose: bool = False, stream: TextIO | None = None) -> None:
    """Log to a stream, and nowhere else.

    Args:
        log_format: `plain` for people, `json` for collectors: an object a line.
        verbose: our own records from DEBUG and kopf's from INFO, instead of INFO and WARNING.
        stream: standard error unless given.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else PlainFormatter())
    root = logging.getLogger()
    # Replaces the handlers, kopf's among them, so that no record is logged twice.
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("qlora_operator").setLevel(logging.DEBUG if verbose else logging.INFO)
    # At DEBUG kopf logs every event of every object.
    logging.getLogger("kopf").setLevel(logging.INFO if verbose else logging.WARNING)
    # kopf's command line mutes it, and with it the exceptions of tasks that were never awaited.
    logging.getLogger("asyncio").propagate = True


def redact(text: str) -> str:
    """The text with tokens, keys and passwords masked."""
    for pattern in _SECRETS:
        text = pattern.sub(lambda match: (match[1] or "") + HIDDEN, text)
    return text


class PlainFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO    qlora_operator.controller.cache [team/smollm2 a0] message`, a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The record, its message on one line."""
        about = f" [{_job.get()}]" if _job.get() else ""
        message = _CONTROL.sub(lambda match: repr(match[0])[1:-1], redact(record.getMessage()))
        line = f"{_stamp(record)} {record.levelname:7} {record.name}{about} {message}"
        return "\n".join([line, *filter(None, [_traceback(record)])])


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message; namespace, job, attempt and exception if any."""

    def format(self, record: logging.LogRecord) -> str:
        """The record, with the whole traceback."""
        about = _job.get()
        fields = {
            "time": _stamp(record),
            "level": record.levelname,
            "logger": record.name,
            "message": redact(record.getMessage()),
            "namespace": about and about.namespace,
            "job": about and about.name,
            "attempt": about and about.attempt,
            "exception": _traceback(record) or None,
        }
        return json.dumps({key: value for key, value in fields.items() if value is not None})


_exceptions = logging.Formatter()


def _traceback(record: logging.LogRecord) -> str:
    texts = [_exceptions.formatException(record.exc_info) if record.exc_info else record.exc_text or ""]
    if record.stack_info:
        texts.append(_exceptions.formatStack(record.stack_info))
    return redact("\n".join(filter(None, texts)))


def _stamp(record: logging.LogRecord) -> str:
    """RFC 3339, UTC, with milliseconds."""
    moment = datetime.fromtimestamp(record.created, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03}Z"
