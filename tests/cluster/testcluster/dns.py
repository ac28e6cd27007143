"""Names and Service addresses for pods: CoreDNS and kube-proxy, once for both nodes."""

import socket
import subprocess
import time
from pathlib import Path

from testcluster.command_lines import SERVICES
from testcluster.control_plane import ControlPlane
from testcluster.errors import ClusterError
from testcluster.kubelets import CLUSTER_DOMAIN
from testcluster.network import HOST_ADDRESS
from testcluster.node import spawn

_API_SERVICE = SERVICES.replace(".0/16", ".1")
GROUP = "services"
"""The control group of both."""
_PROXY_TABLES = (("ip", "kube-proxy"), ("ip6", "kube-proxy"))


def start(control_plane: ControlPlane, folder: Path, node_name: str) -> None:
    """Start CoreDNS and kube-proxy."""
    _start_coredns(control_plane, folder)
    _start_proxy(control_plane, folder, node_name)


def wait_ready(folder: Path, *, seconds: float = 60) -> None:
    """Wait until DNS answers and the API server is reached by its Service. Raises ClusterError when they never are."""
    deadline = time.monotonic() + seconds
    for program, address in (("coredns", (HOST_ADDRESS, 53)), ("kube-proxy", (_API_SERVICE, 443))):
        while not _connects(address):
            if time.monotonic() > deadline:
                log = folder / f"{program}.log"
                raise ClusterError(
                    f"{program} does not work after {seconds:.0f} s; the end of {log}:\n"
                    f"{log.read_text(errors='replace')[-2000:]}"
                )
            time.sleep(0.05)


def _connects(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, 1).close()
    except OSError:
        return False
    return True


def _start_coredns(control_plane: ControlPlane, folder: Path) -> None:
    kubeconfig = control_plane.issue("coredns", "system:coredns", ("system:masters",))
    corefile = folder / "Corefile"
    corefile.write_text(f"""\
.:53 {{
    bind {HOST_ADDRESS}
    errors
    kubernetes {CLUSTER_DOMAIN} in-addr.arpa {{
        kubeconfig {kubeconfig} test
        ttl 5
    }}
    forward . /etc/resolv.conf
}}
""")
    spawn([str(control_plane.binaries["coredns"]), "-conf", str(corefile)], GROUP, folder / "coredns.log")


def _start_proxy(control_plane: ControlPlane, folder: Path, node_name: str) -> None:
    kubeconfig = control_plane.issue("kube-proxy", "system:kube-proxy")
    config = folder / "kube-proxy.yaml"
    # masqueradeAll: the answer of a pod on the caller's own bridge would bypass the machine, and its translation.
    config.write_text(f"""\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
hostnameOverride: {node_name}
clientConnection: {{kubeconfig: {kubeconfig}}}
nftables: {{masqueradeAll: true, minSyncPeriod: 100ms}}
conntrack: {{maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}
healthzBindAddress: {HOST_ADDRESS}:10256
metricsBindAddress: {HOST_ADDRESS}:10249
nodePortAddresses: [{HOST_ADDRESS}/32]
""")
    command = [str(control_plane.binaries["kube-proxy"]), f"--config={config}"]
    spawn(command, GROUP, folder / "kube-proxy.log")


def forget() -> None:
    """Remove the rules that kube-proxy leaves behind."""
    for family, table in _PROXY_TABLES:
        subprocess.run(["nft", "delete", "table", family, table], capture_output=True, check=False)
