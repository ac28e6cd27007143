"""What a job's user, its pods and its Secrets cannot do to others, with the real API server and operator."""

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from builders import OMIT, ON_ONE_CLAIM, job_manifest
from testcluster.audit import granted, requests
from testcluster.chart import render
from testcluster.client import ApiError, Client
from testcluster.cluster import Cluster
from testcluster.control_plane import ControlPlane
from testcluster.fixtures import fresh_namespace
from testcluster.rank_zero import rank_zero
from testcluster.waiting import wait_for

pytestmark = pytest.mark.cluster

Object = dict[str, Any]
JOBS = "/apis/qlora.dev/v1alpha1/namespaces/{}/qlorajobs"
ROLES = "/apis/rbac.authorization.k8s.io/v1/namespaces/{}"
OPERATOR = "system:serviceaccount:qlora-system:qlora-operator"
TOKEN = "hf_plantedTokenThatNobodyMaySee"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


# --- a user who may create jobs, and nothing else


@pytest.fixture
def user(api_cluster: Cluster, crd: None, namespace: str) -> Iterator[Client]:
    """A service account whose only permission is to handle the jobs of the namespace."""
    name, client = "user", api_cluster.client
    rule = {
        "apiGroups": ["qlora.dev"],
        "resources": ["qlorajobs"],
        "verbs": ["create", "get", "list", "watch", "update", "patch", "delete"],
    }
    subject = {"kind": "ServiceAccount", "name": name, "namespace": namespace}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    client.post(f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": name}})
    client.post(f"{ROLES.format(namespace)}/roles", {"metadata": {"name": name}, "rules": [rule]})
    client.post(
        f"{ROLES.format(namespace)}/rolebindings",
        {"metadata": {"name": name}, "roleRef": role, "subjects": [subject]},
    )
    made = Client(api_cluster.kubeconfig_for(name, namespace))
    wait_for(lambda: allowed(made, JOBS.format(namespace)), or_else="the user's role")
    yield made
    made.close()


def allowed(client: Client, path: str) -> bool:
    """Whether the client may read this."""
    try:
        client.get(path)
    except ApiError as error:
        return error.code != 403
    return True


def document(**more: Any) -> Object:
    """A small job."""
    return {**job_manifest(**ON_ONE_CLAIM, topology={"cpusPerRank": OMIT}), **more}


def test_a_job_goes_only_where_its_user_may_create_jobs(
    api_cluster: Cluster, user: Client, namespace: str
) -> None:
    """A job goes into the namespace whose jobs its user may create, whatever it says itself."""
    with fresh_namespace(api_cluster, "other") as other:
        with pytest.raises(ApiError, match="cannot create resource"):
            user.post(JOBS.format(other), document())
        with pytest.raises(ApiError, match="does not match the namespace"):
            user.post(JOBS.format(namespace), document(metadata={"name": "job", "namespace": other}))


FORGED: Object = {
    "phase": "Succeeded",
    "attempt": 7,
    "provenance": {"image": "evil/image", "modelRevision": "../../../etc"},
    "adapter": {"uri": "pvc://payroll/adapter"},
}


def test_a_forged_status_is_not_taken(user: Client, namespace: str) -> None:
    """What a user writes into the status of a job is not there: not at its creation, nor later."""
    path = JOBS.format(namespace)
    assert "status" not in user.post(path, document(status=FORGED))
    assert "status" not in user.patch(f"{path}/job", {"status": FORGED})

    with pytest.raises(ApiError, match=r"cannot patch resource .*qlorajobs/status"):
        user.patch(f"{path}/job/status", {"status": FORGED})


def test_editors_do_not_write_the_status() -> None:
    """The roles that the chart adds to Kubernetes' own grant jobs, and nothing of their status."""
    roles = [
        each
        for each in render()
        if each["kind"] == "ClusterRole" and any("aggregate" in key for key in each["metadata"]["labels"])
    ]

    assert len(roles) == 2
    assert {resource for role in roles for _, _, resource in granted(role)} == {"qlorajobs"}


UNKNOWN = {
    "serviceAccountName": "admin",
    "template": {"spec": {"hostNetwork": True}},
    "volumes": [{"name": "root", "hostPath": {"path": "/"}}],
    "env": [{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}],
    "securityContext": {"privileged": True},
    "namespace": "kube-system",
    "args": ["$(TOKEN)"],
    "podSpecPatch": "hostPID: true",
}


@pytest.mark.parametrize("field", UNKNOWN)
def test_a_field_that_does_not_exist_is_dropped_or_refused(user: Client, namespace: str, field: str) -> None:
    """There is no field for what would reach more than the job: it is dropped, or refused by a strict client."""
    body = document()
    body["spec"][field] = UNKNOWN[field]
    path = JOBS.format(namespace)

    taken = user.post(f"{path}?dryRun=All", body)
    assert field not in taken["spec"]
    with pytest.raises(ApiError, match=f'unknown field "spec.{field}"'):
        user.post(f"{path}?dryRun=All&fieldValidation=Strict", body)


# --- Secrets


def plant(client: Client, namespace: str) -> None:
    """A Secret with a token."""
    secret = {"metadata": {"name": "hub"}, "stringData": {"token": TOKEN}}
    client.post(f"/api/v1/namespaces/{namespace}/secrets", secret)


def done(**more: Any) -> str:
    """The termination message of a pod that is done."""
    return json.dumps({"version": 1, "exitCode": 0, "reason": "DONE", "cause": "done", **more})


def told(client: Client, namespace: str) -> str:
    """All that the API server tells of the namespace but the Secret itself."""
    paths = [
        JOBS.format(namespace),
        f"/apis/batch/v1/namespaces/{namespace}/jobs",
        f"/api/v1/namespaces/{namespace}/pods",
        f"/api/v1/namespaces/{namespace}/events",
        f"/api/v1/namespaces/{namespace}/services",
        f"/api/v1/namespaces/{namespace}/configmaps",
        f"/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies",
    ]
    return "".join(client.text(path) for path in paths)


def secrets_of(pod: Object) -> set[str]:
    """The Secrets that a pod can read."""
    return {volume["secret"]["secretName"] for volume in pod["spec"]["volumes"] if "secret" in volume}


def test_a_token_is_seen_only_by_the_pods_that_transfer(
    operator: Any, make_job: Callable[..., Any], control_plane: ControlPlane, namespace: str
) -> None:
    """A token is seen by the pods that transfer, as a file; nowhere else, by nobody, and never by the operator."""
    client = control_plane.client
    plant(client, namespace)
    job = make_job(
        model={"source": "hf://org/model", "credentialsSecret": "hub"},
        output={"destination": "hf://org/adapter", "credentialsSecret": "hub"},
        topology={"pods": 1},
    )
    seen = []
    (fetcher,) = job.pods(0, 1)
    seen.append(secrets_of(job.kubelet.running(fetcher)))
    job.kubelet.succeeded(fetcher, message=done(fetched={"model": COMMIT}))
    job.until(lambda status: status.get("attempt") == 1)
    (rank,) = job.run(1, 1)
    seen.append(secrets_of(rank))
    job.kubelet.succeeded(
        rank, message=done(adapterUri="pvc://work/here/jobs/job/adapter", adapterSha256="0" * 64)
    )
    job.until(lambda status: status.get("attempt") == 2)
    (publisher,) = job.pods(2, 1)
    seen.append(secrets_of(job.kubelet.running(publisher)))
    everything = told(client, namespace)
    job.kubelet.succeeded(publisher, message=done(publishedUri="hf://org/adapter@1"))
    job.until_phase("Succeeded")
    everything += told(client, namespace) + operator.log.read_text() + operator.get("/metrics")[1]
    process = Path("/proc", str(operator.process.pid))
    everything += (process / "environ").read_text() + (process / "cmdline").read_text()

    assert seen == [{"hub"}, set(), {"hub"}]
    assert TOKEN not in everything
    assert "qlora_operator" in everything  # of its command line: what was looked at is there
    asked = {entry["objectRef"]["resource"] for entry in requests(control_plane, OPERATOR)}
    assert "qlorajobs" in asked
    assert "secrets" not in asked


# --- what pods say


ANSI = "\x1b[2J\x1b]0;owned\x07\x1b[31m"
CONTROLS = "a\x00b\x07c\x85d\u202ee\u2028f\ufeffg"
HOSTILE = {
    "ANSI escapes": f"{ANSI}red\x1b[0m",
    "control characters": CONTROLS,
    "many lines": "\n".join(f"line {number}" for number in range(1000)),
    "huge": "x" * 4096,
    "JSON of another kind": json.dumps({"phase": "Succeeded", "conditions": []}),
    "half a report": done()[:40],
}
REPORTED = (
    "cause",
    "reason",
    "host",
    "notBitExact",
    "computeDtype",
    "adapterUri",
    "adapterSha256",
    "publishedUri",
)
"""Every text of a report."""


def texts(value: Any) -> Iterator[str]:
    """Every string in a document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from texts(each)


def unprintable(value: Any) -> list[str]:
    """Strings that hold what no terminal should get, or that are endless."""
    return [
        text[:200]
        for text in texts(value)
        if len(text) > 1200 or any(unicodedata.category(letter).startswith("C") for letter in text)
    ]


Ended = dict[str, tuple[Any, Object]]
"""By case: the job, and its status at the end."""


@pytest.fixture
def end_with(shared_operator: Any, make_job: Callable[..., Any]) -> Callable[[Mapping[str, str], int], Ended]:
    """end_with({case: termination message}, exit code) -> what becomes of jobs whose only pod ends so.

    Together, since the Job controller takes its time for each step of each.
    """

    def run(messages: Mapping[str, str], code: int) -> Ended:
        jobs = {
            case: make_job(f"job-{number}", topology={"pods": 1}, backoffLimit=0)
            for number, case in enumerate(messages)
        }
        for case, job in jobs.items():
            (pod,) = job.pods(0, 1)
            job.kubelet.running(pod)
            if code:
                job.kubelet.failed(pod, code, message=messages[case])
            else:
                job.kubelet.succeeded(pod, message=messages[case])
        over = ("Failed", "Succeeded")
        return {case: (job, job.until(lambda status: status["phase"] in over)) for case, job in jobs.items()}

    return run


@pytest.mark.parametrize("code", [1, 11, 0], ids=["failed", "failed for good", "succeeded"])
def test_hostile_last_words_stay_short_and_printable(end_with: Callable[..., Ended], code: int) -> None:
    """Whatever a pod's last words are, the status and the Events stay short, printable and on one line."""
    report = dict.fromkeys(REPORTED, f"{ANSI}{CONTROLS}\n" + "y" * 300)
    words = {**HOSTILE, "a report": json.dumps({"version": 1, "exitCode": code, **report})}

    for case, (job, status) in end_with(words, code).items():
        assert unprintable(status) == [], case
        assert unprintable([event["message"] for event in job.events()]) == [], case


def test_hostile_progress_does_not_get_into_the_status(
    shared_operator: Any, make_job: Callable[..., Any]
) -> None:
    """Nor does what rank 0 tells while it runs get into the status as it is."""
    text = f"{ANSI}{CONTROLS}\n" + "y" * 3000
    job = make_job(topology={"pods": 1})
    with rank_zero() as rank:
        rank.tell(
            job.get()["metadata"]["uid"],
            step=7,
            computeDtype=text,
            checkpoint={"step": 5, "time": "2026-01-31T12:00:00Z", "uri": text},
            ranks=[{"rank": 0, "host": text, "isa": text, "cpus": text, "threads": 1}],
        )
        (pod,) = job.pods(0, 1)
        job.kubelet.running(pod, ip=rank.address)
        status = job.until(lambda status: status.get("checkpoint"))

    assert status["checkpoint"]["step"] == 5
    assert unprintable(status) == []


NUMBERS = {
    "not a number": "NaN",
    "infinite": "-Infinity",
    "too large for a float": "1e999",
    "too large for 64 bits": "1" + "0" * 30,
}


def test_a_hostile_number_does_not_keep_a_job_from_its_end(end_with: Callable[..., Ended]) -> None:
    """A report with a number that no status can hold does not keep the job from its end."""
    report = done(
        adapterUri="pvc://work/here/jobs/job/adapter", adapterSha256="0" * 64, evalLoss="E", step="S"
    )
    words = {
        case: report.replace('"E"', number).replace('"S"', number if number.isdigit() else "10")
        for case, number in NUMBERS.items()
    }

    assert {status["phase"] for _, status in end_with(words, 0).values()} <= {"Failed", "Succeeded"}


REVISIONS = {
    "a path out of the workspace": "../../../other",
    "a path": "a/b",
    "absolute": "/etc",
    "empty": "",
}


def test_a_hostile_revision_leads_to_no_other_folder(
    shared_operator: Any, make_job: Callable[..., Any]
) -> None:
    """What a fetch says that it found leads the ranks to no other folder than one of the fetched sources."""
    jobs = {
        revision: make_job(f"job-{number}", model={"source": "hf://org/model"}, backoffLimit=0)
        for number, revision in enumerate(REVISIONS.values())
    }
    for revision, job in jobs.items():
        (pod,) = job.pods(0, 1)
        job.kubelet.succeeded(job.kubelet.running(pod), message=done(fetched={"model": revision}))
    for revision, job in jobs.items():
        status = job.until(lambda status: status["phase"] == "Failed" or status.get("attempt"))
        assert status.get("provenance", {}).get("modelRevision") is None, revision
