"""What the planner answers, with a small model and real data."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import builders
from model_folders import configure
from qlora_contract.env import VOLUMES_ENV
from qlora_contract.exit_codes import ExitCode
from qlora_contract.memory import choose
from qlora_contract.plan import PlanReport, PlanResponse
from qlora_contract.run_config import RunConfig
from qlora_trainer import plan
from qlora_trainer.data import head, packing
from qlora_trainer.data.dataset import load

pytestmark = pytest.mark.process

SAMPLES = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Callable[..., Any]) -> Path:
    """A folder with a model of two layers, and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("claim") / "model"
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def ask(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PlanResponse]:
    """The planner, asked about a job on these records."""
    monkeypatch.setenv(VOLUMES_ENV, json.dumps({"models": str(model.parent), "data": str(tmp_path)}))

    def asked(records: list[Any] | None = None, **fields: Any) -> PlanResponse:
        known = [{"prompt": f"{n}? ", "completion": "x" * (n + 1)} for n in range(SAMPLES)]
        lines = [json.dumps(record) for record in (known if records is None else records)]
        (tmp_path / "data.jsonl").write_text("\n".join(lines))
        (tmp_path / "run.json").write_text(a_run(**fields).to_json())
        return plan.answer(tmp_path / "run.json")

    return asked


def a_run(**fields: Any) -> RunConfig:
    """A RunConfig of two epochs."""
    known = {
        "version": 1,
        "model": {"source": "pvc://models/model"},
        "dataset": {"source": "pvc://data/data.jsonl", "evalFraction": 0.2},
        "training": {"epochs": 2, "globalBatchTokens": 128, "maxSequenceLength": 64},
        "layout": {"memoryPerRank": 2**31},
        "isa": "avx512",
    }
    return builders.a_run(**builders.merged(known, fields))


def planned(answer: PlanResponse) -> PlanReport:
    """The plan, which there must be."""
    assert answer.error is None
    assert answer.plan is not None
    return answer.plan


def test_the_planner_counts_as_training_does(
    ask: Callable[..., PlanResponse], tmp_path: Path, byte_tokenizer: Callable[..., Any]
) -> None:
    """Samples, tokens and steps are those that every rank will make of the same files."""
    report = planned(ask())
    run = a_run()
    data = load(run.dataset, tmp_path / "data.jsonl", byte_tokenizer(), 64)
    steps = packing.StepSchedule(data.train.lengths(), run.training)
    assert data.evaluation is not None
    assert report.evaluation is not None

    assert report.training.records + report.evaluation.records == SAMPLES
    assert (report.training.samples, report.training.tokens) == (len(data.train), len(data.train.ids))
    assert report.training.supervised_tokens == int(data.train.supervised_counts().sum())
    assert (report.steps.total, report.steps.epochs) == (steps.total_steps, 2.0)
    assert report.steps.tokens_per_step * report.steps.per_epoch == pytest.approx(report.training.tokens)
    assert 0.5 < report.steps.fill <= 1.0


def test_the_plan_says_what_evaluation_leaves_out(ask: Callable[..., PlanResponse]) -> None:
    """Of a large set only so many tokens are evaluated; the rest is counted."""
    whole, few = (planned(ask(evaluation={"maxTokens": n})).evaluation for n in (65_536, 70))
    assert whole is not None
    assert few is not None

    assert whole.left_out == 0
    assert few.left_out == whole.samples - few.samples > 0
    assert few.tokens <= 70


def test_the_planner_estimates_memory_as_ranks_do(ask: Callable[..., PlanResponse]) -> None:
    """Micro-batch and total are those of the contract's own choice for the measured shape."""
    report = planned(ask())
    chosen = choose(report.shape, a_run(), "fp32")

    assert (report.memory.total, report.memory.parts) == (chosen.total, chosen.parts())
    assert (report.memory.micro_batch_tokens, report.memory.checkpointing) == (128, "none")
    assert (report.shape.layers, report.shape.hidden, report.shape.tied) == (2, 64, True)
    assert report.stored_in == "unquantized"


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        pytest.param(
            {"vocab_size": 200},
            r"makes token \d+ \('<\|im_end\|>'\) of the data, but the model's embedding has 200 rows",
            id="a token without a row",
        ),
        pytest.param(
            {"max_position_embeddings": 63},
            "training.maxSequenceLength is 64, but .* has only 63 positions",
            id="too few positions",
        ),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(
    ask: Callable[..., PlanResponse], model: Path, config: dict[str, int], cause: str
) -> None:
    """As every rank would refuse it before it loads any weights."""
    other = model.parent / f"{next(iter(config))}"
    shutil.copytree(model, other)
    error = ask(model={"source": f"pvc://models/{configure(other, **config).name}"}).error

    assert error is not None
    assert error.code == ExitCode.MODEL_UNUSABLE
    assert re.search(cause, error.cause)


def test_the_sample_shows_what_is_supervised(ask: Callable[..., PlanResponse]) -> None:
    """A prompt is not; its completion and the end are."""
    report = planned(ask())

    assert [span.supervised for span in report.sample] == [False, True]
    assert report.sample[0].text.endswith("? ")
    assert report.sample[1].text.strip("x") == "<|im_end|>"


@pytest.mark.parametrize(
    ("records", "fields", "code", "cause"),
    [
        pytest.param(
            [{"question": 1}], {}, ExitCode.INVALID_DATA, "data.jsonl: line 1: fits no format", id="a record"
        ),
        pytest.param(
            None,
            {"model": {"source": "pvc://models/none"}},
            ExitCode.MODEL_UNUSABLE,
            "has no config.json: model.source must be a Hugging Face model folder",
            id="a model",
        ),
        pytest.param(
            None,
            {"dataset": {"evalFraction": 0.0}},
            ExitCode.INVALID_CONFIGURATION,
            "evaluation.requireImprovement needs data to evaluate on",
            id="no evaluation",
        ),
        pytest.param(
            None,
            {"dataset": {"source": "pvc://nowhere/data.jsonl"}},
            ExitCode.INVALID_CONFIGURATION,
            "claim 'nowhere' has no directory here",
            id="a claim",
        ),
        pytest.param(
            None,
            {"adapter": {"targetModules": ["no_such_layer"]}},
            ExitCode.MODEL_UNUSABLE,
            "no_such_layer",
            id="target modules",
        ),
    ],
)
def test_what_would_end_training_is_the_answer(
    ask: Callable[..., PlanResponse], records: list[Any] | None, fields: dict[str, Any], code: int, cause: str
) -> None:
    """With the code and the sentence that a rank would end with."""
    answer = ask(records, **fields)

    assert answer.plan is None
    assert answer.error is not None
    assert answer.error.code == code
    assert cause in answer.error.cause


def test_a_missing_run_config_is_the_answer(tmp_path: Path) -> None:
    """With the launcher's sentence."""
    answer = plan.answer(tmp_path / "run.json")

    assert answer.error is not None
    assert answer.error.code == ExitCode.INVALID_CONFIGURATION
    assert answer.error.cause.endswith("run.json cannot be read: No such file or directory")


def test_the_answer_is_one_line_of_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without arguments, of the machine; with too many, none."""
    machine = plan.machine()
    monkeypatch.setattr(plan, "machine", lambda: machine)  # what is free changes from look to look
    assert plan.main([]) == 0
    assert PlanResponse.model_validate_json(capsys.readouterr().out).machine == machine
    assert plan.main(["a", "b"]) == 2
    assert capsys.readouterr().out == ""


def test_the_layout_is_the_one_that_launchers_compute(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For each list of CPUs, one pod: its ranks with CPUs, threads and nodes."""
    cpus = str(min(os.sched_getaffinity(0)))
    (tmp_path / "run.json").write_text(a_run(layout={"cpusPerRank": 1}).to_json())

    assert plan.main(["layout", str(tmp_path / "run.json"), cpus, cpus]) == 0
    answer = PlanResponse.model_validate_json(capsys.readouterr().out)
    assert answer.pods is not None
    assert [(rank.cpus, rank.threads) for pod in answer.pods for rank in pod.ranks] == [(cpus, 1)] * 2
    assert all(pod.bound and pod.notes == [] and pod.unused == "" for pod in answer.pods)


def test_ranks_that_do_not_fit_are_the_answer(tmp_path: Path) -> None:
    """With the launcher's code and sentence."""
    (tmp_path / "run.json").write_text(a_run(layout={"cpusPerRank": 1000}).to_json())
    answer = plan.layouts(tmp_path / "run.json", [str(min(os.sched_getaffinity(0)))])

    assert answer.error is not None
    assert answer.error.code == ExitCode.INVALID_CONFIGURATION
    assert "need 1000 CPUs, but only 1 can be used here" in answer.error.cause


def test_a_layout_needs_cpus(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a list of CPUs the usage is shown."""
    assert plan.main(["layout", "run.json"]) == 2
    assert "layout RUN_JSON CPUS [CPUS ...]" in capsys.readouterr().err


def test_the_size_of_a_model_needs_config_json_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without weights and tokenizer the shape is the same as with them; how weights are stored, config.json says."""
    (tmp_path / "bare").mkdir()
    shutil.copy(model / "config.json", tmp_path / "bare")
    monkeypatch.setenv(VOLUMES_ENV, json.dumps({"all": str(model.parent), "bare": str(tmp_path)}))
    found = []
    for source in ("pvc://all/model", "pvc://bare/bare"):
        (tmp_path / "run.json").write_text(a_run(model={"source": source}).to_json())
        response = plan.sized(tmp_path / "run.json")
        assert response.size is not None, response.error
        found.append(response.size)

    whole, bare = found
    assert whole.shape == bare.shape
    assert whole.shape.stored_bytes == 4
    assert whole.download == (model / "model.safetensors").stat().st_size
    assert bare.download is None

    configure(tmp_path / "bare", dtype="bfloat16")
    response = plan.sized(tmp_path / "run.json")
    assert response.size is not None
    assert response.size.shape.stored_bytes == 2


def test_a_folder_without_config_json_has_no_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is that of training."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv(VOLUMES_ENV, json.dumps({"bare": str(tmp_path)}))
    (tmp_path / "run.json").write_text(a_run(model={"source": "pvc://bare/empty"}).to_json())

    response = plan.sized(tmp_path / "run.json")
    assert response.error is not None
    assert response.error.code == ExitCode.MODEL_UNUSABLE


# --- the beginning of the data


@pytest.fixture
def look(ask: Callable[..., PlanResponse], tmp_path: Path) -> Callable[..., PlanResponse]:
    """look(records, **fields) -> what the planner says of the beginning of these records."""

    def looked(records: list[Any], **fields: Any) -> PlanResponse:
        ask(records, **fields)
        return plan.previewed(tmp_path / "run.json")

    return looked


def _few_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LEAST", 4)
    monkeypatch.setattr(head.Head.__init__, "__defaults__", (8, 10**6, 60.0, time.monotonic))


def test_of_data_with_more_records_the_first_are_told(
    look: Callable[..., PlanResponse], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As such, and without the steps of all, which are not known. All of them are told like a plan's."""
    records = [{"prompt": f"{n}? ", "completion": "x" * (n + 1)} for n in range(SAMPLES)]
    whole = look(records).check
    _few_are_read(monkeypatch)
    first = look(records).check
    assert whole is not None
    assert first is not None

    assert (whole.first, first.first) == (None, 8)
    assert whole.steps is not None
    assert f"; {whole.steps.total} steps of " in whole.sentence()
    assert first.steps is None
    assert first.sentence().startswith(
        "by the first 8 records, and there are more: data.jsonl (a JSONL file): training: "
    )
    assert whole.training.records + (whole.evaluation.records if whole.evaluation else 0) == SAMPLES


BAD = {"prompt": "a", "completion": 1}
LONG = [{"prompt": f"{n}" + "?" * 100, "completion": "x"} for n in range(20)]
SAME = {"prompt": "a? ", "completion": "b"}
FINE = [{"prompt": f"{n}? ", "completion": "b"} for n in range(20)]


@pytest.mark.parametrize(
    ("records", "dataset", "codes", "says"),
    [
        pytest.param([SAME, BAD, *FINE], {}, (11, 11), "line 2", id="a bad record ends the job"),
        pytest.param(LONG, {}, (11, 1), "no supervised token", id="nothing is left to learn"),
        pytest.param(
            [SAME, BAD, *FINE], {"onBadRecord": "skip", "maxBadShare": 0.01}, (11, None),
            "more than dataset.maxBadShare 0.01 allows", id="more bad records than are allowed",
        ),
        pytest.param([SAME] * 20, {"evalFraction": 0.2}, (11, 1), "all the same", id="nothing can be held out"),
        pytest.param(
            FINE, {"evalFraction": 0.0}, (10, 10), "evaluation.requireImprovement", id="nothing is held out"
        ),
    ],
)  # fmt: skip
def test_a_beginning_refuses_only_what_all_of_it_would(
    look: Callable[..., PlanResponse],
    monkeypatch: pytest.MonkeyPatch,
    records: list[Any],
    dataset: dict[str, Any],
    codes: tuple[int, int | None],
    says: str,
) -> None:
    """A record that is bad is bad; of too few good ones more may follow. `codes`: where all is read, and where not."""
    whole = look(records, version=2, dataset=dataset)
    _few_are_read(monkeypatch)
    first = look(records, version=2, dataset=dataset)

    assert whole.error is not None
    assert (whole.error.code, says in whole.error.cause) == (codes[0], True), whole.error.cause
    if codes[1] is None:
        assert first.check is not None
        assert any(says in warning for warning in first.check.warnings)
    else:
        assert first.error is not None
        assert (first.error.code, says in first.error.cause) == (codes[1], True), first.error.cause


def test_ranks_without_work_are_warned_of_before_they_start(look: Callable[..., PlanResponse]) -> None:
    """Where there are fewer rows than ranks."""
    records = [{"prompt": f"{n}? ", "completion": "x"} for n in range(10)]
    found = look(records, layout={"pods": 2, "ranksPerPod": 4}).check
    assert found is not None

    assert "for 8 ranks" in found.sentence()
