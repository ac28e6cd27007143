"""The beginning of data."""

from collections.abc import Iterator

import pytest

from qlora_trainer.data.head import LEAST, Head
from qlora_trainer.data.readers import BadRow, Row


def rows(count: int) -> Iterator[Row | BadRow]:
    """So many."""
    return (Row(f"line {number}", {"text": "a"}) for number in range(count))


@pytest.mark.parametrize(
    ("bounds", "there", "read"),
    [
        pytest.param({"records": 500}, 500, 500, id="just as many"),
        pytest.param({"records": 500}, 501, 500, id="one more"),
        pytest.param({"tokens": 0}, 1000, LEAST, id="too many tokens"),
        pytest.param({"seconds": 0.0}, 1000, LEAST, id="no time"),
        pytest.param({"seconds": 0.0}, LEAST, LEAST, id="no time, and no more records"),
    ],
)
def test_only_so_much_is_read(bounds: dict[str, int], there: int, read: int) -> None:
    """By records, tokens and time, but never nothing; whether there is more is known."""
    head = Head(**bounds)  # type: ignore[arg-type]

    assert len(list(head.of(rows(there)))) == read
    assert (head.looked_at, head.cut) == (read, there > read)


def test_records_are_counted_for_each_split_and_tokens_for_all() -> None:
    """A first source that is large does not keep a second one from being looked at."""
    head = Head(records=LEAST + 10, tokens=1000)
    first = len(list(head.of(rows(5000))))
    head.spend(1000)
    second = len(list(head.of(rows(5000))))

    assert (first, second, head.looked_at) == (LEAST + 10, LEAST, 2 * LEAST + 10)
