"""How an attempt goes whose Job exists."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest

from qlora_contract.progress import CheckpointRef, ProgressReport
from qlora_contract.units import parse_time, rfc3339
from qlora_operator.status.actions import Decision, RestoreNetwork, TellCheckpoint
from qlora_operator.status.observation import WarningEvent, aware_time

Status = Callable[..., dict[str, Any]]

START = "2026-01-31T11:00:00Z"


def test_the_network_is_restored_alone(
    running: Status, ask: Callable[..., Decision], make_attempt_job: Any
) -> None:
    """A missing Service is made again, and never the Job along with it: it may just have been deleted."""
    decision = ask(running(), [make_attempt_job(ready=2, parallelism=2)], children_missing=True)
    assert decision.actions == (RestoreNetwork(),)


def test_it_is_kept_since_when_all_ranks_are_up(
    running: Status, starting: Status, ask: Callable[..., Decision], make_attempt_job: Any, now: datetime
) -> None:
    """Once, for the cost; of a job that an earlier release has seen running, since then."""
    up = [make_attempt_job(ready=2, parallelism=2)]
    begun = ask(starting(30, now), up, [])
    seen_before = ask(running(), up, [])
    kept = ask(running(running=rfc3339(now - timedelta(seconds=7))), up, [])

    assert [decision.status.attempts[-1].running for decision in (begun, seen_before, kept)] == [
        rfc3339(now), START, rfc3339(now - timedelta(seconds=7))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("age", "patience", "due", "said"),
    [
        pytest.param(1, 3, 2, False, id="has just begun"),
        pytest.param(10, 3, 10, False, id="looked at before"),
        pytest.param(21, 3, 10, True, id="takes long"),
        pytest.param(21, 30, 9, False, id="in a rush"),
        pytest.param(45, 30, 30, False, id="in a rush, looked at before"),
        pytest.param(61, 30, 30, True, id="takes long even for a rush"),
    ],
)
def test_nothing_is_said_about_pods_that_merely_start(
    starting: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    now: datetime,
    age: float,
    patience: float,
    due: float,
    said: bool,
) -> None:
    """Nothing is said of them for a while, nor are they looked at often: in a rush for longer, and less often."""
    pods = None if age < patience else []
    status = starting(age, now)
    attempt_job = make_attempt_job(parallelism=2)

    decision = ask(status, [attempt_job], pods, startup_grace=timedelta(seconds=patience))

    assert decision.look_at == now + timedelta(seconds=due)
    assert ("0/2 pods" in str(decision.status.message)) == said


@pytest.mark.parametrize(
    ("begun", "waited", "admitted", "start"),
    [
        pytest.param(None, 100, 40, -40, id="first let in"),
        pytest.param(-500, 100, 40, -440, id="let in again after a minute"),
        pytest.param(-500, 100, None, -400, id="let in just now"),
        pytest.param(-500, 100, 140, -500, id="let in before it was noticed to wait"),
    ],
)
def test_the_active_clock_stands_still_in_the_queue(
    starting: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    now: datetime,
    begun: float | None,
    waited: float,
    admitted: float | None,
    start: float,
) -> None:
    """startTime is the first admission, moved by the time spent in the queue since."""

    def at(seconds: float) -> datetime:
        return now + timedelta(seconds=seconds)

    status = starting(waited, now, startTime=None if begun is None else rfc3339(at(begun)))
    out = {"type": "QuotaReserved", "status": "False", "reason": "Queued", "message": ""}
    status["conditions"].append({**out, "lastTransitionTime": rfc3339(at(-waited))})
    attempt_job = make_attempt_job(parallelism=2, admitted_at=None if admitted is None else at(-admitted))

    after = ask(status, [attempt_job], [], spec={"scheduling": {"queueName": "q"}}).status

    assert parse_time(after.start_time) == at(start)


def test_facts_survive_a_look_at_the_pods(
    running: Status, ask: Callable[..., Decision], make_attempt_job: Any, make_pod: Any
) -> None:
    """What the ranks told stays when a pod is looked at because it is not ready for a moment."""
    known = {"index": 0, "pod": "job-a0-0", "node": "n", "isa": "avx512", "cpus": "0-3"}
    pods = [make_pod(n, phase="Running", node="n") for n in range(2)]

    status = ask(running() | {"ranks": [known]}, [make_attempt_job(ready=1, parallelism=2)], pods).status

    assert [(rank.index, rank.isa, rank.cpus) for rank in status.ranks] == [
        (0, "avx512", "0-3"),
        (1, None, None),
    ]


def test_ranks_that_launchers_settle_are_counted_once_rank_0_tells(
    starting: Status, ask: Callable[..., Decision], make_attempt_job: Any, make_pod: Any, now: datetime
) -> None:
    """With ranksPerPod auto the column says so first, and then how many there are."""
    status = starting(1, now)
    status["placement"] |= {"worldSize": None}
    topology = {"pods": 2, "ranksPerPod": "auto", "memoryPerRank": "1Gi"}
    pods = [make_pod(n, phase="Running", node="n") for n in range(2)]
    facts = [
        {"rank": n, "host": "h", "isa": "avx512", "cpus": str(n), "threads": 1, "pod": n // 2}
        for n in range(3)
    ]
    told = ProgressReport.model_validate(
        {"job_uid": "u", "attempt": 0, "stage": "Training", "step": 1, "total_steps": 9, "epoch": 0}
        | {"updated_time": START, "ranks": facts}
    )
    attempt_job = make_attempt_job(ready=2, parallelism=2)

    before = ask(status, [attempt_job], pods, spec={"topology": topology}).status
    after = ask(status, [attempt_job], pods, spec={"topology": topology}, progress=told).status

    assert (before.columns.ranks, before.placement.world_size, before.ranks) == ("0/auto", None, [])
    assert (after.columns.ranks, after.placement.world_size) == ("3/3", 3)
    assert [(rank.index, rank.pod) for rank in after.ranks] == [
        (0, "job-a0-0"),
        (1, "job-a0-0"),
        (2, "job-a0-1"),
    ]


@pytest.mark.parametrize(
    ("before", "step", "after"),
    [(None, 0, None), (None, 1, "bf16"), ("fp32", 1, "fp32")],
    ids=["no step yet", "the first step", "fixed before"],
)
def test_dtype_is_fixed_by_the_first_step(
    running: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    before: str | None,
    step: int,
    after: str | None,
) -> None:
    """The data type is that of the first completed step, for good."""
    status = running()
    status["placement"] |= {"dtype": before}
    told = ProgressReport(
        job_uid="u",
        attempt=0,
        stage="Training",
        step=step,
        total_steps=9,
        epoch=0,
        compute_dtype="bf16",
        updated_time=START,
    )

    found = ask(status, [make_attempt_job(ready=2, parallelism=2)], progress=told).status

    assert found.placement.dtype == after


def test_what_the_data_are_is_a_condition(
    running: Status, ask: Callable[..., Decision], make_attempt_job: Any
) -> None:
    """As soon as the ranks know, in their words; a report that does not tell leaves it."""
    known = {"job_uid": "u", "attempt": 0, "stage": "Starting", "step": 0, "total_steps": 9, "epoch": 0.0}
    jobs = [make_attempt_job(ready=2, parallelism=2)]
    status: Any = running()
    for said in (None, "training: 9 records in the chat format", None):
        report = ProgressReport.model_validate({**known, "data": said, "updated_time": START})
        status = ask(status, jobs, progress=report).status.model_dump(by_alias=True, exclude_none=True)
        found = [each for each in status["conditions"] if each["type"] == "DataChecked"]
        if said:
            assert [(each["status"], each["reason"], each["message"]) for each in found] == [
                ("True", "DataRead", said)
            ]
    assert len(found) == 1


REMOTE = {
    "model": {"source": "hf://org/model"},
    "dataset": {"source": "s3://bucket/data.jsonl"},
    "output": {"destination": "s3://bucket/adapters"},
}
REVISIONS = {"modelRevision": "c0ffee", "datasetRevision": "d0d0"}
TRANSFERS = pytest.mark.parametrize("stage", ["fetch", "publish"])


def told_of(stage: str, **fields: Any) -> ProgressReport:
    """A transfer's report."""
    known = {"job_uid": "u", "attempt": 0, "stage": stage, "step": 0, "total_steps": 0, "epoch": 0.0}
    return ProgressReport.model_validate({**known, "updated_time": "2026-01-31T12:00:00Z", **fields})


@pytest.mark.parametrize(
    ("stage", "report", "reason", "message", "phase"),
    [
        (
            "fetch",
            told_of("Fetching", bytes_done=2**29, bytes_total=2**31),
            "Fetching",
            "the remote sources are being fetched: 0.50 of 2.00 GiB",
            "Fetching",
        ),
        ("fetch", told_of("Done"), "Fetching", "the remote sources are being fetched", "Fetching"),
        (
            "publish",
            told_of("Uploading", bytes_done=0, bytes_total=2**20),
            "Uploading",
            "the adapter is being sent to output.destination: 0.00 of 1.00 MiB",
            "Publishing",
        ),
        (
            "publish",
            told_of("Done"),
            "Uploading",
            "the adapter is being sent to output.destination",
            "Publishing",
        ),
    ],
    ids=["fetching", "fetched", "sending", "sent"],
)
def test_a_transfer_tells_how_far_it_is(
    transferring: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    stage: str,
    report: ProgressReport,
    reason: str,
    message: str,
    phase: str,
) -> None:
    """Bytes stand in the message; what the ranks told, and where they ran, stays as it is."""
    before = transferring(stage)
    status = ask(before, [make_attempt_job(ready=1, parallelism=1)], spec=REMOTE, progress=report).status

    (condition,) = [each for each in status.conditions if each.type == "Running"]
    assert (condition.reason, condition.message, status.message, status.phase) == (
        reason,
        message,
        message,
        phase,
    )
    kept = status.model_dump(by_alias=True, exclude_none=True, include={"progress", "ranks", "checkpoint"})
    assert kept == {
        "ranks": [],
        **{key: before[key] for key in ("progress", "ranks", "checkpoint") if key in before},
    }
    assert status.columns.ranks == "0/2"
    assert status.columns.step == ("10/10" if stage == "publish" else None)


@TRANSFERS
def test_a_secret_that_is_missing_is_waited_for(
    starting: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    make_pod: Any,
    now: datetime,
    stage: str,
) -> None:
    """The kubelet's words about a volume are the job's, with no end to the attempt: it may yet be created."""
    status = starting(
        30, now, attempts=[{"attempt": 0, "stage": stage, "start": START, "jobUid": "job-uid-0"}]
    )
    known = {"provenance": REVISIONS, "adapter": {"uri": "u"}} if stage == "publish" else {}
    words = 'MountVolume.SetUp failed for volume "credentials-model" : secret "hub" not found'
    pod = make_pod(0, node="n")

    decision = ask(
        status | known,
        [make_attempt_job(parallelism=1)],
        [pod],
        spec=REMOTE,
        warnings=(WarningEvent("FailedMount", words, pod.uid),),
    )

    assert decision.status.attempts[0].reason is None
    assert words in decision.status.message
    assert [event.reason for event in decision.events] == ["VolumeNotReady"]


@pytest.mark.parametrize(
    ("age", "message", "looks_again"),
    [
        (5, "waits in the queue q", 10),
        (60, "waits in the queue q: LocalQueue q doesn't exist", 60),
        (9999, "waits in the queue q: LocalQueue q doesn't exist", 300),
    ],
    ids=["just queued", "for a minute", "for hours"],
)
def test_a_queue_that_admits_nothing_is_quoted(
    starting: Callable[..., dict[str, Any]],
    ask: Callable[..., Any],
    make_attempt_job: Any,
    now: datetime,
    age: int,
    message: str,
    looks_again: int,
) -> None:
    """A queue that does not exist would be waited for in silence; but most jobs just wait, and are rarely asked for."""
    waits = {"type": "QuotaReserved", "status": "False", "reason": "Queued", "message": ""}
    status = starting(age, now)
    status["conditions"].append({**waits, "lastTransitionTime": status["startTime"]})
    queued = {"scheduling": {"queueName": "q"}}

    decision = ask(
        status, [make_attempt_job(suspended=True)], spec=queued, queue_says="LocalQueue q doesn't exist"
    )

    assert decision.status.message == message
    assert decision.look_at == now + timedelta(seconds=looks_again)


@pytest.mark.parametrize("suspended", [True, False], ids=["not admitted", "admitted"])
def test_a_job_that_runs_in_another_cluster_says_so(
    starting: Callable[..., dict[str, Any]],
    ask: Callable[..., Any],
    make_attempt_job: Any,
    now: datetime,
    suspended: bool,
) -> None:
    """MultiKueue takes the Job alone: its pods never come, and nothing is done because they do not."""
    job = make_attempt_job(suspended=suspended, managed_by="kueue.x-k8s.io/multikueue", parallelism=2)

    decision = ask(starting(9999, now), [job], [], spec={"scheduling": {"queueName": "q"}})

    assert decision.status.phase == "Queued"
    assert decision.status.attempts[0].reason is None
    assert "spec.managedBy of job-a0 is kueue.x-k8s.io/multikueue" in decision.status.message


NEVER, EARLIER = None, "2026-01-31T11:54:00Z"


@pytest.mark.parametrize(
    ("annotated", "made", "told"),
    [
        pytest.param(NEVER, EARLIER, EARLIER, id="the first"),
        pytest.param(EARLIER, EARLIER, None, id="the same"),
        pytest.param(EARLIER, "2026-01-31T11:58:59Z", None, id="one soon after"),
        pytest.param(EARLIER, "2026-01-31T11:59:00Z", "2026-01-31T11:59:00Z", id="one after five minutes"),
        pytest.param(EARLIER, "2026-01-31T13:59:00Z", "2026-01-31T12:00:00Z", id="of a clock that is ahead"),
        pytest.param("2026-01-31T11:59:00Z", "2026-01-31T13:59:00Z", None, id="again of that clock"),
        pytest.param(NEVER, "yesterday", None, id="no time"),
        pytest.param(NEVER, "2026-01-31T11:54:00", None, id="a time of no zone"),
        pytest.param("nonsense", EARLIER, EARLIER, id="somebody edited it"),
    ],
)
def test_the_attempts_job_says_when_the_newest_checkpoint_was_made(
    running: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    annotated: str | None,
    made: str,
    told: str | None,
) -> None:
    """At most every five minutes, whatever rank 0 reports."""
    job = make_attempt_job(ready=2, parallelism=2, checkpoint_time=aware_time(annotated))
    report = ProgressReport(
        job_uid="u", attempt=0, stage="Training", step=3, total_steps=9, epoch=0.1, updated_time=made,
        checkpoint=CheckpointRef(step=3, time=made, uri="pvc://a/b"),
    )  # fmt: skip

    decision = ask(running(), [job], progress=report)

    assert decision.actions == (() if told is None else (TellCheckpoint("job-a0", "job-uid-0", told),))
