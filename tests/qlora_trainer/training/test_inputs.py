"""What ranks and `qlora plan` read alike."""

from pathlib import Path
from typing import Any

import pytest

from qlora_contract.run_config import Dataset, JobRef, Layout, ModelSource, RunConfig, Training
from qlora_trainer.errors import ModelError
from qlora_trainer.training.inputs import default_compute_dtype, load_inputs

pytestmark = pytest.mark.process


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
    ("tiers", "asked", "dtype"),
    [
        pytest.param(["avx512"], "auto", "fp32", id="emulated"),
        pytest.param(["amx_bf16"], "auto", "bf16", id="native"),
        pytest.param(["amx_bf16", "avx512_bf16"], "auto", "bf16", id="native on each"),
        pytest.param(["amx_bf16", "avx512"], "auto", "fp32", id="the least decides"),
        pytest.param(["amx_bf16"], "fp32", "fp32", id="as asked"),
        pytest.param(["avx2"], "bf16", "bf16", id="as asked, emulated"),
    ],
)
def test_the_compute_dtype_follows_the_ranks_processors(tiers: list[str], asked: str, dtype: str) -> None:
    """bf16 where all of them compute in it natively, unless the job asks for another one: the tier that the nodes were
    chosen by, here the lowest, says what they have at least."""
    assert default_compute_dtype(a_run(computeDtype=asked), tiers) == dtype


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    """The error says which folder it was."""
    (tmp_path / "model").mkdir()
    (tmp_path / "docs.jsonl").write_text("{}")

    with pytest.raises(ModelError, match="model has no tokenizer"):
        load_inputs(a_run(), {"data": tmp_path})
