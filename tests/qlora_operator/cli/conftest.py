"""Launchers that run a test's own program."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlora_operator.api.run_config import to_run_config
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.cli import job_folder, processes
from qlora_operator.cli.processes import Launcher

REPORT = """
import json, os, sys
def report(code, cause):
    path = os.environ["QLORA_TERMINATION_LOG"]
    open(path, "w").write(json.dumps({"exitCode": code, "reason": "R", "cause": cause}))
    sys.exit(code)
index = int(os.environ["JOB_COMPLETION_INDEX"])
"""


@pytest.fixture
def start_launchers(
    tmp_path: Path, a_job: Callable[..., QLoRAJob]
) -> Iterator[Callable[..., list[Launcher]]]:
    """start(program, count=2): launchers that run a program; none of them outlives the test."""
    started: list[Launcher] = []

    def start(program: str, count: int = 2) -> list[Launcher]:
        run = to_run_config(a_job(topology={"pods": count}), uid="u", attempt=1, isa="avx2")
        with job_folder.locked(tmp_path) as lock:
            command = (sys.executable, "-c", REPORT + program)
            started.extend(
                processes.start(
                    run, tmp_path, [[0]] * count, {"team": tmp_path}, [lock.fileno()], 4242, command
                )
            )
        return started

    yield start
    processes.kill(started)
