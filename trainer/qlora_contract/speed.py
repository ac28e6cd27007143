"""How long a job will take: the operations of its steps, by the shape of the model and the data, over measured rates.

A rough figure, for plans: it says what it rests on. What ranks choose by is qlora_contract.memory.
"""

from dataclasses import dataclass

from qlora_contract.memory import Checkpointing, Dtype, ModelShape
from qlora_contract.plan import PlanReport, SplitStats, TimeEstimate
from qlora_contract.run_config import IsaTier, RunConfig


@dataclass(frozen=True)
class Rate:
    """Operations per second that one core makes of a whole training step, whatever else there is in one included."""

    flops: float
    basis: str
    """Where the number comes from."""


_ZEN4 = "433 tokens/s measured with SmolLM2-135M on 2 Zen 4 cores (avx512_bf16)"
_MEASURED = Rate(1.14e11, _ZEN4)
# By the rates of the NF4 linear on one core, the greatest part of a step: 97 GFLOP/s in fp32, 190 in bf16.
_FP32 = Rate(5.8e10, f"half of bf16's rate, as the linear layers have it alone; that from {_ZEN4}")
RATES: dict[tuple[IsaTier, Dtype], Rate] = {
    ("amx_bf16", "bf16"): Rate(
        1.28e11,
        "490 tokens/s measured with SmolLM2-135M on 2 AMX cores before the compiled kernels; likely less time",
    ),
    ("avx512_bf16", "bf16"): _MEASURED,
    ("amx_bf16", "fp32"): _FP32,
    ("avx512_bf16", "fp32"): _FP32,
    ("avx512", "fp32"): _FP32,
    ("avx2", "fp32"): Rate(
        5.3e10, f"0.93 of avx512 in fp32, as the linear layers have it alone; that from {_ZEN4}"
    ),
    # Emulated.
    ("avx512", "bf16"): Rate(2e10, "a guess: bf16 is emulated on these processors"),
    ("avx2", "bf16"): Rate(1e10, "a guess: bf16 is emulated on these processors"),
}
START_SECONDS = 20.0
"""Imports, and tokenizing a small dataset; measured 14 to 21."""
LOAD_SECONDS = 4.7e-9
"""Of one weight: read and quantized by one core; measured 0.5 s for 106 million."""


def flops_per_token(shape: ModelShape, split: SplitStats, checkpointing: Checkpointing | None) -> float:
    """Floating-point operations for one token of a split.

    A frozen weight takes part in two products of 2 operations: forward, and for the gradient of its input; one of an
    adapter beside it in three. The head has those of supervised tokens alone, and attention looks at half of a sample
    on average. A recurrent layer has a number of its own, computes that again in its backward pass, and twice as much
    besides.

    Args:
        shape: of the model.
        split: of the data: its mean sample, and its supervised share.
        checkpointing: of the training; None: forward alone, as in an evaluation.
    """
    supervised = split.supervised_tokens / max(split.tokens, 1)
    attending = shape.layers - shape.recurrent_layers
    attention = 2.0 * split.tokens / max(split.samples, 1) * shape.heads * shape.head_size * attending
    recurrence = float(shape.recurrent_flops * shape.recurrent_layers)
    beside = shape.adapter_weights if shape.beside_layers else 0
    layers = 2.0 * (shape.linear_weights + beside) + attention + recurrence
    head = 2.0 * shape.vocabulary * shape.hidden * supervised
    if checkpointing is None:
        return layers + head
    recomputed = layers if checkpointing == "full" else 0.0
    return 2 * (layers + head) + recomputed + 2.0 * (beside + recurrence) + attention


def time_of(run: RunConfig, plan: PlanReport) -> TimeEstimate:
    """How long the steps and evaluations of a plan take on the CPUs that the job has.

    Args:
        run: the job, with a settled number of ranks.
        plan: what the trainer has measured of its model and data.
    """
    shape, steps = plan.shape, plan.steps
    rate = RATES[run.isa, plan.compute_dtype]
    cores = run.layout.world_size * run.layout.cpus_per_rank
    speed = rate.flops * cores
    per_token = flops_per_token(shape, plan.training, plan.memory.checkpointing)
    training = steps.total * steps.tokens_per_step * per_token / speed
    evaluation = 0.0
    if plan.evaluation is not None:
        every = run.evaluation.every_steps
        # The quantized and the unquantized base, where they are two, each without and with the finished adapter.
        bases = 1 if run.quantization.scheme == "none" else 2
        times = 2 * bases + (0 if every is None else (steps.total - 1) // every)
        one = plan.evaluation.tokens * flops_per_token(shape, plan.evaluation, None) / speed
        evaluation = times * one
    weights = shape.linear_weights + shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    start = START_SECONDS + weights * LOAD_SECONDS / run.layout.cpus_per_rank
    seconds = training + evaluation + start
    return TimeEstimate(
        seconds=seconds,
        training_seconds=training,
        evaluation_seconds=evaluation,
        start_seconds=start,
        core_hours=seconds * cores / 3600,
        flops_per_token=per_token,
        tokens_per_second=speed / per_token,
        basis=rate.basis,
    )
