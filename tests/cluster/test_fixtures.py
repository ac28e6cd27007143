"""A test's namespace has a name that Kubernetes takes and no other test has."""

import re

from hypothesis import given
from hypothesis import strategies as st

from testcluster.fixtures import namespace_name


@given(st.text())
def test_any_test_has_a_valid_namespace_name(test: str) -> None:
    """Whatever a test is called, its namespace's name is a DNS label."""
    name = namespace_name(test)

    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 63


def test_two_tests_of_one_name_have_two_namespaces() -> None:
    """Names do not repeat."""
    assert namespace_name("test_x") != namespace_name("test_x")
