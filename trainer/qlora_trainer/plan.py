"""What a job will do, without training: for `qlora plan`.

    python -m qlora_trainer.plan             the machine alone; needs neither torch nor a job
    python -m qlora_trainer.plan RUN_JSON    the model, the data and the steps of a job
    python -m qlora_trainer.plan layout RUN_JSON CPUS [CPUS ...]
                                             where the ranks run of pods on this machine whose launchers may use
                                             these CPU lists each; needs no torch
    python -m qlora_trainer.plan check RUN_JSON      all that can be said of the data of a job
    python -m qlora_trainer.plan survey RUN_JSON     what can be said of them without its model; needs no torch

Prints one line of JSON (qlora_contract.plan). The exit status is 0 also when that holds an error of the user's.
"""

import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

from qlora_contract import memory
from qlora_contract.cpus import format_cpu_list
from qlora_contract.env import CPUS_ENV
from qlora_contract.exit_codes import ExitCode
from qlora_contract.export import forms_of
from qlora_contract.paths import InvalidUriError, resolve, volume_map
from qlora_contract.plan import (
    Machine,
    MemoryFigures,
    PlanError,
    PlanReport,
    PlanResponse,
    PodPlan,
    RankPlan,
    TextSpan,
)
from qlora_contract.run_config import ISA_TIERS, RunConfig
from qlora_trainer.errors import TrainerError
from qlora_trainer.host.cgroups import available_cpus
from qlora_trainer.host.isa import probe
from qlora_trainer.host.numa import read_machine
from qlora_trainer.launch.pod_layout import pod_layout
from qlora_trainer.run_file import RunFileError, load_run

USAGE = (
    "usage: python -m qlora_trainer.plan "
    "[RUN_JSON | layout RUN_JSON CPUS [CPUS ...] | check RUN_JSON | survey RUN_JSON]"
)


def main(arguments: Sequence[str]) -> int:
    """Print the answer; the exit status: 2 for wrong arguments, else 0."""
    match arguments:
        case []:
            response = PlanResponse(machine=machine())
        case [path]:
            response = answer(Path(path))
        case ["layout", path, *cpu_lists] if cpu_lists:
            response = layouts(Path(path), cpu_lists)
        case ["check" | "survey" as how, path]:
            response = checked(Path(path), with_model=how == "check")
        case _:
            print(USAGE, file=sys.stderr)
            return 2
    print(response.model_dump_json(by_alias=True, exclude_none=True))
    return 0


def machine() -> Machine:
    """What this process may use."""
    isa = probe()
    lacking = {tier: isa.lacks(tier) for tier in ISA_TIERS}
    cpus, quota = available_cpus()
    return Machine(
        tiers=[tier for tier in ISA_TIERS if not lacking[tier]],
        lacking={tier: missing for tier, missing in lacking.items() if missing},
        cpus=[thread for core in read_machine().cores_of(cpus) for thread in core.cpus],
        quota=quota,
    )


def answer(path: Path) -> PlanResponse:
    """The plan of the job that a run.json describes, or why it would fail."""
    try:
        return PlanResponse(plan=plan(load_run(path)))
    except (RunFileError, TrainerError, InvalidUriError) as error:
        return _failure(error)


def checked(path: Path, *, with_model: bool) -> PlanResponse:
    """What there is to say of the data of a run.json's job, or why it would fail."""
    from qlora_trainer.training.data_check import check
    from qlora_trainer.transfer.revisions import with_pinned_revisions

    try:
        volumes = volume_map()
        run = with_pinned_revisions(load_run(path), volumes)
        return PlanResponse(check=check(run, volumes, with_model=with_model))
    except (RunFileError, TrainerError, InvalidUriError) as error:
        return _failure(error)


def layouts(path: Path, cpu_lists: Sequence[str]) -> PlanResponse:
    """Where the ranks run of a pod for each list of CPUs, as its launcher would decide; or why they do not fit."""
    try:
        run = load_run(path)
        pods = [pod_layout(run, {CPUS_ENV: cpus}) for cpus in cpu_lists]
    except (RunFileError, TrainerError) as error:
        return _failure(error)
    return PlanResponse(
        pods=[
            PodPlan(
                ranks=[
                    RankPlan(
                        cpus=format_cpu_list(rank.cpus),
                        threads=rank.threads,
                        helpers=format_cpu_list(rank.service_cpus),
                        nodes=format_cpu_list(rank.nodes),
                        memory_node=rank.memory_node,
                    )
                    for rank in pod.ranks
                ],
                bound=pod.pinned,
                unused=format_cpu_list(pod.unused),
                notes=list(pod.notes),
            )
            for pod in pods
        ]
    )


def _failure(error: RunFileError | TrainerError | InvalidUriError) -> PlanResponse:
    """The code and sentence that a rank would end with."""
    match error:
        case RunFileError():
            code = error.code
        case TrainerError():
            code = error.exit_code
        case _:
            code = ExitCode.INVALID_CONFIGURATION
    return PlanResponse(error=PlanError(code=code, cause=str(error)))


def plan(run: RunConfig) -> PlanReport:
    """Measure the model and the data as every rank will.

    Raises:
        TrainerError: what would end training before its first step.
        InvalidUriError: a source is on a claim that has no directory here.
    """
    from qlora_trainer.data.packing import StepSchedule
    from qlora_trainer.data.tokenization import render
    from qlora_trainer.modeling.families import read_config
    from qlora_trainer.modeling.shape import model_shape
    from qlora_trainer.modeling.stored.formats import description
    from qlora_trainer.training import exports
    from qlora_trainer.training.data_check import split_stats, steps_of
    from qlora_trainer.training.inputs import default_compute_dtype, lengths_in_rows, load_inputs
    from qlora_trainer.transfer.revisions import with_pinned_revisions

    volumes = volume_map()
    run = with_pinned_revisions(run, volumes)
    model_folder = resolve(run.model_uri, volumes)
    shape = model_shape(model_folder, run.adapter)
    exports.check(forms_of(run.output), model_folder)
    tokenizer, data = load_inputs(run, shape, volumes, datetime.datetime.now().astimezone())
    dtype = default_compute_dtype(run, [run.isa])
    estimate = memory.choose(shape, run, dtype, len(data.train))
    schedule = StepSchedule(lengths_in_rows(data.train, run), run.training, data.train.group_offsets)
    first = schedule.step(0).bins[0][0]
    evaluation = None
    if data.evaluation is not None and data.evaluation_facts is not None:
        evaluation = split_stats(data.evaluation, data.evaluation_facts)
    return PlanReport(
        compute_dtype=dtype,
        stored_in=description(model_folder, read_config(model_folder)),
        shape=shape,
        memory=MemoryFigures(
            parts=estimate.parts(),
            total=estimate.total,
            micro_batch_tokens=estimate.micro_batch_tokens,
            checkpointing=estimate.checkpointing,
        ),
        training=split_stats(data.train, data.train_facts),
        evaluation=evaluation,
        steps=steps_of(data.train, run, schedule),
        sample=[TextSpan(text=t, supervised=s) for t, s in render(*data.train.sample(first), tokenizer)],
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
