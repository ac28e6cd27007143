"""What people and programs read: columns, conditions, progress, history, provenance."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from qlora_operator.api.run_config import config_hash
from qlora_operator.api.v1alpha1 import QLoRAJob
from testcluster.cluster import Cluster
from testcluster.errors import KubectlError
from testcluster.rank_zero import RankZero, rank_zero
from testcluster.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("shared_operator")]

MakeJob = Callable[..., Any]
DIGEST = f"sha256:{'0123456789abcdef' * 4}"
REPORT = {
    "step": 120,
    "totalSteps": 400,
    "epoch": 0.5,
    "loss": 1.8349,
    "evalLoss": 2.25,
    "tokensPerSecond": 411.7,
    "etaSeconds": 543.2,
    "memoryEstimate": 2**30,
    "memoryPeak": 2**29,
    "computeDtype": "bf16",
    "checkpoint": {
        "step": 100,
        "time": "2026-01-31T12:00:00Z",
        "uri": "pvc://work/here/jobs/job/checkpoints/100",
    },
    "ranks": [
        {"rank": 0, "host": "a", "isa": "avx512", "cpus": "0-3,8", "threads": 5},
        {"rank": 1, "host": "b", "isa": "amx_bf16", "cpus": "1", "threads": 1},
    ],
}


@pytest.fixture
def rank() -> Iterator[RankZero]:
    """A rank 0 that answers."""
    with rank_zero() as told:
        yield told


def run(job: Any, rank: RankZero, **fields: Any) -> list[dict[str, Any]]:
    """The job runs, and its rank 0 tells of this progress; its pods."""
    rank.tell(job.get()["metadata"]["uid"], **{**REPORT, **fields})
    first, second = job.pods(0)
    pods = [job.kubelet.running(first, ip=rank.address), job.kubelet.running(second)]
    job.until(lambda status: status.get("progress"))
    return pods


def table(cluster: Cluster, job: Any, *arguments: str) -> dict[str, str]:
    """The job's line of `kubectl get`, by column."""
    printed = cluster.kubectl("get", "qlj", job.name, "-n", job.namespace, *arguments).splitlines()
    header = printed[0]
    begins = [i for i in range(len(header)) if header[i] != " " and (i == 0 or header[i - 2 : i] == "  ")]
    ends = [*begins[1:], None]
    return {
        header[begin:end].strip(): printed[1][begin:end].strip()
        for begin, end in zip(begins, ends, strict=True)
    }


# --- what kubectl shows


def test_the_columns_show_phase_ranks_tier_and_progress(
    make_job: MakeJob, api_cluster: Cluster, rank: RankZero
) -> None:
    """`kubectl get` shows phase, ranks, tier and progress, for people."""
    job = make_job()
    run(job, rank)

    columns = table(api_cluster, job)

    assert columns.pop("AGE")
    assert columns == {
        "NAME": "job",
        "PHASE": "Running",
        "RANKS": "2/2",
        "ISA": "avx512",
        "STEP": "120/400",
        "LOSS": "1.835",
        "TOK/S": "411.7",
        "ETA": "9m",
        "RESTARTS": "0",
    }


def test_the_wide_columns_show_attempt_dtype_checkpoint_and_message(
    make_job: MakeJob, api_cluster: Cluster, rank: RankZero
) -> None:
    """`kubectl get -o wide` shows attempt, data type, checkpoint and message, too."""
    job = make_job()
    run(job, rank)

    columns = table(api_cluster, job, "-o", "wide")

    shown = {name: columns[name] for name in ("ATTEMPT", "DTYPE", "CHECKPOINT", "ADAPTER", "MESSAGE")}
    assert shown == {
        "ATTEMPT": "0",
        "DTYPE": "bf16",
        "CHECKPOINT": "100",
        "ADAPTER": "",
        "MESSAGE": "training",
    }


@pytest.mark.parametrize(("code", "reason"), [(0, "Succeeded"), (11, "InvalidData")])
def test_kubectl_wait_returns_on_either_end(
    make_job: MakeJob, api_cluster: Cluster, code: int, reason: str
) -> None:
    """`kubectl wait --for=condition=Finished` returns when the job succeeds and when it fails."""
    job = make_job()
    pods = job.run()
    asked = ("wait", "--for=condition=Finished", "--timeout=60s", "-n", job.namespace, "qlj/job")
    with ThreadPoolExecutor(1) as executor, job.kubelet.finish_terminations(job.namespace):
        waiting = executor.submit(api_cluster.kubectl, *asked)
        for pod in pods:
            job.kubelet.failed(pod, code) if code else job.kubelet.succeeded(pod)
        assert "condition met" in waiting.result()
    assert job.condition("Finished")["reason"] == reason


def test_describe_names_the_cause(make_job: MakeJob, api_cluster: Cluster) -> None:
    """`kubectl describe` ends with the job's events, the last of them the cause of its end."""
    job = make_job()
    words = json.dumps(
        {"version": 1, "exitCode": 11, "reason": "INVALID_DATA", "cause": "data.jsonl, line 7: no"}
    )
    with job.kubelet.finish_terminations(job.namespace):
        job.kubelet.failed(job.run()[1], 11, message=words)
        job.until_phase("Failed")
        job.until_event("InvalidData")

    printed = api_cluster.kubectl("describe", "qlj", "job", "-n", job.namespace)
    assert "line 7: no" in printed.partition("Events:")[2]


# --- progress


def test_progress_is_that_of_rank_zero(make_job: MakeJob, rank: RankZero) -> None:
    """What rank 0 tells is in the status: progress, checkpoint, data type, and where the ranks run."""
    job = make_job()
    run(job, rank)

    status = job.status

    told = status["progress"]
    assert told["step"] == 120
    assert told["percent"] == 30
    assert told["etaSeconds"] == 543
    assert (told["loss"], told["evalLoss"], told["tokensPerSecond"]) == (1.8349, 2.25, 411.7)
    assert (told["memoryEstimate"], told["memoryPeak"]) == (2**30, 2**29)
    assert status["checkpoint"] == REPORT["checkpoint"]
    assert status["placement"]["dtype"] == "bf16"
    pods = [pod["metadata"]["name"] for pod in job.pods(0)]
    assert [(r["index"], r["pod"], r["isa"], r["cpus"]) for r in status["ranks"]] == [
        (0, pods[0], "avx512", "0-3,8"),
        (1, pods[1], "amx_bf16", "1"),
    ]
    assert job.condition("Running")["reason"] == "Training"


@pytest.mark.parametrize(
    ("stage", "phase", "reason"),
    [
        ("Starting", "Running", "Loading"),
        ("Evaluating", "Running", "Evaluating"),
        ("Publishing", "Publishing", "Publishing"),
        ("Done", "Publishing", "Publishing"),
    ],
)
def test_the_stage_of_rank_zero_is_the_reason_of_running(
    make_job: MakeJob, rank: RankZero, stage: str, phase: str, reason: str
) -> None:
    """The stage that rank 0 names is the reason of the condition Running."""
    job = make_job()
    run(job, rank, stage=stage)

    status = job.until(lambda _: job.condition("Running").get("reason") == reason)

    assert status["phase"] == phase


def test_progress_of_another_job_or_attempt_is_not_taken(make_job: MakeJob, rank: RankZero) -> None:
    """A report of another job, or of another attempt, is passed over."""
    job = make_job()
    rank.tell("another-uid", step=7)
    first, second = job.pods(0)
    job.kubelet.running(first, ip=rank.address)
    job.kubelet.running(second)
    job.until_phase("Running")

    wait_for(lambda: rank.asked > 0)
    rank.tell(job.get()["metadata"]["uid"], attempt=1, step=8)
    asked = rank.asked
    wait_for(lambda: rank.asked > asked)

    assert "progress" not in job.status


def test_a_job_that_succeeded_has_made_all_its_steps(make_job: MakeJob, rank: RankZero) -> None:
    """A job that succeeded has made all its steps, whatever rank 0 last told."""
    job = make_job()
    for pod in run(job, rank):
        job.kubelet.succeeded(pod)

    status = job.until_phase("Succeeded")

    assert (status["progress"]["step"], status["progress"]["percent"]) == (400, 100)
    assert status["columns"]["step"] == "400/400"
    assert status["columns"]["eta"] == "0s"


# --- what is written, and when


def test_a_status_that_does_not_change_is_not_written(
    make_job: MakeJob, new_operator: Any, namespace: str, rank: RankZero
) -> None:
    """A sweep and a poll that bring no news leave the object as it is."""
    job = make_job()
    run(job, rank)
    job.until(lambda status: job.condition("Running")["reason"] == "Training")
    version, asked = job.get()["metadata"]["resourceVersion"], rank.asked

    other = new_operator("--namespace", namespace)
    other.start()

    wait_for(lambda: rank.asked > asked)
    # The report has been dealt with once the job was reconciled three times: found, swept, told.
    wait_for(lambda: reconciled(other) >= 3)
    assert job.get()["metadata"]["resourceVersion"] == version


def reconciled(operator: Any) -> float:
    """How many jobs an operator has reconciled, by its metrics."""
    lines = operator.get("/metrics")[1].splitlines()
    return sum(
        float(line.split()[1]) for line in lines if line.startswith("qlora_reconcile_duration_seconds_count")
    )


def test_another_managers_job_is_left_alone(make_job: MakeJob) -> None:
    """A job of another manager is not written to, and gets no children and no events."""
    job = make_job("theirs", managedBy="kueue.x-k8s.io/multikueue")
    version = job.get()["metadata"]["resourceVersion"]
    witness = make_job("ours", managedBy="qlora.dev/qlora-operator")
    witness.run()
    job.patch({"suspend": True})
    changed = job.get()["metadata"]["resourceVersion"]
    witness.patch({"suspend": True})
    witness.until_phase("Suspended")

    assert changed != version
    assert job.get()["metadata"]["resourceVersion"] == changed
    assert "status" not in job.get()
    assert job.gangs() == []
    assert job.events() == []


def test_transition_times_move_only_with_the_status(make_job: MakeJob) -> None:
    """A condition whose message changes, and not its status, keeps its time."""
    job = make_job()
    pods = job.run()
    before = job.condition("Initialized")
    started = job.status["startTime"]
    # A witness of time passing: two seconds.
    make_job("witness", activeDeadlineSeconds=2).until_phase("Failed")
    with job.kubelet.finish_terminations(job.namespace):
        job.kubelet.failed(pods[0], 1)
        job.run(1)

    after = job.condition("Initialized")
    assert (before["message"], after["message"]) == ("Job job-a0 exists", "Job job-a1 exists")
    assert before["lastTransitionTime"] == after["lastTransitionTime"]
    assert job.condition("Running")["lastTransitionTime"] > before["lastTransitionTime"]
    assert job.status["startTime"] == started


def test_the_status_says_which_generation_it_is_about(make_job: MakeJob) -> None:
    """The status says which generation of the spec it is about, and so does each condition that it says anew."""
    job = make_job()
    assert job.until(lambda status: status.get("observedGeneration") == 1)

    job.patch({"suspend": True})

    job.until(lambda status: status["observedGeneration"] == 2)
    assert job.condition("Suspended")["observedGeneration"] == 2


# --- history and provenance


def test_attempts_are_capped(make_job: MakeJob) -> None:
    """Of many attempts the newest 20 are shown, and the number of the attempt goes on."""
    job = make_job(suspend=True)
    job.until_phase("Suspended")
    raw = job.get()
    ended = {"start": "2026-01-01T00:00:00Z", "end": "2026-01-01T00:00:01Z", "reason": "Suspended"}
    raw["status"] |= {"attempt": 41, "attempts": [{"attempt": n, **ended} for n in range(22, 42)]}
    job.client.put(f"{job.path}/status", raw)

    job.patch({"suspend": False})

    job.pods(42)
    shown = [attempt["attempt"] for attempt in job.status["attempts"]]
    assert shown == list(range(23, 43))


def test_the_status_names_image_digest_seed_and_settings(make_job: MakeJob) -> None:
    """The status names the image, the digest that rank 0's node reports, the seed, and the settings' hash."""
    job = make_job(training={"maxSteps": 10, "seed": 7})
    first, second = job.pods(0)
    job.kubelet.running(second)
    job.kubelet.running(first, ready=False)
    status = {
        "containerStatuses": [
            {**first_container(job), "imageID": f"registry.example/x@{DIGEST}", "ready": True}
        ]
    }
    ready = [{"type": kind, "status": "True"} for kind in ("ContainersReady", "Ready")]
    path = f"/api/v1/namespaces/{job.namespace}/pods/{first['metadata']['name']}/status"
    kind = "application/strategic-merge-patch+json"
    job.client.patch(path, {"status": {**status, "conditions": ready}}, kind)
    job.until_phase("Running")

    assert job.status["provenance"] == {
        "image": "registry.example/qlora-trainer:1",
        "imageDigest": DIGEST,
        "runConfigVersion": 1,
        "seed": 7,
        "configHash": config_hash(QLoRAJob.model_validate(job.get())),
    }


def first_container(job: Any) -> dict[str, Any]:
    """The container status of rank 0's pod."""
    return dict(job.pods(0)[0]["status"]["containerStatuses"][0])


# --- spec


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"training": {"maxSteps": 20}}, "training is immutable; create another job"),
        ({"image": "registry.example/other:1"}, "image is immutable; create another job"),
        (
            {"topology": {"pods": 3}},
            "topology may change only while the job is suspended; set suspend: true first",
        ),
        (
            {"scheduling": {"queueName": "q"}},
            "scheduling may change only while the job is suspended; set suspend: true first",
        ),
    ],
    ids=["training", "image", "topology", "scheduling"],
)
def test_edits_while_running_are_refused(
    make_job: MakeJob, api_cluster: Cluster, change: dict[str, Any], said: str
) -> None:
    """A running job's spec is fixed, and the API server says what to do instead."""
    job = make_job()
    job.pods(0)

    with pytest.raises(KubectlError, match="is invalid") as refused:
        api_cluster.kubectl(
            "patch", "qlj", "job", "-n", job.namespace, "--type=merge", "-p", json.dumps({"spec": change})
        )

    assert said in str(refused.value)
