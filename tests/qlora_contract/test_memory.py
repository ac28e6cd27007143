"""The memory estimate: its parts, and the micro-batch that is chosen from it."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_contract.memory import (
    LOGITS_BYTES,
    LOSS_BYTES,
    RECURRENT_NUMBERS,
    RECURRENT_TENSORS,
    Checkpointing,
    Dtype,
    ModelShape,
    activation_bytes,
    base_bytes,
    choose,
    estimate,
    recurrent_bytes,
    step_seconds,
)
from qlora_contract.quantization import SCHEMES, SchemeName
from qlora_contract.run_config import (
    ISA_TIERS,
    Adapter,
    Dataset,
    IsaTier,
    JobRef,
    Layout,
    ModelSource,
    Quantization,
    RunConfig,
    Training,
)

GIB = 2**30
SMOLLM2 = ModelShape(
    hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, head_size=64, vocabulary=49152, tied=True,
    stored_bytes=2, linear_weights=106_168_320, largest_linear=884_736, adapter_weights=4_884_480,
)  # fmt: skip


def run(
    memory: int = 16 * GIB,
    ranks: int = 1,
    quantization: Quantization | None = None,
    **training: Any,
) -> RunConfig:
    """A RunConfig whose bins have 1024 tokens unless told otherwise."""
    return RunConfig(
        job=JobRef(name="job", uid="u", attempt=0),
        workspace="pvc://data",
        model=ModelSource(source="pvc://data/model"),
        dataset=Dataset(source="pvc://data/train.jsonl"),
        adapter=Adapter(),
        quantization=quantization or Quantization(),
        training=Training(
            **{"max_steps": 1, "max_sequence_length": 1024, "global_batch_tokens": 8192, **training}
        ),
        layout=Layout(pods=ranks, memory_per_rank=memory),
        isa="avx2",
    )


def total(tokens: int, mode: Checkpointing = "none", dtype: Dtype = "fp32") -> int:
    """The estimate for SmolLM2."""
    return estimate(SMOLLM2, run(), dtype, tokens, mode).total


# --- the parts


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_parts_add_up(dtype: Dtype, mode: Checkpointing) -> None:
    """The named parts are all there is in the total, and none is negative."""
    found = estimate(SMOLLM2, run(), dtype, 2048, mode)

    assert list(found.parts()) == ["runtime", "base", "adapter", "activations", "scratch"]
    assert sum(found.parts().values()) == found.total
    assert min(found.parts().values()) > 0
    assert (found.micro_batch_tokens, found.checkpointing) == (2048, mode)


def test_what_is_kept_of_each_record_is_in_the_estimate() -> None:
    """160 bytes, beyond as many as any job has room for."""
    few, many = (estimate(SMOLLM2, run(), "bf16", 1024, "none", samples) for samples in (50_000, 10_050_000))

    assert many.total - few.total == many.runtime - few.runtime == 160 * 10_000_000


def test_adapter_takes_sixteen_bytes_a_weight() -> None:
    """fp32 weights, their gradient and two moments."""
    assert estimate(SMOLLM2, run(), "bf16", 1024, "none").adapter == 16 * SMOLLM2.adapter_weights


def test_ranks_of_a_pod_share_what_they_have_imported() -> None:
    """They are forked from one process: each needs less than one alone, and all together more."""
    alone = run()
    four = alone.model_copy(update={"layout": alone.layout.model_copy(update={"ranks_per_pod": 4})})
    one, each = (estimate(SMOLLM2, asked, "bf16", 1024, "none", mapped=False) for asked in (alone, four))

    assert each.runtime < one.runtime < 4 * each.runtime
    assert one.total - each.total == one.runtime - each.runtime


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ranks_of_a_pod_share_the_base_that_they_map(scheme: str) -> None:
    """Where there is room for it in the workspace."""
    asked = run(quantization=Quantization.model_validate({"scheme": scheme}))
    four = asked.model_copy(update={"layout": asked.layout.model_copy(update={"ranks_per_pod": 4})})
    one, each, own = (
        estimate(SMOLLM2, which, "bf16", 1024, "none", mapped=mapped).base
        for which, mapped in ((asked, True), (four, True), (four, False))
    )

    assert own == one == base_bytes(SMOLLM2, asked, "bf16")
    assert each == one // 4


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_plain_torch_needs_more_than_the_compiled_kernels(dtype: Dtype, mode: Checkpointing) -> None:
    """Where nothing is compiled, more copies are made and kept."""
    compiled, plain = (
        estimate(SMOLLM2, run(), dtype, 4096, mode, compiled=found).total for found in (True, False)
    )

    assert compiled < plain


def test_layers_without_adapters_keep_less() -> None:
    """Those behind virtual tokens, and of a prefix's tokens attention alone."""
    behind = SMOLLM2.model_copy(update={"beside_layers": False, "adapter_weights": 0})
    virtual = {"method": "prompt-tuning", "numVirtualTokens": 512}
    lora = estimate(behind.model_copy(update={"beside_layers": True}), run(), "bf16", 2048, "none")
    prompt, prefix = (
        estimate(
            behind,
            run().model_copy(update={"adapter": Adapter.model_validate(virtual | {"method": method})}),
            "bf16",
            2048,
            "none",
        )
        for method in ("prompt-tuning", "prefix-tuning")
    )

    assert prefix.activations < prompt.activations
    assert prefix.total < prompt.total < lora.total


def test_the_loss_of_few_rows_takes_less_than_a_chunk() -> None:
    """Of half a chunk half; of more rows than a chunk has, no more. Virtual tokens are no rows."""
    narrow = SMOLLM2.model_copy(
        update={"hidden": 1, "intermediate": 1, "heads": 1, "head_size": 1, "largest_linear": 0}
    )
    chunk = LOGITS_BYTES // (4 * narrow.vocabulary)

    def scratch(tokens: int, **adapter: Any) -> int:
        job = run(max_sequence_length=tokens)
        job = job.model_copy(update={"adapter": Adapter.model_validate(adapter)})
        return estimate(narrow, job, "bf16", tokens, "none").scratch

    virtual = {"method": "prompt-tuning", "numVirtualTokens": chunk // 2}
    assert scratch(2 * chunk) == scratch(4 * chunk) == LOSS_BYTES["bf16"]
    assert (
        scratch(chunk // 2)
        == scratch(2 * (chunk // 2), **virtual)
        == pytest.approx(LOSS_BYTES["bf16"] / 2, rel=0.01)
    )


def test_a_prefix_is_held_with_its_gradient() -> None:
    """What an adapter makes of its weights in each micro-batch takes eight bytes a number."""
    made = SMOLLM2.model_copy(update={"made_weights": 1000})

    found, without = (estimate(shape, run(), "bf16", 1024, "none").adapter for shape in (made, SMOLLM2))
    assert found - without == 8000


def test_a_recurrent_layer_at_work_takes_some_heads_or_one_over_the_longest_sample() -> None:
    """As much as many heads at a time may; of longer samples what a single head takes, however many are in a batch. It
    takes turns with the products, and there are only so many heads."""
    linear = SMOLLM2.model_copy(update={"largest_linear": 0})
    recurrent = linear.model_copy(
        update={"recurrent_layers": 20, "recurrent_width": 256, "recurrent_heads": 16}
    )

    def more(tokens: int, longest: int) -> int:
        job = run(max_sequence_length=longest, global_batch_tokens=2 * tokens)
        found, without = (estimate(x, job, "bf16", tokens, "full").scratch for x in (recurrent, linear))
        return found - without

    assert more(8192, 1024) == more(8192, 4096) == 4 * RECURRENT_TENSORS * RECURRENT_NUMBERS
    assert more(8192, 8192) == more(16384, 8192) == 2 * more(8192, 4096)
    few = recurrent.model_copy(update={"recurrent_heads": 1, "recurrent_width": 128})
    assert recurrent_bytes(few, 1024, 1024) == 4 * RECURRENT_TENSORS * 1024 * 128
    products = few.model_copy(update={"largest_linear": 10**9})
    without = SMOLLM2.model_copy(update={"largest_linear": 10**9})
    assert estimate(products, run(), "bf16", 1024, "full") == estimate(without, run(), "bf16", 1024, "full")


def test_an_untied_head_is_a_second_embedding() -> None:
    """Without tying, the head's stored bytes are counted too."""
    untied = SMOLLM2.model_copy(update={"tied": False})
    more = (
        estimate(untied, run(), "fp32", 1024, "none").base
        - estimate(SMOLLM2, run(), "fp32", 1024, "none").base
    )

    assert more == 49152 * 576 * 2


@pytest.mark.parametrize("mode", ["none", "full"])
def test_bf16_needs_less_than_fp32(mode: Checkpointing) -> None:
    """Narrow activations take less memory, and never more than half saved."""
    narrow, wide = (
        activation_bytes(SMOLLM2, 1024, "bf16", mode),
        activation_bytes(SMOLLM2, 1024, "fp32", mode),
    )

    assert wide / 2 <= narrow < wide


def test_recomputing_keeps_one_layer_and_the_inputs_of_all() -> None:
    """Full checkpointing needs less than an eighth of what 30 layers keep."""
    kept, recomputed = (activation_bytes(SMOLLM2, 1024, "fp32", m) for m in ("none", "full"))

    assert kept == 30 * (kept // 30)
    assert kept // 30 < recomputed < kept / 8


@given(st.lists(st.integers(1, 100_000), min_size=2, max_size=6), st.sampled_from(["none", "full"]))
def test_more_tokens_need_more(tokens: list[int], mode: Checkpointing) -> None:
    """The estimate grows with the micro-batch."""
    ordered = sorted(set(tokens))

    assert all(total(a, mode) < total(b, mode) for a, b in pairwise(ordered))


# --- the choice


@pytest.mark.parametrize(
    ("memory", "asked", "expected"),
    [
        pytest.param(64 * GIB, "auto", "none", id="auto, plenty"),
        pytest.param(total(1024), "auto", "none", id="auto, one bin just fits"),
        pytest.param(total(1024) - 1, "auto", "full", id="auto, one bin just does not fit"),
        pytest.param(1, "auto", "full", id="auto, nothing fits"),
        pytest.param(1, "none", "none", id="none as asked for"),
        pytest.param(64 * GIB, "full", "full", id="full as asked for"),
    ],
)
def test_checkpointing(memory: int, asked: str, expected: str) -> None:
    """As asked for; `auto` recomputes only where one bin does not fit without it."""
    assert choose(SMOLLM2, run(memory, gradient_checkpointing=asked), "fp32").checkpointing == expected


@pytest.mark.parametrize(
    ("memory", "ranks", "expected"),
    [
        pytest.param(64 * GIB, 1, 8192, id="the whole step fits"),
        pytest.param(64 * GIB, 2, 4096, id="a rank's share of two"),
        pytest.param(64 * GIB, 3, 2048, id="a rank's share of three, in whole bins"),
        pytest.param(64 * GIB, 8, 1024, id="one bin each"),
        pytest.param(64 * GIB, 64, 1024, id="more ranks than bins"),
        pytest.param(total(3072), 1, 3072, id="three bins just fit"),
        pytest.param(total(3072) - 1, 1, 2048, id="three bins just do not fit"),
        pytest.param(total(7168), 1, 4096, id="seven bins fit, four and four are as fast"),
        pytest.param(total(5120), 1, 4096, id="five bins fit, four and four are as fast"),
        pytest.param(total(1024), 1, 1024, id="one bin just fits"),
        pytest.param(1, 1, 1024, id="one bin, though it does not fit"),
    ],
)
def test_micro_batch(memory: int, ranks: int, expected: int) -> None:
    """The fewest micro-batches whose bins fit, all about as large, within the rank's share, of at least one bin."""
    found = choose(SMOLLM2, run(memory, ranks, gradient_checkpointing="none"), "fp32")

    assert found.micro_batch_tokens == expected


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        pytest.param(4096, 4096, id="as asked for"),
        pytest.param(5000, 5000, id="not a multiple"),
        pytest.param(100_000, 100_000, id="more than fits or is there"),
        pytest.param(10, 1024, id="less than a bin"),
    ],
)
def test_explicit_micro_batch(asked: int, expected: int) -> None:
    """microBatchTokens is taken as it is, but a bin is never split."""
    assert choose(SMOLLM2, run(GIB, micro_batch_tokens=asked), "fp32").micro_batch_tokens == expected


@settings(max_examples=200, deadline=None)
@given(
    memory=st.integers(1, 40 * GIB),
    ranks=st.integers(1, 40),
    length=st.integers(8, 4096),
    bins=st.integers(1, 40),
    mode=st.sampled_from(["auto", "none", "full"]),
    dtype=st.sampled_from(["bf16", "fp32"]),
)
def test_choice_is_the_fewest_micro_batches_that_fit(
    memory: int, ranks: int, length: int, bins: int, mode: str, dtype: Dtype
) -> None:
    """Whole bins, at least one, never above the rank's share; it fits if one bin does; one micro-batch fewer would not,
    and no smaller one would do."""
    asked = run(
        memory,
        ranks,
        max_sequence_length=length,
        global_batch_tokens=length * bins,
        gradient_checkpointing=mode,
    )
    found = choose(SMOLLM2, asked, dtype)

    tokens, share = found.micro_batch_tokens, length * bins // ranks
    assert tokens >= length
    assert tokens % length == 0
    assert tokens <= max(share, length)
    assert found.total <= memory or tokens == length
    mine, used = max(1, share // length), tokens // length
    count = -(-mine // used)
    if count > 1:
        fewer = estimate(SMOLLM2, asked, dtype, -(-mine // (count - 1)) * length, found.checkpointing)
        assert fewer.total > memory
    assert used == -(-mine // count)


LLAMA_8B = ModelShape(
    hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, head_size=128, vocabulary=128_256, tied=False,
    stored_bytes=2, linear_weights=6_979_321_856, largest_linear=58_720_256, adapter_weights=41_943_040,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    shape=st.sampled_from([SMOLLM2, LLAMA_8B]),
    memory=st.lists(st.integers(1, 200 * GIB), min_size=2, max_size=6),
    bins=st.integers(1, 40),
    cpus=st.integers(1, 128),
    isa=st.sampled_from(ISA_TIERS),
    compiled=st.booleans(),
    asked=st.fixed_dictionaries(
        {"gradient_checkpointing": st.sampled_from(["auto", "none", "full"])},
        optional={"micro_batch_tokens": st.integers(1, 40_000)},
    ),
)
def test_more_memory_never_makes_a_step_slower(
    shape: ModelShape,
    memory: list[int],
    bins: int,
    cpus: int,
    isa: IsaTier,
    compiled: bool,
    asked: dict[str, Any],
) -> None:
    """By the model that the choice is made with, whatever is left to be chosen."""
    times = []
    for limit in sorted(memory):
        config = run(limit, global_batch_tokens=1024 * bins, **asked)
        layout = config.layout.model_copy(update={"cpus_per_rank": cpus})
        config = config.model_copy(update={"layout": layout, "isa": isa})
        chosen = choose(shape, config, "bf16", compiled=compiled)
        times.append(step_seconds(shape, config, chosen, compiled=compiled))

    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize(
    ("memory", "scheme", "isa", "cpus", "compiled", "expected"),
    [
        pytest.param(10, "nf4", "amx_bf16", 56, True, ("full", 4096), id="nothing else fits"),
        pytest.param(14, "nf4", "amx_bf16", 56, True, ("none", 1024), id="one bin fits without recomputing"),
        pytest.param(80, "nf4", "amx_bf16", 56, True, ("none", 8192), id="all fits"),
        pytest.param(
            16, "nf4", "amx_bf16", 56, False, ("full", 8192), id="plain torch, AMX: fewer passes are faster"
        ),
        pytest.param(
            15,
            "nf4",
            "avx512",
            4,
            False,
            ("none", 1024),
            id="plain torch: recomputing costs more than passes",
        ),
        pytest.param(
            28, "none", "amx_bf16", 56, False, ("none", 1024), id="plain torch: nothing to dequantize"
        ),
    ],
)
def test_recomputing_is_weighed_against_dequantizing(
    memory: int, scheme: SchemeName, isa: IsaTier, cpus: int, compiled: bool, expected: tuple[str, int]
) -> None:
    """In plain torch a pass over all weights costs as much as the products of some thousand tokens where these are
    fast, so that recomputing in one micro-batch beats several without. The kernel library dequantizes for some hundred
    rows at a time, however many there are."""
    config = run(memory * GIB, quantization=Quantization(scheme=scheme))
    config = config.model_copy(
        update={"isa": isa, "layout": config.layout.model_copy(update={"cpus_per_rank": cpus})}
    )
    found = choose(LLAMA_8B, config, "bf16", compiled=compiled)

    assert (found.checkpointing, found.micro_batch_tokens) == expected


def test_all_ranks_choose_alike() -> None:
    """The choice depends on the shape and the RunConfig alone: a parsed copy of both gives the same one."""
    asked = run(2 * GIB, 3)
    again = RunConfig.model_validate_json(asked.to_json())
    shape = ModelShape.model_validate_json(SMOLLM2.model_dump_json())

    assert choose(shape, again, "fp32") == choose(SMOLLM2, asked, "fp32")
