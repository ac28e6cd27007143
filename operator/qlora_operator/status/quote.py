"""Others' words, fit for a status, an Event and a terminal."""

import math
import re
import unicodedata
from typing import Any, TypeVar

from pydantic import BaseModel

Told = TypeVar("Told", bound=BaseModel)

QUOTED_CHARACTERS = 600
"""Longer words are cut: with the names of a pod and its node around them they still fit into an Event."""

_ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
"""What colours a terminal's text."""


def quote(words: str) -> str:
    """One line of bounded length, without control characters; empty where there is nothing to read."""
    plain = _ESCAPE.sub("", words)
    line = " ".join("".join(" " if _is_control(character) else character for character in plain).split())
    return line if len(line) <= QUOTED_CHARACTERS else f"{line[: QUOTED_CHARACTERS - 1]}…"


def last_line(words: str) -> str:
    """The last line that says anything."""
    return next((line for each in reversed(words.splitlines()) if (line := quote(each))), "")


def presentable(told: Told) -> Told:
    """What somebody told, fit for a status: every text quoted, and numbers that no JSON holds left out."""
    return told.model_copy(update={name: _presentable(value) for name, value in told})


def _presentable(value: Any) -> Any:
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, BaseModel):
        return presentable(value)
    if isinstance(value, list):
        return [_presentable(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_control(character: str) -> bool:
    return unicodedata.category(character).startswith("C")
