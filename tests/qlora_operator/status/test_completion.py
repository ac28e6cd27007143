"""What comes of a Job that is complete."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from builders import JOB_UID, a_job
from qlora_operator.api.status import AdapterStatus, QLoRAJobStatus
from qlora_operator.status.actions import Decision
from qlora_operator.status.completion import exported_since
from qlora_operator.status.decision import decide
from qlora_operator.status.observation import Observation, Read, ReasonMessage

Status = Callable[..., dict[str, Any]]

NOW = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
SEEN = Observation(
    jobs_listed=True, pods=(), lost_nodes=frozenset(), warnings=(), deactivated="", feasible_tiers=("avx2",),
    image="registry.example/trainer:1",
)  # fmt: skip
START = "2026-01-31T11:00:00Z"
REMOTE = {
    "model": {"source": "hf://org/model"},
    "dataset": {"source": "s3://bucket/data.jsonl"},
    "output": {"destination": "s3://bucket/adapters"},
}
TRANSFERS = pytest.mark.parametrize("stage", ["fetch", "publish"])


@pytest.mark.parametrize(
    ("stage", "words", "reason"),
    [
        ("fetch", "", "TransferFailed"),
        ("fetch", "Traceback: what a library wrote", "TransferFailed"),
        ("fetch", '{"version": 1, "exitCode": 0, "reason": "DONE", "cause": ""}', "TransferFailed"),
        (
            "fetch",
            '{"version": 1, "exitCode": 0, "reason": "DONE", "cause": "", "fetched": {}}',
            "TransferFailed",
        ),
        (
            "fetch",
            '{"version": 1, "exitCode": 0, "reason": "DONE", "cause": "", "fetched": {"model": "..", "dataset": "d"}}',
            "TransferFailed",
        ),
        (
            "fetch",
            '{"version": 1, "exitCode": 17, "reason": "X", "cause": "", "fetched": {"model": "m", "dataset": "d"}}',
            "TransferFailed",
        ),
        (
            "fetch",
            '{"version": 1, "exitCode": 0, "reason": "DONE", "cause": "", "fetched": {"model": "m", "dataset": "d"}}',
            "Fetched",
        ),
        ("publish", "", "TransferFailed"),
        ("publish", '{"version": 1, "exitCode": 0, "reason": "DONE", "cause": ""}', "TransferFailed"),
        (
            "publish",
            '{"version": 1, "exitCode": 0, "reason": "DONE", "cause": "", "publishedUri": "s3://bucket/adapters"}',
            "Succeeded",
        ),
    ],
    ids=[
        "no words",
        "other words",
        "nothing of a fetch",
        "no revision",
        "a revision that is a path",
        "a report of a failure",
        "a report",
        "no words of an upload",
        "nothing of an upload",
        "a report of an upload",
    ],
)
def test_a_transfer_is_done_when_it_says_what_it_did(
    transferring: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    make_pod: Any,
    stage: str,
    words: str,
    reason: str,
) -> None:
    """Ended well is not enough: without its report nobody knows what the sources stand for, or where the copy is."""
    pods = [make_pod(0, phase="Succeeded", node="n", exit_code=0, termination_message=words)]

    status = ask(transferring(stage), [make_attempt_job(complete=True)], pods, spec=REMOTE, tiers=[]).status

    assert status.attempts[0].reason == reason
    assert status.restarts.user == (1 if reason == "TransferFailed" else 0)
    assert (status.phase == "Succeeded") == (reason == "Succeeded")


@TRANSFERS
def test_a_transfer_whose_pod_was_removed_unread_is_repeated_at_no_cost_to_the_user(
    transferring: Status, ask: Callable[..., Decision], make_attempt_job: Any, stage: str
) -> None:
    """Housekeeping of pods that have ended, or their node's end, is not the job's doing."""
    spec = {**REMOTE, "backoffLimit": 0}

    status = ask(transferring(stage), [make_attempt_job(complete=True)], [], spec=spec, tiers=[]).status

    assert (status.attempts[0].reason, status.phase) == ("Disrupted", "Restarting")
    assert (status.restarts.user, status.restarts.infrastructure) == (0, 1)


@TRANSFERS
def test_a_transfer_is_not_judged_before_its_report_was_looked_for(
    transferring: Status, ask: Callable[..., Decision], make_attempt_job: Any, stage: str
) -> None:
    """A transfer that is done has an end only once its pod was read."""
    decision = ask(transferring(stage), [make_attempt_job(complete=True)], None, spec=REMOTE)

    assert decision.reads == {Read.PODS}
    assert decision.status.attempts[0].reason is None
    assert (decision.actions, decision.events) == ((), ())


FOUND = {"model": "m", "dataset": "d"}
TOLD = "train.jsonl (a JSONL file): training: 12 records"


def _words(code: int = 0, cause: str = "", **report: Any) -> str:
    return json.dumps({"version": 1, "exitCode": code, "reason": "X", "cause": cause, **report})


@pytest.mark.parametrize(
    ("words", "complete", "reason", "checked", "says"),
    [
        pytest.param(_words(data=TOLD), True, "Fetched", ("True", "DataSampled", TOLD), TOLD, id="good"),
        pytest.param(
            _words(11, "d.jsonl: line 3 is not JSON"), True, "InvalidData",
            ("False", "InvalidData", "line 3 is not JSON"), "ranks could not use them: d.jsonl: line 3", id="bad",
        ),
        pytest.param(
            _words(12, "no chat template"), True, "ModelUnusable", None, "no chat template", id="another cause"
        ),
        pytest.param(
            _words(1, "nothing was found out within 300 s"), True, "Fetched", None,
            "not checked before the ranks read them: nothing was found out", id="nothing found out",
        ),
        pytest.param(
            "No module named qlora_trainer.check", False, "Fetched", None,
            "not checked before the ranks read them: the container check failed", id="an image that cannot look",
        ),
        pytest.param("", False, "Fetched", None, "the container check failed", id="killed"),
        pytest.param("", True, "Fetched", None, "the remote sources are in the workspace", id="nobody looked"),
    ],
)  # fmt: skip
def test_what_was_found_of_the_data_decides_whether_ranks_start(
    transferring: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    make_pod: Any,
    words: str,
    complete: bool,
    reason: str,
    checked: tuple[str, str, str] | None,
    says: str,
) -> None:
    """Data that no rank could use fail the job, good ones are told in the condition, and where nothing was found out
    the ranks find out: also where the Job failed by that alone. The sources are known in any case."""
    pod = make_pod(
        0,
        phase="Succeeded" if complete else "Failed",
        node="n",
        exit_code=0,
        termination_message=_words(fetched=FOUND),
        check_message=words,
    )
    failing = None if complete else ReasonMessage("BackoffLimitExceeded", "")
    batch_job = make_attempt_job(complete=complete, failed=not complete, failing=failing)

    decision = ask(transferring("fetch"), [batch_job], [pod], spec=REMOTE, tiers=[])

    status = decision.status
    assert status.attempts[0].reason == reason
    assert says in status.attempts[0].message
    assert (status.phase == "Failed") == (reason != "Fetched")
    assert (status.provenance.model_revision, status.provenance.dataset_revision) == ("m", "d")
    assert (status.restarts.user, status.restarts.infrastructure) == (0, 0)
    found = [each for each in status.conditions if each.type == "DataChecked"]
    assert [(each.status, each.reason) for each in found] == ([checked[:2]] if checked else [])
    assert not checked or checked[2] in found[0].message
    assert decision.events[0].reason == reason  # then that no node is there for the ranks


def test_a_fetch_that_fails_is_judged_by_its_own_end(
    transferring: Status, ask: Callable[..., Decision], make_attempt_job: Any, make_pod: Any
) -> None:
    """Whatever the container beside it says, which has seen nothing."""
    pod = make_pod(
        0,
        phase="Failed",
        node="n",
        exit_code=32,
        termination_message=_words(32, "bucket: 503"),
        check_message=_words(1, "the sources were not fetched"),
    )
    failing = ReasonMessage("PodFailurePolicy", "")

    status = ask(
        transferring("fetch"), [make_attempt_job(failed=True, failing=failing)], [pod], spec=REMOTE, tiers=[]
    ).status

    assert status.attempts[0].reason == "TransferFailed"
    assert "bucket: 503" in status.attempts[0].message


FORMATS = {"formats": ["merged", "gguf"]}


@pytest.mark.parametrize(
    ("output", "reason", "words"),
    [
        pytest.param(FORMATS, "Succeeded", "the exports are made", id="nowhere to send them"),
        pytest.param(
            {**FORMATS, "destination": "s3://bucket/adapters"},
            "Exported",
            "the adapter is in pvc://team/work/jobs/job/adapter; it is sent to s3://bucket/adapters next",
            id="they are sent next",
        ),
    ],
)
def test_an_export_is_done_when_its_job_is(
    transferring: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    output: dict[str, Any],
    reason: str,
    words: str,
) -> None:
    """Its pod needs to say nothing: it ends well only when everything is made and proven."""
    before = transferring("export")

    status = ask(before, [make_attempt_job(complete=True)], [], spec={**REMOTE, "output": output}).status

    assert (status.attempts[0].reason, status.attempts[0].message) == (reason, words)
    assert status.adapter.exports == ["merged", "gguf-q8_0"]
    assert (status.phase == "Succeeded") == (reason == "Succeeded")


def test_ranks_that_are_done_leave_their_nodes_before_the_export(
    running: Status, ask: Callable[..., Decision], make_attempt_job: Any, make_pod: Any
) -> None:
    """The attempt ends, at no cost; the next one is the export."""
    pods = [make_pod(0, phase="Succeeded", node="n", exit_code=0)]

    status = ask(running(), [make_attempt_job(complete=True)], pods, spec={"output": FORMATS}).status

    assert status.attempts[0].reason == "Trained"
    assert "merged, gguf-q8_0 of it are made next" in status.attempts[0].message
    assert status.adapter.exports is None
    assert (status.restarts.user, status.restarts.infrastructure) == (0, 0)
    assert status.phase != "Succeeded"


def test_a_failed_export_leaves_the_adapter_in_the_status(
    transferring: Status, ask: Callable[..., Decision], make_attempt_job: Any, make_pod: Any
) -> None:
    """The job fails by what it was asked for; what it trained is there."""
    words = json.dumps({"version": 1, "exitCode": 12, "reason": "MODEL_UNUSABLE", "cause": "no merge"})
    pods = [make_pod(0, phase="Failed", node="n", exit_code=12, termination_message=words)]
    message = (
        "Container trainer for pod ns/job-a0-0 failed with exit code 12 matching FailJob rule at index 1"
    )
    job = make_attempt_job(failing=ReasonMessage("PodFailurePolicy", message), failing_since=NOW)

    status = ask(transferring("export"), [job], pods, spec={"output": FORMATS}).status

    assert (status.phase, status.attempts[0].reason) == ("Failed", "ModelUnusable")
    assert status.adapter.uri == "pvc://team/work/jobs/job/adapter"


def test_a_source_keeps_the_revision_that_was_found_first(
    transferring: Status, ask: Callable[..., Decision], make_attempt_job: Any, make_pod: Any
) -> None:
    """A second fetch, for the other source, does not move the first one, whatever it says."""
    found = {"model": "newer", "dataset": "d0d0"}
    words = json.dumps({"version": 1, "exitCode": 0, "reason": "DONE", "cause": "", "fetched": found})
    pods = [make_pod(0, phase="Succeeded", node="n", exit_code=0, termination_message=words)]
    before = transferring("fetch", provenance={"modelRevision": "c0ffee", "seed": 7})

    status = ask(before, [make_attempt_job(complete=True)], pods, spec=REMOTE, tiers=[]).status

    assert status.attempts[0].reason == "Fetched"
    known = status.provenance.model_dump(by_alias=True, exclude_none=True)
    assert known == {"modelRevision": "c0ffee", "datasetRevision": "d0d0", "seed": 7}


@pytest.mark.parametrize(
    ("said", "known", "exports"),
    [
        pytest.param(None, None, None, id="nothing"),
        pytest.param("gguf-q8_0", None, ["gguf-q8_0"], id="the first"),
        pytest.param("gguf-q8_0,merged", ["merged"], ["merged", "gguf-q8_0"], id="one more"),
        pytest.param("merged", ["merged"], ["merged"], id="made again"),
        pytest.param("adapter,../x,gguf-q2_k,", None, None, id="nothing that is a form"),
    ],
)
def test_a_finished_jobs_status_names_what_was_exported_since(
    said: str | None, known: list[str] | None, exports: list[str] | None
) -> None:
    """As `kubectl qlora export` says in an annotation, which anybody may write who may change the job."""
    annotations = {} if said is None else {"qlora.dev/exported": said}
    job = a_job(metadata={"namespace": "team", "uid": JOB_UID, "annotations": annotations})

    adapter = exported_since(job, AdapterStatus(uri="pvc://team/a", exports=known))

    assert (adapter.uri, adapter.exports) == ("pvc://team/a", exports)


@pytest.mark.parametrize(("finished", "exports"), [(True, ["merged"]), (False, None)])
def test_only_a_finished_job_takes_exports_over(finished: bool, exports: list[str] | None) -> None:
    """Those of a job that is not are made by its own attempt, which its stage is decided by."""
    done = {
        "type": "Finished",
        "status": "True",
        "reason": "Succeeded",
        "message": "",
        "lastTransitionTime": START,
    }
    metadata = {"namespace": "team", "uid": JOB_UID, "annotations": {"qlora.dev/exported": "merged"}}
    status = {"adapter": {"uri": "pvc://team/a"}, "conditions": [done] if finished else []}
    job = a_job(metadata=metadata).model_copy(update={"status": QLoRAJobStatus.model_validate(status)})

    decision = decide(job, SEEN, NOW)

    assert decision.status.adapter is not None
    assert decision.status.adapter.exports == exports
