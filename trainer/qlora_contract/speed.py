"""How long a job will take: the operations of its steps, by the shape of the model and the data, over measured rates.

A rough figure, for plans: it says what it rests on. What ranks choose by is qlora_contract.memory.
"""

from dataclasses import dataclass

from qlora_contract.export import forms_of
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
ANSWER_TOKENS = 32
"""Of an answer to a held-out prompt, at most; and it is counted whole."""
ANSWER_SECONDS = 60.0
"""Of the base's and the adapter's answer to one prompt, at most."""
FEWEST_ROWS = 16
"""A product with fewer rows takes as long as with so many, since its weight is unpacked all the same; a guess."""
PROOF_TOKENS = 150
"""Of the texts on which an export is compared with the adapter's model."""
K_QUANT_SECONDS = 3e-8
"""Of one weight on one core, in the search for the scales of q4_k_m; a rough one."""


def flops_per_token(
    shape: ModelShape, split: SplitStats, checkpointing: Checkpointing | None, virtual: int = 0
) -> float:
    """Floating-point operations for one token of a split.

    A frozen weight that is not idle takes part in two products of 2 operations: forward, and for the gradient of its
    input; one of an adapter beside it in three. The head has those of supervised tokens alone, and attention looks at
    half of a sample on average, and at all virtual tokens before it. A recurrent layer has a number of its own.

    Args:
        shape: of the model.
        split: of the data: its mean sample, and its supervised share.
        checkpointing: of the training; None: forward alone, as in an evaluation.
        virtual: tokens before each sample.
    """
    supervised = split.supervised_tokens / max(split.tokens, 1)
    attending = shape.layers - shape.recurrent_layers
    seen = split.tokens / max(split.samples, 1) / 2 + virtual
    attention = 4.0 * seen * shape.heads * shape.head_size * attending
    beside = shape.adapter_weights if shape.beside_layers else 0
    layers = 2.0 * (shape.linear_weights - shape.idle_weights + beside) + attention
    head = 2.0 * shape.vocabulary * shape.hidden * supervised
    recurrence = recurrent_flops(shape, checkpointing)
    if checkpointing is None:
        return layers + head + recurrence
    recomputed = layers if checkpointing == "full" else 0.0
    return 2 * (layers + head) + recomputed + 2.0 * beside + attention + recurrence


def recurrent_flops(shape: ModelShape, checkpointing: Checkpointing | None) -> float:
    """Those of the recurrent layers among them: forward, again in the backward pass, and twice as much there besides.

    Arguments as of flops_per_token.
    """
    passes = {None: 1, "none": 4, "full": 5}[checkpointing]
    return float(passes * shape.recurrent_flops * shape.recurrent_layers)


def _seconds_per_token(
    run: RunConfig, plan: PlanReport, split: SplitStats, checkpointing: Checkpointing | None
) -> float:
    """Of one core, for a token of a split. Recurrent layers compute in fp32, whatever the others do."""
    virtual = run.adapter.virtual_tokens
    recurrent = recurrent_flops(plan.shape, checkpointing)
    others = flops_per_token(plan.shape, split, checkpointing, virtual) - recurrent
    return others / RATES[run.isa, plan.compute_dtype].flops + recurrent / RATES[run.isa, "fp32"].flops


def answers_seconds(run: RunConfig, plan: PlanReport) -> float:
    """How long rank 0 takes for the answers of base and adapter to evaluation.prompts of what is held out: the prompts
    are read at once, and then each further token goes through all weights, of all answers together."""
    held_out = plan.evaluation
    if held_out is None or not (count := min(run.evaluation.prompts, held_out.samples)):
        return 0.0
    one = _seconds_per_token(run, plan, held_out, None) / run.layout.cpus_per_rank
    prompt = (held_out.tokens - held_out.supervised_tokens) / held_out.samples
    rows = count * prompt + (ANSWER_TOKENS - 1) * max(count, FEWEST_ROWS)
    return float(min(2 * rows * one, count * ANSWER_SECONDS))


def exports_seconds(run: RunConfig, plan: PlanReport) -> float:
    """How long one rank takes for output.formats: for each form all weights are read, merged and written, and read
    again for the comparison, before which the base and the adapter's model are computed once, all in fp32."""
    forms = forms_of(run.output)
    if not forms:
        return 0.0
    shape = plan.shape
    weights = shape.linear_weights + shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    passes = 2 + len(forms)
    compared = passes * PROOF_TOKENS * 2.0 * weights / RATES[run.isa, "fp32"].flops
    moved = (1 + 2 * len(forms)) * weights * LOAD_SECONDS
    searched = forms.count("gguf-q4_k_m") * weights * K_QUANT_SECONDS
    return (compared + moved + searched) / run.layout.cpus_per_rank


def time_of(run: RunConfig, plan: PlanReport) -> TimeEstimate:
    """How long what a plan describes takes on the CPUs that the job has, from start to exports.

    Args:
        run: the job, with a settled number of ranks.
        plan: what the trainer has measured of its model and data.
    """
    shape, steps, mode = plan.shape, plan.steps, plan.memory.checkpointing
    cores = run.layout.world_size * run.layout.cpus_per_rank
    # A prefix is in a step's tokens, and runs through no layer.
    prefix = run.adapter.virtual_tokens if run.adapter.method == "prefix-tuning" else 0
    own = max(1, plan.training.tokens)
    through = own / (own + prefix * plan.training.samples)
    per_token = through * _seconds_per_token(run, plan, plan.training, mode) / cores
    training = steps.total * steps.tokens_per_step * per_token
    evaluation = 0.0
    if plan.evaluation is not None:
        every = run.evaluation.every_steps
        # The quantized and the unquantized base, where they are two, each without and with the finished adapter; and
        # the adapter that the job goes on from.
        bases = 1 if run.quantization.scheme == "none" else 2
        initial = run.adapter.initial_adapter is not None
        times = 2 * bases + initial + (0 if every is None else (steps.total - 1) // every)
        prompt = run.adapter.virtual_tokens - prefix
        tokens = plan.evaluation.tokens + prompt * plan.evaluation.samples
        one = tokens * _seconds_per_token(run, plan, plan.evaluation, None) / cores
        evaluation = times * one
    weights = shape.linear_weights + shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    start = START_SECONDS + weights * LOAD_SECONDS / run.layout.cpus_per_rank
    answers, exports = answers_seconds(run, plan), exports_seconds(run, plan)
    held = training + evaluation + start + answers
    return TimeEstimate(
        seconds=held + exports,
        training_seconds=training,
        evaluation_seconds=evaluation,
        start_seconds=start,
        answers_seconds=answers,
        exports_seconds=exports,
        core_hours=(held * cores + exports * run.layout.cpus_per_rank) / 3600,
        flops_per_token=flops_per_token(shape, plan.training, mode, run.adapter.virtual_tokens),
        tokens_per_second=1 / per_token if per_token else 0.0,
        basis=RATES[run.isa, plan.compute_dtype].basis,
    )
