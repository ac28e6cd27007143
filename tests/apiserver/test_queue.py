"""Jobs that wait in a queue: the test lets them in and takes them out by the same writes as Kueue 0.17.0.

Each of these writes names the function of Kueue's that makes it.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from qlora_contract.units import rfc3339
from testcluster.client import ApiError, Client
from testcluster.cluster import Cluster
from testcluster.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("shared_operator")]

MakeJob = Callable[..., Any]
QUEUE = {"queueName": "team-queue"}
POD_SET, WORKLOAD, STOPPING = (f"kueue.x-k8s.io/{name}" for name in ("podset", "workload", "stopping"))
STOPPED = 50
"""The exit code of ranks that are told to stop."""
NO_RESTARTS = {"user": 0, "infrastructure": 0}


@pytest.fixture
def client(api_cluster: Cluster) -> Client:
    """The administrator's."""
    return api_cluster.client


def gang(job: Any, attempt: int) -> dict[str, Any]:
    """The attempt's Job, once it is there."""
    return dict(job.until_gang(attempt, lambda _: True))


def path_of(job: Any, attempt: int) -> str:
    """Of the attempt's Job, once it is there."""
    return f"/apis/batch/v1/namespaces/{job.namespace}/jobs/{gang(job, attempt)['metadata']['name']}"


def suspend(client: Client, job: Any, attempt: int) -> None:
    """Somebody suspends the attempt's Job."""
    client.patch(path_of(job, attempt), {"spec": {"suspend": True}})


def admit(client: Client, job: Any, attempt: int, node_labels: dict[str, str] | None = None) -> None:
    """The queue lets the attempt in, on nodes of a flavor with these labels.

    One write: JobReconciler.startJob and getPodSetsInfoFromStatus (pkg/controller/jobframework/reconciler.go),
    Job.RunWithPodSetsInfo (pkg/controller/jobs/job/job_controller.go), FromAssignment and Merge (pkg/podset/podset.go).
    """
    pods = {"labels": {POD_SET: "main"}, "annotations": {WORKLOAD: f"job-{job.name}-a{attempt}"}}
    template = {"metadata": pods, "spec": {"nodeSelector": node_labels or {}}}
    client.patch(path_of(job, attempt), {"spec": {"suspend": False, "template": template}})


def evict(client: Client, job: Any, attempt: int) -> None:
    """The queue takes the attempt out.

    Three writes, the last of which is tried until the API server takes it, or the Job is over or gone: Job.Stop and
    RestorePodSetsInfo (pkg/controller/jobs/job/job_controller.go), JobReconciler.ReconcileGenericJob
    (pkg/controller/jobframework/reconciler.go).
    """
    path = path_of(job, attempt)
    template = {"metadata": {"labels": {POD_SET: None}, "annotations": {WORKLOAD: None}}}
    stopping = {"metadata": {"annotations": {STOPPING: "true"}}, "spec": {"suspend": True}}
    restored = {"metadata": {"annotations": {STOPPING: None}}, "spec": {"template": template}}
    client.patch(path, stopping)

    def is_stopped() -> bool:
        try:
            client.patch(f"{path}/status", {"status": {"startTime": None}})
            client.patch(path, restored)
        except ApiError as error:
            if error.code not in (404, 409, 422):
                raise
            return error.code == 404 or fails(client.get(path))
        return True

    wait_for(is_stopped, or_else="the Job's template as it was", every=0.1)


def fails(gang: dict[str, Any]) -> bool:
    """Whether a Job is over, or about to be, and not well."""
    conditions = gang["status"].get("conditions", [])
    return any(each["type"] in ("FailureTarget", "Failed") for each in conditions)


def test_a_queued_job_runs_once_it_is_let_in(make_job: MakeJob, client: Client) -> None:
    """A job with a queue waits there, suspended and labelled for Kueue, and runs once it is let in."""
    job = make_job(scheduling=QUEUE)
    status = job.until(lambda status: status.get("message") == "waits in the queue team-queue")
    assert status["phase"] == "Queued"
    child = gang(job, 0)
    assert child["spec"]["suspend"] is True
    assert child["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-queue"
    assert job.condition("QuotaReserved")["reason"] == "Queued"
    assert "startTime" not in status

    before = rfc3339(datetime.now(UTC))
    admit(client, job, 0)

    job.run()
    assert job.condition("QuotaReserved")["status"] == "True"
    status = job.status
    assert status["startTime"] >= before
    assert status["restarts"] == NO_RESTARTS


def test_an_evicted_job_queues_again_at_no_cost(make_job: MakeJob, client: Client) -> None:
    """A job that the queue takes out costs nothing, and waits in the queue again."""
    job = make_job(scheduling=QUEUE, backoffLimit=0, infrastructureBackoffLimit=0)
    gang(job, 0)
    admit(client, job, 0)
    job.run()

    with job.kubelet.finish_terminations(job.namespace, exit_code=STOPPED):
        evict(client, job, 0)
        status = job.until(lambda status: status["attempt"] == 1 and status["phase"] == "Queued")
    assert status["attempts"][0]["reason"] == "Requeued"
    assert status["restarts"] == NO_RESTARTS
    assert gang(job, 1)["spec"]["suspend"] is True
    assert job.condition("QuotaReserved")["status"] == "False"

    admit(client, job, 1)
    job.run(1)
    assert job.status["restarts"] == NO_RESTARTS


def test_an_eviction_that_the_operator_sleeps_through_costs_nothing(
    make_job: MakeJob, client: Client, shared_operator: Any
) -> None:
    """Ranks that are stopped fail the Job if kubelets are slow to remove them, and nobody has seen it suspended."""
    job = make_job(scheduling=QUEUE, backoffLimit=0, infrastructureBackoffLimit=0)
    admit(client, job, 0)
    pods = job.run()
    shared_operator.kill()
    try:
        evict(client, job, 0)
        for pod in pods:
            job.kubelet.failed(pod, STOPPED)
        job.until_gang(0, fails)
    finally:
        shared_operator.start()

    with job.kubelet.finish_terminations(job.namespace):
        status = job.until(lambda status: status["attempt"] == 1 and status["phase"] == "Queued")
    assert status["attempts"][0]["reason"] == "Requeued"
    assert status["restarts"] == NO_RESTARTS


def test_pods_go_to_nodes_of_the_flavor(make_job: MakeJob, client: Client) -> None:
    """What the queue adds to the Job reaches its pods, and the operator leaves it there."""
    job = make_job(scheduling=QUEUE)
    admit(client, job, 0, {"kubernetes.io/hostname": "big"})

    pods = job.run()

    assert [pod["spec"]["nodeSelector"]["kubernetes.io/hostname"] for pod in pods] == ["big", "big"]
    assert job.status["restarts"] == NO_RESTARTS


def test_a_restart_queues_again(make_job: MakeJob, client: Client) -> None:
    """An attempt that fails by itself gives its quota back; the next one waits for its own."""
    job = make_job(scheduling=QUEUE)
    admit(client, job, 0)
    pods = job.run()
    with job.kubelet.finish_terminations(job.namespace):
        job.kubelet.failed(pods[0], 1)
        status = job.until(lambda status: status["attempt"] == 1 and status["phase"] == "Queued")

    assert status["restarts"] == {"user": 1, "infrastructure": 0}


def test_the_active_deadline_stands_still_in_the_queue(make_job: MakeJob, client: Client) -> None:
    """activeDeadlineSeconds begins when the queue lets the job in."""
    job = make_job(scheduling=QUEUE, activeDeadlineSeconds=1)
    job.until_phase("Queued")
    make_job("witness", activeDeadlineSeconds=2).until_phase("Failed")
    assert job.status["phase"] == "Queued"

    admit(client, job, 0)

    job.until_phase("Failed")
    assert job.condition("Failed")["reason"] == "DeadlineExceeded"


def test_the_pending_deadline_counts_in_the_queue(make_job: MakeJob) -> None:
    """A job that is not let in within pendingDeadlineSeconds fails, and says what it waited for."""
    job = make_job(scheduling=QUEUE, pendingDeadlineSeconds=1)

    status = job.until_phase("Failed")

    assert job.condition("Failed")["reason"] == "PendingDeadlineExceeded"
    assert status["message"].endswith("waits in the queue team-queue")
    job.until(lambda _: not job.gangs())


def test_a_job_suspended_in_the_queue_leaves_it(make_job: MakeJob, client: Client) -> None:
    """A job that is suspended in the queue leaves it, and queues anew when it is resumed."""
    job = make_job(scheduling=QUEUE)
    job.until_phase("Queued")

    job.patch({"suspend": True})
    status = job.until(lambda status: status["phase"] == "Suspended" and not job.gangs())
    assert "startTime" not in status
    job.patch({"suspend": False})

    status = job.until(lambda status: status["phase"] == "Queued" and status["attempt"] == 1)
    assert status["restarts"] == NO_RESTARTS
    admit(client, job, 1)
    job.run(1)


def test_a_job_whose_queue_is_taken_away_queues_no_more(make_job: MakeJob) -> None:
    """A job whose queueName is taken away while it is suspended does not queue any more."""
    job = make_job(scheduling=QUEUE)
    job.until_phase("Queued")
    job.patch({"suspend": True, "scheduling": {"queueName": None}})
    job.until(lambda status: status["phase"] == "Suspended" and not job.gangs())

    job.patch({"suspend": False})

    job.run(1)
    assert job.condition("QuotaReserved") == {}
    assert job.status["restarts"] == NO_RESTARTS
    assert job.status["startTime"]


def test_suspending_the_job_of_an_attempt_by_hand_ends_it(make_job: MakeJob, client: Client) -> None:
    """Without a queue, whoever suspends the Job of an attempt ends it; the next one runs."""
    job = make_job()
    job.run()
    with job.kubelet.finish_terminations(job.namespace):
        suspend(client, job, 0)
        status = job.until(lambda status: status["attempt"] == 1)

    assert status["restarts"] == {"user": 0, "infrastructure": 1}
    assert "suspend the QLoRAJob instead" in status["attempts"][0]["message"]
    job.run(1)
