"""Who may talk to a job's pods, evaluated as Kubernetes evaluates a NetworkPolicy."""

from collections.abc import Callable
from typing import Any

import pytest

from qlora_contract.env import PROGRESS_PORT, RENDEZVOUS_PORT
from qlora_operator.api import names
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.desired.metadata import labels
from qlora_operator.desired.network import is_network_policy, network_policy
from qlora_operator.settings import Settings

Labels = dict[str, str]
MONITORING = {"kubernetes.io/metadata.name": "monitoring"}
TEAM = {"kubernetes.io/metadata.name": "team"}
PROMETHEUS = {"app": "prometheus"}
SCRAPER = {
    "namespaceSelector": {"matchLabels": MONITORING},
    "podSelector": {"matchLabels": PROMETHEUS},
}
RANK = {names.JOB_UID_LABEL: "u"}
RANK_OF_OTHERS = {names.JOB_UID_LABEL: "v"}


def lets_in(policy: dict[str, Any], pod: Labels, namespace: Labels, port: int) -> bool:
    """Whether a selected pod, in the namespace TEAM, hears from `pod` on a port."""
    return any(
        ("from" not in rule or not rule["from"] or any(_is(peer, pod, namespace) for peer in rule["from"]))
        and ("ports" not in rule or port in [allowed["port"] for allowed in rule["ports"]])
        for rule in policy["spec"]["ingress"]
    )


def _is(peer: dict[str, Any], pod: Labels, namespace: Labels) -> bool:
    right_namespace = (
        _has(namespace, peer["namespaceSelector"]) if "namespaceSelector" in peer else namespace == TEAM
    )
    return right_namespace and _has(pod, peer.get("podSelector", {}))


def _has(there: Labels, selector: dict[str, Labels]) -> bool:
    return selector.get("matchLabels", {}).items() <= there.items()


CASES = {
    "a rank hears its peers' rendezvous": (RANK, TEAM, RENDEZVOUS_PORT, True),
    "a rank hears gloo on any port": (RANK, TEAM, 40_123, True),
    "nobody else's rank is heard": (RANK_OF_OTHERS, TEAM, RENDEZVOUS_PORT, False),
    "nobody else's rank reads the progress": (RANK_OF_OTHERS, TEAM, PROGRESS_PORT, False),
    "a pod in another namespace with the job's label is not heard": (RANK, MONITORING, 40_123, False),
    "a scraper reads the progress": (PROMETHEUS, MONITORING, PROGRESS_PORT, True),
    "a scraper reaches no other port": (PROMETHEUS, MONITORING, RENDEZVOUS_PORT, False),
    "the scraper's name in another namespace does not help": (PROMETHEUS, TEAM, PROGRESS_PORT, False),
}


@pytest.mark.parametrize(("pod", "namespace", "port", "heard"), CASES.values(), ids=CASES)
def test_who_is_heard(
    pod: Labels,
    namespace: Labels,
    port: int,
    heard: bool,
    a_job: Callable[..., QLoRAJob],
    settings: Callable[..., Settings],
) -> None:
    """Ranks hear each other on every port and scrapers on the progress port; nobody else."""
    policy = network_policy(a_job(), uid="u", settings=settings(scrapers=[SCRAPER]))

    assert lets_in(policy, pod, namespace, port) is heard


def test_without_scrapers_nobody_scrapes(
    a_job: Callable[..., QLoRAJob], settings: Callable[..., Settings]
) -> None:
    """No rule with an empty list of peers is made: Kubernetes would take it for everyone."""
    policy = network_policy(a_job(), uid="u", settings=settings())

    assert lets_in(policy, RANK, TEAM, PROGRESS_PORT)
    assert not lets_in(policy, PROMETHEUS, MONITORING, PROGRESS_PORT)


def test_the_policy_is_about_ingress_to_all_the_jobs_pods(
    a_job: Callable[..., QLoRAJob],
    settings: Callable[..., Settings],
    misfits: Callable[[Any, str], list[str]],
) -> None:
    """Every pod of the job is selected, whatever its attempt; what pods may reach is not restricted."""
    policy = network_policy(a_job(), uid="u", settings=settings(scrapers=[SCRAPER]))
    spec = policy["spec"]

    assert _has(labels(a_job(), "u", names.Role.TRAINER, 4), spec["podSelector"])
    assert not _has(labels(a_job(), "v", names.Role.TRAINER, 4), spec["podSelector"])
    assert spec["policyTypes"] == ["Ingress"]
    assert misfits(policy, "V1NetworkPolicy") == []


@pytest.mark.parametrize(
    ("scrapers", "opened", "as_made"),
    [
        ([SCRAPER], [], True),
        ([], [], False),
        ([SCRAPER], [{}], False),
    ],
    ids=["as made", "other settings", "somebody has opened it"],
)
def test_a_policy_that_is_out_of_date_is_told(
    a_job: Callable[..., QLoRAJob], scrapers: list[Any], opened: list[Any], *, as_made: bool
) -> None:
    """Scrapers change with the release, and whoever may edit policies may let everybody in."""
    made = Settings(trainer_image="registry.example/trainer:1", scrapers=scrapers)
    policy = network_policy(a_job(), uid="u", settings=made)
    policy["spec"]["ingress"] += opened

    assert is_network_policy(policy, made.model_copy(update={"scrapers": [SCRAPER]})) == as_made


@pytest.mark.parametrize(
    ("named", "to"),
    [
        (None, None),
        ([], [{"podSelector": {"matchLabels": RANK}}]),
        (
            [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}],
            [{"podSelector": {"matchLabels": RANK}}, {"ipBlock": {"cidr": "10.0.0.0/8"}}],
        ),
    ],
    ids=["everything", "nothing besides", "a network"],
)
def test_egress_is_what_the_administrator_names(
    a_job: Callable[..., QLoRAJob], named: list[Any] | None, to: list[Any] | None
) -> None:
    """Pods always reach each other, and DNS, without which they would not find each other."""
    given = Settings(trainer_image="registry.example/trainer:1", egress=named)
    policy = network_policy(a_job(), uid="u", settings=given)
    spec = policy["spec"]

    assert ("Egress" in spec["policyTypes"]) == ("egress" in spec) == (named is not None)
    if to is not None:
        assert [peer for rule in spec["egress"] for peer in rule.get("to", [])] == to
        (dns,) = (rule for rule in spec["egress"] if "to" not in rule)
        assert {port["port"] for port in dns["ports"]} == {53}
    assert is_network_policy(policy, given)
