"""The `qlora` command."""

import argparse
import difflib
import importlib.metadata
import io
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from qlora_contract.cost import Price, parse_price
from qlora_contract.descriptors import open_standard_descriptors
from qlora_contract.exit_codes import ExitCode
from qlora_contract.export import forms_of
from qlora_contract.job_folder import ADAPTER, finished_report, job_path
from qlora_contract.paths import InvalidUriError, local_uri, split_pvc
from qlora_contract.remote import is_remote
from qlora_contract.run_config import ISA_TIERS, GgufType, Output, RunConfig
from qlora_operator.api.messages import field_of_spec
from qlora_operator.api.run_config import to_run_config
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.cli import check, early_checks, export, init, plan, report, run, size
from qlora_operator.cli.chat import chat
from qlora_operator.cli.chat_arguments import add_chat, add_compare, chat_settings
from qlora_operator.cli.chat_exchange import local_model, local_run, workspace_root
from qlora_operator.cli.compare import compare, read_prompts
from qlora_operator.cli.completion import SHELLS, script
from qlora_operator.cli.destination_check import check_destination
from qlora_operator.cli.display import printable
from qlora_operator.cli.help_texts import EXAMPLES, exit_codes
from qlora_operator.cli.job_file import (
    WORKSPACE,
    columns,
    given_job,
    is_job_file,
    on_a_cluster,
    one_job,
    volumes_with_this_machine,
)
from qlora_operator.cli.job_folder import WorkspaceError
from qlora_operator.cli.settings import Setting
from qlora_operator.cli.trainer_query import require_trainer
from qlora_operator.cli.validate import validate
from qlora_operator.errors import USAGE, CommandError, InvalidFileError

INTERRUPTED = 128 + signal.SIGINT
"""As shells have it for a command that Ctrl-C ended."""
TERMINATED = 128 + signal.SIGTERM


class _Terminated(BaseException):
    """SIGTERM. Not an Exception: whatever a command has open, temporary folders among it, is closed on the way out."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)

    def run() -> int:
        options = parse(words)
        options.words = words
        try:
            return COMMANDS[options.command](options)
        except (InvalidFileError, InvalidUriError, CommandError) as error:
            if options.command != "validate" and getattr(options, "output", None) == "json":
                code = error.code if isinstance(error, CommandError) else USAGE
                print(json.dumps({"error": str(error), "exitCode": int(code)}, indent=2))
            raise

    return guarded(run)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line. What a command does not know is told with the usage of that command."""
    command = parser()
    options, unknown = command.parse_known_args(arguments)
    if unknown:
        subcommand = subcommands_of(command)[options.command]
        meant = " ".join(filter(None, (_meant(word, subcommand) for word in unknown)))
        subcommand.error(f"unrecognized arguments: {' '.join(unknown)}{meant and f'; {meant}'}")
    return options


def _meant(word: str, subcommand: argparse.ArgumentParser) -> str:
    """What was perhaps meant by an option that a subcommand does not have; empty: nothing comes to mind.

    That is an option of it, or a field of the job, which other programs have as options.
    """
    name, equals, value = word.removeprefix("--").partition("=")
    if not word.startswith("--") or not name:
        return ""
    known = subcommand._option_string_actions
    if "--set" in known and (path := field_of_spec(name)):
        return f"did you mean --set {path}={value if equals else 'VALUE'}?"
    near = difflib.get_close_matches(f"--{name}", known, n=1)
    return f"did you mean {near[0]}?" if near else ""


def subcommands_of(command: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each subcommand."""
    action = next(each for each in command._actions if isinstance(each, argparse._SubParsersAction))
    return dict(action.choices)


def guarded(command: Callable[[], int]) -> int:
    """A command's exit code, its expected errors told on standard error."""
    open_standard_descriptors()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal lacks is shown as its number.
            stream.reconfigure(errors="backslashreplace")
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if in_main_thread else None
    try:
        return _told(command)
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


def _terminate(*_: object) -> None:
    raise _Terminated


def _told(command: Callable[[], int]) -> int:
    try:
        return command()
    except (InvalidFileError, InvalidUriError) as error:
        return _fail(str(error), USAGE)
    except CommandError as error:
        return _fail(str(error), error.code)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except _Terminated:
        return _fail("asked to stop", TERMINATED)
    except BrokenPipeError:
        # `qlora plan ... | head`: the reader is gone, and the flush at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _fail(message: str, code: int) -> int:
    print(f"error: {printable(message)}", file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    command = argparse.ArgumentParser(
        prog="qlora",
        description="Quantized LoRA fine-tuning on CPUs.",
        epilog=f"{EXAMPLES['qlora']}\n{exit_codes()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = importlib.metadata.version("qlora-operator")
    command.add_argument("--version", action="version", version=f"qlora {version}")
    subcommands = command.add_subparsers(dest="command", required=True, metavar="COMMAND")
    beginning = subcommands.add_parser(
        "init", help="write a job's file to begin with; asks for what is not given"
    )
    beginning.add_argument(
        "--model", metavar="MODEL", help="a model's folder, hf://org/name or s3://bucket/path"
    )
    beginning.add_argument(
        "--data", metavar="DATA", help="a file or folder, hf://datasets/org/name or s3://bucket/path"
    )
    beginning.add_argument(
        "--columns", action="append", default=[], metavar="NAME=COLUMN,...", help="as dataset.columns"
    )
    beginning.add_argument("--name", help="of the job; default: made of the model's and the data's")
    beginning.add_argument(
        "--where",
        metavar="PLACE",
        help=f"where it works: a folder, or pvc://CLAIM/PATH; default: {WORKSPACE}",
    )
    beginning.add_argument(
        "--for",
        dest="target",
        choices=init.TARGETS,
        help="machine: paths are kept; cluster: they become pvc://CLAIM/PATH",
    )
    beginning.add_argument(
        "-o", "--output", metavar="FILE", help="file to write; - is standard output; default: NAME.yaml"
    )
    beginning.add_argument("--force", action="store_true", help="write over a file that is there")
    validating = subcommands.add_parser("validate", help="check job files for errors")
    validating.add_argument("files", nargs="+", metavar="FILE", help="YAML or JSON; - is standard input")
    _add_set(validating)
    validating.add_argument("-o", "--output", choices=["text", "json"], default="text", help="default: text")
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
        "file", nargs="?", metavar="DATA", help="a file of records or a folder of splits; or a job file"
    )
    checking.add_argument("--data", metavar="PATH", help="the same, as of `qlora run`")
    _add_set(checking)
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
        loudness = subcommand.add_mutually_exclusive_group()
        loudness.add_argument("--verbose", action="store_true", help="also show the output of every process")
        loudness.add_argument(
            "-q", "--quiet", action="store_true", help="show errors only, and where the result is"
        )
    training.add_argument(
        "-o",
        "--output",
        choices=["text", "json"],
        default="text",
        help="json: the result as one object, with progress on standard error; default: text",
    )
    reporting = subcommands.add_parser("report", help="write a job's report.html anew, and say where it is")
    reporting.add_argument(
        "file", metavar="JOB", help="YAML or JSON with a QLoRAJob, or the job's folder in its workspace"
    )
    for subcommand in (planning, fetching, training):
        subcommand.add_argument(
            "file", nargs="?", metavar="FILE", help="YAML or JSON with a QLoRAJob; - is standard input"
        )
        without = subcommand.add_argument_group("without a file")
        without.add_argument(
            "--model", metavar="MODEL", help="a model's folder, hf://org/name or s3://bucket/path"
        )
        without.add_argument(
            "--data", metavar="DATA", help="a file or folder, hf://datasets/org/name or s3://bucket/path"
        )
        without.add_argument(
            "--columns", action="append", default=[], metavar="NAME=COLUMN,...", help="as dataset.columns"
        )
        without.add_argument(
            "--workspace",
            metavar="FOLDER",
            help=f"where the job works, and leaves its results; default: {WORKSPACE}",
        )
        _add_set(subcommand)
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
    completing = subcommands.add_parser("completion", help="print what makes a shell complete this command")
    completing.add_argument("shell", choices=SHELLS)
    for name, subcommand in subcommands.choices.items():
        subcommand.epilog = f"{EXAMPLES[name]}\n{subcommand.epilog or exit_codes(name)}"
        subcommand.formatter_class = argparse.RawDescriptionHelpFormatter
    return command


def _add_set(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of spec, such as training.maxSteps=10, and its value in YAML; without one, its default; repeat "
        "for several",
    )


def _add_name_and_volume(subcommand: argparse.ArgumentParser, of_volume: str, file: str = "the file") -> None:
    """The options that say which job, and where its claims are. `of_volume`: the help of --volume."""
    subcommand.add_argument("--name", help=f"which job, if {file} has several; without a file, its name")
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
    if folder.is_dir() and found.workspace.startswith(local_uri(Path("/"))):
        # It may have been moved.
        workspace = Path(os.path.abspath(folder)).parent.parent  # noqa: PTH100 - links are kept
        found = found.model_copy(update={"workspace": local_uri(workspace)})
    elif folder.is_dir() and (place := workspace_root(folder, found)) is not None:
        volumes.setdefault(*place)
    require_volumes(volumes, found.workspace, found.model.source)
    return found, volumes


def _plan(options: argparse.Namespace) -> int:
    price = _price(options)
    machine = size.imagined_of(options.cpus, options.memory, options.isa, options.numa_nodes)
    if (
        machine.is_told
        or options.tokens is not None
        or (options.file is not None and size.is_model(options.file))
    ):
        return _size(options, machine)
    job = given_job(options)
    volumes = parse_volumes(options.volume)
    # What is remote is fetched into the workspace.
    needed = [job.spec.workspace if is_remote(uri) else uri for uri in job.spec.read_uris]
    missing = sorted(claims(*needed) - volumes.keys())
    if not missing:
        require_trainer()
        early_checks.require_inputs(job, volumes)
    planned = plan.job_plan(job, volumes, missing, price)
    if options.output == "json":
        print(planned.model_dump_json(by_alias=True, indent=2))
    else:
        plan.show(planned, Console(highlight=False))
    return planned.exit_code


def _size(options: argparse.Namespace, machine: size.Imagined) -> int:
    """`plan` from a model's config.json alone."""
    tokens = size.DEFAULT_TOKENS if options.tokens is None else max(1, options.tokens)
    if options.file is not None and size.is_model(options.file):
        planned = size.size_of_model(options.file, machine, tokens)
    else:
        job, volumes = given_job(options), parse_volumes(options.volume)
        if not is_remote(job.spec.model.source):
            require_volumes(volumes, job.spec.model.source)
        planned = size.size_of_job(job, volumes, machine, tokens)
    if options.output == "json":
        print(planned.model_dump_json(by_alias=True, indent=2))
    else:
        size.show(planned, Console(highlight=False))
    return planned.exit_code


def _check(options: argparse.Namespace) -> int:
    if (options.file is None) == (options.data is None):
        raise CommandError("give the data, once: `qlora check DATA` or `qlora check --data DATA`", USAGE)
    options.data = options.file if options.data is None else options.data
    if is_job_file(options.data):
        question = _question_of_job(options)
    else:
        if options.set:
            raise CommandError(
                "--set changes a job file, and this is data: use --format, --columns and so on", USAGE
            )
        dataset = {"format": options.format, "train_split": options.split, "eval_split": options.eval_split}
        if options.columns:
            dataset["columns"] = columns(options.columns)
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
    job = one_job(options.data, options.name, [Setting(text) for text in options.set])
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


def _fetch(options: argparse.Namespace) -> int:
    job, volumes = _job_and_volumes(options)
    early_checks.require_place(job, volumes)
    require_trainer()
    return run.fetch_only(job, volumes, _console(options), verbose=options.verbose)


def _run(options: argparse.Namespace) -> int:
    price = _price(options)
    job, volumes = _job_and_volumes(options)
    folder = job_path(job.spec.workspace, job.metadata.name, volumes).absolute()
    console = _console(options)
    require_trainer()
    early_checks.require_place(job, volumes)
    if finished_report(folder) is None:
        early_checks.require_inputs(job, volumes)
        # A job without a file will not go to a cluster as it is.
        run.say(console, options.file and on_a_cluster(job))
        run.say(console, job.spec.output.destination and check_destination(job.spec.output.destination))
    else:
        run.say(console, early_checks.newer_inputs(job, volumes, folder))
    if options.file is None:
        run.say(
            console, f"job {job.metadata.name}, results in {folder}; the same command goes on with this job"
        )
    try:
        code = run.run(job, volumes, console, verbose=options.verbose, price=price)
    except WorkspaceError as error:
        if options.file is not None:
            raise
        raise CommandError(
            str(error).replace("another metadata.name", "another --name"), error.code
        ) from None
    except CommandError as error:
        if error.code != ExitCode.NO_IMPROVEMENT:
            raise
        again = shlex.join(["qlora", *options.words, "--set", "evaluation.requireImprovement=false"])
        raise CommandError(
            f"{error}\nTo publish it all the same, from the last checkpoint: {again}", error.code
        ) from None
    if options.output == "json":
        print(json.dumps(run.result(folder, code), indent=2))
    elif options.quiet and code == 0:
        print(folder / ADAPTER)
    return code


def _console(options: argparse.Namespace) -> Console:
    """Where `fetch` or `run` shows progress: standard output is left to what programs read."""
    if options.quiet:
        return Console(file=Path(os.devnull).open("w"))
    return Console(stderr=getattr(options, "output", None) == "json", highlight=False)


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
    job = given_job(options)
    volumes = parse_volumes(options.volume)
    spec = job.spec
    require_volumes(volumes, spec.workspace, *spec.read_uris)
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
    "init": init.init,
    "validate": lambda options: validate(
        options.files, sys.stdout, [Setting(text) for text in options.set], output=options.output
    ),
    "plan": _plan,
    "check": _check,
    "fetch": _fetch,
    "run": _run,
    "report": _report,
    "export": _export,
    "chat": _chat,
    "compare": _chat,
    "completion": lambda options: print(script(options.shell, parser())) or 0,
}


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
    return volumes_with_this_machine(volumes)


def require_volumes(volumes: Mapping[str, Path], *uris: str) -> None:
    """Raise CommandError unless every claim that the URIs name has a directory."""
    if missing := sorted(claims(*uris) - volumes.keys()):
        wanted = " ".join(f"--volume {claim}=PATH" for claim in missing)
        raise CommandError(f"the job uses claims that have no directory here; add {wanted}", USAGE)


def claims(*uris: str) -> set[str]:
    """The claims of those URIs that name one."""
    return {split_pvc(uri)[0] for uri in uris if not is_remote(uri)}
