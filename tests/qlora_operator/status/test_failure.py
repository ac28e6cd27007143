"""Why a Job failed."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_contract.exit_codes import COLLATERAL, PERMANENT, ExitCode
from qlora_contract.run_config import RunStage
from qlora_operator.api.names import Reason
from qlora_operator.api.status import RANKS_SHOWN
from qlora_operator.status.checks import Budget
from qlora_operator.status.failure import (
    DISRUPTIONS,
    EXIT_REASONS,
    MORE_MEMORY,
    SETTLE_SECONDS,
    Evidence,
    below_tier,
    classify,
    disruption,
    evidence_deadline,
    exit_codes,
    termination_report,
)
from qlora_operator.status.observation import AttemptJob, Pod, ReasonMessage

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
BARE = "Job has reached the specified backoff limit"


def failing(pods: Sequence[Pod], message: str = BARE, **facts: Any) -> Evidence:
    """The Job of attempt 0, which fails, and its pods; the node `lost` does not respond."""
    reason = "BackoffLimitExceeded" if message == BARE else "PodFailurePolicy"
    why = ReasonMessage(reason, message)
    job = AttemptJob("job-a0", "g", 0, controlled=True, failing=why, failing_since=NOW)
    return Evidence(job, pods, {"lost"}, **facts)


def pod(index: int = 0, code: int | None = None, **facts: object) -> Pod:
    """A pod of it, over when it has an exit code."""
    phase = "Running" if code is None else "Failed"
    made = Pod(f"p{index}", f"u{index}", 0, index, phase, node=f"n{index}", exit_code=code)
    return replace(made, **facts)  # type: ignore[arg-type]


def exited(code: int, name: str = "p0") -> str:
    """What the Job controller says of a pod that a rule matched."""
    return (
        f"Container trainer for pod ns/{name} failed with exit code {code} matching FailJob rule at index 1"
    )


TAKEN = "Pod ns/p0 has condition DisruptionTarget matching FailJob rule at index 0"
OUT_OF_MEMORY = (
    "was killed at its memory limit: raise topology.memoryPerRank, or lower training.microBatchTokens or "
    "training.maxSequenceLength, in another job"
)
DELETED = {"deleting_since": NOW}
OOM = {"termination_reason": "OOMKilled"}
EVICTED = {"disruption": ReasonMessage("TerminationByKubelet", "The node was low on resource: memory.")}
REFUSED = {"phase": "Failed", "status_reason": ReasonMessage("OutOfcpu", "Pod was rejected: no CPU")}


@pytest.mark.parametrize(
    ("said", "pods", "reason", "budget", "message"),
    [
        (exited(10), [], Reason.INVALID_CONFIGURATION, Budget.PERMANENT, "pod p0 exited with code 10"),
        (exited(137), [], Reason.KILLED, Budget.USER, "pod p0 was killed by signal 9"),
        (exited(128), [], Reason.UNEXPECTED_ERROR, Budget.USER, "pod p0 exited with code 128"),
        (
            exited(137),
            [pod(0, 137, termination_message="step 9\nstep 10\n")],
            Reason.KILLED,
            Budget.USER,
            "pod p0 on node n0 was killed by signal 9: step 10",
        ),
        (
            exited(137),
            [pod(0, 137, **DELETED)],
            Reason.TERMINATED,
            Budget.INFRASTRUCTURE,
            "pod p0 on node n0 was deleted, and killed at the end of its grace period",
        ),
        (
            exited(1),
            [pod(0, 1, **OOM)],
            Reason.OUT_OF_MEMORY,
            Budget.PERMANENT,
            f"pod p0 on node n0 {OUT_OF_MEMORY}",
        ),
        (TAKEN, [], Reason.DISRUPTED, Budget.INFRASTRUCTURE, "pod p0 was disrupted"),
        (
            TAKEN,
            [pod(0, 137, **EVICTED)],
            Reason.EVICTED,
            Budget.INFRASTRUCTURE,
            "pod p0 on node n0 was ended by its node's kubelet: The node was low on resource: memory.",
        ),
        (
            BARE,
            [],
            Reason.PEER_LOST,
            Budget.INFRASTRUCTURE,
            f"a pod of job-a0 failed and left no trace: {BARE}",
        ),
        (
            BARE,
            [pod(0, 40, termination_message="rank 1 on h is silent"), pod(1, 137, **DELETED)],
            Reason.PEER_LOST,
            Budget.INFRASTRUCTURE,
            "pod p0 on node n0 lost a peer: rank 1 on h is silent",
        ),
        (
            BARE,
            [pod(0, 41), pod(1, 50, **DELETED)],
            Reason.PEER_LOST,
            Budget.INFRASTRUCTURE,
            "pod p0 on node n0 lost a peer",
        ),
        (
            BARE,
            [pod(0, 40), pod(1, 137, **DELETED, **OOM)],
            Reason.OUT_OF_MEMORY,
            Budget.PERMANENT,
            f"pod p1 on node n1 {OUT_OF_MEMORY}",
        ),
        (
            BARE,
            [pod(0, 40), pod(1, 11, **DELETED)],
            Reason.INVALID_DATA,
            Budget.PERMANENT,
            "pod p1 on node n1 exited with code 11",
        ),
        (
            BARE,
            [pod(0, 143), pod(1, 0)],
            Reason.TERMINATED,
            Budget.INFRASTRUCTURE,
            "pod p0 on node n0 was killed by signal 15",
        ),
        (
            BARE,
            [pod(0, 40), pod(1, **EVICTED)],
            Reason.EVICTED,
            Budget.INFRASTRUCTURE,
            "pod p1 on node n1 was ended by its node's kubelet: The node was low on resource: memory.",
        ),
        (
            BARE,
            [pod(0, 143), pod(1, **REFUSED)],
            Reason.ADMISSION_REJECTED,
            Budget.INFRASTRUCTURE,
            "the kubelet of node n1 refused pod p1: OutOfcpu: Pod was rejected: no CPU",
        ),
        (
            BARE,
            [pod(0, 40), pod(1, node="lost")],
            Reason.NODE_LOST,
            Budget.INFRASTRUCTURE,
            "node lost of pod p1 does not answer",
        ),
    ],
    ids=[
        "gone",
        "gone-killed",
        "not-started",
        "last-line",
        "grace-over",
        "oom-killed",
        "gone-disrupted",
        "evicted",
        "no-trace",
        "peer-killed-after-deletion",
        "peer-stopped-after-deletion",
        "peer-oom-killed",
        "peer-failed",
        "stopped",
        "peer-evicted",
        "refused",
        "peer-on-lost-node",
    ],
)
def test_a_job_and_its_pods_tell_one_cause(
    said: str, pods: Sequence[Pod], reason: Reason, budget: Budget, message: str
) -> None:
    """A Job's words and its pods' states give one reason, one budget and one sentence."""
    end = classify(failing(pods, said))
    assert (end.reason, end.budget, end.message) == (reason, budget, message)


@pytest.mark.parametrize("stage", ["fetch", "train", "publish"])
def test_a_pod_killed_at_its_memory_limit_is_told_what_helps_it(stage: RunStage) -> None:
    """The user sets what ranks may use, and the administrator what transfers may."""
    end = classify(failing([pod(0, 137, **OOM)], exited(137), stage=stage))

    assert end.message == f"pod p0 on node n0 was killed at its memory limit: {MORE_MEMORY[stage]}"
    assert ("administrator" in end.message) == (stage != "train")


@pytest.mark.parametrize("code", [code for code in ExitCode if code != ExitCode.DONE])
def test_every_code_has_a_reason(code: ExitCode) -> None:
    """Every code of the contract has a reason of its own; the permanent ones are never retried."""
    reason, budget = EXIT_REASONS[code]
    assert classify(failing([pod(0, code)], exited(code))).reason == reason
    assert (budget == Budget.PERMANENT) == (code in PERMANENT)


@pytest.mark.parametrize("why", DISRUPTIONS)
def test_a_pod_that_is_taken_away_ends_its_attempt(why: str) -> None:
    """A pod that is being taken away ends its attempt before the Job knows, and says by whom."""
    taken = pod(1, disruption=ReasonMessage(why, "so it was"))
    end = disruption([pod(0), taken])
    assert end is not None
    assert (end.reason, end.budget) == (DISRUPTIONS[why][0], Budget.INFRASTRUCTURE)
    assert end.message.startswith("pod p1 on node n1 was ")
    assert end.message.endswith(": so it was")


def test_pods_that_run_end_nothing() -> None:
    """Pods that only run end nothing."""
    assert disruption([pod(0), pod(1)]) is None


@given(st.permutations([pod(0, 40), pod(1, 41), pod(2, 143), pod(3, 12, **DELETED)]))
def test_the_order_of_pods_does_not_matter(pods: list[Pod]) -> None:
    """The cause does not depend on the order in which the pods are listed."""
    end = classify(failing(pods))
    assert end.message == "pod p3 on node n3 exited with code 12"
    assert end.exit_codes == (12, 40, 41, 143)


@pytest.mark.parametrize(
    ("said", "pods", "waits"),
    [
        (BARE, [pod(0, 40), pod(1)], True),
        (BARE, [pod(0, 143), pod(1, **DELETED)], True),
        (BARE, [pod(0, 40), pod(1, 40)], False),
        (BARE, [], False),
        (BARE, [pod(0, 40), pod(1, 11), pod(2)], False),
        (BARE, [pod(0, 40), pod(1, node="lost")], False),
        (exited(11), [pod(0, 11), pod(1)], False),
        (TAKEN, [pod(1)], False),
    ],
    ids=["peer", "stopped", "all-over", "all-gone", "told", "lost", "rule", "disrupted"],
)
def test_pods_that_may_yet_tell_are_waited_for(said: str, pods: Sequence[Pod], waits: bool) -> None:
    """Only a Job that nobody explains waits, for a bounded time, and only for pods that may yet tell."""
    expected = NOW + timedelta(seconds=SETTLE_SECONDS) if waits else None
    assert evidence_deadline(failing(pods, said)) == expected


def test_exit_codes_are_distinct_sorted_and_capped() -> None:
    """Codes are told once, in order, with those that were known before; no more than the status takes."""
    assert exit_codes([pod(0, 40), pod(1, 10), pod(2, 40), pod(3)], [143]) == (10, 40, 143)
    assert len(exit_codes([], range(200))) == RANKS_SHOWN


def test_codes_of_a_rule_are_kept() -> None:
    """The code that the Job names is among the attempt's even when its pod is gone."""
    assert classify(failing([pod(1, 40)], exited(10))).exit_codes == (10, 40)


def test_nodes_below_their_tier_are_named_once() -> None:
    """The nodes whose ranks found less than the labels promise, each once."""
    found = [pod(0, 51), pod(1, 40), pod(2, 51, node="n0"), pod(3, 51, node=None)]
    assert below_tier(found) == ["n0"]


@pytest.mark.parametrize(
    ("words", "known"),
    [
        (json.dumps({"version": 1, "exitCode": 1, "reason": "X", "cause": "no room"}), True),
        (json.dumps({"version": 1, "exitCode": 1, "reason": "X", "cause": "no room", "newer": 1}), True),
        (json.dumps({"version": 2, "exitCode": 1, "reason": "X", "cause": "no room"}), False),
        ("Traceback (most recent call last):", False),
        ("", False),
    ],
    ids=["report", "newer-field", "other-version", "log", "nothing"],
)
def test_reports_are_read_leniently(words: str, known: bool) -> None:
    """The trainer's report is read, one with fields that this operator does not know as well."""
    found = termination_report(pod(0, 1, termination_message=words))
    assert (found is not None) == known
    assert found is None or found.cause == "no room"


@given(st.sampled_from(sorted(COLLATERAL)), st.text(max_size=3000))
def test_a_message_fits_into_an_event(code: int, words: str) -> None:
    """Whatever a pod says, the sentence fits into an Event."""
    for said in (BARE, exited(code)):
        assert len(classify(failing([pod(0, code, termination_message=words)], said)).message) <= 1024
