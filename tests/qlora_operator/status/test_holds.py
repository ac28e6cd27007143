"""What suspends a job. How a job follows it is in test_decision.py."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.status.holds import hold

NIGHTS = {"timeZone": "Europe/Berlin", "windows": [{"start": "0 20 * * *", "end": "0 6 * * *"}]}


@pytest.mark.parametrize(
    ("spec", "at", "reason"),
    [
        ({}, "12:00", None),
        ({"suspend": True}, "12:00", "Suspended"),
        ({"schedule": NIGHTS}, "18:59", "OutsideWindows"),
        ({"schedule": NIGHTS}, "19:00", None),
        ({"schedule": NIGHTS}, "04:59", None),
        ({"schedule": NIGHTS}, "05:00", "OutsideWindows"),
        ({"schedule": NIGHTS, "suspend": True}, "12:00", "Suspended"),
        ({"schedule": NIGHTS, "suspend": True}, "22:00", "Suspended"),
    ],
)
def test_the_user_and_the_time_of_day_suspend_a_job(
    make_job: Callable[..., QLoRAJob], now: datetime, spec: dict[str, Any], at: str, reason: str | None
) -> None:
    """Either does; and the user's word is the one that is told. Times are UTC, an hour behind Berlin."""
    hour, minute = map(int, at.split(":"))

    found = hold(make_job(**spec).spec, now.replace(hour=hour, minute=minute))

    assert (None if found is None else found.reason) == reason


def test_a_schedule_without_a_window_in_sight_says_so(
    make_job: Callable[..., QLoRAJob], now: datetime
) -> None:
    """A leap day that is a Sunday comes every 28 years."""
    windows = [{"start": "0 0 29 2 */7", "durationSeconds": 3600}]

    found = hold(make_job(schedule={"windows": windows}).spec, now.replace(year=2034))

    assert found is not None
    assert found.message == "spec.schedule has no window in the next eight years"
