"""What is looked at: as little as the decision needs."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest

from qlora_operator.api.times import stamp
from qlora_operator.status.needs import Needs, needs
from qlora_operator.status.policies import PATIENCE

NOTHING = Needs()


def open_attempt(start: datetime, running: str = "False", **attempt: Any) -> dict[str, Any]:
    """The status of a job with an attempt that lasts."""
    said = {
        "type": "Running",
        "status": running,
        "reason": "R",
        "message": "",
        "lastTransitionTime": stamp(start),
    }
    return {
        "attempt": 0,
        "attempts": [{"attempt": 0, "start": stamp(start), **attempt}],
        "conditions": [said],
    }


def finished(status: dict[str, Any]) -> dict[str, Any]:
    """The status of a job that is over."""
    said = {"type": "Finished", "status": "True", "reason": "R", "message": "", "lastTransitionTime": "t"}
    return {**status, "conditions": [said]}


@pytest.mark.parametrize(
    ("suspend", "over", "wanted"),
    [
        pytest.param(False, False, Needs(nodes=True), id="to start: where"),
        pytest.param(True, False, NOTHING, id="suspended from birth"),
        pytest.param(False, True, NOTHING, id="failed before its first attempt"),
    ],
)
def test_before_the_first_attempt(
    make_job: Callable[..., Any], now: datetime, suspend: bool, over: bool, wanted: Needs
) -> None:
    """Only which nodes there are, and only if an attempt may start."""
    assert needs(make_job(finished({}) if over else {}, suspend=suspend), [], now) == wanted


def test_children_without_a_status(make_job: Callable[..., Any], make_gang: Any, now: datetime) -> None:
    """Where somebody emptied the status, the children tell whether an attempt may start."""
    assert needs(make_job({}), [make_gang()], now) == Needs(pods=True, fresh=True, nodes=True)


@pytest.mark.parametrize(
    ("suspend", "over", "wanted"),
    [
        pytest.param(
            False, False, Needs(pods=True, fresh=True, stuck=True, nodes=True), id="the next one starts"
        ),
        pytest.param(True, False, NOTHING, id="suspended"),
        pytest.param(False, True, NOTHING, id="finished"),
    ],
)
def test_between_attempts(
    make_job: Callable[..., Any], now: datetime, suspend: bool, over: bool, wanted: Needs
) -> None:
    """Everything that decides whether the next attempt may start; nothing if none is to."""
    status = open_attempt(now, reason="Terminated", end=stamp(now))

    assert needs(make_job(finished(status) if over else status, suspend=suspend), [], now) == wanted


@pytest.mark.parametrize(
    ("suspend", "over", "wanted"),
    [
        pytest.param(False, False, Needs(pods=True, stuck=True, nodes=True), id="another follows"),
        pytest.param(True, False, Needs(pods=True, stuck=True), id="suspended"),
        pytest.param(False, True, Needs(pods=True, stuck=True), id="finished"),
    ],
)
def test_while_an_attempt_ends(
    make_job: Callable[..., Any], now: datetime, suspend: bool, over: bool, wanted: Needs
) -> None:
    """Whether its pods go, and what the next attempt needs, since it starts with the last of them."""
    status = open_attempt(now, reason="Terminated")

    assert needs(make_job(finished(status) if over else status, suspend=suspend), [], now) == wanted


LOOK = Needs(pods=True, fresh=True, stuck=True)
ENDING = Needs(pods=True, stuck=True)


@pytest.mark.parametrize(
    ("gang", "running", "suspend", "wanted"),
    [
        pytest.param(None, "False", False, LOOK, id="the Job is not there"),
        pytest.param({"deleting": True}, "True", False, LOOK, id="the Job is being deleted"),
        pytest.param({"ours": False}, "False", False, LOOK, id="somebody else's Job"),
        pytest.param({"attempt": 7}, "False", False, LOOK, id="another attempt's Job"),
        pytest.param({"complete": True}, "True", False, ENDING, id="complete"),
        pytest.param({"failed": True}, "True", False, ENDING, id="failed"),
        pytest.param({"ready": 2}, "True", True, ENDING, id="to be suspended"),
        pytest.param({"suspended": True}, "False", False, NOTHING, id="in the queue"),
        pytest.param({"ready": 2}, "True", False, NOTHING, id="all run"),
        pytest.param({"ready": 1}, "True", False, ENDING, id="one is not ready any more"),
        pytest.param({"ready": 2}, "False", False, Needs(pods=True), id="all are up just now"),
        pytest.param({"ready": 1}, "False", False, NOTHING, id="not all up, but soon"),
    ],
)
def test_while_an_attempt_lasts(
    make_job: Callable[..., Any],
    make_gang: Any,
    now: datetime,
    gang: dict[str, Any] | None,
    running: str,
    suspend: bool,
    wanted: Needs,
) -> None:
    """A gang that does well costs no request."""
    gangs = [] if gang is None else [make_gang(**gang)]

    assert needs(make_job(open_attempt(now, running), suspend=suspend), gangs, now) == wanted


WHY = Needs(pods=True, nodes=True, warnings=True)


@pytest.mark.parametrize(
    ("age", "spec", "wanted"),
    [
        pytest.param(PATIENCE - timedelta(seconds=1), {}, NOTHING, id="has just begun"),
        pytest.param(PATIENCE, {}, WHY, id="takes its time"),
        pytest.param(
            timedelta(seconds=1), {"pendingDeadlineSeconds": 1}, WHY, id="the deadline's message asks"
        ),
        pytest.param(timedelta(seconds=1), {"pendingDeadlineSeconds": 2}, NOTHING, id="before the deadline"),
    ],
)
def test_why_pods_do_not_start(
    make_job: Callable[..., Any], make_gang: Any, now: datetime, age: timedelta, spec: Any, wanted: Needs
) -> None:
    """Nobody asks why pods are not up before they had a chance, or a deadline is due."""
    assert needs(make_job(open_attempt(now - age), **spec), [make_gang(ready=1)], now) == wanted


def test_in_a_rush_pods_get_longer(make_job: Callable[..., Any], make_gang: Any, now: datetime) -> None:
    """Nobody asks why pods are not up before the time that they may take has passed."""
    long = timedelta(seconds=30)

    asked = [
        needs(make_job(open_attempt(now - age)), [make_gang(ready=1)], now, long)
        for age in (long - timedelta(seconds=1), long)
    ]
    assert asked == [NOTHING, WHY]


@pytest.mark.parametrize("stage", ["fetch", "publish"])
@pytest.mark.parametrize(
    ("gang", "running", "wanted"),
    [
        pytest.param({"ready": 1}, "True", NOTHING, id="it runs"),
        pytest.param({"ready": 0}, "True", ENDING, id="it is not ready any more"),
        pytest.param({"ready": 1}, "False", Needs(pods=True), id="it is up just now"),
        pytest.param({"complete": True}, "True", ENDING, id="it is done: its report is read"),
    ],
)
def test_a_transfer_needs_one_pod(
    make_job: Callable[..., Any],
    make_gang: Any,
    now: datetime,
    stage: str,
    gang: Any,
    running: str,
    wanted: Needs,
) -> None:
    """A transfer does well with one pod, however many ranks the job has."""
    status = open_attempt(now, running, stage=stage)

    assert needs(make_job(status), [make_gang(**gang)], now) == wanted
