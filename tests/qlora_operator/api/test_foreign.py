"""Configurations of other programs."""

import pytest

from qlora_operator.api import foreign
from qlora_operator.api.loader import parse_job
from qlora_operator.api.messages import schema_at
from qlora_operator.errors import InvalidJobError


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"base_model": "a/b", "datasets": [], "lora_r": 8}, "this is an Axolotl configuration"),
        ({"model_name_or_path": "a/b", "stage": "sft", "cutoff_len": 8}, "this is a LLaMA-Factory configuration"),
        ({"model_name_or_path": "a/b", "dataset_name": "c", "use_peft": True}, "this is a TRL configuration"),
    ],
    ids=["Axolotl", "LLaMA-Factory", "TRL"],
)  # fmt: skip
def test_another_programs_configuration_is_known(document: dict[str, object], words: str) -> None:
    """One sentence, with what its fields are called here."""
    with pytest.raises(InvalidJobError) as refused:
        parse_job(document)
    ((path, message),) = refused.value.faults

    assert path == ""
    assert message.startswith(words)
    assert "is spec.model.source" in message
    assert "qlora init" in message


def test_what_stands_for_a_field_exists() -> None:
    """Every path of the tables is one of a job; and no name is one of ours, which would never be asked for."""
    for path in [*foreign.FIELDS.values(), *foreign.NOTES]:
        schema_at(["spec", *path.split(".")])
    spec = schema_at(["spec"])["properties"]
    ours = {name for section in spec.values() for name in section.get("properties", {})} | spec.keys()

    assert {foreign.folded(name) for name in [*foreign.FIELDS, *foreign.ABSENT]}.isdisjoint(
        map(foreign.folded, ours)
    )
