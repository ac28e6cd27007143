"""The check of the locked packages for known vulnerabilities."""

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "requirements"
AUDIT = runpy.run_path(str(FOLDER / "audit.py"))


def vulnerable(identifier: str, *fixes: str) -> dict[str, Any]:
    """A package as pip-audit tells of it."""
    return {"name": "wheel", "version": "1.0", "vulns": [{"id": identifier, "fix_versions": list(fixes)}]}


@pytest.mark.parametrize(
    ("dependency", "lines"),
    [
        (vulnerable("PYSEC-1", "1.1", "2.0"), ["wheel 1.0: PYSEC-1, fixed in 1.1, 2.0"]),
        (vulnerable("PYSEC-1"), []),
        (vulnerable("PYSEC-2", "1.1"), []),
        ({"name": "wheel", "version": "1.0", "vulns": []}, []),
        ({"name": "wheel", "skip_reason": "not found"}, []),
    ],
    ids=["to be fixed", "without a fix", "accepted", "clean", "unknown to the index"],
)
def test_what_is_to_be_fixed(dependency: dict[str, Any], lines: list[str]) -> None:
    """A vulnerability that another version fixes counts, unless it is accepted."""
    assert AUDIT["fixable"]([dependency], {"PYSEC-2": "never called"}) == lines


def test_accepted_with_a_reason() -> None:
    """Comments and blank lines aside, a line is an id and why it does no harm; an id alone is refused."""
    assert AUDIT["read_accepted"]("# head\n\nPYSEC-1 only on Windows\n") == {"PYSEC-1": "only on Windows"}
    with pytest.raises(ValueError, match="PYSEC-2 has no reason"):
        AUDIT["read_accepted"]("PYSEC-2\n")


def test_the_list_can_be_read() -> None:
    """So can the one in the tree."""
    AUDIT["read_accepted"](AUDIT["ACCEPTED"].read_text())


def test_every_package_is_looked_at() -> None:
    """The lock files that are looked at hold every package of all lock files, and pip-audit can read them."""

    def packages(names: Any) -> set[str]:
        lines = [line for name in names for line in (FOLDER / name).read_text().splitlines()]
        return {line.partition("==")[0] for line in lines if "==" in line}

    everything = {file.name for file in FOLDER.glob("*.txt")}
    assert packages(everything) == packages(AUDIT["LOCKS"])
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", "--dry-run", "--require-hashes", "--disable-pip"]
        + [f"-r{FOLDER / name}" for name in AUDIT["LOCKS"]],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "would have audited" in done.stderr


def test_no_answer() -> None:
    """What pip-audit cannot be asked is told in its own words, not taken for good news."""
    with pytest.raises(AUDIT["NoAnswerError"], match="no/such/file"):
        AUDIT["ask"](["-r", "/no/such/file"])
