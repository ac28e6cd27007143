"""The tree of foreseen ends, and the system's errors that stand for some of them."""

import errno
import os

import pytest

from qlora_contract.exit_codes import COLLATERAL, ExitCode
from qlora_trainer import errors
from qlora_trainer.errors import (
    CollectiveError,
    ConfigurationError,
    OutOfMemory,
    StorageFull,
    TrainerError,
    from_os_error,
)

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TrainerError)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not TrainerError])
def test_every_foreseen_end_has_a_code_of_its_own_meaning(kind: type[TrainerError]) -> None:
    """Only what nobody foresaw exits with UNEXPECTED, and nothing that failed with DONE."""
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
def test_ranks_part_in_order_only_when_none_is_lost(kind: type[TrainerError]) -> None:
    """What all ranks raise together is no failure of their connection."""
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
def test_an_os_error_is_foreseen_only_where_its_meaning_is_certain(
    number: int, kind: type[TrainerError] | None
) -> None:
    """A full disk, no memory and what is not allowed have codes of their own; all else stays what it is."""
    found = from_os_error(OSError(number, os.strerror(number), "/work/x"), "writing a checkpoint")

    assert type(found) is (kind or type(None))
    assert found is None or "writing a checkpoint" in str(found)


def test_what_is_not_allowed_names_the_file_and_the_user() -> None:
    """The user learns whose the files must be; without a file it may be anything."""
    found = from_os_error(PermissionError(errno.EACCES, "Permission denied", "/work/x"), "making /work/x")

    assert str(found).startswith(f"Permission denied while making /work/x: /work/x: user {os.geteuid()} must")
    assert from_os_error(PermissionError(errno.EPERM, "Operation not permitted"), "training") is None


def test_a_full_disk_names_the_file() -> None:
    """The user learns which volume is full."""
    found = from_os_error(OSError(errno.ENOSPC, "No space left on device", "/work/x"), "saving")

    assert str(found) == "no space left while saving: /work/x (No space left on device)"
