"""Small files in which the kernel describes itself. They differ by version, so a missing one is not an error.

Functions of this room that read such files take `root`, the directory that contains `proc` and `sys`.
"""

from pathlib import Path

ROOT = Path("/")


def read_text(path: Path) -> str | None:
    """The file's text without surrounding white space; None where it is missing or cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def read_int(path: Path) -> int | None:
    """The decimal number in a file; None where there is no file or something else in it."""
    text = read_text(path) or ""
    return int(text) if text.removeprefix("-").isdecimal() and text.isascii() else None


def parse_fields(text: str) -> list[tuple[str, str]]:
    """(key, value) of each `key: value` line, in order; lines without a colon are left out."""
    split = (line.partition(":") for line in text.splitlines())
    return [(key.strip(), value.strip()) for key, colon, value in split if colon]
