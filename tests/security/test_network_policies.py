"""Who reaches whom, by Kubernetes' rules for NetworkPolicies: a job's own policy, and the chart's for the operator.

No network plugin takes part: what is evaluated is the policies themselves.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml

from builders import OMIT, ON_ONE_CLAIM, a_job
from qlora_contract.env import PROGRESS_PORT, RENDEZVOUS_PORT
from qlora_operator.desired.attempt_job import attempt_job
from qlora_operator.desired.network import network_policy
from qlora_operator.settings import Settings
from testcluster.chart import SYSTEM, find, render

pytestmark = pytest.mark.cluster

Object = dict[str, Any]
UID, OTHER_UID = "6c7c3c4b-0000-4000-8000-000000000001", "6c7c3c4b-0000-4000-8000-000000000002"
GLOO_PORT = 40_123
"""Wherever the kernel puts it."""
OPERATOR_PORT = 8471
API_SERVER_PORT = 6443


@dataclass(frozen=True)
class Pod:
    """As far as policies look at one."""

    namespace: str
    labels: dict[str, str] = field(default_factory=dict)


# --- the rules of networking.k8s.io/v1


def reaches(policies: Iterable[Object], source: Pod, target: Pod, port: int, protocol: str = "TCP") -> bool:
    """Whether a connection is let out at its source and let in at its target."""
    known = list(policies)
    return _passes(known, "Egress", source, target, port, protocol) and _passes(
        known, "Ingress", target, source, port, protocol
    )


def _passes(
    policies: list[Object], direction: str, selected: Pod, peer: Pod, port: int, protocol: str
) -> bool:
    """Every policy that selects the pod adds what it lets through; without any, all goes through."""
    mine = [
        policy for policy in policies if direction in policy["spec"]["policyTypes"] and _on(policy, selected)
    ]
    rules = [rule for policy in mine for rule in policy["spec"].get(direction.lower(), [])]
    return not mine or any(_rule(rule, direction, selected, peer, port, protocol) for rule in rules)


def _on(policy: Object, pod: Pod) -> bool:
    same = policy["metadata"]["namespace"] == pod.namespace
    return same and selects(policy["spec"]["podSelector"], pod.labels)


def _rule(rule: Object, direction: str, selected: Pod, peer: Pod, port: int, protocol: str) -> bool:
    """A rule without peers is for all of them, and one without ports for all of those."""
    peers = rule.get("from" if direction == "Ingress" else "to")
    ports = rule.get("ports")
    return (not peers or any(_peer(each, selected.namespace, peer) for each in peers)) and (
        not ports or any(_port(each, port, protocol) for each in ports)
    )


def _peer(peer: Object, home: str, pod: Pod) -> bool:
    """A pod selector alone is for the policy's own namespace."""
    assert set(peer) <= {"podSelector", "namespaceSelector"}, "addresses are not evaluated here"
    names = {"kubernetes.io/metadata.name": pod.namespace}
    there = (
        selects(peer["namespaceSelector"], names) if "namespaceSelector" in peer else pod.namespace == home
    )
    return there and selects(peer.get("podSelector", {}), pod.labels)


def _port(allowed: Object, port: int, protocol: str) -> bool:
    assert isinstance(allowed["port"], int), "names of ports are not evaluated here"
    last = allowed.get("endPort", allowed["port"])
    return allowed["port"] <= port <= last and allowed.get("protocol", "TCP") == protocol


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector fits; an empty one fits everything."""
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        _expression(each, labels) for each in selector.get("matchExpressions", [])
    )


def _expression(expression: Object, labels: dict[str, str]) -> bool:
    key, values = expression["key"], expression.get("values", [])
    return {
        "In": labels.get(key) in values,
        "NotIn": labels.get(key) not in values,
        "Exists": key in labels,
        "DoesNotExist": key not in labels,
    }[expression["operator"]]


# --- a cluster with two jobs


JOB = a_job(metadata={"namespace": "team-a"}, **ON_ONE_CLAIM, topology={"pods": 2, "cpusPerRank": OMIT})
VALUES: Object = {
    "networkPolicy": {"enabled": True},
    "metrics": {
        "scrapers": [
            {
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
                "podSelector": {"matchLabels": {"app": "prometheus"}},
            }
        ]
    },
}


@pytest.fixture(scope="module")
def release() -> list[Object]:
    """The chart's objects."""
    return render(VALUES)


@pytest.fixture(scope="module")
def pods(release: list[Object]) -> dict[str, Pod]:
    """Who there is, with the labels that the operator and the chart give."""
    rank, other_rank = (_rank(uid) for uid in (UID, OTHER_UID))
    operator = find(release, "Deployment")["spec"]["template"]["metadata"]["labels"]
    return {
        "rank": Pod("team-a", rank),
        "rank of another job": Pod("team-a", other_rank),
        "copycat elsewhere": Pod("team-b", rank),
        "neighbour": Pod("team-a", {"app": "web"}),
        "stranger": Pod("team-b"),
        "operator": Pod(SYSTEM, operator),
        "copycat of the operator": Pod("team-b", operator),
        "neighbour of the operator": Pod(SYSTEM, {"app": "web"}),
        "Prometheus": Pod("monitoring", {"app": "prometheus"}),
        "Grafana": Pod("monitoring", {"app": "grafana"}),
        "DNS": Pod("kube-system", {"k8s-app": "kube-dns"}),
        "API server": Pod("kube-system", {"component": "kube-apiserver"}),
    }


@functools.cache
def _settings() -> Settings:
    """The operator's, from the chart."""
    return Settings.model_validate(yaml.safe_load(find(render(VALUES), "ConfigMap")["data"]["settings.yaml"]))


def _rank(uid: str) -> dict[str, str]:
    gang = attempt_job(JOB, uid=uid, attempt=0, isa="avx512", image="x", settings=_settings())
    labels: dict[str, str] = gang["spec"]["template"]["metadata"]["labels"]
    return labels


@pytest.fixture(scope="module")
def policies(release: list[Object]) -> list[Object]:
    """Of both jobs, and of the operator."""
    job = JOB
    jobs = [network_policy(job, uid=uid, settings=_settings()) for uid in (UID, OTHER_UID)]
    return [*jobs, find(release, "NetworkPolicy")]


CASES: dict[str, tuple[str, str, int, bool]] = {
    "ranks meet": ("rank", "rank", RENDEZVOUS_PORT, True),
    "ranks talk on any port": ("rank", "rank", GLOO_PORT, True),
    "another job's rank does not join": ("rank of another job", "rank", RENDEZVOUS_PORT, False),
    "another job's rank does not listen": ("rank of another job", "rank", GLOO_PORT, False),
    "another job's rank reads no progress": ("rank of another job", "rank", PROGRESS_PORT, False),
    "the label of a job in another namespace": ("copycat elsewhere", "rank", RENDEZVOUS_PORT, False),
    "a pod of the namespace": ("neighbour", "rank", RENDEZVOUS_PORT, False),
    "a pod of the namespace reads no progress": ("neighbour", "rank", PROGRESS_PORT, False),
    "a pod of another namespace": ("stranger", "rank", PROGRESS_PORT, False),
    "the operator reads the progress": ("operator", "rank", PROGRESS_PORT, True),
    "the operator does not join": ("operator", "rank", RENDEZVOUS_PORT, False),
    "the operator reaches no other port": ("operator", "rank", GLOO_PORT, False),
    "the operator's labels in another namespace": ("copycat of the operator", "rank", PROGRESS_PORT, False),
    "who lives beside the operator": ("neighbour of the operator", "rank", PROGRESS_PORT, False),
    "Prometheus reads the progress": ("Prometheus", "rank", PROGRESS_PORT, True),
    "Prometheus reaches no other port": ("Prometheus", "rank", RENDEZVOUS_PORT, False),
    "who lives beside Prometheus": ("Grafana", "rank", PROGRESS_PORT, False),
    "ranks ask whom they want": ("rank", "DNS", 53, True),
    "Prometheus reads the operator's metrics": ("Prometheus", "operator", OPERATOR_PORT, True),
    "Prometheus reaches no other port of the operator": ("Prometheus", "operator", 22, False),
    "a rank does not reach the operator": ("rank", "operator", OPERATOR_PORT, False),
    "a stranger does not reach the operator": ("stranger", "operator", OPERATOR_PORT, False),
    "the operator reaches the API server": ("operator", "API server", API_SERVER_PORT, True),
    "the operator reaches no pod without a job": ("operator", "neighbour", PROGRESS_PORT, False),
    "the operator reaches no web server": ("operator", "stranger", 80, False),
}


@pytest.mark.parametrize(("source", "target", "port", "heard"), CASES.values(), ids=CASES)
def test_who_reaches_whom(
    policies: list[Object], pods: dict[str, Pod], source: str, target: str, port: int, heard: bool
) -> None:
    """Ranks hear their own job, the operator and the scrapers, each at its ports; nobody else."""
    assert reaches(policies, pods[source], pods[target], port) is heard


def test_names_are_looked_up(policies: list[Object], pods: dict[str, Pod]) -> None:
    """The operator asks DNS by either protocol."""
    assert reaches(policies, pods["operator"], pods["DNS"], 53, "UDP")
    assert reaches(policies, pods["operator"], pods["DNS"], 53)
    assert not reaches(policies, pods["operator"], pods["DNS"], 54, "UDP")


EVALUATED: dict[str, tuple[Callable[[Object], None], bool]] = {
    "as it is": (lambda spec: None, True),
    "of another pod": (lambda spec: spec["podSelector"]["matchLabels"].update(app="other"), True),
    "without rules": (lambda spec: spec.update(ingress=[]), False),
    "with a rule for nobody": (
        lambda spec: spec["ingress"][0]["from"][0]["podSelector"].update(matchLabels={"a": "b"}),
        False,
    ),
    "with a rule for everybody": (lambda spec: spec.update(ingress=[{}]), True),
    "about egress, without rules": (lambda spec: spec.update(policyTypes=["Egress"]), False),
}


@pytest.mark.parametrize(("change", "heard"), EVALUATED.values(), ids=EVALUATED)
def test_the_evaluation(change: Callable[[Object], None], heard: bool) -> None:
    """A policy that selects a pod closes it but for its rules; one that does not changes nothing."""
    rank = Pod("team-a", _rank(UID))
    policy = network_policy(JOB, uid=UID, settings=_settings())
    change(policy["spec"])

    assert reaches([policy], rank, rank, RENDEZVOUS_PORT) is heard
