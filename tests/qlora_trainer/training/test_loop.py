"""The loop on one rank: what it writes, when it saves, and how it ends."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qlora_contract.job_folder import ADAPTER, ADAPTER_WEIGHTS, METRICS, REPORT_PAGE
from qlora_trainer.artifacts import checkpoint
from qlora_trainer.artifacts.checkpoint import LoopState
from qlora_trainer.artifacts.metrics_log import read_metrics
from qlora_trainer.errors import (
    AdaptersDiffer,
    ConfigurationError,
    Diverged,
    Fenced,
    ModelError,
    NoImprovement,
    Terminated,
)
from qlora_trainer.modeling.adapter_methods import adapters_disabled
from qlora_trainer.training import loop
from qlora_trainer.training.context import RankContext
from qlora_trainer.training.loop import (
    check_finite,
    check_improved,
    check_same_adapter,
    compare_with_best,
    evaluate_adapter,
    finish,
    is_due,
    run_steps,
    train,
)
from qlora_trainer.training.setup import TrainState, prepare

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

    assert [(line["step"], "loss" in line, "eval_loss" in line) for line in lines(context)] == [
        (0, False, True), (1, True, False), (2, True, True), (3, True, False), (3, False, True),
    ]  # fmt: skip
    assert lines(context)[-1]["eval_loss"] == report["eval_loss"] < report["base_eval_loss_quantized"]
    assert context.folder.finished()
    assert context.folder.report() == json.loads(json.dumps(report))
    assert report["data"]["training"]["records"] > report["data"]["evaluation"]["records"] > 0
    named = {
        "tokenizing",
        "loading the model",
        "first step",
        "evaluating the base",
        "training",
        "evaluating the adapter",
    }
    assert named < report["timeline"].keys()
    assert all(report["timeline"][name] > 0 for name in named)
    order = list(report["timeline"])
    assert order.index("first step") < order.index("training")  # what is waited for ends with the first step


VIRTUAL: dict[str, dict[str, Any]] = {
    "prompt": {"method": "prompt-tuning", "promptInit": "text", "promptInitText": "Answer."},
    "prefix": {"method": "prefix-tuning", "promptInit": "text", "promptInitText": "Answer."},
    "projected": {"method": "prefix-tuning", "prefixProjection": True},
}


@pytest.mark.parametrize("adapter", VIRTUAL.values(), ids=VIRTUAL)
def test_a_job_of_virtual_tokens_trains_evaluates_and_publishes(
    ready: Ready, adapter: dict[str, Any]
) -> None:
    """The base's loss is without them; PEFT's one tensor is published, and has the loss that the report says."""
    context = ready(
        adapter={**adapter, "numVirtualTokens": 6}, evaluation={"everySteps": 2, "requireImprovement": False}
    )
    report = train(context)
    losses = [line["eval_loss"] for line in lines(context) if "eval_loss" in line]
    tensors = load_file(context.folder.adapter / ADAPTER_WEIGHTS)
    state = prepare(context)  # from the last checkpoint
    with adapters_disabled(state.model):
        base = evaluate_adapter(context, state)

    assert losses[0] == report["base_eval_loss_quantized"] == base
    assert losses[-1] == report["eval_loss"] != base
    assert evaluate_adapter(context, state) == pytest.approx(report["eval_loss"], rel=1e-6)
    assert {name: len(tensor) for name, tensor in tensors.items()} == {"prompt_embeddings": 6}
    assert context.folder.finished()


def test_a_job_leaves_a_page_as_far_as_it_got(ready: Ready) -> None:
    """From its first checkpoint on; at the end with the adapter's loss, the plan, the settings and what it cost."""
    context = ready(checkpoint={"everySteps": 2})
    context.books.open()
    page = context.folder.path / REPORT_PAGE
    pages: list[str] = []
    write = context.books.write
    context.books.write = lambda *args, **fields: (write(*args, **fields), pages.append(page.read_text()))  # type: ignore[method-assign]
    report = train(context)
    context.books.write(ended="adapter published")

    assert [re.findall("not finished|2 of 3|3 of 3", text) for text in pages] == [
        ["not finished", "2 of 3"], ["not finished", "3 of 3"], ["3 of 3"]
    ]  # fmt: skip
    assert f"{report['eval_loss']:.4f}" in pages[-1]
    assert "planned for base" in pages[-1]
    assert report["configuration"]["adapter"]["rank"] == context.run.adapter.rank
    assert report["plan"]["memory_bytes"] == context.progress.report.memory_estimate
    assert report["cost"]["core_hours"] > 0
    assert report["cost"]["attempts"] == 1


def test_evaluation_is_bounded_and_the_report_says_so(ready: Ready) -> None:
    """All losses are of the same few samples, measured anew under another bound, and what was left out is counted."""
    whole, few = (train(ready(evaluation={"maxTokens": bound})) for bound in (65_536, 100))

    assert whole["evaluated"]["samples_left_out"] == 0
    assert few["evaluated"]["tokens"] <= 100 < whole["evaluated"]["tokens"]
    assert few["evaluated"]["samples"] + few["evaluated"]["samples_left_out"] == whole["evaluated"]["samples"]
    assert few["base_eval_loss_quantized"] != whole["base_eval_loss_quantized"]


def test_all_that_a_job_leaves_has_the_mode_of_the_umask(ready: Ready) -> None:
    """Adapter and checkpoints are read by other users, such as those of servers, or none of their files is."""
    before = os.umask(0o027)
    try:
        context = ready()
        train(context)
    finally:
        os.umask(before)
    files = [path for path in context.folder.path.rglob("*") if path.is_file()]

    assert {path.name for path in files} >= {ADAPTER_WEIGHTS, "adapter.safetensors", "manifest.json", METRICS}
    assert {path.name: oct(path.stat().st_mode)[-3:] for path in files} == dict.fromkeys(
        (path.name for path in files), "640"
    )


def test_the_live_report_follows_the_steps(ready: Ready) -> None:
    """After the last step it has that step's numbers, a speed, and nothing left to do."""
    context = ready()
    report = train(context)
    shown = context.progress.report

    assert (shown.stage, shown.step, shown.total_steps, shown.eta_seconds) == ("Publishing", 3, 3, 0.0)
    assert shown.loss == lines(context)[-2]["loss"]
    assert shown.eval_loss == report["eval_loss"]
    assert context.progress.tokens == report["tokens"] == context.tokens_trained
    assert list(report["timeline"]).index("first step") < list(report["timeline"]).index("training")
    assert shown.checkpoint is not None
    assert shown.checkpoint.uri == "pvc://team/w/jobs/j/checkpoints/step-00000003"


def test_without_evaluation_data_no_step_is_evaluated(ready: Ready) -> None:
    """evaluation.everySteps has nothing to evaluate on then."""
    context = ready(dataset={"evalFraction": 0.0}, evaluation={"everySteps": 1, "requireImprovement": False})
    report = train(context)

    assert report["eval_loss"] is None
    assert [line.get("eval_loss") for line in lines(context)] == [None] * 3


@pytest.mark.parametrize(
    ("micro_batch", "saved"),
    [
        pytest.param(1, 1, id="before the last micro-batch, which is left out"),
        pytest.param(5, 2, id="in the last micro-batch, which completes the step"),
    ],
)
def test_a_request_to_stop_saves_the_last_whole_step(
    ready: Ready, monkeypatch: pytest.MonkeyPatch, micro_batch: int, saved: int
) -> None:
    """Between two micro-batches nothing of the step is applied, and a resume goes on as if nothing had been."""
    context = ready(training={"microBatchTokens": 96})
    undisturbed = train(ready(training={"microBatchTokens": 96}))
    weights = load_file(context.folder.adapter / ADAPTER_WEIGHTS)
    shutil.rmtree(context.folder.path)
    context.folder.acquire()
    seen, collate = [], loop.collate

    def stopped(*args: Any) -> Any:
        if [line["step"] for line in lines(context)] == [0, 1]:
            seen.append(1)
            if len(seen) == micro_batch:
                context.stop.set()
        return collate(*args)

    monkeypatch.setattr(loop, "collate", stopped)

    with pytest.raises(Terminated, match=rf"^asked to stop; saved a checkpoint after step {saved}$"):
        train(context)
    assert [line["step"] for line in lines(context)] == list(range(saved + 1))
    newest = checkpoint.newest_valid(context.folder)
    assert newest is not None
    assert newest.name == f"step-0000000{saved}"
    context.stop.clear()
    assert train(context)["eval_loss"] == undisturbed["eval_loss"]
    again = load_file(context.folder.adapter / ADAPTER_WEIGHTS)
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


def test_a_weighted_mix_goes_on_bit_for_bit(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second epoch, whose share of each source is another than the first one's."""
    weights = (0.25, 0.75)
    sources = [{"source": "pvc://smoke/data.jsonl", "weight": weight} for weight in weights]
    sections = {
        "dataset": {"source": None, "sources": sources},
        "training": {"maxSteps": 6, "globalBatchTokens": 2500},
    }
    context = ready(**sections)
    undisturbed = train(context)
    losses = [line["loss"] for line in lines(context) if "loss" in line]
    adapter = load_file(context.folder.adapter / ADAPTER_WEIGHTS)
    shutil.rmtree(context.folder.path)
    context.folder.acquire()
    collate = loop.collate

    def stopped(*args: Any) -> Any:
        if [line["step"] for line in lines(context)][-1:] == [4]:
            context.stop.set()
        return collate(*args)

    monkeypatch.setattr(loop, "collate", stopped)
    with pytest.raises(Terminated):
        train(context)
    epoch = lines(context)[-1]["epoch"]
    monkeypatch.undo()
    context.stop.clear()
    report = train(context)

    assert 1 < epoch < 2
    assert (undisturbed["not_bit_exact"], report["not_bit_exact"]) == (None, None)
    assert [line["loss"] for line in lines(context) if "loss" in line] == losses
    again = load_file(context.folder.adapter / ADAPTER_WEIGHTS)
    assert all(torch.equal(again[name], tensor) for name, tensor in adapter.items())


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
    assert lines(context) == []


def test_the_base_is_measured_quantized_and_as_stored(ready: Ready) -> None:
    """Both are in the report; quantization makes a difference."""
    report = train(ready())

    assert report["base_eval_loss_quantized"] == pytest.approx(report["base_eval_loss"], rel=0.1)
    assert report["base_eval_loss_quantized"] != report["base_eval_loss"]


def test_the_adapter_is_measured_on_the_base_that_servers_run(ready: Ready) -> None:
    """On the weights as stored it scores otherwise than on those it was trained on, and better than they do alone."""
    report = train(ready())

    assert report["eval_loss_unquantized"] != report["eval_loss"]
    assert report["eval_loss_unquantized"] == pytest.approx(report["eval_loss"], rel=0.1)
    assert report["eval_loss_unquantized"] < report["base_eval_loss"]


def test_an_unquantized_base_has_one_loss(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without quantization the weights that were trained on are the stored ones, which nobody loads again."""
    monkeypatch.setattr(loop, "load_model", None)
    report = train(ready(quantization={"scheme": "none"}))

    assert report["base_eval_loss"] > report["eval_loss"]
    assert report["base_eval_loss_quantized"] == report["base_eval_loss"]
    assert report["eval_loss_unquantized"] == report["eval_loss"]


def test_a_base_that_does_not_fit_is_not_measured_unquantized(ready: Ready) -> None:
    """Its weights would be read from disk again and again."""
    report = train(ready(layout={"memoryPerRank": 2**20}))

    assert report["base_eval_loss"] is None
    assert report["eval_loss_unquantized"] is None
    assert report["base_eval_loss_quantized"] is not None


def test_a_model_that_vanishes_once_it_is_loaded_fails_no_run(
    ready: Ready, smoke_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Checkpoints and report know of it; what its files would be read for once more is left out."""
    away = smoke_folder / "away"

    def without_model(*args: Any) -> None:
        (smoke_folder / "model").rename(away)
        run_steps(*args)

    monkeypatch.setattr(loop, "run_steps", without_model)
    try:
        report = train(ready(checkpoint={"everySteps": 1}))
    finally:
        away.rename(smoke_folder / "model")

    assert (report["base_eval_loss"], report["eval_loss_unquantized"]) == (None, None)
    assert report["eval_loss"] < report["base_eval_loss_quantized"]
    assert report["provenance"]["model_fingerprint"]
    assert "the unquantized base is not evaluated" in caplog.text


def test_an_attempt_that_only_publishes_does_not_measure_the_base_again(
    ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was ended in the final evaluations has both losses; only the adapter is evaluated again."""
    first = ready()
    report = train(first)
    shutil.rmtree(first.folder.adapter)
    evaluated = []
    evaluate = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *args: evaluated.append(args[5:]) or evaluate(*args))
    again = train(ready())

    assert evaluated == [(), ("the adapter on the unquantized base",)]
    for name in ("base_eval_loss", "base_eval_loss_quantized", "eval_loss"):
        assert again[name] == report[name]


def test_an_adapter_that_is_no_better_is_not_published(ready: Ready) -> None:
    """Nothing is left of it, and the job is not finished."""
    context = ready(training={"learningRate": 1e-30})

    with pytest.raises(NoImprovement, match="is not below the base's"):
        train(context)
    assert not context.folder.finished()
    assert not context.folder.adapter.exists()
    assert not list(context.folder.path.glob(".*"))


def test_a_job_that_the_release_before_began_goes_on(begun_by_the_release_before: RankContext) -> None:
    """Each step comes once, on the same samples, and the numbers are near those of the undisturbed job.

    Not to the bit: its dropout has other masks since, and the report says so.
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

    assert "dropout None -> philox4x32-10" in report["not_bit_exact"]
    # What the release before did not record: there was one way to compute it, or nothing was known of it.
    assert prepare(context).loop.determinism_key.keys() - began_under.keys() == {
        "passes", "dropout", "allreduce", *checkpoint.NOT_ALWAYS_KNOWN
    }  # fmt: skip
    assert began_under.keys() <= prepare(context).loop.determinism_key.keys()
    assert [line["step"] for line in lines(context)] == [line["step"] for line in expected]
    masks = 0.003
    for name, tolerance in {
        "loss": masks, "eval_loss": masks, "learning_rate": 0, "tokens": 0, "supervised_tokens": 0, "epoch": 0
    }.items():  # fmt: skip
        old, new = (
            [line[name] for line in of if line.get(name) is not None] for of in (expected, lines(context))
        )
        assert new == pytest.approx(old, rel=tolerance, abs=0)
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}


def test_an_adapter_that_failed_the_gate_is_published_on_other_terms(
    ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started again without requireImprovement, the job publishes its last checkpoint, and trains no step."""
    with pytest.raises(NoImprovement, match=r"set evaluation\.requireImprovement to false"):
        train(ready(training={"learningRate": 1e-30}))
    monkeypatch.setattr(loop, "one_step", lambda *_: pytest.fail("trains"))
    again = ready(training={"learningRate": 1e-30}, evaluation={"requireImprovement": False, "everySteps": 1})
    report = train(again)

    assert again.folder.finished()
    assert report["steps"] == 3


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
    ("initial", "loss", "message"),
    [
        pytest.param(1.8, 1.5, None, id="better"),
        pytest.param(1.5, 1.5, "1.5000 is not below the initial adapter's 1.5000", id="equal"),
        pytest.param(3.0, 2.5, "2.5000 is not below the base's 2.0000", id="no-better-than-the-base"),
        pytest.param(3.0, 1.5, None, id="better-than-either"),
        pytest.param(None, 1.5, None, id="not-measured"),
    ],
)
def test_an_adapter_that_goes_on_from_another_must_improve_on_that_too(
    initial: float | None, loss: float, message: str | None
) -> None:
    """What another job has reached already is no improvement of this one; asked for none, it is published."""
    check_improved(2.0, loss, required=False, initial=initial)
    if message is None:
        check_improved(2.0, loss, required=True, initial=initial)
    else:
        with pytest.raises(NoImprovement, match=message):
            check_improved(2.0, loss, required=True, initial=initial)


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        pytest.param("the base", ModelError, "the base's own loss", id="of the base"),
        pytest.param("the adapter", Diverged, "the eval loss after step 2", id="of a step"),
        pytest.param("the unquantized base", None, "", id="of what is only reported"),
    ],
)
def test_a_loss_that_is_no_number_is_not_recorded(
    ready: Ready, monkeypatch: pytest.MonkeyPatch, what: str, error: type[Exception] | None, says: str
) -> None:
    """It ends the job where something is held against it, and is left out of the report where nothing is."""
    evaluate = loop.evaluate

    def not_a_number(*args: Any) -> float | None:
        of = args[5] if len(args) > 5 else "the adapter"
        return math.nan if of == what else evaluate(*args)

    monkeypatch.setattr(loop, "evaluate", not_a_number)
    context = ready(evaluation={"everySteps": 2})
    if error is None:
        assert train(context)["base_eval_loss"] is None
    else:
        with pytest.raises(error, match=says):
            train(context)

    assert "NaN" not in (context.folder.path / METRICS).read_text()
    assert context.folder.finished() == (error is None)


def test_weights_that_are_no_numbers_are_not_published(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without evaluation data nothing else would show it."""
    stage = loop.stage_adapter

    def damaged(context: RankContext, state: TrainState) -> float | None:
        state.parameters.flat.data[7] = math.inf
        return stage(context, state)

    monkeypatch.setattr(loop, "stage_adapter", damaged)
    context = ready(dataset={"evalFraction": 0.0}, evaluation={"requireImprovement": False})
    with pytest.raises(Diverged, match="has weights that are not finite numbers"):
        train(context)

    assert not context.folder.adapter.exists()
    assert not list(context.folder.path.glob(".adapter*"))


def test_the_norm_of_a_long_gradient_does_not_stop_growing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is small beside the sum so far still counts; a short gradient's norm is torch's own."""
    gradient = torch.ones(1_000_064)
    gradient[:64] = 4096.0
    expected = math.sqrt(64 * 4096.0**2 + 1e6)
    assert loop.gradient_norm(gradient[:100]) == float(gradient[:100].norm())
    monkeypatch.setattr(loop, "NORM_PIECE", 10_000)

    assert loop.gradient_norm(gradient) == pytest.approx(expected, rel=1e-5)  # in one piece: 4.7e-4


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


def test_ranks_whose_adapters_differ_are_named() -> None:
    """All of them, beside rank 0's, which the others are compared with."""
    check_same_adapter(7, [4503599627370495.0] * 3)
    with pytest.raises(
        AdaptersDiffer, match="after step 7, the adapter of rank 1 and 3 is not that of rank 0"
    ):
        check_same_adapter(7, [1.0, 2.0, 1.0, 3.0])


STOP_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Without generation markers, which chat templates need only for stock training."""
QUESTIONS_AND_ANSWERS = [("a", "y"), ("b", "n")]


@pytest.mark.slow
@pytest.mark.parametrize("pad", ["<|end|>", None], ids=["pad is eos", "no pad"])
def test_generation_stops_by_itself_after_training(
    a_context: Callable[..., RankContext], smoke_folder: Path, tmp_path: Path, pad: str | None
) -> None:
    """With stock transformers and peft, by the adapter and its template: 50 steps on 20 samples teach the end, whatever
    the tokenizer pads with. Before, generation goes on until it is cut."""
    source = tmp_path / "source"
    shutil.copytree(smoke_folder / "model", source / "model")
    tokenizer = AutoTokenizer.from_pretrained(source / "model", local_files_only=True)
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(source / "model")
    # With a head of its own and larger weights: an adapter cannot teach the smoke test's model much.
    shape = {"tie_word_embeddings": False, "initializer_range": 0.2}
    config = AutoConfig.from_pretrained(source / "model", local_files_only=True, **shape)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(source / "model")
    with (source / "data.jsonl").open("w") as stream:
        for number in range(20):
            question, answer = QUESTIONS_AND_ANSWERS[number % 2]
            turns = [
                {"role": "user", "content": question * (number // 2 + 1)},
                {"role": "assistant", "content": answer},
            ]
            print(json.dumps({"messages": turns}), file=stream)
    context = a_context(
        {"stop": source, "team": tmp_path},
        model={"source": "pvc://stop/model"},
        dataset={"source": "pvc://stop/data.jsonl", "evalFraction": 0.0, "chatTemplate": STOP_TEMPLATE},
        adapter={"rank": 16, "alpha": 32.0},
        training={
            "maxSteps": 50, "globalBatchTokens": 500, "maxSequenceLength": 96, "learningRate": 0.01,
            "computeDtype": "fp32",
        },
        evaluation={"requireImprovement": False},
        layout={"memoryPerRank": 2**33},
    )  # fmt: skip
    context.folder.acquire()
    train(context)
    adapter = context.folder.path / ADAPTER
    template = (adapter / "chat_template.jinja").read_text()
    model = AutoModelForCausalLM.from_pretrained(source / "model", local_files_only=True)
    stop = tokenizer.eos_token_id

    def answer(asked: Any) -> list[int]:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "aaa"}],
            chat_template=template,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        made = asked.generate(
            **prompt, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        return made[0, prompt["input_ids"].shape[1] :].tolist()

    before = answer(model)
    after = answer(PeftModel.from_pretrained(model, str(adapter)))

    assert stop not in before
    assert tokenizer.decode(after) == "y<|end|>"


@pytest.fixture
def overfits(ready: Ready, tmp_path: Path) -> Ready:
    """ready(**fields of adapter, evaluation and checkpoint): what it learns by heart soon harms it elsewhere."""
    answers = {"train": "one one one one", "other": "six"}
    folder = tmp_path / "overfits"
    folder.mkdir()
    for split, answer in answers.items():
        record = {
            "messages": [{"role": "user", "content": "count"}, {"role": "assistant", "content": answer}]
        }
        (folder / f"{split}.jsonl").write_text(f"{json.dumps(record)}\n" * 4)

    def make(**fields: dict[str, Any]) -> RankContext:
        return ready(
            dataset={"source": "pvc://team/overfits", "evalSplit": "other"},
            training={"maxSteps": 8, "learningRate": 0.1, "schedule": "constant", "warmupRatio": 0.0},
            evaluation={"everySteps": 1, "keepBest": True, "requireImprovement": False}
            | fields.get("evaluation", {}),
            checkpoint={"everySteps": 1, "keep": 1} | fields.get("checkpoint", {}),
            adapter=fields.get("adapter", {}),
        )

    return make


def curve(context: RankContext) -> dict[int, float]:
    """Step -> eval loss, without that of the base."""
    return {
        line["step"]: line["eval_loss"] for line in lines(context) if line["step"] and "eval_loss" in line
    }


def test_the_best_step_is_published(overfits: Ready) -> None:
    """Its adapter is, to the bit, though training went on to its end; its checkpoint outlives newer ones."""
    context = overfits()
    report = train(context)
    losses = curve(context)
    best = min(losses, key=losses.__getitem__)
    kept = checkpoint.path_of(context.folder, best)
    published = load_file(context.folder.adapter / ADAPTER_WEIGHTS)

    assert best == 2
    assert report["published_step"] == best
    assert report["steps"] == report["total_steps"] == 8
    assert report["eval_loss"] == losses[best] < losses[8]
    assert sorted(path.name for path in context.folder.checkpoints.iterdir()) == [kept.name, "step-00000008"]
    for name, tensor in load_file(kept / checkpoint.ADAPTER_FILE).items():
        assert torch.equal(published[f"base_model.model.{name}"], tensor)


@pytest.mark.parametrize("adapter", VIRTUAL.values(), ids=VIRTUAL)
def test_the_best_step_of_virtual_tokens_is_published(overfits: Ready, adapter: dict[str, Any]) -> None:
    """And not those of the last step, which were written and evaluated before it was chosen."""
    context = overfits(adapter={**adapter, "numVirtualTokens": 6})
    report = train(context)
    losses = curve(context)
    best = min(losses, key=losses.__getitem__)
    state = prepare(context)
    checkpoint.load_adapter(checkpoint.path_of(context.folder, best), state.parameters)
    published = load_file(context.folder.adapter / ADAPTER_WEIGHTS)

    assert best < 8
    assert report["published_step"] == best
    assert report["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
    for name, tensor in state.parameters.published().items():
        assert torch.equal(published[name], tensor)


def test_training_ends_once_it_gets_no_better(overfits: Ready) -> None:
    """After so many evaluations in a row; the report tells how far it went and what it published."""
    context = overfits(evaluation={"earlyStoppingPatience": 3})
    report = train(context)

    assert list(curve(context)) == [1, 2, 3, 4, 5]
    assert (report["published_step"], report["steps"], report["total_steps"]) == (2, 5, 8)
    assert report["eval_loss"] == curve(context)[2]


def raises_no_improvement(*_: object, **__: object) -> None:
    """As if the base were better."""
    raise NoImprovement("no better than the base")


def test_a_job_that_ended_early_goes_on_with_more_patience(
    overfits: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost to a setting: what failed the gate goes on from its last step when it is given more time."""
    first = overfits(evaluation={"earlyStoppingPatience": 1, "requireImprovement": True})
    monkeypatch.setattr(loop, "check_improved", raises_no_improvement)
    with pytest.raises(NoImprovement):
        train(first)
    monkeypatch.undo()
    again = overfits(evaluation={"earlyStoppingPatience": 2})
    report = train(again)

    assert list(curve(again)) == [1, 2, 3, 4]
    assert (report["published_step"], report["steps"]) == (2, 4)


@pytest.mark.parametrize("killed_after", [2, 4, 8])
def test_the_best_step_survives_a_restart(
    overfits: Ready, monkeypatch: pytest.MonkeyPatch, killed_after: int
) -> None:
    """Wherever the first attempt was killed: at the best step, after it, and before anything is published."""
    expected = train(overfits())["adapter_sha256"]

    def killed(context: RankContext, state: TrainState) -> None:
        save(context, state)
        if state.loop.step == killed_after:
            raise KeyboardInterrupt

    first = overfits()
    shutil.rmtree(first.folder.path)
    first.folder.acquire()
    save = loop.save
    monkeypatch.setattr(loop, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(first)
    monkeypatch.undo()
    report = train(overfits())

    assert (report["published_step"], report["adapter_sha256"]) == (2, expected)


def test_losses_on_other_samples_are_no_measure_of_the_best(overfits: Ready, tmp_path: Path) -> None:
    """A job that is evaluated on other samples from now on forgets which step was the best."""
    train_until_killed = overfits(checkpoint={"everySteps": 4, "keep": 1})
    state = prepare(train_until_killed)
    state.schedule.total_steps = 4
    run_steps(train_until_killed, state)
    assert state.loop.best_step == 2
    record = {"messages": [{"role": "user", "content": "count"}, {"role": "assistant", "content": "one one"}]}
    (tmp_path / "overfits" / "third.jsonl").write_text(json.dumps(record))

    assert prepare(overfits()).loop.best_step == 2
    assert prepare(overfits(evaluation={"keepBest": False})).loop.best_step is None
    assert prepare(overfits(evaluation={"maxTokens": 1})).loop.best_step is None


def test_a_damaged_best_checkpoint_is_no_loss_of_the_job(
    overfits: Ready, caplog: pytest.LogCaptureFixture
) -> None:
    """The last step is published then, and the log says so."""
    context = overfits()
    state = prepare(context)
    run_steps(context, state)
    (checkpoint.path_of(context.folder, 2) / checkpoint.ADAPTER_FILE).write_bytes(b"")
    report = finish(context, state)

    assert "step-00000002, is damaged: the last step is published" in caplog.text
    assert report["published_step"] == 8
    assert report["eval_loss"] == curve(context)[8]


def test_the_best_step_needs_something_to_evaluate_on(ready: Ready) -> None:
    """It is said before a model is loaded."""
    with pytest.raises(ConfigurationError, match=r"evaluation\.keepBest needs data to evaluate on"):
        train(
            ready(
                dataset={"evalFraction": 0.0},
                evaluation={"everySteps": 1, "keepBest": True, "requireImprovement": False},
            )
        )


@pytest.mark.parametrize(
    ("losses", "best", "waited"),
    [
        pytest.param([], None, 0, id="none-yet"),
        pytest.param([2.0, 1.0, 1.5], 2, 1, id="worse-after-it"),
        pytest.param([1.0, 1.0], 1, 1, id="equal-is-no-better"),
        pytest.param([math.nan, math.inf], None, 2, id="no-numbers"),
        pytest.param([3.0, math.nan, 2.0], 3, 0, id="better-after-none"),
        pytest.param([3.0, None], 1, 1, id="not-measured"),
    ],
)
def test_which_step_is_the_best(losses: list[float | None], best: int | None, waited: int) -> None:
    """The first with the lowest loss; a loss that is no number is none."""
    state = LoopState()
    for loss in losses:
        state.step += 1
        compare_with_best(state, loss)

    assert (state.best_step, state.evaluations_since_best) == (best, waited)


SIX = {"numVirtualTokens": 6}


@pytest.mark.parametrize(
    ("first_of", "again_of"),
    [
        pytest.param({}, {}, id="lora"),
        pytest.param(VIRTUAL["prompt"] | SIX, {"method": "prompt-tuning"} | SIX, id="prompt"),
        pytest.param(VIRTUAL["prefix"] | SIX, {"method": "prefix-tuning"} | SIX, id="prefix"),
        pytest.param(VIRTUAL["projected"] | SIX, {"method": "prefix-tuning"} | SIX, id="a-prefix-of-an-MLP"),
    ],
)
def test_a_job_goes_on_from_another_jobs_adapter(
    ready: Ready, tmp_path: Path, first_of: dict[str, Any], again_of: dict[str, Any]
) -> None:
    """Its first loss is where the other ended; the report names what it began with, also after a restart without it."""
    first = ready(adapter=first_of, training={"learningRate": 0.01, "maxSteps": 6})
    before = train(first)
    shutil.move(first.folder.path, tmp_path / "first")
    settings = {
        "adapter": again_of | {"initialAdapter": "pvc://team/first/adapter"},
        "training": {"learningRate": 1e-9},
        "evaluation": {"everySteps": 1, "requireImprovement": False},
    }
    again = ready(**settings)
    state = prepare(again)
    state.schedule.total_steps = 1
    run_steps(again, state)
    shutil.move(tmp_path / "first", tmp_path / "gone")
    report = train(ready(**settings))

    assert curve(again)[3] == pytest.approx(before["eval_loss"], abs=1e-4)
    assert state.loop.initial_eval_loss == pytest.approx(before["eval_loss"], abs=1e-5)
    assert report["provenance"]["initial_adapter_sha256"] == before["adapter_sha256"]
    assert report["provenance"]["initial_adapter_eval_loss"] == pytest.approx(before["eval_loss"], abs=1e-5)
    assert before["provenance"]["initial_adapter_sha256"] == ""
