"""A control plane on this machine: etcd, API server, controller manager and scheduler."""

import random
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

from testcluster import certificates, command_lines, kubeconfig
from testcluster.binaries import Binaries, ensure
from testcluster.client import ApiError, Client
from testcluster.cluster import Cluster
from testcluster.command_lines import LOOPBACK, SERVICES
from testcluster.errors import ClusterError
from testcluster.processes import Processes, end_recorded

READY_SECONDS = 60.0
"""How long a start may take on a busy machine; it takes 4 s on an idle one."""
NEVER = 30 * 24 * 3600
"""Seconds that no test reaches."""
PORTS = range(20000, 30000)
"""Below the ports that Linux gives to outgoing connections and those of NodePort Services."""

_CLIENTS = {
    "admin": ("admin", ("system:masters",)),
    "kube-controller-manager": ("system:kube-controller-manager", ()),
    "kube-scheduler": ("system:kube-scheduler", ()),
    "apiserver-kubelet-client": ("kube-apiserver-kubelet-client", ("system:masters",)),
}


class ControlPlane(Cluster):
    """A running control plane. Everything of it lies in its folder."""

    def __init__(self, folder: Path, binaries: Binaries, processes: Processes, server: str) -> None:
        super().__init__(folder, folder / "admin.kubeconfig", binaries["kubectl"])
        self.binaries = binaries
        self.server = server
        """The API server's URL."""
        self._processes = processes

    @classmethod
    def start(
        cls,
        folder: Path,
        *,
        address: str = LOOPBACK,
        audit: bool = False,
        detached: bool = False,
        node_grace_seconds: int = NEVER,
        binaries: Binaries | None = None,
        apiserver_options: Iterable[str] = (),
        feature_gates: Iterable[str] = (),
    ) -> Self:
        """Start one in the folder and wait until it is ready; what an earlier one left there is removed.

        With an `address` other than loopback, pods reach it through the
        kubernetes Service. `node_grace_seconds` is how long a node may be
        silent before it counts as lost: never by default, since nodes that
        tests make through the API send no heartbeats. The processes end with
        the thread that called this, unless `detached`. `apiserver_options`
        are added to kube-apiserver's command line; `feature_gates` are
        switched on in it, the controller manager and the scheduler.
        Raises ClusterError when it does not become ready.
        """
        binaries = binaries or ensure("api")
        for _ in range(5):
            down(folder)
            processes = Processes(folder, detached=detached)
            ports = free_ports(address)
            cluster = cls(folder, binaries, processes, f"https://{address}:{ports['apiserver']}")
            try:
                _make_files(cluster, address)
                extra = [*(command_lines.audit(folder) if audit else []), *apiserver_options]
                gates = command_lines.feature_gates(feature_gates)
                _start_all(cluster, address, ports, extra, node_grace_seconds, gates)
                cluster.wait_ready()
                return cluster
            except BaseException as error:
                processes.end_all()
                if not isinstance(error, ClusterError) or "address already in use" not in str(error):
                    raise
        raise ClusterError(
            f"five times, ports of {address} that had been free were taken before they were used"
        )

    @property
    def audit_log(self) -> Path:
        """One JSON object per request; there with audit=True only."""
        return self.folder / "audit.log"

    @property
    def processes(self) -> dict[str, int]:
        """The process id of each program."""
        return self._processes.pids

    def stop(self) -> None:
        """End every process at once; the folder with the logs stays until `down`."""
        self.client.close()
        self._processes.end_all()

    def let_go(self) -> None:
        """Leave a detached cluster to run when this process ends."""
        self._processes.let_go()

    def pause(self, name: str) -> None:
        """Freeze a program: its connections stay open and nothing answers."""
        self._processes.signal(name, signal.SIGSTOP)

    def resume(self, name: str) -> None:
        """Let a paused program go on."""
        self._processes.signal(name, signal.SIGCONT)

    def run(self, name: str, command: list[str]) -> None:
        """Start one more program that belongs to the cluster and ends with it."""
        self._processes.start(name, command)

    def end(self, name: str) -> None:
        """Kill a program: connections to it are refused."""
        self._processes.end(name)

    def begin(self, name: str) -> None:
        """Start a program again as it was, and wait until the cluster is ready."""
        self._processes.start(name)
        self.wait_ready()

    def restart_apiserver(self) -> None:
        """Kill the API server, which breaks every watch, and start it again."""
        self.end("kube-apiserver")
        self.begin("kube-apiserver")

    def issue(
        self, name: str, user: str, groups: tuple[str, ...] = (), addresses: tuple[str, ...] = ()
    ) -> Path:
        """A kubeconfig for a new client certificate of the user and groups: a kubelet's, for example.

        The certificate is <folder>/pki/<name>.crt and .key, and serves as a
        server's, too, for addresses such as IP:10.0.0.1 or DNS:node-a.
        """
        pki = self.folder / "pki"
        certificates.issue(pki, name, user, groups, addresses)
        config = kubeconfig.with_certificate(self.server, pki / "ca.crt", name)
        return kubeconfig.write(self.folder / f"{name}.kubeconfig", config)

    def wait_ready(self) -> None:
        """Wait until the API server says it is ready and the controller manager works.

        Raises ClusterError when a program has ended, or after READY_SECONDS.
        """
        self.wait_until(_not_ready)

    def wait_until(self, not_yet: Callable[[Client], str | None]) -> None:
        """Wait until `not_yet` gives no reason to wait any longer.

        Raises ClusterError when a program has ended, or after READY_SECONDS.
        """
        client = Client(self.kubeconfig, seconds=2)
        deadline = time.monotonic() + READY_SECONDS
        while (why := not_yet(client)) is not None:
            self._processes.check()
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"the control plane is not ready after {READY_SECONDS:.0f} s: {why}; logs: {self.folder / 'logs'}"
                )
            time.sleep(0.05)
        client.close()
        self._processes.check()  # what answered may be another cluster, on a port that this one lost to it


def down(folder: Path) -> None:
    """End whatever runs of the cluster in the folder, and remove the folder."""
    end_recorded(folder)
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        raise ClusterError(f"{folder} cannot be removed: look who uses it")


def free_ports(address: str) -> dict[str, int]:
    """Ports that are free now. Another process may take them before they are used."""
    ports: dict[str, int] = {}
    while len(ports) < 3:
        name = ("etcd", "etcd-peer", "apiserver")[len(ports)]
        port = random.choice(PORTS)
        if port not in ports.values() and _is_free(address if name == "apiserver" else LOOPBACK, port):
            ports[name] = port
    return ports


def _is_free(address: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, port))
        except OSError as error:
            if "assign" in str(error):
                raise ClusterError(f"{address} is no address of this machine") from error
            return False
    return True


def _not_healthy(client: Client) -> str | None:
    """Why the API server cannot be used yet, or None."""
    try:
        client.text("/healthz")
    except ApiError as error:
        return str(error)
    return None


def _not_ready(client: Client) -> str | None:
    """Why the cluster cannot be used yet, or None."""
    try:
        client.text("/readyz")
        # Made by the controller manager; without it no pod can be created.
        client.get("/api/v1/namespaces/default/serviceaccounts/default")
    except ApiError as error:
        return str(error)
    return None


def _make_files(cluster: ControlPlane, address: str) -> None:
    """Certificates, keys and kubeconfigs."""
    pki = cluster.folder / "pki"
    pki.mkdir(mode=0o700)
    certificates.make_authority(pki)
    certificates.make_key(pki / "service-accounts.key")
    names = (
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    )
    addresses = [f"IP:{ip}" for ip in (address, SERVICES.replace(".0/16", ".1"), LOOPBACK)]
    alternatives = (*(f"DNS:{name}" for name in (*names, "localhost")), *addresses)
    certificates.issue(pki, "apiserver", "kube-apiserver", (), alternatives)
    for name, (user, groups) in _CLIENTS.items():
        cluster.issue(name, user, groups)


def _start_all(
    cluster: ControlPlane,
    address: str,
    ports: dict[str, int],
    apiserver: list[str],
    node_grace_seconds: int,
    gates: list[str],
) -> None:
    folder = cluster.folder
    options = {
        "etcd": command_lines.etcd(folder, ports),
        "kube-apiserver": [*command_lines.apiserver(folder / "pki", address, ports), *apiserver, *gates],
        "kube-controller-manager": [*command_lines.controller_manager(folder, node_grace_seconds), *gates],
        "kube-scheduler": [*command_lines.scheduler(folder), *gates],
    }
    for name, arguments in options.items():
        if name == "kube-controller-manager":
            cluster.wait_until(
                _not_healthy
            )  # it gives up after 10 s, which are short when several clusters start
        cluster.run(name, [str(cluster.binaries[name]), *arguments])
