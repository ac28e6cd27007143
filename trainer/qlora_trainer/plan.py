"""What a job will do, without training: for `qlora plan`.

    python -m qlora_trainer.plan             the machine alone; needs neither torch nor a job
    python -m qlora_trainer.plan RUN_JSON    the model, the data and the steps of a job
    python -m qlora_trainer.plan layout RUN_JSON CPUS [CPUS ...]
                                             where the ranks run of pods on this machine whose launchers may use
                                             these CPU lists each; needs no torch
    python -m qlora_trainer.plan check RUN_JSON      all that can be said of the data of a job
    python -m qlora_trainer.plan survey RUN_JSON     what can be said of them without its model; needs no torch
    python -m qlora_trainer.plan preview RUN_JSON    what can be said of their beginning soon, as ranks will read them
    python -m qlora_trainer.plan size RUN_JSON       the size of its model by config.json alone, in a folder or on the
                                                     Hub, from which nothing else is fetched

Prints one line of JSON (qlora_contract.plan). The exit status is 0 also when that holds an error of the user's.
"""

import datetime
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_contract import memory
from qlora_contract.cpus import format_cpu_list
from qlora_contract.env import CPUS_ENV
from qlora_contract.exit_codes import ExitCode
from qlora_contract.export import forms_of
from qlora_contract.memory import ModelShape
from qlora_contract.paths import InvalidUriError, resolve, volume_map
from qlora_contract.plan import (
    Machine,
    MemoryFigures,
    ModelSize,
    PlanError,
    PlanReport,
    PlanResponse,
    PodPlan,
    RankPlan,
    TextSpan,
)
from qlora_contract.remote import is_remote, parse_remote
from qlora_contract.run_config import ISA_TIERS, RunConfig
from qlora_contract.scratch import scratch_folder
from qlora_trainer.errors import ConfigurationError, ModelError, NothingLeft, TrainerError, TransferFailed
from qlora_trainer.host.cgroups import available_cpus, usable_memory
from qlora_trainer.host.isa import probe
from qlora_trainer.host.numa import read_machine
from qlora_trainer.kernels import library
from qlora_trainer.launch.cpu_layout import AvailableCpus, CpuRequest, compute_layout
from qlora_trainer.launch.pod_layout import pod_layout
from qlora_trainer.run_file import RunFileError, load_run

USAGE = (
    "usage: python -m qlora_trainer.plan "
    "[RUN_JSON | layout RUN_JSON CPUS [CPUS ...] | check RUN_JSON | survey RUN_JSON | "
    "preview RUN_JSON | size RUN_JSON]"
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
        case ["preview", path]:
            response = previewed(Path(path))
        case ["size", path]:
            response = sized(Path(path))
        case _:
            print(USAGE, file=sys.stderr)
            return 2
    print(response.model_dump_json(by_alias=True, exclude_none=True))
    return 0


def machine() -> Machine:
    """What this process may use."""
    isa = probe()
    lacking = {tier: isa.lacks(tier) for tier in ISA_TIERS}
    allowed, quota = available_cpus()
    hardware = read_machine()
    cpus = [thread for core in hardware.cores_of(allowed) for thread in core.cpus]
    memory_bytes, free = usable_memory()
    found = Machine(
        tiers=[tier for tier in ISA_TIERS if not lacking[tier]],
        lacking={tier: missing for tier, missing in lacking.items() if missing},
        cpus=cpus,
        quota=quota,
        memory=memory_bytes,
        free_memory=free,
    )
    busy = found.usable_cpus
    clusters = compute_layout(
        hardware, AvailableCpus(tuple(cpus[:busy]), exclusive=True), CpuRequest("auto", busy)
    )
    return found.model_copy(update={"clusters": len(clusters.ranks)})


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


def previewed(path: Path) -> PlanResponse:
    """What the beginning of the data of a run.json's job tells, or why it will fail; code UNEXPECTED where nothing is
    proved."""
    from qlora_trainer.data.head import Head
    from qlora_trainer.training.data_check import preview

    head = Head()
    try:
        run, volumes = load_run(path), volume_map()
        return PlanResponse(check=preview(run, checked_shape(run, volumes), volumes, head))
    except NothingLeft as error:
        if not head.cut:
            return _failure(error)
        cause = f"of the first {head.looked_at:,} records, and there are more: {error}"
        return PlanResponse(error=PlanError(code=ExitCode.UNEXPECTED, cause=cause))
    except (RunFileError, TrainerError, InvalidUriError) as error:
        return _failure(error)


def sized(path: Path) -> PlanResponse:
    """The size of the model of a run.json's job, or why it cannot be trained on."""
    try:
        run = load_run(path)
        if not is_remote(run.model.source):
            return PlanResponse(size=size_of(run, resolve(run.model.source, volume_map())))
        with scratch_folder("size") as folder:
            download = fetch_config(run.model.source, run.model.revision, folder)
            basis = f"config.json of {run.model.source} and the sizes of its files"
            return PlanResponse(size=size_of(run, folder, basis, download))
    except (RunFileError, TrainerError, InvalidUriError) as error:
        return _failure(error)


def fetch_config(uri: str, revision: str | None, folder: Path) -> int:
    """Fetch config.json from the Hub into a folder. Returns the bytes of the model's weights, which stay there.

    Raises:
        TrainerError: the Hub does not answer, or refuses, or there is no such file.
    """
    from qlora_trainer.transfer.connect import READ_SECONDS, connect
    from qlora_trainer.transfer.hub import Hub
    from qlora_trainer.transfer.retry import TransientError

    remote = parse_remote(uri)
    hub = connect(remote, "model", os.environ, READ_SECONDS)
    if not isinstance(hub, Hub):
        raise ConfigurationError(f"{uri} is not on the Hub: give a folder that has its config.json")
    try:
        commit, files = hub.list_files(revision or "main", list)
        configs = [file for file in files if Path(file.name).name == "config.json"]
        if not configs:
            raise ModelError(f"{uri} has no config.json: it must be a model in Hugging Face's format")
        (folder / "config.json").write_bytes(b"".join(hub.read(commit, configs[0], 0)))
    except TransientError as error:
        raise TransferFailed(f"{uri}: {error}; try again, or give a folder with its config.json") from error
    return sum(file.size for file in files if file.name.endswith(".safetensors"))


def size_of(
    run: RunConfig, folder: Path, basis: str = "config.json", download: int | None = None
) -> ModelSize:
    """The size of the model whose config.json is in a folder. Raises TrainerError."""
    from qlora_trainer.modeling.shape import model_shape
    from qlora_trainer.modeling.weight_files import has_weights, weight_files
    from qlora_trainer.training.inputs import default_compute_dtype

    if has_weights(folder):
        basis, download = "the model's folder", sum(file.stat().st_size for file in weight_files(folder))
    return ModelSize(
        compute_dtype=default_compute_dtype(run, [run.isa]),
        shape=model_shape(folder, run.adapter, weights=has_weights(folder)),
        download=download,
        basis=basis,
    )


def checked_shape(run: RunConfig, volumes: Mapping[str, Path]) -> ModelShape:
    """The shape of a job's model, whose adapter and exports it allows. Raises TrainerError or InvalidUriError."""
    from qlora_trainer.modeling.shape import model_shape
    from qlora_trainer.training import exports
    from qlora_trainer.training.inputs import check_initial_adapter

    folder = resolve(run.model_uri, volumes)
    shape = model_shape(folder, run.adapter)
    check_initial_adapter(run, folder, volumes)
    exports.check(forms_of(run.output), folder, run.adapter)
    return shape


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
    from qlora_trainer.data.tokenization import render
    from qlora_trainer.modeling.families import read_config
    from qlora_trainer.modeling.stored.formats import description
    from qlora_trainer.training.data_check import split_stats, steps_of, warnings
    from qlora_trainer.training.inputs import default_compute_dtype, load_inputs, step_schedule
    from qlora_trainer.transfer.revisions import with_pinned_revisions

    volumes = volume_map()
    run = with_pinned_revisions(run, volumes)
    model_folder = resolve(run.model_uri, volumes)
    shape = checked_shape(run, volumes)
    tokenizer, data = load_inputs(run, shape, volumes, datetime.datetime.now().astimezone())
    dtype = default_compute_dtype(run, [run.isa])
    estimate = memory.choose(
        shape, run, dtype, max(len(data.train), data.epoch_samples), compiled=library.loaded() is not None
    )
    schedule = step_schedule(run, data)
    first = schedule.step(0).bins[0][0]
    evaluation = None
    if data.evaluation is not None and data.evaluation_facts is not None:
        evaluation = split_stats(data.evaluation, data.evaluation_facts)
    training, steps = split_stats(data.train, data.train_facts), steps_of(run, schedule)
    return PlanReport(
        compute_dtype=dtype,
        stored_in=description(model_folder, read_config(model_folder)),
        shape=shape,
        memory=MemoryFigures.of(estimate),
        training=training,
        evaluation=evaluation,
        steps=steps,
        sample=[TextSpan(text=t, supervised=s) for t, s in render(*data.train.sample(first), tokenizer)],
        warnings=warnings(training, evaluation, has_template=bool(tokenizer.chat_template)),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
