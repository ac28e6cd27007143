"""A workspace's cache: entries that are written at once, locked while they are used, and removed for room."""

import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.storage.cache import META, Cache, code_digest


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """An empty one, of the first pod of a job's second attempt."""
    return Cache(tmp_path / "cache", ("uid", 1, 0), "things", "there are none")


def _write(text: str, key: str = "k") -> Callable[[Path], tuple[str, Mapping[str, Any]]]:
    def make(folder: Path) -> tuple[str, Mapping[str, Any]]:
        (folder / "file").write_text(text)
        return key, {"text": text}

    return make


def _filled(cache: Cache, text: str = "whole") -> None:
    assert cache.make_room(1, 1)
    assert cache.write(_write(text))


def test_an_entry_is_there_as_a_whole_or_not_at_all(cache: Cache) -> None:
    """Under its own name once everything is written, meta.json last."""
    assert cache.make_room(1, 1)

    def make(folder: Path) -> tuple[str, Mapping[str, Any]]:
        assert not (cache.folder / "k").exists()
        assert not (folder / META).exists()
        return _write("whole")(folder)

    assert cache.write(make)
    assert sorted(path.name for path in (cache.folder / "k").iterdir()) == ["file", META]
    assert [path.name for path in cache.folder.iterdir()] == ["k"]


def test_of_two_that_write_the_same_the_first_stays(cache: Cache) -> None:
    """And whoever has it mapped is not disturbed by the second."""
    other = Cache(cache.folder, ("other", 0, 0), "things", "there are none")

    def make(folder: Path) -> tuple[str, Mapping[str, Any]]:
        _filled(other, "first")
        return _write("second")(folder)

    assert cache.make_room(1, 1)
    assert cache.write(make)
    assert (cache.folder / "k" / "file").read_text() == "first"
    assert [path.name for path in cache.folder.iterdir()] == ["k"]


def test_an_entry_without_its_last_file_is_replaced(cache: Cache) -> None:
    """Nobody can use it."""
    _filled(cache)
    (cache.folder / "k" / META).unlink()
    _filled(cache, "again")

    assert (cache.folder / "k" / "file").read_text() == "again"


def test_what_is_discarded_is_gone_at_once(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    """And said."""
    _filled(cache)
    cache.discard("k", cache.use("k"), "a file")

    assert list(cache.folder.iterdir()) == []
    assert "is damaged (a file), and is made anew" in caplog.text


def test_what_another_job_uses_keeps_its_files_when_it_is_discarded(cache: Cache) -> None:
    """Its name is free for a whole one; the files go when a later attempt finds that nobody uses them."""
    _filled(cache)
    others = cache.use("k")
    assert others is not None
    cache.discard("k", cache.use("k"), "a file")
    _filled(cache, "again")
    left = [path for path in cache.folder.iterdir() if path.name.startswith(".")]

    assert (cache.folder / "k" / "file").read_text() == "again"
    assert [(path / "file").read_text() for path in left] == ["whole"]
    others.release()
    assert cache.make_room(1, 1)
    assert [path.name for path in cache.folder.iterdir()] == ["k"]


def test_a_whole_entry_that_took_a_damaged_ones_place_is_not_discarded(cache: Cache) -> None:
    """Two jobs find the same damage; the slower one must not remove what the faster one has made."""
    _filled(cache)
    ours, theirs = cache.use("k"), cache.use("k")
    cache.discard("k", theirs, "a file")
    _filled(cache, "again")
    cache.discard("k", ours, "a file")

    assert (cache.folder / "k" / "file").read_text() == "again"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_is_full_on_the_way_is_done_without(
    cache: Cache, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """It is said once, and nothing is left."""

    def make(folder: Path) -> tuple[str, Mapping[str, Any]]:
        (folder / "file").write_text("half")
        raise OSError(number, os.strerror(number))

    assert cache.make_room(1, 1)
    with caplog.at_level(logging.WARNING):
        assert not cache.write(make)
    [said] = caplog.messages
    assert said == f"{cache.folder} cannot keep things ({os.strerror(number)}): there are none"
    assert list(cache.folder.iterdir()) == []


@pytest.mark.parametrize("when", ["while it is written", "before it is published"])
def test_a_cache_that_somebody_removes_is_done_without(
    cache: Cache, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    """Nothing in it is needed."""

    def make(folder: Path) -> tuple[str, Mapping[str, Any]]:
        (folder / "file").write_text("half")
        shutil.rmtree(cache.folder)
        if when == "while it is written":
            (folder / "another").write_text("half")
        return "k", {}

    assert cache.make_room(1, 1)
    assert not cache.write(make)
    assert "No such file or directory): there are none" in caplog.text


def test_other_errors_are_not_about_the_cache(cache: Cache) -> None:
    """They go on."""

    def make(_: Path) -> tuple[str, Mapping[str, Any]]:
        raise OSError(errno.EIO, "no")

    assert cache.make_room(1, 1)
    with pytest.raises(OSError, match="no"):
        cache.write(make)
    assert list(cache.folder.iterdir()) == []


def test_without_room_nothing_is_begun(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    """It is said how much there is, and how much there should be."""
    assert not cache.make_room(1, 2**62)
    assert " free, " in caplog.text


def test_a_change_of_the_code_makes_another_digest(tmp_path: Path) -> None:
    """In any of the folders, below them too."""
    for name in ("one", "other/inner"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.py").write_text("1")
    digests = {code_digest(tmp_path / "one", tmp_path / "other")}
    for changed in ("one/a.py", "other/inner/a.py"):
        (tmp_path / changed).write_text("2")
        code_digest.cache_clear()
        digests.add(code_digest(tmp_path / "one", tmp_path / "other"))
    code_digest.cache_clear()

    assert len(digests) == 3


def test_what_is_renamed_or_removed_meanwhile_is_passed_over(cache: Cache, tmp_path: Path) -> None:
    """Jobs that share a workspace write, make room and clear up at the same time."""
    other = Cache(tmp_path / "cache", ("other", 0, 0), "things", "there are none")
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            other.write(_write("x", f"k{number % 5}"))
            number += 1

    other.make_room(1, 1)
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(1000):
            assert cache.make_room(1, 1)
    finally:
        stop.set()
        writer.join()
