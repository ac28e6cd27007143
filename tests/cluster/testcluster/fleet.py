"""Many nodes that are records only: KWOK plays their kubelets, for tests of scheduling and scale."""

from pathlib import Path
from typing import Literal, Self

from testcluster.binaries import ensure
from testcluster.control_plane import ControlPlane

PROGRAM = "kwok"
FAKE = "kwok.x-k8s.io/node"
"""The annotation of the nodes that KWOK plays; it leaves all others alone."""
RUNS_FOR = "fleet/runs-for"
"""On a pod: for how long it runs before it ends well, as `5s`; without it, for a second."""
_STAGES = Path(__file__).parent / "stages"
_PODS = {"run": ("pod-run", "pod-delete"), "complete": ("pod-run", "pod-complete", "pod-delete")}


class Fleet:
    """KWOK on a cluster, and its nodes."""

    def __init__(self, cluster: ControlPlane) -> None:
        self.cluster = cluster
        self._nodes: list[str] = []

    @classmethod
    def start(cls, cluster: ControlPlane, *, pods: Literal["run", "complete"] = "run") -> Self:
        """Start KWOK. Pods on its nodes run until they are deleted, or end well (see RUNS_FOR)."""
        kubeconfig = cluster.issue(PROGRAM, PROGRAM, ("system:masters",))
        files = [_STAGES / f"{name}.yaml" for name in ("node", *_PODS[pods])]
        program = ensure("fleet")[PROGRAM]
        cluster.run(
            PROGRAM,
            [
                str(program),
                f"--kubeconfig={kubeconfig}",
                *(f"--config={file}" for file in files),
                "--manage-all-nodes=false",
                f"--manage-nodes-with-annotation-selector={FAKE}=fake",
                "--node-lease-duration-seconds=40",  # its heartbeats
                "--cidr=10.200.0.0/16",
                "--server-address=",  # nobody asks it for logs
            ],
        )
        return cls(cluster)

    def add_nodes(
        self,
        count: int,
        *,
        labels: dict[str, str] | None = None,
        cpu: str = "32",
        memory: str = "256Gi",
        prefix: str = "fleet",
    ) -> list[str]:
        """Add nodes <prefix>-0, -1, ... with the labels and size, and give their names."""
        names = [f"{prefix}-{index}" for index in range(count)]
        for name in names:
            self.cluster.client.post("/api/v1/nodes", _node(name, labels or {}, cpu, memory))
            self._nodes.append(name)
        return names

    def remove_nodes(self) -> None:
        """Remove every node that was added."""
        while self._nodes:
            self.cluster.client.delete(f"/api/v1/nodes/{self._nodes.pop()}")

    def stop(self) -> None:
        """Remove the nodes and end KWOK."""
        self.remove_nodes()
        self.cluster.end(PROGRAM)


def _node(name: str, labels: dict[str, str], cpu: str, memory: str) -> dict[str, object]:
    size = {"cpu": cpu, "memory": memory, "pods": "110", "ephemeral-storage": "100Gi"}
    return {
        "metadata": {
            "name": name,
            "annotations": {FAKE: "fake"},
            "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", **labels},
        },
        "status": {
            "capacity": size,
            "allocatable": size,
            "addresses": [
                {"type": "Hostname", "address": name},
                {"type": "InternalIP", "address": "192.0.2.1"},
            ],
        },
    }
