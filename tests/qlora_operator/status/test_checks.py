"""How lists of checks are evaluated."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest

from qlora_operator.api.names import Reason
from qlora_operator.status.checks import AttemptEnd, Blocked, Budget, NotYet, first_end, first_obstacle
from qlora_operator.status.ending import END_CHECKS
from qlora_operator.status.starting import START_CHECKS

NOON = datetime(2026, 1, 31, 12)
LATER, LATEST = NotYet(NOON + timedelta(seconds=1)), NotYet(NOON + timedelta(seconds=2))
FIRST, SECOND = (AttemptEnd(reason, "", Budget.NONE) for reason in (Reason.STEPPED_DOWN, Reason.RELEASED))


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ([], None),
        ([None, None], None),
        ([None, FIRST, SECOND], FIRST),
        ([LATER, FIRST], FIRST),
        ([LATEST, LATER, None], LATER),
    ],
    ids=["no checks", "nothing", "the first", "an end before a time", "the earliest time"],
)
def test_the_first_end_wins_over_times(make_view: Callable[..., Any], found: list[Any], wanted: Any) -> None:
    """The order of the list is that of importance; a time matters only if nothing ends the attempt now."""
    assert first_end(make_view(), [lambda _, each=each: each for each in found]) == wanted


def test_checks_behind_an_obstacle_are_not_made(make_view: Callable[..., Any]) -> None:
    """What they would have read is not read."""

    def never(_: Any) -> Blocked | None:
        raise AssertionError

    blocked = Blocked(NOON)

    assert first_obstacle(make_view(), [lambda _: None, lambda _: blocked, never]) is blocked
    assert first_obstacle(make_view(), [lambda _: None]) is None


@pytest.mark.parametrize("check", [*END_CHECKS, *START_CHECKS], ids=lambda check: check.__name__)
def test_every_check_stands_alone(make_view: Callable[..., Any], check: Callable[..., Any]) -> None:
    """A check depends on no other one having been made before: on a job that has just been created, with no attempt
    and no Job, each has nothing to say."""
    assert check(make_view(None, [], [])) is None
