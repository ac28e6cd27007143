"""`qlora init`: a job's file to begin with, made of what is found at the model and the data."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_contract.exit_codes import ExitCode
from qlora_contract.files import write_atomically
from qlora_contract.plan import CheckReport, LengthBin, batch_tokens
from qlora_contract.units import format_bytes
from qlora_operator.api import names
from qlora_operator.api.loader import STDIN, parse_job
from qlora_operator.api.quantity import parse_memory
from qlora_operator.api.v1alpha1 import Topology, Training
from qlora_operator.api.yaml_reader import read_documents
from qlora_operator.cli import check, early_checks
from qlora_operator.cli.job_file import WORKSPACE, amendment, columns, is_uri, job_name
from qlora_operator.cli.model_facts import has_template, positions, usual_length
from qlora_operator.cli.processes import ProcessError
from qlora_operator.cli.trainer_query import query_trainer, require_trainer
from qlora_operator.errors import USAGE, CommandError, Fault, InvalidFileError, InvalidJobError
from qlora_operator.placement.local import on_this_machine

TARGETS = ("machine", "cluster")
CLAIM = "pvc://team-data/qlora"
"""Where a job of a cluster works, if nothing else is said."""
LENGTHS = (256, 512, 1024, 2048, 4096)
"""For maxSequenceLength."""
COVERED = 0.99
"""Share of the samples that are not to be cut off."""
SMALL = 5000
"""Records: fewer are seen more than once."""
USUAL_BATCH: int = Training.model_fields["global_batch_tokens"].default
CLUSTER_MEMORY = "16Gi"
"""Of a rank, where the model is not seen."""


@dataclass(frozen=True)
class Answers:
    """What a job is made of, as the user writes it."""

    model: str
    data: str
    target: str
    where: str
    name: str
    columns: Mapping[str, str]
    """dataset.columns."""


@dataclass(frozen=True)
class Found:
    """What was seen at the model and the data; None: not looked at."""

    report: CheckReport | None
    """Of the data."""
    has_template: bool | None
    weights: int | None
    """Bytes of the model's weights."""
    positions: int | None
    """Tokens that the model can read at once."""
    memory: str
    """What a rank can have on this machine."""


def init(options: argparse.Namespace, ask: Callable[[str], str] = input) -> int:
    """Write the file, and say where it is and what comes next.

    Raises:
        CommandError: something is not given and nobody can be asked, or the model or the data are not there.
    """
    answers = _answers(options, ask if sys.stdin.isatty() or ask is not input else None)
    target = options.output or f"{answers.name}.yaml"
    if target != STDIN and Path(target).exists() and not options.force:
        raise CommandError(f"{target} is there already: choose another with --output, or add --force", USAGE)
    found = look(answers)
    text = job_text(answers, found, Path.cwd() if target == STDIN else Path(os.path.abspath(target)).parent)  # noqa: PTH100
    _validate(text, target)
    if target == STDIN:
        print(text, end="")
        return 0
    try:
        write_atomically(Path(target), text)
    except OSError as error:
        raise CommandError(f"{target} cannot be written: {error.strerror}") from error
    print(f"wrote {target}")
    if answers.target == "machine":
        print(f"next: qlora plan {target}, then qlora run {target}")
    else:
        print(f"next: put the model and the data on the claim, then kubectl apply -f {target}")
    return 0


def _answers(options: argparse.Namespace, ask: Callable[[str], str] | None) -> Answers:
    """What is given, and what the user says when asked for the rest."""

    def asked(given: str | None, question: str, default: str | None = None) -> str:
        if given:
            return given
        if ask is None:
            assert default is not None, "what has no default was required"
            return default
        while not (answer := ask(question).strip() or default or ""):
            pass
        return answer

    if ask is None and (missing := [flag for flag in ("model", "data") if not getattr(options, flag)]):
        raise CommandError(
            f"there is no terminal to ask on: give {' and '.join(f'--{flag}' for flag in missing)}", USAGE
        )
    try:
        model = asked(options.model, "model (a folder, or hf://org/name): ")
        data = asked(options.data, "data (a file or folder, or hf://datasets/org/name): ")
        target = asked(options.target, "for this machine, or a cluster? [machine] ", "machine")
        if target not in TARGETS:
            raise CommandError(f"{target!r} is neither {TARGETS[0]} nor {TARGETS[1]}", USAGE)
        default = WORKSPACE if target == "machine" else CLAIM
        where = asked(options.where, f"where it works and leaves its results [{default}]: ", default)
    except EOFError:
        raise CommandError("nothing more was answered, and nothing is written", USAGE) from None
    if target == "cluster" and not where.startswith("pvc://"):
        raise CommandError(f"--where {where}: on a cluster a job works on a claim, pvc://CLAIM/PATH", USAGE)
    return Answers(
        model, data, target, where, options.name or job_name(model, data), columns(options.columns)
    )


def look(answers: Answers) -> Found:
    """Look at the model and the data, as far as they are on this machine.

    Raises:
        CommandError: a path is not there, or is not what it should be.
    """
    model = None if is_uri(answers.model) else _path(answers.model)
    data = None if is_uri(answers.data) else _path(answers.data)
    if model is not None and (fault := early_checks.model_fault(model)):
        raise CommandError(f"the model: {fault}", ExitCode.MODEL_UNUSABLE)
    if data is not None and (fault := early_checks.data_fault(data)):
        raise CommandError(f"the data: {fault}", ExitCode.INVALID_DATA)
    report = None
    if data is not None:
        try:
            require_trainer()
            print("looking at the data ...", file=sys.stderr)
            length = {"max_sequence_length": usual_length(model)}
            dataset = {"columns": answers.columns} if answers.columns else {}
            report = check.check(
                check.of_paths(str(data), None if model is None else str(model), dataset, length)
            )
        except ProcessError as error:
            print(f"the data are not looked at: {error}", file=sys.stderr)
        except CommandError as error:
            raise CommandError(f"the data: {error}", error.code) from None
    return Found(
        report,
        None if model is None else has_template(model),
        None if model is None else sum(f.stat().st_size for f in model.glob("*.safetensors")) or None,
        None if model is None else positions(model),
        _memory_here(),
    )


def _memory_here() -> str:
    """As much as a rank can have where each NUMA cluster of this machine has one."""
    machine = query_trainer().machine
    assert machine is not None, "without arguments, the planner answers with the machine"
    nothing = Topology(memory_per_rank=CLUSTER_MEMORY)
    nothing.model_fields_set.clear()
    return on_this_machine(nothing, machine).memory_per_rank


def _path(text: str) -> Path:
    return Path(os.path.abspath(Path(text).expanduser()))  # noqa: PTH100 - links are kept


def sequence_length(bins: Sequence[LengthBin]) -> int:
    """The least of LENGTHS that cuts off next to none of the samples, by their lengths in tokens; 0 without any."""
    total = sum(each.count for each in bins)
    covered = 0
    for each in sorted(bins, key=lambda each: each.up_to):
        covered += each.count
        if covered >= COVERED * total:
            return next((length for length in LENGTHS if length >= each.up_to), LENGTHS[-1])
    return 0


def job_text(answers: Answers, found: Found, folder: Path) -> str:
    """The file's text.

    Args:
        answers: what the user wants.
        found: what was seen.
        folder: the file's, which paths are relative to.
    """
    on_cluster = answers.target == "cluster"
    claim = answers.where.rpartition("/")[0] if answers.where.count("/") > 2 else answers.where

    def source(text: str) -> tuple[str, str]:
        """(as the file has it, a comment)."""
        if is_uri(text):
            return text, ""
        path = _path(text)
        if on_cluster:
            return f"{claim}/{path.name}", f"copy {path} there"
        inside = path.is_relative_to(folder) and path != folder
        return (f"./{path.relative_to(folder)}" if inside else str(path)), (
            "a path of this machine; on a cluster pvc://CLAIM/PATH"
        )

    model, about_model = source(answers.model)
    data, about_data = source(answers.data)
    workspace = answers.where
    if not on_cluster:
        workspace, _ = source(answers.where)
    report = found.report
    format_ = report.training.format if report else None
    records = (
        report.training.records + (report.evaluation.records if report and report.evaluation else 0)
        if report
        else 0
    )
    in_tokens = report is not None and report.unit == "tokens"
    wanted = sequence_length(report.training.lengths) if report and in_tokens else 0
    length = min(wanted, found.positions or wanted) or min(1024, found.positions or 1024)
    lines = [
        f"# A job for {'a cluster: kubectl apply -f FILE' if on_cluster else 'this machine: qlora run FILE'}.",
        "# Every other field, with its default: docs/reference/qlorajob.md.",
        f"apiVersion: {names.API_VERSION}",
        f"kind: {names.KIND}",
        "metadata:",
        _line(
            2, "name", answers.name, "its folder in the workspace is jobs/NAME; another name is another job"
        ),
        "spec:",
        _line(2, "workspace", workspace, "checkpoints, logs and the adapter go there"),
        "  model:",
        _line(4, "source", model, _joined(about_model, _about_weights(found))),
        "  dataset:",
        _line(4, "source", data, _joined(about_data, f"{records:,} records" if report else "")),
    ]
    if format_:
        lines.append(_line(4, "format", format_, "as found in the data"))
    if format_ in ("chat", "alpaca") and found.has_template is False:
        lines.append(
            _line(
                4,
                "chatTemplate",
                "bundled:auto",
                "the model has no chat template: one that fits it is chosen",
            )
        )
    if answers.columns:
        mapping = ", ".join(f"{ours}: {json.dumps(theirs)}" for ours, theirs in answers.columns.items())
        lines.append(f"    columns: {{{mapping}}}  # what the data call them")
    epochs = 1 if records > SMALL else 3
    lines += [
        "  training:",
        _line(4, "epochs", str(epochs), "passes over the data; or maxSteps in its place"),
    ]
    if (
        report
        and in_tokens
        and (batch := batch_tokens(report.training.tokens * epochs, length)) < USUAL_BATCH
    ):
        lines.append(
            _line(4, "globalBatchTokens", str(batch), "of a step: less than usual, since the data are few")
        )
    lines += [
        _line(4, "learningRate", "2e-4", "lower it if the eval loss rises"),
        _line(
            4,
            "maxSequenceLength",
            str(length),
            f"in tokens; holds {COVERED:.0%} of the samples whole"
            if in_tokens
            else "in tokens; longer samples are cut off",
        ),
        "  adapter:",
        _line(4, "rank", "16", "more learns more, and takes more memory"),
        "  evaluation:",
        _line(
            4,
            "requireImprovement",
            "true",
            "an adapter that is no better than the model fails the job; false publishes it all the same",
        ),
        "  topology:",
        _line(4, "memoryPerRank", _memory(on_cluster, found), "`qlora plan` says how much is needed"),
    ]
    return "\n".join(lines) + "\n"


def _about_weights(found: Found) -> str:
    template = {True: "with a chat template", False: "without a chat template", None: ""}[found.has_template]
    return _joined(format_bytes(found.weights) if found.weights else "", template)


def _memory(on_cluster: bool, found: Found) -> str:
    """memoryPerRank: what is surely enough; on this machine no more than there is, so that others may use the rest."""
    # NF4 is a quarter of bf16; activations and the rest of a small batch are a few GiB.
    enough = CLUSTER_MEMORY if found.weights is None else f"{-(-found.weights // 2**31) + 4}Gi"
    return enough if on_cluster else min(enough, found.memory, key=parse_memory)


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _line(indent: int, key: str, value: str, comment: str = "") -> str:
    plain = re.fullmatch(r"[A-Za-z0-9./~][-A-Za-z0-9_./:~+]*", value) and not value.endswith(":")
    text = f"{' ' * indent}{key}: {value if plain else json.dumps(value)}"
    return f"{text}  # {comment}" if comment else text


def _validate(text: str, target: str) -> None:
    """Raise InvalidFileError unless the text is a job."""
    (document,) = read_documents(text.encode())
    try:
        parse_job(amendment(target)(document))
    except InvalidJobError as error:
        raise InvalidFileError([Fault("the job", message, path) for path, message in error.faults]) from error
