"""docs/troubleshooting.md."""

import re
from pathlib import Path

from qlora_operator.api.names import Reason

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()


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
