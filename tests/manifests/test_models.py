"""The page about models against the table of families."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date() -> None:
    """docs/models.md is what the table of families and the tests' cases give now."""
    check = [sys.executable, str(ROOT / "manifests/models.py"), "--check"]
    result = subprocess.run(check, capture_output=True, text=True, timeout=120, check=False)

    assert (result.returncode, result.stdout) == (0, ""), f"run: python manifests/models.py\n{result.stderr}"


def test_every_family_has_a_case() -> None:
    """No family is listed that is not compared with transformers, and no case is of another."""
    from parity_cases import PARITY_CASES
    from qlora_trainer.modeling.families import FAMILIES, WRAPPERS

    assert {case[0] for case in PARITY_CASES.values()} == FAMILIES.keys() | WRAPPERS.keys()
