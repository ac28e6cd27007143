"""N ranks do what one rank does."""

from collections.abc import Callable
from typing import Any

import pytest

from qlora_trainer.data.packing import shard

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_as_one_does(
    ranks: int,
    backend: str,
    undisturbed: Callable[[int, str], Any],
    alone: Any,
    assert_same_training: Callable[..., None],
) -> None:
    """Every step of N ranks is that of one rank, by whatever backend: counts exactly, numbers up to rounding."""
    assert_same_training(undisturbed(ranks, backend), alone)


@pytest.mark.parametrize("ranks", [2, 4])
def test_backends_agree(
    ranks: int,
    backend: str,
    undisturbed: Callable[[int, str], Any],
    assert_same_training: Callable[..., None],
    assert_same_bits: Callable[..., None],
) -> None:
    """Losses are gloo's: of two ranks to the bit, since a sum of two has one rounding, of more up to rounding."""
    same = assert_same_bits if ranks == 2 else assert_same_training

    same(undisturbed(ranks, backend), undisturbed(ranks, "gloo"))


def test_shares_are_uneven(four: Any) -> None:
    """The comparisons cover uneven shares, ranks with nothing to run, and an epoch's short tail."""
    plan = four.plan()
    steps = [plan.step(number) for number in range(plan.total_steps)]

    def shares(ranks: int) -> list[set[int]]:
        return [{len(shard(step.bins, rank, ranks)) for rank in range(ranks)} for step in steps]

    assert any({2, 3} <= share for share in shares(2))
    assert any({1, 2} <= share for share in shares(4))
    assert any({0, 1} <= share for share in shares(4))
    assert steps[-1].epoch > 0
    assert [line["tokens"] for line in four.steps()] == [sum(step.bin_tokens) for step in steps]


def test_every_rank_does_its_share(four: Any) -> None:
    """The work of a job is divided: the ranks' tokens are the job's."""
    report = four.report()
    tokens = [rank["tokens"] for rank in report["ranks"]]

    assert sum(tokens) == report["tokens"]
    assert all(0 < count < report["tokens"] / 2 for count in tokens)


VARIANTS: dict[str, dict[str, Any]] = {
    "dropout": {"adapter": {"dropout": 0.3}},
    "two sources with weights": {
        "dataset": {
            "sources": [
                {"source": "pvc://data/train.jsonl", "weight": 0.5},
                {"source": "pvc://data/train.jsonl", "weight": 1.5},
            ],
            "evalFraction": 0.2,
        }
    },
    "one sample a bin, unquantised": {"training": {"packing": False}, "quantization": {"scheme": "none"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train_as_one_rank_does(
    variant: str, make_job: Callable[..., Any], assert_same_training: Callable[..., None]
) -> None:
    """Neither dropout, nor a mix, nor the kind of bins or weights makes the result depend on the number of ranks."""
    sections = VARIANTS[variant]
    training = {**sections.get("training", {}), "maxSteps": 8}
    jobs = [make_job(**{**sections, "training": training}) for _ in range(2)]
    with jobs[0].start(1) as one, jobs[1].start(2) as two:
        ends = [*one.wait(), *two.wait()]

    assert [end.code for end in ends] == [0, 0], "\n".join(end.log for end in ends)
    assert_same_training(jobs[1], jobs[0])


def test_dropout_changes_the_gradient_but_not_the_first_loss(
    make_job: Callable[..., Any], alone: Any
) -> None:
    """B is zero at the first step, so whatever is dropped from its input shows in the gradient alone."""
    job = make_job(
        adapter={"dropout": 0.3}, training={"maxSteps": 1}, evaluation={"requireImprovement": False}
    )
    first, undropped = job.done().steps()[0], alone.steps()[0]

    assert first["loss"] == undropped["loss"]
    assert first["grad_norm"] != pytest.approx(undropped["grad_norm"], rel=0.01)


def test_evaluation_between_steps_changes_nothing(
    make_job: Callable[..., Any], alone: Any, assert_same_bits: Callable[..., None]
) -> None:
    """A job that is evaluated in the middle ends with the same bits as one that is not."""
    job = make_job(evaluation={"everySteps": 5}).done()

    assert_same_bits(job, alone)
    evaluated = [line["step"] for line in job.metrics() if line.get("eval_loss") is not None]
    assert evaluated == [0, 5, 10, 15, 20, 24]


def test_finished_job_is_not_run_again(two: Any) -> None:
    """Another attempt at a finished job exits 0, says what the first one said, and changes no result."""
    before = two.files()

    end = two.run(2)

    assert end.code == 0, end.log
    assert end.report.adapter_sha256 == two.report()["adapter_sha256"]
    after = two.files()
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == ["fence.json"]


def test_ranks_that_launchers_agree_on_train_as_one_does(
    make_job: Callable[..., Any], alone: Any, assert_same_training: Callable[..., None]
) -> None:
    """With ranksPerPod auto two pods agree on the world, share memoryPerRank, and the report says what came of it."""
    job = make_job()
    run = job.run_config(2, 2)
    layout = run.layout.model_copy(update={"ranks_per_pod": "auto"})
    with job.start_text(run.model_copy(update={"layout": layout}).to_json(), pods=2) as attempt:
        ends = attempt.wait()

    assert [end.code for end in ends] == [0, 0], ends[0].log
    assert_same_training(job, alone)
    report = job.report()
    assert report["world_size"] == len(report["ranks"]) >= 2
    assert {rank["pod"] for rank in report["ranks"]} == {0, 1}
