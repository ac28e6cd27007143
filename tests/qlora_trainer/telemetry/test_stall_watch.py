"""When a rank counts as hung, and what its watch says."""

import threading
import time

import pytest

from qlora_trainer.errors import Stalled
from qlora_trainer.telemetry.stall_watch import Idleness, watch

LIMIT = 100.0


def stalled_at(*turns: tuple[float, int, bool]) -> float | None:
    """The time of the turn at which the thread counted as hung; turns are (time, activity, waiting)."""
    idleness = Idleness(LIMIT, 0.0)
    return next((now for now, activity, waiting in turns if idleness.stalled(now, activity, waiting)), None)


def every(
    seconds: float, until: float, activity: int = 0, *, waiting: bool = False, start: float = 0.0
) -> list[tuple[float, int, bool]]:
    """Turns in which nothing changes."""
    count = int((until - start) / seconds)
    return [(start + seconds * n, activity, waiting) for n in range(1, count + 1)]


def test_nothing_done_beyond_the_limit_is_a_hang() -> None:
    """Counted from the first look, which is the first that is known."""
    assert stalled_at(*every(10, 300)) == 120


@pytest.mark.parametrize(
    "turns",
    [
        pytest.param(every(10, 90), id="less than the limit"),
        pytest.param([*every(10, 90), *every(10, 190, 1, start=90)], id="something was done"),
        pytest.param(every(10, 1000, waiting=True), id="it waits for the others"),
        pytest.param([*every(10, 90), *every(10, 1000, waiting=True, start=90)], id="it waits at last"),
        pytest.param([*every(10, 90), (500.0, 0, False), *every(10, 590, start=500)], id="all stood still"),
        pytest.param(
            [(10.0 * n, n // 9, False) for n in range(1, 500)], id="slow, each time below the limit"
        ),
    ],
)
def test_what_is_no_hang(turns: list[tuple[float, int, bool]]) -> None:
    """A rank that is slow, that waits, or that was stopped with its machine."""
    assert stalled_at(*turns) is None


def test_after_standing_still_the_limit_starts_again() -> None:
    """A frozen machine is no hang, what does not go on afterwards is."""
    assert stalled_at(*every(10, 90), (500.0, 0, False), *every(10, 700, start=500)) == 610


def test_the_watch_names_the_place_where_the_thread_hangs(capfd: pytest.CaptureFixture[str]) -> None:
    """Once, with the whole stack in the log."""
    told: list[Stalled] = []
    released = threading.Event()

    def hang_here() -> None:
        watch(0.2, lambda: 0, lambda: False, told.append)
        released.wait(30)

    thread = threading.Thread(target=hang_here)
    thread.start()
    deadline = time.monotonic() + 20
    while not told and time.monotonic() < deadline:
        time.sleep(0.01)
    released.set()
    thread.join()

    assert [str(error).partition(":")[0] for error in told] == [
        "nothing was done for 0 s, in wait of threading.py"
    ]
    assert "in hang_here" in capfd.readouterr().err
