"""Every way in which an attempt can end early: its reason, its sentence, its price, and what follows."""

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.cluster

Object = dict[str, Any]

LINE = "part-3.jsonl line 7 has no messages"
WAITS = {"Running", "Unschedulable", "VolumeNotReady"}
"""Reasons of Events that tell of pods which start, or of the scheduler of a cluster without volumes."""

USER, INFRASTRUCTURE, PERMANENT = "user", "infrastructure", "permanent"

CODES = {
    1: ("UnexpectedError", USER),
    10: ("InvalidConfiguration", PERMANENT),
    11: ("InvalidData", PERMANENT),
    12: ("ModelUnusable", PERMANENT),
    13: ("Diverged", PERMANENT),
    14: ("StorageFull", PERMANENT),
    15: ("OutOfMemory", PERMANENT),
    16: ("NoImprovement", PERMANENT),
    30: ("RendezvousFailed", USER),
    31: ("Stalled", USER),
    50: ("Terminated", INFRASTRUCTURE),
    51: ("IsaBelowTier", INFRASTRUCTURE),
    77: ("UnexpectedError", USER),
    137: ("Killed", USER),
    139: ("Killed", USER),
}
"""What each exit code of one rank means: those of the contract, one that nobody knows, and two signals."""
COLLATERAL = {40: "PeerLost", 41: "PeerLost", 143: "Terminated"}


@pytest.fixture
def job(shared_operator: Any, make_job: Callable[..., Any]) -> Callable[..., Any]:
    """job(name="job", pods=2, **spec) -> a job whose ranks all run, and its pods."""

    def make(name: str = "job", pods: int = 2, **spec: Any) -> tuple[Any, list[Object]]:
        made = make_job(name, topology={"pods": pods}, **spec)
        return made, made.run(count=pods)

    return make


def words(code: int, cause: str = LINE) -> str:
    """A termination message of the trainer's launcher."""
    return json.dumps({"version": 1, "exitCode": code, "reason": "X", "cause": cause, "rank": 1, "host": "h"})


def fails(job: Any, pod: Object, code: int, **how: Any) -> None:
    """A pod ends with a code; a deleted one also goes."""
    ended = job.kubelet.failed(pod, code, **{"message": words(code), **how})
    if "deletionTimestamp" in ended["metadata"]:
        job.kubelet.finish_termination(ended)


def until_failing(job: Any, attempt: int = 0) -> None:
    """The Job controller has given up the attempt's Job."""
    job.until_gang(attempt, lambda gang: {"FailureTarget", "Failed"} & true_conditions(gang))


def true_conditions(raw: Object) -> set[str]:
    """The conditions that hold."""
    return {each["type"] for each in raw["status"].get("conditions", []) if each["status"] == "True"}


def ends(job: Any, reason: str, budget: str, *said: str, code: int | None = None) -> Object:
    """Checks the one end of attempt 0: reason, sentence, exit codes, price and Event; gives the status."""
    if budget == PERMANENT:
        status = job.until(lambda status: status.get("phase") == "Failed" and status["attempts"][0].get("end"))
        told, restarts = job.condition("Failed"), {"user": 0, "infrastructure": 0}
        assert job.condition("Finished")["status"] == "True"
        assert status["message"] == told["message"]
        assert job.kubelet.client.items(f"/api/v1/namespaces/{job.namespace}/pods"), "its last pods are kept"
    else:
        status = job.until(lambda status: status.get("attempt") == 1)
        told, restarts = job.condition("Restarting"), {"user": 0, "infrastructure": 0, budget: 1}
    first = status["attempts"][0]
    assert (told["reason"], told["status"]) == (reason, "True")
    assert (first["reason"], first["message"]) == (reason, told["message"])
    assert status["restarts"] == restarts
    assert [part for part in said if part not in told["message"]] == [], told["message"]
    assert code is None or code in first["exitCodes"]
    job.until_event(reason)
    posted = [each for each in job.events() if each["reason"] not in WAITS]
    assert [(each["reason"], each["type"], each["message"]) for each in posted] == [
        (reason, "Warning", told["message"])
    ]
    return status


# --- exit codes


@pytest.mark.parametrize("code", CODES)
def test_code(job: Callable[..., Any], code: int) -> None:
    """An exit code says why an attempt ended, alone and before those of ranks that only follow."""
    reason, budget = CODES[code]
    alone, [single] = job("alone", 1)
    first, pods = job("first", 4)
    fails(alone, single, code)
    fails(first, pods[1], code)
    until_failing(first)
    for pod, other in zip((pods[0], *pods[2:]), COLLATERAL, strict=True):
        fails(first, pod, other, message=words(other, "lost rank 1"))
    ends(alone, reason, budget, f"pod {single['metadata']['name']} on node played-node", LINE, code=code)
    ends(first, reason, budget, f"pod {pods[1]['metadata']['name']} on node played-node", LINE, code=code)


@pytest.mark.parametrize("code", CODES)
def test_code_after_collateral(job: Callable[..., Any], code: int) -> None:
    """The pod that is the cause is named even if it is reported last; one that was told to stop is no cause."""
    made, pods = job(pods=4)
    fails(made, pods[0], 40, message=words(40, "lost rank 1"))
    until_failing(made)
    fails(made, pods[2], 41, message=words(41, "lost rank 1"))
    fails(made, pods[3], 143, message="")
    made.kubelet.failed(pods[1], code, message=words(code))
    obeyed = code in (50, 137)  # as after the deletion that the Job controller began
    reason, budget = ("PeerLost", INFRASTRUCTURE) if obeyed else CODES[code]
    made.until(lambda status: status["attempts"][0].get("reason"))
    made.kubelet.finish_termination(pods[1])
    ends(made, reason, budget, pods[0 if obeyed else 1]["metadata"]["name"], code=code)


@pytest.mark.parametrize("code", COLLATERAL)
def test_collateral_alone(job: Callable[..., Any], code: int) -> None:
    """A pod that only left with others costs the infrastructure's budget when no other pod tells more."""
    made, [pod] = job(pods=1)
    fails(made, pod, code)
    ends(made, COLLATERAL[code], INFRASTRUCTURE, pod["metadata"]["name"], LINE, code=code)
