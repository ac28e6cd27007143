"""Two real nodes: exclusive CPUs, names, images, shared disks, and failures on demand."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from testcluster import cgroups, features, network, nodes
from testcluster.binaries import cache
from testcluster.cluster import Cluster
from testcluster.errors import ClusterError, KubectlError
from testcluster.nodes import NodeCluster

pytestmark = pytest.mark.nodes

ONE_CPU = {"cpu": "1", "memory": "2Gi"}
SECURE = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
PEERS = """
import json, os, socket, time
index = os.environ["JOB_COMPLETION_INDEX"]
server = socket.create_server(("", 7000))
peer = os.environ["JOB"] + "-" + ("1" if index == "0" else "0") + "." + os.environ["SERVICE"]
deadline = time.monotonic() + 60
while True:
    try:
        out = socket.create_connection((peer, 7000), 5)
        break
    except OSError:
        if time.monotonic() > deadline:
            raise
        time.sleep(0.2)
out.sendall(index.encode())
received = server.accept()[0].recv(1).decode()
print(json.dumps({"cpus": sorted(os.sched_getaffinity(0)), "received": received}))
"""
GROUP = """
import json, os
os.environ["RANK"] = os.environ["JOB_COMPLETION_INDEX"]
os.environ["MASTER_ADDR"] = os.environ["JOB"] + "-0." + os.environ["SERVICE"]
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(total)
try:
    open("/written", "w")
    root = "writable"
except OSError:
    root = "read-only"
print(json.dumps({"total": total.item(), "uid": os.getuid(), "root": root, "cpus": sorted(os.sched_getaffinity(0))}))
dist.destroy_process_group()
"""
SERVE = """
import socket
server = socket.create_server(("", 7000))
while True:
    connection, _ = server.accept()
    connection.sendall(connection.recv(1))
    connection.close()
"""
ASK = """
import socket, sys, time
start = time.monotonic()
connection = socket.create_connection((sys.argv[1], 7000), 3)
connection.sendall(b"x")
connection.recv(1)
print(time.monotonic() - start)
"""


def pod_spec(image: str, program: str, *, node: str | None = None, **environment: str) -> dict[str, Any]:
    """A pod under Pod Security restricted with one CPU of its own that runs the Python program."""
    container = {
        "name": "main",
        "image": image,
        "command": ["python", "-c", program],
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "resources": {"requests": ONE_CPU, "limits": ONE_CPU},
        "securityContext": SECURE,
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 1,
        "automountServiceAccountToken": False,
        "nodeSelector": {"kubernetes.io/hostname": node} if node else {},
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
    }


def start_pod(cluster: Cluster, namespace: str, name: str, spec: dict[str, Any]) -> None:
    """Create a pod and wait until it runs."""
    cluster.client.post(f"/api/v1/namespaces/{namespace}/pods", {"metadata": {"name": name}, "spec": spec})
    cluster.kubectl(
        "-n", namespace, "wait", f"pod/{name}", "--for=jsonpath={.status.phase}=Running", "--timeout=60s"
    )


def run_job(cluster: Cluster, namespace: str, image: str, program: str) -> dict[str, dict[str, Any]]:
    """Run a Job with two indexes and a Service; what each pod printed, by node."""
    name, service = "pair", "peers"
    full = f"{service}.{namespace}.svc.cluster.local"
    spec = pod_spec(image, program, JOB=name, SERVICE=full, WORLD_SIZE="2", MASTER_PORT="29500")
    cluster.client.post(
        f"/api/v1/namespaces/{namespace}/services",
        {
            "metadata": {"name": service},
            "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": name}},
        },
    )
    cluster.client.post(
        f"/apis/batch/v1/namespaces/{namespace}/jobs",
        {
            "metadata": {"name": name},
            "spec": {
                "completions": 2,
                "parallelism": 2,
                "completionMode": "Indexed",
                "backoffLimit": 0,
                "template": {"spec": {**spec, "subdomain": service}},
            },
        },
    )
    try:
        cluster.kubectl("-n", namespace, "wait", f"job/{name}", "--for=condition=Complete", "--timeout=120s")
    except KubectlError as error:
        pytest.fail(
            f"{error}\n{cluster.kubectl('-n', namespace, 'logs', '-l', f'job-name={name}', '--prefix')}"
        )
    pods = cluster.client.items(f"/api/v1/namespaces/{namespace}/pods?labelSelector=job-name={name}")
    return {
        pod["spec"]["nodeName"]: json.loads(cluster.kubectl("-n", namespace, "logs", pod["metadata"]["name"]))
        for pod in pods
    }


def pod(cluster: Cluster, namespace: str, name: str) -> dict[str, Any]:
    """The pod's object."""
    found: dict[str, Any] = cluster.client.get(f"/api/v1/namespaces/{namespace}/pods/{name}")
    return found


def eventually(holds: Callable[[], bool], *, seconds: float = 60) -> None:
    """Wait until it holds; fails when it never does."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)


def is_ready(cluster: Cluster, node: str) -> bool:
    """Whether the cluster takes the node for ready."""
    conditions = cluster.client.get(f"/api/v1/nodes/{node}")["status"]["conditions"]
    return next(one["status"] for one in conditions if one["type"] == "Ready") == "True"


def test_a_two_index_job_owns_one_cpu_of_each_node(node_cluster: Cluster, node_namespace: str) -> None:
    """Its pods land on both nodes, pinned to different CPUs, and exchange bytes by their peer's DNS name."""
    printed = run_job(node_cluster, node_namespace, node_cluster.image("python"), PEERS)

    assert len(printed) == 2
    assert sorted(one["received"] for one in printed.values()) == ["0", "1"]
    cpus = [one["cpus"] for one in printed.values()]
    assert [len(owned) for owned in cpus] == [1, 1]
    if isinstance(node_cluster, NodeCluster):  # other machines have CPUs of equal number
        assert {name: one["cpus"] for name, one in printed.items()} == {
            name: [node.cpu] for name, node in node_cluster.nodes.items()
        }


def test_restricted_pods_of_the_trainer_join_a_gloo_group(node_cluster: Cluster, node_namespace: str) -> None:
    """The trainer's image imports torch as user 1000 with a read-only root, and two nodes sum a tensor."""
    printed = run_job(node_cluster, node_namespace, node_cluster.image("trainer"), GROUP)

    assert len(printed) == 2
    for one in printed.values():
        assert one["total"] == 3.0
        assert one["uid"] == 1000
        assert one["root"] == "read-only"
        assert len(one["cpus"]) == 1


@pytest.mark.parametrize(
    ("image", "command"),
    [
        ("trainer", ["python", "-c", "import qlora_trainer.training.loop"]),
        ("operator", ["qlora", "--help"]),
        ("operator", ["kopf", "--version"]),
    ],
    ids=["trainer", "operator", "kopf"],
)
def test_the_images_hold_the_project(
    own_nodes: NodeCluster, node_namespace: str, image: str, command: list[str]
) -> None:
    """Each image runs the program it is made for."""
    spec = pod_spec(own_nodes.image(image), "")
    spec["containers"][0]["command"] = command
    path = f"/api/v1/namespaces/{node_namespace}/pods"
    own_nodes.client.post(path, {"metadata": {"name": "help"}, "spec": spec})

    eventually(lambda: pod(own_nodes, node_namespace, "help")["status"]["phase"] in ("Succeeded", "Failed"))

    logs = own_nodes.kubectl("-n", node_namespace, "logs", "help")
    assert pod(own_nodes, node_namespace, "help")["status"]["phase"] == "Succeeded", logs


def test_pods_reach_the_api_server_by_its_service(node_cluster: Cluster, node_namespace: str) -> None:
    """The name kubernetes.default.svc resolves and its cluster address is connected to the API server."""
    program = "import socket; socket.create_connection(('kubernetes.default.svc', 443), 20); print('reached')"
    spec = pod_spec(node_cluster.image("python"), program)
    path = f"/api/v1/namespaces/{node_namespace}/pods"
    node_cluster.client.post(path, {"metadata": {"name": "caller"}, "spec": spec})

    eventually(
        lambda: pod(node_cluster, node_namespace, "caller")["status"]["phase"] in ("Succeeded", "Failed")
    )

    assert node_cluster.kubectl("-n", node_namespace, "logs", "caller") == "reached\n"


def test_a_shared_volume_is_written_on_one_node_and_read_on_the_other(
    own_nodes: NodeCluster, node_namespace: str
) -> None:
    """Both nodes' pods use one claim without any change of its owner, and the test sees its files."""
    folder = own_nodes.shared_volume(node_namespace, "work")
    programs = {
        "node-a": "open('/work/note', 'w').write('from a')",
        "node-b": "import time\nwhile True:\n try: print(open('/work/note').read()); break\n"
        " except FileNotFoundError: time.sleep(0.1)",
    }
    for node, program in programs.items():
        spec = pod_spec(own_nodes.image("python"), program, node=node)
        spec["volumes"].append({"name": "work", "persistentVolumeClaim": {"claimName": "work"}})
        spec["containers"][0]["volumeMounts"].append({"name": "work", "mountPath": "/work"})
        path = f"/api/v1/namespaces/{node_namespace}/pods"
        own_nodes.client.post(path, {"metadata": {"name": node}, "spec": spec})

    eventually(lambda: pod(own_nodes, node_namespace, "node-b")["status"]["phase"] == "Succeeded")

    assert own_nodes.kubectl("-n", node_namespace, "logs", "node-b") == "from a\n"
    assert (folder / "note").read_text() == "from a"
    assert (folder / "note").stat().st_uid == 1000


def test_nodes_show_the_features_they_are_given(own_nodes: NodeCluster) -> None:
    """By default a node has the machine's CPU features; a test may play others and hide these."""
    path = "/api/v1/nodes/node-a"
    real = features.of_this_machine()
    played = features.labels({"avx2", "amx_tile"})

    own_nodes.set_features("node-a", played)
    shown = own_nodes.client.get(path)["metadata"]["labels"]
    own_nodes.set_features("node-a", real)
    again = own_nodes.client.get(path)["metadata"]["labels"]

    assert {label for label in shown if label.startswith(features.PREFIX)} == set(played)
    assert {label: again[label] for label in again if label.startswith(features.PREFIX)} == real


def test_a_stopped_kubelet_leaves_its_pods_running(own_nodes: NodeCluster, node_namespace: str) -> None:
    """The node is lost for the cluster; when the kubelet is back, the same container still runs."""
    start_pod(own_nodes, node_namespace, "kept", pod_spec(own_nodes.image("python"), SERVE, node="node-b"))
    before = pod(own_nodes, node_namespace, "kept")["status"]["containerStatuses"][0]["containerID"]

    own_nodes.stop_kubelet("node-b")
    eventually(lambda: not is_ready(own_nodes, "node-b"))
    own_nodes.start_node("node-b")

    after = pod(own_nodes, node_namespace, "kept")["status"]
    assert after["containerStatuses"][0]["containerID"] == before
    assert "running" in after["containerStatuses"][0]["state"]


def test_a_stopped_node_loses_its_pods(own_nodes: NodeCluster, node_namespace: str) -> None:
    """Every process of the node dies, the other node's pod goes on, and after the start the lost pod has failed."""
    image = own_nodes.image("python")
    for node in ("node-a", "node-b"):
        spec = pod_spec(image, SERVE, node=node)
        # As a rank that must not be evicted before its node is back.
        spec["tolerations"] = [{"operator": "Exists", "effect": "NoExecute"}]
        start_pod(own_nodes, node_namespace, node, spec)

    own_nodes.stop_node("node-a")
    assert not cgroups.pids("node-a")
    eventually(lambda: not is_ready(own_nodes, "node-a"))
    assert cgroups.pids("node-b")
    own_nodes.start_node("node-a")

    eventually(lambda: pod(own_nodes, node_namespace, "node-a")["status"]["phase"] == "Failed")
    assert pod(own_nodes, node_namespace, "node-b")["status"]["phase"] == "Running"


def ask(cluster: Cluster, namespace: str, address: str) -> float:
    """Seconds until the pod on node-a has an answer from the address; raises KubectlError without one."""
    return float(cluster.kubectl("-n", namespace, "exec", "node-a", "--", "python", "-c", ASK, address))


@pytest.fixture
def pair(own_nodes: NodeCluster, node_namespace: str) -> str:
    """A server on each node; the address of the one on node-b."""
    for node in ("node-a", "node-b"):
        start_pod(own_nodes, node_namespace, node, pod_spec(own_nodes.image("python"), SERVE, node=node))
    address: str = pod(own_nodes, node_namespace, "node-b")["status"]["podIP"]
    eventually(lambda: ask(own_nodes, node_namespace, address) > 0)
    return address


def test_a_cut_link_parts_the_pods_and_heals(own_nodes: NodeCluster, node_namespace: str, pair: str) -> None:
    """Pods of the two nodes do not hear each other, while the cluster hears both; healed, they do."""
    own_nodes.cut_link()
    with pytest.raises(KubectlError, match="timed out"):
        ask(own_nodes, node_namespace, pair)
    assert is_ready(own_nodes, "node-a")
    assert is_ready(own_nodes, "node-b")

    own_nodes.heal_link()

    assert ask(own_nodes, node_namespace, pair) > 0


def test_a_delayed_link_holds_each_packet(own_nodes: NodeCluster, node_namespace: str, pair: str) -> None:
    """A connection and an answer cross the link four times, and take at least as often the delay."""
    own_nodes.delay_link(100)
    delayed = ask(own_nodes, node_namespace, pair)
    own_nodes.heal_link()

    assert delayed >= 0.4
    assert ask(own_nodes, node_namespace, pair) > 0


def test_a_second_cluster_is_refused_while_one_runs(own_nodes: NodeCluster, tmp_path: Path) -> None:
    """A machine has room for one cluster with nodes; the message names the one that runs."""
    with pytest.raises(ClusterError, match=re.escape(str(own_nodes.folder))):
        nodes.up(tmp_path / "second")


def traces(folder: Path, made: list[str]) -> list[str]:
    """What of a cluster in the folder, for which those folders were made, is still on the machine."""
    commands = (" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    listings = (["ip", "link"], ["ip", "rule"], ["nft", "list", "ruleset"], ["cat", "/proc/self/mounts"])
    lines = [
        line
        for listing in listings
        for line in subprocess.check_output(listing, text=True).splitlines()
        if str(cache() / "images") not in line  # the store of images is mounted on itself while it is used
    ]
    groups = [hierarchy / cgroups.ROOT for hierarchy in cgroups.hierarchies()]
    return [
        *(command for command in commands if str(folder) in command or "-namespace k8s.io" in command),
        *(line for line in lines if str(folder) in line or re.search("qlora|kube-proxy|7707", line)),
        *(str(place) for place in (*made, folder, *groups) if Path(place).exists()),
    ]


def test_down_leaves_no_trace_of_a_cluster_whose_programs_were_killed(doomed_nodes: NodeCluster) -> None:
    """With kubelets and containerds killed and their pods orphaned, nothing is left."""
    spec = pod_spec(doomed_nodes.image("python"), SERVE, node="node-a")
    start_pod(doomed_nodes, "default", "orphan", spec)
    doomed_nodes.cut_link()
    doomed_nodes.delay_link(10)
    for process in psutil.process_iter(["name"]):
        if process.pid in cgroups.pids() and process.info["name"] in ("kubelet", "containerd", "coredns"):
            process.kill()
    claim = nodes._claim()
    assert claim is not None
    assert traces(doomed_nodes.folder, claim.made)

    doomed_nodes.stop()

    assert traces(doomed_nodes.folder, claim.made) == []
    assert network.forwarding() == claim.forwarding


def test_up_cleans_up_after_a_killed_program(doomed_nodes: NodeCluster, tmp_path: Path) -> None:
    """The cluster of a test run that was killed makes room for the next one."""
    doomed_nodes.stop()
    program = "import sys; from pathlib import Path; from testcluster import nodes; "
    program += "nodes.up(Path(sys.argv[1]), detached=False); print('up', flush=True); sys.stdin.read()"
    killed = tmp_path / "killed"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(killed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={
            "HOME": str(Path.home()),
            "PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": str(Path(__file__).parent),
        },
    ) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "up\n"
        started.send_signal(signal.SIGKILL)

    cluster = nodes.up(tmp_path / "next", detached=False)
    left = [line for line in traces(killed, []) if str(killed) in line and line != str(killed)]
    cluster.stop()

    assert left == []
