"""How a rank's end is told."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_contract import places
from qlora_contract.exit_codes import ExitCode
from qlora_trainer.errors import Diverged, Fenced, OutOfMemory, StorageFull, TrainerError
from qlora_trainer.outcome import as_trainer_error, failed, first_line


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        pytest.param(Diverged("the loss is NaN"), ExitCode.DIVERGED, "the loss is NaN", id="foreseen"),
        pytest.param(Fenced("taken over"), ExitCode.TERMINATED, "taken over", id="fenced"),
        pytest.param(
            places.PlaceError("'x' is not of the form pvc://claim/path"),
            ExitCode.INVALID_CONFIGURATION, "not of the form", id="a-bad-uri",
        ),
        pytest.param(MemoryError(), ExitCode.OUT_OF_MEMORY, "raise topology.memoryPerRank", id="python-memory"),
        pytest.param(
            OSError(errno.ENOMEM, "Cannot allocate memory"), ExitCode.OUT_OF_MEMORY, "memoryPerRank", id="mmap"
        ),
        pytest.param(OSError(errno.ENOSPC, "full"), ExitCode.STORAGE_FULL, "no space left", id="full-disk"),
        pytest.param(OSError(errno.EIO, "broken"), ExitCode.UNEXPECTED, "unexpected OSError", id="broken-disk"),
        pytest.param(ValueError("bad\nand more"), ExitCode.UNEXPECTED, "unexpected ValueError: bad", id="a-bug"),
        pytest.param(KeyboardInterrupt(), ExitCode.UNEXPECTED, "unexpected KeyboardInterrupt", id="no-text"),
    ],
)  # fmt: skip
def test_every_end_has_a_code_and_a_sentence(error: BaseException, code: ExitCode, says: str) -> None:
    """The report has the code, its name, and what happened; nothing of it needs a session."""
    report = failed(error, 3, None)

    assert (report.exit_code, report.reason, report.rank) == (code, code.name, 3)
    assert says in report.cause
    assert "and more" not in report.cause


def test_memory_that_torch_cannot_have_is_recognised() -> None:
    """The allocator's own error, as it is raised, is out of memory and not a bug."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)

    assert isinstance(as_trainer_error(raised.value), OutOfMemory)


def test_a_foreseen_end_stays_the_same_error() -> None:
    """Its text is the user's sentence already."""
    error = StorageFull("no space")

    assert as_trainer_error(error) is error
    assert type(as_trainer_error(ValueError("x"))) is TrainerError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\none\n two"), "one"),
        (ValueError(""), "ValueError"),
        (ValueError(" \n "), "ValueError"),
    ],
)
def test_a_cause_is_one_line(error: Exception, line: str) -> None:
    """The first line with text, else the error's name."""
    assert first_line(error) == line


def test_an_unforeseen_error_with_the_data_says_where_and_no_more(tmp_path: Path) -> None:
    """The text of such an error may quote the data, and the report ends up in the job's status."""
    module = tmp_path / "records.py"
    module.write_text("def parse(line):\n    raise ValueError('cannot parse ' + line)\n")
    scope: dict[str, Any] = {}
    exec(compile(module.read_text(), str(module), "exec"), scope)

    try:
        scope["parse"]("a secret")
    except ValueError as error:
        cause = failed(error, 0, None).cause

    assert "secret" not in cause
    assert "unexpected ValueError: in parse of records.py" in cause
