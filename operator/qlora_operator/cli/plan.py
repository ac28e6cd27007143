"""`qlora plan`: what a job would do on this machine, before it does it."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_contract import memory
from qlora_contract.base import ContractModel
from qlora_contract.cost import Price
from qlora_contract.cpus import format_cpu_list
from qlora_contract.exit_codes import ExitCode
from qlora_contract.plan import (
    Machine,
    PlanReport,
    PlanResponse,
    PodPlan,
    RankPlan,
    SplitStats,
    TextSpan,
    TimeEstimate,
    few_steps,
    ranks_without_work,
)
from qlora_contract.run_config import BF16_NATIVE, IsaTier, RunConfig
from qlora_contract.scratch import scratch_folder
from qlora_contract.speed import time_of
from qlora_contract.units import format_bytes, format_duration
from qlora_operator.api.run_config import to_run_config
from qlora_operator.api.v1alpha1 import QLoRAJob, Topology
from qlora_operator.cli.cpu_locks import in_use_now
from qlora_operator.cli.display import printable
from qlora_operator.cli.outcome import error_message
from qlora_operator.cli.trainer_query import query_trainer
from qlora_operator.errors import CommandError
from qlora_operator.placement.local import (
    PlacementError,
    choose_tier,
    idle_cpus,
    in_use,
    launcher_cpus,
    less_promised,
    memory_shortage,
    on_this_machine,
    promises,
    with_topology,
)

RANKS_SHOWN = 16
SAMPLE_CHARACTERS = 2_000
"""How much of a sample is shown; `-o json` has all of it."""
MEBIBYTE = 2**20


class RankPlace(RankPlan):
    """A rank, and where it would run here."""

    rank: int
    pod: int


class JobPlan(ContractModel):
    """What `qlora plan -o json` prints."""

    name: str
    isa: IsaTier
    compute_dtype: str
    world_size: int | None
    """Ranks; None where their number depends on the machine, and they do not fit this one."""
    memory_per_rank: int
    """Bytes."""
    ranks: list[RankPlace]
    """Empty when they do not fit this machine."""
    notes: list[str]
    """What may surprise about where they run, and how long, and why it is so."""
    problems: list[str]
    """Why the job cannot run here, or not as it is."""
    exit_code: int
    """What `qlora run` would exit with because of the first of them; 0 without any."""
    missing_volumes: list[str]
    """Claims without a directory here; `details` is left out if there are any."""
    details: PlanReport | None
    time: TimeEstimate | None
    """How long it would take on a machine like this; None without details."""
    price_per_core_hour: float | None
    currency: str
    money: float | None
    """What the time would cost; None without a price."""


def job_plan(
    job: QLoRAJob, volumes: Mapping[str, Path], missing_volumes: list[str], price: Price | None = None
) -> JobPlan:
    """Plan the job for this machine, and, if its model and data can be read here, measure them.

    Raises:
        CommandError: the model or the data cannot be trained on; with the message and code that training gives.
    """
    machine = query_trainer().machine
    assert machine is not None, "without arguments, the planner answers with the machine"
    busy, promised = in_use_now(machine.cpus)
    topology = on_this_machine(job.spec.topology, less_promised(machine, promised))
    job = with_topology(job, topology)
    isa, problems = choose_isa(job, machine)
    auto = topology.ranks_per_pod == "auto"
    run = to_run_config(job, uid="plan", attempt=0, isa=isa)
    pods: list[PodPlan] = []
    notes = in_use(busy) + promises(promised)
    try:
        cpus = launcher_cpus(topology, machine)
        pods = query_layout(run, cpus)
        notes += idle_cpus(topology, machine, cpus)
    except CommandError as error:
        problems.append(error)
    if shortage := memory_shortage(topology, machine, promised):
        problems.append(PlacementError(shortage, ExitCode.INVALID_CONFIGURATION))
    counts = [len(pod.ranks) for pod in pods] or [1]
    run = run.model_copy(update={"layout": run.layout.with_rank_counts(counts)})
    details = None if missing_volumes else query_details(run, volumes)
    if details is not None:
        sharing = max(counts) if auto else 1
        problems += [
            CommandError(problem, ExitCode.INVALID_CONFIGURATION)
            for problem in memory.problems(details.memory, run.layout.memory_per_rank, run.training, sharing)
        ]
        steps = details.steps
        notes += few_steps(steps, details.training.tokens, run.training)
        bins = steps.bins(run.training)
        # Without places they are not counted yet.
        if pods and (
            waiting := ranks_without_work(bins, steps.per_epoch, run.layout.world_size, run.training)
        ):
            notes.append(waiting)
    time = None if details is None else time_of(run, details)
    asked = job.spec.training.compute_dtype
    return JobPlan(
        name=job.metadata.name,
        isa=isa,
        compute_dtype=("bf16" if isa in BF16_NATIVE else "fp32") if asked == "auto" else asked,
        world_size=run.layout.world_size if pods or not auto else None,
        memory_per_rank=run.layout.memory_per_rank,
        ranks=rank_places(pods),
        notes=notes
        + fewer_pods(topology, time)
        + list(dict.fromkeys(note for pod in pods for note in pod_notes(pod))),
        problems=[str(problem) for problem in problems],
        exit_code=problems[0].code if problems else 0,
        missing_volumes=missing_volumes,
        details=details,
        time=time,
        price_per_core_hour=None if price is None else price.amount,
        currency="" if price is None else price.currency,
        money=None if time is None or price is None else time.core_hours * price.amount,
    )


def fewer_pods(topology: Topology, time: TimeEstimate | None) -> list[str]:
    """What an attempt is like that makes do with topology.minPods, in a sentence; nothing if none does."""
    least, pods = topology.min_pods, topology.pods
    if least is None or least == pods:
        return []
    ranks = "" if topology.ranks_per_pod == "auto" else f", {least * topology.ranks_per_pod} rank(s)"
    slower = ""
    if time is not None:
        longest = time.seconds + (pods / least - 1) * (time.training_seconds + time.evaluation_seconds)
        slower = f": the job then takes up to about {format_duration(longest)}"
    return [f"in a cluster {least} of {pods} pods will do (topology.minPods){ranks}{slower}"]


def pod_notes(pod: PodPlan) -> list[str]:
    """What may surprise about a pod's ranks, its idle CPUs among it."""
    idle = f"CPUs {pod.unused} stay idle: no rank computes on their cores" if pod.unused else ""
    return [*([idle] if idle else []), *pod.notes]


def choose_isa(job: QLoRAJob, machine: Machine) -> tuple[IsaTier, list[CommandError]]:
    """(tier to plan for, problems): the first that the machine meets; if it meets none, the preferred one, and why."""
    try:
        return choose_tier(job.spec.isa.allowed, machine), []
    except PlacementError as error:
        return job.spec.isa.allowed[0], [error]


def rank_places(pods: Iterable[PodPlan]) -> list[RankPlace]:
    """The ranks of all pods, numbered through."""
    ranks = ((pod, rank) for pod, plan in enumerate(pods) for rank in plan.ranks)
    return [RankPlace(rank=number, pod=pod, **rank.model_dump()) for number, (pod, rank) in enumerate(ranks)]


def query_layout(run: RunConfig, cpus: Iterable[Iterable[int]]) -> list[PodPlan]:
    """Where the ranks of each pod run, as their launchers decide it.

    Args:
        run: the job.
        cpus: of each launcher.

    Raises:
        CommandError: the ranks do not fit.
    """
    answer = query(run, ["layout"], [format_cpu_list(part) for part in cpus], {})
    assert answer.pods is not None, "the planner answers with a layout or an error"
    return answer.pods


def query_details(run: RunConfig, volumes: Mapping[str, Path]) -> PlanReport:
    """What the trainer measures of the job's model and data.

    Raises:
        CommandError: the model or the data cannot be trained on; with the message and code that training gives.
    """
    answer = query(run, [], [], volumes)
    assert answer.plan is not None, "the planner answers with a plan or an error"
    return answer.plan


def query(
    run: RunConfig,
    before: Sequence[str],
    after: Sequence[str],
    volumes: Mapping[str, Path],
    *,
    offline: bool = True,
) -> PlanResponse:
    """The planner's answer about a RunConfig, whose file stands between the other arguments.

    Raises:
        CommandError: the planner answers with an error.
    """
    with scratch_folder("plan") as folder:
        path = folder / "run.json"
        path.write_text(run.to_json())
        answer = query_trainer(*before, str(path), *after, volumes=volumes, offline=offline)
    if answer.error is not None:
        raise CommandError(error_message(answer.error.code, answer.error.cause), answer.error.code)
    return answer


def show(plan: JobPlan, console: Console) -> None:
    """Print the plan for people."""
    ranks = "one rank per NUMA cluster" if plan.world_size is None else f"{plan.world_size} rank(s)"
    _print(console, f"{plan.name}: {ranks}, {plan.isa}, computing in {plan.compute_dtype}")
    if plan.details is not None and plan.details.stored_in:
        _print(console, f"weights   {plan.details.stored_in}")
    if plan.ranks:
        console.print(ranks_table(plan.ranks))
        if len(plan.ranks) > RANKS_SHOWN:
            _print(console, f"... and {len(plan.ranks) - RANKS_SHOWN} more")
    for note in plan.notes:
        _print(console, note)
    if plan.details is not None:
        show_details(plan, plan.details, console)
    for problem in plan.problems:
        _print(console, f"problem: {problem}", "bold red")
    for warning in plan.details.warnings if plan.details else ():
        _print(console, f"warning: {warning}", "yellow")
    if plan.missing_volumes:
        wanted = " ".join(f"--volume {claim}=PATH" for claim in plan.missing_volumes)
        _print(console, f"add {wanted} to see memory, steps and a sample")


def _print(console: Console, text: str, style: str | None = None) -> None:
    console.print(Text(printable(text)), style=style, soft_wrap=True)


def ranks_table(ranks: list[RankPlace]) -> Table:
    """Where the first ranks run."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("rank", "pod", "CPUs", "threads", "service CPUs", "NUMA nodes", "memory node"):
        table.add_column(name)
    for rank in ranks[:RANKS_SHOWN]:
        memory = rank.nodes if rank.memory_node is None else str(rank.memory_node)
        cells = (rank.rank, rank.pod, rank.cpus, rank.threads, rank.helpers or "-", rank.nodes, memory)
        table.add_row(*map(str, cells))
    return table


def show_details(plan: JobPlan, details: PlanReport, console: Console) -> None:
    """Print memory, data, steps, time and a sample."""
    figures, steps, memory_per_rank = details.memory, details.steps, plan.memory_per_rank
    parts = ", ".join(f"{name} {part / MEBIBYTE:,.0f}" for name, part in figures.parts.items())
    evaluation = split_text(details.evaluation, "evaluated") if details.evaluation else "none"
    console.print()
    _print(
        console,
        f"memory    {format_bytes(figures.total)} of {format_bytes(memory_per_rank)} per rank (MiB: {parts})",
        "bold red" if figures.total > memory_per_rank else None,
    )
    for line in (
        (
            f"          micro-batches of {figures.micro_batch_tokens:,} tokens, "
            f"gradient checkpointing {figures.checkpointing}"
        ),
        f"training  {split_text(details.training)}",
        *(f"          {line}" for line in source_lines(details.training)),
        f"held out  {evaluation}",
        *(f"          {line}" for line in (source_lines(details.evaluation) if details.evaluation else ())),
        (
            f"steps     {steps.total:,} ({steps.epochs:.2f} epochs of {steps.per_epoch:,}), "
            f"{steps.tokens_per_step:,.0f} tokens per step, bins {100 * steps.fill:.0f} % full"
        ),
        *time_lines(plan.time, plan.money, plan.currency),
    ):
        _print(console, line)
    console.print()
    how = "green and underlined" if console.color_system else "between [[ and ]]"
    _print(console, f"first sample of the first step; what is trained on is {how}:")
    console.print(sample_text(details.sample, marked=not console.color_system), soft_wrap=True)
    console.print()


def time_lines(time: TimeEstimate | None, money: float | None = None, currency: str = "") -> list[str]:
    """How long a job would take, what that would cost, and what the figure rests on."""
    if time is None:
        return []
    parts = {
        "steps": time.training_seconds,
        "evaluation": time.evaluation_seconds,
        "start": time.start_seconds,
    }
    also = {"answers": time.answers_seconds, "exports": time.exports_seconds}
    parts |= {name: seconds for name, seconds in also.items() if seconds}
    shares = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in parts.items())
    cost = f"{time.core_hours:,.3g} core-hours"
    if money is not None:
        cost += f", {money:,.3g} {currency}".rstrip()
    return [
        f"time      about {format_duration(time.seconds)} ({shares}): {cost}",
        f"          at {time.tokens_per_second:,.0f} tokens/s; rests on {time.basis}",
    ]


def source_lines(split: SplitStats) -> list[str]:
    """What each of several sources gives, with what is lost of it."""
    lines = []
    for each in split.sources:
        tokens = f", {each.tokens:,} tokens" if each.tokens else ""
        text = f"{each.source}, weight {each.weight:g}: {each.records:,} {each.format} records{tokens}"
        for count, what in (
            (sum(bad.count for bad in each.bad), "cannot be trained on"),
            (each.dropped, "left out"),
            (each.duplicates, "say the same as an earlier one"),
            (each.overlap, "trained on as well"),
        ):
            text += f"; {count:,} {what}" if count else ""
        lines.append(text)
    return lines


def split_text(split: SplitStats, use: str = "trained") -> str:
    """A split in one line. `use`: what is done with its supervised tokens."""
    text = (
        f"{split.samples:,} samples from {split.records:,} {f'{split.format} ' if split.format else ''}records, "
        f"{split.tokens:,} tokens, {split.supervised_tokens:,} of them {use} on"
    )
    if split.left_out:
        text += f"; {split.left_out:,} more are left out, beyond evaluation.maxTokens"
    if split.truncated:
        text += f"; {split.truncated:,} truncated"
    if split.overlong:
        text += f"; {split.overlong:,} left out, because they are longer than maxSequenceLength"
    if cut := split.dropped - split.overlong:
        text += f"; {cut:,} dropped, because truncation left nothing to train on"
    if split.duplicates:
        text += f"; {split.duplicates:,} records say the same as an earlier one"
    if split.overlap:
        text += f"; {split.overlap:,} records are trained on as well, so the evaluation flatters"
    for bad in split.bad:
        text += f"; {bad.count:,} left out: {bad.reason} ({', '.join(bad.places)})"
    return text


def sample_text(spans: Iterable[TextSpan], *, marked: bool) -> Text:
    """A sample with its loss mask: colored, or `marked` with brackets."""
    text, left = Text(), SAMPLE_CHARACTERS
    for span in spans:
        shown = printable(span.text[:left])
        left -= len(shown)
        if span.supervised and marked:
            text.append(f"[[{shown}]]")
        else:
            text.append(shown, style="green underline" if span.supervised else "dim")
        if left <= 0:
            text.append(" ...")
            break
    return text
