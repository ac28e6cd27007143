"""What a job will do, without training: for `qlora plan`.

    python -m qlora_trainer.plan             the machine alone; needs neither torch nor a job
    python -m qlora_trainer.plan RUN_JSON    the model, the data and the steps of a job
    python -m qlora_trainer.plan layout RUN_JSON CPUS [CPUS ...]
                                             where the ranks run of pods on this machine whose launchers may use
                                             these CPU lists each; needs no torch

Prints one line of JSON (qlora_contract.plan), and exits with 0 also when that tells an error of the user's.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_contract import memory, places
from qlora_contract.cpus import format_cpu_list
from qlora_contract.exit_codes import ExitCode
from qlora_contract.memory import MemoryEstimate
from qlora_contract.plan import (
    Machine,
    MemoryFigures,
    PlanAnswer,
    PlanError,
    PlanReport,
    PodPlan,
    RankPlan,
    Run,
    SplitFacts,
    Steps,
)
from qlora_contract.run import ISA_TIERS, RunConfig, Training
from qlora_trainer import cpu
from qlora_trainer.errors import TrainerError
from qlora_trainer.launch import LaunchError, load_run, place_ranks
from qlora_trainer.topology.layout import Layout
from qlora_trainer.topology.machine import read

if TYPE_CHECKING:
    from qlora_trainer.data import Facts, Samples


USAGE = "usage: python -m qlora_trainer.plan [RUN_JSON | layout RUN_JSON CPUS [CPUS ...]]"


def main(arguments: Sequence[str]) -> int:
    """Print the answer. Returns 2 for wrong arguments, else 0."""
    match arguments:
        case []:
            result = PlanAnswer(machine=machine())
        case [path]:
            result = answer(Path(path))
        case ["layout", path, *cpu_lists] if cpu_lists:
            result = layouts(Path(path), cpu_lists)
        case _:
            print(USAGE, file=sys.stderr)
            return 2
    print(result.model_dump_json(by_alias=True, exclude_none=True))
    return 0


def machine() -> Machine:
    """What this process may use."""
    isa = cpu.probe()
    lacking = {tier: isa.lacks(tier) for tier in ISA_TIERS}
    cpus, quota = cpu.available_cpus()
    return Machine(
        tiers=[tier for tier in ISA_TIERS if not lacking[tier]],
        lacking={tier: missing for tier, missing in lacking.items() if missing},
        cpus=[thread for core in read().cores_of(cpus) for thread in core.cpus],
        quota=quota,
    )


def answer(path: Path) -> PlanAnswer:
    """The plan of the job that a run.json describes, or why it would fail."""
    try:
        return PlanAnswer(plan=plan(load_run(path)))
    except LaunchError as error:
        return PlanAnswer(error=PlanError(code=error.code, cause=str(error)))
    except TrainerError as error:
        return PlanAnswer(error=PlanError(code=error.exit_code, cause=str(error)))
    except places.PlaceError as error:
        return PlanAnswer(error=PlanError(code=ExitCode.INVALID_CONFIGURATION, cause=str(error)))


def layouts(path: Path, cpu_lists: Sequence[str]) -> PlanAnswer:
    """Where the ranks run of a pod for each list of CPUs, as its launcher would decide; or why they do not fit."""
    try:
        run = load_run(path)
        return PlanAnswer(pods=[pod_plan(place_ranks(run, {places.CPUS_ENV: cpus})) for cpus in cpu_lists])
    except LaunchError as error:
        return PlanAnswer(error=PlanError(code=error.code, cause=str(error)))


def pod_plan(found: Layout) -> PodPlan:
    """A layout as it travels."""
    return PodPlan(
        ranks=[
            RankPlan(
                cpus=format_cpu_list(place.cpus),
                threads=place.threads,
                helpers=format_cpu_list(place.helpers),
                nodes=format_cpu_list(place.nodes),
                memory_node=place.memory_node,
            )
            for place in found.ranks
        ],
        bound=found.bound,
        unused=format_cpu_list(found.unused),
        notes=list(found.notes),
    )


def plan(run: RunConfig) -> PlanReport:
    """Measure the model and the data as every rank will.

    Raises:
        TrainerError: what would end training before its first step.
        PlaceError: a source whose claim has no folder here.
    """
    from qlora_trainer.inputs import first_dtype, load_inputs
    from qlora_trainer.packing import Plan
    from qlora_trainer.shape import model_shape
    from qlora_trainer.template import render
    from qlora_trainer.transfer.revisions import with_pinned_revisions

    volumes = places.volume_map()
    run = with_pinned_revisions(run, volumes)
    shape = model_shape(places.resolve(run.model_uri, volumes), run.adapter)
    tokenizer, data = load_inputs(run, volumes)
    dtype = first_dtype(run)
    whole = Plan(data.train.lengths(), run.training)
    first = whole.at(0).bins[0][0]
    return PlanReport(
        compute_dtype=dtype,
        shape=shape,
        memory=figures(memory.choose(shape, run, dtype)),
        training=split_facts(data.train, data.train_facts),
        evaluation=split_facts(data.evaluation, data.evaluation_facts)
        if data.evaluation is not None and data.evaluation_facts is not None
        else None,
        steps=steps(data.train.lengths(), run.training, whole),
        sample=[Run(text=t, learnt=learnt) for t, learnt in render(*data.train.sample(first), tokenizer)],
    )


def figures(estimate: MemoryEstimate) -> MemoryFigures:
    """The estimate as it travels."""
    return MemoryFigures(
        parts=estimate.parts(),
        total=estimate.total,
        micro_batch_tokens=estimate.micro_batch_tokens,
        checkpointing=estimate.checkpointing,
    )


def split_facts(samples: "Samples", facts: "Facts") -> SplitFacts:
    """Counts of a split."""
    return SplitFacts(
        records=facts.records,
        truncated=facts.truncated,
        dropped=facts.dropped,
        samples=len(samples),
        tokens=len(samples.ids),
        supervised_tokens=int(samples.mask.sum(dtype="int64")),
    )


def steps(lengths: Any, training: Training, whole: Any) -> Steps:
    """Steps of the first epoch and of all.

    Args:
        lengths: (samples,) tokens of each training sample.
        training: the job's settings.
        whole: the packing.Plan of both.
    """
    from qlora_trainer import packing

    order = packing.order(len(lengths), training.seed, 0)
    bins = packing.pack(lengths, order, training.max_sequence_length, training.packing)
    tokens = packing.tokens_of(bins, lengths)
    per_epoch = len(packing.steps(tokens, training.global_batch_tokens))
    return Steps(
        per_epoch=per_epoch,
        total=whole.total_steps,
        epochs=whole.epochs_done(whole.total_steps),
        tokens_per_step=sum(tokens) / per_epoch,
        fill=sum(tokens) / (len(bins) * training.max_sequence_length),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
