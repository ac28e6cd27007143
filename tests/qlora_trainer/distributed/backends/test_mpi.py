"""What Intel MPI is told, and which ranks of its world a group has."""

from pathlib import Path

import pytest

from qlora_trainer.distributed.backends import mpi

pytestmark = pytest.mark.process


def test_ranks_are_not_bound_and_waiting_threads_yield() -> None:
    """The launcher binds ranks; MPI looks for its files and its network where they are."""
    wanted = mpi.settings("eth0", Path("/opt/x"), {})

    assert wanted["I_MPI_PIN"] == "0"
    assert wanted["FI_TCP_IFACE"] == "eth0"
    assert wanted["FI_PROVIDER_PATH"] == "/opt/x/lib"


def test_what_the_user_set_is_kept() -> None:
    """Another fabric may be chosen."""
    assert "FI_PROVIDER" not in mpi.settings("lo", Path("/"), {"FI_PROVIDER": "psm3"})


def test_members_are_known_by_their_ranks_in_the_world() -> None:
    """A group's order is its own; MPI's ranks are those of the first group."""
    assert mpi.world_ranks(["4711 2", "4711 0"]) == [2, 0]


@pytest.mark.parametrize("other", ["outside", "4712 0"], ids=["not-in-mpi", "in-another-world"])
def test_a_group_of_two_worlds_is_refused(other: str) -> None:
    """Ranks that started MPI apart cannot meet; the sentence says what to do instead."""
    with pytest.raises(
        ValueError, match="with a process's first impi group, so that one must have every rank"
    ):
        mpi.world_ranks(["4711 0", other])
