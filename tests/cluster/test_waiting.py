"""Waiting ends with what was waited for, or with an error."""

import pytest

from testcluster.errors import ClusterError
from testcluster.waiting import wait_for


def test_the_first_true_value_is_given() -> None:
    """What the function gives when it is first true is the result."""
    values = iter([None, None, "there", "later"])

    assert wait_for(lambda: next(values)) == "there"


def test_what_never_comes_is_an_error() -> None:
    """After the seconds, the error names what was waited for."""
    with pytest.raises(ClusterError, match=r"the moon did not come within 0.05 s"):
        wait_for(lambda: None, seconds=0.05, or_else="the moon")
