"""The whole way, as a user goes it: demo/cluster.sh on two real nodes."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from testcluster.binaries import ensure
from testcluster.cluster import Cluster

pytestmark = [pytest.mark.nodes, pytest.mark.model, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "manifests" / "samples" / "two-nodes.yaml"


@pytest.fixture
def files(demo_model: Path, demo_data: Path, tmp_path: Path) -> Path:
    """What `make demo-data` writes."""
    shutil.copytree(demo_model, tmp_path / "files" / "model")
    shutil.copytree(demo_data, tmp_path / "files" / "data")
    return tmp_path / "files"


def test_the_demo_succeeds(
    operator: Cluster, node_namespace: str, volume: Path, files: Path, attach: Any, tmp_path: Path
) -> None:
    """From `helm upgrade --install` to an answer of the adapter: a rank on each node with a core of its own, an
    adapter that is better than the base and that stock peft loads, and columns that say so."""
    done = whole_way(operator, node_namespace, files, tmp_path / "out")
    print(done.stdout, done.stderr, sep="\n")
    assert done.returncode == 0

    phases = re.findall(r"^demo +([A-Z][a-z]+) ", done.stdout, re.MULTILINE)
    assert [phase for phase in dict.fromkeys(phases) if phase in ("Starting", "Running", "Succeeded")] == [
        "Starting",
        "Running",
        "Succeeded",
    ]
    status = attach("demo", volume).status
    assert status["placement"]["nodes"] == ["node-a", "node-b"]
    assert status["placement"]["worldSize"] == 2
    cpus = [rank["cpus"] for rank in status["ranks"]]
    assert len(set(cpus)) == 2, "each rank has a core of its own"
    assert all(cpu.isdigit() for cpu in cpus)
    assert status["adapter"]["evalLoss"] < status["adapter"]["baseEvalLoss"]
    assert status["restarts"] == {"user": 0, "infrastructure": 0}
    row = operator.kubectl("-n", node_namespace, "get", "qlj", "demo", "--no-headers").split()
    total = yaml.safe_load(SAMPLE.read_text())["spec"]["training"]["maxSteps"]
    assert row[:2] == ["demo", "Succeeded"]
    assert f"{total}/{total}" in row
    answers(done.stdout)
    manifest = json.loads((tmp_path / "out" / "adapter" / "manifest.json").read_text())
    assert status["adapter"]["sha256"] in json.dumps(manifest)


def whole_way(cluster: Cluster, namespace: str, files: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Run demo/cluster.sh."""
    programs = ensure("api", "helm")
    folders = [str(programs[name].parent) for name in ("kubectl", "helm")]
    environ = {
        **os.environ,
        "PATH": ":".join([*folders, os.environ["PATH"]]),
        "KUBECONFIG": str(cluster.kubeconfig),
        "QLORA_OPERATOR_IMAGE": cluster.image("operator"),
        "QLORA_TRAINER_IMAGE": cluster.image("trainer"),
        "DEMO_FILES": str(files),
        "DEMO_OUT": str(out),
    }
    command = [ROOT / "demo" / "cluster.sh", namespace, "--values", ROOT / "demo" / "small-cluster.yaml"]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=1100)


def answers(printed: str) -> None:
    """The adapter, in stock peft, says something else than the base."""
    _, _, said = printed.partition("Base model\n")
    base, _, adapted = said.partition("With the adapter\n")

    assert base.strip()
    assert adapted.strip()
    assert base.strip() != adapted.strip()
