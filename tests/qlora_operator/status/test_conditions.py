"""Conditions: how they are said, and the phase that follows from them."""

from datetime import UTC, datetime, timedelta
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_operator.api.names import ConditionType, Phase, Reason
from qlora_operator.api.status import Condition
from qlora_operator.status import conditions

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
LATER = NOON + timedelta(minutes=1)


def say(*said: str) -> list[Condition]:
    """Conditions in short: `Running`, `!Running` for false, `Running=Publishing` with a reason."""
    found: list[Condition] = []
    for each in said:
        kind, _, reason = each.lstrip("!").partition("=")
        found = conditions.put(
            found,
            ConditionType(kind),
            Reason(reason or "Started"),
            "",
            holds=each[0] != "!",
            now=NOON,
            generation=1,
        )
    return found


@pytest.mark.parametrize(
    ("said", "phase"),
    [
        pytest.param([], Phase.PENDING, id="nothing yet"),
        pytest.param(["!Running", "!Initialized=NoMatchingNodes"], Phase.PENDING, id="no nodes"),
        pytest.param(["Initialized", "!Running"], Phase.STARTING, id="an attempt begun"),
        pytest.param(["Initialized", "!QuotaReserved", "!Running"], Phase.QUEUED, id="in the queue"),
        pytest.param(
            ["Initialized", "!QuotaReserved", "!Running", "Restarting"], Phase.QUEUED, id="in the queue again"
        ),
        pytest.param(["Initialized", "QuotaReserved", "!Running"], Phase.STARTING, id="let in"),
        pytest.param(["Initialized", "Running=Training"], Phase.RUNNING, id="trains"),
        pytest.param(["Initialized", "Running=Evaluating"], Phase.RUNNING, id="evaluates"),
        pytest.param(["Initialized", "Running=Publishing"], Phase.PUBLISHING, id="publishes"),
        pytest.param(["Initialized", "Running=Fetching"], Phase.FETCHING, id="fetches"),
        pytest.param(["Initialized", "Running=Uploading"], Phase.PUBLISHING, id="uploads"),
        pytest.param(["Initialized", "!Running=Fetched"], Phase.STARTING, id="has fetched"),
        pytest.param(["Initialized", "!Running=Trained"], Phase.STARTING, id="has trained"),
        pytest.param(["Suspended", "Running=Fetching"], Phase.SUSPENDED, id="suspended while it fetches"),
        pytest.param(["Initialized", "!Running", "Restarting"], Phase.RESTARTING, id="starts anew"),
        pytest.param(["!Initialized=BackOff", "!Running", "Restarting"], Phase.RESTARTING, id="backs off"),
        pytest.param(
            ["!Initialized", "!QuotaReserved", "!Running"], Phase.PENDING, id="not yet in the queue"
        ),
        pytest.param(["Initialized", "Suspended", "!Running"], Phase.SUSPENDED, id="suspended"),
        pytest.param(["Suspended", "Restarting"], Phase.SUSPENDED, id="suspended while starting anew"),
        pytest.param(["!Suspended", "Initialized"], Phase.STARTING, id="resumed"),
        pytest.param(["Complete", "Finished", "!Running"], Phase.SUCCEEDED, id="complete"),
        pytest.param(["Failed", "Finished", "Initialized"], Phase.FAILED, id="failed"),
        pytest.param(["Failed", "Finished", "Suspended"], Phase.FAILED, id="failed, whatever else"),
    ],
)
def test_the_phase_follows_from_the_conditions(said: list[str], phase: Phase) -> None:
    """One word for all conditions."""
    assert conditions.phase(say(*said)) == phase


@given(st.lists(st.builds("".join, st.tuples(st.sampled_from(["", "!"]), st.sampled_from(ConditionType)))))
def test_phase_does_not_depend_on_the_order(said: list[str]) -> None:
    """The newest word on each condition counts, in whatever order they were said."""
    newest = {each.lstrip("!"): each for each in said}

    assert conditions.phase(say(*said)) == conditions.phase(say(*reversed(newest.values())))


@pytest.mark.parametrize(("before", "after"), list(product([True, False], [True, False])))
def test_transition_time_moves_with_the_status_only(before: bool, after: bool) -> None:
    """A condition said again with another reason keeps its time; turned round, it gets a new one."""
    kind = ConditionType.RUNNING
    old = conditions.put([], kind, Reason.LOADING, "a", holds=before, now=NOON, generation=1)

    (new,) = conditions.put(old, kind, Reason.TRAINING, "b", holds=after, now=LATER, generation=2)

    changed = before != after
    assert new.last_transition_time == ("2026-01-31T12:01:00Z" if changed else "2026-01-31T12:00:00Z")
    assert (new.reason, new.message, new.observed_generation) == ("Training", "b", 2)


def test_order_is_fixed() -> None:
    """Conditions stand in the documented order, and last those that only a newer operator knows."""
    newer = Condition.model_validate(
        {"type": "Fetched", "status": "True", "reason": "R", "message": "", "lastTransitionTime": "x"}
    )

    said = conditions.put(
        [newer, *say("Failed", "Suspended")],
        ConditionType.INITIALIZED,
        Reason.STARTED,
        "",
        holds=True,
        now=NOON,
        generation=None,
    )

    assert [each.type for each in said] == ["Suspended", "Initialized", "Failed", "Fetched"]


@pytest.mark.parametrize(
    ("said", "true", "false"),
    [([], False, False), (["Running"], True, False), (["!Running"], False, True)],
    ids=["never said", "holds", "does not hold"],
)
def test_never_said_is_neither(said: list[str], true: bool, false: bool) -> None:
    """A condition that was never said is neither true nor false."""
    found = say(*said)

    assert conditions.is_true(found, ConditionType.RUNNING) == true
    assert conditions.is_false(found, ConditionType.RUNNING) == false


def test_one_condition_can_be_left_out() -> None:
    """A condition can be taken back, as if it had never been said."""
    left = conditions.without(say("Running", "QuotaReserved"), ConditionType.QUOTA_RESERVED)

    assert [each.type for each in left] == ["Running"]
