"""How long to insist, and how often to try."""

import contextlib
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.errors import TransferFailed, TransferRefused
from qlora_trainer.transfer.retry import MAX_DELAY_SECONDS, Retrier, TransientError, retry_after


@dataclass
class Time:
    """A clock that only sleep moves."""

    now: float = 0.0
    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.slept.append(seconds)
        self.now += seconds

    def retrier(self, seconds: float) -> Retrier:
        """One that lives by this clock."""
        return Retrier(seconds, lambda: self.now, self.sleep)


def failing(*causes: Exception) -> "Action":
    """An action that fails in these ways, one after the other, then works."""
    return Action(list(causes))


@dataclass
class Action:
    """What is insisted on."""

    causes: list[Exception]

    def __call__(self) -> str:
        """Fail, or not any more."""
        if self.causes:
            raise self.causes.pop(0)
        return "done"


def test_what_passes_is_tried_again() -> None:
    """With delays that double."""
    time = Time()

    assert time.retrier(100).call(failing(*[TransientError("x")] * 4)) == "done"
    assert time.slept == [1, 2, 4, 8]


def test_failures_are_told_until_there_is_progress() -> None:
    """Each with its next try; a byte that arrives, or the end, takes the last one back."""
    time, told = Time(), []
    retrier = Retrier(100, lambda: time.now, time.sleep, told.append)
    retrier.call(failing(TransientError("503"), TransientError("no route", 9)))
    retrier.reset()

    assert told == ["503; retrying in 1 s", "no route; retrying in 9 s", None]


def test_the_server_says_how_long_to_wait() -> None:
    """Its Retry-After goes before our own delay."""
    time = Time()
    time.retrier(100).call(failing(TransientError("x", 7), TransientError("x"), TransientError("x", 0)))

    assert time.slept == [7, 2, 0]


def test_it_gives_up_after_the_limit() -> None:
    """The last cause is told, with the limit and where it comes from."""
    time = Time()
    with pytest.raises(TransferFailed) as failed:
        time.retrier(60).call(failing(*[TransientError("hub: HTTP 503")] * 100))

    assert str(failed.value) == (
        "hub: HTTP 503; gave up: no progress within 60 s "
        "(distributed.rendezvousTimeoutSeconds is also the limit for transfers)"
    )
    assert 30 < time.now <= 60


def test_a_wait_beyond_the_limit_is_not_begun() -> None:
    """Who asks for an hour where a minute is allowed is told off at once."""
    time = Time()
    with pytest.raises(TransferFailed, match="no progress within 60 s, and the server asks to wait 3600 s"):
        time.retrier(60).call(failing(TransientError("x", 3600)))

    assert time.slept == []


def test_a_byte_renews_the_limit() -> None:
    """As long as something arrives now and then, it goes on."""
    time = Time()
    retrier = time.retrier(10)
    tries = 0

    def trickle() -> None:
        nonlocal tries
        tries += 1
        retrier.reset()
        if tries < 50:
            raise TransientError("broke off")

    retrier.call(trickle)
    assert tries == 50
    assert set(time.slept) == {1}


def test_a_refusal_is_final() -> None:
    """It is not asked again."""
    time = Time()
    with pytest.raises(TransferRefused):
        time.retrier(60).call(failing(TransferRefused("no")))

    assert time.slept == []


@given(st.lists(st.none() | st.floats(0, 100), max_size=30), st.floats(1, 200))
def test_the_limit_holds(waits: list[float | None], limit: float) -> None:
    """Whatever a server asks for, no more than the limit passes without a byte, nor a delay of ours beyond its cap."""
    time = Time()
    retrier = time.retrier(limit)
    with contextlib.suppress(TransferFailed):
        retrier.call(failing(*[TransientError("x", wait) for wait in waits]))
    assert time.now <= limit
    assert all(slept <= MAX_DELAY_SECONDS or slept in waits for slept in time.slept)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(None, None, id="none"),
        pytest.param("120", 120, id="seconds"),
        pytest.param("Wed, 21 Oct 2026 07:28:00 GMT", 60, id="date"),
        pytest.param("Wed, 21 Oct 2026 07:26:00 GMT", 0, id="past"),
        pytest.param("soon", None, id="words"),
        pytest.param("-5", None, id="negative"),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, expected: float | None) -> None:
    """As HTTP has it; what cannot be read is as if it were not there."""
    assert retry_after(value, lambda: 1792567620.0) == expected
