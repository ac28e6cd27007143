"""The standard descriptors of a process."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

PROGRAM = """
from qlora_contract.descriptors import open_standard_descriptors
open_standard_descriptors()
import os, sys
with open(sys.argv[1], "w") as file:
    os.write(1, b"x"); os.write(2, b"y")
    print("x", flush=True)
    print("y", file=sys.stderr, flush=True)
    file.write(f"{file.fileno()}")
"""


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-", ""])
def test_what_is_written_to_a_closed_descriptor_is_in_no_file(closed: str, tmp_path: Path) -> None:
    """The next file that is opened has a number of its own."""
    path = tmp_path / "file"
    words = ["sh", "-c", f'exec "$0" "$@" {closed}', sys.executable, "-c", PROGRAM, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert int(path.read_text()) > 2
    if not closed:
        assert (done.stdout, done.stderr) == ("xx\n", "yy\n")
