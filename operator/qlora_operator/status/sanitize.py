"""Text of others - pods, kubelets, webhooks - made fit for a status, an Event and a terminal."""

import math
import re
import unicodedata
from typing import Any, TypeVar

from pydantic import BaseModel

Report = TypeVar("Report", bound=BaseModel)

MAX_CHARACTERS = 600
"""Longer text is cut: with the names of a pod and its node around it, it still fits into an Event."""

_TERMINAL_COLORS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


def sanitize(text: str) -> str:
    """One line of at most MAX_CHARACTERS without control characters; empty if there is nothing to read."""
    plain = _TERMINAL_COLORS.sub("", text)
    # All of Unicode's control, format, surrogate and unassigned characters, not only those of ASCII.
    printable = (" " if unicodedata.category(char).startswith("C") else char for char in plain)
    line = " ".join("".join(printable).split())
    return line if len(line) <= MAX_CHARACTERS else f"{line[: MAX_CHARACTERS - 1]}…"


def last_line(text: str) -> str:
    """The last line that is not empty, sanitized."""
    return next((line for raw in reversed(text.splitlines()) if (line := sanitize(raw))), "")


def sanitized(report: Report) -> Report:
    """A report with every text sanitized, and without the numbers that JSON cannot hold."""
    return report.model_copy(update={name: _sanitized(value) for name, value in report})


def _sanitized(value: Any) -> Any:
    if isinstance(value, str):
        return sanitize(value)
    if isinstance(value, BaseModel):
        return sanitized(value)
    if isinstance(value, list):
        return [_sanitized(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
