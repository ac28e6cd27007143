"""The kubelet of a node."""

import os
from pathlib import Path

from testcluster import cgroups, containerd
from testcluster.control_plane import ControlPlane
from testcluster.network import HOST_ADDRESS
from testcluster.node import Node

CLUSTER_DOMAIN = "cluster.local"
_MIB = 1 << 20


def start(node: Node, control_plane: ControlPlane) -> None:
    """Start the node's kubelet; it registers the node by itself."""
    kubeconfig = control_plane.folder / f"{node.name}.kubeconfig"
    if not kubeconfig.exists():
        addresses = (f"IP:{node.address}", f"DNS:{node.name}")
        control_plane.issue(node.name, f"system:node:{node.name}", ("system:nodes",), addresses)
    config = node.folder / "kubelet.yaml"
    config.write_text(_config(node, control_plane.folder / "pki"))
    cgroups.make(node.group)
    command = [
        str(control_plane.binaries["kubelet"]),
        f"--config={config}",
        f"--kubeconfig={kubeconfig}",
        f"--hostname-override={node.name}",
        f"--node-ip={node.address}",
    ]
    node.start("kubelet", command)


def reserved_cpus(node: Node) -> str:
    """All CPUs of the machine but the node's own, which pods may then own."""
    return ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0)) if cpu != node.cpu)


def _config(node: Node, pki: Path) -> str:
    # Both kubelets see the whole machine's memory: half of it is reserved for the other.
    other_half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // _MIB
    resolver = node.folder / "resolv.conf"
    resolver.write_text(f"nameserver {HOST_ADDRESS}\n")
    return f"""\
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: {node.address}
healthzPort: 0
tlsCertFile: {pki / node.name}.crt
tlsPrivateKeyFile: {pki / node.name}.key
authentication:
  anonymous: {{enabled: false}}
  webhook: {{enabled: true}}
  x509: {{clientCAFile: {pki / "ca.crt"}}}
authorization: {{mode: Webhook}}
containerRuntimeEndpoint: unix://{containerd.SOCKET}
failCgroupV1: false
failSwapOn: false
cgroupDriver: cgroupfs
cgroupRoot: /{cgroups.ROOT}/{node.group}
cpuManagerPolicy: static
reservedSystemCPUs: "{reserved_cpus(node)}"
systemReserved: {{memory: {other_half}Mi}}
enforceNodeAllocatable: []
makeIPTablesUtilChains: false
clusterDNS: [{HOST_ADDRESS}]
clusterDomain: {CLUSTER_DOMAIN}
resolvConf: {resolver}
# The kubelet takes a disk's reserved blocks for used ones.
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard: {{memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%, nodefs.inodesFree: 1%}}
# A lost node is noticed in seconds: leases are renewed four times as often as this says.
nodeLeaseDurationSeconds: 8
nodeStatusUpdateFrequency: 5s
registerNode: true
"""
