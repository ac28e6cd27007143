"""The loop on one rank: what it writes, when it saves, and how it ends."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_contract.job_folder import ADAPTER, ADAPTER_WEIGHTS, METRICS
from qlora_trainer.artifacts import checkpoint
from qlora_trainer.artifacts.metrics_log import read_metrics
from qlora_trainer.errors import Diverged, Fenced, ModelError, NoImprovement, Terminated
from qlora_trainer.training import loop
from qlora_trainer.training.context import RankContext
from qlora_trainer.training.loop import check_finite, check_improved, is_due, run_steps, train
from qlora_trainer.training.setup import prepare

pytestmark = pytest.mark.process

Ready = Callable[..., RankContext]
RELEASE = Path(__file__).parents[2] / "releases" / "0.1.0" / "checkpoint"


def lines(context: RankContext) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return read_metrics(context.folder.path / METRICS)


def test_a_job_trains_evaluates_and_publishes(ready: Ready) -> None:
    """Each step has its line between the base's evaluation and the last one; the report is the published one."""
    context = ready(evaluation={"everySteps": 2})
    report = train(context)

    assert [(line["step"], line["loss"] is None, "eval_loss" in line) for line in lines(context)] == [
        (0, True, True), (1, False, False), (2, False, True), (3, False, False), (3, True, True),
    ]  # fmt: skip
    assert lines(context)[-1]["eval_loss"] == report["eval_loss"] < report["base_eval_loss_quantized"]
    assert context.folder.finished()
    assert context.folder.report() == json.loads(json.dumps(report))
    assert report["data"]["training"]["records"] > report["data"]["evaluation"]["records"] > 0


def test_the_live_report_follows_the_steps(ready: Ready) -> None:
    """After the last step it has that step's numbers, a speed, and nothing left to do."""
    context = ready()
    report = train(context)
    shown = context.progress.report

    assert (shown.stage, shown.step, shown.total_steps, shown.eta_seconds) == ("Publishing", 3, 3, 0.0)
    assert shown.loss == lines(context)[-2]["loss"]
    assert shown.eval_loss == report["eval_loss"]
    assert context.progress.tokens == report["tokens"] == context.tokens_trained
    assert shown.checkpoint is not None
    assert shown.checkpoint.uri == "pvc://team/w/jobs/j/checkpoints/step-00000003"


def test_without_evaluation_data_no_step_is_evaluated(ready: Ready) -> None:
    """evaluation.everySteps has nothing to evaluate on then."""
    context = ready(dataset={"evalFraction": 0.0}, evaluation={"everySteps": 1, "requireImprovement": False})
    report = train(context)

    assert report["eval_loss"] is None
    assert [line.get("eval_loss") for line in lines(context)] == [None] * 5


def test_a_request_to_stop_saves_the_step_that_was_done(
    ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step in which it came is completed, written and saved."""
    context = ready()
    one_step = loop.one_step

    def stopped(context: RankContext, state: Any) -> Any:
        if state.loop.step == 1:
            context.stop.set()
        return one_step(context, state)

    monkeypatch.setattr(loop, "one_step", stopped)

    with pytest.raises(Terminated, match=r"^asked to stop; saved a checkpoint after step 2$"):
        train(context)
    assert [line["step"] for line in lines(context)] == [0, 1, 2]
    newest = checkpoint.newest_valid(context.folder)
    assert newest is not None
    assert newest.name == "step-00000002"


def test_a_request_to_stop_before_the_first_step_leaves_nothing(ready: Ready) -> None:
    """There is nothing to save yet."""
    context = ready()
    context.stop.set()

    with pytest.raises(Terminated, match=r"^asked to stop before the first step$"):
        train(context)
    assert lines(context) == []


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        pytest.param({"everySteps": 2, "keep": 9}, [2, 3], id="every-two-steps-and-the-last"),
        pytest.param({"everySeconds": 86_400, "keep": 9}, [3], id="the-last-alone"),
        pytest.param({"everySteps": 1, "keep": 2}, [2, 3], id="the-newest-two-are-kept"),
    ],
)
def test_checkpoints_come_when_they_are_due(ready: Ready, settings: dict[str, int], saved: list[int]) -> None:
    """By steps, by time, and always after the last step."""
    context = ready(checkpoint=settings)
    run_steps(context, prepare(context))

    assert [int(path.name[5:]) for path in sorted(context.folder.checkpoints.glob("step-*"))] == saved


def test_an_attempt_that_lost_the_fence_writes_no_line(ready: Ready) -> None:
    """Once another attempt has taken over, metrics.jsonl is that one's."""
    context = ready()
    state = prepare(context)
    job = context.run.job.model_copy(update={"attempt": 9})
    type(context.folder)(context.folder.path, context.run.model_copy(update={"job": job})).acquire()

    with pytest.raises(Fenced):
        run_steps(context, state)
    assert [line["step"] for line in lines(context)] == [0]


def test_an_adapter_that_is_no_better_is_not_published(ready: Ready) -> None:
    """Nothing is left of it, and the job is not finished."""
    context = ready(training={"learningRate": 1e-30})

    with pytest.raises(NoImprovement, match="is not below the base's"):
        train(context)
    assert not context.folder.finished()
    assert not context.folder.adapter.exists()
    assert not list(context.folder.path.glob(".*"))


def test_a_job_that_the_release_before_began_goes_on_as_if_nothing_had_been(
    begun_by_the_release_before: RankContext,
) -> None:
    """Each step comes once, and the adapter is the one that the release before made of the undisturbed job.

    To the bit on a machine that adds up in the same order as the one that the files are from, elsewhere up to rounding.
    """
    context = begun_by_the_release_before
    newest = checkpoint.newest_valid(context.folder)
    assert newest is not None
    began_under = checkpoint.read_state(newest).determinism_key
    report = train(context)
    expected = read_metrics(RELEASE / "finished" / METRICS)
    ours, theirs = (
        load_file(folder / ADAPTER / ADAPTER_WEIGHTS)
        for folder in (context.folder.path, RELEASE / "finished")
    )
    rounding = 0.0 if report["not_bit_exact"] is None else 1e-5

    assert began_under.keys() == prepare(context).loop.determinism_key.keys()
    assert [line["step"] for line in lines(context)] == [line["step"] for line in expected]
    for name in ("loss", "eval_loss", "learning_rate", "tokens", "supervised_tokens", "epoch"):
        old, new = (
            [line[name] for line in of if line.get(name) is not None] for of in (expected, lines(context))
        )
        assert new == pytest.approx(old, rel=rounding, abs=0)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=rounding)


@pytest.mark.parametrize(
    ("base", "loss", "required", "error"),
    [
        pytest.param(2.0, 1.5, True, None, id="better"),
        pytest.param(2.0, 2.0, True, NoImprovement, id="equal"),
        pytest.param(2.0, 2.5, False, None, id="worse-but-not-required"),
        pytest.param(None, 2.5, True, None, id="base-not-measured"),
        pytest.param(2.0, None, True, None, id="no-evaluation"),
        pytest.param(2.0, math.nan, False, Diverged, id="not-a-number"),
        pytest.param(None, math.inf, True, Diverged, id="infinite"),
    ],
)
def test_an_adapter_must_improve_on_the_base_if_the_job_says_so(
    base: float | None, loss: float | None, required: bool, error: type[Exception] | None
) -> None:
    """A loss that is not finite is never published."""
    if error is None:
        check_improved(base, loss, required=required)
    else:
        with pytest.raises(error):
            check_improved(base, loss, required=required)


@pytest.mark.parametrize(
    ("step", "loss", "norm", "error", "says"),
    [
        pytest.param(4, 1.0, 0.5, None, "", id="finite"),
        pytest.param(4, math.nan, 0.5, Diverged, "the loss of step 5 is not a finite number", id="loss"),
        pytest.param(4, 1.0, math.inf, Diverged, "the gradient of step 5 is not a finite number", id="gradient"),
        pytest.param(0, 1.0, 0.0, ModelError, "no gradient reaches the adapter", id="no-gradient-at-first"),
        pytest.param(4, 1.0, 0.0, None, "", id="no-gradient-later"),
    ],
)  # fmt: skip
def test_numbers_that_are_not_finite_end_training(
    step: int, loss: float, norm: float, error: type[Exception] | None, says: str
) -> None:
    """Before they are applied; and an adapter that nothing reaches ends it at once."""
    if error is None:
        check_finite(step, loss, norm)
    else:
        with pytest.raises(error, match=says):
            check_finite(step, loss, norm)


@pytest.mark.parametrize(
    ("every", "step", "due"), [(None, 4, False), (2, 4, True), (3, 4, False), (1, 4, True)]
)
def test_what_is_due_every_so_many_steps(every: int | None, step: int, due: bool) -> None:
    """Multiples of the number; without one nothing is due."""
    assert is_due(every, step) is due
