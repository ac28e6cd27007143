"""Who fetches, when several would."""

import threading
from pathlib import Path

import pytest

from qlora_trainer.transfer import lease
from qlora_trainer.transfer.lease import LeaseLost, _take_away, leased
from testcluster.remote import until


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a lease that beats quickly."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.01)
    return tmp_path / "lease"


def test_one_at_a_time(path: Path) -> None:
    """The second waits for the first, for as long as the first gives signs of life."""
    order: list[str] = []

    def second() -> None:
        with leased(path, stale_seconds=1.5):
            order.append("second")

    with leased(path) as held:
        thread = threading.Thread(target=second)
        thread.start()
        until(lambda: int("0" + path.read_text().partition(" ")[2]) > 40)  # longer than a dead holder gets
        held.check()
        order.append("first")
    thread.join()

    assert order == ["first", "second"]
    assert not path.exists()


def test_a_dead_holder_does_not_block(path: Path) -> None:
    """What it has left is taken over once it has not changed for a while."""
    path.write_text("somebody 17")
    with leased(path, stale_seconds=0.3) as held:
        assert not path.read_text().startswith("somebody")
        held.check()


def test_a_holder_that_died_before_its_first_word_does_not_block(path: Path) -> None:
    """An empty file is as dead as another one."""
    path.touch()
    with leased(path, stale_seconds=0.3):
        assert path.read_text()


def test_who_lost_it_is_told(path: Path) -> None:
    """A holder that was stopped for too long finds another one in its place, and leaves that one alone."""
    with leased(path) as held:
        path.write_text("another 0")
        until(held._lost.is_set)
        with pytest.raises(LeaseLost):
            held.check()

    assert path.read_text() == "another 0"


def test_it_ends_with_an_error(path: Path) -> None:
    """The next one need not wait."""
    with pytest.raises(ValueError, match="x"), leased(path):
        raise ValueError("x")

    assert not path.exists()


def test_of_several_who_wait_for_a_dead_one_one_is_next(path: Path) -> None:
    """Who comes too late to take the dead one's lease away leaves the new one's where it is."""
    path.write_text("the-next 0")
    _take_away(path, dead="somebody 17")

    assert path.read_text() == "the-next 0"
    assert list(path.parent.iterdir()) == [path]

    _take_away(path, dead="the-next 0")
    assert list(path.parent.iterdir()) == []
