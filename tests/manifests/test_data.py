"""The table of the page about data against the cells that tests try."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]


def test_the_table_is_up_to_date() -> None:
    """docs/data.md says of every container and format what its test says."""
    check = [sys.executable, str(ROOT / "manifests/data.py"), "--check"]
    result = subprocess.run(check, capture_output=True, text=True, timeout=120, check=False)

    assert (result.returncode, result.stdout) == (0, ""), f"run: python manifests/data.py\n{result.stderr}"
