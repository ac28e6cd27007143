"""Which files hold records, by their names."""

import pytest

from qlora_contract.containers import COMPRESSIONS, CONTAINERS, METADATA, split_name


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("train.jsonl", ("train", ".jsonl", "")),
        ("data/Train.V2.JSON", ("data/Train.V2", ".json", "")),
        ("train.csv.gz", ("train", ".csv", ".gz")),
        ("a.b/train-00000-of-00004.parquet", ("a.b/train-00000-of-00004", ".parquet", "")),
        ("train.parquet.gz", None),
        ("train.gz", None),
        ("train", None),
        ("data.jsonl/train", None),
        ("x.pdf", None),
        ("sub/state.json", None),
        ("cache-1.arrow", None),
        ("cache-1.jsonl", ("cache-1", ".jsonl", "")),
    ],
)
def test_a_name_is_stem_container_and_compression(name: str, parts: tuple[str, str, str] | None) -> None:
    """What a split is called, what reads it, and what unpacks it."""
    assert split_name(name) == parts


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_text_may_be_compressed(suffix: str) -> None:
    """Parquet and Arrow compress inside."""
    for compression in COMPRESSIONS:
        assert (split_name(f"x{suffix}{compression}") is not None) is CONTAINERS[suffix].compressible


def test_metadata_holds_no_records() -> None:
    """Though some of it is JSON."""
    assert [split_name(name) for name in METADATA] == [None] * len(METADATA)
