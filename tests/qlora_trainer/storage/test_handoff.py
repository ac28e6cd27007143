"""Word from a fetch to the container beside it."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from qlora_contract.env import HANDOFF_ENV
from qlora_contract.run_config import ResolvedRevisions
from qlora_trainer.storage.handoff import FETCHED, LOCK, fetching, leave, wait_for_fetch

pytestmark = pytest.mark.process
FOUND = ResolvedRevisions(model="c0ffee", dataset="d0d0")


def _killed_while_it_fetches(folder: str) -> None:
    with fetching({HANDOFF_ENV: folder}):
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_was_found_is_known_when_the_fetch_is_over(tmp_path: Path) -> None:
    """And no sooner, although it stands there already."""
    environ = {HANDOFF_ENV: str(tmp_path)}
    known: list[ResolvedRevisions | None] = []
    waiter = threading.Thread(target=lambda: known.append(wait_for_fetch(tmp_path, 20)))
    with fetching(environ):
        waiter.start()
        leave(FOUND, environ)
        time.sleep(0.1)
        assert known == []
    waiter.join(20)

    assert known == [FOUND]


def test_nobody_waits_for_a_fetch_that_was_killed(tmp_path: Path) -> None:
    """The kernel takes its lock back; what it would have said is not there."""
    process = multiprocessing.get_context("fork").Process(
        target=_killed_while_it_fetches, args=(str(tmp_path),)
    )
    process.start()
    process.join(20)

    assert (tmp_path / LOCK).exists()
    assert wait_for_fetch(tmp_path, 0) is None


@pytest.mark.parametrize("left", [None, "{", '{"model": "../.."}'], ids=["nothing", "half of it", "a path"])
def test_word_that_is_none_counts_as_none(left: str | None, tmp_path: Path) -> None:
    """A fetch that failed leaves nothing, and what is no revision is not believed."""
    with fetching({HANDOFF_ENV: str(tmp_path)}):
        if left is not None:
            (tmp_path / FETCHED).write_text(left)

    assert wait_for_fetch(tmp_path, 0) is None


def test_a_fetch_that_does_not_begin_is_not_waited_for(tmp_path: Path) -> None:
    """As where the image is too old to leave word."""
    assert wait_for_fetch(tmp_path, 0) is None


def test_without_a_folder_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator of another release starts no container beside the fetch."""
    monkeypatch.chdir(tmp_path)
    with fetching({}):
        leave(FOUND, {})

    assert list(tmp_path.iterdir()) == []
