"""The command line starts a cluster that outlives it, says how to reach it, and removes it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from testcluster.__main__ import CLUSTERS
from testcluster.control_plane import down

pytestmark = pytest.mark.cluster
NAME = f"test-{os.getpid()}"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-W", "error", "-m", "testcluster", *arguments, "--name", NAME]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def cleaned() -> Iterator[Path]:
    """The folder of the test's cluster, which is gone afterwards whatever happens."""
    yield CLUSTERS / NAME
    down(CLUSTERS / NAME)
    (CLUSTERS / f"{NAME}.tier").unlink(missing_ok=True)


def test_up_env_and_down(cleaned: Path) -> None:
    """After up, the exported kubeconfig and PATH reach the cluster; after down there is no trace."""
    up = run("up", "--tier", "api", "--audit")
    exports = run("env").stdout
    nodes = subprocess.run(
        ["bash", "-c", f"{exports} kubectl version"], capture_output=True, text=True, check=False
    )
    audited = (cleaned / "audit.log").is_file()
    ended = run("down")
    left = [
        each.pid for each in psutil.process_iter(["cmdline"]) if str(cleaned) in str(each.info["cmdline"])
    ]

    assert up.returncode == 0, up.stderr
    assert "ready in" in up.stdout
    assert "Server Version" in nodes.stdout, nodes.stderr
    assert audited
    assert ended.returncode == 0, ended.stderr
    assert left == []
    assert not list(CLUSTERS.glob(f"{NAME}*"))


def test_a_fleet_has_its_nodes(cleaned: Path) -> None:
    """up --tier fleet makes as many nodes as asked for, with the labels."""
    up = run("up", "--tier", "fleet", "--nodes", "3", "--label", "isa=amx")
    exports = run("env").stdout
    command = f"{exports} kubectl get nodes -l isa=amx -o name"
    nodes = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)

    assert up.returncode == 0, up.stderr
    assert nodes.stdout.split() == ["node/fleet-0", "node/fleet-1", "node/fleet-2"]


def test_env_without_a_cluster_says_what_to_do(cleaned: Path) -> None:
    """Without a cluster, env fails with the command that starts one."""
    asked = run("env")

    assert asked.returncode == 1
    assert "start one with `make cluster-up`" in asked.stderr
    assert asked.stdout == ""
