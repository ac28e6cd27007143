"""Every command of the documentation that talks to a cluster is put to a real API server, as a dry run where it would
change something; so is every object in it.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from doc_blocks import ROOT, Block, blocks, commands
from testcluster.binaries import ensure
from testcluster.cluster import Cluster

pytestmark = pytest.mark.cluster

NODE = "documented"
NAMESPACES = ("team", "qlora-system", "qlora-a", "qlora-b", "team-a", "team-b")
CLAIM = """\
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: team-data}
spec:
  accessModes: [ReadWriteMany]
  resources: {requests: {storage: 1Gi}}
"""
CHANGES = re.compile(r"kubectl (-n \S+ )?(create|apply|label|delete)\b")
UNKNOWN_KINDS = {"NodeFeatureRule", "InferenceService"}
"""Of other projects, whose definitions the cluster does not have."""


class Desk:
    """Where a reader sits: the repository's files, those that the pages name, kubectl, and helm."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder = folder
        for name in ("charts", "manifests"):
            (folder / name).symlink_to(ROOT / name)
        readme = next(block for block in blocks() if block.page == "README.md" and block.language == "yaml")
        (folder / "job.yaml").write_text(readme.text)
        (folder / "claim.yaml").write_text(CLAIM)
        self.job = str(yaml.safe_load(readme.text)["metadata"]["name"])
        programs = ensure("api", "helm")
        path = {str(programs[name].parent) for name in ("kubectl", "helm")}
        homes = {f"HELM_{kind}_HOME": f"{folder}/helm/{kind}" for kind in ("CACHE", "CONFIG", "DATA")}
        self.environment = {
            **os.environ,
            **homes,
            "KUBECONFIG": str(cluster.kubeconfig),
            "PATH": ":".join([*path, os.environ["PATH"]]),
        }

    def run(self, command: str) -> tuple[int, str]:
        """Run a command as a reader would; its exit code, and what it printed."""
        command = re.sub(r"\bNODE\b", NODE, re.sub(r"\bNAME\b", self.job, command))
        command = command.replace("REGISTRY", "registry.example")
        if CHANGES.search(command):
            command += " --dry-run=server"
        elif command.startswith("helm install"):
            # What the tests have applied themselves belongs to no release.
            command += " --dry-run=server --take-ownership"
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        return done.returncode, done.stdout


@pytest.fixture(scope="module")
def desk(told_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """One for all commands, with the namespaces, the node and the job that they name."""
    made = Desk(tmp_path_factory.mktemp("docs"), told_cluster)
    for namespace in NAMESPACES:
        made_of = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
        told_cluster.kubectl("apply", "-f", "-", input=yaml.safe_dump(made_of))
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}, "spec": {"unschedulable": True}}
    told_cluster.kubectl("apply", "-f", "-", input=yaml.safe_dump(node))
    told_cluster.kubectl("apply", "-f", str(made.folder / "job.yaml"))
    yield made
    told_cluster.kubectl("delete", "-f", str(made.folder / "job.yaml"))
    told_cluster.kubectl("delete", "node", NODE)


@pytest.mark.parametrize(
    ("block", "command"),
    [pytest.param(*each, id=f"{each[0]} {each[1]}") for each in commands(of_cluster=True)],
)
def test_a_command_of_the_documentation_is_understood(desk: Desk, block: Block, command: str) -> None:
    """By kubectl or helm and by the API server; what is there already is no fault of the command's."""
    code, said = desk.run(command)

    assert code == 0 or "AlreadyExists" in said, f"{block}: {command}\n{said[-3000:]}"


@pytest.mark.parametrize(
    ("command", "after"), [("kubectl get qlj", "NAME"), ("kubectl get qlj -o wide", "MESSAGE")]
)
def test_the_columns_are_those_of_the_page(desk: Desk, command: str, after: str) -> None:
    """README shows the columns of `kubectl get`, and the last one that `-o wide` adds."""
    (shown,) = [each for each in blocks() if each.page == "README.md" and each.text.startswith(f"{after}")]
    _, printed = desk.run(command)
    columns, expected = printed.splitlines()[0].split(), shown.text.splitlines()[0].split()

    assert columns[-len(expected) :] == expected


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=str(block))
        for block in blocks()
        if block.language == "yaml"
        and yaml.safe_load(block.text).get("kind")
        and yaml.safe_load(block.text)["kind"] not in UNKNOWN_KINDS
        and "apiVersion" in block.text
    ],
)
def test_an_object_of_the_documentation_is_accepted(told_cluster: Cluster, block: Block) -> None:
    """No field of it is unknown, and no value refused."""
    told_cluster.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", input=block.text)
