"""Jobs whose sources or destination are remote: each stage's pods, what they may see, and what people are told."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from testcluster.client import Client
from testcluster.cluster import Cluster
from testcluster.rank_zero import RankZero, rank_zero
from testcluster.witness import Witness

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("shared_operator")]

Object = dict[str, Any]
MakeJob = Callable[..., Any]

COMMIT, LISTING = "c0ffee" * 6 + "c0ff", "d0" * 32
NO_RESTARTS = {"user": 0, "infrastructure": 0}
OUTPUT = {"destination": "s3://bucket/adapters"}
PHASES = {"fetch": "Fetching", "train": "Running", "publish": "Publishing"}


@pytest.fixture
def rank() -> Iterator[RankZero]:
    """A pod's progress server."""
    with rank_zero() as told:
        yield told


def secrets(pod: Object) -> list[str]:
    """Names of the Secrets that a pod mounts."""
    return [volume["secret"]["secretName"] for volume in pod["spec"]["volumes"] if "secret" in volume]


def run_config(pod: Object) -> Object:
    """What the pod is told."""
    return dict(json.loads(pod["metadata"]["annotations"]["qlora.dev/run-config"]))


def columns(cluster: Cluster, job: Any) -> tuple[str, str]:
    """PHASE and RANKS of `kubectl get`."""
    row = cluster.kubectl("get", "qlj", job.name, "-n", job.namespace, "--no-headers").split()
    return row[1], row[2]


# --- all goes well


def test_every_stage_has_its_own_pods(make_remote_job: MakeJob, witness: Witness) -> None:
    """A fetch and an upload run in one pod each, which alone see the Secrets of what they transfer; the ranks read
    the revisions that the fetch found."""
    job = make_remote_job()

    (fetcher,) = job.goes(0, "fetch")
    assert secrets(fetcher) == ["hub", "store"]
    assert fetcher["spec"]["containers"][0]["command"] == ["python", "-m", "qlora_trainer.transfer"]
    assert fetcher["metadata"]["labels"]["qlora.dev/role"] == "fetcher"
    assert run_config(fetcher)["stage"] == "fetch"
    assert "fetched" not in run_config(fetcher)
    job.done([fetcher], "fetch")

    ranks = job.goes(1, "train")
    assert [secrets(pod) for pod in ranks] == [[], []]
    assert ranks[0]["spec"]["containers"][0]["command"] == ["python", "-m", "qlora_trainer.launch"]
    assert run_config(ranks[0])["fetched"] == {"model": COMMIT, "dataset": LISTING}
    job.done(ranks, "train")

    (publisher,) = job.goes(2, "publish")
    assert secrets(publisher) == ["writer"]
    assert publisher["metadata"]["labels"]["qlora.dev/role"] == "publisher"
    assert run_config(publisher)["output"]["destination"] == "s3://bucket/adapters"
    job.done([publisher], "publish")

    status = job.until_phase("Succeeded")
    assert [(each["stage"], each["reason"]) for each in status["attempts"]] == [
        ("fetch", "Fetched"),
        ("train", "Trained"),
        ("publish", "Succeeded"),
    ]
    assert status["restarts"] == NO_RESTARTS
    assert (status["provenance"]["modelRevision"], status["provenance"]["datasetRevision"]) == (
        COMMIT,
        LISTING,
    )
    assert status["adapter"]["uri"] == "pvc://work/here/jobs/job/adapter"
    assert status["adapter"]["publishedUri"] == "s3://bucket/adapters/job"
    assert status["adapter"]["evalLoss"] == 2.0
    witness.look()
    assert witness.faults == []


def test_formats_are_made_by_one_pod_when_the_ranks_have_left(make_remote_job: MakeJob) -> None:
    """The adapter is known by then; what is made of it is sent with it."""
    job = make_remote_job(output={**OUTPUT, "formats": ["merged", "gguf"]})
    job.done(job.goes(0, "fetch"), "fetch")
    job.done(job.goes(1, "train"), "train")

    (exporter,) = job.goes(2, "export")
    assert secrets(exporter) == []
    assert exporter["metadata"]["labels"]["qlora.dev/role"] == "exporter"
    assert run_config(exporter)["stage"] == "export"
    status = job.status
    assert status["adapter"]["uri"] == "pvc://work/here/jobs/job/adapter"
    assert "exports" not in status["adapter"]
    assert job.condition("Running")["reason"] == "Exporting"
    job.done([exporter], "export")

    job.done(job.goes(3, "publish"), "publish")
    status = job.until_phase("Succeeded")
    assert status["adapter"]["exports"] == ["merged", "gguf-q8_0"]
    assert [each["reason"] for each in status["attempts"]] == ["Fetched", "Trained", "Exported", "Succeeded"]
    assert status["restarts"] == NO_RESTARTS


def test_what_kubectl_shows_of_stages(make_remote_job: MakeJob, api_cluster: Cluster) -> None:
    """The columns follow the stages, and the events tell the end of each."""
    job = make_remote_job()
    for attempt, stage in enumerate(PHASES):
        job.begins(attempt, stage)
        assert columns(api_cluster, job) == ("Starting", "0/2")
        pods = job.goes(attempt, stage)
        assert columns(api_cluster, job) == (PHASES[stage], "2/2" if stage == "train" else "0/2")
        job.done(pods, stage)
    job.until_phase("Succeeded")

    assert columns(api_cluster, job)[0] == "Succeeded"
    for reason in ("Fetched", "Trained", "Succeeded"):
        assert job.until_event(reason)["type"] == "Normal"
    described = api_cluster.kubectl("describe", "qlj", "job", "-n", job.namespace)
    assert "the adapter is in pvc://work/here/jobs/job/adapter and s3://bucket/adapters/job" in described
    assert [event["reason"] for event in job.events() if event["type"] == "Warning"] == []


def test_only_the_last_stage_and_the_ranks_are_kept(make_remote_job: MakeJob, terminations: None) -> None:
    """The Job of a stage goes when the next one begins, but not that of the ranks: pods that talk to the model are made
    after its own. Service and NetworkPolicy serve all, and go with the last."""
    job = make_remote_job()
    job.done(job.goes(0, "fetch"), "fetch")
    job.done(job.goes(1, "train"), "train")
    job.done(job.goes(2, "publish"), "publish")
    job.until_phase("Succeeded")

    job.until(lambda _: sorted(job.children("jobs")) == ["jobs/job-a1", "jobs/job-a2"])
    job.until(lambda _: not job.children("services", "networkpolicies"))


def test_a_transfer_tells_how_far_it_is(make_remote_job: MakeJob, rank: RankZero) -> None:
    """Bytes stand in the message while sources are fetched, and steps are none of them."""
    job = make_remote_job()
    (pod,) = job.begins(0, "fetch")
    told = {"stage": "Fetching", "step": 0, "totalSteps": 0, "epoch": 0.0}
    rank.tell(job.get()["metadata"]["uid"], **told, bytesDone=2**29, bytesTotal=2**31)
    job.kubelet.running(pod, ip=rank.address)

    status = job.until(lambda status: "0.50 of 2.00 GiB" in status.get("message", ""))
    assert status["message"] == "the remote sources are being fetched: 0.50 of 2.00 GiB"
    assert status["phase"] == "Fetching"
    assert "progress" not in status


def test_a_job_on_claims_has_one_stage(make_job: MakeJob) -> None:
    """Nothing is fetched or sent of a job that names no remote place."""
    job = make_job()

    status = job.succeed(job.run())

    assert [(each["stage"], each["reason"]) for each in status["attempts"]] == [("train", "Succeeded")]


# --- the data are looked at before the ranks start


def looked_at(code: int, cause: str, **facts: Any) -> dict[str, str]:
    """What the container beside a fetch leaves."""
    return {"check": json.dumps({"version": 1, "exitCode": code, "reason": "X", "cause": cause, **facts})}


def fetched() -> str:
    """What a fetch leaves."""
    found = {"model": COMMIT, "dataset": LISTING}
    return json.dumps({"version": 1, "exitCode": 0, "reason": "DONE", "cause": "done", "fetched": found})


def test_what_the_data_are_is_told_before_ranks_are_asked_for(make_remote_job: MakeJob) -> None:
    """By the container beside the fetch, which has none of its Secrets; it costs no attempt, and no write."""
    job = make_remote_job()
    (pod,) = job.goes(0, "fetch")
    _, check = pod["spec"]["containers"]
    assert (check["name"], check["command"]) == ("check", ["python", "-m", "qlora_trainer.check"])
    assert not [mount for mount in check["volumeMounts"] if mount["name"].startswith("credentials")]

    told = "train.jsonl (a JSONL file): training: 812 records in the chat format"
    job.kubelet.succeeded(pod, message=fetched(), others=looked_at(0, "", data=told))
    job.begins(1, "train")

    condition = job.condition("DataChecked")
    assert (condition["status"], condition["reason"]) == ("True", "DataSampled")
    assert condition["message"] == told
    assert told in job.until_event("Fetched")["message"]


def test_data_that_ranks_could_not_use_fail_the_job_before_it_has_any(make_remote_job: MakeJob) -> None:
    """With the sentence that the ranks would have ended with."""
    job = make_remote_job()
    (pod,) = job.goes(0, "fetch")
    cause = "train.jsonl: line 3: has neither messages nor prompt and completion"

    job.kubelet.succeeded(pod, message=fetched(), others=looked_at(11, cause))

    status = job.until_phase("Failed")
    assert [each["reason"] for each in status["attempts"]] == ["InvalidData"]
    assert cause in status["message"]
    assert status["restarts"] == NO_RESTARTS
    condition = job.condition("DataChecked")
    assert (condition["status"], condition["reason"]) == ("False", "InvalidData")
    assert job.until_event("InvalidData")["type"] == "Warning"


# --- what goes wrong


def test_a_source_that_refuses_fails_the_job(make_remote_job: MakeJob, api_cluster: Cluster) -> None:
    """Missing or forbidden is not tried again: the transfer's own words say what would help."""
    job = make_remote_job()
    cause = "hf://org/model: 401, and the token of model.credentialsSecret was sent"
    (pod,) = job.goes(0, "fetch")

    job.refuses(pod, 17, cause)

    status = job.until_phase("Failed")
    assert status["attempts"][0]["reason"] == "TransferRefused"
    assert cause in status["message"]
    assert (status["restarts"], len(status["attempts"])) == (NO_RESTARTS, 1)
    assert job.until_event("TransferRefused")["type"] == "Warning"
    assert columns(api_cluster, job) == ("Failed", "0/2")


@pytest.mark.parametrize("stage", ["fetch", "publish"])
def test_a_transfer_that_breaks_off_is_tried_again(
    make_job: MakeJob, make_remote_job: MakeJob, witness: Witness, stage: str
) -> None:
    """At the cost of one of backoffLimit, and no other stage is gone through again."""
    job = make_remote_job() if stage == "fetch" else make_job(output=OUTPUT)
    if stage == "publish":
        job.done(job.goes(0, "train"), "train")
    first = 1 if stage == "publish" else 0
    (pod,) = job.goes(first, stage)

    job.refuses(pod, 32, "bucket: 503, ten times in a row")

    job.until(lambda status: status["attempt"] == first + 1)
    status = job.status
    assert status["attempts"][first]["reason"] == "TransferFailed"
    assert status["restarts"] == {"user": 1, "infrastructure": 0}
    (pod,) = job.pods(first + 1, 1)
    job.kubelet.running(pod)
    job.until_phase(PHASES[stage])
    witness.look()
    assert witness.faults == []


def test_a_job_that_cannot_send_its_adapter_says_where_it_is(make_job: MakeJob) -> None:
    """A destination that refuses fails the job, and the adapter stays in the workspace and the status."""
    job = make_job(output=OUTPUT)
    job.done(job.goes(0, "train"), "train")
    (pod,) = job.goes(1, "publish")

    job.refuses(pod, 17, "s3://bucket/adapters: 403 AccessDenied")

    status = job.until_phase("Failed")
    assert "403 AccessDenied" in status["message"]
    assert status["adapter"]["uri"] == "pvc://work/here/jobs/job/adapter"
    assert "publishedUri" not in status["adapter"]


def test_a_missing_secret_is_told_and_waited_for(make_remote_job: MakeJob) -> None:
    """The kubelet's words name the Secret; once it is there the same attempt goes on, at no cost."""
    job = make_remote_job()
    (pod,) = job.begins(0, "fetch")
    job.kubelet.missing_volume(pod, "credentials-model", 'secret "hub" not found')

    job.until(lambda _: job.condition("Running").get("reason") == "VolumeNotReady")

    assert 'volume "credentials-model" : secret "hub" not found' in job.status["message"]
    assert job.until_event("VolumeNotReady")["type"] == "Warning"
    job.kubelet.running(pod)
    status = job.until_phase("Fetching")
    assert (status["attempt"], status["restarts"]) == (0, NO_RESTARTS)


# --- suspended, queued, meddled with


def test_a_job_suspended_in_the_middle_of_a_fetch_fetches_again(make_remote_job: MakeJob) -> None:
    """The pod stops, the job holds, and resumed it fetches in another attempt, at no cost."""
    job = make_remote_job(backoffLimit=0, infrastructureBackoffLimit=0)
    (pod,) = job.goes(0, "fetch")

    job.patch({"suspend": True})
    job.until_phase("Suspended")
    job.kubelet.finish_termination(pod, exit_code=50)
    job.until(lambda status: status["attempts"][0].get("end"))
    assert job.gangs() == []
    job.patch({"suspend": False})

    (pod,) = job.goes(1, "fetch")
    job.done([pod], "fetch")
    job.begins(2, "train")
    status = job.status
    assert [each["reason"] for each in status["attempts"][:2]] == ["Suspended", "Fetched"]
    assert status["restarts"] == NO_RESTARTS


def test_a_foreign_job_in_the_way_of_a_stage_is_left_alone(
    make_remote_job: MakeJob, namespace: str, api_cluster: Cluster
) -> None:
    """Somebody else's Job of the next stage's name is left alone and named; without it the job goes on."""
    client: Client = api_cluster.client
    container = {"name": "main", "image": "registry.example/other:1"}
    template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    path = f"/apis/batch/v1/namespaces/{namespace}/jobs"
    body = {"metadata": {"name": "job-a1"}, "spec": {"suspend": True, "template": template}}
    there = client.post(path, body)
    job = make_remote_job()
    job.done(job.goes(0, "fetch"), "fetch")

    job.until(lambda _: job.condition("Initialized").get("reason") == "NameConflict")
    assert "a Job named job-a1 is there that is not this job's" in job.status["message"]
    assert client.get(f"{path}/job-a1")["metadata"]["uid"] == there["metadata"]["uid"]
    client.delete(f"{path}/job-a1", {"propagationPolicy": "Background"})

    pods = [job.kubelet.running(pod) for pod in job.pods(1, 2)]
    job.until_phase("Running")
    assert run_config(pods[0])["fetched"] == {"model": COMMIT, "dataset": LISTING}
    assert job.status["restarts"] == NO_RESTARTS


def test_each_stage_waits_in_the_queue(
    make_remote_job: MakeJob, namespace: str, api_cluster: Cluster
) -> None:
    """With a queue each stage waits to be let in, and tells so."""
    job = make_remote_job(scheduling={"queueName": "team"})
    path = f"/apis/batch/v1/namespaces/{namespace}/jobs"

    for attempt, stage in enumerate(("fetch", "train")):
        job.until(
            lambda status, number=attempt: status.get("attempt") == number and status["phase"] == "Queued"
        )
        job.until_gang(attempt, lambda gang: gang["spec"]["suspend"])
        api_cluster.client.patch(f"{path}/job-a{attempt}", {"spec": {"suspend": False}})
        pods = [job.kubelet.running(pod) for pod in job.pods(attempt, 2 if stage == "train" else 1)]
        job.until_phase(PHASES[stage])
        job.done(pods, stage)
    job.until(lambda status: status["attempt"] == 2 and status["phase"] == "Queued")
