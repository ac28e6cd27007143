"""Which signals ask a process to stop."""

import signal
from collections.abc import Iterator

import pytest

from qlora_contract.signals import stop_by

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What this process does with signals is left as it was."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("nohup", [False, True])
def test_the_end_of_the_terminal_stops_what_was_not_started_to_outlive_it(nohup: bool) -> None:
    """The others always do."""
    seen: list[int] = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    stop_by(lambda number, _: seen.append(number))
    for number in STOPPING:
        signal.raise_signal(number)

    assert seen == list(STOPPING[: 2 if nohup else 3])
