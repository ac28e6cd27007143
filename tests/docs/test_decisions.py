"""Tables of docs/decisions that say which test holds what."""

import re
import subprocess
from pathlib import Path

import pytest

from doc_blocks import ROOT

TESTS_NAMED = {
    "0024-under-real-clusters": 70,
    "0026-long-jobs-and-their-faults": 70,
    "0027-the-first-hour": 80,
    "0034-after-training": 60,
}
"""How many each page names, at least."""


@pytest.fixture(scope="module")
def there() -> set[str]:
    """Names of tests, and of files of tests."""
    command = ["git", "ls-files", "--", "tests/**.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    defined = {name for path in listed for name in re.findall(r"def (test_\w+)", (ROOT / path).read_text())}
    return defined | {Path(path).stem for path in listed}


@pytest.mark.parametrize("page", TESTS_NAMED)
def test_every_test_that_a_table_names_exists(page: str, there: set[str]) -> None:
    """Whoever renames one names it there, too."""
    text = (ROOT / "docs" / "decisions" / f"{page}.md").read_text()
    named = set(re.findall(r"`(?:[\w/]+(?:::|/))?(test_\w+)(?:\.py)?`", text))

    assert len(named) >= TESTS_NAMED[page]
    assert named - there == set()
