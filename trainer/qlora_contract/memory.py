"""How much memory a rank needs at most, from the model's shape and the RunConfig.

`qlora plan` shows it, and every rank uses it to choose its micro-batch and
whether to recompute activations, so that all ranks choose alike. Anonymous
memory is meant, and the mapped base: its pages can be dropped, but every step
reads all of them. Other mapped files are not counted.
The counts of saved tensors follow transformers' Llama layer run eagerly, with
our functions in it. docs/sizes.md shows how near estimates are to measured peaks.
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal, Protocol

from qlora_contract.base import ContractModel
from qlora_contract.quantization import is_mapped, weight_bytes
from qlora_contract.run_config import Layout, RunConfig, Training

Dtype = Literal["bf16", "fp32"]
Checkpointing = Literal["none", "full"]

MEBIBYTE = 2**20
BYTES: dict[str, int] = {"bf16": 2, "fp32": 4}
RUNTIME_BYTES = 490 * 2**20
"""Python, torch, transformers, the tokenizer and a small dataset: what a rank holds before the model, measured."""
SHARED_BYTES = 360 * 2**20
"""Of them, what the ranks of a pod have in common, since they are forked from one process; measured."""
SAMPLE_BYTES = 160
"""Of each training sample: its length, its place in an epoch's order, and in a bin. Tokens are mapped from files."""
SAMPLES_OF_RUNTIME = 50_000
"""A dataset that is small: what its samples need is among RUNTIME_BYTES."""
TOKENIZING_BYTES = 128 * 2**20
"""Of a process that tokenizes: a batch's text, tokens and offsets, and what it touches of what it inherits."""
LOGITS_BYTES = 64 * 2**20
"""Size of the logits of a chunk in fp32, at most: it bounds the rows of a chunk (qlora_trainer.modeling.loss)."""
LOSS_BYTES: dict[str, int] = {"bf16": 110 * 2**20, "fp32": 240 * 2**20}
"""By compute dtype, what the loss of a whole chunk takes: its logits, and what the products with the head need for it,
whatever the vocabulary; measured."""
PLAIN_LOSS_BYTES = 3 * 64 * 2**20
"""The same in plain torch: the chunk, its probabilities' narrow copy and slices of the head."""
PLAIN_SLACK = 1.5
"""In plain torch: freed blocks that malloc keeps because steps differ in size, and what oneDNN keeps for each size;
measured. The compiled passes leave none that counts."""
RECURRENT_NUMBERS = 2**20
"""Of the widest tensor that a recurrent layer makes at once, in fp32: it takes as many heads at a time, at least one
(qlora_trainer.modeling.delta_net)."""
RECURRENT_TENSORS = 50
"""Tensors of that size that are there at the same time in the backward pass; measured."""

STRIP_SECONDS = 0.15e-9
"""Of one weight on one core, to make the strip that rows are multiplied with: 0.05 to 0.3 by tier, in prototypes."""
STRIP_ROWS = 512
"""Rows that the kernel library multiplies with a strip before it makes it anew, at most."""
DEQUANTIZE_SECONDS = 0.8e-9
"""Of one weight on one core in plain torch, which dequantizes the whole matrix: 0.6 to 0.9 measured."""
DEQUANTIZE_THREADS = 8
"""Cores after which more do not dequantize whole matrices faster: memory is the limit."""
CORE_FLOPS: dict[str, float] = {"amx_bf16": 4e11, "avx512_bf16": 1e11, "avx512": 6e10, "avx2": 3e10}
"""By tier, what a core does in large products, from published figures: the order of magnitude is enough to choose."""


class ModelShape(ContractModel):
    """The numbers of a decoder that memory and time depend on."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    positions: int | None = None
    """Tokens of the longest sequence that the model can tell the places of; None: no limit is known."""
    tied: bool
    """The output head is the embedding."""
    stored_bytes: int
    """Bytes per weight in the checkpoint."""
    linear_weights: int
    """Weights of all linear layers but the head."""
    idle_weights: int = 0
    """Of these, those of the experts that a token does not go through."""
    largest_linear: int
    """Weights of the largest of them."""
    adapter_weights: int
    """Numbers that are trained: with LoRA, those of A and B over all adapted layers."""
    beside_layers: bool = True
    """Whether they stand beside linear layers, as LoRA's do: each token is multiplied with them, and its inputs of
    those layers are kept."""
    made_weights: int = 0
    """Numbers that the adapter makes of its weights in each micro-batch: keys and values of a prefix."""
    further_kept: int = 0
    """Numbers of a token in a layer, on average, that the backward pass needs beside those of a Llama layer."""
    recurrent_layers: int = 0
    """Of the layers, those with a recurrent state in place of attention."""
    recurrent_width: int = 0
    """Numbers of a token in the widest tensor of a head of such a layer."""
    recurrent_heads: int = 0
    """Heads of such a layer that are computed by themselves: those of its keys."""
    recurrent_flops: int = 0
    """Operations of a token in its recurrence, in a forward pass."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a rank, by what they are for."""

    runtime: int
    """Python, the libraries, and the numbers of the samples."""
    base: int
    """Frozen weights, with embedding and head: this rank's part where the ranks of its pod map them."""
    adapter: int
    """Adapter, its gradient and AdamW's two moments; and what it makes of its weights, with a gradient."""
    activations: int
    """Kept for the backward pass of one micro-batch."""
    scratch: int
    """Dequantized weights, logits, gradients in flight."""
    micro_batch_tokens: int
    checkpointing: Checkpointing

    @property
    def total(self) -> int:
        """All parts together."""
        return self.runtime + self.base + self.adapter + self.activations + self.scratch

    def parts(self) -> dict[str, int]:
        """The parts by name, in the order of the class."""
        names = ("runtime", "base", "adapter", "activations", "scratch")
        return {name: getattr(self, name) for name in names}


class Needs(Protocol):
    """What a rank needs: a MemoryEstimate, or what a plan tells of one."""

    @property
    def total(self) -> int:
        """Bytes."""

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens that are run at once."""

    @property
    def checkpointing(self) -> Checkpointing:
        """Whether activations are recomputed."""


def problems(needs: Needs, available: int, training: Training, sharing: int = 1) -> list[str]:
    """Why memoryPerRank is too small, and what to change; empty when it is enough.

    Args:
        needs: what a rank needs.
        available: bytes that a rank has.
        training: the job's settings.
        sharing: ranks that share memoryPerRank.
    """
    if needs.total <= available:
        return []
    step = 64 * MEBIBYTE
    remedies = [f"raise it to {-(-needs.total * sharing // step) * 64}Mi"]
    if needs.micro_batch_tokens > training.max_sequence_length:
        remedies.append("lower training.microBatchTokens")
    if needs.checkpointing == "none":
        remedies.append("set training.gradientCheckpointing to auto")
    remedies.append("lower training.maxSequenceLength")
    needed = -(-needs.total // MEBIBYTE)
    among = f" for the {sharing} ranks of a pod" if sharing > 1 else ""
    limit = f"{available * sharing // MEBIBYTE:,} MiB{among}"
    problem = f"a rank needs {needed:,} MiB, but spec.topology.memoryPerRank is {limit}"
    return [f"{problem}: {', or '.join(remedies)}"]


def layer_bytes(
    shape: ModelShape, tokens: int, dtype: Dtype, *, compiled: bool = True, prefixed: int = 0
) -> int:
    """Bytes that a layer keeps for its backward pass of `tokens` tokens, of which `prefixed` are of a prefix.

    By what autograd was seen to keep: two inputs of norms, gate and up; where adapters stand beside the layers, their
    inputs, which are two outputs of norms, the attention's output and the product of gate and up; all in the compute
    dtype. And what attention keeps: rotated q and k, v and the output, which are fp32 for short samples in plain torch.
    Of tokens of a prefix attention keeps something, and the layer nothing else.
    """
    e = BYTES[dtype]
    q, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    attention = (e if compiled else 4) * (2 * q + 2 * kv)
    inputs = 2 * shape.hidden + q + shape.intermediate if shape.beside_layers else 0
    own = e * (2 * shape.hidden + 2 * shape.intermediate + shape.further_kept + inputs)
    return (tokens - prefixed) * own + tokens * attention


def activation_bytes(
    shape: ModelShape,
    tokens: int,
    dtype: Dtype,
    checkpointing: Checkpointing,
    *,
    compiled: bool = True,
    prefixed: int = 0,
) -> int:
    """Bytes kept from the forward to the backward pass of `tokens` tokens: of all layers, or their inputs alone."""
    if checkpointing == "full":
        return (tokens - prefixed) * shape.layers * BYTES[dtype] * shape.hidden
    return shape.layers * layer_bytes(shape, tokens, dtype, compiled=compiled, prefixed=prefixed)


def estimate(
    shape: ModelShape,
    run: RunConfig,
    dtype: Dtype,
    tokens: int,
    checkpointing: Checkpointing,
    samples: int = 0,
    *,
    compiled: bool = True,
    mapped: bool = True,
) -> MemoryEstimate:
    """What a rank needs at most when it runs `tokens` tokens at once.

    Args:
        shape: of the model.
        run: the job, with a settled number of ranks.
        dtype: that is computed in.
        tokens: of a micro-batch.
        checkpointing: whether activations are recomputed.
        samples: those that are trained on.
        compiled: whether the kernel library computes, and not plain torch.
        mapped: whether the workspace has room for the quantized base, so that the ranks of a pod map it.
    """
    e = BYTES[dtype]
    ranks = _ranks_of_pod(run.layout)
    sharing = ranks if mapped and is_mapped(run.quantization, ranks) else 1
    widest = max(shape.intermediate, shape.heads * shape.head_size, shape.hidden)
    # One sample in each bin has the most tokens of its own.
    bins = tokens // run.training.max_sequence_length
    prefixed = bins * run.adapter.virtual_tokens if run.adapter.method == "prefix-tuning" else 0
    activations = activation_bytes(shape, tokens, dtype, checkpointing, compiled=compiled, prefixed=prefixed)
    # While a layer is at work in the backward pass: its gradients, its weights where they are dequantized as a whole,
    # and what it has computed again.
    # A recurrence is at work by itself, while none of its layer's products is.
    layer = 6 * tokens * widest * e + max(
        shape.largest_linear * (4 + e),
        recurrent_bytes(shape, tokens, min(tokens, run.training.max_sequence_length)),
    )
    if checkpointing == "full":
        layer += layer_bytes(shape, tokens, dtype, compiled=compiled, prefixed=prefixed)
    rows = tokens - bins * run.adapter.virtual_tokens
    loss = int(LOSS_BYTES[dtype] * min(1.0, 4 * rows * shape.vocabulary / LOGITS_BYTES))
    # The loss comes before the first of them.
    scratch = max(loss, layer) if compiled else PLAIN_LOSS_BYTES + layer
    return MemoryEstimate(
        runtime=runtime_bytes(run.layout) + SAMPLE_BYTES * max(0, samples - SAMPLES_OF_RUNTIME),
        base=base_bytes(shape, run, dtype) // sharing,
        adapter=shape.adapter_weights * 4 * 4 + shape.made_weights * 4 * 2,
        activations=activations if compiled else int(activations * PLAIN_SLACK),
        scratch=scratch,
        micro_batch_tokens=tokens,
        checkpointing=checkpointing,
    )


def base_bytes(shape: ModelShape, run: RunConfig, dtype: Dtype) -> int:
    """Bytes of the frozen weights, with embedding and head."""
    embedding = shape.vocabulary * shape.hidden * shape.stored_bytes * (1 if shape.tied else 2)
    return weight_bytes(shape.linear_weights, run.quantization, BYTES[dtype]) + embedding


def recurrent_bytes(shape: ModelShape, tokens: int, longest: int) -> int:
    """Bytes that a recurrent layer takes while it is at work: of some heads, or of one over the longest sample; of no
    more than there are."""
    if shape.recurrent_layers == 0:
        return 0
    at_once = max(RECURRENT_NUMBERS, longest * shape.recurrent_width)
    return 4 * RECURRENT_TENSORS * min(at_once, tokens * shape.recurrent_width * shape.recurrent_heads)


def _ranks_of_pod(layout: Layout) -> int:
    return 1 if layout.ranks_per_pod == "auto" else layout.ranks_per_pod


def runtime_bytes(layout: Layout) -> int:
    """What a rank holds before the model: its own, and its part of what it shares with the ranks of its pod.

    The process that they are forked from stays, and has a part as well.
    """
    ranks = _ranks_of_pod(layout)
    return RUNTIME_BYTES - SHARED_BYTES + SHARED_BYTES // ranks


def tokenizing_processes(layout: Layout) -> int:
    """How many processes of a pod tokenize: as many as it has CPUs, while its memory holds them.

    Its ranks hold nothing but their libraries meanwhile.
    """
    ranks = _ranks_of_pod(layout)
    room = ranks * (layout.memory_per_rank - RUNTIME_BYTES) // TOKENIZING_BYTES
    return max(1, min(layout.pod_cpus, room))


def choose(
    shape: ModelShape,
    run: RunConfig,
    dtype: Dtype,
    samples: int = 0,
    *,
    compiled: bool = True,
    mapped: bool = True,
) -> MemoryEstimate:
    """The micro-batch and checkpointing that a job's ranks use: of what fits memoryPerRank, the fastest.

    Either as asked for. Else `auto` takes what `step_seconds` says is faster, and the micro-batch is as large as fits,
    at most the rank's share of a step, then no larger than as many micro-batches need: eight bins with room for seven
    are run as four and four. At least one bin, recomputed, even when that does not fit. Arguments as of `estimate`.
    """
    training, limit = run.training, run.layout.memory_per_rank
    one_bin = training.max_sequence_length
    asked = training.gradient_checkpointing
    modes: list[Checkpointing] = ["none", "full"] if asked == "auto" else [asked]

    def at(tokens: int, mode: Checkpointing) -> MemoryEstimate:
        return estimate(shape, run, dtype, tokens, mode, samples, compiled=compiled, mapped=mapped)

    if training.micro_batch_tokens is not None:
        candidates = [at(max(training.micro_batch_tokens, one_bin), mode) for mode in modes]
    else:
        bins = share_of_bins(run)
        candidates = []
        for mode in modes:
            most = 1 + bisect_right(range(2, bins + 1), limit, key=lambda n: at(n * one_bin, mode).total)
            micro_batches = -(-bins // most)
            candidates.append(at(-(-bins // micro_batches) * one_bin, mode))
    fitting = [each for each in candidates if each.total <= limit]
    return min(
        fitting,
        key=lambda each: (step_seconds(shape, run, each, compiled=compiled), each.total),
        default=candidates[-1],
    )


def share_of_bins(run: RunConfig) -> int:
    """Bins of maxSequenceLength tokens in a rank's share of a step, at least one."""
    return max(
        1, run.training.global_batch_tokens // run.layout.world_size // run.training.max_sequence_length
    )


def step_seconds(
    shape: ModelShape, run: RunConfig, chosen: MemoryEstimate, *, compiled: bool = True
) -> float:
    """About how long a rank's share of a step takes, to compare choices: not for anybody to see.

    Each micro-batch dequantizes all weights and multiplies its tokens with them, of experts with those that a token
    goes through: forward, for the gradient of its input, and once more when activations are recomputed. The kernel
    library dequantizes whatever the weights are kept in, for so many rows at a time: of large micro-batches as often
    as of small ones.
    """
    passes = 3 if chosen.checkpointing == "full" else 2
    bins = share_of_bins(run)
    micro_batches = -(-bins // max(1, chosen.micro_batch_tokens // run.training.max_sequence_length))
    tokens, cpus = bins * run.training.max_sequence_length, run.layout.cpus_per_rank
    if compiled:
        dequantize = max(micro_batches, tokens / STRIP_ROWS) * STRIP_SECONDS / cpus
    elif run.quantization.scheme == "none":
        dequantize = 0.0
    else:
        dequantize = micro_batches * DEQUANTIZE_SECONDS / min(cpus, DEQUANTIZE_THREADS)
    multiply = 2 * tokens / (CORE_FLOPS[run.isa] * cpus)
    return passes * (
        shape.linear_weights * dequantize + (shape.linear_weights - shape.idle_weights) * multiply
    )
