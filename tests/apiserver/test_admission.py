"""The chart's admission policies on a real API server, with users' own tokens.

What the policies refuse is also compared with what the operator refuses, whose settings the chart makes from the same
values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from builders import OMIT, changed, job_manifest, merged
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.desired.admission import policy_violation
from qlora_operator.desired.attempt_job import attempt_job
from qlora_operator.settings import Settings
from testcluster.chart import find, render
from testcluster.client import ApiError, Client
from testcluster.cluster import Cluster
from testcluster.fixtures import fresh_namespace
from testcluster.waiting import wait_for

pytestmark = pytest.mark.cluster

Object = dict[str, Any]
JOBS = "/apis/qlora.dev/v1alpha1/namespaces/{}/qlorajobs"
RBAC = "/apis/rbac.authorization.k8s.io/v1/namespaces/{}"
POLICIES = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies"
DRY = "?dryRun=All"
GUARDS = {"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}
INJECTION = '*"] || true || ["*'
VALUES: Object = {
    "crds": {"enabled": False},
    "jobs": {
        "image": {"repository": "registry.example/trainer", "tag": "1.0"},
        "allowedImages": ["registry.example/team/*", f"x{INJECTION}", "a.b/c:*-cpu"],
        "allowedSources": [
            "pvc://*",
            "hf://our.org/*",
            "hf://datasets/our.org/*",
            "s3://shared/models/*",
            "s3://*-public/*",
            "hf://[a-z]+/(x|y)",
            f"s3://x{INJECTION}",
            "s3://back\\*slash",
            "https://data.example/*",
            "oci://registry.example/team/*",
        ],
        "allowedTracking": ["http://mlflow:5000", "http://mine:5000"],
        "limits": {"pods": 4, "ranks": 8, "cpus": 16, "memory": "64Gi"},
        "defaults": {"priorityClassName": "batch", "queueName": "team"},
        "allowed": {
            "priorityClasses": ["batch-*"],
            "queues": ["team-*"],
            "nodeLabels": ["topology.kubernetes.io/*"],
            "tolerations": ["example.org/*"],
            "workspaces": ["pvc://work/*", "pvc://anything*"],
        },
    },
}
HUB_MODEL = {"source": "hf://our.org/model", "credentialsSecret": "hub"}


def job(name: str = "job", **fields: Any) -> Object:
    """A QLoRAJob with these fields of spec, each in place of what it has itself."""
    made = job_manifest(
        name,
        workspace="pvc://work/here",
        model={"source": "pvc://data/model"},
        dataset={"source": "pvc://data/docs.jsonl"},
        topology={"cpusPerRank": OMIT},
    )
    return {**made, "spec": {**made["spec"], **fields}}


def may(group: str, resource: str, verbs: list[str], *names: str) -> Object:
    """A rule of a role."""
    rule = {"apiGroups": [group], "resources": [resource], "verbs": verbs}
    return {**rule, "resourceNames": list(names)} if names else rule


WRITE_JOBS = may("qlora.dev", "qlorajobs", ["create", "get", "list", "patch", "update", "delete"])
READ_DATA = may("", "persistentvolumeclaims", ["get"], "data", "work")
WRITE_WORK = may("", "persistentvolumeclaims", ["update"], "work")
READ_HUB = may("", "secrets", ["get"], "hub")
USERS = {
    "owner": [WRITE_JOBS, READ_DATA, WRITE_WORK, READ_HUB],
    "reader": [WRITE_JOBS, READ_DATA, READ_HUB],
    "without-secrets": [WRITE_JOBS, READ_DATA, WRITE_WORK],
    "only-jobs": [WRITE_JOBS],
    "every-claim": [
        WRITE_JOBS,
        may("", "persistentvolumeclaims", ["get", "update"]),
        may("", "secrets", ["list"]),
    ],
}


def make_user(cluster: Cluster, namespace: str, name: str, rules: list[Object]) -> Client:
    """A service account that may do this in the namespace, and its requests."""
    cluster.client.post(f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": name}})
    cluster.client.post(f"{RBAC.format(namespace)}/roles", {"metadata": {"name": name}, "rules": rules})
    binding = {
        "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
    }
    cluster.client.post(f"{RBAC.format(namespace)}/rolebindings", binding)
    return Client(cluster.kubeconfig_for(name, namespace))


@dataclass(frozen=True)
class Guarded:
    """A namespace in which the policies hold."""

    namespace: str
    objects: list[Object]
    """Of the release."""
    admin: Client
    users: dict[str, Client]

    @property
    def jobs(self) -> str:
        """Path of its jobs."""
        return JOBS.format(self.namespace)

    @property
    def settings(self) -> Settings:
        """The operator's, which the chart makes from the same values."""
        text = find(self.objects, "ConfigMap")["data"]["settings.yaml"]
        return Settings.model_validate(yaml.safe_load(text))

    def refused(self, body: Object, user: str = "admin") -> ApiError | None:
        """Why a user may not create this; None when he may. Nothing is created."""
        client = self.admin if user == "admin" else self.users[user]
        try:
            client.post(f"{self.jobs}{DRY}", body)
        except ApiError as error:
            return error
        return None


@pytest.fixture(scope="module")
def guarded(api_cluster: Cluster, crd: None) -> Iterator[Guarded]:
    """A namespace with the policies of a release for it, and users with different rights."""
    with guarding(api_cluster, "guarded", VALUES) as made:
        made.users.update(
            {name: make_user(api_cluster, made.namespace, name, rules) for name, rules in USERS.items()}
        )
        wait_for(lambda: made.refused(job(), "only-jobs"), or_else="the policy about the user's rights")
        wait_for(lambda: not made.refused(job(model=HUB_MODEL), "owner"), or_else="the users' roles")
        yield made
        for client in made.users.values():
            client.close()


@contextmanager
def guarding(cluster: Cluster, release: str, values: Object) -> Iterator[Guarded]:
    """A namespace with the policies of a release for it, and nobody but the administrator."""
    with fresh_namespace(cluster, release) as namespace:
        objects = render({**values, "namespaces": [namespace]}, release=release, namespace=namespace)
        guards = yaml.safe_dump_all([each for each in objects if each["kind"] in GUARDS])
        cluster.kubectl("apply", "--server-side", "-f", "-", input=guards)
        made = Guarded(namespace, objects, cluster.client, {})
        wait_for(lambda: made.refused(job(image="other")), or_else="the policy about what is allowed")
        yield made
        cluster.kubectl("delete", "--wait=false", "-f", "-", input=guards)


# --- the user's own rights

OUTPUT = {"destination": "s3://shared/models/out", "credentialsSecret": "hub"}
RIGHTS: dict[str, tuple[str, Object, str | None]] = {
    "owner": ("owner", {}, None),
    "owner, with the Secret": ("owner", {"model": HUB_MODEL, "output": OUTPUT}, None),
    "another Secret": (
        "owner",
        {"model": {**HUB_MODEL, "credentialsSecret": "other"}},
        "spec.model.credentialsSecret other: .*:owner may not get this Secret in namespace .*; ask for that",
    ),
    "no Secret for the dataset": (
        "without-secrets",
        {"dataset": {"source": "hf://datasets/our.org/d", "credentialsSecret": "hub"}},
        "spec.dataset.credentialsSecret hub: .*:without-secrets may not get this Secret",
    ),
    "no Secret for the output": (
        "without-secrets",
        {"output": OUTPUT},
        "spec.output.credentialsSecret hub: .*:without-secrets may not get this Secret",
    ),
    "no Secret needed": ("without-secrets", {"model": {"source": "hf://our.org/model"}}, None),
    "to list Secrets is not to get them": (
        "every-claim",
        {"model": HUB_MODEL},
        "spec.model.credentialsSecret hub: .*:every-claim may not get this Secret",
    ),
    "nothing but jobs": (
        "only-jobs",
        {},
        "spec.workspace pvc://work/here: .*:only-jobs may not update the claim work .*; ask for that",
    ),
    "a workspace that may only be read": (
        "reader",
        {},
        "spec.workspace pvc://work/here: .*:reader may not update the claim work",
    ),
    "a model's claim": (
        "owner",
        {"model": {"source": "pvc://secret-models/m"}},
        "spec.model.source pvc://secret-models/m: .*:owner may not get the claim secret-models",
    ),
    "a dataset's claim, all of it": (
        "owner",
        {"dataset": {"source": "pvc://payroll"}},
        "spec.dataset.source pvc://payroll: .*:owner may not get the claim payroll",
    ),
    "a claim whose name begins like another's": (
        "owner",
        {"dataset": {"source": "pvc://data.v2/docs"}},
        "may not get the claim data.v2",
    ),
    "a path that looks like a claim": ("owner", {"dataset": {"source": "pvc://data/payroll/x"}}, None),
    "one of several sources": (
        "owner",
        {"dataset": {"sources": [{"source": "pvc://data/a"}, {"source": "pvc://payroll"}]}},
        "spec.dataset.sources names a claim that you may not get",
    ),
    "the Secret of one of several sources": (
        "without-secrets",
        {"dataset": {"sources": [{"source": "hf://datasets/our.org/d", "credentialsSecret": "hub"}]}},
        "spec.dataset.sources names a Secret that you may not get",
    ),
    "several sources": (
        "owner",
        {"dataset": {"sources": [{"source": "pvc://data/a"}, {"source": "hf://datasets/our.org/d"}]}},
        None,
    ),
    "an adapter to start from": ("owner", {"adapter": {"initialAdapter": "pvc://data/jobs/a/adapter"}}, None),
    "another team's adapter": (
        "owner",
        {"adapter": {"initialAdapter": "pvc://payroll/jobs/a/adapter"}},
        "spec.adapter.initialAdapter names a claim that you may not get",
    ),
    "an adapter of the Hub to start from": (
        "owner",
        {"adapter": {"initialAdapter": "hf://our.org/a", "initialAdapterCredentialsSecret": "hub"}},
        None,
    ),
    "the Secret of an adapter to start from": (
        "without-secrets",
        {"adapter": {"initialAdapter": "hf://our.org/a", "initialAdapterCredentialsSecret": "hub"}},
        "spec.adapter.initialAdapterCredentialsSecret names a Secret that you may not get",
    ),
    "every claim": ("every-claim", {"workspace": "pvc://anything"}, None),
}


@pytest.mark.parametrize(("user", "fields", "said"), RIGHTS.values(), ids=RIGHTS)
def test_who_creates_a_job_needs_the_rights_to_what_it_names(
    guarded: Guarded, user: str, fields: Object, said: str | None
) -> None:
    """Who creates a job may himself get its Secrets and claims, and update the claim of its workspace."""
    error = guarded.refused(job(**fields), user)

    if said is None:
        assert error is None
    else:
        assert error is not None
        assert error.code == 403
        with pytest.raises(ApiError, match=said):
            raise error


MLFLOW = {"uri": "http://mlflow:5000", "credentialsSecret": "hub"}


def test_a_tracking_servers_secret_is_looked_at_whenever_it_goes_elsewhere(guarded: Guarded) -> None:
    """Tracking may change: who adds a Secret to it, or sends it to another server, must be allowed to get it."""
    said = "spec.tracking.mlflow.credentialsSecret hub: .*:only-jobs may not get this Secret"
    guarded.users["owner"].post(guarded.jobs, job("plain"))
    guarded.users["owner"].post(guarded.jobs, job("tracked", tracking={"mlflow": MLFLOW}))
    stranger = guarded.users["only-jobs"]

    with pytest.raises(ApiError, match=said):
        stranger.patch(f"{guarded.jobs}/plain", {"spec": {"tracking": {"mlflow": MLFLOW}}})
    with pytest.raises(ApiError, match=said):
        stranger.patch(
            f"{guarded.jobs}/tracked", {"spec": {"tracking": {"mlflow": {"uri": "http://mine:5000"}}}}
        )
    stranger.patch(f"{guarded.jobs}/tracked", {"spec": {"tracking": {"mlflow": {"experiment": "other"}}}})
    stranger.patch(f"{guarded.jobs}/tracked", {"spec": {"tracking": {"mlflow": {"credentialsSecret": None}}}})
    guarded.users["owner"].patch(f"{guarded.jobs}/plain", {"spec": {"tracking": {"mlflow": MLFLOW}}})


def test_applying_is_creating(guarded: Guarded) -> None:
    """A job that comes to be by a server-side apply is looked at like any other."""
    applied = f"{guarded.jobs}/applied{DRY}&fieldManager=test"
    guarded.users["owner"].patch(applied, job("applied"), "application/apply-patch+yaml")

    with pytest.raises(ApiError, match="may not update the claim work"):
        guarded.users["only-jobs"].patch(applied, job("applied"), "application/apply-patch+yaml")


def test_another_user_may_hold_a_job(guarded: Guarded) -> None:
    """Only creation asks for the rights: who may patch jobs may suspend one whose Secret he may not get."""
    source = {"source": "hf://datasets/our.org/d", "credentialsSecret": "hub"}
    named = {
        "one": {"model": HUB_MODEL},
        "several": {"dataset": {"sources": [source, {"source": "pvc://data/a"}]}},
        "continued": {"adapter": {"initialAdapter": "pvc://data/jobs/a/adapter"}},
    }
    for name, fields in named.items():
        guarded.users["owner"].post(guarded.jobs, job(name, **fields))
        patched = guarded.users["only-jobs"].patch(f"{guarded.jobs}/{name}", {"spec": {"suspend": True}})

        assert patched["spec"]["suspend"]


def test_what_was_looked_at_stays(guarded: Guarded) -> None:
    """No update brings in a Secret or a claim that nobody looked at."""
    guarded.users["owner"].post(guarded.jobs, job("fixed"))
    changes = [
        {"model": {"source": "hf://our.org/model", "credentialsSecret": "other"}},
        {"dataset": {"source": "pvc://payroll/x"}},
        {"workspace": "pvc://payroll"},
        {"output": {"destination": "s3://shared/models/x", "credentialsSecret": "other"}},
        {"image": "registry.example/team/other"},
    ]
    for change in changes:
        with pytest.raises(ApiError, match="is immutable"):
            guarded.users["owner"].patch(f"{guarded.jobs}/fixed", {"spec": change})


# --- what the administrator allows


def sources(uri: str) -> Object:
    """The field that holds a source."""
    part = "dataset" if uri.startswith("hf://datasets/") else "model"
    return {part: {"source": uri}}


ASKED: dict[str, Object] = {
    "image: default": {},
    "image: default, named": {"image": "registry.example/trainer:1.0"},
    "image: another tag": {"image": "registry.example/trainer:1.0.1"},
    "image: the dot is a dot": {"image": "registry.example/trainer:1x0"},
    "image: a team's": {"image": "registry.example/team/mine@sha256:0"},
    "image: a team's prefix": {"image": "evil/registry.example/team/mine"},
    "image: ends as it must": {"image": "a.b/c:1-cpu"},
    "image: more than the pattern": {"image": "a.b/c:1-cpu2"},
    **{
        f"source: {uri}": sources(uri)
        for uri in (
            "pvc://data/x",
            "hf://our.org/model",
            "hf://ourxorg/model",
            "hf://our.org.evil/model",
            "hf://datasets/our.org/d",
            "hf://datasets/other/d",
            "s3://shared/models/m",
            "s3://shared/models",
            "s3://shared/other",
            "s3://a-public/m",
            "s3://a-publicx/m",
            "hf://b/x",
            'hf://datasets/our.org/d/"] || true || ["',
            "s3://backslash/x",
        )
    },
    "source: of the web": {"dataset": {"source": "https://data.example/d.jsonl"}},
    "source: of the web, not named": {"dataset": {"source": "https://other.example/d.jsonl"}},
    "sources: allowed": {
        "dataset": {"sources": [{"source": "pvc://data/a"}, {"source": "s3://shared/models/m"}]}
    },
    "sources: one is not": {"dataset": {"sources": [{"source": "pvc://data/a"}, {"source": "s3://other/m"}]}},
    "sources: of the web": {"dataset": {"sources": [{"source": "https://other.example/d.jsonl"}]}},
    "destination: allowed": {"output": {"destination": "s3://shared/models/out"}},
    "destination: a registry": {"output": {"destination": "oci://registry.example/team/a:v1"}},
    "destination: a registry, not named": {"output": {"destination": "oci://registry.example/other/a:v1"}},
    "destination: another": {"output": {"destination": "hf://other/out"}},
    "pods: the most": {"topology": {"pods": 4, "cpusPerRank": 1, "memoryPerRank": "1Gi"}},
    "pods: one more": {"topology": {"pods": 5, "cpusPerRank": 1, "memoryPerRank": "1Gi"}},
    "ranks: the most": {"topology": {"pods": 4, "ranksPerPod": 2, "cpusPerRank": 1, "memoryPerRank": "1Gi"}},
    "ranks: one more": {"topology": {"pods": 3, "ranksPerPod": 3, "cpusPerRank": 1, "memoryPerRank": "1Gi"}},
    "ranks: settled by the launchers": {
        "topology": {"pods": 4, "ranksPerPod": "auto", "cpusPerRank": 4, "memoryPerRank": "16Gi"}
    },
    "cpus: the most": {"topology": {"ranksPerPod": 4, "cpusPerRank": 4, "memoryPerRank": "1Gi"}},
    "cpus: one more": {"topology": {"cpusPerRank": 17, "memoryPerRank": "1Gi"}},
    "memory: the most": {"topology": {"pods": 2, "memoryPerRank": "32Gi"}},
    "memory: one byte more": {"topology": {"memoryPerRank": "68719476737"}},
    "memory: in powers of 1000": {"topology": {"memoryPerRank": "68.7G"}},
    "workspace: another claim": {"workspace": "pvc://payroll/x"},
    "queue: the default": {"scheduling": {"queueName": "team"}},
    "queue: an allowed one": {"scheduling": {"queueName": "team-a"}},
    "queue: another": {"scheduling": {"queueName": "others"}},
    "class: the default": {"scheduling": {"priorityClassName": "batch"}},
    "class: another": {"scheduling": {"priorityClassName": "urgent"}},
    "node label: allowed": {"scheduling": {"nodeSelector": {"topology.kubernetes.io/zone": "a"}}},
    "node label: another": {"scheduling": {"nodeSelector": {"pool": "gold"}}},
    "toleration: allowed": {"scheduling": {"tolerations": [{"key": "example.org/x", "operator": "Exists"}]}},
    "toleration: another": {"scheduling": {"tolerations": [{"key": "cp", "operator": "Exists"}]}},
    "toleration: every taint": {"scheduling": {"tolerations": [{"operator": "Exists"}]}},
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_the_operator_agrees(guarded: Guarded, asked: Object) -> None:
    """The policy refuses what the operator would let wait, naming the same field, and nothing else."""
    agree(guarded, asked)


def agree(guarded: Guarded, asked: Object) -> bool:
    """That policy and operator say the same of a job with these fields; whether they refuse it."""
    body = job(**asked)
    error = guarded.refused(body)
    second = policy_violation(QLoRAJob.model_validate(body), guarded.settings)

    assert (error is None) == (second is None), (error, second)
    if error is not None and second is not None:
        assert error.code == 422
        assert second[1].split()[0].partition("[")[0] in error.message  # CEL does not know which of a list
    return error is not None


PINNING: Object = {
    "image": {"repository": "registry.example/operator", "digest": f"sha256:{'1' * 64}"},
    "jobs": {
        "image": {"repository": "registry.example/trainer", "digest": f"sha256:{'2' * 64}"},
        "allowedImages": ["a.b/*"],
        "requireDigests": True,
    },
}
COMMIT = "c0ffee" * 6 + "c0ff"
PINNED: dict[str, tuple[Object, bool]] = {
    "the default image": ({}, False),
    "an image's tag": ({"image": "a.b/c:1"}, True),
    "an image's digest": ({"image": f"a.b/c@sha256:{'0' * 64}"}, False),
    "a short digest": ({"image": "a.b/c@sha256:0"}, True),
    "a model's branch": ({"model": {"source": "hf://org/model"}}, True),
    "a model's commit": ({"model": {"source": "hf://org/model", "revision": COMMIT}}, False),
    "the beginning of a commit": ({"model": {"source": "hf://org/model", "revision": COMMIT[:12]}}, True),
    "a dataset's tag": ({"dataset": {"source": "hf://datasets/org/d", "revision": "v1"}}, True),
    "an adapter's branch": ({"adapter": {"initialAdapter": "hf://org/adapter"}}, True),
    "an adapter's commit": (
        {"adapter": {"initialAdapter": "hf://org/adapter", "initialAdapterRevision": COMMIT}},
        False,
    ),
    "one of several": (
        {"dataset": {"sources": [{"source": "pvc://data/a"}, {"source": "hf://datasets/org/d"}]}},
        True,
    ),
    "all of several": (
        {
            "dataset": {
                "sources": [{"source": "pvc://data/a"}, {"source": "hf://datasets/o/d", "revision": COMMIT}]
            }
        },
        False,
    ),
}


def test_digests_and_commits_can_be_demanded(api_cluster: Cluster, crd: None) -> None:
    """Where the administrator demands them, a job that names what may become something else is refused at once."""
    with guarding(api_cluster, "pinned", PINNING) as pinned:
        assert {name: agree(pinned, asked) for name, (asked, _) in PINNED.items()} == {
            name: refused for name, (_, refused) in PINNED.items()
        }
        error = pinned.refused(job(image="a.b/c:1"))
        assert error is not None
        assert "spec.image a.b/c:1 has no digest, which is demanded here: name it as" in error.message


SAID: dict[str, tuple[Object, str]] = {
    "image": (
        {"image": "other:1"},
        "is not allowed here; leave it out, or name one of these: registry.example/trainer:1.0, registry",
    ),
    "source": (
        {"model": {"source": "hf://other/model"}},
        "spec.model.source hf://other/model is not allowed here; allowed: pvc://*, hf://our.org/*, ",
    ),
    "destination": (
        {"output": {"destination": "hf://other/out"}},
        "spec.output.destination hf://other/out is not allowed here; allowed: pvc://*, ",
    ),
    "pods": (
        {"topology": {"pods": 8, "memoryPerRank": "1Gi"}},
        "spec.topology asks for 8 pods, and a job may have 4",
    ),
    "ranks": (
        {"topology": {"ranksPerPod": 9, "cpusPerRank": 1, "memoryPerRank": "1Gi"}},
        "spec.topology asks for 9 ranks in all, and a job may have 8",
    ),
    "CPUs": (
        {"topology": {"pods": 2, "cpusPerRank": 9, "memoryPerRank": "1Gi"}},
        "spec.topology asks for 18 CPUs in all, and a job may have 16",
    ),
    "memory": (
        {"topology": {"pods": 2, "memoryPerRank": "33Gi"}},
        "spec.topology asks for 2 ranks of 33Gi each, and a job may have 64Gi in all",
    ),
    "priority": (
        {"scheduling": {"priorityClassName": "system-node-critical"}},
        "spec.scheduling.priorityClassName is one of the cluster's own; leave it out, or name another",
    ),
}


@pytest.mark.parametrize(("asked", "said"), SAID.values(), ids=SAID)
def test_a_refusal_says_the_field_its_value_and_what_would_be_right(
    guarded: Guarded, asked: Object, said: str
) -> None:
    """A refusal says the field, its value, and what would be right."""
    error = guarded.refused(job(**asked))

    assert error is not None
    assert said in error.message


TOO_LARGE = {"topology": {"pods": 5}}


def test_a_change_is_looked_at(guarded: Guarded) -> None:
    """A suspended job does not grow beyond the limits, nor into the cluster's own priority."""
    guarded.admin.post(guarded.jobs, job("grows", suspend=True))
    path = f"{guarded.jobs}/grows"

    with pytest.raises(ApiError, match="asks for 5 pods, and a job may have 4"):
        guarded.admin.patch(path, {"spec": TOO_LARGE})
    with pytest.raises(ApiError, match="one of the cluster's own"):
        guarded.admin.patch(path, {"spec": {"scheduling": {"priorityClassName": "system-cluster-critical"}}})
    guarded.admin.patch(path, {"spec": {"topology": {"pods": 3}}})


def test_an_older_job_can_be_handled(
    api_cluster: Cluster, guarded: Guarded, request: pytest.FixtureRequest
) -> None:
    """A job that is larger than a limit made after it can be labelled, suspended, finalised and deleted."""
    with fresh_namespace(api_cluster, request.node.name) as namespace:
        path = JOBS.format(namespace)
        old = job("old", topology={"pods": 9, "memoryPerRank": "1Gi"}, image="older/image")
        old["metadata"]["finalizers"] = ["example.org/held"]
        guarded.admin.post(path, old)
        adopt(api_cluster, guarded, namespace)
        wait_for(lambda: refuses(guarded.admin, path), or_else="the policy in the other namespace")

        one = f"{path}/old"
        guarded.admin.patch(one, {"metadata": {"labels": {"seen": "yes"}}})
        guarded.admin.patch(one, {"spec": {"suspend": True, "backoffLimit": 1}})
        guarded.admin.patch(f"{one}/status", {"status": {"message": "told"}})
        guarded.admin.delete(one)
        guarded.admin.patch(one, {"metadata": {"finalizers": None}})
        wait_for(lambda: not guarded.admin.items(path))


def refuses(client: Client, path: str) -> bool:
    """Whether the limits hold there."""
    try:
        client.post(f"{path}{DRY}", job(image="other"))
    except ApiError as error:
        return error.code == 422
    return False


def adopt(cluster: Cluster, guarded: Guarded, namespace: str) -> None:
    """The release serves one more namespace from now on."""
    values = {**VALUES, "namespaces": [guarded.namespace, namespace]}
    objects = render(values, release="guarded", namespace=guarded.namespace)
    bindings = [each for each in objects if each["kind"] == "ValidatingAdmissionPolicyBinding"]
    cluster.kubectl("apply", "--server-side", "-f", "-", input=yaml.safe_dump_all(bindings))


# --- the policies themselves


def test_other_namespaces_are_left_alone(guarded: Guarded, namespace: str) -> None:
    """The policies of a release for some namespaces hold in those."""
    guarded.admin.post(
        f"{JOBS.format(namespace)}{DRY}", job(image="other", topology={"pods": 9, "memoryPerRank": "1Gi"})
    )


def test_a_release_for_all_holds_everywhere() -> None:
    """Without namespaces the policies are bound to no place, and any failure to look is a refusal."""
    objects = render({})
    policies = [each for each in objects if each["kind"] == "ValidatingAdmissionPolicy"]
    bindings = [each for each in objects if each["kind"] == "ValidatingAdmissionPolicyBinding"]

    assert {each["spec"]["failurePolicy"] for each in policies} == {"Fail"}
    assert [each["spec"]["validationActions"] for each in bindings] == [["Deny"]] * 3
    assert all("matchResources" not in each["spec"] for each in bindings)
    assert {each["spec"]["policyName"] for each in bindings} == {
        each["metadata"]["name"] for each in policies
    }


def test_two_releases_do_not_meet() -> None:
    """Releases of one name in two namespaces have no policy or binding in common."""
    first, second = (
        {each["metadata"]["name"] for each in render({}, namespace=where) if each["kind"] in GUARDS}
        for where in ("one", "two")
    )

    assert first
    assert not first & second


def test_the_switch_turns_the_policies_off() -> None:
    """admission.enabled=false makes none."""
    objects = render({"admission": {"enabled": False}})

    assert not [each for each in objects if each["kind"] in GUARDS]


def test_the_types_are_right(guarded: Guarded) -> None:
    """The API server's own check of the expressions against the definition of jobs finds nothing wrong."""
    mine = [
        each["metadata"]["name"] for each in guarded.objects if each["kind"] == "ValidatingAdmissionPolicy"
    ]
    for name in mine:
        status = wait_for(
            lambda name=name: (
                (found := guarded.admin.get(f"{POLICIES}/{name}")).get("status", {}).get("typeChecking")
                is not None
                and found["status"]
            ),
            or_else=f"the check of {name}",
        )
        assert status["typeChecking"].get("expressionWarnings", []) == []


# --- the operator's own account

OPERATOR = "guarded-qlora-operator"
FOREIGN_POD = {"spec": {"restartPolicy": "Never", "containers": [{"name": "main", "image": "other:1"}]}}
HOST_FILES = {"name": "tmp", "hostPath": {"path": "/"}}


TAKEN: dict[str, tuple[Object, str | None]] = {
    "an attempt's Job": ({}, None),
    "nobody's": ({"metadata.ownerReferences": OMIT}, "only Jobs of QLoRAJobs"),
    "with a token": ({"spec.template.spec.automountServiceAccountToken": True}, "have no token"),
    "another account's": ({"spec.template.spec.serviceAccountName": "admin"}, "no service account but"),
    "in the node's network": ({"spec.template.spec.hostNetwork": True}, "restricted"),
    "as root": ({"spec.template.spec.securityContext.runAsNonRoot": False}, "restricted"),
    "with the node's files": ({"spec.template.spec.volumes": [HOST_FILES]}, "nothing of the node"),
}


@pytest.fixture(scope="module")
def as_operator(api_cluster: Cluster, guarded: Guarded) -> Iterator[Client]:
    """Whoever has the operator's token."""
    client = make_user(api_cluster, guarded.namespace, OPERATOR, [may("batch", "jobs", ["create", "patch"])])
    path = f"/apis/batch/v1/namespaces/{guarded.namespace}/jobs{DRY}"

    def holds() -> bool:
        try:
            client.post(path, {"metadata": {"name": "other"}, "spec": {"template": FOREIGN_POD}})
        except ApiError as error:
            return "only Jobs of QLoRAJobs" in error.message
        return False

    wait_for(holds, or_else="the policy about the operator")
    yield client
    client.close()


@pytest.mark.parametrize(("change", "said"), TAKEN.values(), ids=TAKEN)
def test_the_operators_token_is_worth_no_more_than_its_jobs(
    guarded: Guarded, as_operator: Client, change: Object, said: str | None
) -> None:
    """Its account may create Jobs in every namespace; with a token that was stolen nobody gets onto a node."""
    made = QLoRAJob.model_validate(merged(job(), {"metadata": {"namespace": guarded.namespace}}))
    body = attempt_job(made, uid="u", attempt=0, isa="avx2", image="a:1", settings=guarded.settings)
    path = f"/apis/batch/v1/namespaces/{guarded.namespace}/jobs{DRY}"

    for container in body["spec"]["template"]["spec"]["containers"]:
        if "spec.template.spec.volumes" in change:  # what is mounted must be there
            container["volumeMounts"] = [{"name": "tmp", "mountPath": "/tmp"}]

    if said is None:
        as_operator.post(path, body)
        return
    with pytest.raises(ApiError, match=said):
        as_operator.post(path, changed(body, change))


def test_the_operators_token_changes_only_annotations_of_jobs(
    api_cluster: Cluster, guarded: Guarded, as_operator: Client
) -> None:
    """Whoever has it cannot let a Job out of its queue, or give it other pods."""
    spec = {"managedBy": "example.org/nobody"}  # the Job is collected without its owner
    wanted = merged(job(), {"metadata": {"name": "owner", "namespace": guarded.namespace}, "spec": spec})
    owner = api_cluster.client.post(
        f"/apis/qlora.dev/v1alpha1/namespaces/{guarded.namespace}/qlorajobs", wanted
    )
    body = attempt_job(
        QLoRAJob.model_validate(wanted),
        uid=owner["metadata"]["uid"],
        attempt=0,
        isa="avx2",
        image="a:1",
        settings=guarded.settings,
    )
    path = f"/apis/batch/v1/namespaces/{guarded.namespace}/jobs"
    as_operator.post(path, merged(body, {"spec": {"suspend": True}}))

    patched = as_operator.patch(f"{path}/owner-a0", {"metadata": {"annotations": {"a": "b"}}})
    assert patched["metadata"]["annotations"]["a"] == "b"
    with pytest.raises(ApiError, match="only annotations"):
        as_operator.patch(f"{path}/owner-a0", {"spec": {"suspend": False}})
