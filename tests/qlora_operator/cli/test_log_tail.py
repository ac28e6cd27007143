"""The end of a log."""

from pathlib import Path

from qlora_operator.cli.log_tail import LogTail, last_lines


def test_the_last_lines_leave_blank_ones_out(tmp_path: Path) -> None:
    """They stand for a cause, so only lines that say something count."""
    log = tmp_path / "log"
    log.write_bytes(b"x" * 100_000 + b"\none\n\n  two \n\xff\n")

    assert last_lines(log, 3) == "one\ntwo\n\N{REPLACEMENT CHARACTER}"


def test_a_growing_log_is_read_in_complete_lines(tmp_path: Path) -> None:
    """A line that is still being written is left for the next time."""
    log = tmp_path / "log"
    log.touch()
    tail = LogTail(log)
    read = []
    for text in (b"one\ntw", b"o\n", b"", b"three\n"):
        with log.open("ab") as stream:
            stream.write(text)
        read.append(tail.new_lines())

    assert read == [["one"], ["two"], [], ["three"]]


def test_a_log_that_is_gone_has_no_lines(tmp_path: Path) -> None:
    """Somebody may remove the job's folder at any time."""
    assert last_lines(tmp_path / "log") == ""
    assert LogTail(tmp_path / "log").new_lines() == []
