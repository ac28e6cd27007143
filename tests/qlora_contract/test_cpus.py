"""CPU lists, and the slices of ranks."""

from hypothesis import given
from hypothesis import strategies as st

from qlora_contract.cpus import format_cpu_list, slices

sizes = st.integers(1, 12)


@given(there=st.integers(1, 40), parts=sizes, each=sizes)
def test_slices_are_disjoint_unless_there_are_too_few(there: int, parts: int, each: int) -> None:
    """No CPU is given twice while there are as many as parts, and none gets more than it asked for."""
    shared = slices(range(there), parts, each)
    given_out = [cpu for part in shared for cpu in part]

    assert len(shared) == parts
    assert all(1 <= len(part) <= each for part in shared)
    assert there < parts or len(given_out) == len(set(given_out))
    assert there < parts * each or len(given_out) == parts * each


def test_a_list_is_written_as_the_kernel_does() -> None:
    """Runs are shortened, single CPUs are not."""
    assert format_cpu_list([8, 3, 2, 1, 0, 0]) == "0-3,8"
    assert format_cpu_list([]) == ""
