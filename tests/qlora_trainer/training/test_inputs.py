"""What ranks and `qlora plan` read alike."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from qlora_contract.run_config import Dataset, JobRef, Layout, ModelSource, RunConfig, Training
from qlora_trainer.data.bundled_templates import TEMPLATES
from qlora_trainer.errors import ModelError
from qlora_trainer.training.inputs import default_compute_dtype, load_inputs, stop_ids, template_settings

pytestmark = pytest.mark.process

BEGAN = datetime.datetime(2026, 1, 31, 23, 59, tzinfo=datetime.UTC)


def a_run(**training: Any) -> RunConfig:
    """A run on the claim `data`."""
    return RunConfig(
        job=JobRef(name="job", uid="u", attempt=0),
        workspace="pvc://data/work",
        model=ModelSource(source="pvc://data/model"),
        dataset=Dataset(source="pvc://data/docs.jsonl"),
        training=Training.model_validate({"maxSteps": 1, **training}),
        layout=Layout(memory_per_rank=2**30),
        isa="avx2",
    )


@pytest.mark.parametrize(
    ("isa", "asked", "dtype"),
    [
        pytest.param("avx512", "auto", "fp32", id="emulated"),
        pytest.param("amx_bf16", "auto", "bf16", id="native"),
        pytest.param("amx_bf16", "fp32", "fp32", id="as asked"),
    ],
)
def test_the_compute_dtype_follows_the_tier(isa: Any, asked: str, dtype: str) -> None:
    """bf16 where the processor computes in it natively, unless the job asks for another one."""
    run = a_run(computeDtype=asked).model_copy(update={"isa": isa})

    assert default_compute_dtype(run) == dtype


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    """The error says which folder it was."""
    (tmp_path / "model").mkdir()
    (tmp_path / "docs.jsonl").write_text("{}")

    with pytest.raises(ModelError, match="model has no tokenizer"):
        load_inputs(a_run(), {"data": tmp_path}, BEGAN)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        pytest.param({"eos_token_id": [7, 9]}, {"eos_token_id": 2}, (2, 7, 9), id="both"),
        pytest.param({"eos_token_id": None}, {}, (), id="none"),
        pytest.param([], {"eos_token_id": "x"}, (), id="of another form"),
    ],
)
def test_generation_stops_where_the_model_says(
    tmp_path: Path, generation: Any, config: Any, expected: tuple[int, ...]
) -> None:
    """A model names the tokens in generation_config.json and config.json; what is not there says nothing."""
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps(config))

    assert stop_ids(tmp_path) == expected
    assert stop_ids(tmp_path / "gone") == ()


def test_variables_of_a_template_are_what_they_look_like(byte_tokenizer: Any) -> None:
    """`true` and `false` are booleans, whole numbers are numbers, all else stays text."""
    texts = {
        "a": "true",
        "b": "false",
        "c": "12",
        "d": "1.5",
        "e": "high",
        "f": '"true"',
        "g": "",
        "h": "null",
    }
    dataset = Dataset(source="pvc://c/d", chat_template_kwargs=texts)

    settings = template_settings(dataset, byte_tokenizer(), BEGAN, (7,))

    assert settings.variables == {**texts, "a": True, "b": False, "c": 12}
    assert (settings.source, settings.clock, settings.stop_ids) == (None, BEGAN, (7,))


@pytest.mark.parametrize(
    ("given", "source"),
    [("{{ messages }}", "{{ messages }}"), ("bundled:chatml", TEMPLATES["chatml"]), ("bundled:auto", None)],
)
def test_a_job_chooses_its_template(byte_tokenizer: Any, given: str, source: str | None) -> None:
    """Its text as it is, or a bundled one by its name."""
    dataset = Dataset(source="pvc://c/d", chat_template=given)

    assert template_settings(dataset, byte_tokenizer(), BEGAN, ()).source == source
