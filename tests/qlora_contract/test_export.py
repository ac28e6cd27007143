"""What is asked of the exporter."""

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_contract.export import EXPORT_FORMS, forms_of, gguf_type
from qlora_contract.files import sha256
from qlora_contract.job_folder import is_exported
from qlora_contract.run_config import Output


@pytest.mark.parametrize(
    ("output", "forms"),
    [
        pytest.param({}, [], id="nothing is said"),
        pytest.param({"formats": ["adapter"], "ggufTypes": ["f16"]}, [], id="types of nothing"),
        pytest.param({"formats": ["gguf"]}, ["gguf-q8_0"], id="the default type"),
        pytest.param(
            {"formats": ["gguf", "merged"], "ggufTypes": ["lora", "f16"]},
            ["merged", "gguf-f16", "gguf-lora"],
            id="all",
        ),
    ],
)
def test_formats_and_types_are_forms_in_one_order(output: dict[str, Any], forms: list[str]) -> None:
    """Whatever order the user wrote them in."""
    assert forms_of(Output.model_validate(output)) == forms


def test_each_form_but_the_merged_model_is_a_type_of_gguf() -> None:
    """As output.ggufTypes names them."""
    assert [gguf_type(form) for form in EXPORT_FORMS] == [None, "f16", "q8_0", "q4_k_m", "lora"]


def test_an_export_counts_when_it_is_complete_and_of_this_adapter(tmp_path: Path) -> None:
    """One of an adapter that was trained anew does not."""
    (tmp_path / "m.gguf").write_text("weights")
    manifest = {"files": {"m.gguf": sha256(tmp_path / "m.gguf")}, "adapter_sha256": "a"}
    assert not is_exported(tmp_path, "a")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))

    assert is_exported(tmp_path, "a")
    assert not is_exported(tmp_path, "b")
    (tmp_path / "m.gguf").write_text("half")
    assert not is_exported(tmp_path, "a")
