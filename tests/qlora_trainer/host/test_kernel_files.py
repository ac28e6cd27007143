"""Small files of the kernel, present or not."""

from pathlib import Path

import pytest

from qlora_trainer.host.kernel_files import parse_fields, read_int, read_text


@pytest.mark.parametrize(
    ("content", "number"),
    [
        pytest.param(b"12\n", 12, id="a number"),
        pytest.param(b"-1\n", -1, id="a negative number"),
        pytest.param(b"max\n", None, id="a word"),
        pytest.param(b"--1\n", None, id="two signs"),
        pytest.param("²".encode(), None, id="a digit that int refuses"),
        pytest.param(b"\xff\n", None, id="not UTF-8"),
        pytest.param(b"", None, id="empty"),
        pytest.param(None, None, id="no file"),
    ],
)
def test_a_number_is_read_where_there_is_one(
    tmp_path: Path, content: bytes | None, number: int | None
) -> None:
    """Whatever a kernel writes instead counts as unknown."""
    if content is not None:
        (tmp_path / "file").write_bytes(content)

    assert read_int(tmp_path / "file") == number


def test_text_comes_without_its_line_end(tmp_path: Path) -> None:
    """A folder, as any file that cannot be read, is as if it were missing."""
    (tmp_path / "file").write_text("madvise\n")

    assert read_text(tmp_path / "file") == "madvise"
    assert read_text(tmp_path) is None


def test_fields_keep_their_order_and_their_colons() -> None:
    """Only the first colon separates; a line without one is not a field."""
    assert parse_fields("a : 1:2\nb\n\na:3") == [("a", "1:2"), ("a", "3")]
