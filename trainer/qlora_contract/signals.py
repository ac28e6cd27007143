"""Which signals ask a process to stop."""

import signal
from collections.abc import Callable


def stop_by(handler: Callable[..., object]) -> None:
    """Have it handle SIGTERM, Ctrl-C and the end of the terminal: not that one where nohup asks to ignore it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)
