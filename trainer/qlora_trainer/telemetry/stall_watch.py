"""Ends a rank that hangs: its main thread neither gets anything done nor waits for the other ranks.

Each rank watches itself, in a thread of its own, so that the one that hangs is named, and not those that wait for it. A
main thread that hangs without releasing the interpreter's lock stops this thread, too: then its peers miss its
heartbeat, or its launcher, which lives anyway, the watch's sign of life (`last_sign`).
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from qlora_contract.run_config import RunConfig
from qlora_trainer.errors import Stalled
from qlora_trainer.telemetry.termination import REPORT_ENV

STALLED_SHARE = 0.9
"""Of progressDeadlineSeconds, after which a rank is ended: before the operator, which sees rank 0 wait."""
STACKS_SIGNAL = signal.SIGUSR2
"""What makes a watched process write where each of its threads is to stderr, even if one of them keeps the
interpreter's lock."""
TURNS = 20
"""How often the watch looks within its limit."""
LONGEST_TURN = 10.0
"""Seconds between two looks, at most."""


def stall_limit(run: RunConfig) -> float:
    """For how many seconds a rank may do nothing."""
    return STALLED_SHARE * run.progress_deadline_seconds


def turn_seconds(limit: float) -> float:
    """Between two looks of who watches for hangs of more than `limit` seconds."""
    return min(limit / TURNS, LONGEST_TURN)


class Idleness:
    """For how long nothing has been done. Pure: times are passed in, in seconds of one clock."""

    def __init__(self, limit: float, now: float) -> None:
        self._limit = limit
        self._activity = -1
        self._since = self._turn = now

    def stalled(self, now: float, activity: int, waiting: bool) -> bool:
        """Whether the limit is exceeded; to be asked several times within it.

        Args:
            now: in seconds.
            activity: changes whenever something is done.
            waiting: whether what is to be done next is up to others.
        """
        # A turn that comes late: the whole process stood still (stopped, or its machine), which is no fault of it.
        late = now - self._turn > self._limit / 2
        if activity != self._activity or waiting or late:
            self._activity, self._since = activity, now
        self._turn = now
        return now - self._since > self._limit


def watch(
    limit: float,
    activity: Callable[[], int],
    waiting: Callable[[], bool],
    on_stalled: Callable[[Stalled], None],
) -> None:
    """Watch the calling thread from now on.

    Args:
        limit: in seconds.
        activity: see Idleness.stalled.
        waiting: see Idleness.stalled.
        on_stalled: called once, in the watch's thread, after the log got the place where the thread hangs.
    """
    watched = threading.get_ident()
    faulthandler.register(STACKS_SIGNAL, file=2)

    def run() -> None:
        idleness = Idleness(limit, time.monotonic())
        while not idleness.stalled(time.monotonic(), activity(), waiting()):
            show_life()
            time.sleep(turn_seconds(limit))
        place = "an unknown place"
        if frame := sys._current_frames().get(watched):
            stack = traceback.extract_stack(frame)
            print("the main thread hangs:\n" + "".join(stack.format()), file=sys.stderr, flush=True)
            place = f"{stack[-1].name} of {stack[-1].filename.rpartition('/')[2]}"
        on_stalled(
            Stalled(
                f"nothing was done for {limit:.0f} s, in {place}: its storage may not answer, or the job's "
                "progressDeadlineSeconds is too short for it; the log of the rank has the details"
            )
        )

    threading.Thread(target=run, name="stall-watch", daemon=True).start()


# --- what the launcher sees of the watch


def show_life(environ: Mapping[str, str] = os.environ) -> None:
    """Tell the launcher that the threads of this rank run; nothing for a rank that was started without one."""
    if name := environ.get(REPORT_ENV):
        with contextlib.suppress(
            OSError
        ):  # who never gave a sign is not ended for it; a file that is there needs no room
            _sign_of(Path(name)).touch()


def last_sign(report: Path) -> int | None:
    """What changes each time that the rank of this report shows life; None before the first time."""
    try:
        return _sign_of(report).stat().st_mtime_ns
    except OSError:
        return None


def _sign_of(report: Path) -> Path:
    return report.with_name(report.name + ".life")
