"""The tree of expected ends, and the errors of others that stand for some of them."""

import errno
import os

import pytest
import torch

from qlora_contract.exit_codes import COLLATERAL, ExitCode
from qlora_contract.paths import InvalidUriError
from qlora_trainer import errors
from qlora_trainer.errors import (
    CollectiveError,
    ConfigurationError,
    Diverged,
    OutOfMemory,
    StorageFull,
    TrainerError,
    expected,
    from_os_error,
)

pytestmark = pytest.mark.process

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TrainerError)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not TrainerError])
def test_every_expected_end_has_a_code_of_its_own_meaning(kind: type[TrainerError]) -> None:
    """Only what nobody expected exits with UNEXPECTED, and nothing that failed with DONE."""
    assert kind.exit_code not in (ExitCode.DONE, ExitCode.UNEXPECTED)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_in_the_docstring_names_every_kind(kind: type[TrainerError]) -> None:
    """Whoever reads the module's first lines sees every error."""
    assert errors.__doc__ is not None
    assert kind.__name__ in errors.__doc__


@pytest.mark.parametrize("kind", [kind for kind in KINDS if issubclass(kind, CollectiveError)])
def test_a_failed_collective_is_never_the_cause(kind: type[TrainerError]) -> None:
    """Its code is collateral, so that the rank that failed first gives the cause."""
    assert kind.exit_code in COLLATERAL


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.agreed])
def test_ranks_leave_in_order_only_when_none_is_lost(kind: type[TrainerError]) -> None:
    """What all ranks raise together is not a failure of their connection."""
    assert not issubclass(kind, CollectiveError)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        pytest.param(errno.ENOSPC, StorageFull, id="disk-full"),
        pytest.param(errno.EDQUOT, StorageFull, id="over-quota"),
        pytest.param(errno.ENOMEM, OutOfMemory, id="no-memory"),
        pytest.param(errno.EACCES, ConfigurationError, id="not-allowed"),
        pytest.param(errno.EROFS, ConfigurationError, id="read-only"),
        pytest.param(errno.EIO, None, id="broken-disk"),
    ],
)
def test_an_os_error_is_expected_only_where_its_meaning_is_certain(
    number: int, kind: type[TrainerError] | None
) -> None:
    """A full disk, exhausted memory and a denied permission have codes of their own; all else stays what it is."""
    found = from_os_error(OSError(number, os.strerror(number), "/work/x"), "writing a checkpoint")

    assert type(found) is (kind or type(None))
    assert found is None or "writing a checkpoint" in str(found)


def test_a_denied_permission_names_the_file_and_the_user() -> None:
    """The user learns who needs access to what; without a file the error may mean anything."""
    found = from_os_error(PermissionError(errno.EACCES, "Permission denied", "/work/x"), "making /work/x")

    assert str(found) == (
        f"Permission denied while making /work/x: /work/x: grant user {os.geteuid()} read access to it, "
        "and write access to the workspace"
    )
    assert from_os_error(PermissionError(errno.EPERM, "Operation not permitted"), "training") is None


def test_a_full_disk_names_the_file() -> None:
    """The user learns which volume is full."""
    found = from_os_error(OSError(errno.ENOSPC, "No space left on device", "/work/x"), "saving")

    assert str(found) == "no space left while saving: /work/x (No space left on device)"


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        pytest.param(Diverged("the loss is NaN"), Diverged, "the loss is NaN", id="ours"),
        pytest.param(
            InvalidUriError("'x' is not of the form pvc://claim/path"), ConfigurationError,
            "'x' is not of the form pvc://claim/path", id="a-bad-uri",
        ),
        pytest.param(MemoryError(), OutOfMemory, "raise topology.memoryPerRank, or lower", id="python-memory"),
        pytest.param(OSError(errno.ENOMEM, "Cannot allocate memory"), OutOfMemory, "memoryPerRank", id="mmap"),
        pytest.param(
            OSError(errno.ENOSPC, "full"), StorageFull, "no space left while training (full)", id="full-disk"
        ),
        pytest.param(OSError(errno.EIO, "broken"), None, "", id="broken-disk"),
        pytest.param(ValueError("bad"), None, "", id="a-bug"),
        pytest.param(KeyboardInterrupt(), None, "", id="no-text"),
    ],
)  # fmt: skip
def test_any_error_that_stands_for_an_expected_end_becomes_it(
    error: BaseException, kind: type[TrainerError] | None, text: str
) -> None:
    """With a sentence for the user; what nobody expected is left to the caller."""
    found = expected(error, "training")

    assert type(found) is (kind or type(None))
    assert found is None or text in str(found)


def test_an_expected_end_stays_the_same_error() -> None:
    """Its text is the user's sentence already."""
    error = StorageFull("no space")

    assert expected(error, "training") is error


def test_a_failed_allocation_of_torch_is_out_of_memory() -> None:
    """The allocator's own error, as it is raised, is not taken for a bug."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)

    assert isinstance(expected(raised.value, "training"), OutOfMemory)
