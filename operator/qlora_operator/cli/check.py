"""`qlora check`: what is in a job's data, or in a file that may become a job's, before anything is trained."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
from rich.console import Console
from rich.text import Text

from qlora_contract.exit_codes import ExitCode
from qlora_contract.plan import CheckReport, LengthBin, Machine, SplitStats
from qlora_contract.run_config import Dataset, JobRef, Layout, ModelSource, RunConfig, Training
from qlora_contract.scratch import scratch_folder
from qlora_contract.units import first_line
from qlora_operator.api.run_config import to_run_config
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.cli.display import printable
from qlora_operator.cli.early_checks import data_fault, missing
from qlora_operator.cli.outcome import error_message
from qlora_operator.cli.plan import choose_isa, sample_text, source_lines, time_lines
from qlora_operator.cli.trainer_query import query_trainer, require_trainer
from qlora_operator.errors import USAGE, CommandError
from qlora_operator.placement.local import MEMORY_SHARE, on_this_machine, with_topology

COLUMNS_SHOWN = 12
BAR = 40
"""Characters of the longest bar."""

USUAL_BATCH: int = Training.model_fields["global_batch_tokens"].default


@dataclass(frozen=True)
class Question:
    """What is checked."""

    run: RunConfig
    volumes: Mapping[str, Path]
    with_model: bool


def of_paths(
    data: str, model: str | None, dataset: Mapping[str, Any], training: Mapping[str, Any]
) -> Question:
    """The question about data at a path.

    Args:
        data: a file, or a folder of splits.
        model: the folder of a model, or of its tokenizer alone; None: none is known.
        dataset: fields of a job's dataset.
        training: fields of its training, besides one epoch.

    Raises CommandError when there is no such path, or a field is wrong.
    """
    places = {"data": _existing(data, "the data")}
    if model is not None:
        places["model"] = _existing(model, "the model's folder")
    uris = {role: f"pvc://{role}/{path.name}" for role, path in places.items()}
    longest = training.get("max_sequence_length", 0)  # a step holds a sample at least
    try:
        run = RunConfig(
            job=JobRef(name="check", uid="check", attempt=0),
            workspace="pvc://data",
            model=ModelSource(source=uris.get("model", "pvc://model/none")),
            dataset=Dataset.model_validate({"source": uris["data"], **dataset}),
            training=Training.model_validate(
                {"epochs": 1, "global_batch_tokens": max(USUAL_BATCH, longest), **training}
            ),
            **_on_here(None if model is None else _machine()),
        )
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise CommandError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", USAGE) from None
    if fault := data_fault(places["data"]):
        raise CommandError(f"the data: {fault}", ExitCode.INVALID_DATA)
    return Question(run, {role: path.parent for role, path in places.items()}, model is not None)


def of_job(job: QLoRAJob, volumes: Mapping[str, Path], *, with_model: bool) -> Question:
    """The question about the data of a job, on this machine as far as its time is asked for, too."""
    if not with_model:
        return Question(to_run_config(job, uid="check", attempt=0, isa="avx2"), volumes, with_model)
    machine = _machine()
    topology = on_this_machine(job.spec.topology, machine)
    isa, _ = choose_isa(job, machine)
    run = to_run_config(with_topology(job, topology), uid="check", attempt=0, isa=isa)
    sharing = machine.clusters if topology.ranks_per_pod == "auto" else 1
    layout = run.layout.with_rank_counts([sharing] * topology.pods)
    return Question(run.model_copy(update={"layout": layout}), volumes, with_model)


def _machine() -> Machine:
    """This machine, on whose processors the time depends."""
    require_trainer()
    machine = query_trainer().machine
    assert machine is not None, "without arguments, the planner answers with the machine"
    return machine


def _on_here(machine: Machine | None) -> dict[str, Any]:
    """ISA tier and layout of one rank on a machine; without one nothing that depends on them is told."""
    if machine is None or not machine.tiers:
        return {"isa": "avx2", "layout": Layout(memory_per_rank=2**40)}
    memory = machine.free_memory or machine.memory or 2**40
    layout = Layout(cpus_per_rank=machine.usable_cpus, memory_per_rank=int(MEMORY_SHARE * memory))
    return {"isa": machine.tiers[0], "layout": layout}


def _existing(name: str, what: str) -> Path:
    if "://" in name:
        raise CommandError(
            f"{name}: is not on this machine: give a path, or a job file after `qlora fetch`",
            USAGE,
        )
    try:
        path = Path(name).resolve(strict=True)
    except (OSError, RuntimeError) as error:  # a RuntimeError for links in a circle
        if isinstance(error, FileNotFoundError):
            raise CommandError(f"{what}: {missing(Path(os.path.abspath(name)))}", USAGE) from None  # noqa: PTH100
        raise CommandError(f"{name}: {first_line(error)}; give the path of {what}", USAGE) from None
    if not (path.is_file() or path.is_dir()):
        raise CommandError(f"{name}: is neither a file nor a folder; give the path of {what}", USAGE)
    return path


def check(question: Question) -> CheckReport:
    """What the trainer tells of the data.

    Raises:
        CommandError: they are refused as a whole; with the message and code that training gives.
    """
    require_trainer()
    with scratch_folder("check") as folder:
        path = folder / "run.json"
        path.write_text(question.run.to_json())
        how = "check" if question.with_model else "survey"
        answer = query_trainer(how, str(path), volumes=question.volumes)
    if answer.error is not None:
        raise CommandError(error_message(answer.error.code, answer.error.cause), answer.error.code)
    assert answer.check is not None, "the planner answers with a check or an error"
    return answer.check


def exit_code(report: CheckReport) -> int:
    """0, or the code that a job would end with."""
    return ExitCode.INVALID_DATA if report.problems else 0


def as_json(report: CheckReport) -> str:
    """The report for programs."""
    return json.dumps(report.model_dump(mode="json", by_alias=True), ensure_ascii=False, indent=2)


# --- showing it


def show(report: CheckReport, console: Console) -> None:
    """Print the report for people."""
    _print(console, what_it_is(report))
    if report.unread:
        more = len(report.unread) - COLUMNS_SHOWN
        shown = ", ".join(report.unread[:COLUMNS_SHOWN]) + (f" and {more} more" if more > 0 else "")
        _print(console, f"not read  {shown}")
    _show_split(report.training, "training", report.unit, console)
    if report.evaluation is not None:
        _show_split(report.evaluation, "held out", report.unit, console)
    if report.steps is not None:
        steps = report.steps
        _print(
            console,
            f"steps     {steps.total:,} ({steps.epochs:.2f} epochs of {steps.per_epoch:,}), "
            f"{steps.tokens_per_step:,.0f} tokens per step, bins {100 * steps.fill:.0f} % full",
        )
        for line in time_lines(report.time):
            _print(console, line)
    else:
        _print(console, "          give the model with --model to see tokens, truncation, steps and hours")
    console.print()
    how = "green and underlined" if console.color_system else "between [[ and ]]"
    for number, sample in enumerate(report.samples, start=1):
        _print(console, f"sample {number} of {len(report.samples)}; what is trained on is {how}:", "bold")
        console.print(sample_text(sample, marked=not console.color_system), soft_wrap=True)
        console.print()
    for problem in report.problems:
        _print(console, f"problem: {problem}", "bold red")
    for warning in report.warnings:
        _print(console, f"warning: {warning}", "yellow")
    if not report.problems and not report.warnings:
        _print(console, "nothing to complain of", "green")


def what_it_is(report: CheckReport) -> str:
    """The data in one sentence, in the words of who has them."""
    training = report.training
    count = sum(bad.count for bad in training.bad) + training.records
    count += report.evaluation.records if report.evaluation else 0
    first, *others = report.files
    what = f"{count:,} {f'{training.format} ' if training.format else ''}records"
    if others:
        return f"{first.name} and {len(others):,} more: {len(report.files):,} files, {first.content} first: {what}"
    return f"{first.name}: this is {first.content} of {what}"


def _show_split(split: SplitStats, use: str, unit: str, console: Console) -> None:
    text = f"{use:<10}{split.records:,} records"
    if unit == "tokens":
        share = 100 * split.supervised_tokens / max(split.tokens, 1)
        text += f", {split.samples:,} samples, {split.tokens:,} tokens, {share:.0f} % of them learned"
    _print(console, text)
    losses = [
        (split.truncated, "lose their end to maxSequenceLength"),
        (split.overlong, "are left out: they are longer than maxSequenceLength"),
        (split.dropped - split.overlong, "are left out: nothing to learn is left of them"),
        (split.duplicates, "say the same as an earlier one"),
        (split.overlap, "are trained on as well"),
        *((bad.count, f"cannot be trained on: {bad.reason} ({', '.join(bad.places)})") for bad in split.bad),
    ]
    for count, what in losses:
        if count:
            _print(console, f"          {count:,} {what}")
    for line in source_lines(split):
        _print(console, f"          {line}")
    for line in histogram_lines(split.lengths, unit):
        _print(console, f"          {line}")


def histogram_lines(bins: Sequence[LengthBin], unit: str) -> list[str]:
    """A bar for each range of lengths."""
    most = max((bin_.count for bin_ in bins), default=0)
    width = max((len(f"{bin_.up_to:,}") for bin_ in bins), default=0)
    return [
        f"up to {bin_.up_to:>{width},} {unit}  {'#' * -(-BAR * bin_.count // most)} {bin_.count:,}"
        for bin_ in bins
    ]


def _print(console: Console, text: str, style: str | None = None) -> None:
    console.print(Text(printable(text)), style=style, soft_wrap=True)
