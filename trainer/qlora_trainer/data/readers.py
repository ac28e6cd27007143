"""Files of records by their container: where each record came from, and its fields. What they mean is records.py's.

A record may be private: errors name where it is, and never quote it.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_trainer.errors import DataError


@dataclass(frozen=True, slots=True)
class Row:
    """One record, not interpreted yet."""

    location: str
    """`file.jsonl: line 17`, for errors."""
    fields: dict[str, Any]
    """Values are as JSON has them: str, int, float, bool, None, list, dict."""


@dataclass(frozen=True)
class Reader:
    """A container of records."""

    container: str
    """What it is called, such as `JSONL file`."""
    expects: str
    """What such a file holds, for the error about an empty one."""
    rows: Callable[[Path], Iterator[Row]]
    """The records of a file, in its order. Raises DataError, with the location, for what cannot be read."""


def jsonl_rows(path: Path) -> Iterator[Row]:
    """The objects of a JSONL file. Blank lines, a byte order mark and CRLF are fine."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                location = f"{path.name}: line {number}"
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{location}: byte {error.start + 1} is not UTF-8; save the file as UTF-8"
                    ) from None
                if text:
                    yield Row(location, json_object(text, location))
    except OSError as error:
        raise DataError(f"{path}: cannot be read as a JSONL file: {error.strerror}") from error


def json_object(text: str, location: str) -> dict[str, Any]:
    """The object that a line holds. Raises DataError."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at column {error.colno}"
        raise DataError(
            f"{location}: is not JSON ({problem}); one whole object per line is expected"
        ) from None
    except (ValueError, RecursionError):  # a number of thousands of digits, or nesting as deep
        raise DataError(f"{location}: is JSON that is too large to read: a number or its nesting") from None
    if not isinstance(value, dict):
        raise DataError(f"{location}: is not a JSON object; one object per line is expected")
    return value


READERS: dict[str, Reader] = {
    ".jsonl": Reader("JSONL file", "one JSON object per line is expected", jsonl_rows),
}
"""By the suffix of a file's name."""


def reader_for(path: Path) -> Reader:
    """The reader of a file. A file with an unknown suffix is read as JSONL."""
    return READERS.get(path.suffix.lower(), READERS[".jsonl"])
