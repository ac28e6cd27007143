"""docs/troubleshooting.md."""

import re
from pathlib import Path

from qlora_operator.api.names import Reason

ROOT = Path(__file__).parents[2]
PAGE, _, ONE_MACHINE = (ROOT / "docs" / "troubleshooting.md").read_text().partition("\n## qlora run\n")

NOT_OURS = {"qlora: command not found", "Permission denied", "Read-only file system", "transfer refused"}
"""Linux' words, and those of an exit code's name."""


def test_every_reason_has_an_entry() -> None:
    """Each reason that a condition or an attempt can have is explained once, in a heading or in the table of what
    is no trouble, and no other one is."""
    headings = re.findall(r"^### `(\w+)`$", PAGE, re.MULTILINE)
    table = [
        reason
        for row in re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)
        for reason in re.findall(r"`(\w+)`", row)
    ]

    assert sorted([*headings, *table]) == sorted(Reason)


def test_messages_that_are_quoted_are_said() -> None:
    """What a user of one machine sees and looks up is what a program of ours prints."""
    sources = "".join(
        path.read_text() for side in ("operator", "trainer") for path in (ROOT / side).rglob("*.py")
    )
    said = re.sub(r'"\s*\n\s*f?"', "", sources).replace("`", "")
    quoted = [
        cell
        for row in re.findall(r"^\| (`.*?) \|", ONE_MACHINE, re.MULTILINE)
        for cell in re.findall("`(.*?)`", row)
    ]
    parts = [
        part.strip()
        for quote in quoted
        for part in re.split(r"\.\.\.|\d+|\(process|add --volume CLAIM=PATH|SIGKILL", quote)
        if len(part.strip()) > 12
    ]

    assert len(parts) > 8
    assert [part for part in parts if part not in said and part not in NOT_OURS] == []
