"""The operator's errors."""

import pytest

from qlora_operator.errors import Fault, InvalidFileError, OperatorError


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault("job.yaml", "is empty"), "job.yaml: is empty"),
        (Fault("job.yaml", "is required", "spec.model"), "job.yaml: spec.model: is required"),
        (
            Fault("job.yaml", "is required", "spec.model", "document 2 (docs)"),
            "job.yaml: document 2 (docs): spec.model: is required",
        ),
    ],
    ids=["file", "field", "field of a document"],
)
def test_a_fault_reads_from_the_outside_in(fault: Fault, text: str) -> None:
    """File, document, field, message: what does not apply is left out."""
    assert str(fault) == text


def test_an_invalid_file_shows_every_fault() -> None:
    """The error's text has a line for each fault, and it is one of the operator's own errors."""
    error = InvalidFileError([Fault("a", "one"), Fault("a", "two")])

    assert str(error) == "a: one\na: two"
    assert isinstance(error, OperatorError)
    assert [fault.message for fault in error.faults] == ["one", "two"]
