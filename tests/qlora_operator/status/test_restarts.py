"""What the end of an attempt costs."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from qlora_operator.status.actions import Decision
from qlora_operator.status.observation import ReasonMessage

Status = Callable[..., dict[str, Any]]

START = "2026-01-31T11:00:00Z"


@pytest.mark.parametrize(
    ("limits", "used", "code", "phase", "after"),
    [
        pytest.param((3, 20), (0, 0), 1, "Restarting", (1, 0), id="the user's first"),
        pytest.param((3, 20), (2, 20), 1, "Restarting", (3, 20), id="the user's last"),
        pytest.param((3, 20), (3, 0), 1, "Failed", (3, 0), id="one too many of the user's"),
        pytest.param((3, 20), (3, 0), 50, "Restarting", (3, 1), id="the infrastructure's own budget"),
        pytest.param((3, 20), (0, 20), 50, "Failed", (0, 20), id="one too many of the infrastructure's"),
        pytest.param((0, 0), (0, 0), 50, "Failed", (0, 0), id="no restarts at all"),
        pytest.param((1, 20), (3, 0), 1, "Failed", (3, 0), id="the limit was lowered"),
        pytest.param((3, 20), (0, 0), 10, "Failed", (0, 0), id="no use trying again"),
    ],
)
def test_an_end_costs_a_restart_or_the_job(
    running: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    make_pod: Any,
    limits: tuple[int, int],
    used: tuple[int, int],
    code: int,
    phase: str,
    after: tuple[int, int],
) -> None:
    """An end costs one restart of its budget while there is one, and else the job."""
    said = f"Container trainer for pod team/job-a0-0 failed with exit code {code} matching FailJob rule"
    attempt_job = make_attempt_job(
        parallelism=2, failing=ReasonMessage("PodFailurePolicy", said), failed=True
    )
    pods = [make_pod(0, phase="Failed", node="n", exit_code=code)]
    status = running() | {"restarts": {"user": used[0], "infrastructure": used[1]}}
    spec = {"backoffLimit": limits[0], "infrastructureBackoffLimit": limits[1]}

    # Without nodes no attempt follows in the same breath.
    found = ask(status, [attempt_job], pods, spec=spec, tiers=[]).status

    assert (found.restarts.user, found.restarts.infrastructure) == after
    assert found.phase == phase
    assert found.attempts[0].exit_codes == [code]


@pytest.mark.parametrize(
    ("code", "told", "limit", "phase", "after"),
    [
        pytest.param(50, 40, 20, "Restarting", (20, 21, 20), id="it got on: those before are forgiven"),
        pytest.param(50, 30, 20, "Failed", (20, 20, 0), id="it did not"),
        pytest.param(50, None, 20, "Failed", (20, 20, 0), id="nobody knows"),
        pytest.param(50, 40, 0, "Failed", (20, 20, 0), id="no restarts at all"),
        pytest.param(1, 40, 20, "Failed", (20, 20, 0), id="the user's are not forgiven"),
    ],
)
def test_the_clusters_restarts_are_forgiven_to_a_job_that_gets_on(
    running: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    make_pod: Any,
    code: int,
    told: int | None,
    limit: int,
    phase: str,
    after: tuple[int, int, int],
) -> None:
    """A job of weeks on nodes that come and go is not given up while each attempt makes a new checkpoint."""
    words = json.dumps({"version": 1, "exitCode": code, "reason": "X", "cause": "x", "checkpointStep": told})
    said = f"Container trainer for pod team/job-a1-0 failed with exit code {code} matching FailJob rule"
    failing = {"failing": ReasonMessage("PodFailurePolicy", said), "failed": True}
    earlier = {"attempt": 0, "start": START, "end": START, "reason": "Drained", "checkpointStep": 30}
    known = running()
    attempts = [earlier, {**known["attempts"][0], "attempt": 1, "jobUid": "job-uid-1"}]
    restarts = {"restarts": {"user": 20, "infrastructure": 20}}
    pods = [make_pod(0, 1, phase="Failed", node="n", exit_code=code, termination_message=words)]

    found = ask(
        {**known, "attempt": 1, "attempts": attempts, **restarts},
        [make_attempt_job(1, parallelism=2, **failing)],
        pods,
        spec={"backoffLimit": 20, "infrastructureBackoffLimit": limit},
        tiers=[],
    ).status

    assert found.phase == phase
    assert (found.restarts.user, found.restarts.infrastructure, found.restarts.forgiven or 0) == after


REMOTE = {
    "model": {"source": "hf://org/model"},
    "dataset": {"source": "s3://bucket/data.jsonl"},
    "output": {"destination": "s3://bucket/adapters"},
}
TRANSFERS = pytest.mark.parametrize("stage", ["fetch", "publish"])


def rule(code: int) -> ReasonMessage:
    """What the Job controller says of a pod that a rule matched."""
    said = f"Container trainer for pod team/job-a0-0 failed with exit code {code} matching FailJob rule at index 1"
    return ReasonMessage("PodFailurePolicy", said)


@TRANSFERS
@pytest.mark.parametrize(
    ("code", "pod", "spec", "phase", "reason", "price", "words"),
    [
        pytest.param(17, {}, {}, "Failed", "TransferRefused", (0, 0), "exited with code 17", id="refused"),
        pytest.param(
            32, {}, {}, "Restarting", "TransferFailed", (1, 0), "exited with code 32", id="broke off"
        ),
        pytest.param(
            32,
            {},
            {"backoffLimit": 0},
            "Failed",
            "TransferFailed",
            (0, 0),
            "exited with code 32; backoffLimit is 0",
            id="broke off, and may not be tried again",
        ),
        pytest.param(14, {}, {}, "Failed", "StorageFull", (0, 0), "exited with code 14", id="no space"),
        pytest.param(1, {}, {}, "Restarting", "UnexpectedError", (1, 0), "exited with code 1", id="a bug"),
        pytest.param(50, {}, {}, "Restarting", "Terminated", (0, 1), "exited with code 50", id="stopped"),
        pytest.param(
            137,
            {"termination_reason": "OOMKilled"},
            {},
            "Failed",
            "OutOfMemory",
            (0, 0),
            "the administrator sets how much a transfer has, as jobs.transfer.memory",
            id="out of memory",
        ),
        pytest.param(
            143,
            {"disruption": ReasonMessage("EvictionByEvictionAPI", "")},
            {},
            "Restarting",
            "Drained",
            (0, 1),
            "was evicted through the API, as `kubectl drain` does",
            id="drained",
        ),
    ],
)
def test_a_transfers_end_has_the_price_of_its_cause(
    transferring: Status,
    ask: Callable[..., Decision],
    make_attempt_job: Any,
    make_pod: Any,
    stage: str,
    code: int,
    pod: dict[str, Any],
    spec: dict[str, Any],
    phase: str,
    reason: str,
    price: tuple[int, int],
    words: str,
) -> None:
    """A transfer's end has the price of its cause, and the cause in words that help."""
    attempt_job = make_attempt_job(parallelism=1, failing=rule(code), failed=True)
    pods = [make_pod(0, phase="Failed", node="n", exit_code=code, **pod)]

    status = ask(transferring(stage), [attempt_job], pods, spec={**REMOTE, **spec}, tiers=[]).status

    assert (status.phase, status.attempts[0].reason) == (phase, reason)
    assert (status.restarts.user, status.restarts.infrastructure) == price
    told = f"{status.attempts[0].message}\n{status.message}"
    assert words in told
    assert "memoryPerRank" not in told


@TRANSFERS
def test_a_transfers_own_words_are_told(
    transferring: Status, ask: Callable[..., Decision], make_attempt_job: Any, make_pod: Any, stage: str
) -> None:
    """The cause that the transfer gives is what the user reads."""
    cause = "hf://org/model: no such repository, or it is private and credentialsSecret is not set"
    words = json.dumps({"version": 1, "exitCode": 17, "reason": "TRANSFER_REFUSED", "cause": cause})
    pods = [make_pod(0, phase="Failed", node="n", exit_code=17, termination_message=words)]

    decision = ask(
        transferring(stage), [make_attempt_job(failing=rule(17), failed=True)], pods, spec=REMOTE, tiers=[]
    )

    assert decision.status.message == f"pod job-a0-0 on node n exited with code 17: {cause}"
    assert [(event.type, event.reason) for event in decision.events] == [("Warning", "TransferRefused")]
