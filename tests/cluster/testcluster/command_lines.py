"""The options of each program of a control plane."""

from collections.abc import Iterable
from pathlib import Path

LOOPBACK = "127.0.0.1"
SERVICES = "10.96.0.0/16"
"""Addresses of Services; the first is the API server's."""

_AUDIT_POLICY = """\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules: [{level: Metadata}]
"""


def etcd(folder: Path, ports: dict[str, int]) -> list[str]:
    """etcd, for this control plane alone."""
    client, peer = (f"http://{LOOPBACK}:{ports[name]}" for name in ("etcd", "etcd-peer"))
    return [
        f"--data-dir={folder / 'etcd'}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--unsafe-no-fsync",  # the data are thrown away
        "--log-level=warn",
    ]


def apiserver(pki: Path, address: str, ports: dict[str, int]) -> list[str]:
    """The API server, with TLS and RBAC; `pki` holds its certificates and keys."""
    return [
        f"--etcd-servers=http://{LOOPBACK}:{ports['etcd']}",
        f"--bind-address={address}",
        f"--secure-port={ports['apiserver']}",
        f"--tls-cert-file={pki / 'apiserver.crt'}",
        f"--tls-private-key-file={pki / 'apiserver.key'}",
        f"--client-ca-file={pki / 'ca.crt'}",
        f"--kubelet-client-certificate={pki / 'apiserver-kubelet-client.crt'}",
        f"--kubelet-client-key={pki / 'apiserver-kubelet-client.key'}",
        "--kubelet-preferred-address-types=InternalIP",  # the nodes' names are in no DNS
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={pki / 'service-accounts.key'}",
        f"--service-account-signing-key-file={pki / 'service-accounts.key'}",
        f"--service-cluster-ip-range={SERVICES}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        *_reach(address),
    ]


def _reach(address: str) -> list[str]:
    """How pods reach the API server: not at all on loopback, which the kubernetes Service cannot name."""
    return ["--endpoint-reconciler-type=none"] if address == LOOPBACK else [f"--advertise-address={address}"]


def audit(folder: Path) -> list[str]:
    """More for the API server: a log of who asked for what. Writes its policy."""
    policy = folder / "audit-policy.yaml"
    policy.write_text(_AUDIT_POLICY)
    return [f"--audit-policy-file={policy}", f"--audit-log-path={folder / 'audit.log'}"]


def controller_manager(folder: Path, node_grace_seconds: int) -> list[str]:
    """The controller manager, to which a node is lost when it was silent for so long."""
    pki = folder / "pki"
    return [
        *_client(folder, "kube-controller-manager"),
        f"--service-account-private-key-file={pki / 'service-accounts.key'}",
        "--use-service-account-credentials",
        f"--root-ca-file={pki / 'ca.crt'}",
        f"--node-monitor-grace-period={node_grace_seconds}s",
        f"--node-startup-grace-period={node_grace_seconds}s",
    ]


def feature_gates(names: Iterable[str]) -> list[str]:
    """More for each of them: these are switched on."""
    gates = ",".join(f"{name}=true" for name in names)
    return [f"--feature-gates={gates}"] if gates else []


def scheduler(folder: Path) -> list[str]:
    """The scheduler."""
    return _client(folder, "kube-scheduler")


def _client(folder: Path, name: str) -> list[str]:
    return [
        f"--kubeconfig={folder / name}.kubeconfig",
        "--leader-elect=false",
        "--secure-port=0",  # nobody asks it anything
        "--kube-api-qps=1000",  # 20 by default, which is what tests would wait for
        "--kube-api-burst=2000",
    ]
