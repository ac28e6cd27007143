"""CPU lists, and the slices of launchers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_contract.cpus import CpuListError, format_cpu_list, parse_cpu_list, partition

sizes = st.integers(1, 12)


@given(available=st.integers(1, 40), parts=sizes, size=sizes)
def test_slices_are_disjoint_unless_there_are_too_few(available: int, parts: int, size: int) -> None:
    """No CPU is given twice while there are as many as parts, and no slice is larger than asked for."""
    slices = partition(range(available), parts, size)
    given_out = [cpu for part in slices for cpu in part]

    assert len(slices) == parts
    assert all(1 <= len(part) <= size for part in slices)
    assert available < parts or len(given_out) == len(set(given_out))
    assert available < parts * size or len(given_out) == parts * size


@given(st.sets(st.integers(0, 300), min_size=1))
def test_a_cpu_list_survives_the_round_trip(cpus: set[int]) -> None:
    """What is formatted parses to the same CPUs, sorted."""
    assert parse_cpu_list(format_cpu_list(cpus)) == sorted(cpus)


def test_a_cpu_list_is_written_as_the_kernel_does() -> None:
    """Runs are shortened, single CPUs are not."""
    assert format_cpu_list([8, 3, 2, 1, 0, 0]) == "0-3,8"
    assert format_cpu_list([]) == ""
    assert parse_cpu_list("8,0-3\n") == [0, 1, 2, 3, 8]


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1-2-3", "3-1", "0,x", "²"])
def test_a_malformed_cpu_list_is_refused(text: str) -> None:
    """Anything but numbers and rising ranges is refused with an example."""
    with pytest.raises(CpuListError, match="0-3,8"):
        parse_cpu_list(text)
