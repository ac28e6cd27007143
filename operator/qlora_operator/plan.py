"""`qlora plan`: what a job would do on this machine, before it does it."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_contract.base import ContractModel
from qlora_contract.cpus import format_cpu_list
from qlora_contract.plan import (
    Machine,
    MemoryFigures,
    PlanAnswer,
    PlanReport,
    PodPlan,
    RankPlan,
    Run,
    SplitFacts,
)
from qlora_contract.run import BF16_NATIVE, IsaTier, RunConfig, Training
from qlora_operator import processes
from qlora_operator.api.types import QLoRAJob
from qlora_operator.desired.run_config import run_config
from qlora_operator.display import printable, size
from qlora_operator.errors import CommandError
from qlora_operator.placement.local import PlacementError, choose_tier, launcher_cpus

RANKS_SHOWN = 16
SAMPLE_CHARACTERS = 2_000
"""Of a sample, on screen; `-o json` has all of it."""
MEBIBYTE = 2**20


class RankPlace(RankPlan):
    """A rank, and where it would run here."""

    rank: int
    pod: int


class JobPlan(ContractModel):
    """All that `qlora plan` tells."""

    name: str
    isa: IsaTier
    compute_dtype: str
    world_size: int | None
    """Ranks; None where it depends on the machine, and they do not fit this one."""
    memory_per_rank: int
    """Bytes."""
    ranks: list[RankPlace]
    """Empty when they do not fit this machine."""
    notes: list[str]
    """What is not as one might expect of where they run."""
    problems: list[str]
    """Why the job cannot run here, or not as it is."""
    missing_volumes: list[str]
    """Claims without a folder here: what depends on them is left out."""
    details: PlanReport | None


def job_plan(job: QLoRAJob, volumes: Mapping[str, Path], missing_volumes: list[str]) -> JobPlan:
    """Ask the machine, and, if model and data can be read here, the trainer.

    Raises:
        CommandError: the model or the data cannot be trained on; with the sentence and code that training gives.
    """
    machine = processes.ask_trainer().machine
    assert machine is not None, "the planner without arguments tells of the machine"
    isa, problems = tier(job, machine)
    auto = job.spec.topology.ranks_per_pod == "auto"
    run = run_config(job, uid="plan", attempt=0, isa=isa)
    pods: list[PodPlan] = []
    try:
        pods = ask_layout(run, launcher_cpus(job.spec.topology, machine))
    except CommandError as error:
        problems.append(str(error))
    counts = [len(pod.ranks) for pod in pods] or [1]
    run = run.model_copy(update={"layout": run.layout.settled(counts)})
    details = None if missing_volumes else ask_details(run, volumes)
    if details is not None:
        sharing = max(counts) if auto else 1
        problems += memory_problems(details.memory, run.layout.memory_per_rank, job.spec.training, sharing)
    asked = job.spec.training.compute_dtype
    return JobPlan(
        name=job.metadata.name,
        isa=isa,
        compute_dtype=("bf16" if isa in BF16_NATIVE else "fp32") if asked == "auto" else asked,
        world_size=run.layout.world_size if pods or not auto else None,
        memory_per_rank=run.layout.memory_per_rank,
        ranks=rank_places(pods),
        notes=list(dict.fromkeys(note for pod in pods for note in pod.notes)),
        problems=problems,
        missing_volumes=missing_volumes,
        details=details,
    )


def tier(job: QLoRAJob, machine: Machine) -> tuple[IsaTier, list[str]]:
    """The tier, and why this machine has none. One that is not met here is planned for all the same."""
    try:
        return choose_tier(job.spec.isa.allowed, machine), []
    except PlacementError as error:
        return job.spec.isa.allowed[0], [str(error)]


def rank_places(pods: Iterable[PodPlan]) -> list[RankPlace]:
    """The ranks of all pods, in their order."""
    everyone = ((pod, rank) for pod, plan in enumerate(pods) for rank in plan.ranks)
    return [
        RankPlace(rank=number, pod=pod, **rank.model_dump()) for number, (pod, rank) in enumerate(everyone)
    ]


def ask_layout(run: RunConfig, cpus: Iterable[Iterable[int]]) -> list[PodPlan]:
    """Where the ranks of each pod run, as its launcher decides it, given the CPUs of each launcher.

    Raises:
        CommandError: they do not fit.
    """
    answer = _ask(run, ["layout"], [format_cpu_list(each) for each in cpus], {})
    assert answer.pods is not None, "the planner answers with a layout or an error"
    return answer.pods


def ask_details(run: RunConfig, volumes: Mapping[str, Path]) -> PlanReport:
    """What the trainer measures of the job's model and data.

    Raises:
        CommandError: the model or the data cannot be trained on; with the sentence and code that training gives.
    """
    processes.require_trainer()
    answer = _ask(run, [], [], volumes)
    assert answer.plan is not None, "the planner answers with a plan or an error"
    return answer.plan


def _ask(
    run: RunConfig, before: Sequence[str], after: Sequence[str], volumes: Mapping[str, Path]
) -> PlanAnswer:
    """The planner's answer about a run.json, between other arguments."""
    with tempfile.TemporaryDirectory(prefix="qlora-plan-") as folder:
        path = Path(folder) / "run.json"
        path.write_text(run.to_json())
        answer = processes.ask_trainer(*before, str(path), *after, volumes=volumes)
    if answer.error is not None:
        raise CommandError(processes.sentence(answer.error.code, answer.error.cause), answer.error.code)
    return answer


def memory_problems(memory: MemoryFigures, there: int, training: Training, sharing: int = 1) -> list[str]:
    """Why memoryPerRank is too small, and what to change; nothing when it is enough.

    Args:
        memory: what a rank needs.
        there: bytes that a rank has.
        training: the job's settings.
        sharing: ranks that share memoryPerRank.
    """
    if memory.total <= there:
        return []
    step = 64 * MEBIBYTE
    remedies = [f"raise it to {-(-memory.total * sharing // step) * 64}Mi"]
    if memory.micro_batch_tokens > training.max_sequence_length:
        remedies.append("lower training.microBatchTokens")
    if memory.checkpointing == "none":
        remedies.append("set training.gradientCheckpointing to auto")
    remedies.append("lower training.maxSequenceLength")
    total = -(-memory.total // MEBIBYTE)
    among = f" for the {sharing} ranks of a pod" if sharing > 1 else ""
    has = f"{there * sharing // MEBIBYTE:,} MiB{among}"
    what = f"a rank needs {total:,} MiB, and spec.topology.memoryPerRank is {has}"
    return [f"{what}: {', or '.join(remedies)}"]


# --- showing it


def show(plan: JobPlan, console: Console) -> None:
    """The plan for people."""
    ranks = "as many ranks as CPUs suggest" if plan.world_size is None else f"{plan.world_size} rank(s)"
    _print(console, f"{plan.name}: {ranks}, {plan.isa}, computing in {plan.compute_dtype}")
    if plan.ranks:
        console.print(ranks_table(plan.ranks))
        if len(plan.ranks) > RANKS_SHOWN:
            _print(console, f"... and {len(plan.ranks) - RANKS_SHOWN} more")
    for note in plan.notes:
        _print(console, note)
    if plan.details is not None:
        show_details(plan.details, plan.memory_per_rank, console)
    for problem in plan.problems:
        _print(console, f"problem: {problem}", "bold red")
    if plan.missing_volumes:
        wanted = " ".join(f"--volume {claim}=PATH" for claim in plan.missing_volumes)
        _print(console, f"add {wanted} to see memory, steps and a sample")


def _print(console: Console, text: str, style: str | None = None) -> None:
    console.print(Text(printable(text)), style=style, soft_wrap=True)


def ranks_table(ranks: list[RankPlace]) -> Table:
    """Where the first ranks would run."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("rank", "pod", "CPUs here", "threads", "helpers on", "NUMA nodes", "memory of node"):
        table.add_column(name)
    for each in ranks[:RANKS_SHOWN]:
        memory = each.nodes if each.memory_node is None else str(each.memory_node)
        table.add_row(
            str(each.rank),
            str(each.pod),
            each.cpus,
            str(each.threads),
            each.helpers or "-",
            each.nodes,
            memory,
        )
    return table


def show_details(details: PlanReport, memory_per_rank: int, console: Console) -> None:
    """Memory, data, steps, a sample."""
    memory, steps = details.memory, details.steps
    over = memory.total > memory_per_rank
    parts = ", ".join(f"{name} {part / MEBIBYTE:,.0f}" for name, part in memory.parts.items())
    console.print()
    _print(
        console,
        f"memory    {size(memory.total)} of {size(memory_per_rank)} a rank (MiB: {parts})",
        "bold red" if over else None,
    )
    _print(
        console,
        f"          micro-batches of {memory.micro_batch_tokens:,} tokens, checkpointing {memory.checkpointing}",
    )
    _print(console, f"training  {split_text(details.training)}")
    evaluation = split_text(details.evaluation) if details.evaluation else "none"
    _print(console, f"held out  {evaluation}")
    _print(
        console,
        f"steps     {steps.total:,} ({steps.epochs:.2f} epochs of {steps.per_epoch:,}), "
        f"{steps.tokens_per_step:,.0f} tokens a step, bins {100 * steps.fill:.0f} % full",
    )
    console.print()
    _print(console, f"the first sample, {legend(console)}:")
    console.print(sample_text(details.sample, marked=not console.color_system), soft_wrap=True)
    console.print()


def split_text(facts: SplitFacts) -> str:
    """A split in one line."""
    text = (
        f"{facts.samples:,} samples of {facts.records:,} records, {facts.tokens:,} tokens, "
        f"{facts.supervised_tokens:,} of them learnt"
    )
    if facts.truncated:
        text += f"; {facts.truncated:,} cut off"
    if facts.dropped:
        text += f", {facts.dropped:,} of them dropped: nothing was left to learn"
    return text


def legend(console: Console) -> str:
    """How to tell what is learnt."""
    return "learnt where green and underlined" if console.color_system else "learnt between [[ and ]]"


def sample_text(runs: Iterable[Run], *, marked: bool) -> Text:
    """A sample with its loss mask: in colour, or marked with brackets."""
    text, left = Text(), SAMPLE_CHARACTERS
    for run in runs:
        shown = printable(run.text[:left])
        left -= len(shown)
        if run.learnt and marked:
            text.append(f"[[{shown}]]")
        else:
            text.append(shown, style="green underline" if run.learnt else "dim")
        if left <= 0:
            text.append(" ...")
            break
    return text
