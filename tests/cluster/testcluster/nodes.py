"""The nodes tier: a control plane and two real nodes on this machine.

Each node has its own kubelet (static CPU manager), containerd, bridge and
subnet, and one CPU that its pods may own. One such cluster at a time: CPUs,
addresses and control groups are the machine's.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from testcluster import (
    binaries,
    cgroups,
    containerd,
    dns,
    features,
    images,
    kubelets,
    network,
    packages,
    volumes,
)
from testcluster.cluster import Cluster
from testcluster.control_plane import ControlPlane
from testcluster.errors import ClusterError
from testcluster.node import FOLDERS, Node
from testcluster.processes import end_recorded, started

NODE_GRACE_SECONDS = 12
"""How long a node may be silent before it counts as lost; 50 on a usual cluster."""
EVICTION_SECONDS = 10
"""How long its pods stay after that; 300 on a usual cluster."""
READY_SECONDS = 90.0
_CLAIM = Path("/run/qlora-nodes.json")


@dataclass(frozen=True)
class _Claim:
    """What a cluster has taken of the machine, noted before it is taken."""

    folder: str
    owner: int
    """Process id of who started it."""
    started: int | None
    """When that process started."""
    detached: bool
    """Whether the cluster outlives that process."""
    made: list[str]
    """Folders that were not there before."""
    forwarding: str
    """Whether the machine forwarded packets before."""

    def owned(self) -> bool:
        """Whether the process that started it still runs."""
        return started(self.owner) == self.started

    def hinders(self, folder: Path) -> bool:
        """Whether somebody uses the cluster, so that none can be started in the folder."""
        if self.owned() and self.owner != os.getpid():
            return True
        return self.folder != str(folder) and (self.owned() or (self.detached and bool(cgroups.pids())))


class NodeCluster(Cluster):
    """A running control plane with its two nodes."""

    def __init__(
        self, folder: Path, control: ControlPlane, nodes: tuple[Node, ...], wanted: list[images.Image]
    ) -> None:
        super().__init__(folder, control.kubeconfig, control.binaries["kubectl"])
        self._images = {image.name: image.reference for image in wanted}
        self.control_plane = control
        self.nodes = {node.name: node for node in nodes}

    def set_features(self, node: str, labels: Mapping[str, str]) -> None:
        """Let the node have exactly these CPU features, as labels of Node Feature Discovery."""
        path = f"/api/v1/nodes/{node}"
        old = self.client.get(path)["metadata"]["labels"]
        gone = {label: None for label in old if label.startswith(features.PREFIX)}
        self.client.patch(path, {"metadata": {"labels": {**gone, **labels}}})

    def shared_volume(self, namespace: str, claim: str, *, size: str = "10Gi") -> Path:
        """Make a claim that pods on both nodes may write to; gives its folder on this machine."""
        return volumes.shared_volume(self.client, self.folder / "volumes", namespace, claim, size)

    def stop_kubelet(self, name: str) -> None:
        """Kill the node's kubelet; its pods go on, and nobody reports them."""
        cgroups.kill(self.nodes[name].service_group("kubelet"))

    def stop_node(self, name: str) -> None:
        """Kill the node's kubelet, then its containerd and every process of its pods: a power cut."""
        self.stop_kubelet(name)
        for group in self.nodes[name].groups:
            cgroups.kill(group)

    def start_node(self, name: str) -> None:
        """Start what of the node does not run, and wait until it is ready."""
        node = self.nodes[name]
        if not node.runs("containerd"):
            containerd.start(node)
        if not node.runs("kubelet"):
            kubelets.start(node, self.control_plane)
        self.wait_ready(name)

    def cut_link(self) -> None:
        """Drop every packet between pods of the one node and pods of the other."""
        network.cut(*self.nodes.values())

    def delay_link(self, milliseconds: float) -> None:
        """Hold every packet between pods of the one node and pods of the other for so long, each way."""
        a, b = self.nodes.values()
        network.delay(a, b, milliseconds, self.folder / "delay.log")

    def heal_link(self) -> None:
        """End what `cut_link` and `delay_link` do."""
        network.heal(tuple(self.nodes.values()))

    def wait_ready(self, *names: str, seconds: float = READY_SECONDS) -> None:
        """Wait until the nodes (all by default) report anew that they are ready."""
        deadline = time.monotonic() + seconds
        while waiting := [name for name in names or self.nodes if not self._is_ready(name)]:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{waiting[0]} is not ready after {seconds:.0f} s; {self._why(waiting[0])}"
                )
            time.sleep(0.1)

    def stop(self) -> None:
        """End everything and remove the folder."""
        self.client.close()
        self.control_plane.stop()
        down(self.folder)

    def image(self, name: str) -> str:
        """What a pod's `image` says for the trainer, the operator, or plain python."""
        return self._images[name]

    def _is_ready(self, name: str) -> bool:
        node = self.nodes[name]
        found = [item for item in self.client.items("/api/v1/nodes") if item["metadata"]["name"] == name]
        conditions = found[0]["status"].get("conditions", []) if found else []
        taints = found[0]["spec"].get("taints", []) if found else []
        ready = any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
        return ready and not taints and node.runs("kubelet")

    def _why(self, name: str) -> str:
        log = self.nodes[name].log("kubelet")
        end = log.read_text(errors="replace")[-3000:] if log.exists() else ""
        return f"the end of {log}:\n{end}"


def up(
    folder: Path,
    *,
    labels: Mapping[str, Mapping[str, str]] | None = None,
    detached: bool = False,
    audit: bool = False,
    node_grace_seconds: int = NODE_GRACE_SECONDS,
    eviction_seconds: int = EVICTION_SECONDS,
) -> NodeCluster:
    """Start the cluster in the folder and wait until both nodes are ready.

    What an earlier one left behind, there or by a killed process, is removed
    first. `labels` are the CPU features of a node, by its name; by default
    those that the machine's CPUs have. Unless `detached`, the control plane
    ends with the thread that called this, and a later `up` may remove the
    rest. Raises ClusterError when something is missing, with what to do, or
    when another such cluster runs.
    """
    folder = folder.absolute()
    nodes = _nodes(folder)
    packages.ensure()
    _take(folder, detached=detached)
    try:
        programs = binaries.ensure("nodes")
        store = images.Store()
        wanted = images.all_images(store)
        network.up(nodes)
        with ThreadPoolExecutor() as pool:
            prepared = [pool.submit(containerd.prepare, node, wanted, store) for node in nodes]
            control = ControlPlane.start(
                folder / "control-plane",
                address=network.HOST_ADDRESS,
                audit=audit,
                detached=detached,
                node_grace_seconds=node_grace_seconds,
                binaries=programs,
                apiserver_options=[
                    f"--default-not-ready-toleration-seconds={eviction_seconds}",
                    f"--default-unreachable-toleration-seconds={eviction_seconds}",
                ],
            )
            for node, ready in zip(nodes, prepared, strict=True):
                ready.result()
                kubelets.start(node, control)
        dns.start(control, folder, nodes[0].name)
        cluster = NodeCluster(folder, control, nodes, wanted)
        cluster.wait_ready()
        dns.wait_ready(folder)
        for node in nodes:
            cluster.set_features(node.name, (labels or {}).get(node.name, features.of_this_machine()))
    except BaseException:
        _give_back(folder)  # the logs stay
        raise
    if detached:
        control.let_go()
    return cluster


def down(folder: Path) -> None:
    """End whatever runs of the cluster in the folder, and remove every trace of it."""
    folder = folder.absolute()
    _give_back(folder)
    end_recorded(folder / "control-plane")
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        raise ClusterError(f"{folder} cannot be removed: look who uses it")


def _nodes(folder: Path) -> tuple[Node, ...]:
    """The two nodes, each with a CPU of its own. Raises ClusterError on a machine that cannot have them."""
    if os.geteuid() != 0:
        raise ClusterError(
            "the nodes tier makes control groups, mounts and network interfaces: run it as root"
        )
    cgroups.hierarchies()
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise ClusterError(
            f"the nodes tier pins the pods of each node to a CPU of its own and finds {len(cpus)}: "
            "it needs two"
        )
    return tuple(
        Node(
            name=f"node-{letter}",
            address=f"10.77.0.1{number}",
            subnet=f"10.77.{number}.0/24",
            bridge=f"qlora-{letter}",
            cpu=cpus[2 - number],
            folder=folder / f"node-{letter}",
            containerd_root=binaries.cache() / "nodes" / f"node-{letter}",
        )
        for number, letter in ((1, "a"), (2, "b"))
    )


def _take(folder: Path, *, detached: bool) -> None:
    """Claim the machine, and remove what an earlier cluster left; raises ClusterError when somebody uses that."""
    binaries.cache().mkdir(parents=True, exist_ok=True)
    with (binaries.cache() / "nodes.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        claim = _claim()
        if claim and claim.hinders(folder):
            raise ClusterError(
                f"a cluster with nodes runs in {claim.folder} (started by process {claim.owner}), and a machine has "
                "room for one: wait until it ends, or end it with make cluster-down"
            )
        if claim:
            _give_back(Path(claim.folder))
        down(folder)
        missing = [where for where in FOLDERS.values() if not Path(where).exists()]
        owner = os.getpid()
        claim = _Claim(str(folder), owner, started(owner), detached, missing, network.forwarding())
        _CLAIM.write_text(json.dumps(asdict(claim)))
    for where in missing:
        Path(where).mkdir(parents=True)
    folder.mkdir(parents=True)


def _give_back(folder: Path) -> None:
    """End all that runs and return to the machine what was taken; the files in the folder stay."""
    claim = _claim()
    if claim is None or claim.folder != str(folder):
        return
    cgroups.kill()
    end_recorded(folder / "control-plane")
    network.down(_nodes(folder), claim.forwarding)
    dns.forget()
    cgroups.remove()
    for where in claim.made:
        with contextlib.suppress(OSError):  # somebody else uses it by now
            Path(where).rmdir()
    _CLAIM.unlink()


def _claim() -> _Claim | None:
    return _Claim(**json.loads(_CLAIM.read_text())) if _CLAIM.exists() else None
