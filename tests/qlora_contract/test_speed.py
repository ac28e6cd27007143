"""How long a job takes, by its plan."""

from typing import Any, get_args

import pytest

from builders import a_run
from qlora_contract.memory import Dtype, ModelShape
from qlora_contract.plan import MemoryFigures, PlanReport, SplitStats, Steps, TimeEstimate
from qlora_contract.run_config import ISA_TIERS, RunConfig
from qlora_contract.speed import RATES, flops_per_token, time_of

SMOLLM2 = ModelShape(
    hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, head_size=64, vocabulary=49152, tied=True,
    stored_bytes=2, linear_weights=106_168_320, largest_linear=884_736, adapter_weights=4_884_480,
)  # fmt: skip
DEMO = SplitStats(
    records=3989, truncated=0, dropped=0, samples=3989, tokens=211_000, supervised_tokens=111_000
)
HELD_OUT = SplitStats(
    records=180, truncated=0, dropped=0, samples=180, tokens=20_000, supervised_tokens=10_000
)


def a_plan(evaluation: SplitStats | None = None, steps: int = 25, **fields: Any) -> PlanReport:
    """The plan of the demo, or of so many of its steps."""
    known: dict[str, Any] = {
        "compute_dtype": "bf16",
        "shape": SMOLLM2,
        "memory": MemoryFigures(parts={}, total=1, micro_batch_tokens=256, checkpointing="none"),
        "training": DEMO,
        "evaluation": evaluation,
        "steps": Steps(per_epoch=228, total=steps, epochs=0.1, tokens_per_step=936.0, fill=0.9),
        "sample": [],
    }
    return PlanReport(**{**known, **fields})


def a_job(isa: str = "avx512_bf16", ranks: int = 2, cpus: int = 1, **fields: Any) -> RunConfig:
    """A job of so many ranks."""
    layout = {"ranksPerPod": ranks, "cpusPerRank": cpus, "memoryPerRank": 2**30}
    return a_run(isa=isa, layout=layout, **fields)


def the_time(run: RunConfig | None = None, **fields: Any) -> TimeEstimate:
    """Of the demo unless told otherwise."""
    return time_of(run or a_job(), a_plan(**fields))


def test_the_demo_is_as_fast_as_it_was_measured() -> None:
    """433 tokens a second on two Zen 4 cores: what the rate was taken from comes out again."""
    assert the_time().tokens_per_second == pytest.approx(433, rel=0.03)
    assert the_time().training_seconds == pytest.approx(25 * 936 / 433, rel=0.03)


def test_every_processor_has_a_rate_that_says_what_it_rests_on() -> None:
    """A better tier is never slower, and its numbers are of a processor's order."""
    assert set(RATES) == {(tier, dtype) for tier in ISA_TIERS for dtype in get_args(Dtype)}
    for dtype in get_args(Dtype):
        rates = [RATES[tier, dtype].flops for tier in ISA_TIERS]
        assert rates == sorted(rates, reverse=True)
    assert all(1e9 < rate.flops < 3e12 and rate.basis for rate in RATES.values())
    assert the_time(a_job("avx2"), compute_dtype="fp32").basis == RATES["avx2", "fp32"].basis


def test_time_follows_steps_cores_and_recomputation() -> None:
    """Twice the steps take twice as long, twice the cores half; recomputing the layers costs up to half more."""
    one = the_time().training_seconds

    assert the_time(steps=50).training_seconds == pytest.approx(2 * one)
    assert the_time(a_job(ranks=4)).training_seconds == pytest.approx(one / 2)
    assert the_time(a_job(cpus=2)).training_seconds == pytest.approx(one / 2)
    full = MemoryFigures(parts={}, total=1, micro_batch_tokens=256, checkpointing="full")
    assert 1.3 < the_time(memory=full).training_seconds / one < 1.5


def test_core_hours_are_those_of_the_whole_time() -> None:
    """Starting, evaluating and answering hold the CPUs, too."""
    time = the_time(a_job(ranks=3, cpus=4), evaluation=HELD_OUT)

    parts = (time.start_seconds, time.training_seconds, time.evaluation_seconds, time.answers_seconds)
    assert time.seconds == pytest.approx(sum(parts))
    assert time.core_hours == pytest.approx(time.seconds * 12 / 3600)


@pytest.mark.parametrize(
    ("every", "times"),
    [
        pytest.param(None, 4, id="both bases, without and with the adapter"),
        pytest.param(10, 6, id="and twice on the way"),
        pytest.param(5, 8, id="the last step is followed by the final one"),
        pytest.param(100, 4, id="later than the end"),
    ],
)
def test_evaluations_are_counted(every: int | None, times: int) -> None:
    """Each is a forward pass over what is held out: less than half of training on as much. What is not quantized is one
    base, not two."""
    time = the_time(a_job(evaluation={"everySteps": every}), evaluation=HELD_OUT)
    one = (
        HELD_OUT.tokens * flops_per_token(SMOLLM2, HELD_OUT, None) / (2 * RATES["avx512_bf16", "bf16"].flops)
    )

    assert time.evaluation_seconds == pytest.approx(times * one)
    assert the_time().evaluation_seconds == 0.0
    plain = the_time(
        a_job(evaluation={"everySteps": every}, quantization={"scheme": "none"}), evaluation=HELD_OUT
    )
    assert plain.evaluation_seconds == pytest.approx((times - 2) * one)
    assert flops_per_token(SMOLLM2, HELD_OUT, None) < flops_per_token(SMOLLM2, HELD_OUT, "none") / 2


def test_operations_are_those_of_the_products() -> None:
    """By hand, for a model of two layers' worth of weights: 4 for a frozen weight, 6 for one of the adapter, 4 for a
    supervised token's weight of the head, and 6 for what attention sees."""
    shape = SMOLLM2.model_copy(
        update={"linear_weights": 1000, "adapter_weights": 10, "hidden": 8, "vocabulary": 100, "layers": 2,
                "heads": 2, "head_size": 4}
    )  # fmt: skip
    split = SplitStats(records=2, truncated=0, dropped=0, samples=2, tokens=20, supervised_tokens=5)

    assert flops_per_token(shape, split, "none") == 4 * 1000 + 6 * 10 + 4 * 800 * 0.25 + 6 * 10 * 8 * 2


def test_recurrent_layers_have_work_of_their_own_in_place_of_attention() -> None:
    """Forward once; computed again and twice as much in the backward pass; no matter how long samples are."""
    split = SplitStats(records=2, truncated=0, dropped=0, samples=2, tokens=20, supervised_tokens=5)
    shape = SMOLLM2.model_copy(update={"layers": 2, "heads": 2, "head_size": 4})
    recurrent = shape.model_copy(update={"recurrent_layers": 1, "recurrent_flops": 1000})
    longer = split.model_copy(update={"samples": 1})

    found, attending = (flops_per_token(each, split, "none") for each in (recurrent, shape))
    assert found - attending == 4 * 1000 - 6 * 10 * 8
    found, attending = (flops_per_token(each, split, None) for each in (recurrent, shape))
    assert found - attending == 1000 - 2 * 10 * 8
    assert flops_per_token(recurrent, longer, None) - found == 2 * 10 * 8


def test_experts_that_a_token_does_not_go_through_cost_it_nothing() -> None:
    """Idle weights are as if they were not there, forward, backward and computed again."""
    mixture = SMOLLM2.model_copy(
        update={"linear_weights": SMOLLM2.linear_weights + 10**9, "idle_weights": 10**9}
    )

    for mode in ("none", "full", None):
        assert flops_per_token(mixture, HELD_OUT, mode) == flops_per_token(SMOLLM2, HELD_OUT, mode)


def test_recurrent_layers_compute_in_fp32() -> None:
    """In bf16 their operations take as long as fp32's, which are about half as fast; so it is while they evaluate."""
    recurrent = SMOLLM2.model_copy(update={"recurrent_layers": 20, "recurrent_flops": 10**6})
    plain = recurrent.model_copy(update={"recurrent_flops": 0})
    narrow, wide = (RATES["avx512_bf16", dtype].flops for dtype in ("bf16", "fp32"))
    found, without = (the_time(evaluation=HELD_OUT, shape=shape) for shape in (recurrent, plain))

    tokens = 25 * 936
    assert found.training_seconds - without.training_seconds == pytest.approx(tokens * 4 * 2e7 / wide / 2)
    assert found.evaluation_seconds - without.evaluation_seconds == pytest.approx(4 * 20_000 * 2e7 / wide / 2)
    assert found.flops_per_token - without.flops_per_token == pytest.approx(4 * 2e7)
    assert narrow > wide


def test_a_prefix_runs_through_no_layer() -> None:
    """Of a step's tokens a prompt's cost what others do, a prefix' only what attention sees of them."""
    per_sample = DEMO.tokens / DEMO.samples
    tuned = {
        method: the_time(a_job(adapter={"method": f"{method}-tuning", "numVirtualTokens": 40}))
        for method in ("prompt", "prefix")
    }
    prompt, prefix = (tuned[method].training_seconds for method in ("prompt", "prefix"))

    assert prefix == pytest.approx(prompt * per_sample / (per_sample + 40))
    assert tuned["prefix"].flops_per_token == flops_per_token(SMOLLM2, DEMO, "none", virtual=40)
    assert tuned["prefix"].tokens_per_second > tuned["prompt"].tokens_per_second


def test_an_adapter_to_go_on_from_is_evaluated_once_more() -> None:
    """Before the first step."""
    further = the_time(a_job(adapter={"initialAdapter": "pvc://data/first/adapter"}), evaluation=HELD_OUT)

    assert further.evaluation_seconds == pytest.approx(
        the_time(evaluation=HELD_OUT).evaluation_seconds * 5 / 4
    )


def test_virtual_tokens_are_multiplied_with_no_token() -> None:
    """What is trained is no weight of a layer."""
    behind = SMOLLM2.model_copy(update={"beside_layers": False})
    none = SMOLLM2.model_copy(update={"adapter_weights": 0})

    assert flops_per_token(behind, HELD_OUT, "none") == flops_per_token(none, HELD_OUT, "none")


def test_no_tokens_are_no_fault() -> None:
    """A split of which nothing is used."""
    empty = SplitStats(records=0, truncated=0, dropped=0, samples=0, tokens=0, supervised_tokens=0)

    assert flops_per_token(SMOLLM2, empty, "none") > 0


def test_answers_are_rank_0s_alone() -> None:
    """More CPUs of a rank help, more ranks do not; without prompts or held-out data there are none."""
    one = the_time(evaluation=HELD_OUT).answers_seconds

    assert 0 < one < 60
    assert the_time(a_job(ranks=4), evaluation=HELD_OUT).answers_seconds == one
    assert the_time(a_job(cpus=2), evaluation=HELD_OUT).answers_seconds == pytest.approx(one / 2)
    assert the_time(a_job(evaluation={"prompts": 0}), evaluation=HELD_OUT).answers_seconds == 0.0
    assert the_time().answers_seconds == 0.0


def test_answers_end_when_their_time_is_over() -> None:
    """A minute for each prompt."""
    large = SMOLLM2.model_copy(update={"linear_weights": 10**12})

    assert the_time(shape=large, evaluation=HELD_OUT).answers_seconds == 3 * 60


def test_exports_have_the_cpus_of_one_rank() -> None:
    """Each form adds to the time, q4_k_m the most; the other ranks have left by then."""
    formats = {"formats": ["adapter", "merged"]}
    k_quants = {"formats": ["adapter", "gguf"], "ggufTypes": ["q4_k_m"]}
    none, merged = the_time(), the_time(a_job(output=formats))

    assert none.exports_seconds == 0.0
    assert 0 < merged.exports_seconds < the_time(a_job(output=k_quants)).exports_seconds
    assert merged.seconds == pytest.approx(none.seconds + merged.exports_seconds)
    assert merged.core_hours == pytest.approx(none.core_hours + merged.exports_seconds * 1 / 3600)
    assert the_time(a_job(ranks=4, output=formats)).exports_seconds == merged.exports_seconds
