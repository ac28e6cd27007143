"""What helm makes of the chart."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_contract.env import PROGRESS_PORT
from qlora_operator.controller.handlers import PORT
from qlora_operator.settings import load_settings
from testcluster.binaries import ensure
from testcluster.chart import CHART, RELEASE, SYSTEM, HelmError, find, helm, installed, render
from testcluster.client import ApiError
from testcluster.control_plane import ControlPlane
from testcluster.fixtures import fresh_namespace

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
CASES: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "cases.yaml").read_text())
CLUSTER_WIDE = {
    "ClusterRole",
    "ClusterRoleBinding",
    "CustomResourceDefinition",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
}


@pytest.fixture(scope="session")  # with several processes, a module may come twice
def places(chart_cluster: ControlPlane) -> Iterator[str]:
    """The namespaces that the cases name, and one to release into: its name."""
    for name in ("team-a", "team-b"):
        chart_cluster.client.post("/api/v1/namespaces", {"metadata": {"name": name}})
    with fresh_namespace(chart_cluster, "render") as namespace:
        yield namespace


@pytest.fixture(scope="module")
def tell(chart_cluster: ControlPlane) -> Callable[[dict[str, Any]], Any]:
    """tell(object) -> what the API server would keep of it; it refuses fields that it does not know."""
    plurals = {}

    def path(each: dict[str, Any]) -> str:
        group = each["apiVersion"]
        prefix = f"/apis/{group}" if "/" in group else f"/api/{group}"
        if prefix not in plurals:
            found = chart_cluster.client.get(prefix)["resources"]
            plurals[prefix] = {kind["kind"]: kind["name"] for kind in found if "/" not in kind["name"]}
        namespace = each["metadata"].get("namespace")
        place = f"{prefix}/namespaces/{namespace}" if namespace else prefix
        return f"{place}/{plurals[prefix][each['kind']]}/{each['metadata']['name']}"

    def tell(each: dict[str, Any]) -> Any:
        # Accounts are really made: a pod whose account is not there is refused.
        dry = "" if each["kind"] == "ServiceAccount" else "dryRun=All&"
        query = f"{dry}fieldManager=test&fieldValidation=Strict"
        return chart_cluster.client.patch(f"{path(each)}?{query}", each, "application/apply-patch+yaml")

    return tell


@pytest.mark.parametrize("case", ["defaults", *CASES])
def test_an_api_server_takes_every_rendering(tell: Callable[..., Any], places: str, case: str) -> None:
    """Whatever is switched, the API server accepts each object, and knows each field of it."""
    for each in render(CASES.get(case), namespace=places):
        assert tell(each)["metadata"]["name"] == each["metadata"]["name"]


def test_an_api_server_refuses_a_field_that_it_does_not_know(tell: Callable[..., Any], places: str) -> None:
    """The test above is one that can fail."""
    service = find(render(namespace=places), "Service")
    service["spec"]["prots"] = []

    with pytest.raises(ApiError, match="prots"):
        tell(service)


def sections(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every value in nested maps."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from sections(value, (*path, key))
        else:
            yield (*path, key)


def without(values: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """A copy of the values without the one at the path."""
    changed = copy.deepcopy(values)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return changed


@pytest.mark.parametrize("case", CASES)
def test_every_value_of_a_case_changes_the_rendering(case: str) -> None:
    """No value is without effect."""
    whole = render(CASES[case])

    assert [path for path in sections(CASES[case]) if rendered(without(CASES[case], path)) == whole] == []


def rendered(values: dict[str, Any]) -> list[dict[str, Any]] | str:
    """What helm makes of them, or why it does not."""
    try:
        return render(values)
    except HelmError as error:
        return error.text


def test_lint_is_content() -> None:
    """`helm lint --strict` finds nothing to warn of."""
    text = helm("lint", "--strict", str(CHART))

    assert "WARNING" not in text
    assert "0 chart(s) failed" in text


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"nameSpaces": ["a"]}, "nameSpaces"),
        ({"jobs": {"limit": {"pods": 1}}}, "limit"),
        ({"jobs": {"limits": {"pods": 0}}}, "/jobs/limits/pods"),
        ({"jobs": {"limits": {"memory": "lots"}}}, "/jobs/limits/memory"),
        ({"jobs": {"imagePullPolicy": "Sometimes"}}, "/jobs/imagePullPolicy"),
        ({"image": {"tag": 1.2}}, "/image/tag"),
        ({"namespaces": "team-a"}, "/namespaces"),
        ({"timing": {"sweepSeconds": 0}}, "/timing/sweepSeconds"),
        ({"namespaces": ["team-a", "team-a"]}, "/namespaces"),
        ({"jobs": {"requireDigests": True}}, "jobs.requireDigests demands image.digest"),
        (
            {"jobs": {"requireDigests": True}, "image": {"digest": f"sha256:{'0' * 64}"}},
            "jobs.requireDigests demands jobs.image.digest",
        ),
    ],
    ids=[
        "unknown section",
        "unknown key",
        "no pods",
        "no quantity",
        "no policy",
        "a number for a tag",
        "a string for a list",
        "no time",
        "a namespace twice",
        "digests demanded of others than the operator",
        "digests demanded of others than the jobs' default",
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], said: str) -> None:
    """A key that nobody knows or a value that the operator would refuse ends helm, which names it."""
    with pytest.raises(HelmError) as refused:
        render(values)
    assert said in refused.value.text


def test_install_yaml_is_the_rendered_chart() -> None:
    """manifests/install.yaml is what helm makes of the chart's default values."""
    program = str(ensure("api", "helm")["helm"])
    command = [sys.executable, str(ROOT / "manifests" / "generate.py"), "--check", "--helm", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (0, ""), "run: python manifests/generate.py --helm PATH"
    assert installed()[0]["kind"] == "Namespace"


# --- the operator's settings


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Any]:
    """of(values) -> the settings that an operator of this release reads."""

    def of(values: dict[str, Any] | None = None) -> Any:
        file = tmp_path / "settings.yaml"
        file.write_text(find(render(values), "ConfigMap", RELEASE)["data"]["settings.yaml"])
        return load_settings(file)

    return of


def test_the_operator_reads_what_was_set(settings: Callable[..., Any]) -> None:
    """The operator's settings are the release's values: lists, limits, addresses and clocks."""
    for case in ("jobs", "limits", "transfer", "timing"):
        (section,) = CASES[case].values()
        seen = settings(CASES[case]).model_dump(by_alias=True, exclude_unset=True)
        for key, value in section.items():
            told = {name: seen[key][name] for name in value} if key in ("limits", "transfer") else seen[key]
            assert told == value, (case, key)


def test_ids_are_the_platforms_when_they_are_null(settings: Callable[..., Any]) -> None:
    """Neither the operator's pod nor a job's names an id then."""
    objects = render(CASES["ids of the platform"])
    pod = find(objects, "Deployment")["spec"]["template"]["spec"]["securityContext"]
    seen = settings(CASES["ids of the platform"])

    assert pod == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert (seen.run_as_user, seen.run_as_group, seen.fs_group) == (None, None, None)


def test_large_ids_keep_their_digits(settings: Callable[..., Any]) -> None:
    """Ids as OpenShift gives them out arrive as they were written."""
    pod = find(render(CASES["large ids"]), "Deployment")["spec"]["template"]["spec"]["securityContext"]
    seen = settings(CASES["large ids"])

    assert (pod["runAsUser"], pod["runAsGroup"]) == (1000690000, 1000690001)
    assert (seen.run_as_user, seen.run_as_group, seen.fs_group) == (1000690002, 1000690003, 1000690004)


@pytest.mark.parametrize(
    ("case", "operator", "trainer"),
    [
        ("defaults", "qlora-operator:0.1.0", "qlora-trainer:0.1.0"),
        ("tags", "registry.example/operator:1.2", "registry.example/trainer:1.3"),
        (
            "digests",
            "qlora-operator@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
            "qlora-trainer@sha256:fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210",
        ),
    ],
    ids=["defaults", "tags", "digests"],
)
def test_images(settings: Callable[..., Any], case: str, operator: str, trainer: str) -> None:
    """An image is named by its digest, else its tag, else the chart's version."""
    pod = find(render(CASES.get(case)), "Deployment")["spec"]["template"]["spec"]

    assert pod["containers"][0]["image"] == operator
    assert settings(CASES.get(case)).trainer_image == trainer
    assert find(render(CASES.get(case)), "Pod")["spec"]["containers"][0]["image"] == trainer


def test_other_settings_are_another_pod() -> None:
    """A release whose settings change rolls the operator; one whose labels change by the chart's version does not."""

    def template(values: dict[str, Any]) -> Any:
        return find(render(values), "Deployment")["spec"]["template"]

    assert template(CASES["limits"]) != template({})
    assert template({"rbac": {"aggregate": False}}) == template({})
    assert "helm.sh/chart" not in template({})["metadata"]["labels"]


def test_the_operator_and_scrapers_may_read_progress(settings: Callable[..., Any]) -> None:
    """The operator's own pods are among those that a job's NetworkPolicy lets in, then who was named."""
    own, other = settings(CASES["network"]).scrapers
    labels = find(render(), "Deployment")["spec"]["template"]["metadata"]["labels"]

    assert own["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": SYSTEM}
    assert own["podSelector"]["matchLabels"].items() <= labels.items()
    assert other == CASES["network"]["metrics"]["scrapers"][0]


def test_ports_are_the_programs_own() -> None:
    """Service, probes, NetworkPolicy and test name the ports at which operator and trainer listen."""
    objects = render(CASES["network"])
    policy = find(objects, "NetworkPolicy")["spec"]
    container = find(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]

    assert find(objects, "Service")["spec"]["ports"][0]["port"] == PORT
    assert container["ports"] == [{"name": "http", "containerPort": PORT}]
    assert policy["ingress"][0]["ports"] == [{"port": PORT, "protocol": "TCP"}]
    assert policy["egress"][-1]["ports"] == [{"port": PROGRESS_PORT, "protocol": "TCP"}]
    assert f":{PORT}" in find(objects, "Pod")["spec"]["containers"][0]["args"][2]


def test_replicas_hold_the_lease_that_they_may_write() -> None:
    """The operator's Lease is the one that its role names, and it may ask for no other."""
    for values in ({}, CASES["names"]):
        objects = render(values)
        deployment = find(objects, "Deployment")
        arguments = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
        (lease,) = [each.removeprefix("--lease=") for each in arguments if each.startswith("--lease=")]
        namespace, name = lease.split("/")
        (role,) = [
            each
            for each in objects
            if each["kind"] == "Role" and each["rules"][0]["apiGroups"] == ["coordination.k8s.io"]
        ]
        assert (role["metadata"]["namespace"], namespace) == (SYSTEM, SYSTEM)
        assert role["rules"][1]["resourceNames"] == [name]
        assert [rule["verbs"] for rule in role["rules"]] == [["create"], ["get", "update"]]


def test_a_budget_holds_only_where_there_is_another_replica() -> None:
    """Of one replica it would keep the node from being drained."""
    (budget,) = [each for each in render({"replicas": 2}) if each["kind"] == "PodDisruptionBudget"]
    pod = find(render({"replicas": 2}), "Deployment")["spec"]["template"]

    assert budget["spec"]["maxUnavailable"] == 1
    assert budget["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert not [each for each in render() if each["kind"] == "PodDisruptionBudget"]


# --- who may do what


def test_a_release_for_namespaces_has_no_say_elsewhere() -> None:
    """With namespaces, the operator's roles are theirs; of the cluster it only lists nodes, or nothing at all."""
    objects = render(CASES["namespaced"])
    roles = [each for each in objects if each["kind"] == "Role" and each["metadata"]["namespace"] != SYSTEM]
    bound = find(objects, "ClusterRoleBinding")["roleRef"]["name"]

    assert [role["metadata"]["namespace"] for role in roles] == ["team-a", "team-b"]
    assert find(objects, "ClusterRole", bound)["rules"] == [
        {"apiGroups": [""], "resources": ["nodes"], "verbs": ["list"]}
    ]
    assert not any(
        each["kind"] == "ClusterRoleBinding" for each in render(CASES["namespaced, without nodes"])
    )
    container = find(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert container["args"][-2:] == ["--namespace=team-a", "--namespace=team-b"]


def test_bindings_name_the_service_account() -> None:
    """Every binding is for the account that the operator's pod has, and for a role that is there."""
    for values in ({}, CASES["namespaced"], {"serviceAccount": {"create": False, "name": "other"}}):
        objects = render(values)
        account = find(objects, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"]
        for binding in (each for each in objects if each["kind"].endswith("Binding") and "subjects" in each):
            assert [subject["name"] for subject in binding["subjects"]] == [account]
            there = [
                each
                for each in objects
                if (each["kind"], each["metadata"]["name"])
                == (binding["roleRef"]["kind"], binding["roleRef"]["name"])
            ]
            assert there


def test_releases_of_one_name_in_two_namespaces_share_nothing() -> None:
    """No object without a namespace has the same name in both, but the definition."""
    first, second = (
        {
            (each["kind"], each["metadata"]["name"])
            for each in render(namespace=namespace)
            if each["kind"] in CLUSTER_WIDE
        }
        for namespace in ("one", "two")
    )

    assert {kind for kind, _ in first & second} == {"CustomResourceDefinition"}
    kinds = {each["kind"] for each in render() if "namespace" not in each["metadata"]}
    assert kinds <= CLUSTER_WIDE


def test_alerts_look_at_their_own_release_alone() -> None:
    """Every series that an alert reads is the one of this release's operator."""
    rules = find(render(CASES["monitoring"]), "PrometheusRule")["spec"]["groups"]
    expressions = [rule["expr"] for group in rules for rule in group["rules"]]
    service = find(render(CASES["monitoring"]), "Service")["metadata"]["name"]

    for expression in expressions:
        selectors = expression.count("{")
        assert selectors
        assert expression.count(f'job="{service}"') == selectors


def test_the_dashboard_arrives_whole() -> None:
    """The ConfigMap's dashboard is the file's: nothing in it was taken for a template's action."""
    told = find(render(CASES["monitoring"]), "ConfigMap", f"{RELEASE}-dashboard")["data"][
        "qlora-operator.json"
    ]

    assert json.loads(told) == json.loads((CHART / "files" / "dashboard.json").read_text())
