"""What comes of a Job that is complete."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from qlora_operator.status.actions import Decision
from qlora_operator.status.observation import Read

Status = Callable[..., dict[str, Any]]

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
