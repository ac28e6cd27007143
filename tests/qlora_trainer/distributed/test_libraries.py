"""Files of installed distributions."""

import pytest

from qlora_trainer.distributed import libraries


def test_a_file_is_found_by_the_end_of_its_path() -> None:
    """An installed distribution's file is found where it lies."""
    assert libraries.find("torch", "torch/version.py", "ccl").name == "version.py"


@pytest.mark.parametrize(
    ("distribution", "name"),
    [("no-such-distribution-1", "x.so"), ("torch", "no-such-file.so")],
    ids=["distribution", "file"],
)
def test_what_is_missing_is_named_with_what_to_install(distribution: str, name: str) -> None:
    """The sentence has the file, the distribution and the extra that brings it."""
    with pytest.raises(
        libraries.BackendUnavailable,
        match=rf"backend ccl needs {name} of {distribution}.*pip install 'qlora-operator\[ccl\]'",
    ):
        libraries.find(distribution, name, "ccl")
