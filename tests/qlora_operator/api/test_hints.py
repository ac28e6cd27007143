"""What was probably meant by a wrong value."""

import pytest

from qlora_contract import remote
from qlora_operator.api import quantity
from qlora_operator.api.hints import hint


@pytest.mark.parametrize(
    ("pattern", "value", "phrase"),
    [
        (remote.MODEL_PATTERN, "HuggingFaceTB/X", "did you mean hf://HuggingFaceTB/X?"),
        (remote.DATASET_PATTERN, "a/b", "did you mean hf://datasets/a/b?"),
        (remote.DATASET_PATTERN, "hf://a/b", "did you mean hf://datasets/a/b?"),
        (remote.MODEL_PATTERN, "hf://datasets/a/b", "that is a dataset of the Hub"),
        (remote.MODEL_PATTERN, "https://huggingface.co/a/b/tree/main", "did you mean hf://a/b?"),
        (remote.DATASET_PATTERN, "https://huggingface.co/datasets/a/b", "did you mean hf://datasets/a/b?"),
        (remote.DESTINATION_PATTERN, "a/b", "did you mean hf://a/b?"),
        (remote.PVC_PATTERN, "pvc://Team_Data/q", "'T', '_', 'D'"),
        (remote.PVC_PATTERN, "pvc://Team_Data/q", "did you mean pvc://team-data/q?"),
        (remote.PVC_PATTERN, "pvc://a//b", "two slashes in a row"),
        (remote.PVC_PATTERN, "/srv/x", "a cluster reads pvc://CLAIM/PATH"),
        (remote.MODEL_PATTERN, "s3://My_Bucket/x", "'M', '_', 'B'"),
        (
            remote.DATASET_PATTERN,
            "file:///srv/d.jsonl",
            "did you mean /srv/d.jsonl, as the `qlora` command reads it?",
        ),
        (remote.DATASET_PATTERN, "~nobody/d.jsonl", "there is no user nobody on this machine"),
        (quantity.MEMORY_PATTERN, "4GB", "did you mean 4G or 4Gi?"),
        (quantity.MEMORY_PATTERN, "16 gib", "did you mean 16G or 16Gi?"),
        (quantity.MEMORY_PATTERN, 16, "did you mean 16Gi?"),
    ],
)
def test_what_was_meant_is_said(pattern: str, value: object, phrase: str) -> None:
    """Or which characters are wrong."""
    assert phrase in (hint(value, {"type": "string", "pattern": pattern}) or "")


@pytest.mark.parametrize("value", [None, True, [], "much", "pvc://a/b\n"])
def test_nothing_is_made_up(value: object) -> None:
    """Where nothing comes to mind."""
    assert hint(value, {"type": "string", "pattern": quantity.MEMORY_PATTERN}) is None


@pytest.mark.parametrize(
    ("type_", "value", "phrase"),
    [
        ("integer", "3", "did you mean 3, without quotes?"),
        ("number", "1e-4", "did you mean 1e-4, without quotes?"),
        ("boolean", "true", "did you mean true, without quotes?"),
        ("object", "name:mine", "a space is missing after the colon"),
        ("integer", "three", None),
        ("integer", 3.5, None),
        ("object", "mine", None),
    ],
)
def test_a_value_of_the_wrong_type_may_have_been_meant_otherwise(
    type_: str, value: object, phrase: str | None
) -> None:
    """Quotes that make a text of a number, and a colon that makes no map."""
    assert hint(value, {"type": type_}) == phrase
