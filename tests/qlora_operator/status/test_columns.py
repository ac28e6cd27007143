"""Text for `kubectl get`."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_operator.api.status import Columns, Progress, Restarts
from qlora_operator.status.columns import columns, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59, "59s"),
        (60, "1m"),
        (599, "9m"),
        (3599, "59m"),
        (3600, "1h"),
        (3660, "1h1m"),
        (12_000, "3h20m"),
        (86_399, "23h59m"),
        (86_400, "1d"),
        (187_200, "2d4h"),
        (8_640_000, "100d"),
    ],
)
def test_a_duration_has_at_most_two_units(seconds: int, text: str) -> None:
    """Two units at most."""
    assert duration(seconds) == text


@given(st.integers(0, 10**10))
def test_duration_is_short(seconds: int) -> None:
    """Whatever the number, it fits a column."""
    assert len(duration(seconds)) <= 10


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        pytest.param(None, {}, id="nothing told"),
        pytest.param(Progress(step=3), {}, id="the total is not known"),
        pytest.param(Progress(step=0, total_steps=400), {"step": "0/400"}, id="no step yet"),
        pytest.param(
            Progress(step=120, total_steps=400, loss=1.83491, tokens_per_second=411.7, eta_seconds=540),
            {"step": "120/400", "loss": "1.835", "tokens_per_second": "411.7", "eta": "9m"},
            id="all told",
        ),
        pytest.param(
            Progress(loss=0.00012345, tokens_per_second=123456.0),
            {"loss": "0.0001234", "tokens_per_second": "1.235e+05"},
            id="four digits that mean something",
        ),
    ],
)
def test_columns_show_what_is_known(progress: Progress | None, expected: dict[str, str]) -> None:
    """What is not known is left out; the sum of both kinds of restarts is shown."""
    known = Columns.model_validate({"ranks": "1/2", "restarts": "5", **expected})

    assert columns(1, 2, progress, Restarts(user=2, infrastructure=3)) == known
