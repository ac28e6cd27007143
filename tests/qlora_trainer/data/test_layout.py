"""Which files of a folder hold a split."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.data.layout import split_files
from qlora_trainer.errors import DataError

CARD = """---
license: apache-2.0
configs:
- config_name: en
  data_files:
  - split: train
    path: en/*.parquet
  - split: test
    path: [en-test/a.parquet, "deep/**/b.parquet"]
- config_name: de
  default: true
  data_files: de/train*.jsonl
---
# Data
"""


@pytest.mark.parametrize(
    ("names", "split", "found"),
    [
        (["train.jsonl", "test.jsonl"], "train", ["train.jsonl"]),
        (["train.json"], "train", ["train.json"]),
        (["train.csv.gz", "README.md"], "train", ["train.csv.gz"]),
        (["sft.v2.jsonl", "sft.jsonl"], "sft.v2", ["sft.v2.jsonl"]),
        (
            ["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet", "data/test-00000.parquet"],
            "train",
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ),
        (["data/train-00000-of-00001-b42a775f407cee45.parquet"], "train",
         ["data/train-00000-of-00001-b42a775f407cee45.parquet"]),
        (["train-2.json", "train-10.json", "train-1.json"], "train", ["train-1.json", "train-2.json", "train-10.json"]),
        (["train_0.json", "training.json"], "train", ["train_0.json"]),
        (["default/train/0001.parquet", "default/train/0000.parquet", "default/test/0000.parquet"], "train",
         ["default/train/0000.parquet", "default/train/0001.parquet"]),
        (["train/a.jsonl", "train/b.jsonl"], "train", ["train/a.jsonl", "train/b.jsonl"]),
        (["data/test.csv", "data/train.csv"], "test", ["data/test.csv"]),
        (["data-00000-of-00001.arrow", "state.json", "dataset_info.json"], "train", ["data-00000-of-00001.arrow"]),
        (["train/data-00000-of-00001.arrow", "train/cache-1.arrow", "train/state.json", "dataset_dict.json"], "train",
         ["train/data-00000-of-00001.arrow"]),
        (["train.jsonl", "data/train-00000-of-00001.parquet"], "train", ["train.jsonl"]),
    ],
    ids=["file", "json", "compressed", "dots", "parts", "hash", "natural-order", "underscore", "converted", "folder",
         "data-folder", "saved", "saved-splits", "nearest"],
)  # fmt: skip
def test_a_split_is_found_as_the_hub_has_it(names: list[str], split: str, found: list[str]) -> None:
    """A file, its numbered parts, or a folder; in the folder itself, in data or in default."""
    assert split_files(names, split, "folder") == found


@pytest.mark.parametrize(
    ("names", "split", "found"),
    [
        (
            ["de/train1.jsonl", "de/train2.jsonl", "en/a.parquet"],
            "train",
            ["de/train1.jsonl", "de/train2.jsonl"],
        ),
        (["train.jsonl", "de/train1.jsonl"], "train", ["train.jsonl"]),
    ],
    ids=["default", "file"],
)
def test_the_card_says_which_files_a_split_has(names: list[str], split: str, found: list[str]) -> None:
    """The default configuration's; but a file that is named like the split needs no card."""
    assert split_files(names, split, "folder", CARD) == found


def test_patterns_of_a_card_are_globs() -> None:
    """One star stays within a folder, two do not."""
    card = CARD.replace("  default: true\n", "").replace("config_name: en", "config_name: default")
    names = ["en/a.parquet", "en/sub/b.parquet", "en-test/a.parquet", "deep/x/y/b.parquet", "deep/b.parquet"]

    assert split_files(names, "train", "folder", card) == ["en/a.parquet"]
    assert split_files(names, "test", "folder", card) == [
        "deep/b.parquet",
        "deep/x/y/b.parquet",
        "en-test/a.parquet",
    ]


@pytest.mark.parametrize(
    ("names", "readme", "error"),
    [
        ([], "", r"folder: has no split 'train' \(train with one of \.jsonl, .*\); its splits: none$"),
        (["x.pdf", "y.docx", "LICENSE"], "", r"its splits: none; files ending in \.docx, \.pdf are not read"),
        (
            ["data/test-00000-of-00001.parquet", "sft.json", "val/0.csv"],
            "",
            "sft, test, val; name one of them",
        ),
        (
            ["train.csv", "train.jsonl"],
            "",
            r"has split 'train' more than once \(train\.csv and train\.jsonl\)",
        ),
        (
            ["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"],
            "",
            "has 2 of the 3 files of split 'train'",
        ),
        (
            ["en/a.parquet"],
            CARD.replace("  default: true\n", ""),
            "has the configurations en, de and no default one",
        ),
    ],
    ids=["empty", "unread", "others", "twice", "part", "configurations"],
)
def test_a_folder_that_does_not_fit_is_named(names: list[str], readme: str, error: str) -> None:
    """With what is there instead."""
    with pytest.raises(DataError, match=error):
        split_files(names, "train", "folder", readme)


@given(
    names=st.lists(st.text("abtrin/.-_0123456789 ", min_size=1, max_size=12), max_size=5),
    readme=st.text(max_size=30),
)
def test_any_folder_has_a_split_or_is_refused(names: list[str], readme: str) -> None:
    """Whatever it holds, and whatever its README.md says."""
    with_suffix = [f"{name}.jsonl" for name in names]
    found: list[str] = []
    try:
        found = split_files(with_suffix, "train", "folder", f"---\nconfigs: {readme}\n---\n")
    except DataError as error:
        assert "folder: " in str(error)  # noqa: PT017 - either is right
    assert set(found) <= set(with_suffix)
