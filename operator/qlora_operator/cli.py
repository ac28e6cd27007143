"""The `qlora` command."""

import argparse
import importlib.metadata
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from qlora_contract.places import PlaceError, split_pvc
from qlora_contract.remote import is_remote
from qlora_operator import plan, processes, run
from qlora_operator.api.files import load_jobs
from qlora_operator.api.types import QLoRAJob
from qlora_operator.display import printable
from qlora_operator.errors import CommandError, InvalidFileError
from qlora_operator.validate import validate

USAGE = 2
"""Exit code for arguments and files that are wrong."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a terminal that lacks a character shows its number
    options = parser().parse_args(arguments)
    try:
        return int(COMMANDS[options.command](options))
    except (InvalidFileError, PlaceError) as error:
        return _fail(str(error), USAGE)
    except CommandError as error:
        return _fail(str(error), error.code)
    except (
        BrokenPipeError
    ):  # `qlora plan ... | head`: nobody reads any more, and the last flush must not say so
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _fail(sentence: str, code: int) -> int:
    print(f"error: {printable(sentence)}", file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    whole = argparse.ArgumentParser(prog="qlora", description="Quantised LoRA fine-tuning on CPUs.")
    version = importlib.metadata.version("qlora-operator")
    whole.add_argument("--version", action="version", version=f"qlora {version}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser("validate", help="say whether files of jobs are right")
    check.add_argument("files", nargs="+", metavar="FILE", help="YAML or JSON; - is standard input")
    look = commands.add_parser(
        "plan", help="show what a job would do on this machine: memory, steps, a sample"
    )
    look.add_argument("-o", "--output", choices=["text", "json"], default="text", help="default: text")
    get = commands.add_parser("fetch", help="fetch a job's remote model and data into its workspace")
    train = commands.add_parser("run", help="train a job on this machine")
    for command in (get, train):
        command.add_argument("--verbose", action="store_true", help="show the output of every process, too")
    for command in (look, get, train):
        command.add_argument("file", metavar="FILE", help="YAML or JSON with a QLoRAJob; - is standard input")
        command.add_argument("--name", help="which job, when the file has several")
        command.add_argument(
            "--volume",
            action="append",
            default=[],
            metavar="CLAIM=PATH",
            help="the folder that stands for a PersistentVolumeClaim here; once for each",
        )
    return whole


def _validate(options: argparse.Namespace) -> int:
    return validate(options.files, sys.stdout)


def _plan(options: argparse.Namespace) -> int:
    job = one_job(options.file, options.name)
    volumes = parse_volumes(options.volume)
    sources = (job.spec.model.source, job.spec.dataset.source)
    # What is remote lies in the workspace.
    needed = [job.spec.workspace if is_remote(uri) else uri for uri in sources]
    missing = sorted(claims(*needed) - volumes.keys())
    planned = plan.job_plan(job, volumes, missing)
    if options.output == "json":
        print(planned.model_dump_json(by_alias=True, indent=2))
    else:
        plan.show(planned, Console(highlight=False))
    return 0


def _fetch(options: argparse.Namespace) -> int:
    job, volumes = _job_and_volumes(options)
    return run.fetch_only(job, volumes, Console(highlight=False), verbose=options.verbose)


def _run(options: argparse.Namespace) -> int:
    job, volumes = _job_and_volumes(options)
    return run.run(job, volumes, Console(highlight=False), verbose=options.verbose)


def _job_and_volumes(options: argparse.Namespace) -> tuple[QLoRAJob, dict[str, Path]]:
    """The job, and a folder for each of its claims. Raises CommandError when one has none."""
    job = one_job(options.file, options.name)
    volumes = parse_volumes(options.volume)
    spec = job.spec
    if missing := sorted(claims(spec.workspace, spec.model.source, spec.dataset.source) - volumes.keys()):
        wanted = " ".join(f"--volume {claim}=PATH" for claim in missing)
        raise CommandError(f"the job uses claims that have no folder here; add {wanted}", USAGE)
    processes.require_trainer()
    return job, volumes


COMMANDS = {"validate": _validate, "plan": _plan, "fetch": _fetch, "run": _run}


def one_job(file: str, name: str | None) -> QLoRAJob:
    """The job of a file, or the one of this name. Raises CommandError when that is not one."""
    jobs = load_jobs(file)
    names = ", ".join(job.metadata.name for job in jobs)
    if name is None and len(jobs) > 1:
        raise CommandError(f"{file} has {len(jobs)} jobs ({names}); choose one with --name", USAGE)
    chosen = [job for job in jobs if name in (None, job.metadata.name)]
    if len(chosen) != 1:
        raise CommandError(f"{file} has {len(chosen)} jobs of the name {name!r}; it has: {names}", USAGE)
    return chosen[0]


def parse_volumes(texts: Sequence[str]) -> dict[str, Path]:
    """CLAIM=PATH of every --volume. Raises CommandError for another form, or a path that is no folder."""
    volumes: dict[str, Path] = {}
    for text in texts:
        claim, equals, path = text.partition("=")
        if not (claim and equals and path):
            raise CommandError(f"--volume {text}: must be CLAIM=PATH, such as team-data=/srv/data", USAGE)
        if claim in volumes:
            raise CommandError(
                f"--volume {text}: claim {claim} has a folder already, {volumes[claim]}", USAGE
            )
        if not Path(path).is_dir():
            raise CommandError(f"--volume {text}: {path} is no folder; make it, or name another", USAGE)
        volumes[claim] = Path(os.path.abspath(path))  # noqa: PTH100 - links are kept: places resolves them
    return volumes


def claims(*uris: str) -> set[str]:
    """The claims of those URIs that name one."""
    return {split_pvc(uri)[0] for uri in uris if not is_remote(uri)}


if __name__ == "__main__":
    sys.exit(main())
