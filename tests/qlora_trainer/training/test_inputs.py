"""What ranks and `qlora plan` read alike."""

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from qlora_contract.memory import ModelShape
from qlora_contract.run_config import Dataset, JobRef, Layout, ModelSource, RunConfig, Training
from qlora_trainer.data.bundled_templates import TEMPLATES
from qlora_trainer.data.dataset import Samples
from qlora_trainer.errors import ConfigurationError, ModelError
from qlora_trainer.training.inputs import (
    bounded,
    default_compute_dtype,
    load_inputs,
    stop_ids,
    template_settings,
)

pytestmark = pytest.mark.process

BEGAN = datetime.datetime(2026, 1, 31, 23, 59, tzinfo=datetime.UTC)


A_SHAPE = ModelShape(
    hidden=64,
    intermediate=128,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=16,
    vocabulary=300,
    tied=True,
    stored_bytes=2,
    linear_weights=10**5,
    largest_linear=10**4,
    adapter_weights=10**3,
)


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
        load_inputs(a_run(), A_SHAPE, {"data": tmp_path}, BEGAN)


def test_more_tokens_than_the_model_has_positions_are_refused(tmp_path: Path) -> None:
    """Before anything is read: beyond them the model has learned nothing."""
    shape = A_SHAPE.model_copy(update={"positions": 512})

    with pytest.raises(ModelError, match=r"maxSequenceLength is 1024, but .*model has only 512 positions"):
        load_inputs(a_run(), shape, {"data": tmp_path}, BEGAN)


def some_samples(order: list[int], groups: list[int] | None = None) -> Samples:
    """Sample n, for each n of `order`, is n + 2 tokens of value n, the last supervised."""
    ids = [np.full(n + 2, n, dtype=np.int32) for n in order]
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    mask = np.zeros(offsets[-1], dtype=np.uint8)
    mask[offsets[1:] - 1] = 1
    bounds = None if groups is None else np.array(groups, dtype=np.int64)
    return Samples(np.concatenate(ids), mask, offsets, bounds)


def numbers(samples: Samples) -> list[int]:
    """Which of some_samples these are; each must be whole."""
    found = [int(samples.sample(i)[0][0]) for i in range(len(samples))]
    assert samples.lengths().tolist() == [n + 2 for n in found]
    assert samples.supervised_counts().tolist() == [1] * len(found)
    return found


def test_evaluation_samples_within_the_bound_are_left_alone() -> None:
    """The usual small set is evaluated as a whole."""
    samples = some_samples([3, 1, 2])

    assert bounded(samples, 12) is samples


@pytest.mark.parametrize("bound", [1, 30, 60, 400])
def test_more_samples_than_the_bound_are_chosen_whatever_their_order(bound: int) -> None:
    """The bound holds, for all but a single sample; another order of the file chooses the same ones."""
    order = list(range(40))
    one, other = (bounded(some_samples(o), bound) for o in (order, order[::-1]))

    assert len(one.ids) <= bound or len(one) == 1
    assert numbers(one) == sorted(numbers(other))
    assert len(one) >= min(20, bound // 42)
    assert numbers(one) != order[: len(one)]  # the first ones would be no fair choice


def test_samples_are_chosen_with_their_group() -> None:
    """Packing needs the samples of a group side by side."""
    chosen = bounded(some_samples([4, 4, 9, 9, 7, 7], groups=[0, 2, 4, 6]), 25)

    assert numbers(chosen) in ([4, 4], [9, 9], [7, 7])
    assert chosen.group_offsets is not None
    assert chosen.group_offsets.tolist() == [0, 2]


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


def test_a_template_may_be_a_file_of_the_data_or_of_the_model(byte_tokenizer: Any, tmp_path: Path) -> None:
    """The data's folder comes first. What is in neither, or is no text, is refused by name."""
    data, model = tmp_path / "data", tmp_path / "model"
    for folder, names in ((data, ("both",)), (model, ("both", "own"))):
        folder.mkdir()
        for name in names:
            (folder / f"{name}.jinja").write_text(f"{folder.name} {{{{ messages }}}} é", encoding="utf-8")
    (data / "latin.jinja").write_bytes("é".encode("latin-1"))

    def source(name: str) -> str | None:
        dataset = Dataset(source="pvc://c/d", chat_template=f"file:{name}.jinja")
        return template_settings(dataset, byte_tokenizer(), BEGAN, (), (data, model)).source

    assert source("both") == "data {{ messages }} é"
    assert source("own") == "model {{ messages }} é"
    for name, why in (
        ("none", "no file none.jinja in .*data nor .*model"),
        ("latin", "UTF-8"),
    ):
        with pytest.raises(ConfigurationError, match=f"dataset.chatTemplate: .*{why}"):
            source(name)


@pytest.mark.parametrize("name", ["file:../x.jinja", "file:a/b.jinja", "file:x.txt", "file:.jinja", "file:"])
def test_a_templates_file_is_a_name_alone(name: str) -> None:
    """Without folders; nothing of the sort passes for a template's text."""
    with pytest.raises(ValidationError):
        Dataset(source="pvc://c/d", chat_template=name)
