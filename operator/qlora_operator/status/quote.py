"""Others' words, fit for a status, an Event and a terminal."""

import re
import unicodedata

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


def _is_control(character: str) -> bool:
    return unicodedata.category(character).startswith("C")
