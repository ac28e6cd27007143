"""Files that a crash cannot leave half written, and their digests. Errors are the system's own OSErrors."""

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 1 << 26
"""Of a file of settings or facts: a hundred times what the largest ones have."""


def read_json(path: Path) -> Any:
    """The value that a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or larger or nested deeper than anything that is read here; says which.
    """
    with path.open("rb") as stream:
        text = stream.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"it is larger than {MAX_JSON_BYTES >> 20} MiB")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def sha256(path: Path) -> str:
    """The hexadecimal sha256 of a file's bytes, as `sha256sum` prints it."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make creations, renames and removals within a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file durably: a reader, or the machine after a crash, sees the old text or the new one.

    The temporary file beside it has a name that nobody else has: processes of two pods mostly have the same number. A
    process that is killed leaves it behind.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync_file(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
