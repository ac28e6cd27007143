"""What `qlora check` tells of a job's data."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import builders
from qlora_contract.plan import BadRecords, CheckReport, DataFile, SplitStats
from qlora_contract.run_config import Dataset
from qlora_trainer.errors import DataError
from qlora_trainer.training.data_check import check, problems, warnings

pytestmark = pytest.mark.process


@pytest.fixture
def ask(tmp_path: Path, byte_tokenizer: Callable[..., Any]) -> Callable[..., CheckReport]:
    """The report about a file, with a tokenizer of bytes and no model."""
    byte_tokenizer().save_pretrained(tmp_path / "model")

    def asked(text: str, name: str = "d.json", *, with_model: bool = True, **dataset: Any) -> CheckReport:
        (tmp_path / name).write_text(text)
        run = builders.a_run(
            version=2,
            model={"source": "pvc://here/model"},
            dataset={"source": f"pvc://here/{name}", **dataset},
            training={"epochs": 1, "maxSequenceLength": 64, "globalBatchTokens": 128},
        )
        return check(run, {"here": tmp_path}, with_model=with_model)

    return asked


def _array(count: int) -> str:
    return json.dumps([{"instruction": f"{n}?", "output": "x" * (n % 50)} for n in range(1, count + 1)])


def test_data_are_told_with_their_tokens(ask: Callable[..., CheckReport]) -> None:
    """What the file is, counts, lengths, steps, and samples with what is learned of them."""
    report = ask(_array(99), evalFraction=0.1)

    assert report.files == [DataFile(name="d.json", content="a JSON array")]
    assert (report.unit, report.training.format) == ("tokens", "alpaca")
    assert report.evaluation is not None
    assert report.training.records + report.evaluation.records == 98  # one output is blank
    assert sum(bin_.count for bin_ in report.training.lengths) == report.training.samples
    assert report.training.truncated > 0
    assert report.steps is not None
    assert report.steps.total == report.steps.per_epoch > 10
    assert len(report.samples) == 3
    assert all("x" in text.text for sample in report.samples for text in sample if text.supervised)


def test_bad_records_are_all_told_and_are_a_problem(ask: Callable[..., CheckReport]) -> None:
    """Where the job would end with the first ten; not where it leaves them out."""
    refused, skipped = (
        ask(
            "[" + ", ".join(["1", '{"instruction": "a", "output": "<|im_end|>"}'] * 8 + [_array(60)[1:]]),
            **more,
        )
        for more in ({}, {"onBadRecord": "skip", "maxBadShare": 0.5})
    )

    assert [bad.count for bad in refused.training.bad] == [8, 8, 1]
    [problem] = refused.problems
    assert problem.startswith(
        "17 training record(s) cannot be trained on; mend them, or set dataset.onBadRecord"
    )
    assert skipped.problems == []


def test_without_a_model_characters_are_told(ask: Callable[..., CheckReport]) -> None:
    """And no steps."""
    report = ask(_array(60), with_model=False)

    assert (report.unit, report.steps, report.training.tokens) == ("characters", None, 0)


def test_the_time_is_that_of_the_model_s_configuration(
    ask: Callable[..., CheckReport], tmp_path: Path, smoke_folder: Path
) -> None:
    """Weights are not needed, evaluations count as far as they are bounded; a tokenizer alone tells no time."""
    assert ask(_array(400)).time is None
    configuration = json.loads((smoke_folder / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(configuration))
    alone, evaluated = (ask(_array(400), evalFraction=fraction).time for fraction in (0.0, 0.5))

    assert alone is not None
    assert evaluated is not None
    assert alone.evaluation_seconds == 0 < evaluated.evaluation_seconds
    assert alone.training_seconds > evaluated.training_seconds > 0

    (tmp_path / "model/config.json").write_text(json.dumps(configuration | {"model_type": "mamba"}))
    report = ask(_array(400))
    assert report.time is None
    assert any("the model itself could not be trained on: " in warning for warning in report.warnings)


def test_columns_that_nothing_reads_are_told(ask: Callable[..., CheckReport]) -> None:
    """A label, say, that somebody expects to be learned; what is no column's name may be a value."""
    records = [{"text": f"{number}.", "label": number, "a value?": 1} for number in range(3)]

    assert ask(json.dumps(records), with_model=False).unread == ["label"]
    assert ask(_array(3), with_model=False).unread == []


@pytest.mark.parametrize("with_model", [True, False])
def test_a_label_beside_a_text_is_told_with_what_makes_it_the_answer(
    ask: Callable[..., CheckReport], with_model: bool
) -> None:
    """Which does what it says: the label is then what is learned."""
    records = [{"text": f"{number}.", "label": "even" if number % 2 else "odd"} for number in range(60)]

    [said] = [text for text in ask(json.dumps(records), with_model=with_model).warnings if "label" in text]
    assert "dataset.columns: {instruction: text, output: label}" in said
    report = ask(
        json.dumps(records), with_model=with_model, columns={"instruction": "text", "output": "label"}
    )
    assert not any("label" in text for text in report.warnings)
    assert report.unread == []
    [learned] = [span.text for span in report.samples[0] if span.supervised]
    assert learned.startswith(("odd", "even"))


def test_what_cannot_be_read_is_refused_with_its_place(ask: Callable[..., CheckReport]) -> None:
    """Line and column."""
    with pytest.raises(DataError, match=r"^d\.json: line 2, column 3: is not JSON"):
        ask('[{"text": "a"},\n  x]')


@pytest.mark.parametrize(
    ("prompt", "dataset", "says"),
    [
        pytest.param("Why?", {}, ["raw text, but the model has a chat template"], id="a text"),
        pytest.param([{"role": "user", "content": "Why?"}], {}, [], id="messages"),
        pytest.param(
            [{"role": "user", "content": "Why?"}],
            {"evalFraction": 0},
            ["evaluation.requireImprovement needs data to evaluate on"],
            id="nothing held out",
        ),
    ],
)
def test_what_will_not_go_well_is_warned_of(
    ask: Callable[..., CheckReport], prompt: Any, dataset: dict[str, Any], says: list[str]
) -> None:
    """By what the records are rather than by their keys, and by what the job asks for."""
    records = [{"prompt": prompt, "completion": f"{number}."} for number in range(400)]
    report = ask(json.dumps(records), **dataset)

    assert report.training.format == "prompt-completion"
    assert len(report.warnings) == len(says)
    assert all(part in text for part, text in zip(says, report.warnings, strict=True))


def _split(**fields: Any) -> SplitStats:
    known = {"format": "chat", "records": 1000, "truncated": 0, "dropped": 0, "samples": 1000, "tokens": 1}
    return SplitStats.model_validate({**known, "supervised_tokens": 1, **fields})


@pytest.mark.parametrize(
    ("training", "evaluation", "says"),
    [
        pytest.param({}, {}, [], id="nothing"),
        pytest.param({"records": 12}, None, ["12 record(s) to train on"], id="few"),
        pytest.param({"duplicates": 51}, None, ["51 of 1,000 training records say the same"], id="copies"),
        pytest.param({"duplicates": 50}, None, [], id="some copies"),
        pytest.param({}, {"overlap": 1}, ["1 of 1,000 evaluation records are trained on"], id="overlap"),
        pytest.param({"truncated": 90}, None, ["90 of 1,000 training samples are longer"], id="cut"),
        pytest.param({"dropped": 1}, None, ["1 training samples are left out"], id="dropped"),
        pytest.param({"raw": True}, None, ["are trained on as raw text"], id="raw"),
        pytest.param({"format": "prompt-completion"}, None, [], id="prompts that are messages"),
    ],
)
def test_what_may_not_be_meant_is_warned_of(
    training: dict[str, Any], evaluation: dict[str, Any] | None, says: list[str]
) -> None:
    """In a sentence that says what to change."""
    found = warnings(
        _split(**training), None if evaluation is None else _split(**evaluation), has_template=True
    )

    assert len(found) == len(says)
    assert all(part in text for part, text in zip(says, found, strict=True))


@pytest.mark.parametrize(("share", "refused"), [(0.0991, False), (0.098, True)])
def test_as_many_bad_records_as_a_job_allows_are_no_problem(share: float, refused: bool) -> None:
    """As the job itself counts them."""
    split = _split(records=1000, bad=[BadRecords(reason="no", count=110, places=["d: line 1"])])
    dataset = Dataset(source="pvc://a/b", on_bad_record="skip", max_bad_share=share)

    assert bool(problems(dataset, split, "training")) is refused


def test_a_job_of_few_steps_is_told_what_makes_more(ask: Callable[..., CheckReport]) -> None:
    """In the words of plan and run."""
    few = [text for text in ask(_array(12)).warnings if "step(s)" in text]

    assert len(few) == 1
    assert re.fullmatch(r"\d step\(s\) are too few to learn much: .*raise training.epochs to \d+", few[0])
