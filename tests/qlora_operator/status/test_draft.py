"""A status in the making."""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

import pytest

from qlora_operator.api.names import ConditionType, Reason
from qlora_operator.api.types import Attempt
from qlora_operator.status import conditions
from qlora_operator.status.draft import Draft
from qlora_operator.status.observation import Observation

MakeDraft = Callable[..., Draft]


@pytest.fixture
def make_draft(make_job: Callable[..., Any], now: datetime) -> MakeDraft:
    """make(status, gangs, pods) -> a draft."""

    def make(status: Any = None, gangs: Sequence[Any] = (), pods: Sequence[Any] | None = None) -> Draft:
        return Draft(make_job(status), Observation(gangs=tuple(gangs), pods=pods and tuple(pods)), now)

    return make


@pytest.mark.parametrize(
    ("attempts", "last", "is_open"),
    [
        pytest.param([], None, False, id="none"),
        pytest.param([{"attempt": 0}], 0, True, id="one that lasts"),
        pytest.param([{"attempt": 0, "reason": "Terminated"}], 0, True, id="one that is ending"),
        pytest.param([{"attempt": 0, "end": "t"}, {"attempt": 1, "end": "t"}], 1, False, id="all over"),
    ],
)
def test_open(make_draft: MakeDraft, attempts: list[Any], last: int | None, is_open: bool) -> None:
    """The last attempt is open until all of it is gone."""
    draft = make_draft({"attempts": attempts})

    assert (draft.attempt.attempt if draft.attempt else None) == last
    assert (draft.open is not None) == is_open


def test_gang_and_pods_are_the_current_attempts(make_draft: MakeDraft, make_gang: Any, make_pod: Any) -> None:
    """Of all that carries the job's uid, its own Job and pods of the current attempt; any pod may live."""
    gangs = [make_gang(0), make_gang(1, ours=False), make_gang(1, name="mine", uid="mine")]
    pods = [make_pod(0, 0), make_pod(0, 1), make_pod(1, 1, phase="Failed")]
    draft = make_draft({"attempt": 1, "attempts": [{"attempt": 1}]}, gangs, pods)

    assert draft.gang is gangs[2]
    assert draft.pods == pods[1:]
    assert draft.living == pods[:2]
    assert draft.rivals == [gangs[0]]


def test_nobody_looked(make_draft: MakeDraft) -> None:
    """Where nobody looked at the pods, none are known."""
    assert make_draft().pods == make_draft().living == []


def test_attempts_are_capped(make_draft: MakeDraft) -> None:
    """Only the newest 20 attempts are kept."""
    draft = make_draft()
    for number in range(25):
        draft.add_attempt(Attempt(attempt=number))

    assert [attempt.attempt for attempt in draft.status.attempts] == list(range(5, 25))
    assert draft.status.attempt == 24


def test_set_attempt_changes_the_last(make_draft: MakeDraft) -> None:
    """Earlier attempts are history, and the job that was given stays as it was."""
    draft = make_draft({"attempts": [{"attempt": 0}, {"attempt": 1}]})

    draft.set_attempt(reason="Terminated")

    assert [attempt.reason for attempt in draft.status.attempts] == [None, "Terminated"]
    assert draft.job.status is not None
    assert [attempt.reason for attempt in draft.job.status.attempts] == [None, None]


def test_wait_tells_news_once(make_draft: MakeDraft) -> None:
    """An event is posted when the reason is new, not when the message is; the message is always the newest."""
    draft = make_draft()
    for reason, message in ((Reason.UNSCHEDULABLE, "a"), (Reason.UNSCHEDULABLE, "b"), (Reason.STARTING, "c")):
        draft.wait(ConditionType.RUNNING, reason, message, note=reason != Reason.STARTING)

    assert [(event.reason, event.message) for event in draft.events] == [("Unschedulable", "a")]
    assert draft.status.message == "c"


def test_look_is_the_earliest(make_draft: MakeDraft, now: datetime) -> None:
    """Of several times the earliest counts."""
    draft = make_draft()
    draft.look_in(10)
    draft.look(now + timedelta(seconds=5))
    draft.look_in(15)

    assert draft.look_at == now + timedelta(seconds=5)


@pytest.mark.parametrize(
    ("kind", "event"), [(ConditionType.COMPLETE, "Normal"), (ConditionType.FAILED, "Warning")]
)
def test_finish(make_draft: MakeDraft, kind: ConditionType, event: str) -> None:
    """A job that is over is nothing else any more: Finished and one of its two, at one time, with one event."""
    draft = make_draft()
    for other in (ConditionType.RUNNING, ConditionType.RESTARTING, ConditionType.SUSPENDED):
        draft.affirm(other, Reason.STARTED, "")

    draft.finish(kind, Reason.DIVERGED, "why")

    said = draft.status.conditions
    assert {each.type for each in said if each.status == "True"} == {kind, "Finished"}
    assert {each.message for each in said if each.status == "True"} == {"why"}
    assert (draft.status.message, draft.status.completion_time) == ("why", "2026-01-31T12:00:00Z")
    assert [(each.type, each.reason, each.message) for each in draft.events] == [(event, "Diverged", "why")]


def test_finish_says_nothing_of_what_never_was(make_draft: MakeDraft) -> None:
    """A job that never restarted, or was suspended, has no such condition at its end."""
    draft = make_draft()

    draft.finish(ConditionType.FAILED, Reason.DEADLINE_EXCEEDED, "")

    assert conditions.find(draft.status.conditions, ConditionType.RESTARTING) is None
    assert conditions.find(draft.status.conditions, ConditionType.SUSPENDED) is None


@pytest.mark.parametrize(
    ("attempts", "stage", "wanted"),
    [
        ([], "train", 2),
        ([{"attempt": 0}], "train", 2),
        ([{"attempt": 0, "stage": "fetch"}], "fetch", 1),
        ([{"attempt": 0, "stage": "fetch", "end": "t"}, {"attempt": 1, "stage": "train"}], "train", 2),
        ([{"attempt": 1, "stage": "train", "end": "t"}, {"attempt": 2, "stage": "publish"}], "publish", 1),
    ],
    ids=["none yet", "of an operator that knew no stages", "fetch", "train", "publish"],
)
def test_stage_is_the_last_attempts(
    make_draft: MakeDraft, attempts: list[Any], stage: str, wanted: int
) -> None:
    """What the last attempt does decides how many pods it has."""
    draft = make_draft({"attempts": attempts})

    assert (draft.stage, draft.wanted) == (stage, wanted)
