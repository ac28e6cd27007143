"""Held-out prompts, answered by the base and by the adapter."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_contract.job_folder import ADAPTER, ANSWERS, TRAINING_REPORT
from qlora_contract.run_config import Evaluation, RunConfig
from qlora_trainer.data.dataset import Samples
from qlora_trainer.errors import Terminated
from qlora_trainer.report.files import page_of
from qlora_trainer.training import answers
from qlora_trainer.training.answers import (
    HeldOut,
    end_of,
    groups,
    has_labels,
    held_out,
    is_json,
    label,
    scores,
)
from qlora_trainer.training.context import RankContext
from qlora_trainer.training.loop import train

pytestmark = pytest.mark.process

Ready = Callable[..., RankContext]


def samples(*each: tuple[list[int], list[int]]) -> Samples:
    """Samples of (ids, mask)."""
    ids = [np.array(ids, np.int32) for ids, _ in each]
    masks = [np.array(mask, np.uint8) for _, mask in each]
    offsets = np.cumsum([0, *map(len, ids)])
    return Samples(np.concatenate(ids), np.concatenate(masks), offsets)


def test_a_prompt_is_all_before_what_is_learned_last() -> None:
    """Of a conversation the last answer; what is learned from its beginning has no prompt."""
    data = samples(
        ([1, 2, 3, 4], [0, 0, 1, 1]),
        ([1, 2, 3, 4, 5, 6], [0, 1, 0, 0, 1, 0]),
        ([7, 8, 9], [0, 1, 1]),
        ([5, 6, 7], [0, 0, 1]),
    )

    assert held_out(data, 10) == [HeldOut([1, 2], [3, 4]), HeldOut([1, 2, 3, 4], [5]), HeldOut([5, 6], [7])]
    assert held_out(data, 2) == held_out(data, 10)[:2]


LABELLED = [([1, 2, label], [0, 0, 1]) for label in (5, 6, 5, 6)]
DATA: dict[str, tuple[list[tuple[list[int], list[int]]], bool]] = {
    "two labels": (LABELLED, True),
    "each answer once": ([([1, 2, n], [0, 0, 1]) for n in range(3, 9)], False),
    "always the same": ([([1, 2, 5], [0, 0, 1])] * 4, False),
    "long answers": ([([1, 2, *range(20)], [0, 0, *[1] * 20])] * 4, False),
    "many answers": ([([1, 2, n // 2], [0, 0, 1]) for n in range(100)], False),
}


@pytest.mark.parametrize(("data", "expected"), DATA.values(), ids=DATA)
def test_few_short_answers_that_come_again_are_labels(
    data: list[tuple[list[int], list[int]]], expected: bool
) -> None:
    """By the tokens of all held-out samples."""
    assert has_labels(samples(*data)) == expected


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([5], [(0, 1)]),
        ([4, 4, 4], [(0, 2), (2, 3)]),
        ([50, 1, 1], [(0, 1), (1, 3)]),
        ([1, 50, 50], [(0, 1), (1, 2), (2, 3)]),
    ],
    ids=str,
)
def test_prompts_are_answered_together_as_there_is_room(
    sizes: list[int], expected: list[tuple[int, int]]
) -> None:
    """Ten tokens' room; one that is too long is alone."""
    assert list(groups(sizes, 10)) == expected


def row(reference: str, base: str, adapter: str) -> dict[str, str]:
    """An answered prompt."""
    return {"prompt": "?", "reference": reference, "base": base, "adapter": adapter}


SCORES: dict[str, tuple[list[dict[str, str]], bool, dict[str, dict[str, float]]]] = {
    "none": ([], True, {}),
    "words": (
        [row("yes", "Yes.", "yes"), row("no", "maybe", "yes")],
        False,
        {"exact_match": {"base": 0.0, "adapter": 0.5}},
    ),
    "labels": (
        [row("yes", "Yes.\nBecause", "yes"), row("no", "**No**", "yes")],
        True,
        {"exact_match": {"base": 0.0, "adapter": 0.5}, "label_accuracy": {"base": 1.0, "adapter": 0.5}},
    ),
    "objects": (
        [row('{"a": 1}', '{"a": 1', '{"a":1}'), row("[1]", "{}", "[1]")],
        False,
        {"exact_match": {"base": 0.0, "adapter": 0.5}, "valid_json": {"base": 0.5, "adapter": 1.0}},
    ),
    "numbers are no objects": (
        [row("4", "4", "five")],
        False,
        {"exact_match": {"base": 1.0, "adapter": 0.0}},
    ),
}


@pytest.mark.parametrize(("rows", "labels", "expected"), SCORES.values(), ids=SCORES)
def test_answers_are_compared_as_far_as_they_can_be(
    rows: list[dict[str, str]], labels: bool, expected: dict[str, dict[str, float]]
) -> None:
    """The same text; for labels whatever their case and what follows; for JSON whether it is any."""
    assert scores(rows, labels=labels) == expected


@pytest.mark.parametrize(
    ("answer", "expected"), [(" Positive. ", "positive"), ('"a b"\nc', "a b"), ("", ""), ("\n", "")]
)
def test_a_label_is_the_first_line(answer: str, expected: str) -> None:
    """Without case and punctuation."""
    assert label(answer) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("{}", True), ("[]", True), ("1", False), ("x", False), ("[" * 100_000, False)]
)
def test_json_is_an_object_or_an_array(text: str, expected: bool) -> None:
    """However deep: data may hold anything."""
    assert is_json(text) == expected


def test_of_a_long_prompt_the_end_is_shown() -> None:
    """That is where the question stands."""
    assert end_of(" short ") == "short"
    assert end_of("x" * 5_000 + "what?").endswith("xwhat?")
    assert len(end_of("x" * 5_000)) < 1_100


# --- a whole training


def test_a_finished_job_has_answers_of_both_sides(ready: Ready, tmp_path: Path) -> None:
    """In the page, and in no file that is uploaded; the model is as it was before."""
    context = ready(evaluation={"prompts": 2})
    report = train(context)
    found = json.loads((context.folder.path / ANSWERS).read_text())
    uploaded = "".join(path.read_text(errors="replace") for path in (context.folder.path / ADAPTER).iterdir())

    assert len(found["prompts"]) == 2
    assert all(set(row) == {"prompt", "reference", "base", "adapter"} for row in found["prompts"])
    assert all(row["prompt"] and row["reference"] for row in found["prompts"])
    assert "Answers to held-out prompts" in str(page_of(context.folder.path, None))
    assert "answers" not in report
    assert found["prompts"][0]["reference"] not in uploaded
    assert found["prompts"][0]["reference"] not in (context.folder.path / TRAINING_REPORT).read_text()


def test_answers_change_neither_adapter_nor_losses(ready: Ready) -> None:
    """They are only looked at."""
    reports = []
    for prompts in (0, 2):
        context = ready(evaluation={"prompts": prompts})
        reports.append(train(context))
        shutil.rmtree(context.folder.path)  # so that the next one trains anew
    first, second = reports

    assert first["adapter_sha256"] == second["adapter_sha256"]
    assert (first["eval_loss"], first["base_eval_loss"]) == (second["eval_loss"], second["base_eval_loss"])


def test_unless_told_otherwise_three_are_answered(ready: Ready) -> None:
    """So that every report shows what has changed."""
    context = ready(evaluation={"prompts": Evaluation().prompts})
    train(context)

    assert len(json.loads((context.folder.path / ANSWERS).read_text())["prompts"]) == 3


@pytest.mark.parametrize(
    ("timeouts", "seconds"),
    [
        pytest.param({}, 180.0, id="a minute for each"),
        pytest.param({"progressDeadlineSeconds": 40}, 150.0, id="half of timeoutSeconds"),
        pytest.param({"progressDeadlineSeconds": 160}, 160.0, id="half of two deadlines"),
    ],
)
def test_no_rank_waits_too_long_for_the_answers(
    a_run: Callable[..., RunConfig], timeouts: dict[str, Any], seconds: float
) -> None:
    """They are over before the collective in which the others wait gives up."""
    assert answers.time_for(3, a_run(1, **timeouts)) == seconds


def test_no_prompts_are_answered_without_any(ready: Ready) -> None:
    """Nor without held-out data."""
    without_data = {
        "dataset": {"evalFraction": 0.0},
        "evaluation": {"requireImprovement": False, "prompts": 3},
    }
    for sections in ({"evaluation": {"prompts": 0}}, without_data):
        context = ready(**sections)
        train(context)

        assert not (context.folder.path / ANSWERS).exists()
        shutil.rmtree(context.folder.path)  # the next one is another job


def test_answers_that_fail_end_no_training(
    ready: Ready, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are for people alone."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such layer")

    monkeypatch.setattr(answers, "stream", fail)
    context = ready(evaluation={"prompts": 1})
    train(context)

    assert "the held-out prompts could not be answered: no such layer" in caplog.text
    assert context.folder.finished()


def test_answers_take_no_longer_than_their_time(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are cut off where it is over: here after one token of each side."""
    monkeypatch.setattr(answers, "SECONDS_PER_PROMPT", 0.0)
    context = ready(evaluation={"prompts": 3})
    counted: list[int] = []
    advance = context.progress.advance
    monkeypatch.setattr(context.progress, "advance", lambda amount: (counted.append(amount), advance(amount)))
    before = answers.answer_held_out

    def count_these(*args: Any) -> None:
        counted.clear()
        before(*args)
        counted.append(-len(counted))

    monkeypatch.setattr("qlora_trainer.training.loop.answer_held_out", count_these)
    train(context)

    assert min(counted) == -2


def test_a_job_that_is_stopped_meanwhile_keeps_its_checkpoint(
    ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next attempt goes on after the last step."""
    context = ready(evaluation={"prompts": 3})
    tokens = answers.stream

    def stopped(*args: Any, **fields: Any) -> Any:
        context.stop.set()
        return tokens(*args, **fields)

    monkeypatch.setattr(answers, "stream", stopped)
    with pytest.raises(Terminated, match="after the last step; its checkpoint is kept"):
        train(context)
    assert not (context.folder.path / ANSWERS).exists()
