"""What happens before the first step: agreement, the base's losses, a resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_contract.progress import Work
from qlora_trainer.artifacts import checkpoint
from qlora_trainer.errors import ConfigurationError, DataError, ModelError
from qlora_trainer.training import loop
from qlora_trainer.training.context import RankContext, StopHere
from qlora_trainer.training.loop import one_step, save
from qlora_trainer.training.setup import agree_on_inputs, check_same_on_all_ranks, check_weights, prepare

pytestmark = pytest.mark.process

Ready = Callable[..., RankContext]


def test_nothing_is_evaluated_before_the_first_step(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user sees it as soon as the model is loaded."""
    monkeypatch.setattr(loop, "evaluate", lambda *_: pytest.fail("evaluates"))
    context = ready()
    state = prepare(context)
    one_step(context, state)

    assert state.loop.step == 1
    assert (state.loop.base_eval_loss, state.loop.base_eval_loss_quantized) == (None, None)


def test_all_that_is_done_before_the_first_step_is_counted(
    ready: Ready, smoke_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records and bytes of weights advance the live report, so that a long start is not taken for a hang."""
    context = ready()
    begin, seen = context.progress.begin, {}

    def noted(work: Work | None) -> None:
        if work is not None:
            seen[work.name] = context.progress.report.advances
        begin(work)

    monkeypatch.setattr(context.progress, "begin", noted)
    prepare(context)
    records = len((smoke_folder / "data.jsonl").read_text().splitlines())
    weights = (smoke_folder / "model" / "model.safetensors").stat().st_size
    advances = context.progress.report.advances

    assert seen == {"tokenizing": None, "loading the model": records}
    assert advances is not None
    assert 0.9 * weights < advances - records <= weights


@pytest.mark.parametrize(
    ("change", "known"),
    [
        pytest.param({}, True, id="the same"),
        pytest.param({"evaluation": {"maxTokens": 100}}, False, id="other samples"),
    ],
)
def test_the_base_is_measured_once_for_each_job(ready: Ready, change: dict[str, Any], known: bool) -> None:
    """What one attempt has found out the next one knows, even without any checkpoint; unless it is of other things."""
    context = ready()
    state = prepare(context)
    one_step(context, state)
    loop.measure_base(context, state, None)
    found = prepare(ready(**change)).loop.base_eval_loss_quantized

    assert state.loop.base_eval_loss_quantized is not None
    assert found == (state.loop.base_eval_loss_quantized if known else None)


@pytest.mark.parametrize(("bound", "known"), [(65_536, True), (100, False)])
def test_losses_in_an_old_checkpoint_count_while_all_samples_are_evaluated(
    ready: Ready, bound: int, known: bool
) -> None:
    """Release 0.1.0 knew no bound, and kept them there alone."""
    context = ready()
    state = prepare(context)
    one_step(context, state)
    state.loop.base_eval_loss, state.loop.base_eval_loss_quantized = 4.0, 4.5
    save(context, state)
    again = prepare(ready(evaluation={"maxTokens": bound})).loop

    losses = (again.base_eval_loss, again.base_eval_loss_quantized)
    assert losses == ((4.0, 4.5) if known else (None, None))


def test_a_resume_continues_bit_for_bit(ready: Ready) -> None:
    """Adapter, moments, losses and position are those of the checkpoint, so the next step is that of the old run."""
    context = ready()
    first = prepare(context)
    one_step(context, first)
    save(context, first)
    again = prepare(ready())
    metrics = [one_step(context, state)[0] for state in (first, again)]

    assert again.loop.not_bit_exact is None
    assert again.loop.base_eval_loss == first.loop.base_eval_loss
    assert metrics[0].line() == {
        **metrics[1].line(),
        **{name: metrics[0].line()[name] for name in ("seconds", "memory_peak")},
    }
    assert torch.equal(again.parameters.flat, first.parameters.flat)


def test_a_resume_under_another_key_says_that_it_is_not_bit_exact(ready: Ready) -> None:
    """The reason names what changed, after those of earlier attempts."""
    context = ready()
    state = prepare(context)
    one_step(context, state)
    state.loop.determinism_key["threads"] = 64
    state.loop.not_bit_exact = "world_size 4 -> 1"
    save(context, state)

    assert prepare(ready()).loop.not_bit_exact == "world_size 4 -> 1; threads 64 -> 1"


def test_auto_keeps_the_compute_dtype_that_the_job_began_with(ready: Ready) -> None:
    """A job that moves to a processor with bf16 goes on in fp32."""
    context = ready(training={"computeDtype": "auto"})
    state = prepare(context)
    one_step(context, state)
    save(context, state)
    moved = ready(training={"computeDtype": "auto"})
    moved.run = moved.run.model_copy(update={"isa": "amx_bf16"})

    assert agree_on_inputs(moved).dtype == "fp32"


def test_a_checkpoint_of_other_data_is_refused(ready: Ready) -> None:
    """A data position means nothing in data that changed."""
    context = ready()
    state = prepare(context)
    one_step(context, state)
    state.loop.dataset_sha256 = "ab" * 32
    save(context, state)

    with pytest.raises(
        DataError, match=r"the data changed since step-00000001 was written \(sha256 abababababab, now"
    ):
        agree_on_inputs(ready())


def test_a_checkpoint_of_other_weights_is_refused(ready: Ready) -> None:
    """Nor is an adapter of a model that was replaced under the same name; an old checkpoint does not say."""
    context = ready()
    state = prepare(context)
    one_step(context, state)
    save(context, state)
    inputs, ours = agree_on_inputs(ready()), state.loop.weights_sha256

    check_weights(context, inputs, ours)
    with pytest.raises(
        ModelError, match=rf"changed since step-00000001 .*sha256 {ours[:12]}, now abababababab"
    ):
        check_weights(context, inputs, "ab" * 32)
    inputs.loop.weights_sha256 = ""
    check_weights(context, inputs, "ab" * 32)


def test_pods_with_other_weights_do_not_train_together(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same names and shapes are not the same model."""
    context = ready()
    inputs = agree_on_inputs(context)
    monkeypatch.setattr(context.group, "all_gather_object", lambda mine: ["cd" * 32, mine])

    with pytest.raises(ConfigurationError, match="are not those of rank 0's pod"):
        check_weights(context, inputs, "ab" * 32)


def test_a_request_to_stop_ends_the_setup(ready: Ready) -> None:
    """Nothing is written before the first step."""
    context = ready()
    context.stop.set()

    with pytest.raises(StopHere):
        prepare(context)
    assert checkpoint.newest_valid(context.folder) is None


def test_ranks_that_read_different_files_do_not_train_together(
    alone: RankContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the rank and what differs."""
    others: list[dict[str, Any]] = [{"model": "aa", "data": "bb"}, {"model": "aa", "data": "cc"}]
    monkeypatch.setattr(alone.group, "all_gather_object", lambda mine: [mine, *others])

    with pytest.raises(
        ConfigurationError, match=r"^rank 2 has different data from rank 0: cc instead of bb$"
    ):
        check_same_on_all_ranks(alone, {"model": "aa", "data": "bb"})


def test_a_model_folder_that_is_missing_is_named(ready: Ready) -> None:
    """The user learns where it was looked for."""
    context = ready(model={"source": "pvc://smoke/nothing"})

    with pytest.raises(Exception, match=str(Path("smoke")) + ".*nothing"):
        agree_on_inputs(context)
