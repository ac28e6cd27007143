"""What keeps an attempt from starting, and its children from being created."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest

from qlora_contract.units import rfc3339
from qlora_operator.status import starting as checks
from qlora_operator.status.actions import Decision, DeleteAttemptJob, DeletePod, StartAttempt
from qlora_operator.status.checks import StartCheck
from qlora_operator.status.observation import ReasonMessage

Status = Callable[..., dict[str, Any]]

START = "2026-01-31T11:00:00Z"


def began(seconds: float, now: datetime) -> dict[str, Any]:
    """An attempt whose Job nobody has seen, so many seconds old."""
    return {"attempt": 0, "start": rfc3339(now - timedelta(seconds=seconds))}


def test_no_job_is_created_beside_another(
    running: Status, ask: Callable[..., Decision], make_attempt_job: Any
) -> None:
    """While another attempt's Job may make pods, this one's is not created; the other one goes."""
    status = {**running(jobUid=None), "attempt": 1}
    status["attempts"] = [{"attempt": 1, "start": START}]
    decision = ask(status, [make_attempt_job(0)], [])
    assert decision.actions == (DeleteAttemptJob("job-a0", "job-uid-0"),)


@pytest.mark.parametrize("over", [{"failed": True}, {"complete": True}], ids=["failed", "complete"])
def test_a_finished_job_is_in_nobodys_way(
    running: Status, over: dict[str, bool], ask: Callable[..., Decision], make_attempt_job: Any
) -> None:
    """A Job that will have no more pods is in nobody's way."""
    status = {**running(), "attempt": 1, "attempts": [{"attempt": 1, "start": START}]}
    actions = ask(status, [make_attempt_job(0, **over)], []).actions
    assert any(isinstance(action, StartAttempt) and action.attempt == 1 for action in actions)


@pytest.mark.parametrize(("age", "seconds"), [(0, 0.5), (1, 1), (4, 4), (60, 60), (999, 120)])
def test_children_that_cannot_be_created_are_tried_again(
    starting: Status, ask: Callable[..., Decision], now: datetime, age: float, seconds: float
) -> None:
    """Soon at first, since a job of the same name may be on its way out, then more and more rarely: thousands of jobs
    behind one quota would do nothing else."""
    decision = ask(
        starting(age, now, attempts=[began(age, now)]),
        [],
        [],
        create_error=ReasonMessage("NameConflict", "no"),
    )

    assert decision.look_at == now + timedelta(seconds=seconds)
    assert [type(action) for action in decision.actions] == [StartAttempt]
    assert decision.status.message == "no"


def test_a_job_whose_status_was_emptied_starts_nothing_beside_its_job(
    ask: Callable[..., Decision], make_attempt_job: Any
) -> None:
    """A job whose status somebody emptied starts nothing beside the Job that is there; that one goes."""
    decision = ask(None, [make_attempt_job(3)], [])
    assert decision.actions == (DeleteAttemptJob("job-a3", "job-uid-3"),)


# --- each check on its own

ENDED = {"attempt": 0, "start": START, "end": "2026-01-31T12:00:00Z", "message": "why", "reason": "Released"}
TOO_MUCH = ReasonMessage("LimitExceeded", "too much")


@pytest.mark.parametrize(
    ("check", "status", "pods", "observed", "reason", "words"),
    [
        (checks.backing_off, {"attempts": [ENDED]}, [], {}, "BackOff", "since the last ones failed: why"),
        (checks.pods_remain, {"attempts": [ENDED]}, [{}], {}, "PodsRemain", "waiting for 1 pod(s)"),
        (
            checks.pods_remain,
            {"attempts": [ENDED]},
            [{"node": "n"}],
            {"lost_nodes": frozenset("n")},
            "NodeLost",
            "does not answer",
        ),
        (checks.policy_violated, {}, [], {"policy_violation": TOO_MUCH}, "LimitExceeded", "too much"),
        (
            checks.run_config_version_differs,
            {"provenance": {"runConfigVersion": 99}},
            [],
            {},
            "InvalidSpec",
            "version 99",
        ),
        (checks.no_matching_nodes, {}, [], {"tiers": []}, "NoMatchingNodes", "0/7 nodes can"),
    ],
)
def test_each_check_finds_its_obstacle_alone(
    make_view: Callable[..., Any],
    make_pod: Any,
    now: datetime,
    check: StartCheck,
    status: dict[str, Any],
    pods: list[dict[str, Any]],
    observed: dict[str, Any],
    reason: str,
    words: str,
) -> None:
    """Whatever the other checks would find; each says when to look again."""
    blocked = check(make_view(status, [], [make_pod(**pod) for pod in pods], **observed))

    assert blocked is not None
    assert (blocked.reason, words in blocked.message) == (reason, True)
    assert blocked.look_at > now


@pytest.mark.parametrize(
    ("waited", "room", "blocked"),
    [
        pytest.param(299, {"avx512": 3}, "on 3 will do, by topology.minPods", id="not long enough"),
        pytest.param(300, {"avx512": 3}, None, id="long enough"),
        pytest.param(300, {"avx512": 1}, "0/7 nodes can", id="too few"),
        pytest.param(300, {}, "0/7 nodes can", id="unknown"),
    ],
)
def test_fewer_pods_will_do_after_a_while(
    make_view: Callable[..., Any],
    starting: Callable[..., dict[str, Any]],
    now: datetime,
    waited: float,
    room: dict[str, int],
    blocked: str | None,
) -> None:
    """Nodes for all may yet come; the message says until when they are waited for."""
    status = starting(waited, now)
    status["attempts"][0] |= {"reason": "Killed", "end": rfc3339(now)}
    spec = {"topology": {"pods": 4, "minPods": 2}}
    found = checks.no_matching_nodes(make_view(status, [], [], tiers=[], tier_pods=room, spec=spec))

    assert (found is None) == (blocked is None)
    if found is not None:
        assert blocked in found.message
        assert now < found.look_at <= now + timedelta(seconds=10)


def test_a_job_that_may_create_pods_is_waited_for_in_silence(
    make_view: Callable[..., Any], make_attempt_job: Any
) -> None:
    """It is being deleted; only its pods are worth a word."""
    blocked = checks.pods_remain(make_view({"attempt": 1, "attempts": [ENDED]}, [make_attempt_job(0)], []))

    assert blocked is not None
    assert (blocked.reason, blocked.message, blocked.actions) == (None, "", ())


def test_orphans_in_the_way_are_deleted(make_view: Callable[..., Any], make_pod: Any) -> None:
    """A pod whose Job is gone does not end by itself."""
    blocked = checks.pods_remain(make_view({"attempts": [ENDED]}, [], [make_pod()]))

    assert blocked is not None
    assert blocked.actions == (DeletePod("job-a0-0", "pod-0-0"),)


@pytest.mark.parametrize(
    ("checkpoint", "told"),
    [
        (None, None),
        ({"step": 3}, None),
        ({"step": 3, "time": START}, START),
        ({"step": 3, "time": "x"}, None),
    ],
)
def test_an_attempt_knows_the_checkpoint_that_it_goes_on_from(
    ask: Callable[..., Decision], checkpoint: dict[str, Any] | None, told: str | None
) -> None:
    """Its Job says from the start when that was made, without another request."""
    ended = {"attempt": 0, "start": START, "end": START, "reason": "Drained"}
    status = {"attempt": 0, "attempts": [ended], "placement": {"isa": "avx512"}, "checkpoint": checkpoint}

    (action,) = ask(status, [], []).actions

    assert isinstance(action, StartAttempt)
    assert action.checkpoint_time == told
