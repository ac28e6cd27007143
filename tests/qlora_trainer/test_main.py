"""A rank from its environment to its exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_contract.exit_codes import ExitCode
from qlora_trainer.telemetry.termination import REPORT_ENV

pytestmark = pytest.mark.process


def test_a_rank_without_a_world_says_so(tmp_path: Path) -> None:
    """An environment that no launcher has made ends it for good, with a report, not with a traceback."""
    environ = {**os.environ, "WORLD_SIZE": "2", "RANK": "", REPORT_ENV: str(tmp_path / "report.json")}
    done = subprocess.run(
        [sys.executable, "-m", "qlora_trainer"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    assert done.returncode == ExitCode.INVALID_CONFIGURATION
    assert "Traceback" not in done.stderr
    assert "RANK and MASTER_ADDR must be set" in json.loads((tmp_path / "report.json").read_text())["cause"]
