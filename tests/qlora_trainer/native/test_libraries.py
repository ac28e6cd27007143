"""Files of installed distributions."""

import pytest

from qlora_trainer.native.libraries import find_file


def test_a_file_is_found_by_the_end_of_its_path() -> None:
    """An installed distribution's file is found where it lies."""
    path = find_file("torch", "torch/version.py")

    assert path is not None
    assert path.name == "version.py"
    assert path.is_absolute()


@pytest.mark.parametrize(
    ("distribution", "name"),
    [("no-such-distribution-1", "x.so"), ("torch", "no-such-file.so"), ("torch", "orch/version.py")],
    ids=["distribution", "file", "part-of-a-name"],
)
def test_what_is_missing_is_not_found(distribution: str, name: str) -> None:
    """A distribution that is not installed has no files, and a file that it lacks is not found."""
    assert find_file(distribution, name) is None
