"""The `qlora` command."""

import argparse
import importlib.metadata
import io
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from qlora_contract.cost import Price, parse_price
from qlora_contract.export import forms_of
from qlora_contract.job_folder import job_path
from qlora_contract.paths import InvalidUriError, split_pvc
from qlora_contract.remote import is_remote
from qlora_contract.run_config import ISA_TIERS, GgufType, Output, RunConfig
from qlora_operator.api.loader import load_jobs
from qlora_operator.api.run_config import to_run_config
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.cli import check, export, plan, report, run, size
from qlora_operator.cli.chat import chat
from qlora_operator.cli.chat_arguments import add_chat, add_compare, chat_settings
from qlora_operator.cli.chat_exchange import local_model, local_run, workspace_root
from qlora_operator.cli.compare import compare, read_prompts
from qlora_operator.cli.display import printable
from qlora_operator.cli.trainer_query import require_trainer
from qlora_operator.cli.validate import validate
from qlora_operator.errors import CommandError, InvalidFileError

USAGE = 2
"""Exit code for wrong arguments and invalid files."""
INTERRUPTED = 128 + signal.SIGINT
"""As shells have it for a command that Ctrl-C ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""

    def run() -> int:
        options = parser().parse_args(arguments)
        return COMMANDS[options.command](options)

    return guarded(run)


def guarded(command: Callable[[], int]) -> int:
    """A command's exit code, its expected errors told on standard error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal lacks is shown as its number.
            stream.reconfigure(errors="backslashreplace")
    try:
        return command()
    except (InvalidFileError, InvalidUriError) as error:
        return _fail(str(error), USAGE)
    except CommandError as error:
        return _fail(str(error), error.code)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # `qlora plan ... | head`: the reader is gone, and the flush at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _fail(message: str, code: int) -> int:
    print(f"error: {printable(message)}", file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    command = argparse.ArgumentParser(prog="qlora", description="Quantized LoRA fine-tuning on CPUs.")
    version = importlib.metadata.version("qlora-operator")
    command.add_argument("--version", action="version", version=f"qlora {version}")
    subcommands = command.add_subparsers(dest="command", required=True, metavar="COMMAND")
    validating = subcommands.add_parser("validate", help="check job files for errors")
    validating.add_argument("files", nargs="+", metavar="FILE", help="YAML or JSON; - is standard input")
    planning = subcommands.add_parser(
        "plan",
        help="show what a job would do on this machine: memory, steps, time and a sample; or the size of a model "
        "(a folder with its config.json, or hf://org/name) on a machine that need not be here",
    )
    planning.add_argument("-o", "--output", choices=["text", "json"], default="text", help="default: text")
    for flag, type_, metavar, told in (
        ("--cpus", int, "N", "CPUs of a machine to plan for instead of this one"),
        ("--memory", str, "SIZE", "its memory, such as 256Gi"),
        ("--isa", str, "TIER", f"its processor tier: {', '.join(ISA_TIERS)}"),
        ("--numa-nodes", int, "N", "its NUMA clusters; default: 1"),
        ("--tokens", int, "N", f"tokens to say the time of; default: {size.DEFAULT_TOKENS:,}"),
    ):
        planning.add_argument(flag, type=type_, metavar=metavar, help=told)
    checking = subcommands.add_parser(
        "check", help="show what is in data: format, counts, lengths, faults, and what would be learned"
    )
    checking.add_argument(
        "data", metavar="DATA", help="a file of records or a folder of splits; or a job file"
    )
    checking.add_argument(
        "--model", metavar="PATH", help="a model's folder: its tokenizer and chat template are used"
    )
    checking.add_argument("--format", help="as dataset.format; default: auto")
    checking.add_argument(
        "--columns", action="append", default=[], metavar="NAME=COLUMN,...", help="as dataset.columns"
    )
    checking.add_argument(
        "--split", metavar="NAME", help="of a folder, the split to train on; default: train"
    )
    checking.add_argument("--eval-split", metavar="NAME", help="of a folder, the split to evaluate on")
    checking.add_argument("--max-length", type=int, metavar="TOKENS", help="as training.maxSequenceLength")
    checking.add_argument("-o", "--output", choices=["text", "json"], default="text", help="default: text")
    _add_name_and_volume(checking, "for a job file, as of `qlora plan`", file="a job file")
    fetching = subcommands.add_parser("fetch", help="fetch a job's remote model and data into its workspace")
    training = subcommands.add_parser("run", help="train a job on this machine")
    for subcommand in (fetching, training):
        subcommand.add_argument(
            "--verbose", action="store_true", help="also show the output of every process"
        )
    reporting = subcommands.add_parser("report", help="write a job's report.html anew, and say where it is")
    reporting.add_argument(
        "file", metavar="JOB", help="YAML or JSON with a QLoRAJob, or the job's folder in its workspace"
    )
    for subcommand in (planning, fetching, training):
        subcommand.add_argument(
            "file", metavar="FILE", help="YAML or JSON with a QLoRAJob; - is standard input"
        )
    for subcommand in (planning, training, reporting):
        subcommand.add_argument(
            "--price", metavar="PRICE", help="what a CPU costs for an hour, such as '0.04 EUR'"
        )
    exporting = subcommands.add_parser(
        "export", help="make a merged model or GGUF files of a finished job's adapter"
    )
    exporting.add_argument(
        "file",
        metavar="JOB",
        help="YAML or JSON with a QLoRAJob, or the job's folder, jobs/NAME of its workspace",
    )
    exporting.add_argument(
        "--format", action="append", choices=["merged", "gguf"], required=True, help="repeat for both"
    )
    exporting.add_argument(
        "--gguf-type",
        action="append",
        choices=get_args(GgufType),
        help="default: q8_0; repeat for several; lora is the adapter alone",
    )
    exporting.add_argument(
        "--model", type=Path, metavar="PATH", help="the base model's folder, where it is not found otherwise"
    )
    exporting.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PATH",
        help="folder that gets a folder of each form; default: exports, in the job's folder",
    )
    for subcommand in (planning, fetching, training, reporting, exporting):
        _add_name_and_volume(
            subcommand, "the directory that stands for a PersistentVolumeClaim here; repeat for each claim"
        )
    for subcommand in (add_chat(subcommands), add_compare(subcommands)):
        subcommand.add_argument(
            "job", metavar="JOB", help="a job's file, or its folder in a workspace on this machine"
        )
        _add_name_and_volume(
            subcommand,
            "the directory that stands for a claim here; a job's folder tells that of its workspace",
        )
    return command


def _add_name_and_volume(subcommand: argparse.ArgumentParser, of_volume: str, file: str = "the file") -> None:
    """The options that say which job, and where its claims are. `of_volume`: the help of --volume."""
    subcommand.add_argument("--name", help=f"which job, if {file} has several")
    subcommand.add_argument("--volume", action="append", default=[], metavar="CLAIM=PATH", help=of_volume)


def _chat(options: argparse.Namespace) -> int:
    """`chat` or `compare`."""
    questions = read_prompts(options.prompts) if options.command == "compare" else []
    run, volumes = _trained_run(options)
    require_trainer()
    with local_model(run, volumes) as exchange:
        if options.command == "chat":
            return chat(exchange, chat_settings(options), base_only=options.base)
        console = Console(highlight=False)
        return compare(exchange, questions, chat_settings(options), output=options.output, console=console)


def _trained_run(options: argparse.Namespace) -> tuple[RunConfig, dict[str, Path]]:
    """A job that was run on this machine, and the directories of its workspace and model."""
    volumes = parse_volumes(options.volume)

    def by_file() -> RunConfig:
        job = one_job(options.job, options.name)
        return to_run_config(job, uid="chat", attempt=0, isa=job.spec.isa.allowed[0])

    folder, found = Path(options.job), local_run(options.job, by_file)
    if folder.is_dir() and (place := workspace_root(folder, found)) is not None:
        volumes.setdefault(*place)
    require_volumes(volumes, found.workspace, found.model.source)
    return found, volumes


def _plan(options: argparse.Namespace) -> int:
    price = _price(options)
    machine = size.imagined_of(options.cpus, options.memory, options.isa, options.numa_nodes)
    if machine.is_told or options.tokens is not None or size.is_model(options.file):
        return _size(options, machine)
    job = one_job(options.file, options.name)
    volumes = parse_volumes(options.volume)
    # What is remote is fetched into the workspace.
    needed = [job.spec.workspace if is_remote(uri) else uri for uri in job.spec.read_uris]
    missing = sorted(claims(*needed) - volumes.keys())
    planned = plan.job_plan(job, volumes, missing, price)
    if options.output == "json":
        print(planned.model_dump_json(by_alias=True, indent=2))
    else:
        plan.show(planned, Console(highlight=False))
    return planned.exit_code


def _size(options: argparse.Namespace, machine: size.Imagined) -> int:
    """`plan` from a model's config.json alone."""
    tokens = size.DEFAULT_TOKENS if options.tokens is None else max(1, options.tokens)
    if size.is_model(options.file):
        planned = size.size_of_model(options.file, machine, tokens)
    else:
        job, volumes = one_job(options.file, options.name), parse_volumes(options.volume)
        if not is_remote(job.spec.model.source):
            require_volumes(volumes, job.spec.model.source)
        planned = size.size_of_job(job, volumes, machine, tokens)
    if options.output == "json":
        print(planned.model_dump_json(by_alias=True, indent=2))
    else:
        size.show(planned, Console(highlight=False))
    return planned.exit_code


def _check(options: argparse.Namespace) -> int:
    if check.is_job_file(options.data):
        question = _question_of_job(options)
    else:
        dataset = {"format": options.format, "train_split": options.split, "eval_split": options.eval_split}
        if options.columns:
            dataset["columns"] = check.columns(options.columns)
        training = {"max_sequence_length": options.max_length}
        question = check.of_paths(options.data, options.model, _given(dataset), _given(training))
    report = check.check(question)
    if options.output == "json":
        print(check.as_json(report))
    else:
        check.show(report, Console(highlight=False))
    return check.exit_code(report)


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _question_of_job(options: argparse.Namespace) -> check.Question:
    """The question about a job's data. Without a folder for its model's claim, tokens are not counted."""
    of_job = ("model", "format", "columns", "split", "eval_split", "max_length")
    if given := [f"--{name.replace('_', '-')}" for name in of_job if getattr(options, name)]:
        raise CommandError(f"{', '.join(given)}: a job file says that itself; change it there", USAGE)
    job = one_job(options.data, options.name)
    volumes = parse_volumes(options.volume)
    spec = job.spec
    data = [source.uri for source in spec.sources if source.role == "dataset"]
    needed = claims(*(spec.workspace if is_remote(uri) else uri for uri in data))
    if missing := sorted(needed - volumes.keys()):
        wanted = " ".join(f"--volume {claim}=PATH" for claim in missing)
        raise CommandError(f"the job's data are on claims that have no directory here; add {wanted}", USAGE)
    with_model = (
        claims(spec.workspace if is_remote(spec.model.source) else spec.model.source) <= volumes.keys()
    )
    return check.Question(to_run_config(job, uid="check", attempt=0, isa="avx2"), volumes, with_model)


def _execute(options: argparse.Namespace) -> int:
    """`fetch` or `run`."""
    price = _price(options) if options.command == "run" else None
    job, volumes = _job_and_volumes(options)
    console = Console(highlight=False)
    if options.command == "fetch":
        return run.fetch_only(job, volumes, console, verbose=options.verbose)
    return run.run(job, volumes, console, verbose=options.verbose, price=price)


def _report(options: argparse.Namespace) -> int:
    price = _price(options)
    folder = Path(options.file)
    if not folder.is_dir():
        job, volumes = one_job(options.file, options.name), parse_volumes(options.volume)
        require_volumes(volumes, job.spec.workspace)
        folder = job_path(job.spec.workspace, job.metadata.name, volumes)
    print(report.write(folder, price))
    return 0


def _price(options: argparse.Namespace) -> Price | None:
    """What --price says. Raises CommandError where that is none."""
    try:
        return None if options.price is None else parse_price(options.price)
    except ValueError as error:
        raise CommandError(f"--price {error}", USAGE) from None


def _job_and_volumes(options: argparse.Namespace) -> tuple[QLoRAJob, dict[str, Path]]:
    """The job, and a directory for each of its claims. Raises CommandError when one has none."""
    job = one_job(options.file, options.name)
    volumes = parse_volumes(options.volume)
    spec = job.spec
    require_volumes(volumes, spec.workspace, *spec.read_uris)
    require_trainer()
    return job, volumes


def _export(options: argparse.Namespace) -> int:
    volumes = parse_volumes(options.volume)
    folder = Path(options.file)
    if not folder.is_dir():
        job = one_job(options.file, options.name)
        if missing := sorted(claims(job.spec.workspace) - volumes.keys()):
            raise CommandError(f"add --volume {missing[0]}=PATH, the directory that has the workspace", USAGE)
        folder = job_path(job.spec.workspace, job.metadata.name, volumes)
    require_trainer()
    forms = forms_of(Output(formats=options.format, gguf_types=options.gguf_type or ["q8_0"]))
    return export.export(
        folder.absolute(),
        forms,
        volumes,
        Console(highlight=False),
        model=options.model,
        output=options.output,
    )


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "validate": lambda options: validate(options.files, sys.stdout),
    "plan": _plan,
    "check": _check,
    "fetch": _execute,
    "run": _execute,
    "report": _report,
    "export": _export,
    "chat": _chat,
    "compare": _chat,
}


def one_job(file: str, name: str | None) -> QLoRAJob:
    """The job of a file, or the one of this name. Raises CommandError unless there is exactly one."""
    jobs = load_jobs(file)
    names = ", ".join(job.metadata.name for job in jobs)
    if name is None and len(jobs) > 1:
        raise CommandError(f"{file} has {len(jobs)} jobs ({names}); choose one with --name", USAGE)
    chosen = [job for job in jobs if name in (None, job.metadata.name)]
    if len(chosen) != 1:
        raise CommandError(f"{file} has {len(chosen) or 'no'} jobs named {name!r}; it has: {names}", USAGE)
    return chosen[0]


def parse_volumes(texts: Sequence[str]) -> dict[str, Path]:
    """CLAIM=PATH of every --volume. Raises CommandError for another form, or a path that is not a directory."""
    volumes: dict[str, Path] = {}
    for text in texts:
        claim, equals, path = text.partition("=")
        if not (claim and equals and path):
            raise CommandError(f"--volume {text}: must be CLAIM=PATH, such as team-data=/srv/data", USAGE)
        if claim in volumes:
            raise CommandError(
                f"--volume {text}: claim {claim} already has a directory, {volumes[claim]}", USAGE
            )
        if not Path(path).is_dir():
            raise CommandError(
                f"--volume {text}: {path} is not a directory; create it or choose another", USAGE
            )
        # Not Path.resolve: symbolic links are kept, and paths.resolve judges them.
        volumes[claim] = Path(os.path.abspath(path))  # noqa: PTH100
    return volumes


def require_volumes(volumes: Mapping[str, Path], *uris: str) -> None:
    """Raise CommandError unless every claim that the URIs name has a directory."""
    if missing := sorted(claims(*uris) - volumes.keys()):
        wanted = " ".join(f"--volume {claim}=PATH" for claim in missing)
        raise CommandError(f"the job uses claims that have no directory here; add {wanted}", USAGE)


def claims(*uris: str) -> set[str]:
    """The claims of those URIs that name one."""
    return {split_pvc(uri)[0] for uri in uris if not is_remote(uri)}
