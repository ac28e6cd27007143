"""The time by which decisions are made."""

from datetime import UTC, datetime, timedelta

import pytest

from qlora_operator.controller.clock import Clock

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)


class World:
    """What passes, and what clocks show."""

    def __init__(self) -> None:
        self.passed, self.wall = 0.0, NOON
        self.clock = Clock(lambda: self.passed, lambda: self.wall)

    def wait(self, seconds: float) -> None:
        """Time passes, on every clock."""
        self.passed += seconds
        self.wall += timedelta(seconds=seconds)


def test_the_first_answer_sets_the_clock() -> None:
    """Until then it is this machine's."""
    world = World()
    assert world.clock.now() == NOON
    world.clock.observe(NOON + HOUR)
    world.wait(5)
    assert world.clock.now() == NOON + HOUR + 5 * SECOND


@pytest.mark.parametrize("step", [HOUR, -HOUR])
def test_a_step_of_this_machines_clock_is_not_seen(step: timedelta) -> None:
    """What counts is what has passed."""
    world = World()
    world.clock.observe(NOON)
    world.wall += step
    world.wait(60)
    assert world.clock.now() == NOON + 60 * SECOND


@pytest.mark.parametrize("step", [HOUR, -HOUR])
def test_a_step_of_the_servers_clock_is_made_up_gradually(step: timedelta) -> None:
    """In a minute no more than a tenth of it, forwards or backwards, however many answers there are."""
    world = World()
    world.clock.observe(NOON)
    for _ in range(60):
        world.wait(1)
        world.clock.observe(world.wall + step)
    found = world.clock.now() - NOON
    assert abs(found - 60 * SECOND - 6 * SECOND * (1 if step > timedelta() else -1)) < SECOND / 100
    for _ in range(11):
        world.wait(3600)
        world.clock.observe(world.wall + step)
    assert abs(world.clock.now() - world.wall - step) <= SECOND


def test_answers_are_whole_seconds() -> None:
    """Their fraction is no difference."""
    world = World()
    world.clock.observe(NOON)
    for _ in range(100):
        world.wait(0.99)
        world.clock.observe(world.wall.replace(microsecond=0))
    assert world.clock.now() == world.wall
