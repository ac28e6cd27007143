"""The one place that writes a status."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest

from qlora_operator.api.names import ConditionType, Reason
from qlora_operator.api.status import Attempt
from qlora_operator.status import conditions
from qlora_operator.status.actions import DeletePod, RestoreNetwork
from qlora_operator.status.builder import StatusBuilder
from qlora_operator.status.checks import Blocked
from qlora_operator.status.observation import Observation

MakeBuilder = Callable[..., StatusBuilder]


@pytest.fixture
def make_builder(make_job: Callable[..., Any], now: datetime) -> MakeBuilder:
    """make(status) -> a builder of the job's next status."""
    return lambda status=None: StatusBuilder(make_job(status), Observation(), now)


def test_the_newest_attempts_are_kept(make_builder: MakeBuilder) -> None:
    """Only the newest 20 attempts are kept."""
    builder = make_builder()
    for number in range(25):
        builder.add_attempt(Attempt(attempt=number))

    assert [attempt.attempt for attempt in builder.status.attempts] == list(range(5, 25))
    assert builder.status.attempt == 24


def test_set_attempt_changes_the_newest(make_builder: MakeBuilder) -> None:
    """Earlier attempts are history, and the job that was given stays as it was."""
    builder = make_builder({"attempts": [{"attempt": 0}, {"attempt": 1}]})

    builder.set_attempt(reason="Terminated")

    assert [attempt.reason for attempt in builder.status.attempts] == [None, "Terminated"]
    assert builder.job.status is not None
    assert [attempt.reason for attempt in builder.job.status.attempts] == [None, None]


def test_a_view_is_of_the_status_so_far(make_builder: MakeBuilder) -> None:
    """Checks see what is decided by now, and what was saved before; an earlier view stays as it was."""
    builder = make_builder({"attempts": [{"attempt": 0}]})
    before = builder.view

    builder.set_attempt(reason="Terminated")

    view = builder.view
    assert (view.last_attempt and view.last_attempt.reason) == "Terminated"
    assert (view.saved_attempt and view.saved_attempt.reason) is None
    assert before.last_attempt == before.saved_attempt == view.saved_attempt


def test_waiting_posts_an_event_once(make_builder: MakeBuilder) -> None:
    """An event is posted when the reason is new, not when the message is; the message is always the newest."""
    builder = make_builder()
    for reason, message in ((Reason.UNSCHEDULABLE, "a"), (Reason.UNSCHEDULABLE, "b"), (Reason.STARTING, "c")):
        builder.set_waiting(ConditionType.RUNNING, reason, message, event=reason != Reason.STARTING)

    assert [(event.reason, event.message) for event in builder.events] == [("Unschedulable", "a")]
    assert builder.status.message == "c"


@pytest.mark.parametrize(
    ("reason", "event", "message", "events"),
    [
        (Reason.NO_MATCHING_NODES, True, "why", ["NoMatchingNodes"]),
        (Reason.PODS_REMAIN, False, "why", []),
        (None, True, None, []),
    ],
    ids=["news", "no event", "nothing to say"],
)
def test_what_blocks_is_written(
    make_builder: MakeBuilder,
    now: datetime,
    reason: Reason | None,
    event: bool,
    message: str | None,
    events: list[str],
) -> None:
    """Reason and message stand in Initialized, and what removes the obstacle is done."""
    builder = make_builder()

    builder.block(Blocked(now + timedelta(seconds=5), reason, "why", event, (DeletePod("p", "u"),)))

    found = conditions.find(builder.status.conditions, ConditionType.INITIALIZED)
    assert (found and (found.status, found.reason)) == (reason and ("False", reason))
    assert builder.status.message == message
    assert [each.reason for each in builder.events] == events
    assert (builder.actions, builder.look_at) == ([DeletePod("p", "u")], now + timedelta(seconds=5))


def test_the_earliest_look_counts(make_builder: MakeBuilder, now: datetime) -> None:
    """Of several times the earliest counts."""
    builder = make_builder()
    for seconds in (10, 5, 15):
        builder.requeue_at(now + timedelta(seconds=seconds))

    assert builder.build().look_at == now + timedelta(seconds=5)


def test_an_action_is_done_once(make_builder: MakeBuilder) -> None:
    """Whoever asks for it a second time asks for the same; what is deleted goes before anything is created."""
    builder = make_builder()
    builder.act(RestoreNetwork(), DeletePod("p", "u"))
    builder.act(DeletePod("p", "u"), DeletePod("q", "v"))

    assert builder.build().actions == (DeletePod("p", "u"), DeletePod("q", "v"), RestoreNetwork())


@pytest.mark.parametrize(
    ("kind", "event"), [(ConditionType.COMPLETE, "Normal"), (ConditionType.FAILED, "Warning")]
)
def test_a_finished_job_is_nothing_else(make_builder: MakeBuilder, kind: ConditionType, event: str) -> None:
    """A job that is over is Finished and one of its two, at one time, with one event."""
    builder = make_builder()
    for other in (ConditionType.RUNNING, ConditionType.RESTARTING, ConditionType.SUSPENDED):
        builder.set_true(other, Reason.STARTED, "")

    builder.finish(kind, Reason.DIVERGED, "why")

    true = [each for each in builder.status.conditions if each.status == "True"]
    assert {each.type for each in true} == {kind, "Finished"}
    assert {each.message for each in true} == {"why"}
    assert (builder.status.message, builder.status.completion_time) == ("why", "2026-01-31T12:00:00Z")
    assert [(each.type, each.reason, each.message) for each in builder.events] == [(event, "Diverged", "why")]


def test_a_finished_job_says_nothing_of_what_never_was(make_builder: MakeBuilder) -> None:
    """A job that never restarted, or was suspended, has no such condition at its end."""
    builder = make_builder()

    builder.finish(ConditionType.FAILED, Reason.DEADLINE_EXCEEDED, "")

    assert conditions.find(builder.status.conditions, ConditionType.RESTARTING) is None
    assert conditions.find(builder.status.conditions, ConditionType.SUSPENDED) is None
