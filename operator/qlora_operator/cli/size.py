"""`qlora plan` of a model that is not here yet, for a machine that one does not have: from config.json alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.text import Text

from qlora_contract import memory
from qlora_contract.base import ContractModel
from qlora_contract.exit_codes import ExitCode
from qlora_contract.memory import MemoryEstimate
from qlora_contract.plan import (
    Machine,
    MemoryFigures,
    ModelSize,
    PlanReport,
    SplitStats,
    Steps,
    TimeEstimate,
)
from qlora_contract.run_config import ISA_TIERS, IsaTier, RunConfig
from qlora_contract.speed import time_of
from qlora_contract.units import format_bytes, format_duration
from qlora_operator.api.quantity import parse_memory
from qlora_operator.api.run_config import to_run_config
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.cli.display import printable
from qlora_operator.cli.plan import query
from qlora_operator.cli.trainer_query import query_trainer, require_trainer
from qlora_operator.errors import CommandError
from qlora_operator.placement.local import (
    PlacementError,
    choose_tier,
    launcher_cpus,
    memory_shortage,
    on_this_machine,
    with_topology,
)

MODEL_CLAIM = "model"
"""The claim that a model's folder is on, when there is no job."""
SAMPLE_TOKENS = 512
"""Tokens of a sample, where no data are known."""
SYSTEM_SHARE = 20
"""One part of so many of a machine's memory is left to what else runs on it, where a job does not say its own."""
DEFAULT_TOKENS = 1_000_000


@dataclass(frozen=True)
class Imagined:
    """A machine, as far as the command line says what it is; the rest is this machine's."""

    cpus: int | None = None
    memory: int | None = None
    """Bytes."""
    isa: IsaTier | None = None
    numa_nodes: int | None = None

    @property
    def is_told(self) -> bool:
        """Whether anything is said."""
        return self != Imagined()


class SizePlan(ContractModel):
    """What `qlora plan -o json` prints of a model alone."""

    name: str
    isa: IsaTier
    cpus: int
    memory: int | None
    """Bytes of the machine."""
    ranks: int
    cpus_per_rank: int
    memory_per_rank: int
    """Bytes that a rank may use."""
    size: ModelSize
    needs: MemoryFigures
    tokens: int
    """Whose training takes that time."""
    time: TimeEstimate
    problems: list[str]
    exit_code: int


def machine_of(imagined: Imagined) -> Machine:
    """This machine, with what the command line says instead."""
    here = query_trainer().machine
    assert here is not None, "without arguments, the planner answers with the machine"
    changes: dict[str, object] = {}
    if imagined.cpus is not None:
        changes |= {"cpus": list(range(imagined.cpus)), "quota": None, "clusters": 1}
    if imagined.numa_nodes is not None:
        changes["clusters"] = imagined.numa_nodes
    if imagined.memory is not None:
        changes |= {"memory": imagined.memory, "free_memory": imagined.memory}
    if imagined.isa is not None:
        # Whatever a tier has, the tiers below it have as well.
        changes |= {"tiers": list(ISA_TIERS[ISA_TIERS.index(imagined.isa) :])}
        changes["lacking"] = {
            tier: [f"what {tier} has"] for tier in ISA_TIERS[: ISA_TIERS.index(imagined.isa)]
        }
    return here.model_copy(update=changes)


def is_model(file: str) -> bool:
    """Whether what is to be planned is a model and not a job."""
    return file.startswith("hf://") or (Path(file) / "config.json").is_file()


def job_of_model(model: str) -> tuple[QLoRAJob, dict[str, Path]]:
    """A job with nothing but defaults on a model, and the directory of its claim."""
    volumes: dict[str, Path] = {}
    source = model
    if not model.startswith("hf://"):
        folder = Path(model).resolve()
        volumes[MODEL_CLAIM], source = folder.parent, f"pvc://{MODEL_CLAIM}/{folder.name}"
    job = {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRAJob",
        "metadata": {"name": "size"},
        "spec": {
            "workspace": f"pvc://{MODEL_CLAIM}/work",
            "model": {"source": source},
            "dataset": {"source": f"pvc://{MODEL_CLAIM}/data.jsonl"},
            "training": {"epochs": 1},
            "topology": {"memoryPerRank": "1Gi"},
        },
    }
    return QLoRAJob.model_validate(job), volumes


def size_of_model(model: str, imagined: Imagined, tokens: int) -> SizePlan:
    """Of a model with a job's defaults: as many ranks as there are NUMA clusters and memory for.

    Raises:
        CommandError: the model cannot be trained on.
    """
    machine = machine_of(imagined)
    job, volumes = job_of_model(model)
    isa = choose_tier(ISA_TIERS, machine)
    size = query_size(to_run_config(job, uid="size", attempt=0, isa=isa), volumes)
    room = machine.memory or 2**62
    room -= room // SYSTEM_SHARE
    problems: list[CommandError] = []
    for ranks in range(min(machine.clusters, machine.usable_cpus), 0, -1):
        each = {
            "ranks_per_pod": ranks,
            "cpus_per_rank": machine.usable_cpus // ranks,
            "memory_per_rank": str(room // ranks),
        }
        topology = job.spec.topology.model_copy(update=each)
        run = to_run_config(with_topology(job, topology), uid="size", attempt=0, isa=isa)
        needs = memory.choose(size.shape, run, size.compute_dtype)
        if needs.total <= run.layout.memory_per_rank:
            break
    else:
        need, has = format_bytes(needs.total), format_bytes(room)
        problem = f"one rank needs {need}, and this machine has {has} for it: take one with more memory"
        problems.append(PlacementError(problem, ExitCode.INVALID_CONFIGURATION))
    return _plan(printable(model), run, machine, size, needs, tokens, problems)


def size_of_job(job: QLoRAJob, volumes: Mapping[str, Path], imagined: Imagined, tokens: int) -> SizePlan:
    """Of a job's model with the job's own settings; its data are not looked at.

    Raises:
        CommandError: the model cannot be trained on.
    """
    machine = machine_of(imagined)
    problems: list[CommandError] = []
    isa = job.spec.isa.allowed[0]
    topology = on_this_machine(job.spec.topology, machine)
    try:
        isa = choose_tier(job.spec.isa.allowed, machine)
        launcher_cpus(topology, machine)
    except PlacementError as error:
        problems.append(error)
    if shortage := memory_shortage(topology, machine):
        problems.append(PlacementError(shortage, ExitCode.INVALID_CONFIGURATION))
    run = to_run_config(with_topology(job, topology), uid="size", attempt=0, isa=isa)
    sharing = machine.clusters if topology.ranks_per_pod == "auto" else 1
    run = run.model_copy(update={"layout": run.layout.with_rank_counts([sharing] * topology.pods)})
    size = query_size(run, volumes)
    needs = memory.choose(size.shape, run, size.compute_dtype)
    problems += [
        CommandError(problem, ExitCode.INVALID_CONFIGURATION)
        for problem in memory.problems(needs, run.layout.memory_per_rank, run.training, sharing)
    ]
    return _plan(job.metadata.name, run, machine, size, needs, tokens, problems)


def query_size(run: RunConfig, volumes: Mapping[str, Path]) -> ModelSize:
    """What the trainer reads of a model's config.json. Raises CommandError."""
    require_trainer()
    answer = query(run, ["size"], [], volumes, offline=False)
    assert answer.size is not None, "the planner answers with a size or an error"
    return answer.size


def _plan(
    name: str,
    run: RunConfig,
    machine: Machine,
    size: ModelSize,
    needs: MemoryEstimate,
    tokens: int,
    problems: list[CommandError],
) -> SizePlan:
    figures = MemoryFigures.of(needs)
    return SizePlan(
        name=name,
        isa=run.isa,
        cpus=machine.usable_cpus,
        memory=machine.memory,
        ranks=run.layout.world_size,
        cpus_per_rank=run.layout.cpus_per_rank,
        memory_per_rank=run.layout.memory_per_rank,
        size=size,
        needs=figures,
        tokens=tokens,
        time=time_of_tokens(run, size, figures, tokens),
        problems=[str(problem) for problem in problems],
        exit_code=problems[0].code if problems else 0,
    )


def time_of_tokens(run: RunConfig, size: ModelSize, needs: MemoryFigures, tokens: int) -> TimeEstimate:
    """How long so many tokens take in samples of SAMPLE_TOKENS, half of them learned, without evaluations."""
    samples = max(1, tokens // SAMPLE_TOKENS)
    per_step = min(tokens, run.training.global_batch_tokens)
    steps = max(1, round(tokens / per_step))
    split = SplitStats(
        records=samples,
        samples=samples,
        tokens=tokens,
        supervised_tokens=tokens // 2,
        truncated=0,
        dropped=0,
    )
    report = PlanReport(
        compute_dtype=size.compute_dtype,
        shape=size.shape,
        memory=needs,
        training=split,
        steps=Steps(per_epoch=steps, total=steps, epochs=1.0, tokens_per_step=tokens / steps, fill=1.0),
        sample=[],
    )
    return time_of(run, report)


def show(plan: SizePlan, console: Console) -> None:
    """Print the plan for people, each figure with what it comes from."""
    size, needs, time = plan.size, plan.needs, plan.time
    shape = size.shape
    weights = shape.linear_weights + shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    download = f", {format_bytes(size.download)} in files" if size.download else ""
    of = f", {format_bytes(plan.memory)}" if plan.memory else ""
    parts = ", ".join(f"{name} {part / 2**20:,.0f}" for name, part in needs.parts.items())
    step = 64 * 2**20
    suggested = -(-needs.total // step) * 64
    needed = f"{format_bytes(needs.total)} per rank, {format_bytes(needs.total * plan.ranks)} in all"
    speed = f"{time.tokens_per_second:,.0f} tokens/s"
    lines = [
        f"{plan.name}: {weights / 1e9:.2f} billion weights{download} (from {size.basis})",
        f"machine   {plan.cpus} CPUs{of}, {plan.isa}, computing in {size.compute_dtype}",
        f"ranks     {plan.ranks} of {plan.cpus_per_rank} CPU(s)",
        f"memory    {needed}; reckoned (MiB: {parts})",
        f"          micro-batches of {needs.micro_batch_tokens:,} tokens, gradient checkpointing {needs.checkpointing}",
        f"time      about {format_duration(time.seconds)} for {plan.tokens:,} tokens at {speed}, without evaluation",
        f"          in samples of {SAMPLE_TOKENS} tokens; rests on {time.basis}",
        f"topology  ranksPerPod: {plan.ranks}, cpusPerRank: {plan.cpus_per_rank}, memoryPerRank: {suggested}Mi",
    ]
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=True)
    for problem in plan.problems:
        console.print(Text(printable(f"problem: {problem}")), style="bold red", soft_wrap=True)


def imagined_of(cpus: int | None, memory_text: str | None, isa: str | None, nodes: int | None) -> Imagined:
    """What --cpus, --memory, --isa and --numa-nodes say. Raises CommandError for what makes no sense."""
    for name, value in (("--cpus", cpus), ("--numa-nodes", nodes)):
        if value is not None and not 1 <= value <= 65_536:
            raise CommandError(f"{name} {value}: must be from 1 to 65536", 2)
    if nodes is not None and cpus is not None and nodes > cpus:
        raise CommandError(f"--numa-nodes {nodes}: there are only {cpus} CPUs", 2)
    try:
        memory_bytes = None if memory_text is None else parse_memory(memory_text)
    except ValueError:
        raise CommandError(f"--memory {memory_text}: must be a size such as 256Gi or 256G", 2) from None
    if isa is not None and isa not in get_args(IsaTier):
        raise CommandError(f"--isa {isa}: must be one of {', '.join(ISA_TIERS)}", 2)
    return Imagined(cpus, memory_bytes, next((tier for tier in ISA_TIERS if tier == isa), None), nodes)
