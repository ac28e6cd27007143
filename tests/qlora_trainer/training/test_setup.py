"""What happens before the first step: agreement, the base's losses, a resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_trainer.artifacts import checkpoint
from qlora_trainer.errors import ConfigurationError, DataError
from qlora_trainer.training.context import RankContext, StopRequested
from qlora_trainer.training.loop import one_step, save
from qlora_trainer.training.setup import agree_on_inputs, check_same_on_all_ranks, prepare

pytestmark = pytest.mark.process

Ready = Callable[..., RankContext]


def test_a_fresh_job_measures_the_base_twice(ready: Ready) -> None:
    """Unquantized, and as it is trained on; quantization makes a difference."""
    loop = prepare(ready()).loop

    assert loop.step == 0
    assert loop.base_eval_loss is not None
    assert loop.base_eval_loss_quantized == pytest.approx(loop.base_eval_loss, rel=0.1)
    assert loop.base_eval_loss_quantized != loop.base_eval_loss


def test_an_unquantized_base_has_one_loss(ready: Ready) -> None:
    """Without quantization both measurements are of the same weights."""
    loop = prepare(ready(quantization={"scheme": "none"})).loop

    assert loop.base_eval_loss_quantized == loop.base_eval_loss


def test_a_base_that_does_not_fit_is_not_measured_unquantized(ready: Ready) -> None:
    """Its weights would be read from disk again and again."""
    loop = prepare(ready(layout={"memoryPerRank": 2**20})).loop

    assert loop.base_eval_loss is None
    assert loop.base_eval_loss_quantized is not None


def test_without_evaluation_data_nothing_is_measured(ready: Ready) -> None:
    """There are no losses to compare with."""
    context = ready(dataset={"evalFraction": 0.0}, evaluation={"requireImprovement": False})
    loop = prepare(context).loop

    assert (loop.base_eval_loss, loop.base_eval_loss_quantized) == (None, None)


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


@pytest.mark.parametrize("probability", [0.0, 0.1], ids=["no dropout", "dropout"])
def test_masks_of_the_release_before_are_not_taken_for_these(ready: Ready, probability: float) -> None:
    """A checkpoint that names no generator is of masks that torch drew: where there were any, the resume says so."""
    context = ready(adapter={"dropout": probability})
    state = prepare(context)
    one_step(context, state)
    before = state.loop.determinism_key.pop("dropout")
    save(context, state)

    reason = prepare(ready(adapter={"dropout": probability})).loop.not_bit_exact

    assert reason == ("dropout None -> philox4x32-10" if probability else None)
    assert before == ("philox4x32-10" if probability else None)


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


def test_a_request_to_stop_ends_the_first_evaluation(ready: Ready) -> None:
    """Nothing is written before the first step."""
    context = ready()
    context.stop.set()

    with pytest.raises(StopRequested):
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
