"""What somebody else does to a job's children, or to the job, with or without an operator to see it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testcluster.chart import operator_role
from testcluster.client import ApiError, Client
from testcluster.control_plane import ControlPlane
from testcluster.waiting import wait_for
from testcluster.witness import Witness

pytestmark = pytest.mark.cluster

BATCH = "/apis/batch/v1"
POLICIES = pytest.mark.parametrize("policy", ["Background", "Foreground", "Orphan"], ids=str.lower)
AFFINITY = "requiredDuringSchedulingIgnoredDuringExecution"


@pytest.fixture
def client(control_plane: ControlPlane) -> Client:
    """The administrator's."""
    return control_plane.client


def path_of(job: Any, child: str) -> str:
    """Of a child such as `services/job-ranks`."""
    plural = child.partition("/")[0]
    prefix = {"jobs": BATCH, "networkpolicies": "/apis/networking.k8s.io/v1"}.get(plural, "/api/v1")
    return f"{prefix}/namespaces/{job.namespace}/{child}"


def gone(client: Client, path: str) -> bool:
    """Whether there is no such object."""
    try:
        client.get(path)
    except ApiError as error:
        return error.code == 404
    return False


def starts_over(job: Any, witness: Witness, reason: str) -> None:
    """Attempt 0 is over, at the infrastructure's expense, and attempt 1 runs; never were there two gangs."""
    job.run(1)
    status = job.status
    assert status["attempts"][0]["reason"] == reason
    assert status["restarts"] == {"user": 0, "infrastructure": 1}
    witness.look()
    assert witness.faults == []
    assert all(len(jobs) == 1 for jobs in witness.jobs.values())


# --- the Job and its pods


@POLICIES
def test_the_next_attempt_starts_once_every_pod_of_a_deleted_job_is_gone(
    policy: str,
    operator: Any,
    make_job: Callable[..., Any],
    client: Client,
    witness: Witness,
    terminations: None,
) -> None:
    """The attempt's Job is deleted while it runs: the next attempt starts once every pod of it is gone."""
    job = make_job()
    job.run()
    job.until(lambda status: status["attempts"][0].get("jobUid"))
    client.delete(path_of(job, "jobs/job-a0"), {"propagationPolicy": policy})
    starts_over(job, witness, "JobDeleted")


@pytest.mark.parametrize("count", [1, 2], ids=["one", "all"])
def test_the_gang_starts_over_when_running_pods_are_deleted(
    count: int,
    operator: Any,
    make_job: Callable[..., Any],
    client: Client,
    witness: Witness,
    terminations: None,
) -> None:
    """Pods are deleted while they run: the gang starts over."""
    job = make_job()
    for pod in job.run()[:count]:
        client.delete(path_of(job, f"pods/{pod['metadata']['name']}"))
    job.run(1)
    assert job.status["restarts"] == {"user": 0, "infrastructure": 1}
    witness.look()
    assert witness.faults == []


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        pytest.param({"spec": {"parallelism": 0}}, "JobChanged", id="parallelism 0"),
        pytest.param({"spec": {"suspend": True}}, "JobChanged", id="suspended"),
        pytest.param(
            {
                "metadata": {
                    "labels": dict.fromkeys(
                        f"qlora.dev/{key}" for key in ("job-name", "job-uid", "attempt", "role")
                    )
                }
            },
            "JobDeleted",
            id="no labels",
        ),
        pytest.param({"metadata": {"labels": {"qlora.dev/job-uid": None}}}, "JobDeleted", id="no uid"),
        pytest.param({"metadata": {"labels": {"qlora.dev/attempt": None}}}, "JobDeleted", id="no attempt"),
    ],
)
def test_a_batch_job_that_somebody_edited_is_restarted(
    patch: Any,
    reason: str,
    operator: Any,
    make_job: Callable[..., Any],
    client: Client,
    witness: Witness,
    terminations: None,
) -> None:
    """The attempt's Job is edited so that it cannot go on, or not be found: the gang starts over."""
    job = make_job()
    job.run()
    client.patch(path_of(job, "jobs/job-a0"), patch)
    starts_over(job, witness, reason)


def test_a_batch_job_without_its_name_label_is_still_the_job_s(
    operator: Any, make_job: Callable[..., Any], client: Client
) -> None:
    """A Job that has lost a label which nobody needs is still the job's."""
    job = make_job()
    pods = job.run()
    client.patch(path_of(job, "jobs/job-a0"), {"metadata": {"labels": {"qlora.dev/job-name": None}}})
    job.succeed(pods)
    assert job.status["restarts"] == {"user": 0, "infrastructure": 0}


def test_a_deleted_service_or_policy_comes_back_and_the_gang_does_not_notice(
    new_operator: Callable[..., Any], namespace: str, make_job: Callable[..., Any], client: Client
) -> None:
    """A Service or NetworkPolicy that is deleted comes back with the next sweep; the gang does not notice."""
    new_operator("--namespace", namespace, sweepSeconds=1).start()
    job = make_job()
    pods = job.run()
    children = ["services/job-ranks", "networkpolicies/job-ranks"]
    before = {child: client.get(path_of(job, child))["metadata"]["uid"] for child in children}
    for child in children:
        client.delete(path_of(job, child))
    wait_for(lambda: len(job.children("services", "networkpolicies")) == 2)
    after = {child: client.get(path_of(job, child))["metadata"]["uid"] for child in children}
    assert not before.items() & after.items()
    job.succeed(pods)
    assert job.status["attempt"] == 0


# --- somebody else's


def foreign(kind: str) -> tuple[str, Any]:
    """Plural and body of an object that has nothing to do with the job, but for its name."""
    if kind == "Service":
        return "services/job-ranks", {"spec": {"ports": [{"port": 80}]}}
    if kind == "NetworkPolicy":
        return "networkpolicies/job-ranks", {"spec": {"podSelector": {}}}
    container = {"name": "main", "image": "registry.example/other:1"}
    template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    return "jobs/job-a0", {"spec": {"suspend": True, "template": template}}


@pytest.mark.parametrize("kind", ["Service", "NetworkPolicy", "Job"])
@pytest.mark.parametrize("labelled", [False, True], ids=["plain", "with our labels"])
def test_an_object_in_the_way_of_a_child_is_left_alone_and_named(
    kind: str, labelled: bool, operator: Any, make_job: Callable[..., Any], namespace: str, client: Client
) -> None:
    """Somebody else's object of a child's name is left alone and named; without it the job goes on."""
    child, body = foreign(kind)
    plural, _, name = child.partition("/")
    labels = {"qlora.dev/job-name": "job", "qlora.dev/job-uid": "another", "qlora.dev/attempt": "0"}
    body["metadata"] = {"name": name, "labels": labels if labelled else {}}
    there = client.post(path_of(type("", (), {"namespace": namespace}), plural), body)
    job = make_job()
    status = job.until(lambda status: "that is not this job's" in status.get("message", ""))
    assert f"a {kind} named {name} is there" in status["message"]
    assert job.condition("Initialized")["reason"] == "NameConflict"
    job.until_event("NameConflict")
    still = client.get(path_of(job, child))
    assert still["metadata"]["uid"] == there["metadata"]["uid"]
    assert still["spec"] == there["spec"] or kind == "Job"
    client.delete(path_of(job, child), {"propagationPolicy": "Background"})
    job.run()
    assert [event["reason"] for event in job.events()].count("NameConflict") == 1


# --- the job itself


@POLICIES
@pytest.mark.parametrize("up", [True, False], ids=["operator up", "operator down"])
def test_the_children_go_with_the_job_unless_they_are_orphaned(
    policy: str,
    up: bool,
    new_operator: Callable[..., Any],
    namespace: str,
    make_job: Callable[..., Any],
    client: Client,
    witness: Witness,
    terminations: None,
) -> None:
    """With the job its children go, unless they are to be orphaned; none is made again."""
    operator = new_operator("--namespace", namespace, sweepSeconds=1)
    operator.start()
    job = make_job()
    pods = job.run()
    children = job.children()
    if not up:
        operator.kill()
    job.delete(policy)
    wait_for(lambda: gone(client, job.path), 60)
    if policy != "Orphan":
        wait_for(lambda: not job.children(), 60, or_else="the end of the children")
    if not up:
        operator.start()
    sweeps(operator)
    assert job.children() == (children if policy == "Orphan" else [])
    if policy == "Orphan":
        assert [
            client.get(path_of(job, f"pods/{pod['metadata']['name']}"))["metadata"]["uid"] for pod in pods
        ] == [pod["metadata"]["uid"] for pod in pods]
    witness.look()
    assert witness.faults == []
    assert [len(jobs) for jobs in witness.jobs.values()] == [1]


def sweeps(operator: Any) -> None:
    """Another look at everything begins and ends."""
    name = "qlora_last_successful_sweep_timestamp_seconds"

    def last() -> str:
        return next(line for line in operator.get("/metrics")[1].splitlines() if line.startswith(name))

    seen = last()
    wait_for(lambda: last() != seen)
    seen = last()
    wait_for(lambda: last() != seen)


def test_a_job_of_the_same_name_again_is_another_job(
    operator: Any, make_job: Callable[..., Any], client: Client, witness: Witness, terminations: None
) -> None:
    """A job that is deleted and created again at once is another job, whose gang waits for nobody's pods."""
    first = make_job()
    first.run()
    uid = first.get()["metadata"]["uid"]
    first.delete("Background")
    wait_for(lambda: gone(client, first.path))
    second = make_job()
    wait_for(
        lambda: [gang for gang in second.gangs() if gang["metadata"]["labels"]["qlora.dev/job-uid"] != uid],
        60,
    )
    second.run()
    assert second.status["restarts"] == {"user": 0, "infrastructure": 0}


# --- permissions


@pytest.fixture
def role(client: Client, namespace: str, account: Path) -> Any:
    """What the operator needs in one namespace alone: its ClusterRole without what no namespace has."""
    rules = operator_role()["rules"]
    cluster_wide = {"nodes", "customresourcedefinitions"}
    rules = [rule for rule in rules if not cluster_wide & set(rule["resources"])]
    rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
    client.post(f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": "operator"}})
    client.post(f"{rbac}/roles", {"metadata": {"name": "operator"}, "rules": rules})
    subject = {"kind": "ServiceAccount", "name": "operator", "namespace": namespace}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "operator"}
    binding = {"metadata": {"name": "operator"}, "roleRef": reference, "subjects": [subject]}
    client.post(f"{rbac}/rolebindings", binding)

    def change(verb: str, resource: str) -> None:
        """Take a verb away; none: give all back."""
        lesser = copy.deepcopy(rules)
        for rule in lesser:
            if resource in rule["resources"]:
                rule["verbs"].remove(verb)
        client.patch(f"{rbac}/roles/operator", {"rules": [rule for rule in lesser if rule["verbs"]]})

    return change


@pytest.fixture
def restricted(
    role: Any, new_operator: Callable[..., Any], namespace: str, control_plane: ControlPlane, proxy: Any
) -> Any:
    """An operator that may do things in the test's namespace alone; behind the proxy, not started."""
    operator = new_operator("--namespace", namespace)
    operator.kubeconfig = proxy.kubeconfig(control_plane.kubeconfig_for("operator", namespace))
    return operator


def test_with_a_role_the_operator_keeps_to_its_namespace(
    restricted: Any, proxy: Any, make_job: Callable[..., Any], client: Client, namespace: str
) -> None:
    """With a Role the operator asks about nothing beyond its namespace but the nodes, and does without them."""
    restricted.start()
    job = make_job()
    job.succeed(job.run())
    beyond = {(call.verb, call.resource) for call in proxy.calls if call.resource and not call.namespace}
    assert beyond == {("list", "nodes")}
    assert {call.namespace for call in proxy.calls} == {"", namespace}
    template = client.get(path_of(job, "jobs/job-a0"))["spec"]["template"]["spec"]
    terms = template["affinity"]["nodeAffinity"][AFFINITY]["nodeSelectorTerms"]
    assert "cpu-cpuid.AMXBF16" in str(terms)


@pytest.mark.parametrize(
    ("verb", "resource"),
    [("create", "jobs"), ("list", "pods"), ("update", "qlorajobs/status")],
    ids=lambda value: value,
)
def test_a_job_waits_while_the_operator_lacks_a_permission(
    verb: str, resource: str, restricted: Any, role: Any, proxy: Any, make_job: Callable[..., Any]
) -> None:
    """Without one of its permissions a job waits; it goes on when the operator has it again."""
    restricted.start()
    role(verb, resource)

    def tries() -> int:
        return sum((call.verb, call.resource) == (verb, resource) for call in proxy.calls)

    before, job = tries(), make_job()
    pods = job.pods(0) if resource == "pods" else []
    for pod in pods:
        job.kubelet.running(pod)
    wait_for(lambda: tries() > before + 1)
    if verb == "create":
        status = job.until(lambda status: "forbidden" in status.get("message", ""))
        assert job.condition("Initialized")["reason"] == "Refused", status
    assert job.status.get("phase") != "Running"
    role("", "")
    if pods:
        job.until_phase("Running")
    else:
        job.run()


# --- objects of another version


def test_a_job_that_a_newer_crd_let_in_is_an_invalid_spec(
    new_operator: Callable[..., Any], namespace: str, make_job: Callable[..., Any], client: Client, crd: None
) -> None:
    """A value that only a newer release has is InvalidSpec, with what would be right. A field that only a newer one
    has is ignored, with a warning. Other jobs continue."""
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/qlorajobs.qlora.dev"
    original = client.get(path)["spec"]
    newer = copy.deepcopy(original)
    training = newer["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"][
        "training"
    ]
    training["properties"]["schedule"]["enum"].append("polynomial")
    training["properties"]["flavour"] = {"type": "string"}
    operator = new_operator("--namespace", namespace, sweepSeconds=1)
    try:
        client.patch(path, {"spec": newer})
        value = wait_for(lambda: created(make_job, "value", schedule="polynomial", flavour="mint"))
        field = make_job("field", training={"flavour": "mint"})
        operator.start()
        said = value.until(lambda status: status.get("message"))["message"]
        assert "spec.training.schedule is the string 'polynomial'; it must be one of" in said
        assert value.condition("Initialized")["reason"] == "InvalidSpec"
        field.run()
        assert (
            "fields that this release does not know are ignored: spec.training.flavour"
            in operator.log.read_text()
        )
        make_job("good").run()
    finally:
        client.patch(path, {"spec": original})
    assert value.status["phase"] == "Pending"
    assert operator.process.poll() is None


def created(make_job: Callable[..., Any], name: str, **training: Any) -> Any:
    """The job; None while the API server does not yet go by the new CRD."""
    try:
        job = make_job(name, training=training)
    except ApiError:
        return None
    if job.get()["spec"]["training"].get("flavour"):
        return job
    job.delete()
    return None
