"""Before the first step: everything is loaded, checked against the other ranks, and resumed where an attempt left off.

Ranks differ only in which bins they run: every decision here is made from the same facts on each of them, or by rank 0
for all.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from qlora_contract import memory
from qlora_contract.cpus import parse_cpu_list
from qlora_contract.env import CPUS_ENV, PARENT_DEATH_ENV
from qlora_contract.export import forms_of
from qlora_contract.memory import Dtype, MemoryEstimate
from qlora_contract.paths import resolve
from qlora_contract.plan import ranks_without_work
from qlora_contract.progress import Work
from qlora_contract.run_config import RunConfig
from qlora_contract.units import format_bytes
from qlora_trainer.artifacts import base_losses, checkpoint
from qlora_trainer.artifacts.base_losses import BaseLosses
from qlora_trainer.artifacts.checkpoint import LoopState
from qlora_trainer.artifacts.training_report import license_of
from qlora_trainer.data.batches import Workers
from qlora_trainer.data.dataset import LoadedData
from qlora_trainer.data.packing import StepSchedule
from qlora_trainer.data.token_cache import TokenCache
from qlora_trainer.data.tokenization import Tokenization
from qlora_trainer.distributed.backends import ccl
from qlora_trainer.distributed.backends.hosts import host_id
from qlora_trainer.errors import ConfigurationError, DataError, ModelError
from qlora_trainer.host.cgroups import memory_limit
from qlora_trainer.host.isa import processor
from qlora_trainer.modeling import initial_adapter
from qlora_trainer.modeling.adapter_methods import method_for
from qlora_trainer.modeling.adapter_parameters import ALIGNMENT, AdapterParameters
from qlora_trainer.modeling.base_model import BaseModel
from qlora_trainer.modeling.families import read_model
from qlora_trainer.modeling.lora_linear import GENERATOR, Dropout
from qlora_trainer.modeling.shape import model_shape
from qlora_trainer.modeling.stored.formats import description
from qlora_trainer.modeling.weight_files import fingerprint, weight_files
from qlora_trainer.quantization import kernels
from qlora_trainer.telemetry.termination import write_memory_plan
from qlora_trainer.training import exports
from qlora_trainer.training.base import WAITING_SECONDS, load_base, pods_that_map
from qlora_trainer.training.context import RankContext, StopRequested
from qlora_trainer.training.data_check import RAW
from qlora_trainer.training.inputs import (
    Load,
    TokenSource,
    check_initial_adapter,
    default_compute_dtype,
    load_inputs,
    step_schedule,
)
from qlora_trainer.training.objective import Objective, SupervisedFineTuning
from qlora_trainer.training.optimizer import AdapterAdamW
from qlora_trainer.training.schedule import warmup_steps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DTYPES: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
LORA_RATE = 2e-4
"""The default of training.learningRate."""
MOST_ABOVE_PEAK = 1.1
"""By how much an estimate of memory may exceed what is used: by 9 % where both are known (docs/sizes.md)."""
CHECKPOINT_BYTES = 12
"""Per adapter weight: fp32, and AdamW's two moments."""


@dataclass(frozen=True)
class Inputs:
    """What all ranks have agreed on, before any weight is loaded."""

    model_folder: Path
    tokenizer: "PreTrainedTokenizerBase"
    data: LoadedData
    tokens: dict[str, str]
    """LoopState.token_digests of the data."""
    schedule: StepSchedule
    memory: MemoryEstimate
    mapped: bool
    """Whether the ranks of this pod map the base."""
    dtype: Dtype
    determinism_key: dict[str, Any]
    checkpoint: Path | None
    """What to resume from."""
    loop: LoopState
    """Of the checkpoint; a new one without."""


@dataclass
class TrainState:
    """Everything the loop works on."""

    model_folder: Path
    model_facts: dict[str, Any]
    """What training_report.json says of it, kept since the folder may be gone by then."""
    model_bytes: int
    """Of its files of weights."""
    tokenizer: "PreTrainedTokenizerBase"
    objective: Objective
    model: BaseModel
    parameters: AdapterParameters
    dropout: Dropout | None
    optimizer: torch.optim.Optimizer
    data: LoadedData
    counts: NDArray[np.int64]
    """(training samples,): what each counts in the objective's mean."""
    supervised: NDArray[np.int64]
    """(training samples,): supervised tokens of each."""
    schedule: StepSchedule
    memory: MemoryEstimate
    dtype: Dtype
    loop: LoopState
    base_losses: BaseLosses
    """As far as they have been measured."""


def prepare(context: RankContext) -> TrainState:
    """Load everything, check that all ranks agree, and resume from the newest checkpoint.

    Nothing is evaluated yet: a user sees the first step as soon as can be.

    Raises:
        StopRequested, StopHere: a rank was asked to stop in the meantime.
        TrainerError: one of its kinds, for every expected failure.
    """
    context.progress.update(stage="Starting")
    objective = SupervisedFineTuning()
    inputs = agree_on_inputs(context)
    state, weights = build(context, objective, inputs)
    check_weights(context, inputs, weights)
    if inputs.checkpoint is not None:
        restore(context, inputs.checkpoint, state, inputs.determinism_key)
    state.loop.weights_sha256 = weights
    state.base_losses = known_base_losses(context, state)
    state.loop.base_eval_loss = state.base_losses.unquantized
    state.loop.base_eval_loss_quantized = state.base_losses.quantized
    state.loop.determinism_key = inputs.determinism_key
    state.loop.dataset_sha256 = state.data.sha256
    same_samples = state.loop.token_digests.get("evaluation") == inputs.tokens["evaluation"]
    if not (same_samples and context.run.evaluation.keep_best):  # losses on other samples are no measure
        state.loop.best_step, state.loop.best_eval_loss, state.loop.evaluations_since_best = None, None, 0
    state.loop.token_digests = inputs.tokens
    if context.all_reduce_scalars({}).stop_requested:
        raise StopRequested
    return state


def agree_on_inputs(context: RankContext) -> Inputs:
    """Read model shape and data, find the checkpoint, and choose memory settings and steps, alike on every rank.

    Raises:
        ConfigurationError: ranks read different files.
        DataError: the data cannot be trained on, or are not those of the checkpoint.
        ModelError: the model or its tokenizer cannot be used.
        StorageFull: checkpoints and adapter will not fit.
        Terminated: this rank was asked to stop.
    """
    run = context.run
    model_folder = resolve(run.model_uri, context.volumes)
    shape = model_shape(model_folder, run.adapter)
    forms = forms_of(run.output)
    exports.check(forms, model_folder, run.adapter)
    began = context.group.all_gather_object(context.folder.began() if context.is_rank_zero else None)[0]
    context.progress.begin(Work(name="tokenizing", unit="records"))
    tokenizer, data = load_inputs(run, shape, context.volumes, began, context.advance, once_per_pod(context))
    context.progress.begin(None)
    tokens = digests_of_tokens(tokenizer, data)

    found = checkpoint.newest_valid(context.folder) if context.is_rank_zero else None
    of_ranks = context.group.all_gather_object(
        (found.name if found else None, context.isa, processor(), host_id())
    )
    name = of_ranks[0][0]
    resumed = context.folder.checkpoints / name if name else None
    if resumed is None:
        check_initial_adapter(run, model_folder, context.volumes)
    loop = checkpoint.read_state(resumed) if resumed else LoopState()
    if resumed and loop.dataset_sha256 != data.sha256:  # a data position means nothing in other data
        raise DataError(
            f"the data changed since {resumed.name} was written (sha256 {loop.dataset_sha256[:12]}, now "
            f"{data.sha256[:12]}); restore the old data, or give the job another name"
        )
    check_same_tokens(loop.token_digests, tokens, resumed)

    # As asked for; else what the first completed step used, on whatever processor that was.
    used = next((dtype for dtype in DTYPES if dtype == loop.determinism_key.get("compute_dtype")), None)
    default = default_compute_dtype(run, {isa for _, isa, *_ in of_ranks})
    dtype = used if run.training.compute_dtype == "auto" and used else default
    samples = max(len(data.train), data.epoch_samples)
    kept = run.checkpoint.keep + run.evaluation.keep_best + 2
    checkpoints = kept * shape.adapter_weights * CHECKPOINT_BYTES
    space = checkpoints + 2**20 + exports.space(forms, model_folder)
    maps = pods_that_map(context, model_folder, DTYPES[dtype], memory.base_bytes(shape, run, dtype), space)
    compiled, mapped = kernels.usable() is not None, all(maps.values())
    chosen = memory.choose(shape, run, dtype, samples, compiled=compiled, mapped=mapped)
    check_memory(run, chosen, os.environ, memory_limit())
    write_memory_plan(chosen.parts())
    check_same_on_all_ranks(
        context,
        {
            "model": fingerprint(model_folder),
            "data": tokens["training"],
            "evaluation data": tokens["evaluation"],
            "torch": torch.__version__,
        },
    )
    if context.is_rank_zero:
        for use, facts in data.facts().items():
            log.log(logging.WARNING if facts.lost else logging.INFO, "%s data: %s", use, facts.summary())
        context.folder.check_space(space)
        warn_of_lost_answers(data, run.own_tokens)
        if data.train_facts.raw and tokenizer.chat_template:
            log.warning("%s", RAW)
        context.progress.update(data=data.told())
        if run.adapter.method != "lora" and run.training.learning_rate == LORA_RATE:
            log.warning(
                "training.learningRate is %g, which suits LoRA: %s learns little at it; 0.001 to 0.03 are usual",
                LORA_RATE, run.adapter.method,
            )  # fmt: skip
    schedule = step_schedule(run, data)
    bins, steps = schedule.first_epoch()
    waiting = ranks_without_work(len(bins), steps, context.world.size, run.training)
    if context.is_rank_zero and waiting:
        log.warning("%s", waiting)
    context.progress.update(
        total_steps=schedule.total_steps, memory_estimate=chosen.total, compute_dtype=dtype, step=loop.step
    )
    _, isas, processors, hosts = zip(*of_ranks, strict=True)
    key = determinism_key(context, chosen, dtype) | {
        # Not of the order of sums, but of the bits: a job that was made longer has had a shorter warm-up.
        "warmup_steps": warmup_steps(schedule.total_steps, run.training.warmup_ratio),
        "tier": " and ".join(sorted(set(isas))),
        "processor": " and ".join(sorted(set(processors))),
        # oneCCL and MPI add up otherwise within a host than between hosts.
        "hosts": len(set(hosts)) if run.distributed.backend != "gloo" else None,
    }
    log.info(
        "rank %d of %d: ISA %s, %s, %d thread(s), kernels %s, micro-batch %d tokens, checkpointing %s, %d steps, "
        "estimated memory %s",
        context.world.rank, context.world.size, context.isa, dtype, torch.get_num_threads(), key["kernels"],
        chosen.micro_batch_tokens, chosen.checkpointing, schedule.total_steps, format_bytes(chosen.total),
    )  # fmt: skip
    own = maps[context.world.pod]
    return Inputs(model_folder, tokenizer, data, tokens, schedule, chosen, own, dtype, key, resumed, loop)


def once_per_pod(context: RankContext) -> Load:
    """Loads data by the workspace's cache: the first rank of each pod fills it, the others of the pod wait for that."""
    run, world, group = context.run, context.world, context.group
    cache = TokenCache(resolve(run.workspace, context.volumes), (run.job.uid, run.job.attempt, world.pod))
    done = f"tokens of pod {world.pod}"

    def load(source: TokenSource) -> LoadedData:
        tokenization = partial(Tokenization, source.tokenizer, source.max_length, source.options)
        if world.local_rank > 0:
            while (key := group.told(done)) is None:
                context.advance(0)
                time.sleep(WAITING_SECONDS)
            return (cache.read(key, tokenization) if key else None) or source.load()
        key = source.key()
        data = cache.read(key, tokenization)
        if data is None:
            workers = Workers(memory.tokenizing_processes(run.layout), pod_cpus(os.environ))
            wrote = cache.write(key, source.size(), partial(source.load, workers=workers))
            data = cache.read(key, tokenization) if wrote else None
        group.tell(done, key if data is not None else "")
        return data if data is not None else source.load()

    return load


def pod_cpus(environ: Mapping[str, str]) -> Collection[int]:
    """The CPUs of this pod: what its launcher may use; of all that there are the kernel takes those that it allows."""
    listed = environ.get(CPUS_ENV)
    return parse_cpu_list(listed) if listed else range(os.cpu_count() or 1)


def digests_of_tokens(tokenizer: "PreTrainedTokenizerBase", data: LoadedData) -> dict[str, str]:
    """LoopState.token_digests of these data."""
    return {
        "training": data.train.digest(),
        "evaluation": data.evaluation.digest() if data.evaluation else "",
        "chat template": data.template.digest() if data.template else "",
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
    }


def check_same_tokens(then: dict[str, str], now: dict[str, str], resumed: Path | None) -> None:
    """Raise DataError when the same data became other tokens, in which a data position means nothing.

    Args:
        then: LoopState.token_digests of the checkpoint; empty in one that does not know.
        now: of the data at hand.
        resumed: the checkpoint.
    """
    # What is evaluated may be bounded otherwise now: evaluation is no part of what a job is.
    if resumed is None or not then or then.get("training") == now["training"]:
        return
    changed = [what for what in ("chat template", "tokenizer") if then.get(what) != now[what]]
    raise DataError(
        f"the data become other tokens than when {resumed.name} was written, because the "
        f"{' and the '.join(changed) or 'trainer or a library of it'} changed; restore what it was, or give the job "
        "another name"
    )


def warn_of_lost_answers(data: LoadedData, max_length: int) -> None:
    """Log how much of what was to be learned is lost to the longest length, if anything is."""
    for use, facts in (("training", data.train_facts), ("evaluation", data.evaluation_facts)):
        if facts is not None and facts.truncated:
            log.warning(
                "%d of %d %s records are longer than maxSequenceLength %d: their ends are cut off, and %d of them "
                "lose all that is to be learned and are left out",
                facts.truncated, facts.records, use, max_length, facts.dropped,
            )  # fmt: skip


def known_base_losses(context: RankContext, state: TrainState) -> BaseLosses:
    """What the base is known to score on the samples that this attempt evaluates, the same on every rank.

    Releases that evaluated all samples kept it in checkpoints alone; that counts as long as all of them still are.
    """
    data, loop = state.data, state.loop
    if data.evaluation is None:
        return BaseLosses({})
    things = {
        "samples": data.evaluation.digest(),
        "weights": loop.weights_sha256,
        "quantization": json.dumps(context.run.quantization.model_dump(), sort_keys=True),
        "dtype": state.dtype,
    }
    kept = base_losses.read(context.folder, things) if context.is_rank_zero else None
    known: BaseLosses | None = context.group.all_gather_object(kept)[0]
    if known is not None:
        return known
    facts = data.evaluation_facts
    if facts is None or facts.records - facts.dropped > len(data.evaluation):
        return BaseLosses(things)
    return BaseLosses(things, loop.base_eval_loss_quantized, loop.base_eval_loss)


def check_memory(
    run: RunConfig, chosen: MemoryEstimate, environ: Mapping[str, str], limit: int | None
) -> None:
    """Raise ConfigurationError, with the sentence of `qlora plan`, for a job that cannot fit: before it is loaded.

    `qlora run` gives a rank memoryPerRank, which nothing else keeps. In a pod the kernel keeps the limit, and an
    estimate slightly above what is used must not end what works: only what the ranks would need beyond doubt counts.

    Args:
        run: the job.
        chosen: what each rank needs.
        environ: this rank's.
        limit: bytes that the ranks of this pod may use together; None: no limit.
    """
    available = run.layout.memory_per_rank
    if not environ.get(PARENT_DEATH_ENV):
        ranks = 1 if run.layout.ranks_per_pod == "auto" else run.layout.ranks_per_pod
        if limit is None or chosen.total * ranks <= MOST_ABOVE_PEAK * limit:
            return
        available = min(available, limit // ranks)
    for problem in memory.problems(chosen, available, run.training):
        raise ConfigurationError(problem)


def check_same_on_all_ranks(context: RankContext, facts: dict[str, str]) -> None:
    """Raise ConfigurationError where ranks have different facts: they must not train together."""
    rank_zero, *others = context.group.all_gather_object(facts)
    for rank, theirs in enumerate(others, start=1):
        for name, value in theirs.items():
            if value != rank_zero[name]:
                raise ConfigurationError(
                    f"rank {rank} has different {name} from rank 0: {value} instead of {rank_zero[name]}"
                )


def determinism_key(context: RankContext, chosen: MemoryEstimate, dtype: Dtype) -> dict[str, Any]:
    """All on this rank that decides in which order numbers are added up (LoopState.determinism_key)."""
    return {
        "world_size": context.world.size,
        "backend": context.run.distributed.backend,
        "allreduce": allreduce_of(context.run.distributed.backend, context.world.size),
        "compute_dtype": dtype,
        "kernels": kernels.name(context.run.quantization.scheme),
        # None where plain torch runs, as in checkpoints that knew no other.
        "passes": compiled.name if (compiled := kernels.usable()) else None,
        # As in checkpoints of a release whose masks torch drew.
        "dropout": GENERATOR if context.run.adapter.dropout else None,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "alignment": ALIGNMENT,
        "micro_batch_tokens": chosen.micro_batch_tokens,
        "checkpointing": chosen.checkpointing,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def check_weights(context: RankContext, inputs: Inputs, weights: str) -> None:
    """Raise ConfigurationError where pods have other weights than rank 0, ModelError where the checkpoint is of others.

    `weights`: their hash, as `build` returns it.
    """
    if context.group.all_gather_object(weights)[0] != weights:
        raise ConfigurationError(
            f"the weights of {inputs.model_folder} on pod {context.world.pod} are not those of rank 0's pod: every pod "
            "must read the same model"
        )
    began_with = inputs.loop.weights_sha256
    if inputs.checkpoint is not None and began_with and began_with != weights:
        raise ModelError(
            f"the weights of {inputs.model_folder} changed since {inputs.checkpoint.name} was written (sha256 "
            f"{began_with[:12]}, now {weights[:12]}); restore the old model, or give the job another name"
        )


def build(context: RankContext, objective: Objective, inputs: Inputs) -> tuple[TrainState, str]:
    """Load the quantized base, and attach a new adapter and its optimizer; with the state the hash of the weights.

    Raises:
        ModelError: the weights cannot be used.
    """
    run = context.run
    model, weights = load_base(context, inputs.model_folder, DTYPES[inputs.dtype], mapped=inputs.mapped)
    model.graph.train()
    if inputs.memory.checkpointing == "full":
        model.enable_gradient_checkpointing()
    dropout = Dropout(run.adapter.dropout, run.training.seed) if run.adapter.dropout else None
    parameters = method_for(run.adapter).attach(
        model,
        seed=run.training.seed,
        dropout=dropout,
        encode=lambda text: list(inputs.tokenizer(text).input_ids),
    )
    if (uri := run.initial_adapter_uri) is not None and inputs.checkpoint is None:
        initial = resolve(uri, context.volumes)
        inputs.loop.initial_adapter_sha256 = initial_adapter.load(initial, parameters)
    optimizer = AdapterAdamW(
        parameters,
        lr=run.training.learning_rate,
        weight_decay=run.training.weight_decay,
        ratio=run.adapter.lora_plus_ratio,
    )
    state = TrainState(
        model_folder=inputs.model_folder,
        model_facts=facts_of_model(inputs.model_folder),
        model_bytes=sum(file.stat().st_size for file in weight_files(inputs.model_folder)),
        tokenizer=inputs.tokenizer,
        objective=objective,
        model=model,
        parameters=parameters,
        dropout=dropout,
        optimizer=optimizer,
        data=inputs.data,
        counts=objective.counts(inputs.data.train),
        supervised=inputs.data.train.supervised_counts(),
        schedule=inputs.schedule,
        memory=inputs.memory,
        dtype=inputs.dtype,
        loop=inputs.loop,
        base_losses=BaseLosses({}),
    )
    return state, weights


def facts_of_model(folder: Path) -> dict[str, Any]:
    """TrainState.model_facts of a model."""
    family, config = read_model(folder)
    return {
        "auto_class": family.auto_class,
        "license": license_of(folder),
        "stored_in": description(folder, config),
        "model_fingerprint": fingerprint(folder),
    }


def sums_that_vary(key: Mapping[str, Any]) -> str | None:
    """Why no run under this determinism key repeats another one's bits; None where it does."""
    if key["allreduce"] not in (None, ccl.REPEATABLE_ALLREDUCE):
        return f"oneCCL's sums of CCL_ALLREDUCE={key['allreduce']} may differ from run to run"
    return None


def allreduce_of(backend: str, ranks: int) -> str | None:
    """The algorithm that a backend adds up with; None where it has none to choose, or no sum depends on it."""
    return os.environ.get("CCL_ALLREDUCE", "") if backend == "ccl" and ranks > 2 else None


def restore(context: RankContext, path: Path, state: TrainState, key: dict[str, Any]) -> None:
    """Load a checkpoint into adapter, optimizer and loop state, and say whether the run stays bit-exact.

    Args:
        context: this rank's.
        path: the checkpoint.
        state: what is loaded into.
        key: this attempt's determinism key.

    Raises:
        ConfigurationError: the checkpoint is of another adapter.
    """
    loop = checkpoint.load(path, state.parameters, state.optimizer)
    varies = sums_that_vary(key)
    if varies and varies in (loop.not_bit_exact or ""):  # said by an earlier attempt
        varies = None
    changes = "; ".join(filter(None, (checkpoint.changes(loop.determinism_key, key), varies)))
    loop.not_bit_exact = "; ".join(filter(None, (loop.not_bit_exact, changes))) or None
    state.loop = loop
    if context.is_rank_zero:
        log.info(
            "resumed after step %d (%s)", loop.step, f"not bit-exact: {changes}" if changes else "bit-exact"
        )
