"""A real Kueue on a control plane: installed by its own chart, with its manager as a process on this machine."""

import base64
import urllib.request
from collections.abc import Iterator
from typing import Any, Self

import yaml

from testcluster import go_modules
from testcluster.binaries import built
from testcluster.chart import Object, find, render
from testcluster.client import Client
from testcluster.command_lines import LOOPBACK
from testcluster.control_plane import ControlPlane, free_ports
from testcluster.waiting import wait_for

PROGRAM = "kueue"
SYSTEM = "kueue-system"
"""Its namespace."""
API = "/apis/kueue.x-k8s.io/v1beta2"
_WEBHOOKS = "kueue-webhook-service"
_CERTIFICATE = f"/api/v1/namespaces/{SYSTEM}/secrets/kueue-webhook-server-cert"
_CONFIG = "controller_manager_config.yaml"
_NEED_PODS = {"Deployment", "APIService"}
"""Kinds of its chart that are left out: the manager runs here, and nobody asks how long its queues are."""


class Kueue:
    """Kueue on a cluster, with its webhooks, its own permissions, and its chart's configuration."""

    def __init__(self, cluster: ControlPlane) -> None:
        self.cluster = cluster
        self._folder = cluster.folder / PROGRAM
        self._port, self._health_port, *_ = free_ports(LOOPBACK).values()
        self._defaults: Object = {}
        self._command: list[str] = []

    @classmethod
    def start(cls, cluster: ControlPlane) -> Self:
        """Install it and wait until its webhooks answer. Raises ClusterError where it cannot be built."""
        program = built(PROGRAM)
        chart = go_modules.sources(PROGRAM) / "charts" / "kueue"
        started = cls(cluster)
        (started._folder / "certificates").mkdir(parents=True)
        objects = render(release=PROGRAM, namespace=SYSTEM, chart=chart)
        started._install(objects)
        started._defaults = yaml.safe_load(find(objects, "ConfigMap")["data"][_CONFIG])
        account = find(objects, "ServiceAccount")["metadata"]["name"]
        kubeconfig = cluster.kubeconfig_for(account, SYSTEM)
        options = [f"--config={started._folder / _CONFIG}", f"--kubeconfig={kubeconfig}", "--zap-log-level=3"]
        started._command = [str(program), *options]
        started._write_config({})
        cluster.run(PROGRAM, started._command)
        started._mount_certificate()
        started._wait_ready()
        return started

    def configure(self, **config: Any) -> None:
        """Start its manager anew with these values in its chart's configuration."""
        self.cluster.end(PROGRAM)
        self._write_config(config)
        self.cluster.run(PROGRAM, self._command)
        self._wait_ready()

    def _install(self, objects: list[Object]) -> None:
        # An API server asks a Service's address, where no program answers, or else the name that it stands for.
        find(objects, "Service", _WEBHOOKS)["spec"] = {"type": "ExternalName", "externalName": "localhost"}
        for config in _client_configs(objects):
            config["service"]["port"] = self._port
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM}}
        kept = [namespace, *(each for each in objects if each["kind"] not in _NEED_PODS)]
        text = yaml.dump_all(kept, Dumper=yaml.CSafeDumper)
        self.cluster.kubectl("apply", "--server-side", "-f", "-", input=text)

    def _write_config(self, config: dict[str, Any]) -> None:
        certificates = str(self._folder / "certificates")
        here = {
            "webhook": {"host": LOOPBACK, "port": self._port, "certDir": certificates},
            "health": {"healthProbeBindAddress": f"{LOOPBACK}:{self._health_port}"},
            "metrics": {"bindAddress": "0"},
            "leaderElection": {"leaderElect": False},
            "clientConnection": {
                "qps": 1000,
                "burst": 2000,
            },  # 50 by default, which is what tests would wait for
            "featureGates": {"VisibilityOnDemand": False},  # it would take another port
        }
        (self._folder / _CONFIG).write_text(yaml.safe_dump({**self._defaults, **here, **config}))

    def _mount_certificate(self) -> None:
        """What its pod's kubelet does: the Secret that the manager fills becomes files."""
        data = wait_for(
            lambda: self.cluster.client.get(_CERTIFICATE).get("data"), or_else=self._end_of_log, every=0.1
        )
        for name, text in data.items():
            (self._folder / "certificates" / name).write_bytes(base64.b64decode(text))

    def _wait_ready(self) -> None:
        wait_for(self._is_ready, 120, or_else=self._end_of_log, every=0.1)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{LOOPBACK}:{self._health_port}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _end_of_log(self) -> str:
        return (self.cluster.folder / "logs" / f"{PROGRAM}.log").read_text(errors="replace")[-3000:]


_PLURALS = {"Topology": "topologies", "WorkloadPriorityClass": "workloadpriorityclasses"}


class Queues:
    """Kueue's objects that an administrator makes, for one namespace: a ClusterQueue, its flavors, a LocalQueue."""

    def __init__(self, client: Client, namespace: str) -> None:
        self.client, self.namespace = client, namespace

    def flavor(self, name: str, labels: dict[str, str] | None = None, **spec: Any) -> str:
        """A ResourceFlavor for nodes with these labels; its name in the cluster."""
        return self._made("ResourceFlavor", self.name(name), {"nodeLabels": labels or {}, **spec})

    def cluster_queue(self, cpus: dict[str, int], **spec: Any) -> None:
        """The namespace's ClusterQueue, with so many CPUs of each flavor."""
        quotas = [
            {
                "name": flavor,
                "resources": [
                    {"name": "cpu", "nominalQuota": count},
                    {"name": "memory", "nominalQuota": "1Ti"},
                ],
            }
            for flavor, count in cpus.items()
        ]
        groups = [{"coveredResources": ["cpu", "memory"], "flavors": quotas}]
        self._made(
            "ClusterQueue", self.namespace, {"namespaceSelector": {}, "resourceGroups": groups, **spec}
        )

    def local_queue(self, name: str = "team-queue") -> str:
        """A LocalQueue that leads to the ClusterQueue."""
        return self._made(
            "LocalQueue", name, {"clusterQueue": self.namespace}, f"namespaces/{self.namespace}/"
        )

    def of_cpus(self, count: int, **spec: Any) -> str:
        """All that a queue needs: one flavor of any nodes, so many CPUs, and a LocalQueue, whose name is given."""
        self.cluster_queue({self.flavor("any"): count}, **spec)
        return self.local_queue()

    def priority(self, name: str, value: int) -> str:
        """A WorkloadPriorityClass; its name in the cluster."""
        return self._created("WorkloadPriorityClass", self.name(name), {"value": value})

    def topology(self, name: str, *levels: str) -> str:
        """A Topology of these node labels, the widest first; its name in the cluster."""
        return self._made("Topology", self.name(name), {"levels": [{"nodeLabel": each} for each in levels]})

    def multikueue_check(self) -> str:
        """An AdmissionCheck of MultiKueue, with a cluster that does not answer; its name in the cluster."""
        source = {"kubeConfig": {"locationType": "Secret", "location": "nowhere"}}
        worker = self._made("MultiKueueCluster", self.name("worker"), {"clusterSource": source})
        config = self._made("MultiKueueConfig", self.name("config"), {"clusters": [worker]})
        parameters = {"apiGroup": "kueue.x-k8s.io", "kind": "MultiKueueConfig", "name": config}
        spec = {"controllerName": "kueue.x-k8s.io/multikueue", "parameters": parameters}
        return self._made("AdmissionCheck", self.name("multikueue"), spec)

    def set_active(self, active: bool) -> None:
        """Deactivate the namespace's only Workload that is not finished, or activate it again."""
        (workload,) = self.workloads()
        path = f"{API}/namespaces/{self.namespace}/workloads/{workload['metadata']['name']}"
        self.client.patch(path, {"spec": {"active": active}})

    def name(self, name: str) -> str:
        """What something of this namespace is called that has no namespace itself."""
        return f"{name}-{self.namespace}"[:63].strip("-")

    def workloads(self) -> list[Object]:
        """Kueue's Workloads in the namespace."""
        return self.client.items(f"{API}/namespaces/{self.namespace}/workloads")

    def _made(self, kind: str, name: str, spec: Object, where: str = "") -> str:
        return self._created(kind, name, {"spec": spec}, where)

    def _created(self, kind: str, name: str, fields: Object, where: str = "") -> str:
        plural = _PLURALS.get(kind, f"{kind.lower()}s")
        body = {"apiVersion": API.removeprefix("/apis/"), "kind": kind, "metadata": {"name": name}, **fields}
        self.client.post(f"{API}/{where}{plural}", body)
        return name


def _client_configs(objects: list[Object]) -> Iterator[Object]:
    """How its webhooks, and those that convert its objects, are reached."""
    for each in objects:
        for webhook in each.get("webhooks", []):
            yield webhook["clientConfig"]
        conversion = each["kind"] == "CustomResourceDefinition" and each["spec"].get("conversion")
        if conversion:
            yield conversion["webhook"]["clientConfig"]
